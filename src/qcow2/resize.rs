//! Making the disk larger or smaller while nothing else uses the image.
//!
//! The disk has its new size from one write of eight bytes in the header on. A larger disk gets its
//! L1 table before, and reads as zeros where it is new; a smaller one drops its mappings after, so
//! that no power cut takes bytes from a disk that still has its old size.

use crate::bytes::{GuestOffset, HostOffset, round_up};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::alloc::Allocator;
use crate::qcow2::check::counted;
use crate::qcow2::discard::Erase;
use crate::qcow2::format::{Cluster, L2Entry};
use crate::qcow2::geometry::{GuestCluster, HostCluster};
use crate::qcow2::header::{L1_TABLE_AT, SIZE_AT, is_size_allowed};
use crate::qcow2::offline::Bytes;
use crate::qcow2::snapshot::tree::Change;
use crate::storage::{Op, Purpose, Storage};
use crate::sync::{Ordering, lock};

/// A size for a disk.
#[derive(Debug, Clone, Copy)]
pub struct NewSize {
    /// The size in bytes, a multiple of 512.
    pub size: u64,
    /// Whether the disk may become smaller, which loses what lies behind its new end.
    pub shrink: bool,
    /// The length in bytes of the disk below, if there is one.
    pub backing_length: Option<u64>,
}

impl NewSize {
    /// How much of a disk that grows from `old` bytes would show the disk below.
    fn uncovered(&self, old: u64) -> std::ops::Range<u64> {
        old..self.backing_length.unwrap_or(0).min(self.size)
    }
}

impl Qcow2 {
    /// Gives the disk another size. Nothing else uses the image. What is new reads as zeros, except
    /// that the rest of what was the last cluster must be zeros already.
    ///
    /// # Errors
    /// As [`Qcow2::check_resize`], with nothing changed; I/O errors and `Corrupt`, after which
    /// clusters may be counted too high.
    pub async fn resize(&mut self, st: &dyn Storage, new: NewSize) -> Result<()> {
        self.check_resize(st, new).await?;
        let old = self.size();
        if new.size == self.header.size {
            return Ok(());
        }
        self.settle(st).await?;
        let l1 = self.l1_words();
        let from = self.geometry.l1_index(self.first_beyond(new.size.min(old)));
        self.check_tree(st, &l1, from, Change::Lower).await?;
        self.begin_offline(st, Bytes::Changed).await?;
        if new.size >= old {
            self.grow(st, old, new).await?;
        } else {
            self.set_size(st, new.size).await?;
            self.drop_beyond(st, new.size).await?;
        }
        self.end_offline(st).await?;
        if new.size < old {
            if self.header.is_raw_data() {
                self.set_length(st, self.data, new.size).await?;
            }
            self.trim_file(st).await?;
        }
        Ok(())
    }

    /// Whether the disk can have another size; changes nothing.
    ///
    /// # Errors
    /// `Refused` or `Unsupported` with what is in the way and what would help.
    pub async fn check_resize(&self, st: &dyn Storage, new: NewSize) -> Result<()> {
        self.check_resize_after(st, new, self.header.version).await
    }

    /// As [`Qcow2::check_resize`], when the image has become one of that version.
    ///
    /// # Errors
    /// As [`Qcow2::check_resize`].
    pub async fn check_resize_after(
        &self,
        st: &dyn Storage,
        new: NewSize,
        version: u32,
    ) -> Result<()> {
        let refuse = |why: String| Err(Error::refused("resize", why));
        let (old, size) = (self.size(), new.size);
        self.check_poison()?;
        if !size.is_multiple_of(512) {
            return refuse(format!("{size} bytes is no multiple of 512"));
        }
        if !is_size_allowed(size, self.geometry.l1_entries(size)) {
            let cluster = self.cluster_size();
            return refuse(format!(
                "a disk of {size} bytes is too large for clusters of {cluster} bytes; convert the \
                 image to larger ones"
            ));
        }
        if size < old && !new.shrink {
            return refuse(format!(
                "the disk would shrink from {old} to {size} bytes and lose what lies behind; say \
                 that it may (--shrink) once the guest uses no more than that"
            ));
        }
        if self.allocator.is_held() && (size < old || !st.limits(self.file).grows) {
            return refuse(
                "a guest may come back whose last writes are noted in its memory and would be \
                 lost; resize when it is served, or with no daemon on the image"
                    .to_owned(),
            );
        }
        if self.has_bitmaps() {
            return refuse(
                "the image has bitmaps of changed clusters, which would have the wrong size; \
                 remove them first with bitmap --remove"
                    .to_owned(),
            );
        }
        let uncovered = !new.uncovered(round_up(old, self.cluster_size())).is_empty();
        if version < 3 && uncovered {
            return refuse(
                "the backing file is longer than the disk and would show through: version 2 \
                 cannot mark clusters as zeros; upgrade with amend -o compat=1.1"
                    .to_owned(),
            );
        }
        self.check_snapshots_for_resize(st).await
    }

    /// A snapshot must say how large the disk was, or applying it would leave the wrong size.
    async fn check_snapshots_for_resize(&self, st: &dyn Storage) -> Result<()> {
        if self.header.snapshots == 0 {
            return Ok(());
        }
        let refuse = |why: String| Err(Error::refused("resize", why));
        if self.header.version < 3 {
            return refuse(
                "a version 2 image that has snapshots cannot be resized; delete them, or upgrade \
                 with amend -o compat=1.1"
                    .to_owned(),
            );
        }
        let (snapshots, _) = self.snapshots(st).await?;
        match snapshots.iter().find(|one| one.disk_size.is_none()) {
            None => Ok(()),
            Some(one) => refuse(format!(
                "the snapshot {:?} does not say how large the disk was; delete it first",
                one.name
            )),
        }
    }

    /// The first cluster that lies wholly behind the end of a disk of `size` bytes.
    fn first_beyond(&self, size: u64) -> GuestCluster {
        GuestCluster(size.div_ceil(self.geometry.cluster_size()))
    }

    /// Drops everything that the image holds of the disk, so that the layer below shows through; a
    /// power cut on the way leaves a part of it. Snapshots stay. Nothing else uses the image.
    ///
    /// # Errors
    /// `Refused`, with nothing changed, when refcounts are too low; I/O errors and `Corrupt`, after
    /// which clusters may be counted too high.
    pub async fn make_empty(&mut self, st: &dyn Storage) -> Result<()> {
        self.check_poison()?;
        self.settle(st).await?;
        self.check_tree(st, &self.l1_words(), 0, Change::Lower).await?;
        self.begin_offline(st, Bytes::Kept).await?;
        self.drop_beyond(st, 0).await?;
        self.end_offline(st).await?;
        if self.has_data_file() {
            let op = Op::Discard { at: HostOffset(0), len: self.header.size };
            let done = st.submit(self.data, Purpose::GuestDiscard, op).await;
            done.map_err(|source| Error::io("giving back the data file's space", source))?;
        }
        self.trim_file(st).await
    }

    async fn set_size(&mut self, st: &dyn Storage, size: u64) -> Result<()> {
        self.switch_header(st, SIZE_AT, size.to_be_bytes().to_vec()).await?;
        self.header.size = size;
        Ok(())
    }

    async fn grow(&mut self, st: &dyn Storage, old: u64, new: NewSize) -> Result<()> {
        if self.header.is_raw_data() {
            // What may lie behind the old end is no part of the disk.
            self.set_length(st, self.data, old).await?;
            self.set_length(st, self.data, new.size).await?;
        }
        self.drop_beyond(st, old).await?;
        self.grow_l1(st, self.geometry.l1_entries(new.size)).await?;
        let uncovered = new.uncovered(round_up(old, self.geometry.cluster_size()));
        let mut at = uncovered.start;
        let end = round_up(uncovered.end, self.geometry.cluster_size());
        while at < end {
            let left = end - at;
            at += self.erase(st, GuestOffset(at), left, Erase::Zero { unmap: true }).await?;
        }
        self.flush(st).await?;
        self.set_size(st, new.size).await
    }

    /// Moves the L1 table to a place with room for so many entries, if it has fewer.
    async fn grow_l1(&mut self, st: &dyn Storage, entries: u64) -> Result<()> {
        if entries <= self.header.l1_entries {
            return Ok(());
        }
        self.flush(st).await?;
        let mut words = self.l1_words();
        words.resize(usize::try_from(entries).expect("the limit was checked"), 0);
        let at = self.place_l1(st, &words).await?;
        self.flush(st).await?;
        let entries = u32::try_from(entries).expect("the limit was checked");
        let field = [entries.to_be_bytes().as_slice(), &at.0.to_be_bytes()].concat();
        self.switch_header(st, L1_TABLE_AT, field).await?;
        self.replace_l1(at, words);
        Ok(())
    }

    /// Drops all mappings of clusters wholly behind the end of a disk of `size` bytes.
    async fn drop_beyond(&mut self, st: &dyn Storage, size: u64) -> Result<()> {
        let first = self.first_beyond(size);
        let tables = 1_u64 << self.geometry.l2_bits();
        let next_table = GuestCluster(round_up(first.0, tables));
        if first < next_table && self.l1_entry(first)?.1.is_some() {
            self.drop_tail(st, first, next_table).await?;
        }
        for index in self.geometry.l1_index(next_table)..self.l1.len() {
            let entry = self.l1[index].load(Ordering::Acquire);
            let Some(table) = self.table_place(index, entry)? else { continue };
            let runs = self.table_runs(st, index, table).await?;
            self.l1[index].store(0, Ordering::Release);
            lock(&self.l1_dirty).insert(index);
            let epoch = self.epochs.now();
            runs.into_iter().for_each(|run| self.limbo.unlinked(run, epoch));
            self.relieve(st).await?;
        }
        self.write_everything(st).await?;
        // Slices of dropped tables may be cached, and must not be taken for those of later ones.
        self.l2 = self.l2.emptied();
        Ok(())
    }

    /// Drops the mappings of a part of one table.
    async fn drop_tail(
        &self,
        st: &dyn Storage,
        first: GuestCluster,
        end: GuestCluster,
    ) -> Result<()> {
        let in_slice = 1 << self.geometry.l2_slice_entry_bits();
        let mut at = first;
        while at < end {
            let count = (in_slice - self.geometry.l2_slot(at) as u64).min(end.0 - at.0);
            let old = self.old_clusters(st, at, count).await?;
            if old.iter().any(|cluster| *cluster != Cluster::Unallocated) {
                self.own_table(st, at).await?;
                self.set_entries(st, at, count, |_| L2Entry::default()).await?;
                self.drop_references(&old, None);
                self.relieve(st).await?;
            }
            at = GuestCluster(at.0 + count);
        }
        Ok(())
    }

    /// Cuts off what lies behind the last cluster in use. It is not counted and nothing refers to
    /// it, so it does not matter whether a power cut comes before; nothing is lost if the host
    /// refuses.
    async fn trim_file(&mut self, st: &dyn Storage) -> Result<()> {
        let limits = st.limits(self.file);
        let failed = |source| Error::io("finding the end of the image", source);
        let length = st.length(self.file).map_err(failed)?;
        let mut end = self.allocator.frontier();
        while end > 0 && self.refcounts.count(st, HostCluster(end - 1)).await? == 0 {
            if self.regions.contains(self.geometry.host_start(HostCluster(end - 1)), 1) {
                // A table that counts as free: refcounts do not say what is in use here.
                tracing::warn!("refcounts are too low, so the file keeps its length: repair it");
                return Ok(());
            }
            end -= 1;
        }
        let used = end << self.geometry.cluster_bits;
        if !limits.grows || used >= length || self.is_used_behind(st, used).await {
            return Ok(());
        }
        let cut = st.submit(self.file, Purpose::Resize, Op::Resize { len: used }).await;
        if let Err(error) = cut {
            tracing::debug!(%error, "the host did not take the end of the image back");
            return Ok(());
        }
        self.mark_dirty(self.file);
        self.flush(st).await?;
        self.allocator = Allocator::new(used, self.geometry.cluster_bits, limits.grows);
        Ok(())
    }

    /// Whether anything refers to what lies behind `end` in the file, or may: refcounts alone do
    /// not tell, since an image may come with some that are too low. Everything is durable.
    async fn is_used_behind(&self, st: &dyn Storage, end: u64) -> bool {
        match counted(st, self.file).await {
            Ok(counted) if counted.end() <= end => false,
            Ok(_) => {
                let what = "something refers to what counts as free, so the file keeps its length: \
                            repair it";
                tracing::warn!(end, "{what}");
                true
            }
            Err(error) => {
                tracing::warn!(%error, "the file keeps its length");
                true
            }
        }
    }

    /// The part of the last cluster behind the disk's end, when it holds older bytes or would show
    /// those of the disk below; to be filled with zeros before the disk grows.
    ///
    /// # Errors
    /// When the table cannot be read or is malformed.
    pub(crate) async fn tail(
        &self,
        st: &dyn Storage,
        new: NewSize,
    ) -> Result<Option<(GuestOffset, u64)>> {
        let size = self.size();
        let len = round_up(size, self.geometry.cluster_size()) - size;
        if len == 0 {
            return Ok(None);
        }
        let cluster = self.geometry.guest_cluster(GuestOffset(size));
        let old = match self.l1_entry(cluster)?.1 {
            Some(_) => self.old_clusters(st, cluster, 1).await?[0],
            None => Cluster::Unallocated,
        };
        let is_zero = match old {
            Cluster::ZeroPlain | Cluster::ZeroAllocated { .. } => true,
            Cluster::Unallocated => new.uncovered(size).is_empty(),
            _ => false,
        };
        Ok((!is_zero).then_some((GuestOffset(size), len)))
    }
}
