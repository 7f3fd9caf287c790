//! Operations under way: a table that owns them, and the future that waits for one.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The answer to one operation, some time later.
///
/// Dropping it does not cancel the operation and leaks nothing: the table keeps the operation, and
/// with it the buffer, until the engine has answered.
#[must_use = "an operation's failure is seen only by whoever awaits it"]
pub struct Pending(Inner);

enum Inner {
    Ready(Option<io::Result<()>>),
    Slot { table: Rc<dyn Slots>, key: usize },
    Future(Pin<Box<dyn Future<Output = io::Result<()>>>>),
}

trait Slots {
    fn poll(&self, key: usize, context: &mut Context<'_>) -> Poll<io::Result<()>>;
    fn abandon(&self, key: usize);
}

impl Pending {
    /// An answer that is there already.
    pub fn ready(result: io::Result<()>) -> Self {
        Self(Inner::Ready(Some(result)))
    }

    /// An operation of several steps, each taken when this is polled; for slow paths.
    pub fn from_future(future: impl Future<Output = io::Result<()>> + 'static) -> Self {
        Self(Inner::Future(Box::pin(future)))
    }
}

impl Future for Pending {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Inner::Ready(result) => Poll::Ready(result.take().expect("polled after its answer")),
            Inner::Future(future) => future.as_mut().poll(context),
            Inner::Slot { table, key } => {
                let result = std::task::ready!(table.poll(*key, context));
                self.0 = Inner::Ready(None);
                Poll::Ready(result)
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Inner::Slot { table, key } = &self.0 {
            table.abandon(*key);
        }
    }
}

/// The operations of one engine that are under way, each with what the engine needs of it.
///
/// Slots are reused, so a steady load allocates nothing.
pub struct OpTable<T> {
    slots: RefCell<Vec<Slot<T>>>,
    free: RefCell<Vec<usize>>,
}

enum Slot<T> {
    Free,
    Running { op: T, waker: Option<Waker>, abandoned: bool },
    Done(io::Result<()>),
}

impl<T: 'static> OpTable<T> {
    /// An empty table.
    pub fn new() -> Rc<Self> {
        Rc::new(Self { slots: RefCell::new(Vec::new()), free: RefCell::new(Vec::new()) })
    }

    /// Enters an operation; returns its key and the future of its answer.
    pub fn begin(self: &Rc<Self>, op: T) -> (usize, Pending) {
        let slot = Slot::Running { op, waker: None, abandoned: false };
        let mut slots = self.slots.borrow_mut();
        let key = match self.free.borrow_mut().pop() {
            Some(key) => {
                slots[key] = slot;
                key
            }
            None => {
                slots.push(slot);
                slots.len() - 1
            }
        };
        let table: Rc<dyn Slots> = Rc::<Self>::clone(self);
        (key, Pending(Inner::Slot { table, key }))
    }

    /// Runs `change` on an operation that is under way.
    ///
    /// # Panics
    /// When `key` is not under way: an engine answered twice.
    pub fn with<R>(&self, key: usize, change: impl FnOnce(&mut T) -> R) -> R {
        match &mut self.slots.borrow_mut()[key] {
            Slot::Running { op, .. } => change(op),
            _ => panic!("operation {key} is not under way"),
        }
    }

    /// Answers an operation, wakes its waiter and gives what the engine kept of it back.
    ///
    /// # Panics
    /// When `key` is not under way: an engine answered twice.
    pub fn finish(&self, key: usize, result: io::Result<()>) -> T {
        let mut slots = self.slots.borrow_mut();
        let (op, waker) = match std::mem::replace(&mut slots[key], Slot::Done(result)) {
            Slot::Running { op, waker, abandoned } => {
                if abandoned {
                    slots[key] = Slot::Free;
                    self.free.borrow_mut().push(key);
                }
                (op, waker)
            }
            _ => panic!("operation {key} is not under way"),
        };
        drop(slots);
        if let Some(waker) = waker {
            waker.wake();
        }
        op
    }

    /// How many operations are under way, waited for or not.
    pub fn running(&self) -> usize {
        let slots = self.slots.borrow();
        slots.iter().filter(|slot| matches!(slot, Slot::Running { .. })).count()
    }
}

impl<T: 'static> Slots for OpTable<T> {
    fn poll(&self, key: usize, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut slots = self.slots.borrow_mut();
        match &mut slots[key] {
            Slot::Running { waker, .. } => {
                match waker {
                    Some(known) => known.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            done => {
                let Slot::Done(result) = std::mem::replace(done, Slot::Free) else {
                    panic!("operation {key} was answered already");
                };
                self.free.borrow_mut().push(key);
                Poll::Ready(result)
            }
        }
    }

    fn abandon(&self, key: usize) {
        let mut slots = self.slots.borrow_mut();
        match &mut slots[key] {
            Slot::Running { abandoned, waker, .. } => {
                *abandoned = true;
                *waker = None;
            }
            done => {
                *done = Slot::Free;
                self.free.borrow_mut().push(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll_once(pending: &mut Pending) -> Poll<io::Result<()>> {
        Pin::new(pending).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn an_answer_reaches_its_waiter_and_the_slot_is_reused() {
        let table = OpTable::new();
        let (key, mut pending) = table.begin("first");
        assert!(poll_once(&mut pending).is_pending());
        assert_eq!(table.finish(key, Ok(())), "first");
        assert!(matches!(poll_once(&mut pending), Poll::Ready(Ok(()))));
        drop(pending);
        let (again, _pending) = table.begin("second");
        assert_eq!(again, key);
    }

    #[test]
    fn an_abandoned_operation_stays_until_the_engine_answers() {
        let table = OpTable::new();
        let (key, pending) = table.begin(7);
        drop(pending);
        assert_eq!(table.running(), 1);
        assert_eq!(table.finish(key, Err(io::Error::other("late"))), 7);
        assert_eq!(table.running(), 0);
        let (again, _pending) = table.begin(8);
        assert_eq!(again, key, "the slot is free again");
    }
}
