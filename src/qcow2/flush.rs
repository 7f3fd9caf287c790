//! Making changes durable, in order. `ORDERING.md` states each rule and what breaks without it.
//!
//! A flush is a group commit over all workers: whoever comes while one is under way waits for the
//! next one, which one of those who wait runs for all of them. It first copies what is to become
//! durable, all at one moment; then writes in stages with a sync between them, skipping the clean.

use crate::bytes::{HostOffset, round_down};
use crate::error::{Error, Result};
use crate::exec::yield_now;
use crate::flush_gate::Role;
use crate::qcow2::Qcow2;
use crate::qcow2::header::REFTABLE_AT;
use crate::qcow2::refcount::{ReftableWork, Run};
use crate::storage::{Buf, FileId, Op, Pending, Purpose, Storage};
use crate::sync::{AtomicBool, Ordering, lock};

/// Bytes of the L1 table that are written together.
const L1_SECTOR: u64 = 512;

/// Bytes for one place.
type Piece = (HostOffset, Vec<u8>);

/// Everything that one flush makes durable, copied at one moment.
struct Work {
    l2: Vec<Piece>,
    l1: Vec<Piece>,
    reftable: Option<ReftableWork>,
    refblocks: Vec<Piece>,
}

impl Qcow2 {
    /// Makes everything that was completed before this call durable.
    ///
    /// # Errors
    /// When a write or a sync fails; the image takes no more writes after that.
    pub async fn flush(&self, st: &dyn Storage) -> Result<()> {
        let ticket = self.flush.ticket();
        let Role::Lead(lead) = self.flush.role(ticket).await else {
            return self.check_poison();
        };
        self.check_poison()?;
        // Both before anything is copied, so that the copy holds what they speak of.
        let links = self.links.load(Ordering::Acquire);
        let journal = self.journal().map(|journal| (journal.tail(), journal));
        if let Err(error) = self.write_back(st).await {
            self.poison(&error);
            return Err(error);
        }
        journal.inspect(|(mark, journal)| journal.trim(*mark));
        self.stored_links.fetch_max(links, Ordering::AcqRel);
        if lead.finish() {
            // So that all are answered together: a guest that is told of one alone comes back with
            // that one alone.
            yield_now().await;
        }
        // Whoever waited goes on; what the flush has freed is this caller's to tidy up.
        if let Err(error) = self.reclaim(st).await {
            self.poison(&error);
            return Err(error);
        }
        Ok(())
    }

    /// Whether a process that dies now takes a change of the mapping along that is only in its
    /// memory and that no journal has. Bytes in their places are the kernel's as soon as they are
    /// written.
    pub fn is_behind(&self) -> bool {
        self.stored_links.load(Ordering::Acquire) < self.links.load(Ordering::Acquire)
    }

    async fn write_back(&self, st: &dyn Storage) -> Result<()> {
        let work = self.freeze()?;
        // Stage 1: data, new tables' first content, and refcounts.
        let dirty = (self.image_dirty.swap(false, Ordering::AcqRel), self.swap_data_dirty());
        self.write_all(st, Purpose::RefblockWrite, &work.refblocks).await?;
        let image_dirty = dirty.0 || !work.refblocks.is_empty();
        self.sync_files(st, image_dirty, dirty.1).await?;
        self.refcounts.cache().thaw();
        // Stage 2: new refcount blocks become reachable.
        if let Some(reftable) = work.reftable {
            self.write_reftable(st, reftable).await?;
        }
        // Stage 3: the mapping.
        if !work.l2.is_empty() || !work.l1.is_empty() {
            self.write_all(st, Purpose::L2Write, &work.l2).await?;
            self.write_all(st, Purpose::L1Write, &work.l1).await?;
            self.sync(st, self.file, Purpose::SyncTables).await?;
        }
        self.l2.thaw();
        self.limbo.release();
        Ok(())
    }

    fn swap_data_dirty(&self) -> bool {
        self.has_data_file() && self.data_dirty.swap(false, Ordering::AcqRel)
    }

    /// Copies what is to become durable. The order matters: each copy may only refer to what a
    /// later copy, or the sync of stage 1, holds already.
    fn freeze(&self) -> Result<Work> {
        self.limbo.seal();
        let place =
            |frozen: crate::qcow2::table::Frozen| Ok((self.slice_at(frozen.slice)?, frozen.bytes));
        let l2 = self.l2.freeze().into_iter().map(place).collect::<Result<Vec<Piece>>>()?;
        let l1 = self.freeze_l1();
        if self.lazy.load(Ordering::Acquire) && !self.refcounts.cache().is_crowded() {
            return Ok(Work { l2, l1, reftable: None, refblocks: Vec::new() });
        }
        let reftable = self.refcounts.freeze_table();
        let refblocks = self.refcounts.freeze()?;
        Ok(Work { l2, l1, reftable, refblocks })
    }

    fn freeze_l1(&self) -> Vec<Piece> {
        let mut dirty = lock(&self.l1_dirty);
        let entries = usize::try_from(L1_SECTOR / 8).expect("small");
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        for index in std::mem::take(&mut *dirty) {
            if index < done {
                continue;
            }
            let first = usize::try_from(round_down(index as u64, L1_SECTOR / 8)).expect("an index");
            done = (first + entries).min(self.l1.len());
            let words = self.l1[first..done].iter();
            let bytes = words.flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes());
            pieces.push((self.header.l1_at + first as u64 * 8, bytes.collect()));
        }
        pieces
    }

    async fn write_reftable(&self, st: &dyn Storage, work: ReftableWork) -> Result<()> {
        match work {
            ReftableWork::Sectors(sectors) => {
                // A new block is counted by itself or by one with a higher number, which must be
                // reachable first: a power cut may keep any of several sectors.
                for sector in sectors.into_iter().rev() {
                    self.write_all(st, Purpose::ReftableWrite, &[sector]).await?;
                    self.sync(st, self.file, Purpose::SyncReftable).await?;
                }
                Ok(())
            }
            ReftableWork::Move { at, bytes, old } => {
                let clusters = bytes.len() as u64 >> self.geometry.cluster_bits;
                self.write_all(st, Purpose::ReftableWrite, &[(at, bytes)]).await?;
                self.sync(st, self.file, Purpose::SyncReftable).await?;
                let clusters = u32::try_from(clusters).expect("the table's size is bounded");
                let field = [at.0.to_be_bytes().as_slice(), &clusters.to_be_bytes()].concat();
                self.write_all(st, Purpose::HeaderWrite, &[(REFTABLE_AT, field)]).await?;
                self.sync(st, self.file, Purpose::SyncHeader).await?;
                let run = Run { first: self.geometry.host_cluster(old.0), count: old.1 };
                self.limbo.never_linked(run, self.epochs.now());
                Ok(())
            }
        }
    }

    async fn write_all(&self, st: &dyn Storage, why: Purpose, pieces: &[Piece]) -> Result<()> {
        let write = |(at, bytes): &Piece| {
            st.submit(self.file, why, Op::Write { at: *at, buf: Buf::copy_of(bytes) })
        };
        let pending: Vec<Pending> = pieces.iter().map(write).collect();
        let mut result = Ok(());
        for write in pending {
            result = result.and(write.await);
        }
        result.map_err(|source| Error::io(format!("{why:?}"), source))
    }

    async fn sync_files(&self, st: &dyn Storage, image: bool, data: bool) -> Result<()> {
        let both = (
            image.then(|| st.submit(self.file, Purpose::SyncData, Op::Sync)),
            data.then(|| st.submit(self.data, Purpose::SyncData, Op::Sync)),
        );
        let mut result = Ok(());
        for sync in [both.0, both.1].into_iter().flatten() {
            result = result.and(sync.await);
        }
        result.map_err(|source| Error::io("making data durable", source))
    }

    async fn sync(&self, st: &dyn Storage, file: FileId, why: Purpose) -> Result<()> {
        let done = st.submit(file, why, Op::Sync).await;
        done.map_err(|source| Error::io(format!("{why:?}"), source))
    }

    /// Flushes, gives back what was only reserved, and leaves no leak. Nothing else uses the image
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Qcow2::flush`].
    pub async fn close(&self, st: &dyn Storage) -> Result<()> {
        if self.writing.load(Ordering::Acquire) {
            self.write_everything(st).await?;
            self.close_ahead(st).await;
            // Whoever writes after all has to say so again.
            self.writing.store(false, Ordering::Release);
            self.lazy.store(self.header.is_lazy(), Ordering::Release);
        }
        Ok(())
    }

    /// As [`Qcow2::close`], and more writes are to come.
    pub(super) async fn write_everything(&self, st: &dyn Storage) -> Result<()> {
        self.close_ahead(st).await;
        self.store_bitmaps(st).await?;
        if let Some(run) = self.allocator.drain_reserved() {
            self.limbo.never_linked(run, self.epochs.now());
        }
        self.release_packer();
        self.lazy.store(false, Ordering::Release);
        loop {
            self.flush(st).await?;
            let dirty = self.l2.is_dirty() || self.refcounts.cache().is_dirty();
            if !dirty && self.limbo.clusters() == 0 && !self.is_any_dirty() {
                break;
            }
        }
        self.write_features(st, 0).await
    }

    fn is_any_dirty(&self) -> bool {
        let set = |flag: &AtomicBool| flag.load(Ordering::Acquire);
        set(&self.image_dirty) || set(&self.data_dirty)
    }
}
