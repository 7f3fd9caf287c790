//! Writers of one cluster.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::task::Poll;

use shuttle::future::block_on;
use shuttle::thread;

use super::claims::Claims;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};

/// Four threads with ranges that overlap, but not all of them, meet on four cells.
///
/// # Panics
/// When two hold one cell.
pub fn overlapping_claims_exclude_each_other() {
    let claims = Claims::default();
    let cells: [AtomicBool; 4] = std::array::from_fn(|_| AtomicBool::new(false));
    let hold = |range: Range<u64>| {
        let claim = block_on(claims.claim(range.clone()));
        let own = || cells.iter().take(range.end as usize).skip(range.start as usize);
        for cell in own() {
            assert!(!cell.swap(true, Ordering::SeqCst), "{range:?} holds what another holds");
        }
        own().for_each(|cell| cell.store(false, Ordering::SeqCst));
        drop(claim);
    };
    thread::scope(|scope| {
        for range in [0..2, 1..3, 2..4, 0..4] {
            let hold = &hold;
            scope.spawn(move || {
                hold(range.clone());
                hold(range);
            });
        }
    });
}

/// Three threads want the same; who comes first is noted at the first poll.
///
/// # Panics
/// When one overtakes another.
pub fn claims_are_granted_in_the_order_of_arrival() {
    let claims = Claims::default();
    let (arrivals, grants) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let arrive = |number: u32| {
        let mut claim = pin!(claims.claim(0..1));
        let mut arrived = false;
        let held = block_on(poll_fn(|context| {
            if std::mem::replace(&mut arrived, true) {
                return claim.as_mut().poll(context);
            }
            let mut arrivals = lock(&arrivals);
            arrivals.push(number);
            claim.as_mut().poll(context)
        }));
        lock(&grants).push(number);
        drop(held);
    };
    thread::scope(|scope| {
        for number in 0..3 {
            let arrive = &arrive;
            scope.spawn(move || arrive(number));
        }
    });
    assert_eq!(*lock(&arrivals), *lock(&grants));
}

/// One holds a cell, one waits for that cell and the next and gives up, one waits for the next.
///
/// # Panics
/// When the last one waits for ever.
pub fn a_claim_given_up_lets_the_next_through() {
    let claims = Claims::default();
    thread::scope(|scope| {
        scope.spawn(|| drop(block_on(claims.claim(0..1))));
        scope.spawn(|| {
            let mut claim = Box::pin(claims.claim(0..2));
            block_on(poll_fn(|context| {
                let _perhaps_held = claim.as_mut().poll(context);
                Poll::Ready(())
            }));
            thread::yield_now();
            drop(claim);
        });
        scope.spawn(|| drop(block_on(claims.claim(1..2))));
    });
}
