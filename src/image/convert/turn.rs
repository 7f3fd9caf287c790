//! One after the other: jobs that are worked on at once, and write in the order of their numbers.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::sync::{Mutex, lock};

#[derive(Debug, Default)]
struct State {
    /// Whose turn it is.
    now: u64,
    /// Jobs after it that have ended already.
    ended: Vec<u64>,
    waiting: Vec<(u64, Waker)>,
}

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<State>);

impl Turns {
    /// Waits until every job with a lower number has ended.
    pub(super) async fn wait(&self, number: u64) {
        poll_fn(|context| {
            let mut state = lock(&self.0);
            if state.now >= number {
                return Poll::Ready(());
            }
            let waker = context.waker();
            match state.waiting.iter_mut().find(|(other, _)| *other == number) {
                Some((_, old)) => old.clone_from(waker),
                None => state.waiting.push((number, waker.clone())),
            }
            Poll::Pending
        })
        .await;
    }

    /// A job has ended.
    pub(super) fn end(&self, number: u64) {
        let mut state = lock(&self.0);
        state.ended.push(number);
        while let Some(place) = state.ended.iter().position(|ended| *ended == state.now) {
            state.ended.swap_remove(place);
            state.now += 1;
        }
        let now = state.now;
        let (ready, waiting) =
            std::mem::take(&mut state.waiting).into_iter().partition(|(number, _)| *number <= now);
        state.waiting = waiting;
        drop(state);
        let ready: Vec<(u64, Waker)> = ready;
        ready.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    #[test]
    fn jobs_go_on_in_the_order_of_their_numbers_however_they_end() {
        let turns = Turns::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut third = pin!(turns.wait(2));
        assert!(third.as_mut().poll(&mut context).is_pending());
        turns.end(1);
        assert!(third.as_mut().poll(&mut context).is_pending(), "the first is not done");
        turns.end(0);
        assert!(third.as_mut().poll(&mut context).is_ready());
        let mut fourth = pin!(turns.wait(3));
        assert!(fourth.as_mut().poll(&mut context).is_pending());
    }
}
