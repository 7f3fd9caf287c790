//! A way to a simulated disk that sees where a guest's data goes and how much is asked for.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use vhost_user_qcow2::storage::fault::{Fault, Faults};
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};
use vhost_user_qcow2::storage::{Engine, FileId, Lane, Limits, Op, Pending, Purpose, Storage};

use crate::places::Head;

/// The longest file in bytes. The host has no more room, so that a file which an image pretends to
/// have does not take the simulation's memory.
pub(crate) const ROOM: u64 = 1 << 20;
/// A file that no image may refer to.
pub(crate) const SECRET: FileId = FileId(1);
/// Most rounds in which futures wait for each other alone.
const MOST_IDLE: u32 = 16;
/// ENOSPC.
const NO_SPACE: i32 = 28;

/// An engine whose operations are looked at.
pub(crate) struct Watch {
    inner: Fault<MemEngine>,
    faults: Faults,
    disk: MemDisk,
    image: &'static str,
    operations: Cell<u64>,
}

impl Watch {
    /// Watches what is done to the first file of `disk`, whose name is `image`.
    pub(crate) fn new(
        disk: &MemDisk,
        image: &'static str,
        engine: MemEngine,
        faults: Faults,
    ) -> Self {
        let inner = Fault::new(engine, faults.clone());
        Self { inner, faults, disk: disk.clone(), image, operations: Cell::new(0) }
    }

    /// The faults that the disk has.
    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }

    /// How many operations there were since this was last asked.
    pub(crate) fn take_operations(&self) -> u64 {
        self.operations.take()
    }

    /// A guest must not write where metadata is, whatever the image says.
    fn look(&self, file: FileId, why: Purpose, op: &Op) {
        let (at, len) = match op {
            Op::Write { at, buf } => (at.0, buf.len() as u64),
            Op::Zero { at, len, .. } | Op::Discard { at, len } => (at.0, *len),
            _ => return,
        };
        let guests =
            matches!(why, Purpose::GuestWrite | Purpose::GuestZero | Purpose::GuestDiscard);
        if file != FileId(0) || !guests {
            return;
        }
        let end = at.saturating_add(len);
        let metadata = self.disk.look(self.image, |bytes| {
            let head = Head::read(bytes)?;
            let hit = |range: &std::ops::Range<u64>| range.start < end && at < range.end;
            head.metadata(bytes).into_iter().find(hit)
        });
        if let Some(range) = metadata.flatten() {
            panic!("{why:?} of {len} bytes at {at:#x} goes over metadata at {range:x?}");
        }
    }
}

fn is_too_far(op: &Op) -> bool {
    let end = match op {
        Op::Write { at, buf } => at.0.saturating_add(buf.len() as u64),
        Op::Zero { at, len, .. } => at.0.saturating_add(*len),
        Op::Resize { len } => *len,
        _ => 0,
    };
    end > ROOM
}

impl Storage for Watch {
    fn limits(&self, file: FileId) -> Limits {
        self.inner.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.inner.length(file)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        self.operations.set(self.operations.get() + 1);
        assert_ne!(file, SECRET, "a file outside of the image's directory is used");
        self.look(file, why, &op);
        if is_too_far(&op) {
            return Pending::ready(Err(io::Error::from_raw_os_error(NO_SPACE)));
        }
        self.inner.submit(file, why, op)
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl Engine for Watch {
    fn reap(&self) -> usize {
        self.inner.reap()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.inner.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy()
    }

    fn pollable(&self) -> RawFd {
        self.inner.pollable()
    }

    fn wait(&self) -> io::Result<()> {
        self.inner.wait()
    }
}

/// Runs a future to its end; a future that waits for nothing is a hang.
pub(crate) fn drive<T>(engine: &Watch, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    // One of several may wait for what another has let go of in the same round.
    let mut idle = 0;
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        idle = if engine.is_busy() { 0 } else { idle + 1 };
        assert!(idle < MOST_IDLE, "a request waits, and nothing is under way");
        engine.wait().expect("a simulated disk");
    }
}
