//! An operation as a series of system calls, whoever makes them.
//!
//! Both engines of the host walk the same plan: ask for the next call, make it, tell its result.
//! Here short transfers are resumed, the end of a file is turned into zeros, and a file that cannot
//! zero or discard a range gets the next best thing.

use std::io;

use super::files::{Lack, OpenFile};
use super::{Buf, Op};

/// The most segments that the kernel takes in one call.
const MAX_SEGMENTS: usize = 1024;

/// How many bytes of zeros are written in one call where a range cannot be zeroed otherwise.
const ZERO_CHUNK: u64 = 1 << 20;

#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);

/// What writes of zeros point to, again and again.
static ZEROS: Zeros = Zeros([0; 64 << 10]);

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// One system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Read from `at` into [`Plan::segments`].
    Read { at: u64 },
    /// Write [`Plan::segments`] from `at` on.
    Write { at: u64 },
    /// `fallocate`.
    Allocate { mode: i32, at: u64, len: u64 },
    /// Discard blocks of a block device.
    Discard { at: u64, len: u64 },
    /// Set the file's length.
    Truncate { len: u64 },
    /// Make data durable, and what is needed to read it.
    Sync,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Make this call and tell its result to [`Plan::resume`].
    Call(Call),
    /// The operation has ended.
    Done(io::Result<()>),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Read,
    Write,
    /// Writing zeros where nothing better works, or at the new end of the file.
    WriteZeros,
    Punch,
    ZeroRange,
    Hole,
    Discard,
    Reserve,
    Truncate,
    Sync,
}

/// How far an operation has come. Holds addresses but not their memory: the operation does.
///
/// Plans are used again, so that a steady load allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Plan {
    stage: Stage,
    /// The next byte in the file, and how many are left; in bytes.
    at: u64,
    left: u64,
    segments: Vec<libc::iovec>,
    first: usize,
    /// How many bytes at the end of a read lie past the end of the file.
    missing: usize,
}

impl Plan {
    /// Starts `op` and says what to do first.
    pub(super) fn start(&mut self, file: &OpenFile, op: &Op) -> Step {
        self.missing = 0;
        self.segments.clear();
        self.first = 0;
        (self.at, self.left, self.stage) = match *op {
            Op::Read { at, ref buf } => (at.0, self.take(buf), Stage::Read),
            Op::Write { at, ref buf } => (at.0, self.take(buf), Stage::Write),
            Op::Zero { at, len, unmap } => (at.0, len, Self::zero_stage(file, unmap)),
            Op::Discard { at, len } if file.is_block_device() => {
                let (at, len) = blocks_within(at.0, len, u64::from(file.block_size));
                (at, len, Stage::Discard)
            }
            Op::Discard { at, len } => (at.0, len, Stage::Hole),
            Op::Reserve { at, len } => (at.0, len, Stage::Reserve),
            Op::Resize { len } => {
                file.note_resize(len, false);
                (0, len, Stage::Truncate)
            }
            Op::Sync => {
                file.early.sync_begins();
                (0, 0, Stage::Sync)
            }
        };
        let nothing = self.left == 0 && !matches!(self.stage, Stage::Truncate | Stage::Sync);
        if self.at.checked_add(self.left).is_none_or(|end| i64::try_from(end).is_err()) {
            return Step::Done(Err(io::Error::from_raw_os_error(libc::EFBIG)));
        }
        if nothing || self.is_useless(file) { Step::Done(Ok(())) } else { self.call(file) }
    }

    /// Takes the result of the last call: how many bytes, or 0 for a call that transfers none.
    pub(super) fn resume(&mut self, file: &OpenFile, result: io::Result<usize>) -> Step {
        let step = match result {
            Ok(count) => self.advance(file, count),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                self.call(file)
            }
            Err(error) => self.fall_back(file, error),
        };
        match step {
            Step::Done(result) if self.stage == Stage::Sync => {
                Step::Done(file.early.sync_ended(result))
            }
            step => step,
        }
    }

    /// Finishes what only the owner of the buffer can do.
    pub(super) fn settle(&self, op: &Op) {
        if let Op::Read { buf, .. } = op {
            buf.fill_zero(buf.len() - self.missing, self.missing);
        }
    }

    /// The memory of the call in hand.
    pub(super) fn segments(&self) -> &[libc::iovec] {
        let end = self.segments.len().min(self.first + MAX_SEGMENTS);
        &self.segments[self.first..end]
    }

    fn take(&mut self, buf: &Buf) -> u64 {
        let segment = |part: &super::buf::Segment| libc::iovec {
            iov_base: part.address().cast(),
            iov_len: part.len(),
        };
        self.segments.extend(buf.segments().iter().map(segment));
        buf.len() as u64
    }

    fn zero_stage(file: &OpenFile, unmap: bool) -> Stage {
        if unmap && !file.lacks(Lack::Punch) {
            Stage::Punch
        } else if !file.lacks(Lack::ZeroRange) {
            Stage::ZeroRange
        } else {
            Stage::WriteZeros
        }
    }

    fn is_useless(&self, file: &OpenFile) -> bool {
        match self.stage {
            Stage::Hole => file.lacks(Lack::Punch),
            Stage::Discard => file.lacks(Lack::Discard),
            Stage::Reserve => file.is_block_device() || file.lacks(Lack::Reserve),
            _ => false,
        }
    }

    fn call(&mut self, file: &OpenFile) -> Step {
        let (at, len) = (self.at, self.left);
        Step::Call(match self.stage {
            Stage::Read => Call::Read { at },
            Stage::Write => Call::Write { at },
            Stage::WriteZeros => {
                self.point_at_zeros();
                Call::Write { at }
            }
            Stage::Punch | Stage::Hole => Call::Allocate { mode: PUNCH, at, len },
            Stage::ZeroRange => {
                let keep = if file.is_block_device() { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                Call::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE | keep, at, len }
            }
            Stage::Discard => Call::Discard { at, len },
            Stage::Reserve => Call::Allocate { mode: libc::FALLOC_FL_KEEP_SIZE, at, len },
            Stage::Truncate => Call::Truncate { len },
            Stage::Sync => Call::Sync,
        })
    }

    fn point_at_zeros(&mut self) {
        self.segments.clear();
        self.first = 0;
        let mut left = self.left.min(ZERO_CHUNK);
        while left > 0 {
            let len = left.min(ZEROS.0.len() as u64);
            let iov_len = usize::try_from(len).expect("a chunk fits in memory");
            // The kernel only reads what is written to a file.
            let iov_base = ZEROS.0.as_ptr().cast_mut().cast();
            self.segments.push(libc::iovec { iov_base, iov_len });
            left -= len;
        }
    }

    fn advance(&mut self, file: &OpenFile, count: usize) -> Step {
        match self.stage {
            Stage::Read if count == 0 => return self.end_of_file(),
            Stage::Write | Stage::WriteZeros if count == 0 => {
                return Step::Done(Err(io::Error::from_raw_os_error(libc::EIO)));
            }
            Stage::Read | Stage::Write | Stage::WriteZeros => {}
            Stage::Punch => return self.grow(file),
            Stage::ZeroRange => {
                file.note_reach(self.at + self.left);
                return Step::Done(Ok(()));
            }
            Stage::Truncate => {
                file.note_resize(self.left, true);
                return Step::Done(Ok(()));
            }
            Stage::Hole | Stage::Discard | Stage::Reserve | Stage::Sync => {
                return Step::Done(Ok(()));
            }
        }
        self.at += count as u64;
        self.left -= count as u64;
        if self.stage != Stage::Read {
            file.early.wrote(count as u64);
        }
        if self.left > 0 {
            // Direct I/O stops in the middle of a block only at the end of the file, and a call
            // from there on would be refused.
            let block = u64::from(file.limits.request_alignment);
            if self.stage == Stage::Read && !self.at.is_multiple_of(block) {
                return self.end_of_file();
            }
            self.skip(count);
            return self.call(file);
        }
        if self.stage != Stage::Read {
            file.note_reach(self.at);
        }
        Step::Done(Ok(()))
    }

    fn skip(&mut self, mut count: usize) {
        while count > 0 {
            let segment = &mut self.segments[self.first];
            if count < segment.iov_len {
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(count).cast();
                segment.iov_len -= count;
                return;
            }
            count -= segment.iov_len;
            self.first += 1;
        }
    }

    fn end_of_file(&mut self) -> Step {
        self.missing = usize::try_from(self.left).expect("a buffer fits in memory");
        Step::Done(Ok(()))
    }

    /// A hole does not make a file longer, so zeros are written at its new end. They lie inside the
    /// range to be zeroed: unlike a change of the file's length, that can undo nobody's work.
    fn grow(&mut self, file: &OpenFile) -> Step {
        let end = self.at + self.left;
        if file.reaches(end) {
            return Step::Done(Ok(()));
        }
        self.left = self.left.min(u64::from(file.limits.request_alignment));
        self.at = end - self.left;
        self.stage = Stage::WriteZeros;
        self.call(file)
    }

    fn fall_back(&mut self, file: &OpenFile, error: io::Error) -> Step {
        let lack = match self.stage {
            Stage::Punch | Stage::Hole => Lack::Punch,
            Stage::ZeroRange => Lack::ZeroRange,
            Stage::Discard => Lack::Discard,
            Stage::Reserve => Lack::Reserve,
            _ => return Step::Done(Err(error)),
        };
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV) => {
                file.note_lack(lack);
            }
            // Some hosts refuse some ranges or moments only.
            Some(libc::EINVAL | libc::EBUSY) => {}
            _ => return Step::Done(Err(error)),
        }
        self.stage = match self.stage {
            Stage::Punch if !file.lacks(Lack::ZeroRange) => Stage::ZeroRange,
            Stage::Punch | Stage::ZeroRange => Stage::WriteZeros,
            // Giving space back is a wish.
            _ => return Step::Done(Ok(())),
        };
        self.call(file)
    }
}

/// The whole blocks inside a range.
fn blocks_within(at: u64, len: u64, block: u64) -> (u64, u64) {
    let start = at.saturating_add(block - 1) / block * block;
    let end = at.saturating_add(len) / block * block;
    (start, end.saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::storage::files::{Files, Options, Seen};
    use crate::storage::{FileId, FileSource, OpenMode};

    /// Answers the calls of a plan for `op` by `answer`, and returns them with the length in bytes
    /// of the memory of each and the plan's end.
    fn play(
        seen: &Seen,
        plan: &mut Plan,
        op: &Op,
        mut answer: impl FnMut(usize) -> Result<usize, i32>,
    ) -> (Vec<(Call, usize)>, io::Result<()>) {
        let file = seen.get(FileId(0));
        let mut calls = Vec::new();
        let mut step = plan.start(&file, op);
        loop {
            match step {
                Step::Done(result) => {
                    plan.settle(op);
                    return (calls, result);
                }
                Step::Call(call) => {
                    let len = plan.segments().iter().map(|segment| segment.iov_len).sum();
                    calls.push((call, len));
                    let result = answer(calls.len() - 1).map_err(io::Error::from_raw_os_error);
                    step = plan.resume(&file, result);
                }
            }
        }
    }

    fn setup() -> (tempfile::NamedTempFile, Seen) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let files = Files::new(Options::default());
        let mode = OpenMode { read_only: false, backing: false };
        files.open(file.path(), mode).expect("open");
        (file, Seen::new(files))
    }

    #[test]
    fn transfers_go_on_where_they_stopped() {
        let (_file, seen) = setup();
        let mut plan = Plan::default();
        let buf = Buf::concat((0..2000).map(|_| Buf::copy_of(&[1; 10])));
        let op = Op::Write { at: HostOffset(100), buf: buf.clone() };
        let answers = [Ok(15), Err(libc::EINTR), Err(libc::EAGAIN), Ok(10_240), Ok(9745)];
        let (calls, result) = play(&seen, &mut plan, &op, |call| answers[call]);
        result.expect("a write");
        let write = |at| Call::Write { at };
        let after = (write(115), 10_235);
        let last = (write(10_355), 9745);
        assert_eq!(calls[..2], [(write(100), 10_240), after]);
        assert_eq!(calls[2..4], [after, after]);
        assert_eq!(calls[4..], [last]);
        let op = Op::Read { at: HostOffset(0), buf: buf.clone() };
        let answers = [Ok(10_240), Ok(4), Ok(0)];
        let (calls, result) = play(&seen, &mut plan, &op, |call| answers[call]);
        result.expect("a read");
        assert_eq!(calls[2].0, Call::Read { at: 10_244 });
        assert_eq!(buf.to_vec(), [vec![1; 10_244], vec![0; 9756]].concat());
    }

    #[test]
    fn a_host_without_better_ways_gets_zeros_written_in_chunks() {
        let (_file, seen) = setup();
        let mut plan = Plan::default();
        let op = Op::Zero { at: HostOffset(7), len: ZERO_CHUNK + 9, unmap: true };
        let chunk = ZERO_CHUNK as usize;
        let answers = [Err(libc::EOPNOTSUPP), Err(libc::EOPNOTSUPP), Ok(chunk - 1), Ok(10)];
        let (calls, result) = play(&seen, &mut plan, &op, |call| answers[call]);
        result.expect("zeros");
        assert_eq!(calls[2], (Call::Write { at: 7 }, chunk));
        assert_eq!(calls[3], (Call::Write { at: 6 + ZERO_CHUNK }, 10));
        // It is remembered.
        let (calls, _) = play(&seen, &mut plan, &op, |_| Err(libc::ENOSPC));
        assert_eq!(calls, [(Call::Write { at: 7 }, chunk)]);
        let (_, result) = play(&seen, &mut plan, &op, |_| Err(libc::ENOSPC));
        assert_eq!(result.expect_err("a full disk").raw_os_error(), Some(libc::ENOSPC));
        // Giving space back was found not to work on the way.
        let op = Op::Discard { at: HostOffset(0), len: 4096 };
        let (calls, result) = play(&seen, &mut plan, &op, |_| Err(libc::EIO));
        assert!(calls.is_empty() && result.is_ok());
    }

    #[test]
    fn a_hole_at_the_end_is_followed_by_a_byte_that_makes_the_file_longer() {
        let (_file, seen) = setup();
        let mut plan = Plan::default();
        let op = Op::Zero { at: HostOffset(4096), len: 4096, unmap: true };
        let hole = Call::Allocate { mode: PUNCH, at: 4096, len: 4096 };
        let (calls, result) = play(&seen, &mut plan, &op, |call| Ok(call.min(1)));
        assert_eq!(calls, [(hole, 0), (Call::Write { at: 8191 }, 1)]);
        result.expect("zeros");
        let (calls, _) = play(&seen, &mut plan, &op, |_| Ok(0));
        assert_eq!(calls, [(hole, 0)], "the file is known to be long enough");
        let (_, result) = play(&seen, &mut plan, &Op::Resize { len: 5000 }, |_| Ok(0));
        result.expect("a resize");
        let (calls, _) = play(&seen, &mut plan, &op, |call| Ok(call.min(1)));
        assert_eq!(calls.len(), 2, "the file was cut meanwhile");
    }

    #[test]
    fn blocks_within_a_range_are_whole() {
        assert_eq!(blocks_within(1, 4095, 512), (512, 3584));
        assert_eq!(blocks_within(512, 512, 512), (512, 512));
        assert_eq!(blocks_within(1, 600, 512), (512, 0));
        assert_eq!(blocks_within(u64::MAX, u64::MAX, 512).1, 0);
    }
}
