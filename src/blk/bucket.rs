#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! A token bucket, exact to the nanosecond.
//!
//! A bucket of `size` tokens that fills in `refill` nanoseconds gains `size / refill` tokens in
//! one. Counting in units of `1 / refill` of a token makes that a whole number, so that nothing is
//! rounded, however often or seldom somebody looks.

/// Nanoseconds in a millisecond.
const MILLISECOND: u64 = 1_000_000;

/// One bucket. Time is the caller's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Tokens that it holds when it is full.
    size: u64,
    /// Nanoseconds in which it fills; also units in a token.
    refill: u64,
    /// What it holds, in units; below zero it is in debt.
    level: i128,
    /// Tokens of the extra that is never refilled.
    burst: u64,
    /// When `level` was right, in nanoseconds.
    at: u64,
}

impl Bucket {
    /// A full bucket of `size` tokens, which must not be zero, filled in `refill_ms` milliseconds.
    pub(super) fn new(size: u64, refill_ms: u64, burst: u64, now: u64) -> Self {
        let refill = refill_ms.saturating_mul(MILLISECOND).max(1);
        let mut bucket = Self { size, refill, level: 0, burst, at: now };
        bucket.level = bucket.full();
        bucket
    }

    /// Units of a full bucket.
    fn full(&self) -> i128 {
        i128::from(self.size).saturating_mul(i128::from(self.refill))
    }

    /// Adds what has come in since the last look. A clock that stands still or goes back adds
    /// nothing.
    pub(super) fn refill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let gained = i128::from(elapsed).saturating_mul(i128::from(self.size));
        self.level = self.level.saturating_add(gained).min(self.full());
    }

    /// Whether there is at least one token.
    pub(super) fn has_token(&self) -> bool {
        self.burst > 0 || self.level >= i128::from(self.refill)
    }

    /// Takes tokens, first of the extra, and goes into debt for what is not there.
    pub(super) fn take(&mut self, tokens: u64) {
        let extra = tokens.min(self.burst);
        self.burst = self.burst.saturating_sub(extra);
        let rest = i128::from(tokens.saturating_sub(extra));
        self.level = self.level.saturating_sub(rest.saturating_mul(i128::from(self.refill)));
    }

    /// Nanoseconds after the last look until there is a token.
    pub(super) fn wait(&self) -> u64 {
        if self.has_token() {
            return 0;
        }
        let lack = i128::from(self.refill).saturating_sub(self.level);
        let size = i128::from(self.size.max(1));
        // Rounded up: a nanosecond earlier there would be none.
        let wait = lack.saturating_add(size.saturating_sub(1)).checked_div(size);
        u64::try_from(wait.unwrap_or(0)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Takes single tokens as long as there are any.
    fn drain(bucket: &mut Bucket) -> u64 {
        let mut taken = 0u64;
        while bucket.has_token() {
            bucket.take(1);
            taken = taken.saturating_add(1);
        }
        taken
    }

    #[test]
    fn the_extra_is_spent_first_and_never_comes_back() {
        let mut bucket = Bucket::new(10, 1000, 5, 0);
        assert_eq!(drain(&mut bucket), 15);
        bucket.refill(100 * SECOND);
        assert_eq!(drain(&mut bucket), 10, "long idle fills the bucket once");
    }

    #[test]
    fn nothing_is_lost_to_rounding_however_often_somebody_looks() {
        // Seven tokens in a second that is no multiple of any step.
        let mut bucket = Bucket::new(7, 1000, 0, 0);
        assert_eq!(drain(&mut bucket), 7);
        // Steps of nearly four milliseconds and of one second.
        let short = (0..SECOND).step_by(3_999_971);
        let times = short.chain((1..=1000).map(|second: u64| second.saturating_mul(SECOND)));
        let taken: u64 = times
            .map(|now| {
                bucket.refill(now);
                drain(&mut bucket)
            })
            .sum();
        assert_eq!(taken, 7000);
    }

    #[test]
    fn the_wait_is_exact() {
        for (size, refill_ms, tokens) in [(1, 1, 1), (3, 1000, 3), (1 << 20, 100, 5 << 20)] {
            let mut bucket = Bucket::new(size, refill_ms, 0, 0);
            assert_eq!(bucket.wait(), 0);
            bucket.take(tokens);
            let wait = bucket.wait();
            let mut early = bucket.clone();
            early.refill(wait - 1);
            assert!(!early.has_token(), "{size} in {refill_ms} ms");
            bucket.refill(wait);
            assert!(bucket.has_token(), "{size} in {refill_ms} ms");
        }
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_twice() {
        let mut bucket = Bucket::new(100, 1000, 0, 5 * SECOND);
        assert_eq!(drain(&mut bucket), 100);
        bucket.refill(SECOND);
        bucket.refill(5 * SECOND);
        assert_eq!(drain(&mut bucket), 0);
        bucket.refill(11 * SECOND / 2);
        assert_eq!(drain(&mut bucket), 50);
    }

    #[test]
    fn extremes_neither_overflow_nor_block_for_ever() {
        let mut bucket = Bucket::new(u64::MAX, u64::MAX, u64::MAX, 0);
        bucket.take(u64::MAX);
        bucket.take(u64::MAX);
        bucket.refill(u64::MAX);
        assert!(bucket.has_token());
        let mut slow = Bucket::new(1, u64::from(u32::MAX), 0, 0);
        slow.take(u64::MAX);
        assert_eq!(slow.wait(), u64::MAX);
    }
}
