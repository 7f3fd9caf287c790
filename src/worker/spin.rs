//! Waiting for a guest's next request without sleeping.
//!
//! A thread that sleeps is woken in some microseconds at best; where the processor has gone to
//! sleep too, or is a virtual one that its host has to bring back, it takes many times as long as
//! serving the request. So a worker whose guest was quick with its requests looks for the next one
//! for a short while before it sleeps, as QEMU's I/O threads do.
//!
//! Processor time is spent on this only where it helps. Looking in vain is followed by a rest,
//! which gets four times as long each time that it happens again and half as long with each
//! success, so that a guest whose requests are further apart costs a five-hundredth of a processor,
//! and an idle one nothing. Nor may a guest wait for us to stop: where no processor is idle the
//! kernel lets whom we have woken run after us, and then most looks are in vain. At most half of
//! the processors are taken by workers that look, since guests need them too. While the disk works
//! on something nobody looks: it takes longer than a sleep.
//!
//! Where there are more threads than processors, one that never sleeps uses its share up and then
//! waits for milliseconds until it is its turn again, where one that sleeps is let in at once. So a
//! worker that loses the processor to another thread while it looks does not look for long.

use std::time::{Duration, Instant};

use crate::sync::{Arc, AtomicUsize, Ordering};

/// How long workers look unless told otherwise, in microseconds: a guest that is woken by our
/// answer, and asks again, is mostly back by then.
pub const WINDOW_US: u16 = 50;
/// How much longer a rest is after a vain look, as a power of two. A success makes it half as long:
/// so two of three looks must be worth it.
const IN_VAIN: u32 = 2;
/// The longest rest in windows, as a power of two.
const LONGEST_REST: u32 = 9;

/// A look at all rings takes less than a microsecond: whoever notices that so much has passed since
/// the last one has been kept from it.
const KEPT_AWAY: Duration = Duration::from_micros(30);
/// For how many times the time that was lost there is no looking.
const CROWDED_REST: u32 = 64;
/// How old the count of such losses may be when a look begins: asking for it is a system call, and
/// a guest that is quick begins some ten thousand looks a second.
const COUNT_AGE: Duration = Duration::from_millis(1);
/// The longest such rest.
const LONGEST_CROWDED_REST: Duration = Duration::from_secs(1);

/// How many workers of a device may look at the same time.
#[derive(Debug)]
pub struct Places {
    free: AtomicUsize,
}

impl Places {
    /// So many.
    pub fn new(count: usize) -> Self {
        Self { free: AtomicUsize::new(count) }
    }

    fn enter(&self) -> bool {
        let one_less = |free: usize| free.checked_sub(1);
        self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok()
    }

    fn leave(&self) {
        self.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// One worker's looking.
#[derive(Debug)]
pub struct Spin {
    places: Arc<Places>,
    /// How long it looks at most.
    window: Duration,
    /// Since when it looks, and when it did last.
    since: Option<(Instant, Instant)>,
    /// How many windows the last rest was, as a power of two, less what successes took off.
    rest_bits: u32,
    /// Until when it does not look.
    rest: Option<Instant>,
    /// How often this thread had lost the processor when it began to look, or a moment before.
    preempted: i64,
    /// When that was counted.
    counted: Option<Instant>,
}

impl Spin {
    /// For a worker that looks for at most `window` before it sleeps; zero means not at all.
    pub fn new(window: Duration, places: Arc<Places>) -> Self {
        Self { places, window, since: None, rest_bits: 0, rest: None, preempted: 0, counted: None }
    }

    /// Says that there was something to do. `preempted` tells how often this thread has lost the
    /// processor to others.
    pub fn found(&mut self, now: impl FnOnce() -> Instant, preempted: impl FnOnce() -> i64) {
        let Some((_, last)) = self.since else { return };
        self.end();
        if !self.was_kept_away(last, now(), preempted) {
            self.rest_bits = self.rest_bits.saturating_sub(1);
        }
    }

    /// Whether a worker that has found nothing to do looks again at once, rather than to sleep.
    pub fn looks_again(&mut self, now: Instant, preempted: impl FnOnce() -> i64) -> bool {
        if let Some((since, last)) = self.since {
            if self.was_kept_away(last, now, preempted) {
                self.end();
                return false;
            }
            if now.duration_since(since) < self.window {
                self.since = Some((since, now));
                return true;
            }
            self.give_up(now);
            return false;
        }
        if self.window.is_zero() || self.rest.is_some_and(|rest| now < rest) {
            return false;
        }
        if !self.places.enter() {
            return false;
        }
        self.since = Some((now, now));
        if self.counted.is_none_or(|at| now.duration_since(at) > COUNT_AGE) {
            self.count(now, preempted);
        }
        true
    }

    /// Whether others had the processor since the `last` look; then there is a rest.
    fn was_kept_away(
        &mut self,
        last: Instant,
        now: Instant,
        preempted: impl FnOnce() -> i64,
    ) -> bool {
        let passed = now.duration_since(last);
        if passed < KEPT_AWAY || !self.count(now, preempted) {
            return false;
        }
        self.rest = Some(now + (passed * CROWDED_REST).min(LONGEST_CROWDED_REST));
        true
    }

    /// Counts how often this thread has lost the processor; whether it has since the last time.
    fn count(&mut self, now: Instant, preempted: impl FnOnce() -> i64) -> bool {
        self.counted = Some(now);
        let before = std::mem::replace(&mut self.preempted, preempted());
        before < self.preempted
    }

    fn end(&mut self) {
        if self.since.take().is_some() {
            self.places.leave();
        }
    }

    fn give_up(&mut self, now: Instant) {
        self.end();
        self.rest_bits = (self.rest_bits + IN_VAIN).min(LONGEST_REST);
        self.rest = Some(now + self.window * (1 << self.rest_bits));
    }
}

impl Drop for Spin {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_micros(50);

    fn spin() -> Spin {
        Spin::new(WINDOW, Arc::new(Places::new(1)))
    }

    /// Looks until it gives up, or `found` has passed; returns when that was.
    fn look(spin: &mut Spin, begin: Instant, found: Duration) -> (Instant, bool) {
        let mut now = begin;
        while spin.looks_again(now, || 0) {
            now += Duration::from_micros(1);
            if now - begin >= found {
                spin.found(|| now, || 0);
                return (now, true);
            }
        }
        (now, false)
    }

    #[test]
    fn requests_that_come_soon_are_waited_for_every_time() {
        let (mut spin, mut now) = (spin(), Instant::now());
        for _ in 0..1000 {
            let (found, success) = look(&mut spin, now, WINDOW - Duration::from_micros(10));
            assert!(success);
            now = found;
        }
    }

    #[test]
    fn requests_that_are_far_apart_cost_next_to_nothing() {
        let (mut spin, begin) = (spin(), Instant::now());
        let (mut now, mut spent) = (begin, Duration::ZERO);
        while now - begin < Duration::from_secs(1) {
            let (until, success) = look(&mut spin, now, Duration::MAX);
            assert!(!success);
            spent += until - now;
            now = until + 2 * WINDOW;
        }
        assert!(spent >= 9 * WINDOW, "it tries: {spent:?}");
        assert!(spent < Duration::from_micros(2800), "{spent:?} of a second");
    }

    #[test]
    fn successes_end_the_long_rests() {
        let (mut spin, mut now) = (spin(), Instant::now());
        for _ in 0..20 {
            now = look(&mut spin, now, Duration::MAX).0 + Duration::from_secs(1);
        }
        for _ in 0..LONGEST_REST {
            let (found, success) = look(&mut spin, now, Duration::from_micros(5));
            assert!(success);
            now = found;
        }
        let (until, success) = look(&mut spin, now, Duration::MAX);
        assert!(!success);
        assert!(!spin.looks_again(until + 3 * WINDOW, || 0));
        assert!(spin.looks_again(until + 4 * WINDOW, || 0), "the rest is a short one again");
    }

    #[test]
    fn a_guest_that_comes_only_when_we_sleep_is_not_kept_waiting() {
        let (mut spin, begin) = (spin(), Instant::now());
        let (mut now, mut waited) = (begin, Duration::ZERO);
        for step in 0..10_000 {
            // Every other time it has a processor of its own.
            let found = if step % 2 == 0 { Duration::from_micros(5) } else { Duration::MAX };
            let (until, success) = look(&mut spin, now, found);
            waited += if success { Duration::ZERO } else { until - now };
            now = until + Duration::from_micros(10);
        }
        assert!(waited < (now - begin) / 20, "{waited:?} of {:?}", now - begin);
    }

    #[test]
    fn nobody_looks_without_a_place_or_a_window() {
        let (places, now) = (Arc::new(Places::new(1)), Instant::now());
        let mut never = Spin::new(Duration::ZERO, Arc::clone(&places));
        assert!(!never.looks_again(now, || 0));
        let (mut one, mut other) =
            (Spin::new(WINDOW, Arc::clone(&places)), Spin::new(WINDOW, Arc::clone(&places)));
        assert!(one.looks_again(now, || 0) && !other.looks_again(now, || 0));
        drop(one);
        assert!(other.looks_again(now, || 0), "the place is free again");
        other.found(|| now, || 0);
        assert_eq!(places.free.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn who_loses_the_processor_while_looking_sleeps_instead_for_a_while() {
        let lost = Duration::from_millis(3);
        for finds_something in [false, true] {
            let (mut spin, now) = (spin(), Instant::now());
            // What was lost before it looked does not count.
            assert!(spin.looks_again(now, || 7));
            let back = now + lost;
            if finds_something {
                spin.found(|| back, || 8);
            }
            assert!(!spin.looks_again(back, || 8), "others were preferred");
            assert!(!spin.looks_again(now + lost * 60, || 8));
            let again = now + lost * 66;
            assert!(spin.looks_again(again, || 8));
            // A hypervisor that takes its time says nothing of other threads.
            assert!(spin.looks_again(again + KEPT_AWAY, || 8));
            assert_eq!(spin.places.free.load(Ordering::Relaxed), 0);
        }
    }
}
