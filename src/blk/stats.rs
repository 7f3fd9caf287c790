//! What a worker has done. Its counters are its own: others ask it for a copy.

use std::cell::Cell;
use std::time::Instant;

use crate::blk::request::Action;

/// The upper bound in nanoseconds of the first bucket of a histogram: 16 us. Each later one is
/// twice the one before.
pub const FIRST_BOUND_NS: u64 = 16_000;
/// Buckets of a histogram: bounds from 16 us to 4 s, and one for what took longer.
pub const BUCKETS: usize = 20;

/// The kinds of requests that are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards and write-zeroes.
    Erase,
}

impl Kind {
    /// All of them, in the order of [`Totals::latency`].
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Erase];

    /// The kind of a request, if it is timed.
    pub(super) fn of(action: &Action) -> Option<Self> {
        match action {
            Action::Read { .. } => Some(Self::Read),
            Action::Write { .. } => Some(Self::Write),
            Action::Flush => Some(Self::Flush),
            Action::Discard(_) | Action::WriteZeroes(_) => Some(Self::Erase),
            Action::GetId { .. } | Action::Refuse(_) => None,
        }
    }
}

/// Counters of one worker; nobody else touches them, so that counting costs nothing.
#[derive(Debug, Default)]
pub struct Stats {
    /// Reads that were answered.
    pub reads: Cell<u64>,
    /// Bytes that they asked for.
    pub read_bytes: Cell<u64>,
    /// Writes that were answered.
    pub writes: Cell<u64>,
    /// Bytes that they had.
    pub written_bytes: Cell<u64>,
    /// Flushes that were answered.
    pub flushes: Cell<u64>,
    /// Discards and write-zeroes that were answered.
    pub erases: Cell<u64>,
    /// Requests that were answered with an error.
    pub errors: Cell<u64>,
    latency: [[Cell<u64>; BUCKETS]; Kind::ALL.len()],
}

/// A copy of counters, or a sum of such copies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads that were answered.
    pub reads: u64,
    /// Bytes that they asked for.
    pub read_bytes: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Bytes that they had.
    pub written_bytes: u64,
    /// Flushes that were answered.
    pub flushes: u64,
    /// Discards and write-zeroes that were answered.
    pub erases: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// For each kind of [`Kind::ALL`] how many took how long: bucket `n` counts those below
    /// [`FIRST_BOUND_NS`] << `n` that no earlier bucket counts, the last one all others.
    pub latency: [[u64; BUCKETS]; Kind::ALL.len()],
}

impl Totals {
    /// Adds others to these.
    pub fn add(&mut self, other: &Self) {
        for (sum, part) in [
            (&mut self.reads, other.reads),
            (&mut self.read_bytes, other.read_bytes),
            (&mut self.writes, other.writes),
            (&mut self.written_bytes, other.written_bytes),
            (&mut self.flushes, other.flushes),
            (&mut self.erases, other.erases),
            (&mut self.errors, other.errors),
        ] {
            *sum = sum.wrapping_add(part);
        }
        let parts = other.latency.as_flattened();
        for (sum, part) in self.latency.as_flattened_mut().iter_mut().zip(parts) {
            *sum = sum.wrapping_add(*part);
        }
    }
}

/// Adds to a counter.
pub(super) fn count(counter: &Cell<u64>, amount: u64) {
    counter.set(counter.get().wrapping_add(amount));
}

impl Stats {
    /// Counts a request that took so many nanoseconds.
    pub(super) fn took(&self, kind: Kind, time_ns: u64) {
        let bits = (time_ns / FIRST_BOUND_NS).checked_ilog2().map_or(0, |bits| bits + 1);
        let bucket = usize::try_from(bits).map_or(BUCKETS - 1, |bits| bits.min(BUCKETS - 1));
        count(&self.latency[kind as usize][bucket], 1);
    }

    /// Bytes that guests' reads and writes have asked for, which may overflow.
    pub fn bytes(&self) -> u64 {
        self.read_bytes.get().wrapping_add(self.written_bytes.get())
    }

    /// A copy of all counters.
    pub fn totals(&self) -> Totals {
        Totals {
            reads: self.reads.get(),
            read_bytes: self.read_bytes.get(),
            writes: self.writes.get(),
            written_bytes: self.written_bytes.get(),
            flushes: self.flushes.get(),
            erases: self.erases.get(),
            errors: self.errors.get(),
            latency: self.latency.each_ref().map(|kind| kind.each_ref().map(Cell::get)),
        }
    }
}

/// The time as a worker's requests see it: the worker reads the host's clock once in a turn, since
/// doing so for each request would cost as much as all the counting.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    now_ns: Cell<u64>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), now_ns: Cell::new(0) }
    }
}

impl Clock {
    /// Reads the host's clock.
    pub fn tick(&self) {
        let elapsed = self.start.elapsed().as_nanos();
        self.now_ns.set(u64::try_from(elapsed).unwrap_or(u64::MAX));
    }

    /// Nanoseconds from an arbitrary point to the last tick.
    pub fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_go_to_the_bucket_whose_bounds_they_lie_between() {
        let stats = Stats::default();
        for (time_ns, bucket) in [
            (0, 0),
            (FIRST_BOUND_NS - 1, 0),
            (FIRST_BOUND_NS, 1),
            (2 * FIRST_BOUND_NS - 1, 1),
            (2 * FIRST_BOUND_NS, 2),
            ((FIRST_BOUND_NS << 18) - 1, 18),
            (FIRST_BOUND_NS << 18, 19),
            (u64::MAX, 19),
        ] {
            let before = stats.totals().latency[Kind::Flush as usize][bucket];
            stats.took(Kind::Flush, time_ns);
            let after = stats.totals().latency[Kind::Flush as usize][bucket];
            assert_eq!(after, before + 1, "{time_ns} ns");
        }
        let latency = stats.totals().latency;
        assert_eq!(latency[Kind::Flush as usize].iter().sum::<u64>(), 8);
        assert_eq!(latency[Kind::Read as usize], [0; BUCKETS]);
    }

    #[test]
    fn sums_have_all_counters() {
        let stats = Stats::default();
        let counters = [
            &stats.reads,
            &stats.read_bytes,
            &stats.writes,
            &stats.written_bytes,
            &stats.flushes,
            &stats.erases,
            &stats.errors,
        ];
        (1..).zip(counters).for_each(|(amount, counter)| count(counter, amount));
        stats.took(Kind::Erase, 1);
        let once = stats.totals();
        let mut twice = once.clone();
        twice.add(&once);
        assert_eq!((twice.reads, twice.read_bytes, twice.errors), (2, 4, 14));
        assert_eq!(twice.latency[Kind::Erase as usize][0], 2);
        let mut from_nothing = Totals::default();
        from_nothing.add(&once);
        assert_eq!(from_nothing, once);
    }
}
