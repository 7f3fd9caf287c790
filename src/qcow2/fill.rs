//! How much of a run of clusters a write must fill, and what its entries say afterwards.
//!
//! A cluster is filled in units: all of it, or with extended L2 entries a subcluster. A write that
//! begins inside a unit that has no bytes yet takes along what surrounds it; units that it does not
//! touch stay as they are, unless they lie in a cluster that must be left behind.

use crate::bytes::{round_down, round_up};
use crate::qcow2::format::{COPIED, Cluster, L2Entry, SUBCLUSTERS, ZERO};

/// The sizes that matter here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Units {
    /// log2 of the cluster size in bytes.
    pub(super) cluster_bits: u32,
    /// log2 of the unit in bytes.
    pub(super) fill_bits: u32,
}

impl Units {
    fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The unit that a byte of a cluster lies in; a plain cluster is one unit.
    fn unit(self, within: u64) -> u64 {
        within >> self.fill_bits
    }

    fn has_subclusters(self) -> bool {
        self.fill_bits < self.cluster_bits
    }

    /// Where the bytes to write begin, when the request begins `within` bytes into a cluster with
    /// entry `old`. `stays`: the cluster's host cluster is filled up, not replaced.
    pub(super) fn begin(self, old: Cluster, within: u64, stays: bool) -> u64 {
        let (allocated, _) = old.subclusters();
        let unit = round_down(within, 1 << self.fill_bits);
        if stays {
            let has_bytes = allocated >> self.unit(within) & 1 == 1;
            // What others may be writing to in place must not be copied around.
            return if has_bytes { within } else { unit };
        }
        match allocated.trailing_zeros() {
            SUBCLUSTERS => unit,
            first => unit.min(u64::from(first) << self.fill_bits),
        }
    }

    /// Where the bytes to write end, when the request ends `within` bytes into a cluster, which
    /// may be all of it.
    pub(super) fn end(self, old: Cluster, within: u64, stays: bool) -> u64 {
        let (allocated, _) = old.subclusters();
        let unit = round_up(within, 1 << self.fill_bits);
        if stays {
            let has_bytes = allocated >> self.unit(within - 1) & 1 == 1;
            return if has_bytes { within } else { unit };
        }
        let last = u64::from(SUBCLUSTERS - allocated.leading_zeros()) << self.fill_bits;
        unit.max(last.min(self.cluster()))
    }

    /// The units that a range of a cluster touches, one bit each.
    pub(super) fn touched(self, begin: u64, end: u64) -> u32 {
        if !self.has_subclusters() || begin >= end {
            return if begin < end { u32::MAX } else { 0 };
        }
        let (first, last) = (self.unit(begin), self.unit(end - 1));
        (u32::MAX << first) & (u32::MAX >> (u64::from(SUBCLUSTERS) - 1 - last))
    }

    /// The entry of a cluster at `host` after the units of `written` were filled.
    pub(super) fn filled(self, old: Cluster, host: u64, written: u32, stays: bool) -> L2Entry {
        let word = COPIED | host;
        if !self.has_subclusters() {
            return L2Entry { word, bitmap: 0 };
        }
        let (had, zero) = old.subclusters();
        let allocated = if stays { had | written } else { written };
        L2Entry::extended(word, allocated, zero & !allocated)
    }

    /// The entry of a cluster that reads as zeros; `word` is 0, or names the host cluster kept.
    pub(super) fn zero(self, word: u64) -> L2Entry {
        if self.has_subclusters() {
            L2Entry::extended(word, 0, u32::MAX)
        } else {
            L2Entry { word: word | ZERO, bitmap: 0 }
        }
    }

    /// The entry of a cluster of which the units of `erased` become zeros and the rest stays;
    /// `word` names its host cluster, or is 0; `drop` lets go of one that no unit needs any more.
    /// `None` for a compressed cluster, which has no units.
    pub(super) fn partly_zero(
        self,
        old: Cluster,
        word: u64,
        erased: u32,
        drop: bool,
    ) -> Option<L2Entry> {
        if matches!(old, Cluster::Compressed(_)) {
            return None;
        }
        let (allocated, zero) = old.subclusters();
        let left = allocated & !erased;
        let word = if drop && left == 0 { 0 } else { word };
        Some(L2Entry::extended(word, left, zero | erased))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;

    const PLAIN: Units = Units { cluster_bits: 16, fill_bits: 16 };
    const EXTENDED: Units = Units { cluster_bits: 16, fill_bits: 11 };
    const AT: Option<HostOffset> = Some(HostOffset(0x5_0000));

    #[test]
    fn a_plain_cluster_is_filled_as_a_whole() {
        for old in [Cluster::Unallocated, Cluster::ZeroPlain] {
            assert_eq!((PLAIN.begin(old, 700, false), PLAIN.end(old, 900, false)), (0, 65536));
        }
        assert_eq!(PLAIN.touched(0, 65536), u32::MAX);
        assert_eq!(PLAIN.filled(Cluster::Unallocated, 0, u32::MAX, false).bitmap, 0);
    }

    #[test]
    fn only_the_subclusters_that_a_write_touches_are_filled() {
        let old = Cluster::Unallocated;
        assert_eq!(
            (EXTENDED.begin(old, 2500, false), EXTENDED.end(old, 2600, false)),
            (2048, 4096)
        );
        assert_eq!(EXTENDED.touched(2048, 4096), 0b10);
        assert_eq!(EXTENDED.touched(0, 65536), u32::MAX);
        assert_eq!(EXTENDED.touched(63 << 10, 64 << 10), 1 << 31);
    }

    #[test]
    fn a_cluster_that_is_left_behind_gives_all_its_bytes() {
        let old = Cluster::Mixed { at: AT, copied: false, allocated: 0b1000_0001, zero: 0b110 };
        assert_eq!((EXTENDED.begin(old, 2500, false), EXTENDED.end(old, 2600, false)), (0, 16384));
        let entry = EXTENDED.filled(old, 0x9_0000, EXTENDED.touched(0, 16384), false);
        assert_eq!(entry, L2Entry::extended(COPIED | 0x9_0000, 0xff, 0));
    }

    #[test]
    fn bytes_that_others_may_be_writing_are_not_copied_around() {
        let old = Cluster::Mixed { at: AT, copied: true, allocated: 0b10, zero: 0b101 };
        assert_eq!((EXTENDED.begin(old, 2500, true), EXTENDED.end(old, 2600, true)), (2500, 2600));
        assert_eq!((EXTENDED.begin(old, 100, true), EXTENDED.end(old, 2600, true)), (0, 2600));
        let entry = EXTENDED.filled(old, 0x5_0000, EXTENDED.touched(0, 2600), true);
        assert_eq!(entry, L2Entry::extended(COPIED | 0x5_0000, 0b11, 0b100));
    }

    #[test]
    fn a_host_cluster_goes_with_its_last_subcluster() {
        let old = Cluster::Mixed { at: AT, copied: true, allocated: 0b10, zero: 0b1 };
        let word = COPIED | 0x5_0000;
        let kept = EXTENDED.partly_zero(old, word, 0b10, false);
        assert_eq!(kept, Some(L2Entry::extended(word, 0, 0b11)));
        let gone = EXTENDED.partly_zero(old, word, 0b10, true);
        assert_eq!(gone, Some(L2Entry::extended(0, 0, 0b11)));
    }
}
