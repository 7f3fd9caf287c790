//! What the guest keeps on its disk: partition tables, and the files in their file systems.
//!
//! Reading is bounded, since whoever made an image may want to keep us busy for ever: a [`Watch`]
//! counts what is read without anything to show for it, what is listed and what is copied, and
//! looks at the clock. The crates that know the formats were written with care, but not by us, so
//! [`guarded`] turns a panic of theirs into an error.
//!
//! ```
//! use std::rc::Rc;
//! use vhost_user_qcow2::image::OpenOptions;
//! use vhost_user_qcow2::image::blocking::{self, Disk};
//! use vhost_user_qcow2::inside::edit::{Label, NewPartition, create_table};
//! use vhost_user_qcow2::inside::table::{Table, read_table};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let path = directory.path().join("disk.qcow2");
//! blocking::create(&path, 64 << 20)?;
//! let disk = Rc::new(Disk::open(&path, &OpenOptions::default())?);
//! let boot = NewPartition {
//!     size: Some(16 << 20),
//!     kind: Some("uefi".into()),
//!     name: Some("boot".into()),
//!     ..NewPartition::default()
//! };
//! create_table(&disk, Label::Gpt, &[boot, NewPartition::default()])?;
//!
//! let Some(Table { partitions, .. }) = read_table(&disk)? else { panic!("it has one now") };
//! assert_eq!(partitions[0].name.as_deref(), Some("boot"));
//! assert_eq!(partitions[0].start, 1 << 20);
//! assert_eq!(partitions[1].number, 2);
//! # Ok(())
//! # }
//! ```

pub mod copy;
pub mod edit;
mod ext;
mod fat;
pub mod filesystem;
mod gpt;
mod mbr;
pub mod source;
pub mod table;
pub mod types;

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Reads that may go by without anything to show for them. The largest directory of a FAT, full of
/// deleted entries, takes a million.
const PATIENCE: u64 = 4 << 20;
/// Reads between two looks at the clock.
const CLOCK: u64 = 256;

/// How far reading goes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files and directories that are listed or copied, all together.
    pub entries: u64,
    /// Entries of one directory.
    pub directory: u64,
    /// Directories inside each other.
    pub depth: usize,
    /// Bytes of files that are copied, all together; holes count as well.
    pub bytes: u64,
    /// How long it may take.
    pub time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 16 << 20,
            directory: 1 << 20,
            depth: 256,
            bytes: 1 << 40,
            time: Duration::from_secs(3600),
        }
    }
}

/// Counts what is done on behalf of one caller.
#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    deadline: Instant,
    patience: Cell<u64>,
    entries: Cell<u64>,
    bytes: Cell<u64>,
    over: Cell<bool>,
}

impl Watch {
    /// Begins now.
    pub fn new(limits: Limits) -> Self {
        let far = Instant::now() + Duration::from_secs(u64::from(u32::MAX));
        Self {
            limits,
            deadline: Instant::now().checked_add(limits.time).unwrap_or(far),
            patience: Cell::new(PATIENCE),
            entries: Cell::new(limits.entries),
            bytes: Cell::new(limits.bytes),
            over: Cell::new(false),
        }
    }

    /// What it goes by.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether a limit for everything together was reached.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// One read of the disk.
    fn read(&self) -> io::Result<()> {
        let left = self.patience.get();
        if left == 0 {
            return Err(io::Error::other(
                "the file system leads nowhere: it was read for long without finding anything",
            ));
        }
        self.patience.set(left - 1);
        if left.is_multiple_of(CLOCK) { self.check_time() } else { Ok(()) }
    }

    fn check_time(&self) -> io::Result<()> {
        if Instant::now() < self.deadline {
            return Ok(());
        }
        self.over.set(true);
        let seconds = self.limits.time.as_secs();
        let why = format!("it takes more than {seconds} s; --time-limit allows more");
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    }

    /// One entry of a directory.
    fn entry(&self) -> io::Result<()> {
        let left = self.entries.get().checked_sub(1).ok_or_else(|| {
            self.over.set(true);
            let most = self.limits.entries;
            io::Error::other(format!("there are more than {most} files; --max-entries allows more"))
        })?;
        self.entries.set(left);
        self.patience.set(PATIENCE);
        if left.is_multiple_of(CLOCK) { self.check_time() } else { Ok(()) }
    }

    /// So many bytes of a file.
    fn bytes(&self, count: u64) -> io::Result<()> {
        let left = self.bytes.get().checked_sub(count).ok_or_else(|| {
            self.over.set(true);
            let most = self.limits.bytes;
            io::Error::other(format!("there are more than {most} bytes; --max-bytes allows more"))
        })?;
        self.bytes.set(left);
        self.patience.set(PATIENCE);
        self.check_time()
    }
}

/// Does `work`, and makes an error of a panic. `what` says what was done.
///
/// The work is done by crates that read what hostile people may have written. They hold no state
/// of ours: what they held when they panicked is dropped with the file system or read again.
fn guarded<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let why = format!(
            "what is on the disk contradicts itself, the reader gave up ({})",
            message(&*panic)
        );
        Err(damaged(what, why))
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}

/// What is on the disk is wrong.
fn damaged(what: impl Into<Box<str>>, why: impl Into<String>) -> Error {
    Error::io(what, io::Error::new(io::ErrorKind::InvalidData, why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        let wrong = guarded::<()>("reading", || panic!("index {}", 7)).expect_err("it panicked");
        assert!(wrong.to_string().contains("index 7"), "{wrong}");
        assert_eq!(guarded("reading", || Ok(3)).expect("it did not"), 3);
    }

    #[test]
    fn limits_are_kept() {
        let limits = Limits { entries: 2, bytes: 10, ..Limits::default() };
        let watch = Watch::new(limits);
        assert!(watch.entry().is_ok() && watch.entry().is_ok() && watch.entry().is_err());
        assert!(watch.bytes(10).is_ok() && watch.bytes(1).is_err());
        for _ in 0..PATIENCE {
            watch.read().expect("patient");
        }
        assert!(watch.read().is_err());
        let watch = Watch::new(Limits { time: Duration::ZERO, ..limits });
        assert!(watch.bytes(1).is_err(), "the time is over");
    }
}
