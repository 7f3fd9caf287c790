//! An image that is written from front to back: which clusters it holds, and how long compressed
//! ones are, is known beforehand, so that all tables come first and the data follow in the disk's
//! order.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::ops::Range;

use crate::error::{Error, Result};
use crate::qcow2::create::{CreateOptions, Preallocation, header};
use crate::qcow2::format::{COPIED, ZERO};
use crate::qcow2::layout::Layout;
use crate::qcow2::packing::{Counts, Packed, Place, Placer};
use crate::sync::Arc;

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
    runs: Arc<Vec<StreamRun>>,
    /// The L2 tables that there are: the L1 entry, the first run that it tells of, and how many
    /// data clusters lie before those of the table.
    tables: Vec<(u64, usize, u64)>,
    data_clusters: u64,
    /// What becomes of each cluster of data, where those are compressed.
    packed: Option<Packing>,
}

/// The clusters of data, in order, and what found zeros are.
#[derive(Debug)]
struct Packing {
    clusters: Vec<Packed>,
    /// The entry of a cluster of zeros that was found in data.
    zeros: u64,
}

impl StreamLayout {
    /// The layout of an image that holds these runs of its disk, in order and not overlapping.
    ///
    /// # Errors
    /// `Refused` when the layout is out of range, or has something that is not written from front
    /// to back.
    pub fn new(options: &CreateOptions, runs: impl Into<Arc<Vec<StreamRun>>>) -> Result<Self> {
        let runs = runs.into();
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

    /// The same image with compressed clusters: `clusters` says what becomes of each cluster of the
    /// runs that are not zeros, in order. Those that are found to be zeros hide a backing file if
    /// `hides` says so.
    ///
    /// # Errors
    /// `Refused` when there are not as many as there are clusters of data, or the image would be
    /// too large.
    pub fn packed(self, clusters: Vec<Packed>, hides: bool) -> Result<Self> {
        let refuse = |why: &str| Err(Error::refused("streaming an image", why));
        if u64::try_from(clusters.len()) != Ok(self.data_clusters) {
            return refuse("the disk has changed while it was copied");
        }
        let zeros = if hides { ZERO } else { 0 };
        match self.pack(Packing { clusters, zeros }) {
            Some(stream) => Ok(stream),
            None => refuse("it would be too large"),
        }
    }

    fn pack(self, packing: Packing) -> Option<Self> {
        let (order, cluster) = (self.options.refcount_order, self.layout.cluster_size());
        let tables = u64::try_from(self.tables.len()).ok()?;
        // Where they begin changes nothing but where they begin.
        let mut placer = Placer::new(0, cluster, order);
        for packed in &packing.clusters {
            placer.place(*packed)?;
        }
        let clusters = placer.end()?.checked_div(cluster)?;
        let layout = self.layout.with_data(order, tables, clusters)?;
        // The last one has the largest offset, which its entry must be able to say.
        Place::compressed_entry(layout.start(layout.end), 1, self.options.cluster_bits)?;
        Some(Self { layout, packed: Some(packing), ..self })
    }

    fn placer(&self) -> Placer {
        let (layout, order) = (&self.layout, self.options.refcount_order);
        Placer::new(layout.start(layout.data), layout.cluster_size(), order)
    }

    /// Where the bytes lie of the clusters that have some, in order; those of compressed clusters
    /// follow each other, others fill clusters of the file. Before each place there may be bytes
    /// that nobody reads.
    pub fn places(&self) -> impl Iterator<Item = (Packed, u64)> + '_ {
        let mut placer = self.placer();
        let clusters = self.packed.iter().flat_map(|packing| packing.clusters.iter().copied());
        clusters.map(move |packed| match placer.place(packed) {
            Some(Place::Plain(at) | Place::Bytes(at, _)) => (packed, at),
            _ => (Packed::Zeros, 0),
        })
    }

    fn place(options: &CreateOptions, runs: Arc<Vec<StreamRun>>) -> Option<Self> {
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
        let options = options.clone();
        Some(Self { options, layout, runs, tables, data_clusters, packed: None })
    }

    /// Bytes of the whole image.
    pub fn len(&self) -> u64 {
        self.layout.start(self.layout.end)
    }

    /// Whether there is nothing to write, which is never so.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The first byte behind the tables.
    pub fn data_start(&self) -> u64 {
        self.layout.start(self.layout.data)
    }

    /// Clusters of the disk whose bytes follow the tables.
    pub fn data_clusters(&self) -> u64 {
        self.data_clusters
    }

    /// The clusters that come before the data, one after the other.
    pub fn tables(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let layout = &self.layout;
        let mut first = header(&self.options, Some(layout)).unwrap_or_default();
        first.resize(usize::try_from(layout.cluster_size()).unwrap_or_default(), 0);
        let reftable = (0..layout.reftable_clusters).map(|index| layout.reftable_cluster(index));
        let mut counts = self
            .packed
            .as_ref()
            .map(|packing| Counts::new(self.placer(), packing.clusters.iter().copied()));
        let blocks = (0..layout.block_count).map(move |index| match &mut counts {
            Some(counts) => layout.counted_block(index, counts),
            None => layout.block(index),
        });
        let l1 = (0..layout.l1_clusters).map(|index| self.l1_cluster(index));
        let mut entries = self.packed.as_ref().map(|packing| {
            let mut placer = self.placer();
            let placed = packing.clusters.iter().map(move |packed| placer.place(*packed));
            placed.map(|place| self.packed_entry(place, packing.zeros))
        });
        let l2 = self.tables.iter().map(move |table| {
            self.l2_table(*table, &mut |plain| match &mut entries {
                Some(entries) => entries.next().unwrap_or((0, true)),
                None => (plain, false),
            })
        });
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

    /// The entry of a cluster of data that has its place, and whether that has no subclusters.
    fn packed_entry(&self, place: Option<Place>, zeros: u64) -> (u64, bool) {
        match place {
            Some(Place::Plain(at)) => (at | COPIED, false),
            Some(Place::Bytes(at, len)) => {
                let entry = Place::compressed_entry(at, len, self.options.cluster_bits);
                (entry.unwrap_or_default(), true)
            }
            _ => (zeros, true),
        }
    }

    /// An L2 table; `data` makes the entry of the next cluster of data from what it is without
    /// compression, and tables are made in order.
    fn l2_table(
        &self,
        (entry, first_run, before): (u64, usize, u64),
        data_entry: &mut dyn FnMut(u64) -> (u64, bool),
    ) -> Vec<u8> {
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
                let (word, bare) = match run.zero {
                    true => (ZERO, true),
                    false => data_entry(self.layout.start(data) | COPIED),
                };
                self.set_entry(&mut bytes, slot, word, bare);
                data = data.saturating_add(u64::from(!run.zero));
            }
        }
        bytes
    }

    /// Sets an entry, of which `bare` says that it names no cluster of its own.
    fn set_entry(&self, bytes: &mut [u8], slot: u64, word: u64, bare: bool) {
        if !self.options.extended_l2 {
            return Self::set(bytes, slot, word);
        }
        // All subclusters are allocated, or all are zeros, which the bitmap says and no flag. Where
        // a cluster is compressed, or nowhere, it says nothing.
        let bitmap = match (bare, word) {
            (false, _) => u64::from(u32::MAX),
            (true, ZERO) => u64::from(u32::MAX) << 32,
            (true, _) => 0,
        };
        let slot = slot.saturating_mul(2);
        Self::set(bytes, slot, if word == ZERO { 0 } else { word });
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
