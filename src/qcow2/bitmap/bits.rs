//! The bits of one bitmap in memory, set by all workers at once.

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Bytes that the bits of a disk of `size` bytes take, without padding.
pub(super) fn bytes_of(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// One bit for each granule of the disk; set when it was written.
pub(super) struct Bits {
    granularity_bits: u32,
    count: u64,
    /// Bit `n` of the bitmap is bit `n % 64` of word `n / 64`: the words are little-endian in the
    /// file.
    words: Box<[AtomicU64]>,
    /// Whether any bit was set since the bits were loaded.
    changed: AtomicBool,
}

/// What a cluster of the bitmap holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    Zeros,
    Ones,
    Mixed(Vec<u8>),
}

impl Bits {
    /// No bit set, for a disk of `size` bytes.
    pub(super) fn new(size: u64, granularity_bits: u32) -> Self {
        let words = bytes_of(size, granularity_bits).div_ceil(8);
        Self {
            granularity_bits,
            count: size.div_ceil(1 << granularity_bits),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            changed: AtomicBool::new(false),
        }
    }

    /// Sets the bits of every granule that `len` bytes from `at` on touch. The bits are read again
    /// when all requests have ended, so they need no order among themselves.
    pub(super) fn mark(&self, at: u64, len: u64) {
        let first = at >> self.granularity_bits;
        let last = at.saturating_add(len.saturating_sub(1)) >> self.granularity_bits;
        let last = last.min(self.count.saturating_sub(1));
        if len == 0 || first > last || self.count == 0 {
            return;
        }
        for number in first / 64..=last / 64 {
            let from = if number == first / 64 { first % 64 } else { 0 };
            let to = if number == last / 64 { last % 64 } else { 63 };
            let mask = u64::MAX << from & u64::MAX >> (63 - to);
            let word = &self.words[index(number)];
            // Most writes go where others have been: those write nothing shared.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
                if !self.changed.load(Ordering::Relaxed) {
                    self.changed.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// The same bits once more.
    pub(super) fn copy(&self) -> Self {
        let word = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        Self {
            granularity_bits: self.granularity_bits,
            count: self.count,
            words: self.words.iter().map(word).collect(),
            changed: AtomicBool::new(self.is_changed()),
        }
    }

    /// Sets every bit whose granule another bitmap of the same disk has a bit for.
    pub(super) fn merge(&self, other: &Self) {
        for (number, word) in (0..).zip(&other.words) {
            let mut word = word.load(Ordering::Relaxed);
            while word != 0 {
                let first = word.trailing_zeros();
                let run = (word >> first).trailing_ones();
                let at = (number * 64 + u64::from(first)) << other.granularity_bits;
                self.mark(at, u64::from(run) << other.granularity_bits);
                word &= u64::MAX.checked_shl(first + run).unwrap_or(0);
            }
        }
    }

    /// Whether any bit was set since the bits were loaded.
    pub(super) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// Bytes that the bits take.
    pub(super) fn bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// How many clusters the bits take in the file.
    pub(super) fn clusters(&self, cluster: u64) -> u64 {
        self.bytes().div_ceil(cluster)
    }

    /// The words of cluster number `number` of the bitmap's data.
    fn words_of(&self, number: u64, cluster: u64) -> &[AtomicU64] {
        let per_cluster = cluster / 8;
        let end = self.words.len();
        let first = index(number * per_cluster).min(end);
        &self.words[first..(first + index(per_cluster)).min(end)]
    }

    /// Bits of the last word that stand for parts of the disk.
    fn tail_mask(&self) -> u64 {
        match self.count % 64 {
            0 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }

    /// Sets the words of a cluster from what the image holds of it; `None` for ones.
    pub(super) fn load(&self, number: u64, cluster: u64, bytes: Option<&[u8]>) {
        let words = self.words_of(number, cluster);
        for (step, word) in words.iter().enumerate() {
            let value = bytes.map_or(u64::MAX, |bytes| {
                let field = bytes[step * 8..step * 8 + 8].try_into().expect("eight bytes");
                u64::from_le_bytes(field)
            });
            word.store(value, Ordering::Relaxed);
        }
        if let Some(last) = self.words.last() {
            last.fetch_and(self.tail_mask(), Ordering::Relaxed);
        }
    }

    /// What a cluster of the bitmap's data holds now.
    pub(super) fn content(&self, number: u64, cluster: u64) -> Content {
        let words = self.words_of(number, cluster);
        let all = |value: u64| words.iter().all(|word| word.load(Ordering::Relaxed) == value);
        if all(0) {
            return Content::Zeros;
        }
        // Only a whole cluster: behind the end of the bitmap there must be zeros.
        if words.len() as u64 == cluster / 8 && all(u64::MAX) {
            return Content::Ones;
        }
        let bytes = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        let mut bytes: Vec<u8> = bytes.collect();
        bytes.resize(index(cluster), 0);
        Content::Mixed(bytes)
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("the bits fit in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bits: &Bits) -> Vec<u64> {
        let is_set = |number: &u64| {
            let word = bits.words[index(number / 64)].load(Ordering::Relaxed);
            word >> (number % 64) & 1 == 1
        };
        (0..bits.words.len() as u64 * 64).filter(is_set).collect()
    }

    #[test]
    fn every_granule_that_a_range_touches_is_marked_and_no_other() {
        for granularity_bits in [9, 12, 16] {
            let unit = 1 << granularity_bits;
            let size = 200 * unit - 1;
            for (at, len) in [
                (0, 1),
                (unit - 1, 2),
                (63 * unit, unit),
                (63 * unit, unit + 1),
                (5 * unit, 150 * unit),
                (199 * unit, 10 * unit),
                (7 * unit, 0),
            ] {
                let bits = Bits::new(size, granularity_bits);
                bits.mark(at, len);
                let touched = |number: &u64| {
                    let start = number * unit;
                    start < at + len && at < start + unit
                };
                let expected: Vec<u64> = (0..200).filter(touched).collect();
                assert_eq!(set(&bits), expected, "{len} bytes at {at}, granularity {unit}");
                assert_eq!(bits.is_changed(), !expected.is_empty());
            }
        }
    }

    #[test]
    fn marking_what_is_marked_changes_nothing() {
        let bits = Bits::new(1 << 20, 16);
        bits.load(0, 512, None);
        bits.mark(0, 1 << 20);
        assert!(!bits.is_changed());
    }

    #[test]
    fn clusters_come_back_as_they_were_loaded_and_end_with_zeros() {
        // 4096 + 100 bits: one whole cluster of 512 bytes, and a part of another.
        let size = (4096 + 100) * 512;
        let bits = Bits::new(size, 9);
        bits.load(0, 512, None);
        bits.load(1, 512, None);
        assert_eq!(bits.content(0, 512), Content::Ones);
        let mut tail = vec![0xff; 12];
        tail.push(0x0f);
        tail.resize(512, 0);
        assert_eq!(bits.content(1, 512), Content::Mixed(tail));
        let bytes: Vec<u8> = (0..512).map(|step| (step % 251) as u8).collect();
        bits.load(0, 512, Some(&bytes));
        assert_eq!(bits.content(0, 512), Content::Mixed(bytes));
        bits.load(1, 512, Some(&[0; 512]));
        assert_eq!(bits.content(1, 512), Content::Zeros);
    }

    #[test]
    fn what_is_merged_covers_the_same_bytes() {
        let size = 1000 * 512 + 7;
        let fine = Bits::new(size, 9);
        fine.mark(5 * 512, 3 * 512);
        fine.mark(100 * 512, 130 * 512);
        fine.mark(size - 1, 1);
        let coarse = Bits::new(size, 11);
        coarse.mark(0, 1);
        coarse.merge(&fine);
        let expected: Vec<u64> = [0, 1].into_iter().chain(25..=57).chain([250]).collect();
        assert_eq!(set(&coarse), expected);
        let back = Bits::new(size, 9);
        back.merge(&coarse);
        let covered = |bit: &u64| expected.contains(&(bit / 4));
        assert_eq!(set(&back), (0..1001).filter(covered).collect::<Vec<u64>>());
        assert_eq!(set(&fine.copy()), set(&fine));
    }

    #[test]
    fn a_granule_may_be_larger_than_the_disk() {
        let bits = Bits::new(512, 63);
        bits.mark(0, 512);
        assert_eq!(set(&bits), [0]);
        Bits::new(0, 9).mark(0, 512);
    }
}
