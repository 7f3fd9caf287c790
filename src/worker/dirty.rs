#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! The dirty log: which pages of the guest's memory this process has written (vhost-user,
//! "Migration").
//!
//! While a guest migrates, its memory is copied over and over, and the front-end learns from the
//! log what must be copied again. A page is marked after it was written and before anybody can
//! conclude from an answer that it was: the data and the status byte of a request before its entry
//! of the used ring, the used ring before the guest is told. A ring that does not log holds no
//! [`RingLog`], and looking for it is all that it pays.

use std::fmt;
use std::fs::File;

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::blk::chain::{Chain, Descriptor};
use crate::blk::token::Used;
use crate::sync::{Arc, AtomicU8, Ordering};

/// log2 of the bytes of guest memory that one bit stands for.
const PAGE_BITS: u32 = 12;

/// A log in memory that is shared with the front-end: one bit for each page of guest memory, the
/// lowest bit of a byte first.
pub struct DirtyLog {
    mapping: MmapRegion,
    /// Where the log begins in the mapping.
    start: usize,
    /// Bytes of the log.
    bytes: u64,
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyLog({} bytes)", self.bytes)
    }
}

impl DirtyLog {
    /// The log that lies in `mapping` from byte `start` on.
    pub fn new(mapping: MmapRegion, start: usize) -> Self {
        let bytes = u64::try_from(mapping.size().saturating_sub(start)).unwrap_or(u64::MAX);
        Self { mapping, start, bytes }
    }

    /// The file that is mapped.
    pub fn file(&self) -> Option<&File> {
        self.mapping.file_offset().map(FileOffset::file)
    }

    /// Marks the pages of `len` bytes at the guest address `at`. The log may be shorter than the
    /// guest's address space: nobody asks for pages beyond its end.
    pub fn mark(&self, at: u64, len: u64) {
        let Some(behind) = len.checked_sub(1) else { return };
        let (first, last) = (at >> PAGE_BITS, at.saturating_add(behind) >> PAGE_BITS);
        let (first_byte, last_byte) = (first >> 3, last >> 3);
        if first_byte >= self.bytes {
            return;
        }
        for byte in first_byte..=last_byte.min(self.bytes.saturating_sub(1)) {
            let mut bits = u8::MAX;
            if byte == first_byte {
                bits &= u8::MAX << (first & 7);
            }
            if byte == last_byte {
                bits &= u8::MAX >> (7 & !last);
            }
            self.set(byte, bits);
        }
    }

    fn set(&self, byte: u64, bits: u8) {
        let place = usize::try_from(byte).ok().and_then(|byte| byte.checked_add(self.start));
        let cell = place.and_then(|place| self.mapping.get_atomic_ref::<AtomicU8>(place).ok());
        if let Some(cell) = cell {
            // The front-end takes bits away at any time. Whoever sees one sees what was written.
            cell.fetch_or(bits, Ordering::SeqCst);
        }
    }
}

/// What the workers log to.
#[derive(Debug)]
pub struct Logging {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// For each queue where its used ring is logged, if the front-end has said so; else it is where
    /// the ring lies.
    pub used: Vec<Option<u64>>,
}

/// The log of one ring, and the memory that its requests may write.
#[derive(Debug)]
pub(super) struct RingLog {
    log: Arc<DirtyLog>,
    /// The guest address of the used ring.
    used: u64,
    /// Entries of the ring.
    size: u16,
    /// By the index of a chain's first descriptor.
    taken: Vec<Taken>,
}

/// The chains with one first descriptor. There is one, unless the driver is broken and makes it
/// available again before it has it back.
#[derive(Debug, Default)]
struct Taken {
    chains: usize,
    /// Guest address and length of each range that the device may write.
    ranges: Vec<(u64, u64)>,
}

impl RingLog {
    /// The log of a ring from which nothing is taken, and whose used ring lies at `used`.
    pub(super) fn new(log: Arc<DirtyLog>, used: u64, size: u16) -> Self {
        let taken = (0..size).map(|_| Taken::default()).collect();
        Self { log, used, size, taken }
    }

    /// Goes on in another log. What has been taken is marked there.
    pub(super) fn replace(&mut self, log: Arc<DirtyLog>, used: u64) {
        (self.log, self.used) = (log, used);
    }

    /// Remembers what a chain that is taken lets the device write. A driver that changes it now
    /// has the wrong pages marked, and nobody but itself to blame.
    pub(super) fn take(&mut self, chain: &Chain<'_>) {
        let Some(taken) = self.taken.get_mut(usize::from(chain.head())) else { return };
        taken.chains = taken.chains.saturating_add(1);
        let writable = chain.clone().filter(Descriptor::is_writable);
        taken.ranges.extend(writable.map(|part| (part.at, u64::from(part.len))));
    }

    /// Marks data and status bytes of chains that are done with.
    pub(super) fn mark_done(&mut self, done: &[Used]) {
        for used in done {
            let Some(taken) = self.taken.get_mut(usize::from(used.head)) else { continue };
            // Of several chains with one head, nobody knows whose answer this is.
            taken.ranges.iter().for_each(|(at, len)| self.log.mark(*at, *len));
            taken.chains = taken.chains.saturating_sub(1);
            if taken.chains == 0 {
                taken.ranges.clear();
            }
        }
    }

    /// Marks `count` entries of the used ring from the index `first` on, and the index.
    pub(super) fn mark_used(&self, first: u16, count: usize) {
        let entries = (0..self.size).take(count);
        for slot in entries.map(|entry| first.wrapping_add(entry).checked_rem(self.size)) {
            let offset = 8u64.saturating_mul(u64::from(slot.unwrap_or(0))).saturating_add(4);
            self.log.mark(self.used.saturating_add(offset), 8);
        }
        self.mark_wish();
    }

    /// Marks flags and index at the front of the used ring, and the entry at its end by which the
    /// device says when it wants to be told.
    pub(super) fn mark_wish(&self) {
        let offset = 8u64.saturating_mul(u64::from(self.size)).saturating_add(4);
        self.log.mark(self.used, 4);
        self.log.mark(self.used.saturating_add(offset), 2);
    }
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "a test that is wrong may panic"
)]
mod tests {
    use super::*;

    fn log(bytes: usize) -> DirtyLog {
        DirtyLog::new(MmapRegion::new(bytes + 16).expect("memory"), 16)
    }

    fn marked(log: &DirtyLog) -> Vec<u64> {
        let byte = |place: u64| {
            let place = usize::try_from(place).expect("a place") + log.start;
            log.mapping.get_ref::<u8>(place).expect("in the mapping").load()
        };
        (0..log.bytes * 8).filter(|page| byte(page / 8) >> (page % 8) & 1 != 0).collect()
    }

    #[test]
    fn each_page_has_its_bit_and_no_other_is_set() {
        for (at, len, pages) in [
            (0, 1, 0..1),
            (4095, 1, 0..1),
            (4095, 2, 0..2),
            (4096, 4096, 1..2),
            (7 * 4096, 4096, 7..8),
            (7 * 4096, 4097, 7..9),
            (3 * 4096 + 5, 20 * 4096, 3..24),
            (8 * 4096, 16 * 4096, 8..24),
            (50, 0, 0..0),
        ] {
            let log = log(8);
            log.mark(at, len);
            assert_eq!(marked(&log), pages.collect::<Vec<_>>(), "{len} bytes at {at}");
        }
    }

    #[test]
    fn addresses_beyond_the_log_touch_nothing() {
        let log = log(2);
        for (at, len) in [(16 << 12, 1), (1 << 47, 4096), (u64::MAX, 1), (u64::MAX - 5, u64::MAX)] {
            log.mark(at, len);
            assert_eq!(marked(&log), [0u64; 0], "{len} bytes at {at}");
        }
        log.mark(15 << 12, 1 << 40);
        log.mark(1 << 12, 1);
        assert_eq!(marked(&log), [1, 15], "what lies in the log is marked");
        log.mark(0, u64::MAX);
        assert_eq!(marked(&log).len(), 16);
    }

    #[test]
    fn a_head_that_is_taken_twice_is_marked_until_both_are_done() {
        let mut ring = RingLog::new(Arc::new(log(8)), 1 << 40, 4);
        ring.taken[3] = Taken { chains: 2, ranges: vec![(0, 1), (5 << 12, 1)] };
        for left in [2, 0] {
            ring.mark_done(&[Used { head: 3, len: 1 }]);
            assert_eq!(ring.taken[3].ranges.len(), left);
            assert_eq!(marked(&ring.log), [0, 5]);
        }
        ring.mark_done(&[Used { head: 9, len: 1 }]);
    }

    #[test]
    fn the_used_ring_is_marked_where_it_was_written() {
        // Entries 1022, 1023 and 0 of a ring that begins at the fifth page.
        let ring = RingLog::new(Arc::new(log(8)), 5 << 12, 1024);
        ring.mark_used(1022, 3);
        assert_eq!(marked(&ring.log), [5, 6, 7], "the last entry reaches into the next page");
        let ring = RingLog::new(Arc::new(log(8)), (5 << 12) - 4, 1024);
        ring.mark_used(512, 1);
        assert_eq!(marked(&ring.log), [4, 6, 7], "flags and index, the entry, and the wish");
    }
}
