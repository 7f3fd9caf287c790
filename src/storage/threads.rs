#![expect(unsafe_code, reason = "addresses of buffers go to other threads and to the kernel")]
//! Threads that make the system calls that would block: where io_uring is forbidden all of them,
//! beside io_uring those few it does not have.
//!
//! One pool serves all workers. A job carries a plan to a thread and back; the operation with its
//! buffer stays in its engine's table meanwhile, and an engine waits for its jobs before it goes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Condvar;
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::files::{Files, OpenFile, Seen};
use super::ops::{OpTable, Pending};
use super::plan::{Call, Plan, Step};
use super::prompt::Prompt;
use super::{Engine, FileId, HostRun, Lane, Limits, Op, Purpose, Storage, sys};
use crate::bytes::HostOffset;
use crate::sync::{Arc, Mutex, lock};

/// The most threads of a pool. They sleep in the kernel, so more of them than processors is right;
/// more than a disk's queue is useless.
const MOST_THREADS: usize = 16;

/// An operation on its way through a thread.
pub(super) struct Job {
    /// The key of the operation in its engine's table.
    pub(super) key: usize,
    /// The file it works on.
    pub(super) file: Arc<OpenFile>,
    /// Where it stands.
    pub(super) plan: Plan,
    /// The call to begin with.
    pub(super) call: Call,
    /// Whom to tell.
    pub(super) reply: Arc<Mailbox>,
}

/// A job that has ended.
pub(super) struct Answer {
    /// The key of the operation in its engine's table.
    pub(super) key: usize,
    /// Its plan, for being used again.
    pub(super) plan: Plan,
    /// How it ended.
    pub(super) result: io::Result<()>,
}

// SAFETY: what is not Send in a job is the addresses in its plan. The memory they point to is held
// by the operation in its engine's table until the answer has been taken; the engine does not let
// go of the table before. Until then only the thread that has the job uses the addresses.
unsafe impl Send for Job {}
// SAFETY: as for `Job`; after the answer nobody uses the addresses.
unsafe impl Send for Answer {}

/// Carries a job's plan out to its end; blocks.
fn run(job: Job) {
    let Job { key, file, mut plan, mut call, reply } = job;
    let result = loop {
        // SAFETY: the plan's segments are those of the operation, whose buffer is held by the
        // engine's table until the answer below is taken.
        let result = unsafe { make(&file, &plan, call) };
        match plan.resume(&file, result) {
            Step::Call(next) => call = next,
            Step::Done(result) => break result,
        }
    };
    reply.put(Answer { key, plan, result });
}

/// Makes one call and waits for its end.
///
/// # Safety
/// The memory that the plan's segments point to must stay valid until this returns.
unsafe fn make(open: &OpenFile, plan: &Plan, call: Call) -> io::Result<usize> {
    let file = &open.file;
    match call {
        // SAFETY: by this function's contract; a buffer's bytes are never borrowed.
        Call::Read { at } => unsafe { sys::read_at(file, plan.segments(), at) },
        // SAFETY: by this function's contract.
        Call::Write { at } => unsafe { sys::write_at(file, plan.segments(), at) },
        Call::Allocate { mode, at, len } => sys::fallocate(file, mode, at, len).map(|()| 0),
        Call::Discard { at, len } => sys::discard_blocks(file, at, len).map(|()| 0),
        Call::Truncate { len } => file.set_len(len).map(|()| 0),
        Call::Sync => file.sync_data().map(|()| 0),
    }
}

/// Where an engine finds the answers to its jobs.
pub(super) struct Mailbox {
    answers: Mutex<Vec<Answer>>,
    /// Readable exactly while there are answers: it is written and read under the lock.
    event: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Self { answers: Mutex::new(Vec::new()), event }))
    }

    fn put(&self, answer: Answer) {
        let mut answers = lock(&self.answers);
        answers.push(answer);
        if answers.len() == 1 {
            self.event.write(1).expect("a counter that is zero takes a one");
        }
    }

    /// Moves all answers to the end of `into`.
    pub(super) fn take(&self, into: &mut Vec<Answer>) {
        let mut answers = lock(&self.answers);
        if !answers.is_empty() {
            into.append(&mut answers);
            self.event.read().expect("a counter that was written");
        }
    }

    /// Readable while there are answers.
    pub(super) fn pollable(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

/// A bounded set of threads, started when there is work for them.
pub(super) struct Pool(Arc<Shared>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads)", lock(&self.0.queue).threads.len())
    }
}

impl Pool {
    /// A pool without threads.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Arc::default()))
    }

    /// Takes all of `jobs`.
    ///
    /// # Errors
    /// When there is no thread and none can be started; the jobs stay where they are.
    pub(super) fn run(&self, jobs: &mut VecDeque<Job>) -> io::Result<()> {
        let mut queue = lock(&self.0.queue);
        let waiting = queue.jobs.len() + jobs.len();
        while queue.idle < waiting && queue.threads.len() < MOST_THREADS {
            match self.start() {
                Ok(thread) => queue.threads.push(thread),
                Err(error) if queue.threads.is_empty() => return Err(error),
                Err(_) => break,
            }
            queue.idle += 1;
        }
        let wake = jobs.len().min(queue.idle);
        queue.jobs.append(jobs);
        drop(queue);
        (0..wake).for_each(|_| self.0.work.notify_one());
        Ok(())
    }

    fn start(&self) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.0);
        thread::Builder::new().name("storage".to_owned()).spawn(move || shared.serve())
    }
}

impl Shared {
    /// A thread's life. It was counted as idle when it was started.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.idle -= 1;
                drop(queue);
                run(job);
                queue = lock(&self.queue);
                queue.idle += 1;
            } else if queue.closed {
                return;
            } else {
                queue = self.work.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut queue = lock(&self.0.queue);
            queue.closed = true;
            std::mem::take(&mut queue.threads)
        };
        self.0.work.notify_all();
        for thread in threads {
            // A thread that panicked has told so itself.
            let _ = thread.join();
        }
    }
}

/// An engine whose calls are made by the pool's threads.
pub struct Threads {
    lane: Lane,
    seen: Seen,
    prompt: Prompt,
    table: Rc<OpTable<Op>>,
    running: Cell<usize>,
    queue: RefCell<VecDeque<Job>>,
    mailbox: Arc<Mailbox>,
    answers: RefCell<Vec<Answer>>,
    spare: RefCell<Vec<Plan>>,
}

impl Threads {
    /// An engine over `files` for the worker of that lane.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(files: &Arc<Files>, lane: usize) -> io::Result<Self> {
        let seen = Seen::new(Arc::clone(files));
        Ok(Self {
            lane: Lane(lane),
            prompt: Prompt::new(&seen),
            seen,
            table: OpTable::new(),
            running: Cell::new(0),
            queue: RefCell::default(),
            mailbox: Mailbox::new()?,
            answers: RefCell::default(),
            spare: RefCell::default(),
        })
    }
}

impl Storage for Threads {
    fn limits(&self, file: FileId) -> Limits {
        self.seen.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.seen.length(file)
    }

    fn allocated(&self, file: FileId) -> io::Result<u64> {
        self.seen.allocated(file)
    }

    fn host_run(&self, file: FileId, at: HostOffset) -> io::Result<HostRun> {
        self.seen.host_run(file, at.0)
    }

    fn submit(&self, file: FileId, _why: Purpose, op: Op) -> Pending {
        if matches!(op, Op::Sync) && !self.seen.syncs() {
            return Pending::ready(Ok(()));
        }
        let file = self.seen.get(file);
        let mut plan = self.spare.borrow_mut().pop().unwrap_or_default();
        // SAFETY: `op` holds the memory of its buffer, whose bytes are never borrowed.
        match unsafe { self.prompt.begin(&file, &mut plan, &op) } {
            Step::Done(result) => {
                plan.settle(&op);
                self.spare.borrow_mut().push(plan);
                Pending::ready(result)
            }
            Step::Call(call) => {
                let (key, pending) = self.table.begin(op);
                self.running.set(self.running.get() + 1);
                let (file, reply) = (Arc::clone(&file), Arc::clone(&self.mailbox));
                self.queue.borrow_mut().push_back(Job { key, file, plan, call, reply });
                pending
            }
        }
    }

    fn lane(&self) -> Lane {
        self.lane
    }
}

impl Engine for Threads {
    fn reap(&self) -> usize {
        if self.running.get() == 0 {
            return 0;
        }
        let mut answers = self.answers.take();
        self.mailbox.take(&mut answers);
        let count = answers.len();
        for Answer { key, plan, result } in answers.drain(..) {
            self.table.with(key, |op| plan.settle(op));
            self.spare.borrow_mut().push(plan);
            self.running.set(self.running.get() - 1);
            drop(self.table.finish(key, result));
        }
        self.answers.replace(answers);
        count
    }

    fn submit_all(&self) -> io::Result<()> {
        self.prompt.may_wait();
        let mut queue = self.queue.borrow_mut();
        if queue.is_empty() { Ok(()) } else { self.seen.pool().run(&mut queue) }
    }

    fn is_busy(&self) -> bool {
        self.running.get() > 0
    }

    fn pollable(&self) -> RawFd {
        self.mailbox.pollable()
    }

    fn wait(&self) -> io::Result<()> {
        self.submit_all()?;
        while self.is_busy() && self.reap() == 0 {
            sys::wait_readable(&[self.pollable()])?;
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Whatever no thread can be found for is not under way, and is given up.
        let _ = self.submit_all();
        let queued = self.queue.take().len();
        while self.running.get() > queued {
            if self.reap() == 0 && sys::wait_readable(&[self.pollable()]).is_err() {
                thread::yield_now();
            }
        }
    }
}
