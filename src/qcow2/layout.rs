//! Where things lie in a new image, and the bytes of its tables.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::format::COPIED;
use crate::qcow2::header::{REFTABLE_LIMIT, is_size_allowed};

/// The places of the parts of a new image, in clusters: header, refcount table, refcount blocks,
/// L1 table, and when space is prepared L2 tables and data, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    cluster_bits: u32,
    refcount_order: u32,
    /// log2 of the bytes of an L2 entry.
    entry_bits: u32,
    pub(super) reftable: u64,
    pub(super) reftable_clusters: u64,
    pub(super) blocks: u64,
    pub(super) block_count: u64,
    pub(super) l1: u64,
    pub(super) l1_clusters: u64,
    pub(super) l1_entries: u64,
    pub(super) l2: u64,
    pub(super) l2_tables: u64,
    /// The first data cluster; those of a data file lie there, at the guest's offsets.
    pub(super) data: u64,
    pub(super) data_clusters: u64,
    guest_clusters: u64,
    in_data_file: bool,
    pub(super) end: u64,
}

impl Layout {
    /// The layout of an image that is described by options whose fields are in range; `None` when
    /// one of its tables would be larger than any reader takes.
    pub(super) fn new(options: &CreateOptions) -> Option<Self> {
        let cluster = 1_u64.checked_shl(options.cluster_bits)?;
        let entry_bits = if options.extended_l2 { 4 } else { 3 };
        let guest_clusters = options.size.div_ceil(cluster);
        let in_table = cluster.checked_shr(entry_bits)?;
        let l1_entries = guest_clusters.div_ceil(in_table);
        if !is_size_allowed(options.size, l1_entries) {
            return None;
        }
        let l1_clusters = l1_entries.checked_mul(8)?.div_ceil(cluster).max(1);
        let in_data_file = options.data_file.is_some();
        let prepared = options.preallocation != Preallocation::Off;
        let l2_tables = if prepared { l1_entries } else { 0 };
        let data_clusters = if prepared && !in_data_file { guest_clusters } else { 0 };
        let fixed = l1_clusters.checked_add(l2_tables)?.checked_add(data_clusters)?;
        let counts = Counts::new(cluster, options.refcount_order, fixed.checked_add(1)?)?;
        let reftable = 1_u64;
        let blocks = reftable.checked_add(counts.table)?;
        let l1 = blocks.checked_add(counts.blocks)?;
        let l2 = l1.checked_add(l1_clusters)?;
        let data = l2.checked_add(l2_tables)?;
        Some(Self {
            cluster_bits: options.cluster_bits,
            refcount_order: options.refcount_order,
            entry_bits,
            reftable,
            reftable_clusters: counts.table,
            blocks,
            block_count: counts.blocks,
            l1,
            l1_clusters,
            l1_entries,
            l2,
            l2_tables,
            data,
            data_clusters,
            guest_clusters,
            in_data_file,
            end: data.checked_add(data_clusters)?,
        })
    }

    /// The same image with so many L2 tables and data clusters, whatever is prepared; `None` when
    /// the file would be too large.
    pub(super) fn with_data(
        self,
        refcount_order: u32,
        l2_tables: u64,
        data_clusters: u64,
    ) -> Option<Self> {
        let fixed = self.l1_clusters.checked_add(l2_tables)?.checked_add(data_clusters)?;
        let counts = Counts::new(self.cluster_size(), refcount_order, fixed.checked_add(1)?)?;
        let blocks = self.reftable.checked_add(counts.table)?;
        let l1 = blocks.checked_add(counts.blocks)?;
        let l2 = l1.checked_add(self.l1_clusters)?;
        let data = l2.checked_add(l2_tables)?;
        let end = data.checked_add(data_clusters)?;
        let (reftable_clusters, block_count) = (counts.table, counts.blocks);
        let placed = Self { reftable_clusters, blocks, block_count, l1, l2, l2_tables, ..self };
        Some(Self { data, data_clusters, end, ..placed })
    }

    /// How many clusters one L2 table tells of.
    pub(super) fn entries_in_table(&self) -> u64 {
        self.cluster_size() >> self.entry_bits
    }

    /// The first byte of a cluster.
    pub(super) fn start(&self, cluster: u64) -> u64 {
        cluster.checked_shl(self.cluster_bits).unwrap_or(u64::MAX)
    }

    /// Bytes in a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        self.start(1)
    }

    pub(super) fn empty_cluster(&self) -> Vec<u8> {
        vec![0; usize::try_from(self.cluster_size()).unwrap_or_default()]
    }

    /// Cluster number `index` of the refcount table.
    pub(super) fn reftable_cluster(&self, index: u64) -> Vec<u8> {
        self.offsets(index, self.blocks, self.block_count, 0)
    }

    /// Cluster number `index` of the L1 table.
    pub(super) fn l1_cluster(&self, index: u64) -> Vec<u8> {
        self.offsets(index, self.l2, self.l2_tables, COPIED)
    }

    /// A cluster of a table that names `count` clusters, one after the other from `first` on.
    fn offsets(&self, index: u64, first: u64, count: u64, flags: u64) -> Vec<u8> {
        let mut bytes = self.empty_cluster();
        let before = index.saturating_mul(self.cluster_size() >> 3);
        for (number, entry) in (before..count).zip(bytes.chunks_exact_mut(8)) {
            let place = self.start(first.saturating_add(number)) | flags;
            entry.copy_from_slice(&place.to_be_bytes());
        }
        bytes
    }

    /// Refcount block number `index`: ones up to the end of the image.
    pub(super) fn block(&self, index: u64) -> Vec<u8> {
        let mut bytes = self.empty_cluster();
        let order = self.refcount_order;
        let per_block = (self.cluster_size() << 3) >> order;
        let left = self.end.saturating_sub(index.saturating_mul(per_block)).min(per_block);
        if order < 3 {
            for slot in 0..left {
                let bit = slot << order;
                let byte = usize::try_from(bit >> 3).unwrap_or(usize::MAX);
                if let Some(byte) = bytes.get_mut(byte) {
                    *byte |= 1 << (bit & 7);
                }
            }
        } else {
            let width = 1_usize << order.saturating_sub(3);
            for (_, field) in (0..left).zip(bytes.chunks_exact_mut(width)) {
                // Big-endian: the last byte holds the one.
                field.iter_mut().rev().take(1).for_each(|byte| *byte = 1);
            }
        }
        bytes
    }

    /// Refcount block number `index` of an image whose data clusters are counted `data`, one after
    /// the other; blocks are asked for in order.
    pub(super) fn counted_block(
        &self,
        index: u64,
        data: &mut impl Iterator<Item = u64>,
    ) -> Vec<u8> {
        let mut bytes = self.empty_cluster();
        let order = self.refcount_order;
        let per_block = (self.cluster_size() << 3) >> order;
        let first = index.saturating_mul(per_block);
        let left = self.end.saturating_sub(first).min(per_block);
        for slot in 0..left {
            let count = if first.saturating_add(slot) < self.data {
                1
            } else {
                data.next().unwrap_or_default()
            };
            let bit = slot << order;
            let place = usize::try_from(bit >> 3).unwrap_or(usize::MAX);
            if order < 3 {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte |= u8::try_from(count << (bit & 7)).unwrap_or(u8::MAX);
                }
                continue;
            }
            let width = 1_usize << order.saturating_sub(3);
            let field = bytes.get_mut(place..place.saturating_add(width)).unwrap_or_default();
            let count = count.to_be_bytes();
            field.iter_mut().rev().zip(count.iter().rev()).for_each(|(byte, value)| *byte = *value);
        }
        bytes
    }

    /// L2 table number `index` of an image with prepared space. Subclusters stay unallocated: the
    /// room is there, and reads as what is below.
    pub(super) fn l2_table(&self, index: u64) -> Vec<u8> {
        let mut bytes = self.empty_cluster();
        let before = index.saturating_mul(self.cluster_size() >> self.entry_bits);
        let first = if self.in_data_file { 0 } else { self.data };
        let entries = bytes.chunks_exact_mut(1 << self.entry_bits);
        for (number, entry) in (before..self.guest_clusters).zip(entries) {
            let place = self.start(first.saturating_add(number)) | COPIED;
            let word = entry.iter_mut().zip(place.to_be_bytes());
            word.for_each(|(byte, value)| *byte = value);
        }
        bytes
    }
}

/// Clusters of refcount structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Clusters of the refcount table.
    pub(super) table: u64,
    /// Refcount blocks.
    pub(super) blocks: u64,
}

impl Counts {
    /// What counts `clusters` clusters and itself; `None` when the table would be too large.
    pub(super) fn new(cluster: u64, refcount_order: u32, clusters: u64) -> Option<Self> {
        let counts = Self::unlimited(cluster, refcount_order, clusters)?;
        let table = counts.table.checked_mul(cluster)?;
        (table <= REFTABLE_LIMIT.max(cluster)).then_some(counts)
    }

    /// As [`Counts::new`], without a limit.
    pub(super) fn unlimited(cluster: u64, refcount_order: u32, clusters: u64) -> Option<Self> {
        let per_block = cluster.checked_mul(8)?.checked_shr(refcount_order)?;
        let (mut table, mut blocks) = (0_u64, 0_u64);
        loop {
            let all = clusters.checked_add(table)?.checked_add(blocks)?;
            let next = all.div_ceil(per_block);
            let next_table = next.checked_mul(8)?.div_ceil(cluster);
            if (next_table, next) == (table, blocks) {
                return Some(Self { table, blocks });
            }
            (table, blocks) = (next_table, next);
        }
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a panic fails the test")]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_count_themselves() {
        for (cluster_bits, refcount_order) in [(9, 6), (9, 0), (16, 4), (21, 6)] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    preallocation,
                    ..CreateOptions::new(100 << 20)
                };
                let layout = Layout::new(&options).expect("in range");
                assert_eq!(layout.blocks, layout.reftable + layout.reftable_clusters);
                assert_eq!(layout.l1, layout.blocks + layout.block_count);
                assert_eq!(layout.l2, layout.l1 + layout.l1_clusters);
                assert_eq!(layout.data, layout.l2 + layout.l2_tables);
                assert_eq!(layout.end, layout.data + layout.data_clusters);
                let ones: u32 = (0..layout.block_count)
                    .flat_map(|index| layout.block(index))
                    .map(u8::count_ones)
                    .sum();
                assert_eq!(u64::from(ones), layout.end, "{cluster_bits} {refcount_order}");
            }
        }
    }

    #[test]
    fn tables_name_each_cluster_once() {
        let options = CreateOptions {
            cluster_bits: 9,
            preallocation: Preallocation::Metadata,
            ..CreateOptions::new(1 << 20)
        };
        let layout = Layout::new(&options).expect("in range");
        let word = |bytes: &[u8], at: usize| {
            u64::from_be_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        };
        assert_eq!(word(&layout.l1_cluster(0), 31), layout.start(layout.l2 + 31) | COPIED);
        assert_eq!(word(&layout.l2_table(31), 63), layout.start(layout.data + 2047) | COPIED);
        assert_eq!(word(&layout.reftable_cluster(0), 1), layout.start(layout.blocks + 1));
    }
}
