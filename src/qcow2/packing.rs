//! Where compressed clusters lie that are written from front to back, and how often each host
//! cluster is referred to then.
//!
//! They follow each other byte by byte. What is not compressed begins with a host cluster; the rest
//! of the one before stays empty, so that the file is never longer than without compression.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::VecDeque;

use crate::qcow2::format::COMPRESSED;

/// log2 of the unit in bytes in which entries count compressed bytes.
const SECTOR_BITS: u32 = 9;

/// What becomes of a guest cluster that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// It is zeros, which have no place.
    Zeros,
    /// It is stored as it is.
    Plain,
    /// It has so many bytes when compressed, less than a cluster.
    Bytes(u32),
}

/// Where a guest cluster lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere.
    Zeros,
    /// In the host cluster that begins there.
    Plain(u64),
    /// There and in so many bytes, at least one.
    Bytes(u64, u64),
}

impl Place {
    /// The L2 entry of a compressed cluster, without what other entries have; `None` when the
    /// offset is larger than an entry can say.
    pub(super) fn compressed_entry(at: u64, len: u64, cluster_bits: u32) -> Option<u64> {
        let offset_bits = 62_u32.checked_sub(cluster_bits.checked_sub(8)?)?;
        if at.checked_shr(offset_bits)? > 0 {
            return None;
        }
        let last = at.checked_add(len)?.checked_sub(1)?;
        let more = (last >> SECTOR_BITS).checked_sub(at >> SECTOR_BITS)?;
        Some(COMPRESSED | more.checked_shl(offset_bits)? | at)
    }
}

/// Gives guest clusters their places, in order.
#[derive(Debug, Clone)]
pub(super) struct Placer {
    cluster: u64,
    /// Most references that a host cluster can have.
    most: u64,
    /// The next byte that is free.
    at: u64,
    /// How many guest clusters lie in the host cluster of that byte already.
    shared: u64,
}

impl Placer {
    /// Places begin at the byte `start`, the first one of a host cluster of `cluster` bytes.
    pub(super) fn new(start: u64, cluster: u64, refcount_order: u32) -> Self {
        let most = match 1_u32.checked_shl(refcount_order) {
            Some(bits @ 0..=63) => {
                1_u64.checked_shl(bits).map_or(u64::MAX, |it| it.wrapping_sub(1))
            }
            _ => u64::MAX,
        };
        Self { cluster, most, at: start, shared: 0 }
    }

    /// The place of the next guest cluster; `None` when the file would be too large.
    pub(super) fn place(&mut self, packed: Packed) -> Option<Place> {
        let len = match packed {
            Packed::Zeros => return Some(Place::Zeros),
            Packed::Plain => {
                let at = self.at.checked_next_multiple_of(self.cluster)?;
                (self.at, self.shared) = (at.checked_add(self.cluster)?, 0);
                return Some(Place::Plain(at));
            }
            Packed::Bytes(len) => u64::from(len.max(1)),
        };
        if self.shared >= self.most {
            (self.at, self.shared) = (self.at.checked_next_multiple_of(self.cluster)?, 0);
        }
        let at = self.at;
        self.at = at.checked_add(len)?;
        let into = self.at.checked_rem(self.cluster)?;
        self.shared = match into {
            // The next one begins with a host cluster of its own.
            0 => 0,
            into if into < len && at.checked_rem(self.cluster)? != 0 => 1,
            _ => self.shared.checked_add(1)?,
        };
        Some(Place::Bytes(at, len))
    }

    /// The first byte behind everything, where a host cluster begins.
    pub(super) fn end(&self) -> Option<u64> {
        self.at.checked_next_multiple_of(self.cluster)
    }
}

/// How often the host clusters from the first place on are referred to, one after the other.
pub(super) struct Counts<Clusters> {
    placer: Placer,
    clusters: Clusters,
    /// Host clusters that were begun, and how often they are referred to so far.
    open: VecDeque<(u64, u64)>,
}

impl<Clusters: Iterator<Item = Packed>> Counts<Clusters> {
    pub(super) fn new(placer: Placer, clusters: Clusters) -> Self {
        Self { placer, clusters, open: VecDeque::new() }
    }
}

impl<Clusters: Iterator<Item = Packed>> Iterator for Counts<Clusters> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        // Whoever comes next may lie in the host cluster that was begun last, and in none before.
        while self.open.len() < 2 {
            let Some(packed) = self.clusters.next() else { break };
            let cluster = self.placer.cluster;
            let (first, last) = match self.placer.place(packed)? {
                Place::Zeros => continue,
                Place::Plain(at) => (at, at),
                Place::Bytes(at, len) => (at, at.checked_add(len)?.checked_sub(1)?),
            };
            for number in first.checked_div(cluster)?..=last.checked_div(cluster)? {
                match self.open.back_mut() {
                    Some((known, count)) if *known == number => *count = count.checked_add(1)?,
                    _ => self.open.push_back((number, 1)),
                }
            }
        }
        self.open.pop_front().map(|(_, count)| count)
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a panic fails the test")]
mod tests {
    use super::*;

    #[test]
    fn clusters_follow_each_other_and_are_counted() {
        use Packed::{Bytes, Plain, Zeros};
        let clusters = [
            Bytes(100),
            Bytes(412),
            Zeros,
            Bytes(500),
            Bytes(20),
            Plain,
            Bytes(1),
            Plain,
            Bytes(9),
        ];
        let mut placer = Placer::new(1024, 512, 4);
        let counts: Vec<u64> = Counts::new(placer.clone(), clusters.into_iter()).collect();
        let places: Vec<Place> =
            clusters.iter().map(|packed| placer.place(*packed).expect("small")).collect();
        let expected = [
            Place::Bytes(1024, 100),
            Place::Bytes(1124, 412),
            Place::Zeros,
            Place::Bytes(1536, 500),
            Place::Bytes(2036, 20),
            Place::Plain(2560),
            Place::Bytes(3072, 1),
            Place::Plain(3584),
            Place::Bytes(4096, 9),
        ];
        assert_eq!(places, expected);
        assert_eq!(counts, [2, 2, 1, 1, 1, 1, 1]);
        assert_eq!(placer.end(), Some(4608));
    }

    #[test]
    fn no_host_cluster_has_more_references_than_its_refcount_can_say() {
        for order in 0..7 {
            let mut random = fastrand::Rng::with_seed(order.into());
            let clusters: Vec<Packed> = (0..400)
                .map(|_| match random.u8(..16) {
                    0 => Packed::Zeros,
                    1 => Packed::Plain,
                    2..=9 => Packed::Bytes(random.u32(1..30)),
                    _ => Packed::Bytes(random.u32(1..512)),
                })
                .collect();
            let mut placer = Placer::new(512, 512, order);
            let counts: Vec<u64> = Counts::new(placer.clone(), clusters.iter().copied()).collect();
            let mut expected = vec![0_u64; counts.len()];
            for packed in clusters {
                let (at, len) = match placer.place(packed).expect("small") {
                    Place::Zeros => continue,
                    Place::Plain(at) => (at, 512),
                    Place::Bytes(at, len) => (at, len),
                };
                for number in at / 512..=(at + len - 1) / 512 {
                    expected[usize::try_from(number - 1).expect("small")] += 1;
                }
            }
            assert_eq!(counts, expected, "{order}");
            let most = if order < 6 { (1_u64 << (1 << order)) - 1 } else { u64::MAX };
            assert!(counts.iter().all(|count| (1..=most).contains(count)), "{order} {counts:?}");
            assert_eq!(placer.end(), u64::try_from(counts.len()).ok().map(|len| 512 * (len + 1)));
        }
    }

    #[test]
    fn entries_say_where_and_how_many_sectors() {
        let bits = 62 - (16 - 8);
        let entry = Place::compressed_entry;
        assert_eq!(entry(0x1_2345, 100, 16), Some(COMPRESSED | 0x1_2345));
        assert_eq!(entry(0x1_01ff, 2, 16), Some(COMPRESSED | 1 << bits | 0x1_01ff));
        assert_eq!(entry(0x1_0000, 65_535, 16), Some(COMPRESSED | 127 << bits | 0x1_0000));
        assert_eq!(entry(1 << bits, 1, 16), None);
    }
}
