//! A worker whose device has rate limits: it takes no chains while there are no tokens.

use crate::blk::memory::Finder;
use crate::worker::Worker;

/// Nanoseconds in a millisecond.
const MILLISECOND: u64 = 1_000_000;

impl<F: Future<Output = ()>> Worker<F> {
    /// Takes the chains that the limits allow. What is left makes this worker stand in line; a
    /// worker whose rings are empty, stopping or broken keeps nobody waiting.
    pub(super) fn pop_limited(&mut self) -> usize {
        let limiter = self.seat.limiter();
        let admission = if self.tasks.has_room() { self.seat.enter(&limiter) } else { None };
        let served = admission.is_some();
        // Turns without admission move on to no other ring, or the same one would always be first
        // when there are tokens.
        let popped = admission.map_or(0, |admission| self.pop(Some(admission)));
        let left = self.tasks.has_room() && self.has_available();
        self.seat.settle(served, left);
        popped
    }

    fn has_available(&mut self) -> bool {
        let memory = Finder::new(self.memory.map());
        let mut any = false;
        for ring in self.rings.iter_mut().filter(|ring| ring.is_open()) {
            match ring.has_available(&memory) {
                Ok(available) => any |= available,
                Err(why) => ring.fail(&why),
            }
        }
        any
    }

    /// How long the worker may sleep before there are tokens for it, in milliseconds; `None` when
    /// it does not wait for any, or will be woken.
    ///
    /// Rounded up, so that several requests are taken at a time when they would come more often.
    pub fn throttled_ms(&self) -> Option<i32> {
        let wait = self.seat.wait()?.div_ceil(MILLISECOND);
        Some(i32::try_from(wait).unwrap_or(i32::MAX))
    }
}
