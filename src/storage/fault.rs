//! A decorator that makes chosen operations fail, for tests.
//!
//! A rule names an operation by its number, counted over all or over those of one [`Purpose`], and
//! says what becomes of it. A test first runs a workload without rules, reads how many operations
//! there were, and then runs it once for each of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::ops::{OpTable, Pending};
use super::{Engine, FileId, HostRun, Lane, Limits, Op, Purpose, Storage};
use crate::bytes::HostOffset;

/// What becomes of an operation that a rule names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It does nothing and fails with this error number, such as `EIO` (5) or `ENOSPC` (28).
    Fail(i32),
    /// A write puts only its first `bytes` bytes into the file and then fails; a zeroing likewise.
    /// Any other operation does nothing and fails.
    Short {
        /// How many bytes arrive.
        bytes: u64,
        /// The error number.
        errno: i32,
    },
    /// It takes effect, but its answer comes this many calls of [`Engine::reap`] late.
    Delay(u32),
}

/// Which operations meet which fate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Only operations of this purpose are counted; all of them when absent.
    pub purpose: Option<Purpose>,
    /// The number of the operation, from 1.
    pub nth: u64,
    /// Whether every later one is meant too.
    pub sticky: bool,
    /// What becomes of it.
    pub fate: Fate,
}

impl Rule {
    /// The `nth` operation of all fails once.
    pub fn fail(nth: u64, errno: i32) -> Self {
        Self { purpose: None, nth, sticky: false, fate: Fate::Fail(errno) }
    }
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    count: u64,
    by_purpose: BTreeMap<Purpose, u64>,
    fired: u64,
}

/// Rules and counters; clones are handles on the same ones, so that a test keeps one and several
/// engines can share them.
#[derive(Clone, Default)]
pub struct Faults(Rc<RefCell<State>>);

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.borrow();
        write!(f, "Faults({:?}, {} of {} operations)", state.rules, state.fired, state.count)
    }
}

impl Faults {
    /// No rules, and counters at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a rule; the first that matches an operation decides.
    pub fn add(&self, rule: Rule) {
        self.0.borrow_mut().rules.push(rule);
    }

    /// Removes all rules; the counters go on.
    pub fn clear(&self) {
        self.0.borrow_mut().rules.clear();
    }

    /// How many operations were submitted.
    pub fn count(&self) -> u64 {
        self.0.borrow().count
    }

    /// How many operations of one purpose were submitted.
    pub fn count_of(&self, purpose: Purpose) -> u64 {
        self.0.borrow().by_purpose.get(&purpose).copied().unwrap_or(0)
    }

    /// How many operations met a rule.
    pub fn fired(&self) -> u64 {
        self.0.borrow().fired
    }

    fn next(&self, why: Purpose) -> Option<Fate> {
        let state = &mut *self.0.borrow_mut();
        state.count += 1;
        let of_purpose = state.by_purpose.entry(why).or_default();
        *of_purpose += 1;
        let (count, of_purpose) = (state.count, *of_purpose);
        let hit = state.rules.iter().find(|rule| {
            let number = match rule.purpose {
                None => count,
                Some(purpose) if purpose == why => of_purpose,
                Some(_) => return false,
            };
            number == rule.nth || (rule.sticky && number > rule.nth)
        })?;
        state.fired += 1;
        Some(hit.fate)
    }
}

/// An operation that a rule changed: its answer is given by this engine.
struct Held {
    key: usize,
    /// What of it was given to the inner engine and has not been answered.
    inner: Option<Pending>,
    result: io::Result<()>,
    reaps: u32,
}

/// An engine whose operations fail by rule.
pub struct Fault<E: Engine> {
    inner: E,
    faults: Faults,
    table: Rc<OpTable<()>>,
    held: RefCell<Vec<Held>>,
}

impl<E: Engine> Fault<E> {
    /// Decorates `inner` with `faults`.
    pub fn new(inner: E, faults: Faults) -> Self {
        Self { inner, faults, table: OpTable::new(), held: RefCell::default() }
    }

    /// The engine behind.
    pub fn inner(&self) -> &E {
        &self.inner
    }

    fn hold(&self, inner: Option<Pending>, result: io::Result<()>, reaps: u32) -> Pending {
        let (key, pending) = self.table.begin(());
        self.held.borrow_mut().push(Held { key, inner, result, reaps });
        pending
    }

    /// Answers what is due; returns how many.
    fn release(&self) -> usize {
        let mut due = Vec::new();
        self.held.borrow_mut().retain_mut(|held| {
            let answer = match &mut held.inner {
                None => Poll::Ready(Ok(())),
                Some(inner) => Pin::new(inner).poll(&mut Context::from_waker(Waker::noop())),
            };
            if let Poll::Ready(answer) = answer {
                held.inner = None;
                let result = std::mem::replace(&mut held.result, Ok(()));
                held.result = answer.and(result);
                if held.reaps == 0 {
                    due.push((held.key, std::mem::replace(&mut held.result, Ok(()))));
                    return false;
                }
                held.reaps -= 1;
            }
            true
        });
        let count = due.len();
        for (key, result) in due {
            self.table.finish(key, result);
        }
        count
    }
}

/// The part of `op` that a short operation carries out.
fn shortened(op: &Op, bytes: u64) -> Option<Op> {
    match op {
        Op::Write { at, buf } => {
            let len = usize::try_from(bytes).unwrap_or(usize::MAX).min(buf.len());
            (len > 0).then(|| Op::Write { at: *at, buf: buf.slice(0, len) })
        }
        Op::Zero { at, len, unmap } => {
            let len = bytes.min(*len);
            (len > 0).then_some(Op::Zero { at: *at, len, unmap: *unmap })
        }
        _ => None,
    }
}

impl<E: Engine> Storage for Fault<E> {
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
        match self.faults.next(why) {
            None => self.inner.submit(file, why, op),
            Some(Fate::Fail(errno)) => self.hold(None, Err(io::Error::from_raw_os_error(errno)), 0),
            Some(Fate::Short { bytes, errno }) => {
                let part = shortened(&op, bytes).map(|part| self.inner.submit(file, why, part));
                self.hold(part, Err(io::Error::from_raw_os_error(errno)), 0)
            }
            Some(Fate::Delay(reaps)) => {
                let whole = self.inner.submit(file, why, op);
                self.hold(Some(whole), Ok(()), reaps)
            }
        }
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl<E: Engine> Engine for Fault<E> {
    fn reap(&self) -> usize {
        self.inner.reap() + self.release()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.inner.submit_all()
    }

    fn submit_and_rest(&self) -> io::Result<()> {
        self.inner.submit_and_rest()
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy() || !self.held.borrow().is_empty()
    }

    fn pollable(&self) -> RawFd {
        self.inner.pollable()
    }

    fn wait(&self) -> io::Result<()> {
        while self.is_busy() {
            let inner = self.inner.is_busy();
            if inner {
                self.inner.wait()?;
            }
            if self.release() > 0 || inner {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::storage::mem::{MemDisk, MemEngine};
    use crate::storage::{Buf, block_on};

    fn setup() -> (MemDisk, FileId, Faults, Fault<MemEngine>) {
        let disk = MemDisk::new();
        let file = disk.add("disk", vec![0; 4096]);
        let faults = Faults::new();
        let engine = Fault::new(disk.engine(0, 1), faults.clone());
        (disk, file, faults, engine)
    }

    fn write(engine: &dyn Engine, file: FileId, why: Purpose) -> io::Result<()> {
        let op = Op::Write { at: HostOffset(0), buf: Buf::copy_of(&[7; 1024]) };
        block_on(engine, engine.submit(file, why, op))
    }

    #[test]
    fn the_nth_of_a_purpose_fails_once_or_from_then_on() {
        let (disk, file, faults, engine) = setup();
        let rule = Rule { purpose: Some(Purpose::L2Write), ..Rule::fail(2, 28) };
        faults.add(rule);
        write(&engine, file, Purpose::L2Write).expect("the first");
        write(&engine, file, Purpose::GuestWrite).expect("another purpose");
        disk.add("other", Vec::new());
        let error = write(&engine, file, Purpose::L2Write).expect_err("the second");
        assert_eq!(error.raw_os_error(), Some(28));
        write(&engine, file, Purpose::L2Write).expect("the third");
        assert_eq!((faults.count(), faults.count_of(Purpose::L2Write), faults.fired()), (4, 3, 1));
        faults.clear();
        faults.add(Rule { sticky: true, ..Rule::fail(1, 5) });
        for _ in 0..3 {
            write(&engine, file, Purpose::SyncData).expect_err("every later one");
        }
        assert_eq!(faults.fired(), 4);
    }

    #[test]
    fn a_failed_write_changes_nothing_and_a_short_one_its_beginning() {
        let (disk, file, faults, engine) = setup();
        faults.add(Rule::fail(1, 5));
        faults.add(Rule { fate: Fate::Short { bytes: 10, errno: 28 }, ..Rule::fail(2, 28) });
        write(&engine, file, Purpose::GuestWrite).expect_err("fails");
        assert_eq!(disk.content(file), [0; 4096]);
        write(&engine, file, Purpose::GuestWrite).expect_err("short");
        assert_eq!(&disk.content(file)[..11], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
    }

    #[test]
    fn a_delayed_answer_comes_after_the_effect() {
        let (disk, file, faults, engine) = setup();
        faults.add(Rule { fate: Fate::Delay(2), ..Rule::fail(1, 0) });
        let op = Op::Write { at: HostOffset(0), buf: Buf::copy_of(&[7; 16]) };
        let mut answer = engine.submit(file, Purpose::GuestWrite, op);
        let mut poll = || Pin::new(&mut answer).poll(&mut Context::from_waker(Waker::noop()));
        for _ in 0..2 {
            engine.reap();
            assert_eq!(disk.content(file)[0], 7);
            assert!(poll().is_pending() && engine.is_busy());
        }
        engine.reap();
        assert!(matches!(poll(), Poll::Ready(Ok(()))) && !engine.is_busy());
    }
}
