//! Whose turn it is to flush: a group commit over all workers.
//!
//! Whoever comes while a flush is under way cannot use it, since its sync may have begun, or its
//! copy of the tables been made; all who come then wait for the next one, which one of them runs
//! for all of them. Before it begins, all others who are ready to run do so once: a guest that has
//! sent several flushes at a time wants one.

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
pub(crate) struct FlushGate(Mutex<Gate>);

/// What a caller of flush has to do.
pub(crate) enum Role<'a> {
    Lead(Lead<'a>),
    Done,
}

/// The right to run a flush. When it is dropped the next flush begins; those who waited for this
/// one are content only if it was finished.
pub(crate) struct Lead<'a> {
    gate: &'a FlushGate,
    number: u64,
    finished: bool,
}

impl FlushGate {
    /// The number of the first flush that begins after now.
    pub(crate) fn ticket(&self) -> u64 {
        lock(&self.0).started + 1
    }

    /// Waits until the flush of that number has ended, or runs it.
    pub(crate) async fn role(&self, ticket: u64) -> Role<'_> {
        Turn { gate: self, ticket, gathers: false }.await
    }

    /// Lets the next flush begin; returns whether somebody had waited.
    fn open(&self, finished: Option<u64>) -> bool {
        let mut gate = lock(&self.0);
        gate.running = false;
        gate.finished = finished.unwrap_or(gate.finished);
        let waiters = std::mem::take(&mut gate.waiters);
        drop(gate);
        let any = !waiters.is_empty();
        waiters.into_iter().for_each(Waker::wake);
        any
    }
}

struct Turn<'a> {
    gate: &'a FlushGate,
    ticket: u64,
    /// It is this one's flush that is next, and others may still join.
    gathers: bool,
}

impl<'a> Future for Turn<'a> {
    type Output = Role<'a>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Role<'a>> {
        let mut gate = lock(&self.gate.0);
        if !self.gathers {
            if gate.finished >= self.ticket {
                return Poll::Ready(Role::Done);
            }
            if gate.running {
                gate.waiters.push(context.waker().clone());
                return Poll::Pending;
            }
            gate.running = true;
            drop(gate);
            self.gathers = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        gate.started += 1;
        let lead = Lead { gate: self.gate, number: gate.started, finished: false };
        drop(gate);
        self.gathers = false;
        Poll::Ready(Role::Lead(lead))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.gathers {
            self.gate.open(None);
        }
    }
}

impl Lead<'_> {
    /// Everything is durable that was complete when the flush began. Returns whether others had
    /// waited for it, or wait for the next one.
    pub(crate) fn finish(mut self) -> bool {
        self.finished = true;
        self.gate.open(Some(self.number))
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.gate.open(None);
        }
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
        assert!(poll(first.as_mut()).is_pending(), "others may join");
        let Poll::Ready(Role::Lead(lead)) = poll(first.as_mut()) else { panic!("nobody flushes") };
        let mut second = Box::pin(gate.role(gate.ticket()));
        assert!(poll(second.as_mut()).is_pending());
        drop(lead);
        assert!(poll(second.as_mut()).is_pending(), "it is the one that others may join");
        let Poll::Ready(Role::Lead(lead)) = poll(second.as_mut()) else { panic!("its turn") };
        assert!(!lead.finish(), "nobody waits");
        let mut late = Box::pin(gate.role(gate.ticket() - 1));
        assert!(matches!(poll(late.as_mut()), Poll::Ready(Role::Done)));
    }

    #[test]
    fn flushes_that_come_together_are_one() {
        let gate = FlushGate::default();
        let mut all: Vec<_> = (0..8).map(|_| Box::pin(gate.role(gate.ticket()))).collect();
        for role in &mut all {
            assert!(poll(role.as_mut()).is_pending());
        }
        let Poll::Ready(Role::Lead(lead)) = poll(all[0].as_mut()) else { panic!("nobody flushes") };
        let mut late = Box::pin(gate.role(gate.ticket()));
        assert!(poll(late.as_mut()).is_pending(), "it may have written more");
        assert!(lead.finish());
        for role in &mut all[1..] {
            assert!(matches!(poll(role.as_mut()), Poll::Ready(Role::Done)));
        }
        assert!(poll(late.as_mut()).is_pending());
        assert!(matches!(poll(late.as_mut()), Poll::Ready(Role::Lead(_))));
    }

    #[test]
    fn who_gives_up_before_it_began_leaves_the_flush_to_others() {
        let gate = FlushGate::default();
        let mut first = Box::pin(gate.role(gate.ticket()));
        let mut second = Box::pin(gate.role(gate.ticket()));
        assert!(poll(first.as_mut()).is_pending() && poll(second.as_mut()).is_pending());
        drop(first);
        assert!(poll(second.as_mut()).is_pending());
        assert!(matches!(poll(second.as_mut()), Poll::Ready(Role::Lead(_))));
    }
}
