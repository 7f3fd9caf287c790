//! A vhost-user-blk daemon that serves qcow2 and raw images to virtual machines, and the image
//! layer under it.
//!
//! # The map
//!
//! ```text
//! guest memory ── vm-memory ──┐
//!                             ▼
//! VMM ── unix socket ── vhost::session ──► worker (one thread: epoll + io_uring + a task set) × N
//!                                            │ pops a descriptor chain
//!                                            ▼
//!                                          blk::request   parse, check  (hostile guest stops here)
//!                                            ▼
//!                                          blk::serve     one async function per request
//!                                            ▼
//!                                          image          the guest's disk: a chain of layers
//!                                            ▼
//!                                          qcow2 | raw    where do these bytes live?
//!                                            ▼                          (hostile image stops here)
//!                                          storage        io_uring, threads, or a simulated disk
//! ```
//!
//! A module imports only from those below it; `tests/tidy.rs` enforces this. In reading order:
//!
//! - [`bytes`], [`error`], [`sync`], [`exec`], `flush_gate`: offsets as types, one error type, the
//!   locks and atomics in use, a fixed set of tasks, one flush for all who ask together.
//! - [`storage`]: an operation is a value, and [`storage::Storage::submit`] the one verb.
//!   Everything that touches a file goes through it, so a test owns time and failure.
//! - [`qcow2`], [`raw`]: where a guest's byte lives. `qcow2/ORDERING.md` states which bytes must be
//!   durable before which others.
//! - [`image`]: the chain of layers as one disk: read, write, discard, write-zeroes, flush; and
//!   the gate that decides which other files a header may have opened.
//! - [`inside`]: what the guest keeps on the disk: partition tables, and files in file systems.
//! - [`blk`]: the virtio-blk device: its configuration, requests taken apart and served.
//! - [`worker`]: one thread's rings and tasks; [`worker::Worker::turn`] is the whole of its life.
//! - [`vhost`]: the socket, the front-end's messages, guest memory.
//! - [`cli`]: flags, logging, from start to SIGTERM.
//!
//! # A read, down and up
//!
//! 1. The worker pops a chain from the available ring, and `blk::request` turns it into a request
//!    whose buffer is a list of the guest's own addresses ([`storage::Buf`]).
//! 2. [`image::Image::read`] asks the top layer where the bytes are: [`qcow2::Qcow2::lookup`], an
//!    L1 entry and an L2 entry from the cache, without a lock. Unallocated bytes are the next
//!    layer's; a table that is not cached is loaded, and only those who need it wait.
//! 3. Each run of bytes becomes one [`storage::Op::Read`] with the guest's addresses in it: the
//!    kernel puts the data where the guest wants it, with no copy on the way.
//! 4. The completion sets the task's ready bit; the task ends; the worker puts the chain on the
//!    used ring with others that end in this turn, and tells the guest of all of them at once.
//!
//! # A write
//!
//! Over bytes that the top layer owns alone, a write is a read with the arrow turned round. Else
//! [`qcow2::Qcow2::prepare_write`] claims the clusters and finds room, the image writes whole
//! clusters or subclusters, and [`qcow2::Qcow2::commit_write`] links them. A flush makes data,
//! refcounts and tables durable, in that order.

pub mod blk;
pub mod bytes;
pub mod cli;
pub mod error;
pub mod exec;
mod flush_gate;
pub mod image;
pub mod inside;
pub mod qcow2;
pub mod raw;
pub mod storage;
pub mod sync;
pub mod vhost;
pub mod worker;
