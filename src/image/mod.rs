//! The guest's disk: a chain of layers, the top one written to.

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::raw::Raw;
use crate::storage::{Buf, Op, Purpose, Storage};

/// One guest's disk. Shared by all workers; each brings its own [`Storage`].
#[derive(Debug)]
pub struct Image {
    top: Raw,
    read_only: bool,
}

impl Image {
    /// A disk that is one raw file.
    pub fn from_raw(top: Raw, read_only: bool) -> Self {
        Self { top, read_only }
    }

    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.top.size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The unit in bytes in which the host's space is given back: discards smaller than that have
    /// no effect.
    pub fn discard_granularity(&self) -> u64 {
        4096
    }

    /// Fills `buf` with the guest's bytes from `at` on; the caller has checked the range.
    ///
    /// # Errors
    /// When the host cannot read, or the image contradicts itself.
    pub async fn read(&self, st: &dyn Storage, at: GuestOffset, buf: Buf) -> Result<()> {
        self.run(st, Purpose::GuestRead, Op::Read { at: self.top.host(at), buf }).await
    }

    /// Writes `buf` at `at`; the caller has checked the range. Durable after the next flush.
    ///
    /// # Errors
    /// When the host cannot write, or the image contradicts itself or was poisoned before.
    pub async fn write(&self, st: &dyn Storage, at: GuestOffset, buf: Buf) -> Result<()> {
        self.run(st, Purpose::GuestWrite, Op::Write { at: self.top.host(at), buf }).await
    }

    /// Makes a range read as zeros; with `unmap` the host's space may be given back.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn write_zeroes(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        self.run(st, Purpose::GuestZero, Op::Zero { at: self.top.host(at), len, unmap }).await
    }

    /// Tells that the guest needs a range no more; it reads as old bytes or as zeros afterwards.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn discard(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<()> {
        self.run(st, Purpose::GuestDiscard, Op::Discard { at: self.top.host(at), len }).await
    }

    /// Makes everything that was completed before durable.
    ///
    /// # Errors
    /// When the host cannot; nothing is acknowledged after that.
    pub async fn flush(&self, st: &dyn Storage) -> Result<()> {
        self.run(st, Purpose::SyncData, Op::Sync).await
    }

    /// Flushes and gives back what was only reserved. The image must not be used afterwards.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub async fn close(&self, st: &dyn Storage) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush(st).await
    }

    async fn run(&self, st: &dyn Storage, why: Purpose, op: Op) -> Result<()> {
        let done = st.submit(self.top.file(), why, op).await;
        done.map_err(|source| Error::io(format!("{why:?}"), source))
    }
}
