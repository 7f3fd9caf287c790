//! What an L1 table leads to: L2 tables, and the clusters that their entries name.
//!
//! Tables are read from the file, where they are as they are in memory once everything is durable.

use std::collections::HashSet;

use crate::bytes::{HostOffset, be64};
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::check::{MEMORY, References, Use, counted};
use crate::qcow2::format::{COMPRESSED, COPIED, Cluster, L2Entry, OFFSET_MASK};
use crate::qcow2::geometry::{GuestCluster, HostCluster};
use crate::qcow2::refcount::Run;
use crate::storage::{Buf, Op, Purpose, Storage};
use crate::sync::{AtomicU64, Ordering, lock};

/// What is about to be done to every refcount below an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Change {
    Raise,
    Lower,
}

/// How COPIED flags are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flags {
    /// All are cleared: everything is about to be shared.
    Clear,
    /// Set where the refcount is one, else cleared.
    ByRefcount,
}

impl Qcow2 {
    /// The place of the L2 table that an entry of an L1 table names.
    pub(in crate::qcow2) fn table_place(
        &self,
        index: usize,
        entry: u64,
    ) -> Result<Option<HostOffset>> {
        let at = HostOffset(entry & OFFSET_MASK);
        let end = self.allocator.frontier() << self.geometry.cluster_bits;
        if at.0 != 0 && (at.within(self.geometry.cluster_size()) != 0 || at.0 >= end) {
            let kind = CorruptKind::L1Entry { index: index as u64, entry };
            return Err(Error::corrupt("L1 table", kind));
        }
        Ok((at.0 != 0).then_some(at))
    }

    async fn read_l2(&self, st: &dyn Storage, table: HostOffset) -> Result<Vec<u8>> {
        self.read_bytes(st, Purpose::L2Load, table, self.geometry.cluster_size()).await
    }

    /// The clusters that the entries of an L2 table name, one run for each reference or for many
    /// that follow each other.
    fn references(&self, bytes: &[u8], index: usize) -> Result<Vec<Run>> {
        if self.has_data_file() {
            // A data file has no refcounts.
            return Ok(Vec::new());
        }
        let bits = self.geometry.cluster_bits;
        let first = (index as u64) << self.geometry.l2_bits();
        let mut runs: Vec<Run> = Vec::new();
        for (guest, bytes) in (first..).zip(bytes.chunks_exact(1 << self.geometry.l2_entry_bits()))
        {
            let word = |at| be64(bytes, at).unwrap_or(0);
            let entry = L2Entry { word: word(0), bitmap: word(8) };
            if entry == L2Entry::default() {
                continue;
            }
            let cluster = self.cluster(entry, GuestCluster(guest))?;
            let (at, last) = match (cluster.host(), cluster) {
                (Some(at), _) => (at.0, at.0),
                (None, Cluster::Compressed(place)) => {
                    (place.at.0, place.at.0.saturating_add(place.bytes - 1))
                }
                (None, _) => continue,
            };
            let run = Run::new(at >> bits, (last >> bits) - (at >> bits) + 1);
            match runs.last_mut() {
                Some(before) if before.end() == run.first.0 => before.count += run.count,
                _ => runs.push(run),
            }
        }
        Ok(runs)
    }

    /// Makes sure, before anything is changed, that all tables below the entries of an L1 table
    /// from `first` on can be read, each of them once, and that every refcount can be changed.
    /// Everything is durable. Reads each table once for each [`MEMORY`] bytes of counts.
    ///
    /// # Errors
    /// `Corrupt` when tables or refcounts contradict the format, or lead to other metadata, or lead
    /// anywhere more often than was counted; `Refused` when a refcount has no room.
    pub(in crate::qcow2) async fn check_tree(
        &self,
        st: &dyn Storage,
        l1: &[u64],
        first: usize,
        change: Change,
    ) -> Result<()> {
        self.check_roots(l1, first)?;
        let mut from = 0;
        while from < u64::MAX {
            let tally = References::new(from, MEMORY);
            let mut seen = Counts { most: self.refcounts.most(), change, tally };
            self.tally_tree(st, l1, first, &mut seen).await?;
            from = seen.tally.window().end;
        }
        match change {
            Change::Raise => Ok(()),
            Change::Lower if l1.iter().skip(first).all(|entry| entry & OFFSET_MASK == 0) => Ok(()),
            // Somebody else's reference may be counted for one of this tree.
            Change::Lower => counted(st, self.file).await?.refuse_low(),
        }
    }

    /// Makes sure that every L2 table that an L1 table leads to is no other metadata, and comes
    /// only once: then the work that follows is bounded by the file's length.
    fn check_roots(&self, l1: &[u64], first: usize) -> Result<()> {
        let own: HashSet<u64> = self.l1_words().iter().map(|entry| entry & OFFSET_MASK).collect();
        let mut met = HashSet::new();
        for (index, &entry) in l1.iter().enumerate().skip(first) {
            let Some(table) = self.table_place(index, entry)? else { continue };
            let offset = table.0;
            if self.regions.contains(table, 1) && !own.contains(&offset) {
                let kind = CorruptKind::TableOverlap { table: "L2 table", offset };
                return Err(Error::corrupt("L1 table", kind));
            }
            if !met.insert(offset) {
                return Err(Error::corrupt("L1 table", CorruptKind::TableTwice(offset)));
            }
        }
        Ok(())
    }

    async fn tally_tree(
        &self,
        st: &dyn Storage,
        l1: &[u64],
        first: usize,
        seen: &mut Counts,
    ) -> Result<()> {
        for (index, &entry) in l1.iter().enumerate().skip(first) {
            let Some(table) = self.table_place(index, entry)? else { continue };
            let host = self.geometry.host_cluster(table);
            seen.check(self, host, self.refcounts.count(st, host).await?)?;
            for run in self.references(&self.read_l2(st, table).await?, index)? {
                let at = self.geometry.host_start(run.first);
                self.check_overlap(self.file, at, run.count << self.geometry.cluster_bits)?;
                for cluster in run.first.0..run.end() {
                    let host = HostCluster(cluster);
                    seen.check(self, host, self.refcounts.count(st, host).await?)?;
                }
            }
        }
        Ok(())
    }

    /// Adds a reference to everything that the active L1 table leads to, and clears its COPIED
    /// flags; a flush on the way finds the refcounts of each table raised before its flags change.
    pub(super) async fn share_active(&self, st: &dyn Storage) -> Result<()> {
        for (index, entry) in self.l1_words().into_iter().enumerate() {
            if let Some(table) = self.table_place(index, entry)? {
                let bytes = self.raise_table(st, index, table).await?;
                self.flag_table(st, index, table, &bytes, Flags::Clear).await?;
                self.relieve(st).await?;
            }
        }
        Ok(())
    }

    /// Adds a reference to everything that a snapshot's L1 table leads to. COPIED flags of its
    /// tables mean nothing, but soon they may: those that are set are cleared in the file.
    pub(super) async fn share_snapshot(&self, st: &dyn Storage, l1: &[u64]) -> Result<()> {
        for (index, &entry) in l1.iter().enumerate() {
            let Some(table) = self.table_place(index, entry)? else { continue };
            let bytes = self.raise_table(st, index, table).await?;
            let shared = self.shared_entries(bytes.clone());
            if shared != bytes {
                let write = Op::Write { at: table, buf: Buf::copy_of(&shared) };
                let done = st.submit(self.file, Purpose::SnapshotWrite, write).await;
                self.mark_dirty(self.file);
                done.map_err(|source| Error::io("clearing flags of a snapshot", source))?;
            }
            self.relieve(st).await?;
        }
        Ok(())
    }

    /// Adds a reference to an L2 table and to all that it names; returns the table.
    async fn raise_table(
        &self,
        st: &dyn Storage,
        index: usize,
        table: HostOffset,
    ) -> Result<Vec<u8>> {
        let bytes = self.read_l2(st, table).await?;
        for run in self.references(&bytes, index)? {
            self.refcounts.adjust(st, run, true).await?;
        }
        let run = Run { first: self.geometry.host_cluster(table), count: 1 };
        self.refcounts.adjust(st, run, true).await?;
        Ok(bytes)
    }

    /// Takes a reference from everything that an L1 table leads to which nothing durable names.
    pub(super) async fn release(&self, st: &dyn Storage, l1: &[u64]) -> Result<()> {
        for (index, &entry) in l1.iter().enumerate() {
            let Some(table) = self.table_place(index, entry)? else { continue };
            let epoch = self.epochs.now();
            for run in self.table_runs(st, index, table).await? {
                self.limbo.never_linked(run, epoch);
            }
            self.drain_limbo(st).await?;
        }
        Ok(())
    }

    /// An L2 table and the clusters that it names.
    pub(in crate::qcow2) async fn table_runs(
        &self,
        st: &dyn Storage,
        index: usize,
        table: HostOffset,
    ) -> Result<Vec<Run>> {
        let mut runs = self.references(&self.read_l2(st, table).await?, index)?;
        runs.push(Run { first: self.geometry.host_cluster(table), count: 1 });
        Ok(runs)
    }

    /// Sets the COPIED flags of the active tables by the refcounts. Everything is durable.
    pub(super) async fn refresh_flags(&mut self, st: &dyn Storage) -> Result<()> {
        // A cached slice of a table that was shared shows none of the flags in the file.
        self.l2 = self.l2.emptied();
        for (index, entry) in self.l1_words().into_iter().enumerate() {
            if let Some(table) = self.table_place(index, entry)? {
                let bytes = self.read_l2(st, table).await?;
                self.flag_table(st, index, table, &bytes, Flags::ByRefcount).await?;
                self.relieve(st).await?;
            }
        }
        Ok(())
    }

    /// Sets the COPIED flags of an active L1 entry and of the table that it names, whose bytes in
    /// the file are given.
    async fn flag_table(
        &self,
        st: &dyn Storage,
        index: usize,
        table: HostOffset,
        bytes: &[u8],
        how: Flags,
    ) -> Result<()> {
        let old = self.l1[index].load(Ordering::Acquire);
        let new = self.flagged(st, old, table, how).await?;
        if new != old {
            self.l1[index].store(new, Ordering::Release);
            lock(&self.l1_dirty).insert(index);
        }
        let in_slice = 1_u64 << self.geometry.l2_slice_entry_bits();
        let size = usize::try_from(self.geometry.slice_size()).expect("a slice is small");
        let first = (index as u64) << self.geometry.l2_bits();
        let clusters = (first..).step_by(usize::try_from(in_slice).expect("a slice is small"));
        for (first, bytes) in clusters.zip(bytes.chunks_exact(size)) {
            self.flag_slice(st, GuestCluster(first), bytes, how).await?;
        }
        Ok(())
    }

    async fn flag_slice(
        &self,
        st: &dyn Storage,
        first: GuestCluster,
        bytes: &[u8],
        how: Flags,
    ) -> Result<()> {
        let stride = 1_usize << (self.geometry.l2_entry_bits() - 3);
        let mut changed = Vec::new();
        for (number, entry) in bytes.chunks_exact(8 * stride).enumerate() {
            let old = be64(entry, 0).unwrap_or(0);
            let at = HostOffset(old & OFFSET_MASK);
            if old & COMPRESSED == 0 && at.0 != 0 {
                let new = self.flagged(st, old, at, how).await?;
                changed.extend((new != old).then_some((number * stride, new)));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let change = |words: &[AtomicU64]| {
            for &(place, word) in &changed {
                words[place].store(word.to_be(), Ordering::Relaxed);
            }
            Some(())
        };
        while self.l2.update(self.geometry.l2_slice(first), change).is_none() {
            self.load_slice(st, first).await?;
        }
        Ok(())
    }

    async fn flagged(
        &self,
        st: &dyn Storage,
        entry: u64,
        at: HostOffset,
        how: Flags,
    ) -> Result<u64> {
        let is_own = how == Flags::ByRefcount
            && self.refcounts.count(st, self.geometry.host_cluster(at)).await? == 1;
        Ok(if is_own { entry | COPIED } else { entry & !COPIED })
    }
}

/// References met so far to clusters whose refcount may run out of its range. The tally is of those
/// in its window.
struct Counts {
    most: u64,
    change: Change,
    tally: References,
}

impl Counts {
    /// Looks at one more reference to a cluster with that refcount.
    fn check(&mut self, image: &Qcow2, cluster: HostCluster, count: u64) -> Result<()> {
        let at = image.geometry.host_start(cluster).0;
        if count == 0 {
            return Err(Error::corrupt("refcounts", CorruptKind::RefcountUnderflow(at)));
        }
        // The references of one tree are part of the refcount: no more than that are added.
        if self.change == Change::Lower || count <= self.most / 2 {
            return Ok(());
        }
        self.tally.refer(cluster.0, Use::DATA, 1);
        let met = self.tally.get(cluster.0).references;
        if count.checked_add(met).is_some_and(|sum| sum <= self.most) {
            return Ok(());
        }
        let bits = 1_u64 << image.geometry.refcount_order;
        let why = format!(
            "the cluster at {at:#x} is referred to {count} times already, and refcounts of {bits} \
             bits hold no more than {}; delete a snapshot, or convert the image to wider refcounts \
             with qemu-img amend -o refcount_bits=16 (or more)",
            self.most
        );
        Err(Error::refused("snapshot", why))
    }
}
