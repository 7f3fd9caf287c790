//! The files of the host that the daemon has open.
//!
//! The table only grows and is shared by all workers; an engine keeps its own list of what it has
//! seen, so that the data path takes no lock. A file is opened once: its locks exclude a second
//! opening, by this process as by any other.

use std::cell::{Ref, RefCell};
use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::bounce::BlockLocks;
use super::early::Early;
use super::stall::Outage;
use super::threads::Pool;
use super::{FileId, FileSource, HostRun, Limits, OpenMode, Opened, lock, sys};
use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicU32, AtomicU64, Mutex, Ordering, RwLock, lock as lock_mutex};

/// How files are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Go around the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Whether [`Op::Sync`](super::Op::Sync) does anything; without, a power cut loses data that
    /// guests were told is safe.
    pub sync: bool,
    /// Whether to take the locks that keep other programs, QEMU among them, from the same image.
    pub lock: bool,
    /// Whether what the host has no space for waits until there is some, instead of failing.
    pub stall: bool,
    /// Whether calls that need not wait for the disk are made at once, on the worker's own thread;
    /// only through the page cache are there such calls.
    pub prompt: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { direct: false, sync: true, lock: true, stall: false, prompt: true }
    }
}

/// The table of open files, and what the workers' engines share beside it.
#[derive(Debug)]
pub struct Files {
    options: Options,
    table: RwLock<Vec<Arc<OpenFile>>>,
    pub(super) pool: Arc<Pool>,
    pub(super) locks: Arc<BlockLocks>,
    outage: Arc<Outage>,
    /// Files that are open already and will be used instead of being opened.
    adoptable: Mutex<Vec<File>>,
}

/// One open file.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// The name it was opened by.
    path: PathBuf,
    pub(super) limits: Limits,
    /// Bits of [`Lack`]: what turned out not to work on this file.
    lacks: AtomicU32,
    /// What is known of its syncs.
    pub(super) early: Early,
    /// A length that the file has at least, in bytes.
    length: AtomicU64,
    /// Discards of a block device must be multiples of this many bytes; 1 for a regular file.
    pub(super) block_size: u32,
}

/// What is to be done about a file's locks.
#[derive(Debug, Clone, Copy)]
enum Locking {
    /// They must be taken.
    Needed { read_only: bool },
    /// They came with the file.
    Held,
}

/// Something a file's host cannot do, found out by trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lack {
    /// Giving space back.
    Punch = 1,
    /// Zeroing a range without writing it.
    ZeroRange = 2,
    /// Telling a block device that blocks are not needed.
    Discard = 4,
    /// Reading only what is in the page cache.
    ReadCached = 8,
    /// Asking for space before it is written.
    Reserve = 16,
}

impl OpenFile {
    /// Whether `what` was found not to work.
    pub(super) fn lacks(&self, what: Lack) -> bool {
        self.lacks.load(Ordering::Relaxed) & what as u32 != 0
    }

    /// Remembers that `what` does not work, for good.
    pub(super) fn note_lack(&self, what: Lack) {
        self.lacks.fetch_or(what as u32, Ordering::Relaxed);
    }

    /// Whether it is a block device.
    pub(super) fn is_block_device(&self) -> bool {
        !self.limits.grows
    }

    /// Whether the file is known to reach to `end`.
    pub(super) fn reaches(&self, end: u64) -> bool {
        self.is_block_device() || self.length.load(Ordering::Relaxed) >= end
    }

    /// Remembers that the file reaches to `end`. Writes nothing shared when that is no news.
    pub(super) fn note_reach(&self, end: u64) {
        if !self.reaches(end) {
            self.length.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Remembers that the file's length is set to `len`: before, and once more after it was done.
    pub(super) fn note_resize(&self, len: u64, done: bool) {
        if done {
            self.length.store(len, Ordering::Relaxed);
        } else {
            self.length.fetch_min(len, Ordering::Relaxed);
        }
    }

    fn length(&self) -> io::Result<u64> {
        if self.is_block_device() {
            // Nobody uses the descriptor's own position.
            (&self.file).seek(SeekFrom::End(0))
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    /// The host's space in bytes that it takes.
    fn allocated(&self) -> io::Result<u64> {
        /// The unit of `st_blocks`, whatever the file system's own blocks are.
        const UNIT: u64 = 512;
        Ok(self.file.metadata()?.blocks().saturating_mul(UNIT))
    }

    /// What the file system says of the bytes from `at` on.
    fn host_run(&self, at: u64) -> io::Result<HostRun> {
        let length = self.length()?;
        if at >= length {
            return Ok(HostRun::BEYOND);
        }
        // A file system that knows nothing of holes has only data.
        let data = sys::seek_run(&self.file, at, false).unwrap_or(Some(at));
        match data {
            None => Ok(HostRun::BEYOND),
            Some(data) if data > at => Ok(HostRun { data: false, len: data - at }),
            Some(_) => {
                let hole = sys::seek_run(&self.file, at, true).ok().flatten().unwrap_or(length);
                Ok(HostRun { data: true, len: hole.max(at + 1) - at })
            }
        }
    }
}

impl Files {
    /// An empty table.
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self {
            options,
            table: RwLock::new(Vec::new()),
            pool: Pool::new(),
            locks: BlockLocks::new(),
            outage: Arc::default(),
            adoptable: Mutex::default(),
        })
    }

    /// What the engines know of a lack of space.
    pub fn outage(&self) -> &Arc<Outage> {
        &self.outage
    }

    /// Lets [`FileSource::open`] use these files, which another table has or had open, where they
    /// are the ones it would open. Locks belong to what is open and not to who has it: they are
    /// held all the time. They are not taken again, because somebody who tries to get them at this
    /// moment would be seen as in the way.
    pub fn adopt(&self, files: Vec<File>) {
        *lock_mutex(&self.adoptable) = files;
    }

    /// Copies of the descriptors of all open files, for [`Files::adopt`].
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn descriptors(&self) -> io::Result<Vec<File>> {
        let table = self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        table.iter().map(|open| open.file.try_clone()).collect()
    }

    /// A file to use instead of opening the one that has this identity.
    fn adoptable(&self, wanted: (u64, u64), read_only: bool) -> Option<File> {
        let mut files = lock_mutex(&self.adoptable);
        let fits = |file: &File| {
            file.metadata().is_ok_and(|metadata| identity(&metadata) == wanted)
                && sys::is_read_only(file).is_ok_and(|is| is == read_only)
        };
        let place = files.iter().position(fits)?;
        Some(files.swap_remove(place))
    }

    /// What a file is called: the path it was opened by.
    pub fn name(&self, id: FileId) -> String {
        let table = self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let open = usize::try_from(id.0).ok().and_then(|index| table.get(index));
        open.map_or_else(|| format!("file {}", id.0), |open| open.path.display().to_string())
    }

    /// How files are opened.
    pub fn options(&self) -> Options {
        self.options
    }

    fn finish_open(&self, file: File, path: &Path, locking: Locking) -> Result<Opened> {
        let name = path.display();
        let failed = |what: &str, error| Error::io(format!("{name}: cannot {what}"), error);
        let metadata = file.metadata().map_err(|error| failed("inspect", error))?;
        check_type(metadata.file_type(), path)?;
        sys::set_flags(&file, self.options.direct).map_err(|error| {
            if error.raw_os_error() == Some(libc::EINVAL) {
                no_direct(path)
            } else {
                failed("set up", error)
            }
        })?;
        if let (true, Locking::Needed { read_only }) = (self.options.lock, locking) {
            lock::acquire(&file, path, read_only)?;
        }
        let device = metadata.file_type().is_block_device();
        let block_size = if device { sys::block_size(&file).unwrap_or(512) } else { 1 };
        let mut limits = Limits { grows: !device, ..Limits::default() };
        if self.options.direct {
            (limits.memory_alignment, limits.request_alignment) = direct_limits(&file, path)?;
        }
        let (lacks, length, early) = (AtomicU32::new(0), AtomicU64::new(0), Early::default());
        let open =
            OpenFile { file, path: path.to_owned(), limits, lacks, early, length, block_size };
        let length = open.length().map_err(|error| failed("find the length", error))?;
        open.length.store(length, Ordering::Relaxed);
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let id = FileId(u32::try_from(table.len()).expect("fewer files than descriptors"));
        table.push(Arc::new(open));
        tracing::debug!("{name}: file {}, {length} bytes, {limits:?}", id.0);
        Ok(Opened { id, identity: identity(&metadata), length })
    }
}

/// What tells a file from others, whatever it is called: a block device is the same by any of its
/// nodes.
fn identity(metadata: &Metadata) -> (u64, u64) {
    if metadata.file_type().is_block_device() {
        (metadata.rdev(), u64::MAX)
    } else {
        (metadata.dev(), metadata.ino())
    }
}

fn check_type(kind: FileType, path: &Path) -> Result<()> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "is a directory"
    } else if kind.is_fifo() {
        "is a pipe"
    } else if kind.is_socket() {
        "is a socket"
    } else {
        "is a character device"
    };
    Err(Error::refused(
        path.display().to_string(),
        format!("{what}, not an image; give the path of a regular file or a block device"),
    ))
}

fn no_direct(path: &Path) -> Error {
    Error::unsupported(
        path.display().to_string(),
        "its file system cannot go around the page cache (O_DIRECT); \
         choose another --cache than none, such as writeback",
    )
}

#[repr(align(8192))]
struct TrialMemory([u8; 8192]);

/// The alignment in bytes that direct I/O needs of memory and of offsets.
fn direct_limits(file: &File, path: &Path) -> Result<(u32, u32)> {
    match sys::direct_alignment(file) {
        Some((0, _) | (_, 0)) => return Err(no_direct(path)),
        // An odd answer, such as no power of two, is worth as much as none.
        Some((memory, request)) if memory.is_power_of_two() && request.is_power_of_two() => {
            return Ok((memory, request));
        }
        _ => {}
    }
    let mut memory = Box::new(TrialMemory([0; 8192]));
    // A read at the end of a file may succeed whatever its alignment: a short one proves nothing.
    let mut proves = |from: usize, len: usize| {
        file.read_at(&mut memory.0[from..from + len], 0).is_ok_and(|read| read == len)
    };
    let request = if proves(0, 512) { 512 } else { 4096 };
    let memory = if proves(512, 4096) { 512 } else { 4096 };
    Ok((memory, request))
}

impl FileSource for Files {
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Opened> {
        let how = if mode.read_only { "for reading" } else { "for reading and writing" };
        let failed = |error| Error::io(format!("cannot open {} {how}", path.display()), error);
        // Opening alone can do things to a device, and a pipe would wait for its other end.
        let metadata = fs::metadata(path).map_err(failed)?;
        check_type(metadata.file_type(), path)?;
        if let Some(file) = self.adoptable(identity(&metadata), mode.read_only) {
            return self.finish_open(file, path, Locking::Held);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!mode.read_only).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(failed)?;
        self.finish_open(file, path, Locking::Needed { read_only: mode.read_only })
    }

    fn create(&self, path: &Path) -> Result<Opened> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let failed = |error| Error::io(format!("cannot create {}", path.display()), error);
        let opened =
            self.finish_open(file.map_err(failed)?, path, Locking::Needed { read_only: false });
        if opened.is_err() {
            // Best effort: the error that matters is the first one.
            let _ = fs::remove_file(path);
        }
        opened
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        let failed = |error| Error::io(format!("cannot find {}", path.display()), error);
        fs::canonicalize(path).map_err(failed)
    }
}

/// An engine's own list of the open files, brought up to date when it meets one it has not seen.
pub(super) struct Seen {
    files: Arc<Files>,
    list: RefCell<Vec<Arc<OpenFile>>>,
}

impl Seen {
    /// A list for one engine.
    pub(super) fn new(files: Arc<Files>) -> Self {
        Self { files, list: RefCell::new(Vec::new()) }
    }

    /// The file of that number; the borrow must be short.
    ///
    /// # Panics
    /// When no file has that number.
    pub(super) fn get(&self, id: FileId) -> Ref<'_, Arc<OpenFile>> {
        let index = usize::try_from(id.0).expect("a file number");
        if index >= self.list.borrow().len() {
            let table = self.files.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.list.borrow_mut().clone_from(&table);
        }
        Ref::map(self.list.borrow(), |list| &list[index])
    }

    /// What can be done with a file.
    pub(super) fn limits(&self, id: FileId) -> Limits {
        self.get(id).limits
    }

    /// A file's length in bytes, asked of the host.
    pub(super) fn length(&self, id: FileId) -> io::Result<u64> {
        self.get(id).length()
    }

    /// The host's space in bytes that a file takes.
    pub(super) fn allocated(&self, id: FileId) -> io::Result<u64> {
        self.get(id).allocated()
    }

    /// What the file system says of a file's bytes from `at` on.
    pub(super) fn host_run(&self, id: FileId, at: u64) -> io::Result<HostRun> {
        self.get(id).host_run(at)
    }

    /// Whether syncs do anything.
    pub(super) fn syncs(&self) -> bool {
        self.files.options.sync
    }

    /// Whether there are calls that are made at once.
    pub(super) fn is_prompt(&self) -> bool {
        self.files.options.prompt && !self.files.options.direct
    }

    /// The threads that carry out what would block.
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.files.pool
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::storage::{Buf, Op, Purpose, block_on, host};

    const WRITABLE: OpenMode = OpenMode { read_only: false, backing: false };

    fn refused(path: &Path, options: Options) -> String {
        let mode = OpenMode { read_only: true, backing: false };
        Files::new(options).open(path, mode).expect_err("a refusal").to_string()
    }

    #[test]
    fn what_is_no_image_is_refused_by_name_and_kind() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        for (path, what) in [
            (directory.path(), "is a directory"),
            (&socket, "is a socket"),
            (Path::new("/dev/null"), "is a character device"),
            (&directory.path().join("missing"), "No such file"),
        ] {
            let error = refused(path, Options::default());
            assert!(
                error.contains(what) && error.contains(path.to_str().expect("UTF-8")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_system_without_direct_io_is_told_what_to_choose() {
        let options = Options { direct: true, lock: false, ..Options::default() };
        let error = refused(Path::new("/proc/version"), options);
        assert!(error.contains("/proc/version") && error.contains("--cache"), "{error}");
    }

    #[test]
    fn a_new_file_is_new_and_has_one_identity() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        let files = Files::new(Options::default());
        let made = files.create(&path).expect("a new file");
        assert_eq!((made.id, made.length), (FileId(0), 0));
        files.create(&path).expect_err("there is one already");
        assert!(path.exists(), "a file that was there stays");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("a link");
        assert_eq!(files.canonical(&link).expect("a path"), path.canonicalize().expect("a path"));
        let other = Files::new(Options { lock: false, ..Options::default() });
        assert_eq!(other.open(&link, WRITABLE).expect("open").identity, made.identity);
    }

    #[test]
    fn a_file_is_free_as_soon_as_its_engines_are_gone() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for aio in [host::Aio::Auto, host::Aio::Threads] {
            for _ in 0..50 {
                let files = Files::new(Options::default());
                let start = std::time::Instant::now();
                let id = files.open(file.path(), WRITABLE).expect("nobody has it").id;
                assert!(start.elapsed().as_millis() < 1000, "{aio:?}: somebody still had it");
                let engine = host::engine(aio, &files, 0).expect("an engine");
                let op = Op::Write { at: HostOffset(0), buf: Buf::zeroed(4096) };
                block_on(&*engine, engine.submit(id, Purpose::GuestWrite, op)).expect("write");
            }
        }
    }

    #[test]
    fn a_file_that_is_open_is_adopted_with_its_locks() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let first = Files::new(Options::default());
        first.open(file.path(), WRITABLE).expect("nobody has it");
        let second = Files::new(Options::default());
        second.open(file.path(), WRITABLE).expect_err("the first has it");
        second.adopt(first.descriptors().expect("copies"));
        let read_only = OpenMode { read_only: true, backing: false };
        second.open(file.path(), read_only).expect_err("what is open is open for writing");
        second.open(file.path(), WRITABLE).expect("it is adopted");
        drop(first);
        let third = Files::new(Options::default());
        third.open(file.path(), read_only).expect_err("the locks were never let go");
        // A table may also adopt what it has itself, to open an image once more.
        second.adopt(second.descriptors().expect("copies"));
        assert_eq!(second.open(file.path(), WRITABLE).expect("again").id, FileId(1));
        drop(second);
        third.open(file.path(), WRITABLE).expect("everybody has let go");
    }

    #[test]
    fn reading_an_image_does_not_change_when_it_was_read() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [1; 4096]).expect("write");
        // So long ago that the file system would note the next read, if it notes any.
        let forget = || {
            let long_ago = fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH);
            file.as_file().set_times(long_ago).expect("a time");
        };
        let accessed = || fs::metadata(file.path()).expect("metadata").atime();
        forget();
        fs::read(file.path()).expect("read");
        if accessed() == 0 {
            return;
        }
        forget();
        let files = Files::new(Options::default());
        let id = files.open(file.path(), WRITABLE).expect("open").id;
        let engine = host::engine(host::Aio::Auto, &files, 0).expect("an engine");
        let op = Op::Read { at: HostOffset(0), buf: Buf::zeroed(4096) };
        block_on(&*engine, engine.submit(id, Purpose::GuestRead, op)).expect("read");
        assert_eq!(accessed(), 0);
    }

    #[test]
    fn without_syncs_a_sync_is_answered_at_once() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for aio in [host::Aio::Auto, host::Aio::Threads] {
            let files = Files::new(Options { sync: false, ..Options::default() });
            let id = files.open(file.path(), WRITABLE).expect("open").id;
            let engine = host::engine(aio, &files, 0).expect("an engine");
            let answer = engine.submit(id, Purpose::SyncData, Op::Sync);
            assert!(!engine.is_busy());
            block_on(&*engine, answer).expect("sync");
        }
    }
}
