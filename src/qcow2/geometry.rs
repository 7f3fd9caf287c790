//! Sizes that follow from the header: how offsets fall into clusters, tables and slices.

use crate::bytes::{GuestOffset, HostOffset};
use crate::qcow2::fill::Units;
use crate::qcow2::format::{EntryRules, SUBCLUSTERS};

/// Tables are loaded and written in pieces of at most this many bytes.
const SLICE_BYTES_LOG2: u32 = 12;

/// The number of a cluster of a host file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// The number of a cluster of the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// The sizes of one image.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// How L2 entries are read.
    pub rules: EntryRules,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes in a slice of a table.
    pub fn slice_bits(&self) -> u32 {
        self.cluster_bits.min(SLICE_BYTES_LOG2)
    }

    /// Bytes in a slice of a table.
    pub fn slice_size(&self) -> u64 {
        1 << self.slice_bits()
    }

    /// log2 of the slices in a cluster-sized table.
    pub fn slices_per_table_bits(&self) -> u32 {
        self.cluster_bits - self.slice_bits()
    }

    /// log2 of the bytes of an L2 entry.
    pub fn l2_entry_bits(&self) -> u32 {
        if self.rules.extended { 4 } else { 3 }
    }

    /// log2 of the entries in an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// log2 of the entries in a slice of an L2 table.
    pub fn l2_slice_entry_bits(&self) -> u32 {
        self.slice_bits() - self.l2_entry_bits()
    }

    /// log2 of the unit in bytes in which a cluster is filled: a subcluster, or all of it.
    pub fn fill_bits(&self) -> u32 {
        if self.rules.extended {
            self.cluster_bits - SUBCLUSTERS.ilog2()
        } else {
            self.cluster_bits
        }
    }

    /// The sizes of the units in which clusters are filled.
    pub(super) fn units(&self) -> Units {
        Units { cluster_bits: self.cluster_bits, fill_bits: self.fill_bits() }
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// log2 of the refcounts in a refcount block.
    pub fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The guest cluster that `at` lies in.
    pub fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }

    /// The first byte of a guest cluster.
    pub fn guest_start(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The host cluster that `at` lies in.
    pub fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }

    /// The first byte of a host cluster.
    pub fn host_start(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Index into the L1 table of the table that maps `cluster`.
    pub fn l1_index(&self, cluster: GuestCluster) -> usize {
        usize::try_from(cluster.0 >> self.l2_bits()).expect("an L1 index fits")
    }

    /// The slice (counted over all L2 tables) that holds the entry of `cluster`.
    pub fn l2_slice(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_slice_entry_bits()
    }

    /// The place of `cluster`'s entry in its slice, counted in entries.
    pub fn l2_slot(&self, cluster: GuestCluster) -> usize {
        let mask = (1 << self.l2_slice_entry_bits()) - 1;
        usize::try_from(cluster.0 & mask).expect("a slice is small")
    }
}
