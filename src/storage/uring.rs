#![expect(unsafe_code, reason = "the kernel works on addresses of buffers after a call returned")]
//! One io_uring for each worker.
//!
//! Submitting only writes to the ring; one call hands everything over. The kernel is asked not to
//! interrupt this thread for completions (COOP_TASKRUN): it posts them at the thread's next system
//! call, and sets a flag in the ring meanwhile, so that [`Engine::reap`] enters the kernel for them
//! only if the flag is set and the ring is empty. A thread asleep in epoll on the ring's descriptor
//! is woken; its call may end with EINTR, and then there are completions to take. A kernel that is
//! too old for this gets a plain ring, where the flag is never set.
//!
//! DEFER_TASKRUN, the stricter way, is not for us: the kernel then holds completions back until it
//! is entered for them, and does not wake a sleeper on the ring's descriptor when there are some.
//!
//! What the ring cannot do goes to the pool's threads; a poll of their mailbox, placed in the ring,
//! makes the ring's descriptor tell of their answers too.
//!
//! Files are named by descriptor. Registering them with the ring would save the kernel a reference
//! for each operation, but a ring is taken apart some time after its process has ended: until then
//! it would hold the files, and their locks would turn away the next process that opens them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::files::{Files, Seen};
use super::ops::{OpTable, Pending};
use super::plan::{Call, Plan, Step};
use super::prompt::Prompt;
use super::threads::{Answer, Job, Mailbox};
use super::{Engine, FileId, HostRun, Lane, Limits, Op, Purpose, Storage};
use crate::bytes::HostOffset;
use crate::sync::Arc;

/// How many operations are handed over in one call.
const SUBMISSIONS: u32 = 256;

/// How many operations the kernel has at most: the ring of completions can never overflow.
const COMPLETIONS: u32 = 1024;

/// The most bytes that the kernel transfers in one call.
const MOST_BYTES: usize = 0x7fff_f000;

/// What marks the completion of the mailbox's poll.
const MAILBOX: u64 = u64::MAX;

/// Finds out whether io_uring can be used here at all.
///
/// # Errors
/// Why not: the kernel is too old or built without it, or its use is forbidden to this process.
pub fn available() -> io::Result<()> {
    let mut ring = IoUring::new(2)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fallocate::CODE,
        opcode::Fsync::CODE,
        opcode::PollAdd::CODE,
    ];
    if !needed.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    // A filter of system calls may allow the set-up and forbid the use.
    // SAFETY: a no-operation refers to no memory.
    let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    pushed.expect("an empty ring has room");
    ring.submit_and_wait(1).map(drop)
}

fn make_ring() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(COMPLETIONS).dontfork();
    let mut quiet = builder.clone();
    quiet.setup_single_issuer().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    match quiet.build(SUBMISSIONS) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(SUBMISSIONS),
        made => made,
    }
}

/// An operation under way.
struct Running {
    file: FileId,
    op: Op,
    /// Absent while a thread of the pool has it.
    plan: Option<Plan>,
    call: Call,
}

/// The engine over one io_uring. Must be made on the thread that uses it.
pub struct Uring {
    lane: Lane,
    seen: Seen,
    prompt: Prompt,
    /// The file that was written last at once, until its writes could be started.
    wrote: Cell<Option<FileId>>,
    ring: RefCell<IoUring>,
    table: Rc<OpTable<Running>>,
    /// How many operations are in the table.
    running: Cell<usize>,
    /// How many entries the kernel has or will have with the next call.
    in_ring: Cell<usize>,
    /// Operations that found the ring full.
    backlog: RefCell<VecDeque<usize>>,
    /// Whether a poll of the mailbox is in the ring.
    polling: Cell<bool>,
    /// Syncs that may be made on this thread, if nothing else is under way.
    syncs: RefCell<Vec<usize>>,
    jobs: RefCell<VecDeque<Job>>,
    /// How many jobs threads have.
    with_threads: Cell<usize>,
    mailbox: Arc<Mailbox>,
    answers: RefCell<Vec<Answer>>,
    completions: RefCell<Vec<(u64, i32)>>,
    spare: RefCell<Vec<Plan>>,
}

impl Uring {
    /// An engine over `files` for the worker of that lane, which runs on this thread.
    ///
    /// # Errors
    /// When the kernel gives no ring.
    pub fn new(files: &Arc<Files>, lane: usize) -> io::Result<Self> {
        let seen = Seen::new(Arc::clone(files));
        Ok(Self {
            lane: Lane(lane),
            prompt: Prompt::new(&seen),
            wrote: Cell::new(None),
            seen,
            ring: RefCell::new(make_ring()?),
            table: OpTable::new(),
            running: Cell::new(0),
            in_ring: Cell::new(0),
            backlog: RefCell::default(),
            polling: Cell::new(false),
            syncs: RefCell::default(),
            jobs: RefCell::default(),
            with_threads: Cell::new(0),
            mailbox: Mailbox::new()?,
            answers: RefCell::default(),
            completions: RefCell::default(),
            spare: RefCell::default(),
        })
    }

    /// Brings an operation's next call on its way.
    fn dispatch(&self, key: usize) {
        let waiting = !self.backlog.borrow().is_empty();
        if waiting || !self.try_dispatch(key) {
            self.backlog.borrow_mut().push_back(key);
        }
    }

    /// As `dispatch`; false when the ring is full.
    fn try_dispatch(&self, key: usize) -> bool {
        let file = self.table.with(key, |running| running.file);
        let open = self.seen.get(file);
        let target = Fd(open.file.as_raw_fd());
        let entry = self.table.with(key, |running| {
            let plan = running.plan.as_ref().expect("the plan is here between calls");
            entry(target, plan, running.call)
        });
        if let Some(entry) = entry {
            return self.push(&entry.user_data(key as u64));
        }
        let (plan, call) = self.table.with(key, |running| (running.plan.take(), running.call));
        let plan = plan.expect("the plan is here between calls");
        let (file, reply) = (Arc::clone(&open), Arc::clone(&self.mailbox));
        self.jobs.borrow_mut().push_back(Job { key, file, plan, call, reply });
        true
    }

    fn push(&self, entry: &squeue::Entry) -> bool {
        if self.in_ring.get() >= COMPLETIONS as usize {
            return false;
        }
        // SAFETY: the entry refers to the segments of a plan and to the memory of a buffer, both
        // held by the table until the entry's completion was taken; a plan changes only then, and
        // the table outlives the ring's use of it (see `drop`). The poll refers to no memory.
        let pushed = unsafe { self.ring.borrow_mut().submission().push(entry).is_ok() };
        if pushed {
            self.in_ring.set(self.in_ring.get() + 1);
        }
        pushed
    }

    /// Places what waits for room into the ring.
    fn fill(&self) {
        if self.with_threads.get() > 0 && !self.polling.get() {
            let poll = opcode::PollAdd::new(Fd(self.mailbox.pollable()), POLL_IN);
            self.polling.set(self.push(&poll.build().user_data(MAILBOX)));
        }
        loop {
            let Some(&key) = self.backlog.borrow().front() else { return };
            if !self.try_dispatch(key) {
                return;
            }
            self.backlog.borrow_mut().pop_front();
        }
    }

    fn take_completions(&self) -> Vec<(u64, i32)> {
        let mut taken = self.completions.take();
        let mut ring = self.ring.borrow_mut();
        if ring.completion().is_empty() && ring.submission().taskrun() {
            // An error here comes again, and is told, when operations are handed over.
            let _ = ring.submit();
        }
        let both = |entry: cqueue::Entry| (entry.user_data(), entry.result());
        taken.extend(ring.completion().map(both));
        self.in_ring.set(self.in_ring.get() - taken.len());
        taken
    }

    /// Takes a call's result; returns whether the operation has ended.
    fn complete(&self, key: usize, result: i32) -> bool {
        let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let step = self.table.with(key, |running| {
            let plan = running.plan.as_mut().expect("the plan is here during a call");
            plan.resume(&self.seen.get(running.file), result)
        });
        match step {
            Step::Call(call) => {
                self.table.with(key, |running| running.call = call);
                self.dispatch(key);
                false
            }
            Step::Done(result) => {
                let plan = self.table.with(key, |running| running.plan.take());
                self.finish(key, plan.expect("the plan is here after a call"), result);
                true
            }
        }
    }

    /// Makes a sync on this thread, which would sleep meanwhile anyway.
    fn sync_here(&self, key: usize) {
        let file = self.table.with(key, |running| running.file);
        let open = Arc::clone(&self.seen.get(file));
        let result = self.prompt.sync(&open);
        let (plan, step) = self.table.with(key, |running| {
            let mut plan = running.plan.take().expect("the plan is here between calls");
            let step = plan.resume(&open, result.map(|()| 0));
            (plan, step)
        });
        match step {
            Step::Done(result) => self.finish(key, plan, result),
            Step::Call(call) => {
                // It was interrupted.
                self.table.with(key, |running| (running.plan, running.call) = (Some(plan), call));
                self.dispatch(key);
            }
        }
    }

    fn finish(&self, key: usize, plan: Plan, result: io::Result<()>) {
        self.table.with(key, |running| plan.settle(&running.op));
        self.spare.borrow_mut().push(plan);
        self.running.set(self.running.get() - 1);
        drop(self.table.finish(key, result));
    }

    fn take_answers(&self) -> usize {
        let mut answers = self.answers.take();
        self.mailbox.take(&mut answers);
        let count = answers.len();
        self.with_threads.set(self.with_threads.get() - count);
        for Answer { key, plan, result } in answers.drain(..) {
            self.finish(key, plan, result);
        }
        self.answers.replace(answers);
        count
    }
}

const POLL_IN: u32 = libc::POLLIN as u32;

/// The ring's entry for a call, if it has one. Changing a file's length came to io_uring late, and
/// is rare enough for a thread everywhere.
fn entry(target: Fd, plan: &Plan, call: Call) -> Option<squeue::Entry> {
    let segments = plan.segments();
    let count = segments.len() as u32;
    Some(match (call, segments) {
        (Call::Read { at }, [one]) => {
            let len = one.iov_len.min(MOST_BYTES) as u32;
            opcode::Read::new(target, one.iov_base.cast(), len).offset(at).build()
        }
        (Call::Write { at }, [one]) => {
            let len = one.iov_len.min(MOST_BYTES) as u32;
            opcode::Write::new(target, one.iov_base.cast(), len).offset(at).build()
        }
        (Call::Read { at }, _) => {
            opcode::Readv::new(target, segments.as_ptr(), count).offset(at).build()
        }
        (Call::Write { at }, _) => {
            opcode::Writev::new(target, segments.as_ptr(), count).offset(at).build()
        }
        (Call::Allocate { mode, at, len }, _) => {
            opcode::Fallocate::new(target, len).offset(at).mode(mode).build()
        }
        (Call::Sync, _) => opcode::Fsync::new(target).flags(FsyncFlags::DATASYNC).build(),
        (Call::Truncate { .. } | Call::Discard { .. }, _) => return None,
    })
}

impl Storage for Uring {
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
        let mut plan = self.spare.borrow_mut().pop().unwrap_or_default();
        // SAFETY: `op` holds the memory of its buffer, whose bytes are never borrowed.
        let step = unsafe { self.prompt.begin(&self.seen.get(file), &mut plan, &op) };
        match step {
            Step::Done(result) => {
                if matches!(op, Op::Write { .. }) {
                    self.wrote.set(Some(file));
                }
                plan.settle(&op);
                self.spare.borrow_mut().push(plan);
                Pending::ready(result)
            }
            Step::Call(call) => {
                let (key, pending) = self.table.begin(Running { file, op, plan: Some(plan), call });
                self.running.set(self.running.get() + 1);
                if call == Call::Sync && self.prompt.tries_sync() {
                    self.syncs.borrow_mut().push(key);
                } else {
                    self.dispatch(key);
                }
                pending
            }
        }
    }

    fn lane(&self) -> Lane {
        self.lane
    }
}

impl Engine for Uring {
    fn reap(&self) -> usize {
        if self.in_ring.get() == 0 {
            return 0;
        }
        let mut completions = self.take_completions();
        let mut ended = 0;
        for (data, result) in completions.drain(..) {
            if data == MAILBOX {
                self.polling.set(false);
                ended += self.take_answers();
            } else {
                let key = usize::try_from(data).expect("a key of the table");
                ended += usize::from(self.complete(key, result));
            }
        }
        self.completions.replace(completions);
        ended
    }

    fn submit_all(&self) -> io::Result<()> {
        self.prompt.may_wait();
        self.syncs.borrow_mut().drain(..).for_each(|key| self.dispatch(key));
        loop {
            self.fill();
            let jobs = self.jobs.borrow().len();
            if jobs > 0 {
                self.seen.pool().run(&mut self.jobs.borrow_mut())?;
                self.with_threads.set(self.with_threads.get() + jobs);
                continue;
            }
            let mut ring = self.ring.borrow_mut();
            if ring.submission().is_empty() {
                return Ok(());
            }
            match ring.submit() {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn submit_and_rest(&self) -> io::Result<()> {
        let alone = self.running.get() == 1;
        if let Some(key) = self.syncs.borrow_mut().pop_if(|_| alone) {
            self.sync_here(key);
        }
        if let Some(file) = self.wrote.take() {
            self.prompt.start_write_back(&self.seen.get(file));
        }
        self.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.running.get() > 0
    }

    fn pollable(&self) -> RawFd {
        self.ring.borrow().as_raw_fd()
    }

    fn wait(&self) -> io::Result<()> {
        loop {
            self.submit_and_rest()?;
            if !self.is_busy() || self.reap() > 0 {
                return Ok(());
            }
            // Whatever `reap` resumed goes along with this call.
            match self.ring.borrow().submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut failures = 0;
        while self.is_busy() {
            if let Err(error) = self.wait() {
                failures += 1;
                if failures == 100 {
                    // The kernel may still use the buffers: they must never be freed.
                    tracing::error!("operations never ended, their memory is given up: {error}");
                    mem::forget(Rc::clone(&self.table));
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Buf, FileSource, OpenMode, block_on};
    use super::*;
    use crate::storage::files::Options;

    /// An engine over a file of four pages, if the kernel has one for us.
    fn engine() -> Option<(tempfile::NamedTempFile, Uring, FileId)> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [7; 4 * 4096]).expect("write");
        let files = Files::new(Options::default());
        let mode = OpenMode { read_only: false, backing: false };
        let opened = files.open(file.path(), mode).expect("open");
        Some((file, available().and_then(|()| Uring::new(&files, 0)).ok()?, opened.id))
    }

    #[test]
    fn writes_before_an_expected_sync_are_started_when_there_is_nothing_else_to_do() {
        let Some((_path, engine, file)) = engine() else { return };
        let mut slow = 0;
        for _ in 0..100 {
            let write = Op::Write { at: HostOffset(0), buf: Buf::copy_of(&[1; 4096]) };
            block_on(&engine, engine.submit(file, Purpose::GuestWrite, write)).expect("write");
            slow += u32::from(!engine.prompt.tries_sync());
            engine.submit_and_rest().expect("submit");
            block_on(&engine, engine.submit(file, Purpose::SyncData, Op::Sync)).expect("sync");
        }
        let started = engine.seen.get(file).early.has_started();
        assert!(started || slow > 90, "never, though the disk was slow {slow} times only");
    }
}
