//! A fixed set of tasks of one future type, polled on the thread that owns them.
//!
//! Each slot is allocated once and reused; its waker is made once. A wake sets the slot's bit and,
//! if the owner sleeps, calls the function that ends its sleep. Wakers may be used from any thread;
//! the futures never leave theirs.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Which slots want to be polled, and whether their owner sleeps.
pub struct Ready {
    words: Box<[AtomicU64]>,
    parked: AtomicBool,
    unpark: Box<dyn Fn() + Send + Sync>,
}

impl Ready {
    fn new(slots: usize, unpark: Box<dyn Fn() + Send + Sync>) -> Self {
        let words = (0..slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, parked: AtomicBool::new(false), unpark }
    }

    fn set(&self, slot: usize) {
        self.words[slot / 64].fetch_or(1 << (slot % 64), Ordering::SeqCst);
        if self.parked.swap(false, Ordering::SeqCst) {
            (self.unpark)();
        }
    }

    /// Says that the owner is about to sleep. The owner must look at [`Ready::any`] and at its
    /// other sources once more after this, and then sleep or call [`Ready::unparked`].
    pub fn park(&self) {
        self.parked.store(true, Ordering::SeqCst);
    }

    /// Says that the owner is awake.
    pub fn unparked(&self) {
        self.parked.store(false, Ordering::SeqCst);
    }

    /// Whether any slot was woken.
    pub fn any(&self) -> bool {
        self.words.iter().any(|word| word.load(Ordering::SeqCst) != 0)
    }
}

struct SlotWaker {
    ready: Arc<Ready>,
    slot: usize,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.ready.set(self.slot);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.set(self.slot);
    }
}

struct Slot<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// A fixed number of slots, each holding at most one future of type `F`.
///
/// There is no cancellation: a task leaves its slot by finishing, or with the whole set.
pub struct TaskSet<F> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    /// Tasks that were never polled, in the order of their coming.
    fresh: Vec<usize>,
    ready: Arc<Ready>,
}

impl<F: Future<Output = ()>> TaskSet<F> {
    /// A set of `slots` slots; `unpark` ends the owner's sleep and may be called on any thread.
    pub fn new(slots: usize, unpark: impl Fn() + Send + Sync + 'static) -> Self {
        let ready = Arc::new(Ready::new(slots, Box::new(unpark)));
        let make = |slot| Slot {
            future: Box::pin(None),
            waker: Waker::from(Arc::new(SlotWaker { ready: Arc::clone(&ready), slot })),
        };
        let fresh = Vec::with_capacity(slots);
        let free = (0..slots).rev().collect();
        Self { slots: (0..slots).map(make).collect(), free, fresh, ready }
    }

    /// Whether [`TaskSet::spawn`] may be called.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether no task is alive.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// How many tasks are alive.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether no task is alive; the name clippy expects beside `len`.
    pub fn is_empty(&self) -> bool {
        self.is_idle()
    }

    /// Whether any task wants to be polled.
    pub fn has_ready(&self) -> bool {
        !self.fresh.is_empty() || self.ready.any()
    }

    /// The ready bits, for the owner's sleep.
    pub fn ready(&self) -> &Arc<Ready> {
        &self.ready
    }

    /// Puts `future` into a free slot; the next [`TaskSet::run_ready`] polls it.
    ///
    /// # Panics
    /// When there is no free slot: ask [`TaskSet::has_room`] first.
    pub fn spawn(&mut self, future: F) {
        let slot = self.free.pop().expect("spawn needs a free slot");
        self.slots[slot].future.set(Some(future));
        self.fresh.push(slot);
    }

    /// Polls every task that is ready, once; returns how many were polled. New ones come first, in
    /// the order of their coming: what a guest writes in order should find places in order.
    ///
    /// A task that becomes ready meanwhile waits for the next call, so that one busy task cannot
    /// keep the owner from its rings.
    pub fn run_ready(&mut self) -> usize {
        self.run_ready_then(|| {})
    }

    /// As [`TaskSet::run_ready`], and calls `then` after each poll.
    pub fn run_ready_then(&mut self, mut then: impl FnMut()) -> usize {
        let mut fresh = std::mem::take(&mut self.fresh);
        let mut polled = fresh.len();
        for slot in fresh.drain(..) {
            self.poll_slot(slot);
            then();
        }
        self.fresh = fresh;
        for word in 0..self.ready.words.len() {
            if self.ready.words[word].load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = self.ready.words[word].swap(0, Ordering::SeqCst);
            while bits != 0 {
                let index = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                self.poll_slot(index);
                then();
                polled += 1;
            }
        }
        polled
    }

    fn poll_slot(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        // A late wake of a task that has finished finds an empty slot.
        let Some(future) = slot.future.as_mut().as_pin_mut() else { return };
        let mut context = Context::from_waker(&slot.waker);
        if future.poll(&mut context).is_ready() {
            slot.future.set(None);
            self.free.push(index);
        }
    }
}

/// Lets everybody else who is ready run before the caller goes on.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

struct ThreadWaker(Thread);

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs one future to its end on this thread; `drive` moves whatever it waits for and is called
/// between polls. `drive` returns whether it made progress; without any, the thread yields.
pub fn block_on<F: Future>(future: F, mut drive: impl FnMut() -> bool) -> F::Output {
    let waker = Waker::from(Arc::new(ThreadWaker(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        if !drive() {
            thread::park_timeout(std::time::Duration::from_micros(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    type Parked = Rc<RefCell<Option<Waker>>>;

    async fn twice(parked: Parked, done: Rc<Cell<u32>>) {
        let mut yielded = false;
        std::future::poll_fn(|context| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            *parked.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        done.set(done.get() + 1);
    }

    #[test]
    fn a_task_runs_only_when_woken_and_frees_its_slot() {
        let (parked, done) = (Parked::default(), Rc::new(Cell::new(0)));
        let mut tasks = TaskSet::new(1, || {});
        tasks.spawn(twice(parked.clone(), done.clone()));
        assert!(!tasks.has_room());
        assert_eq!(tasks.run_ready(), 1);
        assert_eq!(tasks.run_ready(), 0);
        parked.take().expect("the task left its waker").wake();
        assert_eq!(tasks.run_ready(), 1);
        assert_eq!(done.get(), 1);
        assert!(tasks.is_idle() && tasks.has_room());
    }

    #[test]
    fn new_tasks_are_polled_in_the_order_of_their_coming() {
        let order = Rc::new(RefCell::new(Vec::new()));
        let mut tasks = TaskSet::new(8, || {});
        // Slots come back in an order of their own.
        for round in 0..20 {
            let count = 1 + round % 8;
            for number in 0..count {
                let order = order.clone();
                tasks.spawn(async move { order.borrow_mut().push(number) });
            }
            let mut seen = 0;
            let then = || {
                seen += 1;
                assert_eq!(order.borrow().len(), seen, "called after each");
            };
            assert_eq!(tasks.run_ready_then(then), count);
            assert_eq!(order.take(), (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_wake_from_another_thread_ends_the_sleep_once() {
        let woken = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&woken);
        let parked = Parked::default();
        let mut tasks = TaskSet::new(100, move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        tasks.spawn(twice(parked.clone(), Rc::new(Cell::new(0))));
        tasks.run_ready();
        let waker = parked.take().expect("the task left its waker");
        tasks.ready().park();
        assert!(!tasks.ready().any());
        let again = waker.clone();
        thread::spawn(move || {
            waker.wake();
            again.wake();
        })
        .join()
        .expect("the waking thread");
        assert!(tasks.ready().any());
        assert_eq!(woken.load(Ordering::SeqCst), 1, "a parked owner is woken exactly once");
        tasks.run_ready();
        assert!(tasks.is_idle());
    }
}
