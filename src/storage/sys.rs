#![expect(unsafe_code, reason = "system calls that the standard library does not offer")]
//! Safe names for the few system calls that the standard library lacks.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `BLKDISCARD`, which libc does not name: number 119 of the block layer's calls, where
/// `BLKSSZGET` is 104, in whatever way the architecture encodes such numbers.
const BLOCK_DISCARD: libc::Ioctl = libc::BLKSSZGET + 15;

fn check(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn signed(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Makes calls on `file` block, and go around the page cache if `direct`. Where this process may
/// say so, as the file's owner may, reads do not touch the time of the last access: asking whether
/// it must be written takes a part of every cached read.
///
/// # Errors
/// `EINVAL` when the file system cannot do direct I/O.
pub(super) fn set_flags(file: &File, direct: bool) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument, and the descriptor is open as long as `file` lives.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    let wanted =
        (flags & !(libc::O_NONBLOCK | libc::O_DIRECT)) | if direct { libc::O_DIRECT } else { 0 };
    // SAFETY: F_SETFL takes one integer.
    let set =
        |flags: libc::c_int| check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) });
    match set(wanted | libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => set(wanted).map(drop),
        answer => answer.map(drop),
    }
}

/// A file of zeros in memory that can be passed to other processes and never changes its length: a
/// mapping of it cannot be cut off.
///
/// # Errors
/// When the host has no memory or no descriptors left.
pub fn memory_file(name: &std::ffi::CStr, len: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name ends with a zero byte and lives across the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    // SAFETY: the descriptor was made just now, and nobody else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes one integer.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// Whether `file` is open for reading alone.
///
/// # Errors
/// What the kernel answered.
pub(super) fn is_read_only(file: &File) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no argument, and the descriptor is open as long as `file` lives.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    Ok(flags & libc::O_ACCMODE == libc::O_RDONLY)
}

/// How often a thread was taken off its processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Switches {
    /// Because it had to wait for something.
    pub waited: i64,
    /// For another thread's sake. What a hypervisor does is not counted.
    pub preempted: i64,
}

/// How often this thread was taken off its processor so far.
pub fn switches() -> Switches {
    // SAFETY: all-zero bytes are a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: getrusage fills one `rusage`, which lives across the call.
    match check(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }) {
        Ok(_) => Switches { waited: usage.ru_nvcsw, preempted: usage.ru_nivcsw },
        Err(_) => Switches::default(),
    }
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid `flock`; OFD locks demand that `l_pid` is zero.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("a lock type is a small number");
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("a small number");
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

/// Takes a shared lock on one byte for this open file description; never waits.
///
/// # Errors
/// `EAGAIN` or `EACCES` when another holds it exclusively; `EINVAL`, `ENOLCK` or `EOPNOTSUPP` when
/// the kernel or the file system has no such locks.
pub(super) fn lock_byte_shared(file: &File, byte: i64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte);
    // SAFETY: F_OFD_SETLK reads one `flock`, which lives across the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// Whether somebody else holds any lock on one byte, and the process if the kernel names one (it
/// does not for locks of open file descriptions).
///
/// # Errors
/// What the kernel answered.
pub(super) fn byte_is_locked(file: &File, byte: i64) -> io::Result<Option<Option<u32>>> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes one `flock`, which lives across the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    let free = libc::c_int::from(lock.l_type) == libc::F_UNLCK;
    Ok((!free).then(|| u32::try_from(lock.l_pid).ok().filter(|&pid| pid != 0)))
}

/// What the file system says of direct I/O on `file`: alignment in bytes of memory and of offsets.
/// `None` when it says nothing; zeros when direct I/O is not possible.
pub(super) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all-zero bytes are a valid `statx`.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: the path is an empty string that lives forever, and `stat` lives across the call.
    let answer = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &raw mut stat) };
    let told = answer == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    told.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// `fallocate` on `len` bytes from `at` on.
///
/// # Errors
/// What the kernel answered.
pub(super) fn fallocate(file: &File, mode: libc::c_int, at: u64, len: u64) -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, signed(at)?, signed(len)?) }).map(drop)
}

/// Begins to write the file's dirty pages, and waits for none of them, but perhaps for the disk to
/// take them. A later sync is told of failures of the disk all the same; of one that is returned
/// here it may not be.
///
/// # Errors
/// What the kernel answered.
pub(super) fn start_write_back(file: &File) -> io::Result<()> {
    let (fd, how) = (file.as_raw_fd(), libc::SYNC_FILE_RANGE_WRITE);
    // SAFETY: only integers are passed.
    check(unsafe { libc::sync_file_range(fd, 0, 0, how) }).map(drop)
}

/// The first byte from `at` on that is data, or with `hole` that is in a hole; `None` when there is
/// none. The end of a file counts as a hole.
///
/// # Errors
/// What the kernel answered.
pub(super) fn seek_run(file: &File, at: u64, hole: bool) -> io::Result<Option<u64>> {
    let whence = if hole { libc::SEEK_HOLE } else { libc::SEEK_DATA };
    // SAFETY: only integers are passed; nobody uses the descriptor's own position.
    let found = unsafe { libc::lseek(file.as_raw_fd(), signed(at)?, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Discards `len` bytes from `at` on of a block device; both must be multiples of 512.
///
/// # Errors
/// What the kernel answered.
pub(super) fn discard_blocks(file: &File, at: u64, len: u64) -> io::Result<()> {
    let range = [at, len];
    // SAFETY: BLKDISCARD reads two 64-bit words, which live across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLOCK_DISCARD, range.as_ptr()) }).map(drop)
}

/// The unit in bytes in which a block device takes requests.
///
/// # Errors
/// What the kernel answered.
pub(super) fn block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one `int`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) })?;
    Ok(u32::try_from(size).unwrap_or(512).max(512))
}

/// Sleeps until one of `descriptors` is readable, or a signal comes.
///
/// # Errors
/// What the kernel answered.
pub(super) fn wait_readable(descriptors: &[RawFd]) -> io::Result<()> {
    let entry = |&fd: &RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut entries: smallvec::SmallVec<[libc::pollfd; 2]> =
        descriptors.iter().map(entry).collect();
    let count = libc::nfds_t::try_from(entries.len()).expect("a few descriptors");
    // SAFETY: `entries` holds `count` entries and lives across the call.
    match check(unsafe { libc::poll(entries.as_mut_ptr(), count, -1) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

fn transferred(answer: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// Reads from `at` on into `segments`; returns how many bytes, 0 at the end of the file.
///
/// # Errors
/// What the kernel answered.
///
/// # Safety
/// The segments must lie in memory that stays mapped and writable until this returns, and that no
/// Rust reference covers.
pub(super) unsafe fn read_at(file: &File, segments: &[libc::iovec], at: u64) -> io::Result<usize> {
    let count = libc::c_int::try_from(segments.len()).expect("at most IOV_MAX segments");
    // SAFETY: the segments are valid by this function's contract.
    transferred(unsafe { libc::preadv(file.as_raw_fd(), segments.as_ptr(), count, signed(at)?) })
}

/// As [`read_at`], but fails with `EAGAIN` rather than wait for the disk.
///
/// # Errors
/// What the kernel answered; `EOPNOTSUPP` where the file system cannot tell.
///
/// # Safety
/// As for [`read_at`].
pub(super) unsafe fn read_cached_at(
    file: &File,
    segments: &[libc::iovec],
    at: u64,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(segments.len()).expect("at most IOV_MAX segments");
    let (fd, at) = (file.as_raw_fd(), signed(at)?);
    // SAFETY: the segments are valid by this function's contract.
    transferred(unsafe { libc::preadv2(fd, segments.as_ptr(), count, at, libc::RWF_NOWAIT) })
}

/// Writes `segments` from `at` on; returns how many bytes.
///
/// # Errors
/// What the kernel answered.
///
/// # Safety
/// The segments must lie in memory that stays mapped until this returns.
pub(super) unsafe fn write_at(file: &File, segments: &[libc::iovec], at: u64) -> io::Result<usize> {
    let count = libc::c_int::try_from(segments.len()).expect("at most IOV_MAX segments");
    // SAFETY: the segments are valid by this function's contract.
    transferred(unsafe { libc::pwritev(file.as_raw_fd(), segments.as_ptr(), count, signed(at)?) })
}
