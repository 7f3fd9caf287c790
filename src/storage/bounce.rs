//! A decorator for direct I/O: whatever is not aligned goes through memory and blocks that are.
//!
//! Aligned operations pass straight through. Others become small tasks of this engine: misaligned
//! memory is copied, a read of part of a block reads the whole of it, a write of part of a block
//! reads the block, changes it and writes it back. Nobody may change the block meanwhile, so such a
//! write excludes every other change that touches its blocks, by any worker: see [`BlockLocks`].
//!
//! Changes that are aligned take those locks too, except a guest's own where a block has at most
//! 512 bytes: guest data comes in sectors of 512 bytes, so such a block holds guest data alone and
//! nobody ever writes a part of it.
//!
//! A file whose length is no multiple of the block keeps its length where blocks are larger than
//! 512 bytes: a write of its last block is followed by cutting the file again, under the lock. With
//! blocks of 512 bytes the file is filled up with zeros to the end of the block.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ops::{OpTable, Pending};
use super::{Buf, Engine, FileId, HostRun, Lane, Limits, Op, Purpose, Storage, sys};
use crate::bytes::{HostOffset, round_down, round_up};
use crate::exec::{Ready, TaskSet};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

/// The largest block, in bytes, that guest data always fills.
const GUEST_SECTOR: u64 = 512;

/// How many operations of several steps one engine works on at a time.
const TASKS: usize = 64;

/// Ranges of files that are being changed, by all workers.
///
/// A claim waits for every older claim on an overlapping range unless both only change whole
/// blocks. Claims are few, so they are kept in one list in order of arrival.
#[derive(Debug, Default)]
pub struct BlockLocks(Mutex<Claims>);

#[derive(Debug, Default)]
struct Claims {
    next: u64,
    list: Vec<Claimed>,
}

#[derive(Debug)]
struct Claimed {
    ticket: u64,
    file: FileId,
    range: Range<u64>,
    exclusive: bool,
    waker: Option<Waker>,
}

impl Claimed {
    fn excludes(&self, other: &Self) -> bool {
        self.file == other.file
            && (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

struct Claim {
    locks: Arc<BlockLocks>,
    ticket: u64,
}

impl BlockLocks {
    /// No claims.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Claims a range of bytes and waits until it is granted; dropping the claim gives it back.
    async fn claim(self: &Arc<Self>, file: FileId, range: Range<u64>, exclusive: bool) -> Claim {
        let ticket = {
            let mut claims = lock(&self.0);
            claims.next += 1;
            let ticket = claims.next;
            claims.list.push(Claimed { ticket, file, range, exclusive, waker: None });
            ticket
        };
        let claim = Claim { locks: Arc::clone(self), ticket };
        poll_fn(|context| {
            let mut claims = lock(&self.0);
            let (older, own) = claims.split(ticket);
            if older.iter().any(|other| other.excludes(own)) {
                own.waker = Some(context.waker().clone());
                return Poll::Pending;
            }
            own.waker = None;
            Poll::Ready(())
        })
        .await;
        claim
    }
}

impl Claims {
    /// The claims before that of `ticket`, and that one.
    fn split(&mut self, ticket: u64) -> (&[Claimed], &mut Claimed) {
        let index = self.list.iter().position(|claim| claim.ticket == ticket);
        let (older, rest) = self.list.split_at_mut(index.expect("the claim is held"));
        (older, &mut rest[0])
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = lock(&self.locks.0);
        let index = claims.list.iter().position(|claim| claim.ticket == self.ticket);
        let gone = claims.list.remove(index.expect("the claim is held"));
        let freed = claims.list.iter_mut().filter(|claim| claim.excludes(&gone));
        let wakers: Vec<Waker> = freed.filter_map(|claim| claim.waker.take()).collect();
        drop(claims);
        wakers.into_iter().for_each(Waker::wake);
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Wakes the worker when another one has given a block back.
struct Bell {
    event: EventFd,
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // A counter that is full has been written to, which is all that matters.
            let _ = self.event.write(1);
        }
    }

    fn quiet(&self) {
        if self.rung.load(Ordering::SeqCst) {
            // Nothing to read yet: the writer is about to write, and the next call reads it.
            if self.event.read().is_ok() {
                self.rung.store(false, Ordering::SeqCst);
            }
        }
    }
}

/// An engine that takes operations of any alignment.
pub struct Bounce<E: Engine + 'static> {
    steps: Steps<E>,
    table: Rc<OpTable<()>>,
    tasks: RefCell<TaskSet<Task>>,
    /// Tasks that found no room.
    backlog: RefCell<VecDeque<Task>>,
    ready: Arc<Ready>,
    bell: Arc<Bell>,
    epoll: RawFd,
}

impl<E: Engine + 'static> Bounce<E> {
    /// Decorates `inner`; engines over the same files must share `locks`.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(inner: E, locks: Arc<BlockLocks>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let bell = Arc::new(Bell { event, rung: AtomicBool::new(false) });
        let remote = Arc::clone(&bell);
        let tasks = TaskSet::new(TASKS, move || remote.ring());
        let bounce = Self {
            steps: Steps { inner: Rc::new(inner), locks },
            table: OpTable::new(),
            ready: Arc::clone(tasks.ready()),
            tasks: RefCell::new(tasks),
            backlog: RefCell::default(),
            bell,
            epoll: epoll::create(true)?,
        };
        for fd in [bounce.bell.event.as_raw_fd(), bounce.steps.inner.pollable()] {
            // A simulated disk has no descriptor.
            if fd >= 0 {
                let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
                epoll::ctl(bounce.epoll, epoll::ControlOptions::EPOLL_CTL_ADD, fd, event)?;
            }
        }
        bounce.ready.park();
        Ok(bounce)
    }

    fn has_tasks(&self) -> bool {
        !self.tasks.borrow().is_idle() || !self.backlog.borrow().is_empty()
    }

    /// Runs the tasks that can go on; returns how many of them ended.
    fn run_tasks(&self) -> usize {
        // Also without tasks: a bell that rings late would keep the worker awake.
        self.bell.quiet();
        if !self.has_tasks() {
            return 0;
        }
        let mut tasks = self.tasks.borrow_mut();
        let before = tasks.len() + self.backlog.borrow().len();
        self.ready.unparked();
        loop {
            while tasks.has_room()
                && let Some(task) = self.backlog.borrow_mut().pop_front()
            {
                tasks.spawn(task);
            }
            if tasks.run_ready() > 0 {
                continue;
            }
            // From here on a wake by another worker rings the bell.
            self.ready.park();
            if !self.ready.any() {
                return before - tasks.len() - self.backlog.borrow().len();
            }
            self.ready.unparked();
        }
    }

    fn start<F>(&self, steps: impl FnOnce(Steps<E>) -> F) -> Pending
    where
        F: Future<Output = io::Result<()>> + 'static,
    {
        let (key, pending) = self.table.begin(());
        let (table, work) = (Rc::clone(&self.table), steps(self.steps.clone()));
        self.backlog.borrow_mut().push_back(Box::pin(async move {
            let result = work.await;
            table.finish(key, result);
        }));
        pending
    }
}

impl<E: Engine + 'static> Storage for Bounce<E> {
    /// What `inner` needs: other alignments are served too, but cost a copy or a read.
    fn limits(&self, file: FileId) -> Limits {
        self.steps.inner.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.steps.inner.length(file)
    }

    fn allocated(&self, file: FileId) -> io::Result<u64> {
        self.steps.inner.allocated(file)
    }

    fn host_run(&self, file: FileId, at: HostOffset) -> io::Result<HostRun> {
        self.steps.inner.host_run(file, at)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        let limits = self.steps.inner.limits(file);
        let block = u64::from(limits.request_alignment);
        let guests =
            matches!(why, Purpose::GuestWrite | Purpose::GuestZero | Purpose::GuestDiscard);
        let request = Request { file, why, block, free: guests && block <= GUEST_SECTOR };
        let whole = match &op {
            Op::Read { at, buf } | Op::Write { at, buf } => {
                (at.0 | buf.len() as u64).is_multiple_of(block)
            }
            Op::Zero { at, len, .. } | Op::Discard { at, len } => {
                (at.0 | len).is_multiple_of(block)
            }
            Op::Resize { .. } => false,
            Op::Reserve { .. } | Op::Sync => true,
        };
        let fits = op.buf().is_none_or(|buf| fits(buf, limits));
        if whole && fits && (request.free || !op.changes()) {
            return self.steps.inner.submit(file, why, op);
        }
        match op {
            Op::Read { at, buf } => self.start(|steps| steps.read(request, at.0, buf)),
            Op::Write { at, buf } if !whole => self.start(|steps| steps.modify(request, at.0, buf)),
            Op::Write { at, buf } if !fits => self.start(|steps| steps.copy(request, at, buf)),
            Op::Zero { at, len, unmap } if !whole => {
                self.start(|steps| steps.zero(request, at.0, len, unmap))
            }
            _ => self.start(|steps| steps.change(request, op)),
        }
    }

    fn lane(&self) -> Lane {
        self.steps.inner.lane()
    }
}

impl<E: Engine + 'static> Engine for Bounce<E> {
    /// Counts the steps of larger operations too.
    fn reap(&self) -> usize {
        if self.has_tasks() {
            // Wakes from here need no bell.
            self.ready.unparked();
        }
        let steps = self.steps.inner.reap();
        steps + self.run_tasks()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.run_tasks();
        self.steps.inner.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.steps.inner.is_busy() || self.has_tasks()
    }

    fn pollable(&self) -> RawFd {
        self.epoll
    }

    fn wait(&self) -> io::Result<()> {
        loop {
            // Tasks that end here may be all that the caller waits for.
            let ended = self.reap();
            self.steps.inner.submit_all()?;
            if ended > 0 || !self.is_busy() {
                return Ok(());
            }
            if self.steps.inner.pollable() < 0 {
                self.steps.inner.wait()?;
                self.run_tasks();
                return Ok(());
            }
            sys::wait_readable(&[self.epoll])?;
        }
    }
}

impl<E: Engine + 'static> Drop for Bounce<E> {
    fn drop(&mut self) {
        // Claims must not be given back while writes under them are under way. What is left when
        // `inner` rests are tasks that wait for others' claims and have not begun.
        while self.submit_all().is_ok() && self.steps.inner.is_busy() {
            if self.steps.inner.wait().is_err() {
                break;
            }
        }
        let _ = epoll::close(self.epoll);
    }
}

/// Whether every segment can be given to direct I/O: wherever the kernel has to cut a long list,
/// it then cuts between blocks.
fn fits(buf: &Buf, limits: Limits) -> bool {
    let (memory, block) = (limits.memory_alignment as usize, limits.request_alignment as usize);
    buf.segments().iter().all(|segment| {
        segment.address().addr().is_multiple_of(memory) && segment.len().is_multiple_of(block)
    })
}

/// What all steps of one operation have in common.
#[derive(Clone, Copy)]
struct Request {
    file: FileId,
    why: Purpose,
    /// The block in bytes.
    block: u64,
    /// Whether a change of whole blocks needs no claim.
    free: bool,
}

/// The steps that operations are made of.
struct Steps<E> {
    inner: Rc<E>,
    locks: Arc<BlockLocks>,
}

impl<E> Clone for Steps<E> {
    fn clone(&self) -> Self {
        Self { inner: Rc::clone(&self.inner), locks: Arc::clone(&self.locks) }
    }
}

impl<E: Engine> Steps<E> {
    fn submit(&self, request: Request, op: Op) -> Pending {
        self.inner.submit(request.file, request.why, op)
    }

    async fn read(self, request: Request, at: u64, buf: Buf) -> io::Result<()> {
        let (start, end) = enclosing(at, buf.len() as u64, request.block);
        let blocks = memory(end - start);
        let op = Op::Read { at: HostOffset(start), buf: blocks.clone() };
        self.submit(request, op).await?;
        buf.copy_from_buf(0, &blocks.slice(index(at - start), buf.len()));
        Ok(())
    }

    /// A write of whole blocks out of memory that does not fit.
    async fn copy(self, request: Request, at: HostOffset, buf: Buf) -> io::Result<()> {
        let blocks = memory(buf.len() as u64);
        blocks.copy_from_buf(0, &buf);
        self.change(request, Op::Write { at, buf: blocks }).await
    }

    /// A change that needs nothing but, perhaps, a claim.
    async fn change(self, request: Request, op: Op) -> io::Result<()> {
        let (range, exclusive) = match &op {
            Op::Write { at, buf } => (enclosing(at.0, buf.len() as u64, request.block), false),
            Op::Zero { at, len, .. } | Op::Discard { at, len } => {
                (enclosing(at.0, *len, request.block), false)
            }
            Op::Resize { len } => ((round_down(*len, request.block), u64::MAX), true),
            Op::Read { .. } | Op::Reserve { .. } | Op::Sync => ((0, 0), false),
        };
        let _claim = if request.free && !exclusive {
            None
        } else {
            Some(self.locks.claim(request.file, range.0..range.1, exclusive).await)
        };
        self.submit(request, op).await
    }

    /// A write of bytes that are not whole blocks.
    async fn modify(self, request: Request, at: u64, buf: Buf) -> io::Result<()> {
        let (_claim, keep) = self.claim_blocks(request, at, buf.len() as u64).await?;
        self.patch(request, at, &buf).await?;
        self.cut(request, keep).await
    }

    /// Zeros that are not whole blocks.
    async fn zero(self, request: Request, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = at.saturating_add(len);
        let (_claim, keep) = self.claim_blocks(request, at, len).await?;
        let (first, last) = (round_up(at, request.block), round_down(end, request.block));
        if first < last {
            self.patch(request, at, &memory(first - at)).await?;
            let op = Op::Zero { at: HostOffset(first), len: last - first, unmap };
            self.submit(request, op).await?;
            self.patch(request, last, &memory(end - last)).await?;
        } else {
            self.patch(request, at, &memory(len)).await?;
        }
        self.cut(request, keep).await
    }

    /// Claims the blocks around a range for one writer alone. If they reach beyond the end of a
    /// file that must not grow that much, also claims everything behind them, and returns the
    /// length that the file must be cut to afterwards. Never cuts where blocks are small, since
    /// not every writer takes a claim there.
    async fn claim_blocks(
        &self,
        request: Request,
        at: u64,
        len: u64,
    ) -> io::Result<(Claim, Option<u64>)> {
        let (start, end) = enclosing(at, len, request.block);
        let keep = || -> io::Result<Option<u64>> {
            let keep = self.inner.length(request.file)?.max(at.saturating_add(len));
            Ok((keep < end).then_some(keep))
        };
        let may_cut = request.block > GUEST_SECTOR && self.inner.limits(request.file).grows;
        if may_cut && keep()?.is_some() {
            let claim = self.locks.claim(request.file, start..u64::MAX, true).await;
            // Somebody else may have made the file longer meanwhile.
            return Ok((claim, keep()?));
        }
        Ok((self.locks.claim(request.file, start..end, true).await, None))
    }

    async fn cut(&self, request: Request, keep: Option<u64>) -> io::Result<()> {
        match keep {
            Some(len) => self.submit(request, Op::Resize { len }).await,
            None => Ok(()),
        }
    }

    /// Writes the blocks around `buf` with their other bytes as they are in the file.
    async fn patch(&self, request: Request, at: u64, buf: &Buf) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let (start, end) = enclosing(at, buf.len() as u64, request.block);
        let last = end - request.block;
        let blocks = memory(end - start);
        let tail = at + (buf.len() as u64) < end;
        let head = at > start || (tail && last == start);
        let partial = [(start, head), (last, tail && last > start)];
        for (first, _) in partial.into_iter().filter(|(_, partial)| *partial) {
            let part = blocks.slice(index(first - start), index(request.block));
            self.submit(request, Op::Read { at: HostOffset(first), buf: part }).await?;
        }
        blocks.copy_from_buf(index(at - start), buf);
        self.submit(request, Op::Write { at: HostOffset(start), buf: blocks }).await
    }
}

/// The whole blocks around a range: first byte, and end.
fn enclosing(at: u64, len: u64, block: u64) -> (u64, u64) {
    (round_down(at, block), round_up(at.saturating_add(len), block))
}

fn memory(len: u64) -> Buf {
    Buf::zeroed(index(len))
}

fn index(len: u64) -> usize {
    usize::try_from(len).expect("a transfer fits in memory")
}
