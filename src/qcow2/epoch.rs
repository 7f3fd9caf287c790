//! Which requests may still look at a cluster that was unlinked.
//!
//! Each request enters the current epoch in its worker's lane and leaves it at its end; that is all
//! a request pays, on a cache line of its own worker. The epoch moves on only when nobody is left
//! in the one before, so a cluster that was unlinked in epoch `e` is out of everyone's sight when
//! the epoch is `e + 2`.

use crate::storage::Lane;
use crate::sync::{AtomicU64, CacheLine, Ordering, fence};

/// Lanes that do not share a counter; more workers than that share.
const LANES: usize = 64;

/// The epoch and who is in it.
pub(crate) struct Epochs {
    now: CacheLine<AtomicU64>,
    lanes: Box<[CacheLine<[AtomicU64; 2]>]>,
}

/// One request's stay; the request ends with it.
#[must_use = "a request is under way as long as this lives"]
pub(crate) struct Stay<'a>(&'a AtomicU64);

impl Epochs {
    pub(crate) fn new() -> Self {
        Self::of_lanes(LANES)
    }

    /// The first epoch, with so many lanes.
    pub(crate) fn of_lanes(lanes: usize) -> Self {
        Self {
            now: CacheLine(AtomicU64::new(0)),
            lanes: (0..lanes).map(|_| CacheLine::default()).collect(),
        }
    }

    /// Begins a request of a worker.
    pub(crate) fn enter(&self, lane: Lane) -> Stay<'_> {
        let counters = &self.lanes[lane.0 % self.lanes.len()].0;
        loop {
            let epoch = self.now.0.load(Ordering::SeqCst);
            let counter = &counters[usize::from(epoch % 2 == 1)];
            counter.fetch_add(1, Ordering::SeqCst);
            // Whoever advances looks at the counters after changing the epoch's predecessor, so a
            // stay that was counted in a stale epoch must move.
            if self.now.0.load(Ordering::SeqCst) == epoch {
                return Stay(counter);
            }
            counter.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The epoch that what was unlinked just before belongs to.
    pub(crate) fn now(&self) -> u64 {
        // Whoever enters a later epoch must see the entry changed, so the change may not be
        // delayed beyond the look at the epoch.
        fence(Ordering::SeqCst);
        self.now.0.load(Ordering::SeqCst)
    }

    /// Moves the epoch on as far as it can go now, at most by two; returns it.
    pub(crate) fn advance(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.now();
            let previous = usize::from(epoch.wrapping_add(1) % 2 == 1);
            let left = self.lanes.iter().any(|lane| lane.0[previous].load(Ordering::SeqCst) != 0);
            if left {
                break;
            }
            let next = epoch + 1;
            // Another thread may have moved it: then it saw the same.
            let _ = self.now.0.compare_exchange(epoch, next, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.now()
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unlinked_cluster_is_free_only_after_older_requests_end() {
        let epochs = Epochs::new();
        let old = epochs.enter(Lane(3));
        let unlinked = epochs.now();
        assert!(epochs.advance() < unlinked + 2);
        let young = epochs.enter(Lane(0));
        assert!(epochs.advance() < unlinked + 2, "the old request may still look at it");
        drop(old);
        assert!(epochs.advance() >= unlinked + 2, "the young request cannot see it");
        drop(young);
    }
}
