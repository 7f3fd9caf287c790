//! Copying a part of a disk into a new image, in blocks.

use std::ops::Range;

use crate::bytes::GuestOffset;
use crate::error::Result;
use crate::image::Image;
use crate::image::status::BlockMap;
use crate::image::watch::{Outcome, Watch};
use crate::storage::{Buf, Storage};

/// Bytes are copied in pieces of at most this many.
const PIECE: u64 = 1 << 20;

/// Which part of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Bytes of a block, at least one.
    pub block: u64,
    /// The block at which the part ends, unless the disk ends before: blocks that are skipped
    /// count, as they do for `qemu-img dd`.
    pub count: Option<u64>,
    /// Blocks that are skipped first.
    pub skip: u64,
}

impl Part {
    /// Where the part of a disk of `size` bytes begins and ends.
    pub fn range(&self, size: u64) -> Range<u64> {
        let end = self.count.and_then(|count| count.checked_mul(self.block)).unwrap_or(size);
        let end = end.min(size);
        self.skip.checked_mul(self.block).unwrap_or(end).min(end)..end
    }

    /// Whether more is skipped than there is.
    pub fn skips_all(&self, size: u64) -> bool {
        let end = self.range(size).end;
        self.skip.checked_mul(self.block).is_none_or(|start| start > end)
    }
}

/// Copies a part of a disk to the beginning of another one, which reads as zeros and is at least as
/// long, and closes that, also when `watch` says no before the end.
///
/// # Errors
/// As [`Image::read`] and [`Image::write`].
pub async fn copy_part(
    st: &dyn Storage,
    disk: &Image,
    range: Range<u64>,
    target: &Image,
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    let map = BlockMap::new(st, disk).await?;
    let size = range.end - range.start;
    let mut at = range.start;
    let mut goes_on = watch(0, size);
    while goes_on && at < range.end {
        let status = map.status(st, GuestOffset(at), range.end - at).await?;
        let mut len = status.len;
        if !status.zero {
            len = len.min(PIECE);
            let buf = Buf::zeroed(usize::try_from(len).expect("a small piece"));
            disk.read(st, GuestOffset(at), buf.clone()).await?;
            target.write(st, GuestOffset(at - range.start), buf).await?;
        }
        at += len;
        goes_on = watch(at - range.start, size);
    }
    target.close(st).await?;
    Ok(if at < range.end { Outcome::Stopped } else { Outcome::Complete })
}
