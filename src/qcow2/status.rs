//! What an image says of a run of guest bytes, with nothing read but tables.

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{COPIED, Cluster, L2Entry, OFFSET_MASK};
use crate::qcow2::geometry::{GuestCluster, HostCluster};
use crate::storage::Storage;
use crate::sync::{AtomicU64, Ordering};

/// What guest bytes are in one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusKind {
    /// The layer below shows through.
    Unallocated,
    /// Bytes in the image's data file, as they are.
    Data,
    /// Zeros.
    Zero,
    /// Bytes in compressed clusters.
    Compressed,
}

/// What a run of guest bytes is in one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerStatus {
    /// What the bytes are.
    pub kind: StatusKind,
    /// The place in the data file that is kept for the first of them, if any is; those after it
    /// follow.
    pub host: Option<HostOffset>,
    /// Length in bytes.
    pub len: u64,
}

impl LayerStatus {
    /// Whether `next` goes on where this ends.
    fn joins(&self, next: &Self) -> bool {
        let follows = match (self.host, next.host) {
            (None, None) => true,
            (Some(at), Some(next)) => at + self.len == next,
            _ => false,
        };
        self.kind == next.kind && follows
    }
}

impl Qcow2 {
    /// What the bytes from `at` on are, as far as they are one run of at most `len` bytes. `len` is
    /// not zero and ends inside the disk.
    ///
    /// # Errors
    /// `Corrupt` when a table entry contradicts the format; when the table cannot be read.
    pub async fn status(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<LayerStatus> {
        let cluster = self.geometry.guest_cluster(at);
        let index = self.geometry.l1_index(cluster);
        if self.l1.get(index).is_none_or(|entry| entry.load(Ordering::Acquire) == 0) {
            let coverage = self.geometry.l2_coverage();
            let len = len.min(coverage - at.within(coverage));
            return Ok(LayerStatus { kind: StatusKind::Unallocated, host: None, len });
        }
        let slice = self.geometry.l2_slice(cluster);
        loop {
            if let Some(run) = self.l2.peek(slice, |words| self.slice_run(words, at, len)) {
                return run;
            }
            self.load_slice(st, cluster).await?;
        }
    }

    /// The run within one slice.
    fn slice_run(&self, words: &[AtomicU64], at: GuestOffset, len: u64) -> Result<LayerStatus> {
        let in_slice = 1_usize << self.geometry.l2_slice_entry_bits();
        let first = self.geometry.guest_cluster(at);
        let slots = self.geometry.l2_slot(first)..in_slice;
        let mut run: Option<LayerStatus> = None;
        let mut before = None;
        for (slot, number) in slots.zip(first.0..) {
            let number = GuestCluster(number);
            let start = self.geometry.guest_start(number);
            let skip = at.0.saturating_sub(start.0);
            let entry = self.entry(words, slot);
            if let Some(run) = &mut run
                && run.len < len
                && before.is_some_and(|before| self.goes_on(before, entry))
            {
                run.len += self.geometry.cluster_size();
                before = Some(entry);
                continue;
            }
            let cluster = self.cluster(entry, number)?;
            before = matches!(cluster, Cluster::Data { .. }).then_some(entry);
            for part in self.parts(cluster, skip) {
                match &mut run {
                    None => run = Some(part),
                    Some(run) if run.len < len && run.joins(&part) => run.len += part.len,
                    Some(run) => return Ok(LayerStatus { len: run.len.min(len), ..*run }),
                }
            }
        }
        let run = run.ok_or_else(|| Error::refused("L2 table", "a slice without entries"))?;
        Ok(LayerStatus { len: run.len.min(len), ..run })
    }

    /// Whether `next` can only be the cluster of plain data that lies behind that of `entry`, which
    /// is one too: then it need not be read any closer. Most entries of most tables are such.
    fn goes_on(&self, entry: L2Entry, next: L2Entry) -> bool {
        let expected = entry.word.wrapping_add(self.geometry.cluster_size());
        let at = HostOffset(next.word & OFFSET_MASK);
        next.word == expected
            && next.bitmap == entry.bitmap
            && next.word & !(COPIED | OFFSET_MASK) == 0
            && !self.has_data_file()
            && self.geometry.host_cluster(at).0 < self.allocator.frontier()
    }

    /// The runs of one cluster from `skip` bytes on: one, or one for each subcluster.
    fn parts(&self, cluster: Cluster, skip: u64) -> impl Iterator<Item = LayerStatus> {
        let size = self.geometry.cluster_size();
        let unit = match cluster {
            Cluster::Mixed { .. } => 1 << self.geometry.fill_bits(),
            _ => size,
        };
        let host = cluster.host();
        let (allocated, zero) = cluster.subclusters();
        let compressed = matches!(cluster, Cluster::Compressed(_));
        let mut at = skip;
        std::iter::from_fn(move || {
            if at >= size {
                return None;
            }
            let number = at / unit;
            let kind = match (allocated >> number & 1, zero >> number & 1) {
                _ if compressed => StatusKind::Compressed,
                (1, _) => StatusKind::Data,
                (_, 1) => StatusKind::Zero,
                _ => StatusKind::Unallocated,
            };
            let len = (number + 1) * unit - at;
            let part = LayerStatus { kind, host: host.map(|host| host + at), len };
            at += len;
            Some(part)
        })
    }

    /// Whether the image counts clearly more clusters as in use than its file takes of the host's
    /// space: then its data clusters were prepared and hold, for the most part, nothing yet, so
    /// that it is worth asking the host where there is data. The bound is the one QEMU uses.
    ///
    /// # Errors
    /// I/O errors, and `Corrupt` when a refcount block cannot be used.
    pub async fn is_prepared(&self, st: &dyn Storage) -> Result<bool> {
        let failed = |error| Error::io("looking at the image's file", error);
        let cluster = self.geometry.cluster_size();
        let real = st.allocated(self.file).map_err(failed)? / cluster;
        let bound = (real * 10 / 9).max(real + 2);
        let clusters = st.length(self.file).map_err(failed)?.div_ceil(cluster);
        let mut counted = 0;
        for host in 0..clusters {
            if counted >= bound || clusters - host < bound - counted {
                break;
            }
            counted += u64::from(self.refcounts.count(st, HostCluster(host)).await? > 0);
        }
        Ok(counted >= bound)
    }
}
