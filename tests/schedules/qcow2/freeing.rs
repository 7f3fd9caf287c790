//! Clusters that lost their last reference while requests look at them.

use shuttle::thread;

use super::epoch::Epochs;
use super::limbo::Limbo;
use super::refcount::Run;
use crate::storage::Lane;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// The cluster that the entry refers to at first.
const CLUSTER: u64 = 9;

/// Two requests at a time look at an entry and then at its cluster; another request unlinks it, a
/// flush makes that durable, and two threads free what they may.
///
/// # Panics
/// When the cluster is freed under a request that found it in the entry, or never.
pub fn a_cluster_is_freed_when_nobody_can_look_at_it() {
    let (epochs, limbo) = (Epochs::of_lanes(2), Limbo::default());
    let (entry, freed) = (AtomicU64::new(CLUSTER), AtomicBool::new(false));
    let look = |lane| {
        let stay = epochs.enter(Lane(lane));
        if entry.load(Ordering::Acquire) == CLUSTER {
            thread::yield_now();
            assert!(!freed.load(Ordering::SeqCst), "the cluster is gone");
        }
        drop(stay);
    };
    let free = || {
        for _run in limbo.take(epochs.advance(), 1) {
            assert!(!freed.swap(true, Ordering::SeqCst), "it is freed once");
        }
    };
    thread::scope(|scope| {
        for lane in 0..2 {
            let look = &look;
            scope.spawn(move || {
                look(lane);
                look(lane);
            });
        }
        scope.spawn(|| {
            let stay = epochs.enter(Lane(0));
            entry.store(0, Ordering::Release);
            limbo.unlinked(Run { count: 1 }, epochs.now());
            drop(stay);
            limbo.seal();
            limbo.release();
            free();
        });
        scope.spawn(|| {
            free();
            free();
        });
    });
    free();
    assert!(freed.load(Ordering::SeqCst), "nobody is left who could look at it");
}
