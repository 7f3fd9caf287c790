//! Claims on ranges: writers of one cluster meet here, first come, first served.
//!
//! A claim is granted when no earlier claim overlaps it, granted or waiting. It is released by
//! being dropped. Also used with ranges of tables, and as a queue for one thing with one number.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sync::{Mutex, lock};

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// In order of arrival.
    entries: Vec<Entry>,
}

/// A set of claims that exclude each other where they overlap.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<State>);

/// A granted or awaited claim.
#[derive(Debug)]
#[must_use = "dropping a claim releases it"]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    ticket: u64,
}

impl Claims {
    /// Waits until nothing earlier overlaps `range`, then holds it.
    pub(super) async fn claim(&self, range: Range<u64>) -> Claim<'_> {
        let ticket = {
            let mut state = lock(&self.0);
            state.next += 1;
            let ticket = state.next;
            state.entries.push(Entry { ticket, range, waker: None });
            ticket
        };
        // From here on the entry is released by drop, also while it waits.
        let claim = Claim { claims: self, ticket };
        Granted(&claim).await;
        claim
    }
}

struct Granted<'a, 'b>(&'b Claim<'a>);

impl Future for Granted<'_, '_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.0.claims.0);
        let entries = &mut state.entries;
        let place = entries.iter().position(|entry| entry.ticket == self.0.ticket);
        let place = place.expect("a claim is listed until it is dropped");
        let (earlier, rest) = entries.split_at_mut(place);
        let own = &mut rest[0];
        if earlier.iter().any(|entry| overlap(&entry.range, &own.range)) {
            own.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        own.waker = None;
        Poll::Ready(())
    }
}

fn overlap(left: &Range<u64>, right: &Range<u64>) -> bool {
    left.start < right.end && right.start < left.end
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.claims.0);
        let place = state.entries.iter().position(|entry| entry.ticket == self.ticket);
        let gone = state.entries.remove(place.expect("a claim is listed until it is dropped"));
        for entry in &mut state.entries {
            if overlap(&entry.range, &gone.range)
                && let Some(waker) = entry.waker.take()
            {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_claims_are_granted_in_order() {
        let claims = Claims::default();
        let mut first = Box::pin(claims.claim(0..4));
        let Poll::Ready(held) = poll(first.as_mut()) else { panic!("nothing was claimed") };
        let mut second = Box::pin(claims.claim(3..8));
        assert!(poll(second.as_mut()).is_pending());
        let mut third = Box::pin(claims.claim(7..9));
        assert!(poll(third.as_mut()).is_pending(), "it must not overtake the second");
        let mut apart = Box::pin(claims.claim(9..10));
        assert!(poll(apart.as_mut()).is_ready());
        drop(held);
        let Poll::Ready(held) = poll(second.as_mut()) else { panic!("its turn") };
        assert!(poll(third.as_mut()).is_pending());
        drop(held);
        assert!(poll(third.as_mut()).is_ready());
    }

    #[test]
    fn a_claim_dropped_while_waiting_lets_later_ones_through() {
        let claims = Claims::default();
        let mut first = Box::pin(claims.claim(0..1));
        let Poll::Ready(_held) = poll(first.as_mut()) else { panic!("nothing was claimed") };
        let mut second = Box::pin(claims.claim(0..2));
        assert!(poll(second.as_mut()).is_pending());
        let mut third = Box::pin(claims.claim(1..2));
        assert!(poll(third.as_mut()).is_pending());
        drop(second);
        assert!(poll(third.as_mut()).is_ready());
    }
}
