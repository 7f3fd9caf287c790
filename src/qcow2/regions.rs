//! Which host clusters hold metadata: one bit each, asked before every write of guest data.
//!
//! A crafted or damaged image may map a guest cluster onto the header or a table; a guest that
//! could write there would choose what the image refers to at the next open.

use crate::bytes::HostOffset;
use crate::error::CorruptKind;
use crate::sync::{AtomicU64, OnceLock, Ordering};

/// Chunk k covers this many clusters shifted left by k.
const FIRST_CHUNK_BITS: u32 = 15;
const CHUNKS: usize = 40;

/// A growing set of host clusters, read without a lock.
pub(super) struct Regions {
    cluster_bits: u32,
    chunks: [OnceLock<Box<[AtomicU64]>>; CHUNKS],
}

impl Regions {
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, chunks: [const { OnceLock::new() }; CHUNKS] }
    }

    /// Chunk, word and bit of a cluster: chunk k starts at `(2^k - 1) << FIRST_CHUNK_BITS`.
    fn place(cluster: u64) -> Option<(usize, usize, u64)> {
        let shifted = (cluster >> FIRST_CHUNK_BITS) + 1;
        let chunk = shifted.ilog2();
        let start = ((1_u64 << chunk) - 1) << FIRST_CHUNK_BITS;
        let within = cluster - start;
        let chunk = usize::try_from(chunk).ok().filter(|&chunk| chunk < CHUNKS)?;
        Some((chunk, usize::try_from(within / 64).ok()?, 1 << (within % 64)))
    }

    fn word(&self, chunk: usize, word: usize) -> &AtomicU64 {
        let words = 1_usize << (FIRST_CHUNK_BITS as usize + chunk - 6);
        let make = || (0..words).map(|_| AtomicU64::new(0)).collect();
        &self.chunks[chunk].get_or_init(make)[word]
    }

    fn clusters(&self, at: HostOffset, len: u64) -> std::ops::RangeInclusive<u64> {
        let last = at.0.saturating_add(len.saturating_sub(1));
        at.0 >> self.cluster_bits..=last >> self.cluster_bits
    }

    /// Says that a range holds metadata.
    pub(super) fn add(&self, at: HostOffset, len: u64) {
        for (chunk, word, bit) in self.clusters(at, len).filter_map(Self::place) {
            self.word(chunk, word).fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Says that a range holds metadata no more.
    pub(super) fn remove(&self, at: HostOffset, len: u64) {
        for (chunk, word, bit) in self.clusters(at, len).filter_map(Self::place) {
            self.word(chunk, word).fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Whether any cluster of a range holds metadata.
    pub(super) fn contains(&self, at: HostOffset, len: u64) -> bool {
        self.clusters(at, len).any(|cluster| {
            Self::place(cluster).is_none_or(|(chunk, word, bit)| {
                self.chunks[chunk]
                    .get()
                    .is_some_and(|words| words[word].load(Ordering::Relaxed) & bit != 0)
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
    }
}
