//! Where new clusters come from.
//!
//! Clusters are counted in batches and handed out one request at a time, so that most allocations
//! take one short lock and neighbours in time are neighbours in the file. What is counted but not
//! yet linked can only leak, and a clean close gives it back. Batches come from clusters freed
//! since the image was opened, else from holes found by looking at a few refcount slices, else from
//! the end of the file. A block device is all holes.

use std::collections::{BTreeMap, BTreeSet};

use crate::bytes::{HostOffset, round_up};
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::geometry::HostCluster;
use crate::qcow2::header::REFTABLE_LIMIT;
use crate::qcow2::refcount::{Run, push_cluster};
use crate::storage::{Op, Purpose, Storage};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// Bytes counted at once.
const BATCH_BYTES: u64 = 1 << 20;
/// Slices of refcounts looked at for holes before the file grows.
const SCAN_SLICES: usize = 4;
/// Runs taken out of limbo at once.
const RECLAIM_RUNS: usize = 4096;

/// Clusters that were handed out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allocation {
    pub(super) run: Run,
    /// Whether the file reads as zeros there.
    pub(super) fresh: bool,
}

#[derive(Debug)]
struct Pool {
    reserved: Option<Allocation>,
    /// Free clusters known, by first cluster.
    free: BTreeMap<u64, u64>,
    /// Where the search for holes goes on, and where it ends: what lies behind was counted by us.
    scan: u64,
    scan_end: u64,
    /// Where the search begins once nobody may come back who has put something into the holes.
    held: Option<u64>,
    /// So many neighbouring clusters are not to be found before that one, from `scan` on.
    crowded: Option<(u64, u64)>,
}

impl Pool {
    fn insert_free(&mut self, mut first: u64, mut count: u64) {
        if let Some((&before, &length)) = self.free.range(..first).next_back()
            && before + length == first
        {
            self.free.remove(&before);
            (first, count) = (before, count + length);
        }
        if let Some(length) = self.free.remove(&(first + count)) {
            count += length;
        }
        self.free.insert(first, count);
    }
}

/// The state of allocation of one image.
#[derive(Debug)]
pub(super) struct Allocator {
    pool: Mutex<Pool>,
    /// The first cluster behind everything in use.
    frontier: AtomicU64,
    /// Clusters from here on were never written: they read as zeros. `None` on a block device.
    fresh_from: Option<u64>,
}

impl Allocator {
    /// For a file of `length` bytes; `grows` says that bytes behind its end read as zeros.
    pub(super) fn new(length: u64, cluster_bits: u32, grows: bool) -> Self {
        let frontier = round_up(length, 1 << cluster_bits) >> cluster_bits;
        let pool = Pool {
            reserved: None,
            free: BTreeMap::new(),
            scan: 0,
            scan_end: frontier,
            held: None,
            crowded: None,
        };
        Self {
            pool: Mutex::new(pool),
            frontier: AtomicU64::new(frontier),
            fresh_from: grows.then_some(frontier),
        }
    }

    /// The first cluster behind everything in use.
    pub(super) fn frontier(&self) -> u64 {
        self.frontier.load(Ordering::Acquire)
    }

    /// Leaves the holes alone, and lets the file grow: what looks free may be in use.
    pub(super) fn hold(&self) {
        let mut pool = lock(&self.pool);
        if pool.held.is_none() {
            pool.held = Some(pool.scan);
            pool.scan = pool.scan_end;
            pool.crowded = None;
        }
    }

    /// Uses the holes again.
    pub(super) fn let_go(&self) {
        let mut pool = lock(&self.pool);
        if let Some(scan) = pool.held.take() {
            pool.scan = scan;
            pool.crowded = None;
        }
    }

    /// Whether the holes are left alone.
    pub(super) fn is_held(&self) -> bool {
        lock(&self.pool).held.is_some()
    }

    /// Keeps a search for holes away from clusters that are in use and not counted yet. A file
    /// grows meanwhile; on a block device the search begins behind them.
    pub(super) fn spare(&self, clusters: &BTreeSet<u64>) {
        let mut pool = lock(&self.pool);
        if let Some(last) = clusters.last().filter(|_| self.fresh_from.is_none()) {
            let scan = pool.held.take().unwrap_or(pool.scan);
            pool.scan = scan.max(last + 1);
        }
    }

    fn take_reserved(&self, want: u64) -> Option<Allocation> {
        let mut pool = lock(&self.pool);
        let Allocation { run, fresh } = pool.reserved?;
        let count = run.count.min(want);
        let rest = Run::new(run.first.0 + count, run.count - count);
        pool.reserved = (rest.count > 0).then_some(Allocation { run: rest, fresh });
        Some(Allocation { run: Run { count, ..run }, fresh })
    }

    /// Takes what was counted but not handed out, to give it to [`Allocator::set_reserved`] again.
    pub(super) fn withhold(&self) -> Option<Allocation> {
        lock(&self.pool).reserved.take()
    }

    pub(super) fn set_reserved(&self, allocation: Allocation) {
        lock(&self.pool).reserved = Some(allocation);
    }

    /// Takes back everything that was counted but not handed out.
    pub(super) fn drain_reserved(&self) -> Option<Run> {
        self.withhold().map(|allocation| allocation.run)
    }

    fn take_free(&self, want: u64) -> Option<Run> {
        let mut pool = lock(&self.pool);
        let (&first, &count) = pool.free.iter().next()?;
        pool.free.remove(&first);
        let taken = count.min(want);
        if taken < count {
            pool.free.insert(first + taken, count - taken);
        }
        Some(Run::new(first, taken))
    }

    /// As `take_free`, exactly `count` clusters.
    fn take_free_together(&self, count: u64) -> Option<Run> {
        let mut pool = lock(&self.pool);
        let (&first, &length) = pool.free.iter().find(|(_, length)| **length >= count)?;
        pool.free.remove(&first);
        if count < length {
            pool.free.insert(first + count, length - count);
        }
        Some(Run::new(first, count))
    }

    /// Adds clusters whose refcount is zero; the caller keeps others from looking for clusters
    /// meanwhile. Those that the search for holes, or the end of the file, will come to anyway are
    /// left to it: nothing may be found twice.
    fn put_free(&self, run: Run) {
        let mut pool = lock(&self.pool);
        let scan = pool.held.unwrap_or(pool.scan);
        let searched = scan..scan.max(pool.scan_end);
        let before = run.first.0..run.end().min(searched.start);
        let after = run.first.0.max(searched.end)..run.end().min(self.frontier());
        if run.first.0 < searched.end && searched.start < run.end() {
            pool.crowded = None;
        }
        for part in [before, after].into_iter().filter(|part| !part.is_empty()) {
            pool.insert_free(part.start, part.end - part.start);
        }
    }

    /// Whether there is always room behind the end: in a file, not on a block device.
    fn grows(&self) -> bool {
        self.fresh_from.is_some()
    }

    fn is_fresh(&self, run: Run) -> bool {
        self.fresh_from.is_some_and(|from| run.first.0 >= from)
    }
}

fn full() -> Error {
    const ENOSPC: i32 = 28;
    let error = std::io::Error::from_raw_os_error(ENOSPC);
    Error::io("allocating on a block device that is in use up to its end", error)
}

impl Qcow2 {
    /// Hands out up to `want` neighbouring clusters, at least one, with refcount one.
    pub(super) async fn allocate(&self, st: &dyn Storage, want: u64) -> Result<Allocation> {
        loop {
            if let Some(allocation) = self.allocator.take_reserved(want) {
                return Ok(allocation);
            }
            let _turn = self.refill.claim(0..1).await;
            if let Some(allocation) = self.allocator.take_reserved(want) {
                return Ok(allocation);
            }
            let batch = want.max(BATCH_BYTES >> self.geometry.cluster_bits).max(1);
            let allocation = self.count_batch(st, batch).await?;
            self.allocator.set_reserved(allocation);
        }
    }

    /// Finds free clusters and counts them. Only one task does this at a time.
    async fn count_batch(&self, st: &dyn Storage, want: u64) -> Result<Allocation> {
        if let Some(run) = self.allocator.take_free(want) {
            return self.count(st, run, false).await;
        }
        let (scan, end) = {
            let pool = lock(&self.allocator.pool);
            (pool.scan, pool.scan_end)
        };
        if scan < end {
            let search = self.refcounts.find_free(st, scan, end, want, SCAN_SLICES);
            let (found, next) = search.await?;
            lock(&self.allocator.pool).scan = next;
            if let Some(run) = found {
                return self.count(st, run, false).await;
            }
        }
        if !self.allocator.grows() {
            return Err(full());
        }
        let run = self.advance_frontier(st, want).await?;
        self.ask_ahead(st, run).await;
        self.count(st, run, self.allocator.is_fresh(run)).await
    }

    async fn count(&self, st: &dyn Storage, run: Run, fresh: bool) -> Result<Allocation> {
        let (at, len) =
            (self.geometry.host_start(run.first), run.count << self.geometry.cluster_bits);
        if self.regions.contains(at, len) {
            // A table whose refcount is zero: using its cluster would destroy it.
            let error = Error::corrupt("allocating", CorruptKind::RefcountUnderflow(at.0));
            self.poison(&error);
            return Err(error);
        }
        self.cover_or_give_back(st, run).await?;
        self.refcounts.adjust(st, run, true).await?;
        Ok(Allocation { run, fresh })
    }

    /// Counts clusters that nobody has allocated and that are in use all the same. No cluster was
    /// allocated before this.
    pub(super) async fn count_found(&self, st: &dyn Storage, run: Run) -> Result<()> {
        let _turn = self.refill.claim(0..1).await;
        self.cover(st, run).await?;
        self.refcounts.adjust(st, run, true).await?;
        Ok(())
    }

    /// Makes sure that every cluster of `run`, which is not counted yet, has a refcount block;
    /// else the run is free again, or each failure would push the end of the file further away.
    async fn cover_or_give_back(&self, st: &dyn Storage, run: Run) -> Result<()> {
        let covered = self.cover(st, run).await;
        if covered.is_err() {
            self.allocator.put_free(run);
        }
        covered
    }

    /// Takes up to `want` clusters with refcount zero from the end of the file.
    async fn advance_frontier(&self, st: &dyn Storage, want: u64) -> Result<Run> {
        loop {
            let from = self.allocator.frontier();
            let limit = from.saturating_add(want);
            let (found, next) = self.refcounts.find_free(st, from, limit, want, usize::MAX).await?;
            self.allocator.frontier.fetch_max(next, Ordering::AcqRel);
            if let Some(run) = found {
                return Ok(run);
            }
        }
    }

    /// Makes sure that every cluster of `run` has a refcount block, and each block an entry in the
    /// refcount table or in the one that the next flush moves to.
    async fn cover(&self, st: &dyn Storage, run: Run) -> Result<()> {
        let first = self.refcounts.block_index(run.first);
        let last = self.refcounts.block_index(HostCluster(run.end() - 1));
        for index in first..=last {
            if self.refcounts.lacks_room(index) {
                Box::pin(self.grow_table(st, index)).await?;
            }
            if self.refcounts.block_at(index)?.is_none() {
                self.make_block(st, index).await?;
            }
        }
        Ok(())
    }

    /// Makes the refcount block `index`, and first the one that counts it if that is another one
    /// that is missing.
    async fn make_block(&self, st: &dyn Storage, index: usize) -> Result<()> {
        let run = self.take_together(st, 1).await?;
        if self.refcounts.block_index(run.first) != index {
            if let Err(error) = Box::pin(self.cover(st, run)).await {
                self.allocator.put_free(run);
                return Err(error);
            }
            if self.refcounts.block_at(index)?.is_some() {
                self.allocator.put_free(run);
                return Ok(());
            }
        }
        let at = self.geometry.host_start(run.first);
        let made = self.zero_metadata(st, Purpose::RefblockInit, at, self.geometry.cluster_size());
        if let Err(error) = made.await {
            self.allocator.put_free(run);
            return Err(error);
        }
        self.refcounts.set_block(index, at);
        if let Err(error) = self.refcounts.adjust(st, run, true).await {
            self.refcounts.set_block(index, HostOffset(0));
            self.regions.remove(at, self.geometry.cluster_size());
            return Err(error);
        }
        self.refcounts.settle_block(index);
        Ok(())
    }

    /// Gives the refcount table more room, so that block `index` has an entry; the table is
    /// written at its new place, and the header switched, by the next flush.
    async fn grow_table(&self, st: &dyn Storage, index: usize) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let per_cluster = cluster / 8;
        // Room for half as much again, and for the blocks that count the new table itself.
        let clusters = self.refcounts.wanted_entries(index).div_ceil(per_cluster) + 1;
        if clusters * cluster > REFTABLE_LIMIT {
            let why = "the file has grown as far as its cluster size allows; \
                       convert the image to larger clusters";
            return Err(Error::unsupported("growing the refcount table", why));
        }
        let run = self.take_together(st, clusters).await?;
        let at = self.geometry.host_start(run.first);
        // Without room for it now, one request fails. Later, a flush would.
        let room = self.zero_metadata(st, Purpose::TableRoom, at, clusters * cluster).await;
        if room.is_err() {
            self.allocator.put_free(run);
            return room;
        }
        let entries = usize::try_from(clusters * per_cluster).expect("below the limit");
        let before = self.refcounts.start_growing(entries);
        let covered = self.cover_or_give_back(st, run).await;
        self.refcounts.stop_growing(before);
        if covered.is_err() {
            self.regions.remove(at, clusters * cluster);
            return covered;
        }
        self.refcounts.adjust(st, run, true).await?;
        // Covering the table may have needed a larger one.
        let unused = if self.refcounts.lacks_room(entries - 1) {
            self.refcounts.set_next_table(at, entries)
        } else {
            Some((at, entries))
        };
        if let Some((unused, entries)) = unused {
            let first = self.geometry.host_cluster(unused);
            let count = (entries as u64).div_ceil(per_cluster);
            self.limbo.never_linked(Run { first, count }, self.epochs.now());
        }
        Ok(())
    }

    /// Hands out exactly `count` neighbouring clusters with refcount one, for a table: a hole that
    /// was there when the image was opened, else the end of the file.
    pub(super) async fn allocate_together(&self, st: &dyn Storage, count: u64) -> Result<Run> {
        let _turn = self.refill.claim(0..1).await;
        let hole = if self.allocator.grows() { self.hole(st, count).await? } else { None };
        let run = match hole {
            Some(run) => run,
            None => self.take_together(st, count).await?,
        };
        Ok(self.count(st, run, false).await?.run)
    }

    /// The first `count` neighbouring free clusters among those that the search for holes has not
    /// come to: it finds them counted later. Where such a search found nothing, the next one does
    /// not look again.
    async fn hole(&self, st: &dyn Storage, count: u64) -> Result<Option<Run>> {
        let (mut at, end) = {
            let pool = lock(&self.allocator.pool);
            let crowded = pool.crowded.filter(|(least, _)| *least <= count);
            (pool.scan.max(crowded.map_or(0, |(_, until)| until)), pool.scan_end)
        };
        let mut hole = None;
        while at < end && hole.is_none() {
            let (found, next) = self.refcounts.find_free(st, at, end, count, usize::MAX).await?;
            hole = found.filter(|run| run.count == count);
            at = next;
        }
        lock(&self.allocator.pool).crowded = Some((count, at));
        Ok(hole)
    }

    /// Takes `count` neighbouring clusters with refcount zero: from the end of a file; on a block
    /// device, which does not grow, from what is free there. Whoever looks for clusters before
    /// these are counted finds others.
    async fn take_together(&self, st: &dyn Storage, count: u64) -> Result<Run> {
        if !self.allocator.grows() {
            return self.take_from_device(st, count).await;
        }
        loop {
            let run = self.advance_frontier(st, count).await?;
            if run.count == count {
                return Ok(run);
            }
        }
    }

    async fn take_from_device(&self, st: &dyn Storage, count: u64) -> Result<Run> {
        if let Some(run) = self.allocator.take_free_together(count) {
            return Ok(run);
        }
        loop {
            let (scan, end) = {
                let pool = lock(&self.allocator.pool);
                (pool.scan, pool.scan_end)
            };
            if scan >= end {
                return Err(full());
            }
            let (found, next) = self.refcounts.find_free(st, scan, end, count, SCAN_SLICES).await?;
            lock(&self.allocator.pool).scan = next;
            match found {
                Some(run) if run.count == count => return Ok(run),
                // Too few for this, and not for others.
                Some(run) => self.allocator.put_free(run),
                None => {}
            }
        }
    }

    /// Fills new metadata with zeros that take up space on the host, so that filling it in later
    /// does not run out of space, and guards it.
    pub(super) async fn zero_metadata(
        &self,
        st: &dyn Storage,
        why: Purpose,
        at: HostOffset,
        len: u64,
    ) -> Result<()> {
        let done = st.submit(self.file, why, Op::Zero { at, len, unmap: false }).await;
        self.mark_dirty(self.file);
        done.map_err(|source| Error::io("making room for metadata", source))?;
        self.regions.add(at, len);
        Ok(())
    }

    /// Lowers the refcounts of clusters whose rest in limbo is over, gives the host's space back
    /// and makes them available. Does a bounded amount of work.
    pub(super) async fn reclaim(&self, st: &dyn Storage) -> Result<()> {
        // Clusters between "refcount zero" and "punched" must not be found by a search.
        let _turn = self.refill.claim(0..1).await;
        let runs = self.limbo.take(self.epochs.advance(), RECLAIM_RUNS);
        let mut freed: Vec<u64> = Vec::new();
        for run in runs {
            for zero in self.refcounts.adjust(st, run, false).await? {
                freed.extend(zero.first.0..zero.end());
            }
        }
        freed.sort_unstable();
        let mut holes: Vec<Run> = Vec::new();
        freed.into_iter().for_each(|cluster| push_cluster(&mut holes, cluster));
        self.give_ahead_back(st, !holes.is_empty()).await;
        let mut punching = Vec::with_capacity(holes.len());
        for hole in &holes {
            let at = self.geometry.host_start(hole.first);
            let len = hole.count << self.geometry.cluster_bits;
            self.regions.remove(at, len);
            punching.push(st.submit(self.file, Purpose::GuestDiscard, Op::Discard { at, len }));
        }
        for (hole, punched) in holes.into_iter().zip(punching) {
            // A hole is a courtesy to the host; the cluster is free without it. But it must be
            // over before somebody writes there.
            if let Err(error) = punched.await {
                tracing::debug!(cluster = hole.first.0, %error, "the host did not take space back");
            }
            self.allocator.put_free(hole);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_search_will_come_to_is_not_free_twice() {
        let allocator = Allocator::new(10 << 16, 16, true);
        lock(&allocator.pool).scan = 5;
        allocator.frontier.store(15, Ordering::Release);
        allocator.put_free(Run::new(1, 20));
        let free = std::mem::take(&mut lock(&allocator.pool).free);
        assert_eq!(free.into_iter().collect::<Vec<_>>(), [(1, 4), (10, 5)]);
        lock(&allocator.pool).scan = 10;
        allocator.put_free(Run::new(8, 4));
        allocator.put_free(Run::new(7, 1));
        let free = std::mem::take(&mut lock(&allocator.pool).free);
        assert_eq!(free.into_iter().collect::<Vec<_>>(), [(7, 5)]);
    }
}
