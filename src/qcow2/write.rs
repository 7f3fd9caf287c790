//! Writes that change the mapping: prepare, let the caller move the bytes, commit.
//!
//! [`Qcow2::prepare_write`] claims the clusters and finds room; the caller writes whole clusters or
//! subclusters (the guest's bytes, with what surrounds them); [`Qcow2::commit_write`] puts the
//! entries into the table, after the bytes are written. A plan that is dropped gives its room back.

use smallvec::SmallVec;

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::claims::Claim;
use crate::qcow2::format::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, COMPRESSED, COPIED, Cluster, INCOMPATIBLE_DIRTY,
    L2Entry, OFFSET_MASK,
};
use crate::qcow2::geometry::GuestCluster;
use crate::qcow2::header::FEATURES_AT;
use crate::qcow2::journal::Change;
use crate::qcow2::refcount::Run;
use crate::storage::{Buf, FileId, Op, Purpose, Storage};
use crate::sync::{AtomicU64, Ordering, lock};

/// Room for a run of guest clusters, claimed and not yet linked.
#[must_use = "bytes are reachable only after commit_write"]
pub struct WritePlan<'a> {
    image: &'a Qcow2,
    _claim: Claim<'a>,
    first: GuestCluster,
    /// Where the run lies in the file.
    run: Room,
    old: SmallVec<[Cluster; 16]>,
    /// The guest bytes to write, from `start` on.
    start: GuestOffset,
    len: u64,
}

/// Host clusters for a run of guest clusters.
#[derive(Debug, Clone, Copy)]
struct Room {
    at: HostOffset,
    count: u64,
    /// Whether the file reads as zeros there.
    fresh: bool,
    /// Whether the room was counted for this plan, so that dropping it must give it back.
    allocated: bool,
    /// Whether the clusters are the entries' own already, and are filled up.
    stays: bool,
}

impl WritePlan<'_> {
    /// The first guest byte to write, at the start of a cluster or subcluster that has no bytes
    /// yet, or where the request began.
    pub fn start(&self) -> GuestOffset {
        self.start
    }

    /// How many bytes are to be written.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is to be written, which no plan says.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file to write to.
    pub fn target(&self) -> FileId {
        self.image.data
    }

    /// Where the bytes go in the file.
    pub fn at(&self) -> HostOffset {
        self.run.at + (self.start - self.image.geometry.guest_start(self.first))
    }

    /// Whether the file reads as zeros there, so that zeros need not be written.
    pub fn is_fresh(&self) -> bool {
        self.run.fresh
    }

    /// What a cluster of the run says when the bytes are written.
    fn entry(&self, step: u64) -> L2Entry {
        let geometry = &self.image.geometry;
        let cluster = geometry.cluster_size();
        let begin = geometry.guest_start(self.first).0 + step * cluster;
        let within = |at: u64| at.saturating_sub(begin).min(cluster);
        let written = (within(self.start.0), within(self.start.0 + self.len));
        let units = geometry.units();
        let host = self.run.at.0 + step * cluster;
        let old = self.old[usize::try_from(step).expect("a run fits in a slice")];
        units.filled(old, host, units.touched(written.0, written.1), self.run.stays)
    }
}

impl Drop for WritePlan<'_> {
    fn drop(&mut self) {
        if self.run.allocated {
            let first = self.image.geometry.host_cluster(self.run.at);
            let run = Run { first, count: self.run.count };
            self.image.limbo.never_linked(run, self.image.epochs.now());
        }
    }
}

impl Qcow2 {
    /// Finds room for the clusters that `len` bytes from `at` on touch, as many as one run holds,
    /// and keeps other writers away from them. `None`: another writer was faster, look up again.
    ///
    /// # Errors
    /// When there is no room, a table cannot be read, or the image contradicts itself or was
    /// poisoned.
    pub async fn prepare_write(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
    ) -> Result<Option<WritePlan<'_>>> {
        self.start_writing(st).await?;
        self.relieve(st).await?;
        let first = self.geometry.guest_cluster(at);
        let in_slice = self.entries_from(first);
        let last = (at.0 + len - 1) >> self.geometry.cluster_bits;
        let count = (last - first.0 + 1).min(in_slice);
        let claim = self.clusters.claim(first.0..first.0 + count).await;
        self.own_table(st, first).await?;
        let old = self.old_clusters(st, first, count).await?;
        let unit = at.within(self.geometry.cluster_size()) >> self.geometry.fill_bits();
        let Some((count, own)) = writable_run(&old, unit, self.geometry.cluster_size()) else {
            return Ok(None);
        };
        let room = if let Some(at) = own {
            Room { at, count, fresh: false, allocated: false, stays: true }
        } else if self.has_data_file() {
            let at = HostOffset(self.geometry.guest_start(first).0);
            Room { at, count, fresh: false, allocated: false, stays: true }
        } else {
            let found = self.allocate(st, count).await?;
            let at = self.geometry.host_start(found.run.first);
            let (count, fresh) = (found.run.count, found.fresh);
            Room { at, count, fresh, allocated: true, stays: false }
        };
        Ok(Some(self.plan(claim, first, room, (at, len), old)))
    }

    /// How many entries of a slice there are from that of `cluster` on.
    pub(super) fn entries_from(&self, cluster: GuestCluster) -> u64 {
        (1 << self.geometry.l2_slice_entry_bits()) - self.geometry.l2_slot(cluster) as u64
    }

    /// The plan for a request whose clusters are claimed and have room.
    fn plan<'a>(
        &'a self,
        claim: Claim<'a>,
        first: GuestCluster,
        run: Room,
        (at, len): (GuestOffset, u64),
        mut old: SmallVec<[Cluster; 16]>,
    ) -> WritePlan<'a> {
        old.truncate(usize::try_from(run.count).expect("a run fits in a slice"));
        let (units, cluster) = (self.geometry.units(), self.geometry.cluster_size());
        let run_start = self.geometry.guest_start(first);
        let last = run_start + (run.count - 1) * cluster;
        let request_end = (at.0 + len).min(last.0 + cluster);
        let begin = units.begin(old[0], at.within(cluster), run.stays);
        let end = units.end(old[old.len() - 1], request_end - last.0, run.stays);
        let start = run_start + begin;
        let len = last.0 + end - start.0;
        WritePlan { image: self, _claim: claim, first, run, old, start, len }
    }

    /// Links the run: its bytes are what the guest reads from now on. What they replaced goes to
    /// limbo.
    ///
    /// # Errors
    /// When the table cannot be read any more; then nothing was linked.
    pub async fn commit_write(&self, st: &dyn Storage, mut plan: WritePlan<'_>) -> Result<()> {
        self.set_entries(st, plan.first, plan.run.count, |step| plan.entry(step)).await?;
        plan.run.allocated = false;
        let old = std::mem::take(&mut plan.old);
        self.drop_references(&old, Some((plan.run.at, plan.run.count)));
        Ok(())
    }

    /// Sets the entries of clusters that the caller has claimed, in a table that is ours.
    pub(super) async fn set_entries(
        &self,
        st: &dyn Storage,
        first: GuestCluster,
        count: u64,
        entry: impl Fn(u64) -> L2Entry,
    ) -> Result<()> {
        let slot = self.geometry.l2_slot(first);
        let slice = self.geometry.l2_slice(first);
        let words_per_entry = 1 << (self.geometry.l2_entry_bits() - 3);
        let journal = self.journal();
        // A change and its record come between the same two copies that flushes make.
        let change = |words: &[AtomicU64]| {
            if journal.as_ref().is_some_and(|journal| !journal.has_room(count)) {
                return None;
            }
            let mut noted = journal.is_some();
            let places = words[slot * words_per_entry..].chunks_exact(words_per_entry);
            for ((step, place), slot) in (0..count).zip(places).zip(slot..) {
                let (old, new) = (self.entry(words, slot), entry(step));
                for (target, value) in place.iter().zip([new.word, new.bitmap]) {
                    target.store(value.to_be(), Ordering::Relaxed);
                }
                if let Some(journal) = journal.as_ref().filter(|_| old != new) {
                    journal.append(&Change { guest: first.0 + step, old, new });
                }
                noted &= new.word & COMPRESSED == 0;
            }
            Some(noted)
        };
        let noted = loop {
            match self.l2.update(slice, change) {
                Some(Some(noted)) => break noted,
                // In a box: it is rare, and every request would have its memory.
                Some(None) => Box::pin(self.flush(st)).await?,
                None => self.load_slice(st, first).await?,
            }
        };
        if !noted {
            // Counted after the change, so that a flush which knows of it holds it.
            self.links.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Sends what entries referred to into limbo, except a run of clusters that is used again.
    pub(super) fn drop_references(&self, old: &[Cluster], kept: Option<(HostOffset, u64)>) {
        if self.has_data_file() {
            return;
        }
        let epoch = self.epochs.now();
        let bits = self.geometry.cluster_bits;
        let kept = kept.map(|(at, count)| at.0..at.0 + (count << bits));
        let mut gone: Option<Run> = None;
        for cluster in old {
            let (at, last) = match (cluster.host(), *cluster) {
                (Some(at), _) => (at.0, at.0),
                (None, Cluster::Compressed(place)) => (place.at.0, place.at.0 + place.bytes - 1),
                (None, _) => continue,
            };
            if kept.as_ref().is_some_and(|kept| kept.contains(&at)) {
                continue;
            }
            let first = at >> bits;
            let run = Run::new(first, (last >> bits) - first + 1);
            match &mut gone {
                Some(before) if before.end() == first => before.count += run.count,
                _ => {
                    gone.replace(run).into_iter().for_each(|run| self.limbo.unlinked(run, epoch));
                }
            }
        }
        gone.into_iter().for_each(|run| self.limbo.unlinked(run, epoch));
    }

    /// The entries of clusters in one slice.
    pub(super) async fn old_clusters(
        &self,
        st: &dyn Storage,
        first: GuestCluster,
        count: u64,
    ) -> Result<SmallVec<[Cluster; 16]>> {
        let (slot, slice) = (self.geometry.l2_slot(first), self.geometry.l2_slice(first));
        let parse = |words: &[AtomicU64]| {
            let steps = (0..count).zip(slot..);
            let parse = |(step, slot): (u64, usize)| {
                self.cluster(self.entry(words, slot), GuestCluster(first.0 + step))
            };
            steps.map(parse).collect::<Result<SmallVec<[Cluster; 16]>, _>>()
        };
        loop {
            if let Some(clusters) = self.l2.peek(slice, parse) {
                let clusters = clusters?;
                self.check_references(&clusters)?;
                return Ok(clusters);
            }
            self.load_slice(st, first).await?;
        }
    }

    /// Refuses to change entries that refer to metadata: the guest would lower a table's refcount,
    /// and then write its own bytes where the table, or the header, was.
    fn check_references(&self, clusters: &[Cluster]) -> Result<()> {
        for cluster in clusters {
            let (at, len) = match (cluster.host(), *cluster) {
                (Some(at), _) => (at, self.geometry.cluster_size()),
                (None, Cluster::Compressed(place)) => (place.at, place.bytes),
                (None, _) => continue,
            };
            self.check_overlap(self.data, at, len)?;
        }
        Ok(())
    }

    /// Makes sure that the L2 table that maps `cluster` exists and belongs to the active disk
    /// alone: makes an empty one, or a copy of one that a snapshot shares.
    pub(super) async fn own_table(&self, st: &dyn Storage, cluster: GuestCluster) -> Result<()> {
        let is_own = |entry: u64| entry & COPIED != 0 && entry & OFFSET_MASK != 0;
        if is_own(self.l1_entry(cluster)?.0) {
            return Ok(());
        }
        let index = self.geometry.l1_index(cluster);
        self.make_l1_room(st, index).await?;
        let _claim = self.tables.claim(index as u64..index as u64 + 1).await;
        let (entry, old) = self.l1_entry(cluster)?;
        if is_own(entry) {
            return Ok(());
        }
        let run = self.allocate(st, 1).await?.run;
        let at = self.geometry.host_start(run.first);
        if let Err(error) = self.fill_table(st, at, old).await {
            self.regions.remove(at, self.geometry.cluster_size());
            self.limbo.never_linked(run, self.epochs.now());
            return Err(error);
        }
        // The L1 entry is durable only after the table's first content and its refcount are:
        // the flush that writes it syncs both before.
        self.l1[index].store(at.0 | COPIED, Ordering::Release);
        lock(&self.l1_dirty).insert(index);
        if let Some(old) = old {
            let run = Run { first: self.geometry.host_cluster(old), count: 1 };
            self.limbo.unlinked(run, self.epochs.now());
        }
        Ok(())
    }

    /// Before the first entry of a sector of the L1 table is set: makes sure that the host has room
    /// for the sector, since the table of an image that is new lies in a hole of the file. If a
    /// flush finds that there is none, the image takes no more writes.
    async fn make_l1_room(&self, st: &dyn Storage, index: usize) -> Result<()> {
        const ENTRIES: usize = 64;
        let first = index - index % ENTRIES;
        let sector = &self.l1[first..(first + ENTRIES).min(self.l1.len())];
        let is_empty = || sector.iter().all(|entry| entry.load(Ordering::Acquire) == 0);
        if !is_empty() {
            return Ok(());
        }
        // Nobody sets an entry meanwhile, so no flush writes to the sector either.
        let _claim = self.tables.claim(first as u64..(first + sector.len()) as u64).await;
        if !is_empty() {
            return Ok(());
        }
        let (at, len) = (self.header.l1_at + first as u64 * 8, sector.len() as u64 * 8);
        let room = st.submit(self.file, Purpose::TableRoom, Op::Zero { at, len, unmap: false });
        room.await.map_err(|source| Error::io("making room for the L1 table", source))
    }

    async fn fill_table(
        &self,
        st: &dyn Storage,
        at: HostOffset,
        old: Option<HostOffset>,
    ) -> Result<()> {
        let len = self.geometry.cluster_size();
        self.zero_metadata(st, Purpose::L2Init, at, len).await?;
        let Some(old) = old else { return Ok(()) };
        let buf = Buf::zeroed(usize::try_from(len).expect("a cluster is small"));
        let read = Op::Read { at: old, buf: buf.clone() };
        let done = st.submit(self.file, Purpose::L2Load, read).await;
        done.map_err(|source| Error::io("reading a shared L2 table", source))?;
        let write = Op::Write { at, buf: Buf::copy_of(&self.shared_entries(buf.to_vec())) };
        let done = st.submit(self.file, Purpose::L2Init, write).await;
        self.mark_dirty(self.file);
        done.map_err(|source| Error::io("copying a shared L2 table", source))
    }

    /// Whether the image says that it is written to, and takes writes.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.load(Ordering::Acquire) && self.poison.get().is_none()
    }

    /// Before the first write: clears, durably, the autoclear bits of features that our writes
    /// would make stale, and sets the dirty bit if refcounts are to be written late.
    pub(crate) async fn start_writing(&self, st: &dyn Storage) -> Result<()> {
        self.check_poison()?;
        if self.writing.load(Ordering::Acquire) {
            return Ok(());
        }
        let _claim = self.starting.claim(0..1).await;
        if self.writing.load(Ordering::Acquire) {
            return Ok(());
        }
        let dirty = if self.header.is_lazy() { INCOMPATIBLE_DIRTY } else { 0 };
        self.write_features(st, dirty).await?;
        self.start_bitmaps(st).await?;
        self.writing.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes the feature bits in the header say what is true while we write, or after.
    ///
    /// # Errors
    /// When they cannot be made durable; the image is poisoned then.
    pub(super) async fn write_features(&self, st: &dyn Storage, dirty: u64) -> Result<()> {
        let header = &self.header;
        let raw = if self.has_data_file() { AUTOCLEAR_RAW_DATA } else { 0 };
        // Bitmaps that contradict themselves are never called valid by us.
        let stay = self.bitmaps_stay.load(Ordering::Acquire) && !self.bitmaps.is_broken();
        let kept = raw | self.bitmaps.autoclear() | if stay { AUTOCLEAR_BITMAPS } else { 0 };
        let features = [header.incompatible | dirty, header.compatible, header.autoclear & kept];
        if header.version < 3 || *lock(&self.features) == features {
            return Ok(());
        }
        self.check_poison()?;
        let buf = Buf::copy_of(&features.map(u64::to_be_bytes).concat());
        let write = Op::Write { at: FEATURES_AT, buf };
        let mut done = st.submit(self.file, Purpose::HeaderWrite, write).await;
        if done.is_ok() {
            done = st.submit(self.file, Purpose::SyncHeader, Op::Sync).await;
        }
        done.map_err(|source| {
            let error = Error::io("changing the feature bits", source);
            self.poison(&error);
            error
        })?;
        *lock(&self.features) = features;
        Ok(())
    }

    /// Flushes when so much is dirty, or at rest in limbo, that more should wait.
    pub(super) async fn relieve(&self, st: &dyn Storage) -> Result<()> {
        let crowded = self.l2.is_crowded()
            || self.refcounts.cache().is_crowded()
            || (self.limbo.len() > 4096 && self.limbo.needs_flush());
        if crowded {
            self.flush(st).await?;
        }
        Ok(())
    }
}

/// How many of the first clusters can be written as one run, and where their own host clusters are
/// if they have some that are to be filled up. `None` when `unit` of the first, where the write
/// begins, can be written in place.
fn writable_run(
    old: &[Cluster],
    unit: u64,
    cluster_size: u64,
) -> Option<(u64, Option<HostOffset>)> {
    let first = old.first()?;
    let (allocated, _) = first.subclusters();
    if first.own().is_some() && allocated >> unit & 1 == 1 {
        return None;
    }
    let run = match first.own() {
        Some(at) => {
            let steps = old.iter().zip(0_u64..);
            let same = |(cluster, step): (&Cluster, u64)| {
                cluster.own() == Some(at + step * cluster_size)
                    && !matches!(cluster, Cluster::Data { .. })
            };
            steps.map(same).take_while(|&same| same).count()
        }
        None => old.iter().take_while(|cluster| cluster.own().is_none()).count(),
    };
    Some((run as u64, first.own()))
}
