//! The only place where bytes move.
//!
//! An operation is a value ([`Op`]) with a name for why it is done ([`Purpose`]), and there is one
//! verb, [`Storage::submit`]. Engines ([`uring`], [`threads`], a simulated disk in [`mem`]) differ
//! in how they carry operations out; decorators ([`bounce`] buffers, [`fault`]s, [`stall`]s) wrap
//! an engine, and [`host::engine`] picks the right ones. Above this line nobody sees a short
//! transfer or an end of file: transfers are resumed, and reads past the end give zeros.

pub mod appear;
pub mod bounce;
pub mod buf;
mod early;
#[cfg(test)]
mod engine_tests;
pub mod fault;
pub mod files;
pub mod host;
mod lock;
pub mod mem;
pub mod ops;
mod plan;
mod prompt;
pub mod stall;
mod sys;
pub mod threads;
pub mod uring;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

pub use buf::Buf;
pub use ops::Pending;
pub use sys::{Switches, memory_file, switches};

use crate::bytes::HostOffset;
use crate::error::Result;

/// A file that was opened through a [`FileSource`]; small numbers, given in order of opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// Which worker a [`Storage`] belongs to; counters that must not be shared are kept one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lane(pub usize);

/// One operation on one file.
///
/// Buffers are handles: the operation keeps the memory alive until the engine has answered, even if
/// nobody waits for the answer any more.
#[derive(Debug, Clone)]
pub enum Op {
    /// Fill `buf` from the file; past the end of the file, with zeros.
    Read {
        /// First byte in the file.
        at: HostOffset,
        /// Where to put the bytes; its length is the length of the transfer.
        buf: Buf,
    },
    /// Write all of `buf`, growing the file if need be.
    Write {
        /// First byte in the file.
        at: HostOffset,
        /// The bytes.
        buf: Buf,
    },
    /// Make a range read as zeros, growing the file if need be.
    Zero {
        /// First byte in the file.
        at: HostOffset,
        /// Length in bytes.
        len: u64,
        /// Whether the host's space may be given back.
        unmap: bool,
    },
    /// Give the host's space back; the range may read as old bytes or as zeros afterwards.
    Discard {
        /// First byte in the file.
        at: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Ask the host for the space of a range that is to be written; neither the file's bytes nor
    /// its length change.
    Reserve {
        /// First byte in the file.
        at: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Set the file's length.
    Resize {
        /// New length in bytes.
        len: u64,
    },
    /// Make everything whose completion was seen before durable.
    Sync,
}

impl Op {
    /// The buffer of a transfer.
    pub fn buf(&self) -> Option<&Buf> {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => Some(buf),
            _ => None,
        }
    }

    /// Whether the operation changes the file's bytes or length.
    pub fn changes(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Reserve { .. } | Self::Sync)
    }
}

/// Why an operation is done: the words of fault rules and of traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// A guest's read.
    GuestRead,
    /// A guest's write, with its copied head and tail when it allocates.
    GuestWrite,
    /// A guest's write-zeroes that reaches the host.
    GuestZero,
    /// A guest's discard that reaches the host, or a freed cluster's hole.
    GuestDiscard,
    /// Reading the old bytes around a partial write of a new cluster.
    CowRead,
    /// Reading a compressed cluster.
    CompressedRead,
    /// Writing a guest's cluster compressed.
    CompressedWrite,
    /// Reading header, extensions and names at open.
    HeaderRead,
    /// Changing fields of the header in place.
    HeaderWrite,
    /// Reading the L1 table.
    L1Load,
    /// Writing sectors of the L1 table.
    L1Write,
    /// Loading a slice of an L2 table.
    L2Load,
    /// Writing a slice of an L2 table.
    L2Write,
    /// First content of a new L2 table: zeros, or a copy of a shared one.
    L2Init,
    /// Reading the refcount table.
    ReftableLoad,
    /// Writing sectors of the refcount table, or the whole of a grown one.
    ReftableWrite,
    /// Loading a slice of a refcount block.
    RefblockLoad,
    /// Writing a slice of a refcount block.
    RefblockWrite,
    /// First content of a new refcount block.
    RefblockInit,
    /// Making room on the host for entries of an L1 table or a refcount table, before any is set.
    TableRoom,
    /// Reading the snapshot table or a snapshot's L1 table.
    SnapshotRead,
    /// First content of an L1 table at a new place.
    L1Init,
    /// Writing a snapshot's L1 table, or the snapshot table, at a new place.
    SnapshotWrite,
    /// Making a file longer or shorter.
    Resize,
    /// Asking for space ahead of a file's end, and giving the rest back.
    Ahead,
    /// Reading the bitmap directory, a bitmap's table or its bits.
    BitmapLoad,
    /// Writing a bitmap's table or its bits into new clusters.
    BitmapWrite,
    /// Changing entries of the bitmap directory in place.
    DirectoryWrite,
    /// Data and refcounts are durable after this sync.
    SyncData,
    /// New refcount blocks are reachable after this sync.
    SyncReftable,
    /// L1 and L2 entries are durable after this sync.
    SyncTables,
    /// A header change is durable after this sync.
    SyncHeader,
    /// A change of the bitmap directory is durable after this sync.
    SyncDirectory,
    /// Making a new image.
    Create,
}

/// What an engine can do with a file, found out once when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of transfers must be multiples of this many bytes.
    pub request_alignment: u32,
    /// Addresses and lengths of the memory must be multiples of this many bytes.
    pub memory_alignment: u32,
    /// Whether bytes past the end of the file exist and read as zeros until written (a regular
    /// file); a block device has a fixed length and unknown content.
    pub grows: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request_alignment: 1, memory_alignment: 1, grows: true }
    }
}

/// A run of bytes of a file that are all data or all a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRun {
    /// Whether there is data; a hole reads as zeros, and so does what lies past the end.
    pub data: bool,
    /// Length in bytes; not zero. Past the end of the file it is as large as can be.
    pub len: u64,
}

impl HostRun {
    /// A hole without an end.
    pub const BEYOND: Self = Self { data: false, len: u64::MAX };

    /// The answer where nothing is known but the file's `length`.
    pub fn of_data(at: HostOffset, length: u64) -> Self {
        match length.saturating_sub(at.0) {
            0 => Self::BEYOND,
            len => Self { data: true, len },
        }
    }
}

/// One worker's way to the open files. Belongs to one thread.
pub trait Storage {
    /// What can be done with `file`.
    fn limits(&self, file: FileId) -> Limits;

    /// The length of `file` in bytes, asked of the host now. May block for a moment: only for
    /// opening, resizing and creating.
    ///
    /// # Errors
    /// What the host answered.
    fn length(&self, file: FileId) -> io::Result<u64>;

    /// The host's space in bytes that `file` takes, where that is known; else its length. As
    /// [`Storage::length`], only for looking at an image as a whole.
    ///
    /// # Errors
    /// What the host answered.
    fn allocated(&self, file: FileId) -> io::Result<u64> {
        self.length(file)
    }

    /// What the host knows of the bytes of `file` from `at` on without reading them. Where it
    /// knows nothing, all of the file is data. May block for a moment, as [`Storage::length`].
    ///
    /// # Errors
    /// What the host answered.
    fn host_run(&self, file: FileId, at: HostOffset) -> io::Result<HostRun> {
        Ok(HostRun::of_data(at, self.length(file)?))
    }

    /// Starts an operation and never blocks. The operation goes on if the answer is dropped.
    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending;

    /// Which worker this is.
    fn lane(&self) -> Lane;
}

/// A [`Storage`] that an owner drives: the worker's turn, or a blocking caller.
pub trait Engine: Storage {
    /// Takes completions and wakes those who wait; returns how many. Never blocks.
    fn reap(&self) -> usize;

    /// Hands everything submitted since the last call to the kernel, in one call where it can.
    ///
    /// # Errors
    /// What the kernel answered; the operations stay queued.
    fn submit_all(&self) -> io::Result<()>;

    /// As [`Engine::submit_all`], for an owner that would sleep next: whatever it has to do waits
    /// for what is submitted. Where syncs are known to be quick, one that is all that is under way
    /// may be carried out before this returns, and writes that one will ask for soon are started.
    ///
    /// # Errors
    /// As [`Engine::submit_all`].
    fn submit_and_rest(&self) -> io::Result<()> {
        self.submit_all()
    }

    /// Whether operations are under way.
    fn is_busy(&self) -> bool;

    /// A descriptor that is readable while [`Engine::reap`] has something to take. A sleep on it
    /// may also end with `EINTR` when there is something.
    fn pollable(&self) -> RawFd;

    /// Submits, then sleeps until at least one operation has finished (returns at once when none
    /// is under way), then reaps.
    ///
    /// # Errors
    /// What the kernel answered.
    fn wait(&self) -> io::Result<()>;
}

/// Runs `future` to its end on this thread, driving `engine`.
pub fn block_on<F: Future>(engine: &dyn Engine, future: F) -> F::Output {
    crate::exec::block_on(future, || engine.is_busy() && engine.wait().is_ok())
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenMode {
    /// Never write to it.
    pub read_only: bool,
    /// Others must not write to it while it is open, as a backing file.
    pub backing: bool,
}

/// An opened file and what tells it from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The file's number.
    pub id: FileId,
    /// Device and inode: two names of one file have the same.
    pub identity: (u64, u64),
    /// Length in bytes when it was opened.
    pub length: u64,
}

/// Opens files by name: the host's file system, or a test's.
pub trait FileSource: fmt::Debug {
    /// Opens an existing file.
    ///
    /// # Errors
    /// Names the file, the reason, and what to do; a file that is neither regular nor a block
    /// device is refused.
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Opened>;

    /// Makes a new empty file and opens it for writing.
    ///
    /// # Errors
    /// When there is one of that name already, or the host says no.
    fn create(&self, path: &Path) -> Result<Opened>;

    /// The absolute form of `path` with every link resolved, for deciding what it may refer to.
    ///
    /// # Errors
    /// When the file does not exist or cannot be reached.
    fn canonical(&self, path: &Path) -> Result<std::path::PathBuf>;
}
