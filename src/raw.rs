//! Raw images: the guest's bytes at the same offset of the host's file.

use crate::bytes::{GuestOffset, HostOffset, round_up};
use crate::error::{Error, Result};
use crate::exec::yield_now;
use crate::flush_gate::{FlushGate, Role};
use crate::storage::{FileId, Op, Purpose, Storage};
use crate::sync::OnceLock;

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: FileId,
    size: u64,
    /// A group commit over all workers.
    flush: FlushGate,
    /// A sync failed: what is durable is not known, and none after it may say that all is well.
    poison: OnceLock<Box<str>>,
}

impl Raw {
    /// A raw image over `file`, which has `length` bytes.
    ///
    /// The disk is as long as the file rounded up to a sector of 512 bytes; the missing bytes read
    /// as zeros, and writing them makes the file longer.
    pub fn new(file: FileId, length: u64) -> Self {
        Self {
            file,
            size: round_up(length, 512),
            flush: FlushGate::default(),
            poison: OnceLock::new(),
        }
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Says that the disk has so many bytes from now on, a multiple of 512.
    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// The file the bytes lie in.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Where a guest's byte lies.
    pub fn host(&self, at: GuestOffset) -> HostOffset {
        HostOffset(at.0)
    }

    /// Makes everything that was completed before durable. Flushes that come together are one.
    ///
    /// # Errors
    /// When the host cannot, and ever after: the kernel reports a lost page once.
    pub async fn flush(&self, st: &dyn Storage) -> Result<()> {
        let ticket = self.flush.ticket();
        let Role::Lead(lead) = self.flush.role(ticket).await else {
            return self.check_poison();
        };
        self.check_poison()?;
        let done = st.submit(self.file, Purpose::SyncData, Op::Sync).await;
        done.map_err(|source| {
            // The first failure is the one to remember.
            let _ = self.poison.set(source.to_string().into());
            Error::io("making data durable", source)
        })?;
        if lead.finish() {
            // So that all are answered together.
            yield_now().await;
        }
        Ok(())
    }

    fn check_poison(&self) -> Result<()> {
        let Some(why) = self.poison.get() else { return Ok(()) };
        let why = format!("flushes are refused since an earlier failure: {why}");
        Err(Error::refused("raw image", why))
    }
}
