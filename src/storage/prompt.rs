#![expect(unsafe_code, reason = "buffers' addresses go to system calls")]
//! Calls that need not wait for the disk are made at once, on the worker's own thread.
//!
//! With the page cache most reads and writes copy memory and nothing else. Handing such a call to
//! the ring or to a thread, and taking its answer later, costs more than the call itself; file
//! systems that cannot promise not to block (ext4 for buffered writes) make io_uring give every
//! write to a thread.
//!
//! A read is tried with RWF_NOWAIT, which fails instead of waiting. There is no such promise for
//! writes, so they are watched: a host that is short of memory or busy with its disk makes writers
//! wait, and then one write takes long. But so does one that loses the processor to others, as
//! happens now and then on every shared machine. So a slow write only makes those of the next
//! second be asked whether they have waited; work that the kernel does for want of memory is not
//! seen. After one that was slow because it waited, writes go the other way for a multiple of the
//! time that was lost, so that a worker is held up for a small part of its time. Only whole pages
//! are written at once: for a part of one the rest may have to be read first.
//!
//! A sync always waits for the disk. But a worker that could only sleep until it is over may as
//! well make it itself: nobody is woken to make it, and nobody to take its answer, which on a quick
//! disk takes longer than the sync. What comes meanwhile waits for it, so it is done only while
//! syncs are quick; so are the starts of [`early`](super::early).

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use super::files::{Lack, OpenFile, Seen};
use super::plan::{Call, Plan, Step};
use super::{Op, sys};

/// The unit of the page cache in bytes.
const PAGE: u64 = 4096;
/// The most bytes written at once; more would keep a worker's other requests waiting.
const MOST_WRITTEN: u64 = 1 << 20;
/// A write that takes longer than this may have waited for something.
const SLOW: Duration = Duration::from_micros(500);
/// A sync that takes longer than this makes others go the other way for a while: on a disk that is
/// slower, handing a sync to a thread and taking its answer is a small part of it.
const SLOW_SYNC: Duration = Duration::from_millis(1);
/// How long after a slow write others are asked whether they have waited. A host that slows its
/// writers down lets one wait after some hundred others.
const WATCHED: Duration = Duration::from_secs(1);
/// For how many times the length of a slow write others are not made at once.
const REST: u32 = 20;
/// The longest such rest: a host that was busy may not be so any more.
const LONGEST_REST: Duration = Duration::from_secs(1);
/// After so many reads in a row that were not cached, most are not tried any more.
const MISSES: u32 = 8;
/// Then every so manieth is.
const PROBE: u32 = 16;

/// What one engine has seen of the host's promptness.
pub(super) struct Prompt {
    enabled: bool,
    /// Reads in a row that were not cached.
    misses: Cell<u32>,
    /// Until when writes are asked whether they have waited.
    watched: Cell<Option<Instant>>,
    /// How often this thread has waited, if that was counted since it last had a reason to.
    waits: Cell<Option<i64>>,
    /// Until when writes go the other way.
    resting: Cell<Option<Instant>>,
    /// Until when syncs do.
    syncs_rest: Cell<Option<Instant>>,
}

impl Prompt {
    /// For the engine over these files.
    pub(super) fn new(seen: &Seen) -> Self {
        Self {
            enabled: seen.is_prompt(),
            misses: Cell::new(0),
            watched: Cell::new(None),
            waits: Cell::new(None),
            resting: Cell::new(None),
            syncs_rest: Cell::new(None),
        }
    }

    /// Starts `plan` for `op` and makes its calls as far as they need not wait; says what is left.
    ///
    /// # Safety
    /// No Rust reference may cover the memory of the operation's buffer.
    pub(super) unsafe fn begin(&self, open: &OpenFile, plan: &mut Plan, op: &Op) -> Step {
        let mut step = plan.start(open, op);
        while let Step::Call(call) = step {
            // SAFETY: the plan's segments are those of the buffer, which `op` holds.
            let Some(result) = (unsafe { self.attempt(open, plan, call) }) else { break };
            step = plan.resume(open, result);
        }
        step
    }

    /// Makes `call` if that need not wait; `None` when it must go another way.
    ///
    /// # Safety
    /// The memory of the plan's segments must stay valid until this returns, and no Rust reference
    /// may cover that of a read.
    unsafe fn attempt(
        &self,
        open: &OpenFile,
        plan: &Plan,
        call: Call,
    ) -> Option<io::Result<usize>> {
        if !self.enabled {
            return None;
        }
        match call {
            Call::Read { at } if self.tries_reads() && !open.lacks(Lack::ReadCached) => {
                // SAFETY: by this function's contract.
                let result = unsafe { sys::read_cached_at(&open.file, plan.segments(), at) };
                self.judge_read(open, result)
            }
            Call::Write { at } if self.tries_write(at, plan) => {
                // SAFETY: by this function's contract.
                let write = || unsafe { sys::write_at(&open.file, plan.segments(), at) };
                Some(self.watch(write))
            }
            Call::Allocate { mode: mode @ libc::FALLOC_FL_KEEP_SIZE, at, len } if !self.rests() => {
                Some(self.watch(|| sys::fallocate(&open.file, mode, at, len).map(|()| 0)))
            }
            _ => None,
        }
    }

    /// Whether a sync may be made at once by a worker that has nothing else to do.
    pub(super) fn tries_sync(&self) -> bool {
        self.enabled && !is_before(&self.syncs_rest)
    }

    /// Makes a sync at once and draws conclusions from its time.
    ///
    /// # Errors
    /// What the kernel answered.
    pub(super) fn sync(&self, open: &OpenFile) -> io::Result<()> {
        let start = Instant::now();
        let result = open.file.sync_data();
        self.judge_sync(start, start.elapsed());
        result
    }

    /// Has the kernel begin with what a sync is expected to write, without waiting for any of it.
    pub(super) fn start_write_back(&self, open: &OpenFile) {
        if !self.tries_sync() {
            return;
        }
        open.early.start(|| {
            let start = Instant::now();
            let result = sys::start_write_back(&open.file);
            self.judge_sync(start, start.elapsed());
            result
        });
    }

    fn judge_sync(&self, start: Instant, took: Duration) {
        if took > SLOW_SYNC {
            self.syncs_rest.set(Some(start + took + took * REST));
        }
    }

    fn tries_reads(&self) -> bool {
        let misses = self.misses.get();
        if misses < MISSES {
            return true;
        }
        self.misses.set(if misses == MISSES + PROBE { MISSES } else { misses + 1 });
        misses == MISSES + PROBE
    }

    fn judge_read(&self, open: &OpenFile, result: io::Result<usize>) -> Option<io::Result<usize>> {
        match result.as_ref().map_err(io::Error::raw_os_error) {
            Err(Some(libc::EAGAIN)) => {
                self.misses.set((self.misses.get() + 1).min(MISSES));
                return None;
            }
            Err(Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                open.note_lack(Lack::ReadCached);
                return None;
            }
            _ => self.misses.set(0),
        }
        Some(result)
    }

    fn tries_write(&self, at: u64, plan: &Plan) -> bool {
        let len: u64 = plan.segments().iter().map(|segment| segment.iov_len as u64).sum();
        if !at.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || len > MOST_WRITTEN {
            return false;
        }
        !self.rests()
    }

    /// Whether what changes files goes the other way for now.
    fn rests(&self) -> bool {
        is_before(&self.resting)
    }

    /// Makes a call that changes a file and draws conclusions from its time.
    fn watch<T>(&self, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let watched = self.watched.get().is_some_and(|until| start < until);
        let before = watched.then(|| self.waits());
        let result = call();
        let took = start.elapsed();
        self.judge_write(start, took, before.map(|before| move || waits() > before));
        result
    }

    /// How often this thread has waited. Asking is a system call, so it is done once for all the
    /// writes of a turn: what has waited meanwhile, though it was quick, counts for a slow one.
    fn waits(&self) -> i64 {
        let count = self.waits.get().unwrap_or_else(waits);
        self.waits.set(Some(count));
        count
    }

    /// Says that this thread may wait for other things than its writes now.
    pub(super) fn may_wait(&self) {
        self.waits.set(None);
    }

    /// Draws conclusions from the time that a write took; `waited` says whether the processor was
    /// given away, if that was watched.
    fn judge_write(&self, start: Instant, took: Duration, waited: Option<impl FnOnce() -> bool>) {
        if took <= SLOW {
            return;
        }
        self.may_wait();
        self.watched.set(Some(start + took + WATCHED));
        if waited.is_some_and(|waited| waited()) {
            self.resting.set(Some(start + took + (took * REST).min(LONGEST_REST)));
        }
    }
}

/// Whether the moment is still to come; one that is past is forgotten.
fn is_before(until: &Cell<Option<Instant>>) -> bool {
    let Some(moment) = until.get() else { return false };
    let before = Instant::now() < moment;
    if !before {
        until.set(None);
    }
    before
}

/// How often this thread has had to wait.
fn waits() -> i64 {
    sys::switches().waited
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::storage::files::{Files, Options};
    use crate::storage::{Buf, FileId, FileSource, OpenMode};

    fn setup(options: Options) -> (tempfile::NamedTempFile, Seen) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [7; 4 * PAGE as usize]).expect("write");
        let files = Files::new(options);
        let mode = OpenMode { read_only: false, backing: false };
        files.open(file.path(), mode).expect("open");
        (file, Seen::new(files))
    }

    /// Whether `op` is carried out at once.
    fn is_done(prompt: &Prompt, seen: &Seen, op: &Op) -> bool {
        let open = seen.get(FileId(0));
        let mut plan = Plan::default();
        let Step::Call(call) = plan.start(&open, op) else { panic!("nothing to do") };
        // SAFETY: `op` owns the memory.
        unsafe { prompt.attempt(&open, &plan, call) }.is_some()
    }

    fn write(at: u64, len: usize) -> Op {
        Op::Write { at: HostOffset(at), buf: Buf::copy_of(&vec![1; len]) }
    }

    #[test]
    fn whole_pages_are_written_and_cached_ones_read() {
        let (file, seen) = setup(Options::default());
        let prompt = Prompt::new(&seen);
        let buf = Buf::zeroed(100);
        assert!(is_done(&prompt, &seen, &Op::Read { at: HostOffset(50), buf: buf.clone() }));
        assert_eq!(buf.to_vec(), [7; 100]);
        for (at, len, prompted) in
            [(0, 4096, true), (8192, 8192, true), (0, 512, false), (512, 4096, false)]
        {
            assert_eq!(is_done(&prompt, &seen, &write(at, len)), prompted, "{len} at {at}");
        }
        let written = std::fs::read(file.path()).expect("read");
        let expected = [1, 7, 1, 1].map(|byte| [byte; PAGE as usize]).concat();
        assert_eq!(written, expected);
        assert!(!is_done(&prompt, &seen, &Op::Sync), "it waits for the disk");
    }

    #[test]
    fn direct_io_and_those_who_want_none_of_it_wait() {
        for options in [
            Options { prompt: false, ..Options::default() },
            Options { direct: true, ..Options::default() },
        ] {
            let (_file, seen) = setup(options);
            let prompt = Prompt::new(&seen);
            assert!(!is_done(&prompt, &seen, &write(0, 4096)));
            let op = Op::Read { at: HostOffset(0), buf: Buf::zeroed(4096) };
            assert!(!is_done(&prompt, &seen, &op));
        }
    }

    #[test]
    fn after_a_write_that_waited_others_go_the_other_way_for_a_while() {
        let (_file, seen) = setup(Options::default());
        let prompt = Prompt::new(&seen);
        let now = Instant::now();
        prompt.judge_write(now, SLOW, Some(|| true));
        assert!(is_done(&prompt, &seen, &write(0, 4096)), "that was not slow");
        prompt.judge_write(now, Duration::from_millis(30), Some(|| true));
        assert!(!is_done(&prompt, &seen, &write(0, 4096)));
        let rest = prompt.resting.get().expect("a rest") - now;
        assert_eq!(rest, Duration::from_millis(630));
        prompt.judge_write(now, Duration::from_secs(9), Some(|| true));
        let rest = prompt.resting.get().expect("a rest") - now;
        assert_eq!(rest, Duration::from_secs(10), "no longer than a second after its end");
        prompt.resting.set(Some(now));
        assert!(is_done(&prompt, &seen, &write(0, 4096)), "the rest is over");
    }

    #[test]
    fn a_write_that_lost_the_processor_to_others_has_not_waited() {
        let (_file, seen) = setup(Options::default());
        let prompt = Prompt::new(&seen);
        let now = Instant::now();
        for waited in [None, Some(|| false)] {
            prompt.judge_write(now, Duration::from_millis(30), waited);
            assert_eq!(prompt.resting.get(), None);
        }
        let before = waits();
        std::thread::sleep(Duration::from_millis(1));
        assert!(waits() > before, "a thread that sleeps gives the processor away");
        // It is counted once for many writes, and anew after a sleep or a write that was slow.
        let counted = prompt.waits();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(prompt.waits(), counted);
        prompt.may_wait();
        assert!(prompt.waits() > counted);
        prompt.judge_write(now, Duration::from_millis(30), Some(|| false));
        assert_eq!(prompt.waits.get(), None);
    }

    #[test]
    fn a_host_that_lets_one_write_of_many_wait_is_noticed() {
        let (_file, seen) = setup(Options::default());
        let prompt = Prompt::new(&seen);
        let now = Instant::now();
        prompt.judge_write(now, Duration::from_millis(30), None::<fn() -> bool>);
        for _ in 0..1000 {
            prompt.judge_write(now, Duration::from_micros(3), Some(|| false));
        }
        assert_eq!(prompt.watched.get(), Some(now + Duration::from_millis(1030)), "no end of it");
        prompt.judge_write(now, Duration::from_millis(30), Some(|| true));
        assert!(prompt.resting.get().is_some());
    }

    #[test]
    fn on_a_slow_disk_a_worker_makes_few_syncs_itself() {
        let (_file, seen) = setup(Options::default());
        let prompt = Prompt::new(&seen);
        prompt.judge_sync(Instant::now(), SLOW_SYNC);
        assert!(prompt.tries_sync());
        let (mut now, mut held) = (Instant::now(), Duration::ZERO);
        let begin = now;
        for _ in 0..100 {
            let took = Duration::from_secs(3);
            prompt.judge_sync(now, took);
            assert!(!prompt.tries_sync());
            held += took;
            now = prompt.syncs_rest.take().expect("a rest");
        }
        assert!(held <= (now - begin) / 20, "{held:?} of {:?}", now - begin);
        let direct = Options { direct: true, ..Options::default() };
        assert!(!Prompt::new(&Seen::new(Files::new(direct))).tries_sync());
    }

    #[test]
    fn reads_that_are_not_cached_are_tried_now_and_then() {
        let (_file, seen) = setup(Options::default());
        let (prompt, open) = (Prompt::new(&seen), seen.get(FileId(0)));
        let miss = || Err(io::Error::from_raw_os_error(libc::EAGAIN));
        let mut tried = 0;
        for _ in 0..MISSES + 10 * (PROBE + 1) {
            if prompt.tries_reads() {
                tried += 1;
                assert!(prompt.judge_read(&open, miss()).is_none());
            }
        }
        assert_eq!(tried, MISSES + 10);
        prompt.misses.set(MISSES + PROBE);
        assert!(prompt.tries_reads());
        assert!(prompt.judge_read(&open, Ok(1)).is_some());
        assert!(prompt.tries_reads() && prompt.tries_reads(), "the cache is warm again");
        let lacking = Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        assert!(prompt.judge_read(&open, lacking).is_none());
        let op = Op::Read { at: HostOffset(0), buf: Buf::zeroed(4096) };
        drop(open);
        assert!(!is_done(&prompt, &seen, &op), "the file system cannot tell");
    }
}
