//! Raw images: the guest's bytes at the same offset of the host's file.

use crate::bytes::{GuestOffset, HostOffset, round_up};
use crate::storage::FileId;

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: FileId,
    size: u64,
}

impl Raw {
    /// A raw image over `file`, which has `length` bytes.
    ///
    /// The disk is as long as the file rounded up to a sector of 512 bytes; the missing bytes read
    /// as zeros, and writing them makes the file longer.
    pub fn new(file: FileId, length: u64) -> Self {
        Self { file, size: round_up(length, 512) }
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file the bytes lie in.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Where a guest's byte lies.
    pub fn host(&self, at: GuestOffset) -> HostOffset {
        HostOffset(at.0)
    }
}
