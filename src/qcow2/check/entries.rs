//! What one entry of a table refers to, what is wrong with it, and what it should be.
//!
//! Unlike the parser of the running layer, which refuses a wrong entry, this one reads on: a
//! reference that a more lenient reader would follow counts as one, so that no repair of leaks
//! takes a cluster away that somebody can still reach.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::bytes::round_up;
use crate::qcow2::format::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};

/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be zero; bit 0 is looked at apart.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The subclusters of a bitmap that are allocated.
const ALLOCATED: u64 = 0xffff_ffff;

/// An L2 entry as it stands in the file; the bitmap is 0 without extended L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

/// What counts of an entry in the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    /// Nothing is allocated.
    Nothing,
    /// A cluster at this offset.
    Plain(u64),
    /// A compressed cluster.
    Compressed,
}

/// What an entry says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// The bytes of the image file that it refers to.
    pub(super) refers: Option<(u64, u64)>,
    /// The offset it points to, and whether it says COPIED, where that flag has a meaning.
    pub(super) points: Option<(u64, bool)>,
    /// For the statistics.
    pub(super) mapped: Mapped,
    /// How many things are wrong with it.
    pub(super) wrong: u64,
    /// The first of them.
    pub(super) why: &'static str,
}

impl Reading {
    fn new() -> Self {
        Self { refers: None, points: None, mapped: Mapped::Nothing, wrong: 0, why: "" }
    }

    fn wrong(&mut self, is: bool, why: &'static str) {
        if is {
            self.why = if self.wrong == 0 { why } else { self.why };
            self.wrong = self.wrong.saturating_add(1);
        }
    }
}

/// An entry as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mended<T> {
    /// The entry.
    pub(super) entry: T,
    /// Whether guest data, or a way to it, is given up.
    pub(super) lost: bool,
}

/// How the entries of an image are read.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) cluster_bits: u32,
    pub(super) version: u32,
    /// Guest data lies in an external data file.
    pub(super) data_file: bool,
    /// L2 entries have bitmaps of subclusters.
    pub(super) extended: bool,
    /// Length of the image file in bytes.
    pub(super) length: u64,
    /// Where the header names tables: no entry may point there. Not overlapping, in order.
    pub(super) fixed: Vec<Range<u64>>,
    /// L2 tables that are none.
    pub(super) condemned: BTreeSet<u64>,
    /// L2 tables that no entry may take for data.
    pub(super) overlapped: BTreeSet<u64>,
    /// L2 tables of a data file, and the guest offset that each can only map.
    pub(super) owners: BTreeMap<u64, u64>,
    /// Where refcount blocks were before they were made anew: what lies there may be theirs.
    pub(super) former: BTreeSet<u64>,
}

impl Rules {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn unaligned(&self, at: u64) -> bool {
        at & self.cluster_size().saturating_sub(1) != 0
    }

    /// Whether a range runs past the end of the file by a cluster or more: the last cluster need
    /// not be there in full.
    pub(super) fn beyond(&self, at: u64, len: u64) -> bool {
        at.saturating_add(len) >= self.length.saturating_add(self.cluster_size())
    }

    /// Whether a table or a compressed cluster runs past the cluster in which the file ends: a
    /// small one is not there at all then.
    pub(super) fn cuts(&self, at: u64, len: u64) -> bool {
        at.saturating_add(len) > round_up(self.length, self.cluster_size())
    }

    fn over_fixed(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let next = self.fixed.partition_point(|range| range.end <= at);
        self.fixed.get(next).is_some_and(|range| range.start < end)
    }

    /// Whether a cluster belongs to a table that the header names.
    pub(super) fn is_fixed(&self, at: u64) -> bool {
        self.over_fixed(at, self.cluster_size())
    }

    /// Whether data would lie over tables.
    fn over_metadata(&self, at: u64, len: u64) -> bool {
        let first = at & !self.cluster_size().saturating_sub(1);
        let end = at.saturating_add(len);
        self.over_fixed(at, len) || self.overlapped.range(first..end).next().is_some()
    }

    /// Reads an L1 entry that is not zero.
    pub(super) fn read_l1(&self, word: u64) -> Reading {
        let at = word & OFFSET_MASK;
        let mut reading = Reading::new();
        reading.wrong(word & L1_RESERVED != 0, "reserved bits are set");
        if at == 0 {
            reading.wrong(word & COPIED != 0, "it has flags and no offset");
            return reading;
        }
        reading.points = Some((at, word & COPIED != 0));
        reading.wrong(self.unaligned(at), "the L2 table is not aligned to a cluster");
        if self.beyond(at, self.cluster_size()) {
            reading.wrong(true, "the L2 table lies beyond the end of the file");
        } else {
            reading.refers = Some((at, self.cluster_size()));
        }
        reading
    }

    /// What the L1 entry that maps guest offsets from `guest` on should be, flags aside.
    pub(super) fn mend_l1(&self, word: u64, guest: u64) -> Mended<u64> {
        let at = word & OFFSET_MASK;
        let len = self.cluster_size();
        let gone = self.unaligned(at)
            || self.beyond(at, len)
            || self.over_fixed(at, len)
            || self.condemned.contains(&at)
            || self.owners.get(&at).is_some_and(|owner| *owner != guest);
        if at == 0 || gone {
            return Mended { entry: 0, lost: at != 0 };
        }
        Mended { entry: word & (OFFSET_MASK | COPIED), lost: false }
    }

    /// Reads the L2 entry of the guest cluster at `guest`.
    pub(super) fn read(&self, entry: Entry, guest: u64) -> Reading {
        if entry.word & COMPRESSED != 0 { self.compressed(entry) } else { self.plain(entry, guest) }
    }

    /// The bytes of a compressed cluster, up to the end of its last sector.
    fn descriptor(&self, word: u64) -> (u64, u64) {
        let shift = 70_u32.saturating_sub(self.cluster_bits);
        let at = word & (1_u64 << shift).wrapping_sub(1);
        let sectors = (word & COMPRESSED.wrapping_sub(1)) >> shift;
        let bytes = sectors.saturating_add(1).saturating_mul(512).saturating_sub(at & 511);
        (at, bytes)
    }

    fn compressed(&self, entry: Entry) -> Reading {
        let mut reading = Reading::new();
        reading.wrong(entry.word & COPIED != 0, "a compressed cluster says COPIED");
        if self.data_file {
            reading.wrong(true, "a compressed cluster beside an external data file");
            return reading;
        }
        reading.wrong(entry.bitmap != 0, "a compressed cluster has a bitmap of subclusters");
        reading.mapped = Mapped::Compressed;
        let (at, len) = self.descriptor(entry.word);
        if self.cuts(at, len) {
            reading.wrong(true, "the compressed cluster lies beyond the end of the file");
        } else {
            reading.refers = Some((at, len));
        }
        reading
    }

    /// Whether a standard entry has a cluster. Offset 0 of an external data file is a place, and
    /// the flag tells.
    fn is_allocated(&self, word: u64) -> bool {
        let zero = word & ZERO != 0 && !self.extended;
        word & OFFSET_MASK != 0 || (self.data_file && !zero && word & COPIED != 0)
    }

    fn plain(&self, entry: Entry, guest: u64) -> Reading {
        let mut reading = Reading::new();
        let word = entry.word;
        reading.wrong(word & L2_RESERVED != 0, "reserved bits are set");
        let no_flag = self.version < 3 || self.extended;
        reading.wrong(word & ZERO != 0 && no_flag, "this image has no zero flag");
        let at = word & OFFSET_MASK;
        if !self.is_allocated(word) {
            let bits = entry.bitmap & ALLOCATED != 0;
            reading.wrong(bits, "subclusters are allocated in no cluster");
            return reading;
        }
        let both = entry.bitmap >> 32 & entry.bitmap != 0;
        reading.wrong(both, "subclusters are allocated and zero at once");
        reading.mapped = Mapped::Plain(at);
        let copied = word & COPIED != 0;
        if self.data_file {
            reading.wrong(at != guest, "the cluster lies at another offset of the data file");
            reading.wrong(!copied, "a cluster of the data file does not say COPIED");
            return reading;
        }
        reading.wrong(self.unaligned(at), "the cluster is not aligned");
        reading.points = Some((at, copied));
        if self.beyond(at, self.cluster_size()) {
            reading.wrong(true, "the cluster lies beyond the end of the file");
        } else {
            reading.refers = Some((at, self.cluster_size()));
        }
        reading
    }

    /// What an L2 entry should be, the COPIED flag aside: what can be kept is kept, the rest
    /// becomes zeros, so that no old bytes of a backing file show where data was.
    pub(super) fn mend(&self, entry: Entry, guest: u64) -> Mended<Entry> {
        if entry.word & COMPRESSED != 0 {
            let (at, len) = self.descriptor(entry.word);
            if self.data_file || self.cuts(at, len) || self.over_metadata(at, len) {
                return Mended {
                    entry: self.zeros(Entry { bitmap: ALLOCATED, ..entry }),
                    lost: true,
                };
            }
            let kept = Entry { word: entry.word & !COPIED, bitmap: 0 };
            return Mended { entry: kept, lost: false };
        }
        let zero = entry.word & ZERO != 0 && !self.extended;
        if zero && self.version < 3 {
            return Mended { entry: Entry { word: 0, bitmap: 0 }, lost: false };
        }
        let flags = if self.extended { OFFSET_MASK | COPIED } else { OFFSET_MASK | COPIED | ZERO };
        let word = entry.word & flags;
        if !self.is_allocated(word) {
            if entry.bitmap & ALLOCATED == 0 {
                // A flag without an offset is a place of a data file, and that is guest offset 0.
                let word = if self.data_file && guest != 0 { word & !COPIED } else { word };
                return Mended { entry: Entry { word, ..entry }, lost: false };
            }
            return Mended { entry: self.zeros(entry), lost: true };
        }
        // Bytes that are there are kept rather than zeros that may be meant.
        let bitmap = entry.bitmap & !((entry.bitmap & ALLOCATED) << 32);
        let at = word & OFFSET_MASK;
        let cluster = self.cluster_size();
        if self.data_file {
            // There is one place only where it can be.
            let word = word & !OFFSET_MASK | guest | COPIED;
            return Mended { entry: Entry { word, bitmap }, lost: false };
        }
        let gone =
            self.unaligned(at) || self.beyond(at, cluster) || self.over_metadata(at, cluster);
        if gone {
            let data = if self.extended { entry.bitmap & ALLOCATED != 0 } else { !zero };
            return Mended { entry: self.zeros(entry), lost: data };
        }
        Mended { entry: Entry { word, bitmap }, lost: false }
    }

    /// Whether bytes that an entry leads to may be those of a refcount block.
    pub(super) fn is_doubtful(&self, entry: Entry) -> bool {
        let (at, len) = if entry.word & COMPRESSED != 0 {
            self.descriptor(entry.word)
        } else if entry.word & ZERO != 0 && !self.extended {
            return false;
        } else {
            (entry.word & OFFSET_MASK, self.cluster_size())
        };
        let first = at & !self.cluster_size().saturating_sub(1);
        !self.data_file && self.former.range(first..at.saturating_add(len)).next().is_some()
    }

    /// The entry without its cluster: what was allocated reads as zeros.
    fn zeros(&self, entry: Entry) -> Entry {
        if self.extended {
            let zero = entry.bitmap >> 32 | entry.bitmap & ALLOCATED;
            return Entry { word: 0, bitmap: zero << 32 };
        }
        Entry { word: if self.version < 3 { 0 } else { ZERO }, bitmap: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            cluster_bits: 16,
            version: 3,
            data_file: false,
            extended: false,
            length: 0x20_0000,
            fixed: vec![0..0x1_0000, 0x3_0000..0x4_0000],
            condemned: BTreeSet::new(),
            overlapped: BTreeSet::new(),
            owners: BTreeMap::new(),
            former: BTreeSet::new(),
        }
    }

    const fn entry(word: u64) -> Entry {
        Entry { word, bitmap: 0 }
    }

    #[test]
    fn what_is_mended_has_nothing_wrong() {
        let mut random = fastrand::Rng::with_seed(1);
        let words = [0, COPIED, COMPRESSED, ZERO, 0x5_0000, 0x5_0200, 0x3_0000, 1 << 40, 1 << 57];
        for step in 0..200_000 {
            let pick = |random: &mut fastrand::Rng| random.choice(words).unwrap_or_default();
            let word = pick(&mut random) | pick(&mut random) | pick(&mut random);
            let extended = step % 2 == 1;
            let bitmap = if extended { random.u64(..) & random.u64(..) } else { 0 };
            let version = if step % 3 == 0 && !extended { 2 } else { 3 };
            let data_file = step % 5 == 0;
            let rules = Rules { version, extended, data_file, ..rules() };
            let mended = rules.mend(Entry { word, bitmap }, 0x7_0000);
            let reading = rules.read(mended.entry, 0x7_0000);
            assert_eq!(reading.wrong, 0, "{word:#x} {bitmap:#x} {}", reading.why);
            assert_eq!(rules.mend(mended.entry, 0x7_0000), Mended { lost: false, ..mended });
            let table = rules.mend_l1(word, 0);
            assert!(table.entry == 0 || rules.read_l1(table.entry).wrong == 0, "{word:#x}");
        }
    }

    #[test]
    fn data_that_cannot_be_reached_becomes_zeros_and_counts_as_lost() {
        let zeros = Mended { entry: entry(ZERO), lost: true };
        for word in [COPIED | 0x5_0200, COPIED | 1 << 40, COPIED | 0x3_0000] {
            assert_eq!(rules().mend(entry(word), 0), zeros, "{word:#x}");
        }
        let reserved = Mended { entry: entry(COPIED | 0x5_0000), lost: false };
        assert_eq!(rules().mend(entry(COPIED | 0x5_0000 | 1 << 57), 0), reserved);
        let old = Rules { version: 2, ..rules() };
        assert_eq!(old.mend(entry(0x5_0200), 0), Mended { entry: entry(0), lost: true });
        let lost_table = Mended { entry: 0, lost: true };
        assert_eq!(rules().mend_l1(COPIED | 0x3_0000, 0), lost_table);
    }

    #[test]
    fn the_last_cluster_need_not_be_there_in_full() {
        let rules = Rules { length: 0x5_0001, ..rules() };
        assert_eq!(rules.read(entry(0x5_0000), 0).wrong, 0);
        assert_eq!(rules.read(entry(0x6_0000), 0).wrong, 1);
    }
}
