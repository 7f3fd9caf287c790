//! Looking up where guest bytes live.
//!
//! [`Qcow2::lookup`] answers from the cache without a lock; [`Qcow2::map`] loads what is missing
//! first. Neighbouring clusters that are neighbours in the file come back as one extent.

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{COPIED, Cluster, Compressed, L2Entry, OFFSET_MASK};
use crate::qcow2::geometry::GuestCluster;
use crate::qcow2::table::Slice;
use crate::storage::{Buf, FileId, Op, Purpose, Storage};
use crate::sync::{AtomicU64, Ordering};

/// Where a run of guest bytes lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// In a file, as they are.
    Data {
        /// The file.
        file: FileId,
        /// Place of the first byte.
        at: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Nowhere: they are zeros.
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// In a compressed cluster.
    Compressed(CompressedExtent),
    /// In the layer below, or zeros if there is none.
    Backing {
        /// Length in bytes.
        len: u64,
    },
}

/// Guest bytes inside one compressed cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedExtent {
    /// Where the compressed cluster lies.
    pub(crate) place: Compressed,
    /// Bytes of the cluster before the first one asked for.
    pub(crate) skip: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

impl Extent {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Zero { len } | Self::Backing { len } => *len,
            Self::Compressed(extent) => extent.len,
        }
    }

    /// Whether it covers nothing, which no lookup returns.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a run of guest bytes is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteTarget {
    /// Over the old bytes, which nothing else refers to.
    InPlace {
        /// The file.
        file: FileId,
        /// Place of the first byte.
        at: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// To a new cluster.
    Allocate,
}

/// The entries of one slice from one cluster on, and how many of them are asked for.
struct Window {
    first: GuestCluster,
    slot: usize,
    count: usize,
}

impl Qcow2 {
    /// The window of the slice of `at`'s cluster that `len` bytes from `at` on touch.
    fn window(&self, at: GuestOffset, len: u64) -> (Slice, Window) {
        let first = self.geometry.guest_cluster(at);
        let slot = self.geometry.l2_slot(first);
        let in_slice = (1 << self.geometry.l2_slice_entry_bits()) - slot as u64;
        let last = (at.0 + len - 1) >> self.geometry.cluster_bits;
        let count = (last - first.0 + 1).min(in_slice);
        let count = usize::try_from(count).expect("a slice is small");
        (self.geometry.l2_slice(first), Window { first, slot, count })
    }

    fn parse(&self, words: &[AtomicU64], window: &Window, step: usize) -> Result<Cluster> {
        let entry = self.entry(words, window.slot + step);
        self.cluster(entry, GuestCluster(window.first.0 + step as u64))
    }

    /// The entry in a place of a slice.
    pub(super) fn entry(&self, words: &[AtomicU64], slot: usize) -> L2Entry {
        let word = |at: usize| u64::from_be(words[at].load(Ordering::Relaxed));
        if self.geometry.rules.extended {
            L2Entry { word: word(2 * slot), bitmap: word(2 * slot + 1) }
        } else {
            L2Entry { word: word(slot), bitmap: 0 }
        }
    }

    /// What the L2 entry of a guest cluster says.
    ///
    /// # Errors
    /// `Corrupt` when it contradicts the format, or leads behind the end of the file: an entry is
    /// written only after its cluster.
    pub(super) fn cluster(&self, entry: L2Entry, cluster: GuestCluster) -> Result<Cluster> {
        let guest = self.geometry.guest_start(cluster);
        let corrupt = |kind| Error::corrupt("L2 table", kind);
        let parsed = self.geometry.rules.parse(entry, guest).map_err(corrupt)?;
        if let Some(at) = parsed.host()
            && !self.has_data_file()
            && self.geometry.host_cluster(at).0 >= self.allocator.frontier()
        {
            return Err(corrupt(CorruptKind::L2Entry { guest: guest.0, entry: entry.word }));
        }
        Ok(parsed)
    }

    /// The L1 entry that maps `cluster`, and the table's place.
    pub(super) fn l1_entry(&self, cluster: GuestCluster) -> Result<(u64, Option<HostOffset>)> {
        let index = self.geometry.l1_index(cluster);
        let entry = self.l1.get(index).map_or(0, |entry| entry.load(Ordering::Acquire));
        let at = HostOffset(entry & OFFSET_MASK);
        let end = self.allocator.frontier() << self.geometry.cluster_bits;
        if at.0 != 0 && (at.within(self.geometry.cluster_size()) != 0 || at.0 >= end) {
            let index = index as u64;
            return Err(Error::corrupt("L1 table", CorruptKind::L1Entry { index, entry }));
        }
        Ok((entry, (at.0 != 0).then_some(at)))
    }

    /// Where the bytes from `at` on live, as far as that is one extent of at most `len` bytes;
    /// `None` when the table is not cached. `len` is not zero and ends inside the disk.
    ///
    /// # Errors
    /// `Corrupt` when a table entry contradicts the format.
    pub fn lookup(&self, at: GuestOffset, len: u64) -> Result<Option<Extent>> {
        let index = self.geometry.l1_index(self.geometry.guest_cluster(at));
        if self.l1.get(index).is_none_or(|entry| entry.load(Ordering::Acquire) == 0) {
            let coverage = self.geometry.l2_coverage();
            return Ok(Some(Extent::Backing { len: len.min(coverage - at.within(coverage)) }));
        }
        let (slice, window) = self.window(at, len);
        self.l2.peek(slice, |words| self.extent(words, &window, at, len)).transpose()
    }

    fn extent(
        &self,
        words: &[AtomicU64],
        window: &Window,
        at: GuestOffset,
        len: u64,
    ) -> Result<Extent> {
        let cluster = self.geometry.cluster_size();
        let first = self.parse(words, window, 0)?;
        let skip = at.within(cluster);
        if let Cluster::Mixed { at, allocated, zero, .. } = first {
            return Ok(self.mixed_extent(at, (allocated, zero), skip, len));
        }
        let mut run = 1;
        while run < window.count {
            let next = self.parse(words, window, run)?;
            let far = run as u64 * cluster;
            let joins = match (first, next) {
                (Cluster::Data { at, .. }, Cluster::Data { at: next, .. }) => at + far == next,
                (
                    Cluster::ZeroPlain | Cluster::ZeroAllocated { .. },
                    Cluster::ZeroPlain | Cluster::ZeroAllocated { .. },
                )
                | (Cluster::Unallocated, Cluster::Unallocated) => true,
                _ => false,
            };
            if !joins {
                break;
            }
            run += 1;
        }
        let len = len.min(run as u64 * cluster - skip);
        Ok(match first {
            Cluster::Data { at, .. } => Extent::Data { file: self.data, at: at + skip, len },
            Cluster::ZeroPlain | Cluster::ZeroAllocated { .. } => Extent::Zero { len },
            Cluster::Compressed(place) => Extent::Compressed(CompressedExtent { place, skip, len }),
            Cluster::Unallocated | Cluster::Mixed { .. } => Extent::Backing { len },
        })
    }

    /// The subclusters from `skip` on that are of one kind, within their cluster.
    fn mixed_extent(
        &self,
        host: Option<HostOffset>,
        (allocated, zero): (u32, u32),
        skip: u64,
        len: u64,
    ) -> Extent {
        let bits = self.geometry.fill_bits();
        let first = skip >> bits;
        let run = |set: u32| {
            let subclusters = u64::from((set >> first).trailing_ones());
            len.min(((first + subclusters) << bits) - skip)
        };
        match host {
            Some(at) if allocated >> first & 1 == 1 => {
                Extent::Data { file: self.data, at: at + skip, len: run(allocated) }
            }
            _ if zero >> first & 1 == 1 => Extent::Zero { len: run(zero) },
            _ => Extent::Backing { len: run(!(allocated | zero)) },
        }
    }

    /// As [`Qcow2::lookup`], loading the table if need be.
    ///
    /// # Errors
    /// As [`Qcow2::lookup`], and when the table cannot be read.
    pub async fn map(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<Extent> {
        loop {
            if let Some(extent) = self.lookup(at, len)? {
                return Ok(extent);
            }
            self.load_slice(st, self.geometry.guest_cluster(at)).await?;
        }
    }

    /// Where a write of at most `len` bytes from `at` on goes; `None` when the table is not
    /// cached.
    ///
    /// # Errors
    /// As [`Qcow2::lookup`].
    pub fn lookup_write(&self, at: GuestOffset, len: u64) -> Result<Option<WriteTarget>> {
        let (l1, table) = self.l1_entry(self.geometry.guest_cluster(at))?;
        if table.is_none() || l1 & COPIED == 0 {
            return Ok(Some(WriteTarget::Allocate));
        }
        let (slice, window) = self.window(at, len);
        self.l2.peek(slice, |words| self.write_target(words, &window, at, len)).transpose()
    }

    fn write_target(
        &self,
        words: &[AtomicU64],
        window: &Window,
        at: GuestOffset,
        len: u64,
    ) -> Result<WriteTarget> {
        let cluster = self.geometry.cluster_size();
        let skip = at.within(cluster);
        let host = match self.parse(words, window, 0)? {
            Cluster::Data { at, copied: true } => at,
            Cluster::Mixed { at, copied: true, allocated, .. } => {
                return Ok(match self.mixed_extent(at, (allocated, 0), skip, len) {
                    Extent::Data { file, at, len } => WriteTarget::InPlace { file, at, len },
                    _ => WriteTarget::Allocate,
                });
            }
            _ => return Ok(WriteTarget::Allocate),
        };
        let mut run = 1;
        while run < window.count {
            let next = host + run as u64 * cluster;
            if self.parse(words, window, run)? != (Cluster::Data { at: next, copied: true }) {
                break;
            }
            run += 1;
        }
        let len = len.min(run as u64 * cluster - skip);
        Ok(WriteTarget::InPlace { file: self.data, at: host + skip, len })
    }

    /// As [`Qcow2::lookup_write`], loading the table if need be.
    ///
    /// # Errors
    /// As [`Qcow2::map`]; when the image was poisoned.
    pub async fn map_write(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
    ) -> Result<WriteTarget> {
        loop {
            if let Some(target) = self.lookup_write(at, len)? {
                return Ok(target);
            }
            self.load_slice(st, self.geometry.guest_cluster(at)).await?;
        }
    }

    /// The entries of a table that something else refers to as well: so it does to what they refer
    /// to, whatever they say.
    pub(super) fn shared_entries(&self, mut table: Vec<u8>) -> Vec<u8> {
        if !self.has_data_file() {
            let copied = COPIED.to_be_bytes();
            for entry in table.chunks_exact_mut(1 << self.geometry.l2_entry_bits()) {
                entry.iter_mut().zip(copied).for_each(|(byte, bits)| *byte &= !bits);
            }
        }
        table
    }

    /// Loads the slice that holds the entry of `cluster`, whose table exists.
    pub(super) async fn load_slice(&self, st: &dyn Storage, cluster: GuestCluster) -> Result<()> {
        let slice = self.geometry.l2_slice(cluster);
        let read = async || {
            let own = self.l1_entry(cluster)?.0 & COPIED != 0;
            let at = self.slice_at(slice)?;
            let size = usize::try_from(self.geometry.slice_size()).expect("a slice is small");
            let buf = Buf::zeroed(size);
            let op = Op::Read { at, buf: buf.clone() };
            let done = st.submit(self.file, Purpose::L2Load, op).await;
            done.map_err(|source| Error::io("loading an L2 table", source))?;
            Ok(if own { buf } else { Buf::copy_of(&self.shared_entries(buf.to_vec())) })
        };
        self.l2.load(slice, read).await
    }

    /// Where a slice of an L2 table lies in the file.
    ///
    /// # Errors
    /// When there is no such table.
    pub(super) fn slice_at(&self, slice: Slice) -> Result<HostOffset> {
        let cluster = GuestCluster(slice << self.geometry.l2_slice_entry_bits());
        let (entry, table) = self.l1_entry(cluster)?;
        let Some(table) = table else {
            let index = self.geometry.l1_index(cluster) as u64;
            return Err(Error::corrupt("L1 table", CorruptKind::L1Entry { index, entry }));
        };
        let within = slice & ((1 << self.geometry.slices_per_table_bits()) - 1);
        Ok(table + (within << self.geometry.slice_bits()))
    }
}
