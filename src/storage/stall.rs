//! A decorator that waits for space: what the host has no room for is tried again until it has.
//!
//! An operation that ends with ENOSPC or EDQUOT is parked: whoever awaits it goes on waiting, and
//! it is submitted once more at the next tick of a timer, or as soon as an operation of the same
//! engine has given space back: a discard of a raw image, say. Trying again is safe, because an
//! operation says what a range shall hold and whoever submitted it keeps others away from the range
//! until it has the answer. Data and metadata wait alike, so a full host poisons nothing.
//!
//! What a guest discards of a qcow2 image becomes free by a flush, also while writes to new
//! clusters wait here, since those are in no epoch (R7 in `qcow2/ORDERING.md`). It does not as long
//! as one of these waits: a write in place, which may not land in a cluster that was freed; a
//! write-zeroes; a compressed write; a new refcount block or table, whose maker keeps the search
//! for clusters to itself; or the flush. Then space has to come from elsewhere.
//!
//! A sync is never tried again: the kernel reports a lost page once, and a second sync would say
//! that all is well. Nor is a discard, which nothing depends on.
//!
//! The one who awaits an operation also brings it on its way again. An operation whose answer was
//! dropped is tried once.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::ops::Pending;
use super::{Engine, FileId, HostRun, Lane, Limits, Op, Purpose, Storage, sys};
use crate::bytes::HostOffset;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

/// How long a parked operation rests before it is tried again.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// What all engines of a process know of a lack of space: one line in the log when it begins and
/// one when it is over, whoever meets it.
#[derive(Debug, Default)]
pub struct Outage {
    state: Mutex<State>,
    over: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    waiting: u64,
    since: Option<Instant>,
    gone_on: u64,
    bytes: u64,
    failed: u64,
}

impl Outage {
    /// The flag that ends all waiting: once it is set, what still finds no space at the next tick
    /// fails. May be set by a signal handler.
    pub fn over(&self) -> &Arc<AtomicBool> {
        &self.over
    }

    /// How many operations wait for space now.
    pub fn waiting(&self) -> u64 {
        lock(&self.state).waiting
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn enter(self: &Arc<Self>, name: &str, bytes: u64) -> Waiting {
        let mut state = lock(&self.state);
        state.waiting += 1;
        let first = state.since.is_none();
        state.since.get_or_insert_with(Instant::now);
        drop(state);
        if first {
            tracing::warn!(
                "{name}: the host has no space left; an operation that needs {bytes} bytes waits \
                 until there is some, and others will too"
            );
        }
        Waiting { outage: Arc::clone(self), bytes, done: false }
    }

    fn leave(&self, bytes: u64, done: bool) {
        let mut state = lock(&self.state);
        state.waiting -= 1;
        if done {
            state.gone_on += 1;
            state.bytes = state.bytes.saturating_add(bytes);
        } else {
            state.failed += 1;
        }
        if state.waiting > 0 {
            return;
        }
        let State { since, gone_on, bytes, failed, .. } = std::mem::take(&mut *state);
        drop(state);
        let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        if failed > 0 {
            tracing::error!("{failed} operations that waited {seconds:.1} s for space have failed");
        } else {
            tracing::info!(
                "there is space again: {gone_on} operations ({bytes} bytes) have gone on after \
                 {seconds:.1} s"
            );
        }
    }
}

/// An operation's part in the outage: from when it was first parked until it has its answer.
struct Waiting {
    outage: Arc<Outage>,
    bytes: u64,
    done: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.outage.leave(self.bytes, self.done);
    }
}

/// The operations of one engine that are parked. The timer runs exactly while there are some.
struct Lot {
    parked: RefCell<BTreeMap<u64, Waker>>,
    next: Cell<u64>,
    /// How often everything parked was let go.
    round: Cell<u64>,
    due: Cell<Option<Instant>>,
    timer: RefCell<TimerFd>,
    interval: Duration,
    outage: Arc<Outage>,
    names: Box<dyn Fn(FileId) -> String>,
}

impl Lot {
    fn arm(&self) {
        // First the moment and then the timer: when the timer is seen, the moment has passed.
        self.due.set(Some(Instant::now() + self.interval));
        let armed = self.timer.borrow_mut().reset(self.interval, None);
        armed.expect("a timer takes any time");
    }

    fn disarm(&self) {
        if self.due.take().is_some() {
            // Also makes the descriptor unreadable.
            self.timer.borrow_mut().clear().expect("a timer can be stopped");
        }
    }

    /// Lets everything that is parked go; returns how many.
    fn release(&self) -> usize {
        let parked = self.parked.take();
        if parked.is_empty() {
            return 0;
        }
        self.disarm();
        self.round.set(self.round.get() + 1);
        let count = parked.len();
        parked.into_values().for_each(Waker::wake);
        count
    }

    fn release_due(&self) -> usize {
        match self.due.get() {
            Some(due) if due <= Instant::now() => self.release(),
            _ => 0,
        }
    }

    /// Waits for the next round after `round`.
    fn park(self: &Rc<Self>, round: u64) -> Park {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        Park { lot: Rc::clone(self), ticket, round }
    }
}

struct Park {
    lot: Rc<Lot>,
    ticket: u64,
    round: u64,
}

impl Future for Park {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let lot = &self.lot;
        if lot.round.get() != self.round {
            return Poll::Ready(());
        }
        let mut parked = lot.parked.borrow_mut();
        if parked.is_empty() {
            lot.arm();
        }
        parked.insert(self.ticket, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Park {
    fn drop(&mut self) {
        let mut parked = self.lot.parked.borrow_mut();
        if parked.remove(&self.ticket).is_some() && parked.is_empty() {
            self.lot.disarm();
        }
    }
}

/// An engine whose operations wait for space.
pub struct Stall {
    inner: Rc<dyn Engine>,
    lot: Rc<Lot>,
    epoll: RawFd,
}

impl Stall {
    /// Decorates `inner`, with `interval` between two attempts. `names` tells what a file is called
    /// in the log. Must be the outermost decorator: what is parked holds nothing of `inner`.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(
        inner: Box<dyn Engine>,
        interval: Duration,
        outage: Arc<Outage>,
        names: impl Fn(FileId) -> String + 'static,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let descriptors = [timer.as_raw_fd(), inner.pollable()];
        let lot = Lot {
            parked: RefCell::default(),
            next: Cell::default(),
            round: Cell::default(),
            due: Cell::default(),
            timer: RefCell::new(timer),
            interval,
            outage,
            names: Box::new(names),
        };
        let epoll = epoll::create(true)?;
        let stall = Self { inner: Rc::from(inner), lot: Rc::new(lot), epoll };
        // A simulated disk has no descriptor.
        for fd in descriptors.into_iter().filter(|fd| *fd >= 0) {
            let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
            epoll::ctl(epoll, epoll::ControlOptions::EPOLL_CTL_ADD, fd, event)?;
        }
        Ok(stall)
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        let _ = epoll::close(self.epoll);
    }
}

/// Whether the host had no room, for this user or for anybody.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Whether an operation is tried again when there was no space for it.
fn may_wait(op: &Op) -> bool {
    matches!(op, Op::Write { .. } | Op::Zero { .. } | Op::Resize { .. })
}

/// Whether an operation may have given space back.
fn gives_back(op: &Op) -> bool {
    matches!(op, Op::Discard { .. } | Op::Zero { unmap: true, .. } | Op::Resize { .. })
}

/// An operation that may have to wait.
struct Attempt {
    inner: Rc<dyn Engine>,
    lot: Rc<Lot>,
    file: FileId,
    why: Purpose,
    op: Op,
}

impl Attempt {
    fn bytes(&self) -> u64 {
        match &self.op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => buf.len() as u64,
            Op::Zero { len, .. } | Op::Discard { len, .. } | Op::Reserve { len, .. } => *len,
            Op::Resize { .. } | Op::Sync => 0,
        }
    }

    /// Follows the operation from its first submission, in that round, to its end.
    async fn run(self, first: Pending, mut round: u64) -> io::Result<()> {
        let (mut pending, mut waiting) = (first, None);
        loop {
            let result = pending.await;
            let full = result.as_ref().is_err_and(is_full);
            if !full || !may_wait(&self.op) || self.lot.outage.is_over() {
                if let Some(waiting) = &mut waiting {
                    let waiting: &mut Waiting = waiting;
                    waiting.done = !full;
                }
                if result.is_ok() && gives_back(&self.op) {
                    self.lot.release();
                }
                return result;
            }
            // Whoever looks late at a failure from before the last round need not wait for another.
            if self.lot.round.get() == round {
                let enter = || {
                    let name = (self.lot.names)(self.file);
                    tracing::debug!("{name}: {:?} of {} bytes waits", self.why, self.bytes());
                    self.lot.outage.enter(&name, self.bytes())
                };
                waiting.get_or_insert_with(enter);
                self.lot.park(round).await;
            }
            round = self.lot.round.get();
            pending = self.inner.submit(self.file, self.why, self.op.clone());
        }
    }
}

impl Storage for Stall {
    fn limits(&self, file: FileId) -> Limits {
        self.inner.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.inner.length(file)
    }

    fn allocated(&self, file: FileId) -> io::Result<u64> {
        self.inner.allocated(file)
    }

    fn host_run(&self, file: FileId, at: HostOffset) -> io::Result<HostRun> {
        self.inner.host_run(file, at)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        if !may_wait(&op) && !gives_back(&op) {
            return self.inner.submit(file, why, op);
        }
        let first = self.inner.submit(file, why, op.clone());
        let (inner, lot) = (Rc::clone(&self.inner), Rc::clone(&self.lot));
        let round = lot.round.get();
        Pending::from_future(Attempt { inner, lot, file, why, op }.run(first, round))
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl Engine for Stall {
    fn reap(&self) -> usize {
        self.inner.reap() + self.lot.release_due()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.inner.submit_all()
    }

    fn submit_and_rest(&self) -> io::Result<()> {
        self.inner.submit_and_rest()
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy() || self.lot.due.get().is_some()
    }

    fn pollable(&self) -> RawFd {
        if self.inner.pollable() >= 0 { self.epoll } else { -1 }
    }

    fn wait(&self) -> io::Result<()> {
        loop {
            self.submit_all()?;
            if !self.is_busy() || self.reap() > 0 {
                return Ok(());
            }
            let simulated = self.inner.pollable() < 0;
            if self.lot.due.get().is_none() || (simulated && self.inner.is_busy()) {
                return self.inner.wait();
            }
            sys::wait_readable(&[self.epoll])?;
        }
    }
}
