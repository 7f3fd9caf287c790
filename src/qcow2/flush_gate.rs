//! Whose turn it is to flush: a group commit over all workers.
//!
//! Whoever comes while a flush is under way cannot use it, since it may have copied the tables
//! already; all who come then wait for the next one, which one of them runs for all of them.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sync::{Mutex, lock};

#[derive(Debug, Default)]
struct Gate {
    running: bool,
    started: u64,
    finished: u64,
    waiters: Vec<Waker>,
}

/// Who runs a flush and who waits for it.
#[derive(Debug, Default)]
pub(super) struct FlushGate(Mutex<Gate>);

/// What a caller of flush has to do.
pub(super) enum Role<'a> {
    Lead(Lead<'a>),
    Done,
}

/// The right to run a flush. When it is dropped the next flush begins; those who waited for this
/// one are content only if it was finished.
pub(super) struct Lead<'a> {
    gate: &'a FlushGate,
    number: u64,
    finished: bool,
}

impl FlushGate {
    /// The number of the first flush that begins after now.
    pub(super) fn ticket(&self) -> u64 {
        lock(&self.0).started + 1
    }

    /// Waits until the flush of that number has ended, or runs it.
    pub(super) async fn role(&self, ticket: u64) -> Role<'_> {
        Turn { gate: self, ticket }.await
    }
}

struct Turn<'a> {
    gate: &'a FlushGate,
    ticket: u64,
}

impl<'a> Future for Turn<'a> {
    type Output = Role<'a>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Role<'a>> {
        let mut gate = lock(&self.gate.0);
        if gate.finished >= self.ticket {
            return Poll::Ready(Role::Done);
        }
        if gate.running {
            gate.waiters.push(context.waker().clone());
            return Poll::Pending;
        }
        gate.running = true;
        gate.started += 1;
        let lead = Lead { gate: self.gate, number: gate.started, finished: false };
        Poll::Ready(Role::Lead(lead))
    }
}

impl Lead<'_> {
    /// Everything is durable that was complete when the flush began.
    pub(super) fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut gate = lock(&self.gate.0);
        gate.running = false;
        if self.finished {
            gate.finished = self.number;
        }
        let waiters = std::mem::take(&mut gate.waiters);
        drop(gate);
        waiters.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll<'a>(role: Pin<&mut impl Future<Output = Role<'a>>>) -> Poll<Role<'a>> {
        role.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn who_waited_for_a_flush_that_was_given_up_runs_one() {
        let gate = FlushGate::default();
        let mut first = Box::pin(gate.role(gate.ticket()));
        let mut second = Box::pin(gate.role(gate.ticket()));
        let Poll::Ready(Role::Lead(lead)) = poll(first.as_mut()) else { panic!("nobody flushes") };
        assert!(poll(second.as_mut()).is_pending());
        drop(lead);
        let Poll::Ready(Role::Lead(lead)) = poll(second.as_mut()) else { panic!("its turn") };
        lead.finish();
        let mut late = Box::pin(gate.role(gate.ticket() - 1));
        assert!(matches!(poll(late.as_mut()), Poll::Ready(Role::Done)));
    }
}
