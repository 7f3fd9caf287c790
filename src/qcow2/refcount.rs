//! Refcounts: the refcount table, and cached slices of refcount blocks.
//!
//! Widths below a byte fill each byte from its least significant bits; wider ones are big-endian
//! ("Host cluster management" in the specification).

use std::collections::BTreeSet;

use crate::bytes::HostOffset;
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::format::OFFSET_MASK;
use crate::qcow2::geometry::{Geometry, HostCluster};
use crate::qcow2::table::{Frozen, Slice, TableCache};
use crate::storage::{Buf, FileId, Op, Purpose, Storage};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// Entries of the refcount table that are written together.
pub(super) const SECTOR_ENTRIES: usize = 64;

/// A run of host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: HostCluster,
    pub(super) count: u64,
}

impl Run {
    pub(super) fn new(first: u64, count: u64) -> Self {
        Self { first: HostCluster(first), count }
    }

    pub(super) fn end(&self) -> u64 {
        self.first.0 + self.count
    }
}

/// The refcount table in memory.
struct Reftable {
    at: HostOffset,
    /// Entries the table in the file has room for.
    capacity: usize,
    /// Where the blocks are. May have entries beyond `capacity` while the table is moving.
    live: Vec<u64>,
    /// What may be written: an entry gets here when its block counts itself.
    settled: Vec<u64>,
    /// Sectors of `settled` that differ from the file.
    dirty: BTreeSet<usize>,
    /// The table's next place and its entries, once that is counted.
    next: Option<(HostOffset, usize)>,
    /// The clusters of a larger table are being counted: entries up to here are as good as there.
    growing: usize,
}

impl Reftable {
    /// How many entries there are places for in the file, or will be after the next flush.
    fn room(&self) -> usize {
        self.next.map_or(self.capacity, |(_, entries)| entries)
    }
}

/// What a flush must write of the refcount table.
pub(super) enum ReftableWork {
    /// These runs of entries, at their place in the table.
    Sectors(Vec<(HostOffset, Vec<u8>)>),
    /// All of it at a new place, and then the header: offset and clusters.
    Move {
        /// The new place.
        at: HostOffset,
        /// All entries.
        bytes: Vec<u8>,
        /// The old place.
        old: (HostOffset, u64),
    },
}

/// The refcounts of one image.
pub(super) struct Refcounts {
    file: FileId,
    geometry: Geometry,
    table: Mutex<Reftable>,
    cache: TableCache,
}

impl Refcounts {
    /// Refcounts whose table was read from `at`, one entry for each of `entries`.
    pub(super) fn new(
        file: FileId,
        geometry: Geometry,
        at: HostOffset,
        entries: Vec<u64>,
        budget: u64,
    ) -> Self {
        let table = Reftable {
            at,
            capacity: entries.len(),
            settled: entries.clone(),
            live: entries,
            dirty: BTreeSet::new(),
            next: None,
            growing: 0,
        };
        let cache = TableCache::new(geometry.slice_size(), budget);
        Self { file, geometry, table: Mutex::new(table), cache }
    }

    /// The cache of refcount block slices.
    pub(super) fn cache(&self) -> &TableCache {
        &self.cache
    }

    /// Which refcount block counts `cluster`.
    pub(super) fn block_index(&self, cluster: HostCluster) -> usize {
        usize::try_from(cluster.0 >> self.geometry.refblock_bits()).unwrap_or(usize::MAX)
    }

    /// Whether the table must grow before block `index` can be used.
    pub(super) fn lacks_room(&self, index: usize) -> bool {
        let table = lock(&self.table);
        index >= table.room().max(table.growing)
    }

    /// How many entries a table has that grows to hold block `index`: all that are known, and room
    /// for half as much again.
    pub(super) fn wanted_entries(&self, index: usize) -> u64 {
        let table = lock(&self.table);
        (index + 2).max(table.room() * 3 / 2).max(table.live.len()) as u64
    }

    /// Where a refcount block is, if there is one.
    ///
    /// # Errors
    /// When the entry is malformed.
    pub(super) fn block_at(&self, index: usize) -> Result<Option<HostOffset>> {
        let entry = lock(&self.table).live.get(index).copied().unwrap_or(0);
        let at = HostOffset(entry & OFFSET_MASK);
        if at.within(self.geometry.cluster_size()) != 0 {
            let index = index as u64;
            return Err(corrupt(CorruptKind::ReftableEntry { index, entry }));
        }
        Ok((at.0 != 0).then_some(at))
    }

    /// log2 of the refcounts in a slice.
    fn slice_entry_bits(&self) -> u32 {
        self.geometry.slice_bits() + 3 - self.geometry.refcount_order
    }

    fn slice_at(&self, slice: Slice) -> Result<Option<HostOffset>> {
        let bits = self.geometry.slices_per_table_bits();
        let within = slice & ((1 << bits) - 1);
        let block = self.block_at(usize::try_from(slice >> bits).unwrap_or(usize::MAX))?;
        Ok(block.map(|at| at + (within << self.geometry.slice_bits())))
    }

    /// Makes sure that a slice is cached; says whether it exists.
    async fn load(&self, st: &dyn Storage, slice: Slice) -> Result<bool> {
        let Some(at) = self.slice_at(slice)? else { return Ok(false) };
        let read = async || {
            let size = usize::try_from(self.geometry.slice_size()).expect("a slice is small");
            let buf = Buf::zeroed(size);
            let op = Op::Read { at, buf: buf.clone() };
            let done = st.submit(self.file, Purpose::RefblockLoad, op).await;
            done.map_err(|source| Error::io("loading a refcount block", source))?;
            Ok(buf)
        };
        self.cache.load(slice, read).await?;
        Ok(true)
    }

    /// Runs `read` on a loaded slice; `None` when there is no block.
    async fn with<R>(
        &self,
        st: &dyn Storage,
        slice: Slice,
        read: impl Fn(&[AtomicU64]) -> R,
    ) -> Result<Option<R>> {
        loop {
            if let Some(result) = self.cache.peek(slice, &read) {
                return Ok(Some(result));
            }
            if !self.load(st, slice).await? {
                return Ok(None);
            }
        }
    }

    /// The part of `run` that lies in the slice of its first cluster: slice, first entry, count.
    fn head(&self, run: Run) -> (Slice, u64, u64) {
        let bits = self.slice_entry_bits();
        let entry = run.first.0 & ((1 << bits) - 1);
        (run.first.0 >> bits, entry, run.count.min((1 << bits) - entry))
    }

    /// Adds one to (`up`) or takes one from the refcount of every cluster of `run`; returns those
    /// that reached zero.
    ///
    /// # Errors
    /// `Corrupt` when a count would leave its range; then the run is changed up to a slice
    /// boundary, and the caller must poison the image if it had counted on it.
    pub(super) async fn adjust(&self, st: &dyn Storage, run: Run, up: bool) -> Result<Vec<Run>> {
        let mut freed: Vec<Run> = Vec::new();
        let mut left = run;
        while left.count > 0 {
            let (slice, entry, count) = self.head(left);
            let part = Run { first: left.first, count };
            self.adjust_slice(st, slice, entry, part, up, &mut freed).await?;
            left = Run::new(left.first.0 + count, left.count - count);
        }
        Ok(freed)
    }

    async fn adjust_slice(
        &self,
        st: &dyn Storage,
        slice: Slice,
        entry: u64,
        part: Run,
        up: bool,
        freed: &mut Vec<Run>,
    ) -> Result<()> {
        let order = self.geometry.refcount_order;
        let most = self.most();
        loop {
            let mut wrong = None;
            let change = |words: &[AtomicU64]| {
                let bad = if up { most } else { 0 };
                let hit = (0..part.count).find(|step| get(words, order, entry + step) == bad);
                if let Some(step) = hit {
                    wrong = Some((part.first.0 + step) << self.geometry.cluster_bits);
                    return None;
                }
                for step in 0..part.count {
                    let old = get(words, order, entry + step);
                    let new = if up { old + 1 } else { old - 1 };
                    set(words, order, entry + step, new);
                    if new == 0 {
                        push_cluster(freed, part.first.0 + step);
                    }
                }
                Some(())
            };
            match self.cache.update(slice, change) {
                Some(Some(())) => return Ok(()),
                Some(None) => {
                    let at = wrong.expect("the change said no for a reason");
                    let under = CorruptKind::RefcountUnderflow(at);
                    let over = CorruptKind::RefcountOverflow(at);
                    return Err(corrupt(if up { over } else { under }));
                }
                None if self.load(st, slice).await? => {}
                None => {
                    let at = part.first.0 << self.geometry.cluster_bits;
                    return Err(corrupt(CorruptKind::RefcountUnderflow(at)));
                }
            }
        }
    }

    /// The refcount of a cluster; zero when there is no block that counts it.
    ///
    /// # Errors
    /// When the block cannot be read.
    pub(super) async fn count(&self, st: &dyn Storage, cluster: HostCluster) -> Result<u64> {
        let (slice, entry, _) = self.head(Run { first: cluster, count: 1 });
        let order = self.geometry.refcount_order;
        Ok(self.with(st, slice, |words| get(words, order, entry)).await?.unwrap_or(0))
    }

    /// The largest refcount that fits.
    pub(super) fn most(&self) -> u64 {
        let order = self.geometry.refcount_order;
        if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
    }

    /// The first run of at most `want` clusters with refcount zero that starts at or after `from`
    /// and before `end`, looking at no more than `slices` slices; and where to go on looking.
    /// Clusters without a refcount block count as free.
    pub(super) async fn find_free(
        &self,
        st: &dyn Storage,
        from: u64,
        end: u64,
        want: u64,
        slices: usize,
    ) -> Result<(Option<Run>, u64)> {
        let order = self.geometry.refcount_order;
        let mut found: Option<Run> = None;
        let mut at = from;
        for _ in 0..slices {
            if at >= end || found.is_some_and(|run| run.count >= want) {
                break;
            }
            let (slice, entry, count) = self.head(Run::new(at, end - at));
            let start = at;
            let search = |words: &[AtomicU64]| {
                let mut run = found;
                for step in 0..count {
                    let free = get(words, order, entry + step) == 0;
                    match &mut run {
                        Some(run) if run.count >= want => return (Some(*run), true),
                        Some(run) if free => run.count += 1,
                        Some(run) => return (Some(*run), true),
                        None if free => run = Some(Run::new(start + step, 1)),
                        None => {}
                    }
                }
                (run, false)
            };
            let (run, complete) = match self.with(st, slice, search).await? {
                Some(result) => result,
                None => {
                    let first = found.map_or(start, |run| run.first.0);
                    let have = found.map_or(0, |run| run.count);
                    (Some(Run::new(first, (have + count).min(want))), false)
                }
            };
            found = run;
            at = start + count;
            if complete {
                break;
            }
        }
        Ok((found, found.map_or(at, |run| run.end())))
    }

    /// Makes room for `entries` entries in memory while the clusters of the table that will hold
    /// them are counted; returns what [`Refcounts::stop_growing`] takes.
    pub(super) fn start_growing(&self, entries: usize) -> usize {
        let mut table = lock(&self.table);
        if table.live.len() < entries {
            table.live.resize(entries, 0);
            table.settled.resize(entries, 0);
        }
        std::mem::replace(&mut table.growing, entries)
    }

    /// Says that the clusters were counted, or could not be: then blocks that were made meanwhile
    /// have no entry in the file until the table grows another time.
    pub(super) fn stop_growing(&self, before: usize) {
        lock(&self.table).growing = before;
    }

    /// Says that the table shall be written at a new place, whose clusters are counted. Returns
    /// a place chosen before that no header ever named.
    pub(super) fn set_next_table(
        &self,
        at: HostOffset,
        entries: usize,
    ) -> Option<(HostOffset, usize)> {
        lock(&self.table).next.replace((at, entries))
    }

    /// Sets where a block is, in memory only; 0 takes it back.
    pub(super) fn set_block(&self, index: usize, at: HostOffset) {
        lock(&self.table).live[index] = at.0;
    }

    /// Says that a block is counted itself, so that the table in the file may name it.
    pub(super) fn settle_block(&self, index: usize) {
        let mut table = lock(&self.table);
        table.settled[index] = table.live[index];
        table.dirty.insert(index / SECTOR_ENTRIES);
    }

    /// What must be written of the table before anything may rely on blocks settled until now.
    pub(super) fn freeze_table(&self) -> Option<ReftableWork> {
        let mut table = lock(&self.table);
        let bytes =
            |entries: &[u64]| entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        if let Some((at, capacity)) = table.next.take() {
            let old_clusters = (table.capacity as u64 * 8).div_ceil(self.geometry.cluster_size());
            let old = (table.at, old_clusters);
            (table.at, table.capacity) = (at, capacity);
            table.dirty = table.dirty.split_off(&capacity.div_ceil(SECTOR_ENTRIES));
            let bytes = bytes(&table.settled[..capacity]);
            return Some(ReftableWork::Move { at, bytes, old });
        }
        let within = table.capacity.div_ceil(SECTOR_ENTRIES);
        let later = table.dirty.split_off(&within);
        let dirty = std::mem::replace(&mut table.dirty, later);
        if dirty.is_empty() {
            return None;
        }
        let sector = |sector: usize| {
            let first = sector * SECTOR_ENTRIES;
            let last = (first + SECTOR_ENTRIES).min(table.capacity);
            (table.at + first as u64 * 8, bytes(&table.settled[first..last]))
        };
        Some(ReftableWork::Sectors(dirty.into_iter().map(sector).collect()))
    }

    /// Copies every dirty slice, with its place in the file.
    ///
    /// # Errors
    /// When the refcount table is malformed.
    pub(super) fn freeze(&self) -> Result<Vec<(HostOffset, Vec<u8>)>> {
        let place = |frozen: Frozen| {
            let at = self.slice_at(frozen.slice)?.expect("a dirty slice has a block");
            Ok((at, frozen.bytes))
        };
        self.cache.freeze().into_iter().map(place).collect()
    }

    /// Where the table is in the file, and its clusters.
    pub(super) fn place(&self) -> (HostOffset, u64) {
        let table = lock(&self.table);
        (table.at, (table.capacity as u64 * 8).div_ceil(self.geometry.cluster_size()))
    }

    /// The places of all refcount blocks.
    pub(super) fn blocks(&self) -> Vec<HostOffset> {
        let table = lock(&self.table);
        let places = table.live.iter().map(|entry| HostOffset(entry & OFFSET_MASK));
        places.filter(|at| at.0 != 0).collect()
    }
}

fn corrupt(kind: CorruptKind) -> Error {
    Error::corrupt("refcounts", kind)
}

/// Appends a cluster to a list of runs.
pub(super) fn push_cluster(runs: &mut Vec<Run>, cluster: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == cluster => run.count += 1,
        _ => runs.push(Run::new(cluster, 1)),
    }
}

/// Word, byte and bit in which refcount `index` of width `1 << order` bits starts.
fn position(order: u32, index: u64) -> (usize, usize, u32) {
    let bit = index << order;
    let word = usize::try_from(bit / 64).expect("a slice is small");
    let byte = usize::try_from(bit / 8 % 8).expect("below eight");
    (word, byte, u32::try_from(bit % 8).expect("below eight"))
}

fn get(words: &[AtomicU64], order: u32, index: u64) -> u64 {
    let (word, byte, bit) = position(order, index);
    let bytes = words[word].load(Ordering::Relaxed).to_ne_bytes();
    if order < 3 {
        let mask = (1_u64 << (1 << order)) - 1;
        return u64::from(bytes[byte] >> bit) & mask;
    }
    let width = 1 << (order - 3);
    bytes[byte..byte + width].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn set(words: &[AtomicU64], order: u32, index: u64, value: u64) {
    let (word, byte, bit) = position(order, index);
    let mut bytes = words[word].load(Ordering::Relaxed).to_ne_bytes();
    if order < 3 {
        let mask = ((1_u16 << (1 << order)) - 1) << bit;
        let [_, mask] = mask.to_be_bytes();
        let [.., low] = value.to_be_bytes();
        bytes[byte] = bytes[byte] & !mask | low << bit;
    } else {
        let width = 1 << (order - 3);
        bytes[byte..byte + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
    words[word].store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let words: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
            let entries = 512 >> order;
            let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            for index in (0..entries).step_by(2) {
                set(&words, order, index, most);
            }
            for index in 0..entries {
                let expected = if index % 2 == 0 { most } else { 0 };
                assert_eq!(get(&words, order, index), expected, "order {order} index {index}");
            }
        }
    }

    #[test]
    fn narrow_counts_fill_bytes_from_the_low_end() {
        let words = [AtomicU64::new(0)];
        set(&words, 1, 1, 3);
        assert_eq!(words[0].load(Ordering::Relaxed).to_ne_bytes()[0], 0b1100);
        set(&words, 4, 1, 0x1234);
        assert_eq!(words[0].load(Ordering::Relaxed).to_ne_bytes()[2..4], [0x12, 0x34]);
    }
}
