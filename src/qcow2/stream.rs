//! An image that is written from front to back: which clusters it holds is known beforehand, so
//! that all tables come first and the data follow in the disk's order.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::ops::Range;

use crate::error::{Error, Result};
use crate::qcow2::create::{CreateOptions, Preallocation, header};
use crate::qcow2::format::{COPIED, ZERO};
use crate::qcow2::layout::Layout;

/// What a run of guest clusters is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRun {
    /// The numbers of the clusters.
    pub clusters: Range<u64>,
    /// Whether they are zeros, which have no bytes; else their bytes follow the tables.
    pub zero: bool,
}

/// An image that is written from front to back.
#[derive(Debug)]
pub struct StreamLayout {
    options: CreateOptions,
    layout: Layout,
    /// In order, none empty.
    runs: Vec<StreamRun>,
    /// The L2 tables that there are: the L1 entry, the first run that it tells of, and how many
    /// data clusters lie before those of the table.
    tables: Vec<(u64, usize, u64)>,
    data_clusters: u64,
}

impl StreamLayout {
    /// The layout of an image that holds these runs of its disk, in order and not overlapping.
    ///
    /// # Errors
    /// `Refused` when the layout is out of range, or has something that is not written from front
    /// to back.
    pub fn new(options: &CreateOptions, runs: Vec<StreamRun>) -> Result<Self> {
        let refuse = |why: &str| Err(Error::refused("streaming an image", why));
        options.check()?;
        if options.data_file.is_some() {
            return refuse("a data file is not part of the stream");
        }
        if options.preallocation != Preallocation::Off {
            return refuse("prepared clusters would only make it longer");
        }
        if options.version < 3 && runs.iter().any(|run| run.zero) {
            return refuse("version 2 has no clusters of zeros");
        }
        match Self::place(options, runs) {
            Some(stream) => Ok(stream),
            None => refuse("it would be too large"),
        }
    }

    fn place(options: &CreateOptions, runs: Vec<StreamRun>) -> Option<Self> {
        let empty = Layout::new(options)?;
        let in_table = empty.entries_in_table();
        let (mut tables, mut data_clusters) = (Vec::<(u64, usize, u64)>::new(), 0_u64);
        for (index, run) in runs.iter().enumerate() {
            let last = run.clusters.end.checked_sub(1)?.checked_div(in_table)?;
            let first = run.clusters.start.checked_div(in_table)?;
            for table in first..=last {
                if tables.last().is_none_or(|(known, ..)| *known < table) {
                    let start = table.checked_mul(in_table)?.max(run.clusters.start);
                    let skipped = start.checked_sub(run.clusters.start)?;
                    let before = if run.zero { 0 } else { skipped };
                    tables.push((table, index, data_clusters.checked_add(before)?));
                }
            }
            let count = run.clusters.end.checked_sub(run.clusters.start)?;
            data_clusters = data_clusters.checked_add(if run.zero { 0 } else { count })?;
        }
        let table_count = u64::try_from(tables.len()).ok()?;
        let layout = empty.with_data(options.refcount_order, table_count, data_clusters)?;
        Some(Self { options: options.clone(), layout, runs, tables, data_clusters })
    }

    /// Bytes of the whole image.
    pub fn len(&self) -> u64 {
        self.layout.start(self.layout.end)
    }

    /// Whether there is nothing to write, which is never so.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Data clusters behind the tables.
    pub fn data_clusters(&self) -> u64 {
        self.data_clusters
    }

    /// The clusters that come before the data, one after the other.
    pub fn tables(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let layout = &self.layout;
        let mut first = header(&self.options, Some(layout)).unwrap_or_default();
        first.resize(usize::try_from(layout.cluster_size()).unwrap_or_default(), 0);
        let reftable = (0..layout.reftable_clusters).map(|index| layout.reftable_cluster(index));
        let blocks = (0..layout.block_count).map(|index| layout.block(index));
        let l1 = (0..layout.l1_clusters).map(|index| self.l1_cluster(index));
        let l2 = self.tables.iter().map(|table| self.l2_table(*table));
        std::iter::once(first).chain(reftable).chain(blocks).chain(l1).chain(l2)
    }

    /// Sets entry `slot` of a table, a big-endian word.
    fn set(bytes: &mut [u8], slot: u64, word: u64) {
        let at = usize::try_from(slot.saturating_mul(8)).unwrap_or(usize::MAX);
        let place = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut());
        if let Some(place) = place {
            *place = word.to_be_bytes();
        }
    }

    fn l1_cluster(&self, index: u64) -> Vec<u8> {
        let mut bytes = self.layout.empty_cluster();
        let entries = self.layout.cluster_size() >> 3;
        let first = index.saturating_mul(entries);
        let place = self.tables.partition_point(|(entry, ..)| *entry < first);
        let here = self.tables.iter().zip(self.layout.l2..).skip(place);
        for ((entry, ..), cluster) in here {
            let slot = entry.saturating_sub(first);
            if slot >= entries {
                break;
            }
            Self::set(&mut bytes, slot, self.layout.start(cluster) | COPIED);
        }
        bytes
    }

    fn l2_table(&self, (entry, first_run, before): (u64, usize, u64)) -> Vec<u8> {
        let mut bytes = self.layout.empty_cluster();
        let in_table = self.layout.entries_in_table();
        let start = entry.saturating_mul(in_table);
        let end = start.saturating_add(in_table);
        let mut data = self.layout.data.saturating_add(before);
        for run in self.runs.iter().skip(first_run) {
            if run.clusters.start >= end {
                break;
            }
            let clusters = run.clusters.start.max(start)..run.clusters.end.min(end);
            for cluster in clusters {
                let slot = cluster.saturating_sub(start);
                let word = if run.zero { ZERO } else { self.layout.start(data) | COPIED };
                self.set_entry(&mut bytes, slot, word, run.zero);
                data = data.saturating_add(u64::from(!run.zero));
            }
        }
        bytes
    }

    fn set_entry(&self, bytes: &mut [u8], slot: u64, word: u64, zero: bool) {
        if !self.options.extended_l2 {
            return Self::set(bytes, slot, word);
        }
        // All subclusters are allocated, or all are zeros, which the bitmap says and no flag.
        let bitmap = if zero { u64::from(u32::MAX) << 32 } else { u64::from(u32::MAX) };
        let slot = slot.saturating_mul(2);
        Self::set(bytes, slot, if zero { 0 } else { word });
        Self::set(bytes, slot.saturating_add(1), bitmap);
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a panic fails the test")]
mod tests {
    use super::*;

    fn run(clusters: Range<u64>, zero: bool) -> StreamRun {
        StreamRun { clusters, zero }
    }

    #[test]
    fn tables_name_data_in_the_order_of_the_disk() {
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 20) };
        // 64 entries in a table: the second run goes on into the next one.
        let runs =
            vec![run(1..2, false), run(60..70, false), run(70..72, true), run(200..201, false)];
        let stream = StreamLayout::new(&options, runs).expect("in range");
        let tables: Vec<Vec<u8>> = stream.tables().collect();
        assert_eq!(u64::try_from(tables.len()).expect("few"), stream.layout.data);
        assert_eq!(stream.data_clusters(), 12);
        assert_eq!(stream.len(), (stream.layout.data + 12) * 512);
        let word = |bytes: &[u8], at: usize| {
            u64::from_be_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        };
        let l2 = usize::try_from(stream.layout.l2).expect("few");
        let l1 = &tables[l2 - usize::try_from(stream.layout.l1_clusters).expect("few")];
        assert_eq!(word(l1, 0), (stream.layout.l2 << 9) | COPIED);
        assert_eq!((word(l1, 2), word(l1, 3)), (0, ((stream.layout.l2 + 2) << 9) | COPIED));
        let data = |number: u64| ((stream.layout.data + number) << 9) | COPIED;
        assert_eq!((word(&tables[l2], 1), word(&tables[l2], 60)), (data(0), data(1)));
        assert_eq!((word(&tables[l2 + 1], 0), word(&tables[l2 + 1], 5)), (data(5), data(10)));
        assert_eq!((word(&tables[l2 + 1], 6), word(&tables[l2 + 1], 8)), (ZERO, 0));
        assert_eq!(word(&tables[l2 + 2], 200 - 192), data(11));
    }

    #[test]
    fn what_is_not_streamed_is_refused() {
        let plain = CreateOptions::new(1 << 20);
        for options in [
            CreateOptions { data_file: Some("data".to_owned()), ..plain.clone() },
            CreateOptions { preallocation: Preallocation::Full, ..plain.clone() },
            CreateOptions { cluster_bits: 40, ..plain.clone() },
            CreateOptions { version: 2, ..plain.clone() },
        ] {
            StreamLayout::new(&options, vec![run(0..1, true)]).expect_err("refused");
        }
    }
}
