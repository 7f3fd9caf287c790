//! Which host clusters hold metadata: one bit each, asked before every write of guest data.
//!
//! A crafted or damaged image may map a guest cluster onto the header or a table; a guest that
//! could write there would choose what the image refers to at the next open.

use crate::bytes::HostOffset;
use crate::error::CorruptKind;
use crate::sync::{AtomicU64, OnceLock, Ordering};

/// Words of bits in a leaf: small, since an image may spread its tables as thin as it likes, and
/// each table that lies alone costs one leaf.
const LEAF_WORDS: usize = 64;
const LEAF_BITS: u32 = 12;
const FAN_OUT_BITS: u32 = 12;
const FAN_OUT: usize = 1 << FAN_OUT_BITS;

type Leaf = Box<[AtomicU64]>;
type Middle = Box<[OnceLock<Leaf>]>;

/// A growing set of host clusters, read without a lock: a radix tree of bits.
pub(super) struct Regions {
    cluster_bits: u32,
    top: Box<[OnceLock<Middle>]>,
}

/// Where the bit of a cluster is.
struct Place {
    top: usize,
    middle: usize,
    word: usize,
    bit: u64,
}

impl Regions {
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, top: (0..FAN_OUT).map(|_| OnceLock::new()).collect() }
    }

    /// `None` for a cluster beyond 2^36: no file that large is written to.
    fn place(cluster: u64) -> Option<Place> {
        let part = |shift: u32| usize::try_from(cluster >> shift).ok();
        Some(Place {
            top: part(LEAF_BITS + FAN_OUT_BITS).filter(|&top| top < FAN_OUT)?,
            middle: part(LEAF_BITS)? % FAN_OUT,
            word: part(6)? % LEAF_WORDS,
            bit: 1 << (cluster % 64),
        })
    }

    fn make(&self, place: &Place) -> &AtomicU64 {
        let middles = || (0..FAN_OUT).map(|_| OnceLock::new()).collect();
        let words = || (0..LEAF_WORDS).map(|_| AtomicU64::new(0)).collect();
        let middle = self.top[place.top].get_or_init(middles);
        &middle[place.middle].get_or_init(words)[place.word]
    }

    fn get(&self, place: &Place) -> Option<&AtomicU64> {
        Some(&self.top[place.top].get()?[place.middle].get()?[place.word])
    }

    fn clusters(&self, at: HostOffset, len: u64) -> std::ops::RangeInclusive<u64> {
        let last = at.0.saturating_add(len.saturating_sub(1));
        at.0 >> self.cluster_bits..=last >> self.cluster_bits
    }

    /// Says that a range holds metadata.
    pub(super) fn add(&self, at: HostOffset, len: u64) {
        for place in self.clusters(at, len).filter_map(Self::place) {
            self.make(&place).fetch_or(place.bit, Ordering::Relaxed);
        }
    }

    /// Says that a range holds metadata no more.
    pub(super) fn remove(&self, at: HostOffset, len: u64) {
        for place in self.clusters(at, len).filter_map(Self::place) {
            if let Some(word) = self.get(&place) {
                word.fetch_and(!place.bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether any cluster of a range holds metadata.
    pub(super) fn contains(&self, at: HostOffset, len: u64) -> bool {
        self.clusters(at, len).any(|cluster| {
            Self::place(cluster).is_none_or(|place| {
                let word = self.get(&place);
                word.is_some_and(|word| word.load(Ordering::Relaxed) & place.bit != 0)
            })
        })
    }

    /// Refuses to write guest data onto metadata.
    pub(super) fn check(&self, at: HostOffset, len: u64) -> Result<(), CorruptKind> {
        if self.contains(at, len) {
            return Err(CorruptKind::MetadataOverlap { at: at.0, len });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_metadata_cluster_is_guarded_and_no_other() {
        let regions = Regions::new(9);
        for cluster in [0, 1, 32767, 32768, 98303, 98304, 1 << 30] {
            let at = HostOffset(cluster << 9);
            assert!(regions.check(at, 512).is_ok());
            regions.add(at, 512);
            assert!(regions.check(at + 511, 1).is_err(), "cluster {cluster}");
        }
        assert!(regions.check(HostOffset(2 << 9), 512).is_ok());
        assert!(regions.check(HostOffset(2 << 9), (32766 - 2 + 1) * 512).is_ok());
        assert!(regions.check(HostOffset(2 << 9), (32767 - 2 + 1) * 512).is_err());
        regions.remove(HostOffset(1 << 9), 512);
        assert!(regions.check(HostOffset(1 << 9), 512).is_ok());
        assert!(regions.check(HostOffset(1 << 55), 512).is_err(), "too far to keep track of");
    }
}
