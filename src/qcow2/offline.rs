//! What changes of a whole image have in common: they begin and end with everything durable, place
//! tables, and happen by one write inside the header's first sector.

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::Bitmaps;
use crate::qcow2::format::AUTOCLEAR_BITMAPS;
use crate::qcow2::open::table_regions;
use crate::qcow2::refcount::Run;
use crate::storage::{Buf, FileId, Op, Purpose, Storage};
use crate::sync::{AtomicU64, Ordering, lock};

/// Runs of clusters in limbo that ask for tidying up.
const LIMBO_RUNS: usize = 4096;

/// Whether an operation changes what the guest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bytes {
    /// It does not: bitmaps of changed clusters stay true.
    Kept,
    /// It does.
    Changed,
}

impl Qcow2 {
    /// Makes everything durable, and looks anew where metadata is: a table that only snapshots use
    /// any more is guarded as long as requests may look at it. An image that was not written to is
    /// not changed: the operation may still be refused.
    pub(super) async fn settle(&mut self, st: &dyn Storage) -> Result<()> {
        self.close(st).await?;
        (self.header.reftable_at, self.header.reftable_clusters) = self.refcounts.place();
        let end = self.allocator.frontier() << self.geometry.cluster_bits;
        let corrupt = |kind| Error::corrupt("looking for metadata", kind);
        self.regions = table_regions(&self.header, end).map_err(corrupt)?;
        self.guard_snapshots(st, end).await?;
        self.guard_tables(end).map_err(corrupt)?;
        if matches!(self.bitmaps, Bitmaps::Tracked(_)) {
            // What they hold is stored: it is guarded anew where it lies now.
            self.bitmaps = self.open_bitmaps(st, end).await?;
        }
        Ok(())
    }

    /// Makes everything durable and clears the autoclear bits that the operation would make stale.
    pub(super) async fn begin_offline(&mut self, st: &dyn Storage, bytes: Bytes) -> Result<()> {
        self.check_poison()?;
        self.bitmaps_stay.store(bytes == Bytes::Kept, Ordering::Release);
        // Refcounts are written at once: each step relies on those of the step before.
        self.lazy.store(false, Ordering::Release);
        self.write_features(st, 0).await?;
        self.writing.store(true, Ordering::Release);
        self.write_everything(st).await
    }

    /// Makes everything durable and leaves no leak. A write that comes later looks at the autoclear
    /// bits again.
    pub(super) async fn end_offline(&mut self, st: &dyn Storage) -> Result<()> {
        self.close(st).await?;
        self.writing.store(false, Ordering::Release);
        self.bitmaps_stay.store(false, Ordering::Release);
        self.lazy.store(self.header.is_lazy(), Ordering::Release);
        Ok(())
    }

    /// Whether bitmaps say which clusters changed.
    pub(super) fn has_bitmaps(&self) -> bool {
        let valid = self.header.version >= 3 && self.header.autoclear & AUTOCLEAR_BITMAPS != 0;
        valid && !self.header.bitmaps.is_empty()
    }

    pub(super) async fn read_bytes(
        &self,
        st: &dyn Storage,
        why: Purpose,
        at: HostOffset,
        len: u64,
    ) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(usize::try_from(len).expect("tables are bounded"));
        let done = st.submit(self.file, why, Op::Read { at, buf: buf.clone() }).await;
        done.map_err(|source| Error::io(format!("{why:?}"), source))?;
        Ok(buf.to_vec())
    }

    /// Counts room for a table and writes it there, with zeros up to the end of its last cluster.
    /// The next flush makes it durable.
    pub(super) async fn place_table(
        &self,
        st: &dyn Storage,
        why: Purpose,
        mut bytes: Vec<u8>,
    ) -> Result<HostOffset> {
        let cluster = self.geometry.cluster_size();
        let count = (bytes.len() as u64).div_ceil(cluster).max(1);
        let run = self.allocate_together(st, count).await?;
        let at = self.geometry.host_start(run.first);
        bytes.resize(usize::try_from(count * cluster).expect("tables are bounded"), 0);
        let done = st.submit(self.file, why, Op::Write { at, buf: Buf::copy_of(&bytes) }).await;
        self.mark_dirty(self.file);
        if let Err(source) = done {
            self.limbo.never_linked(run, self.epochs.now());
            return Err(Error::io(format!("{why:?}"), source));
        }
        self.regions.add(at, count * cluster);
        Ok(at)
    }

    /// Frees the clusters of a table that nothing durable names any more.
    pub(super) fn forget_table(&self, at: HostOffset, len: u64) {
        if len > 0 {
            let first = self.geometry.host_cluster(at);
            let run = Run { first, count: len.div_ceil(self.geometry.cluster_size()) };
            self.limbo.never_linked(run, self.epochs.now());
        }
    }

    /// Changes fields inside the header's first sector, durably. What they name is durable before.
    pub(super) async fn switch_header(
        &self,
        st: &dyn Storage,
        at: HostOffset,
        field: Vec<u8>,
    ) -> Result<()> {
        self.check_poison()?;
        let write = Op::Write { at, buf: Buf::copy_of(&field) };
        let mut done = st.submit(self.file, Purpose::HeaderWrite, write).await;
        if done.is_ok() {
            done = st.submit(self.file, Purpose::SyncHeader, Op::Sync).await;
        }
        done.map_err(|source| {
            // Which of the two the header says is not known now.
            let error = Error::io("changing the header", source);
            self.poison(&error);
            error
        })
    }

    /// The L1 table's entries.
    pub(super) fn l1_words(&self) -> Vec<u64> {
        self.l1.iter().map(|entry| entry.load(Ordering::Acquire)).collect()
    }

    /// Writes an L1 table at a new place, which the next flush makes durable.
    pub(super) async fn place_l1(&self, st: &dyn Storage, words: &[u64]) -> Result<HostOffset> {
        let bytes = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.place_table(st, Purpose::L1Init, bytes).await
    }

    /// Goes on with another L1 table, which the header names, and frees the old one's clusters.
    pub(super) fn replace_l1(&mut self, at: HostOffset, words: Vec<u64>) {
        let old = (self.header.l1_at, self.header.l1_entries * 8);
        self.header.l1_at = at;
        self.header.l1_entries = words.len() as u64;
        self.l1 = words.into_iter().map(AtomicU64::new).collect();
        lock(&self.l1_dirty).clear();
        self.forget_table(old.0, old.1);
    }

    /// Gives clusters back when many of them wait for it.
    pub(super) async fn drain_limbo(&self, st: &dyn Storage) -> Result<()> {
        if self.limbo.len() > LIMBO_RUNS {
            self.flush(st).await?;
        }
        Ok(())
    }

    /// Makes a file longer or shorter, durably.
    pub(super) async fn set_length(&self, st: &dyn Storage, file: FileId, len: u64) -> Result<()> {
        let failed = |source| Error::io(format!("resizing a file to {len} bytes"), source);
        st.submit(file, Purpose::Resize, Op::Resize { len }).await.map_err(failed)?;
        st.submit(file, Purpose::SyncData, Op::Sync).await.map_err(failed)
    }
}
