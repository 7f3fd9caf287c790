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
/// Zeros are told of in pieces of at most this many.
const ZEROS: u64 = 64 << 20;

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

/// Copies a part of a disk to the beginning of another one, which is at least as long, and closes
/// that, also when `watch` says no before the end. Zeros are written, and those that fill the last
/// sector too, unless the target reads as zeros before (`target_is_zero`).
///
/// # Errors
/// As [`Image::read`], [`Image::write`] and [`Image::write_zeroes`].
pub async fn copy_part(
    st: &dyn Storage,
    disk: &Image,
    range: Range<u64>,
    (target, target_is_zero): (&Image, bool),
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    let map = BlockMap::new(st, disk).await?;
    let size = range.end - range.start;
    let mut at = range.start;
    let mut goes_on = watch(0, size);
    while goes_on && at < range.end {
        let status = map.status(st, GuestOffset(at), range.end - at).await?;
        let mut len = status.len;
        let to = GuestOffset(at - range.start);
        if !status.zero {
            len = len.min(PIECE);
            let buf = Buf::zeroed(usize::try_from(len).expect("a small piece"));
            disk.read(st, GuestOffset(at), buf.clone()).await?;
            target.write(st, to, buf).await?;
        } else if !target_is_zero {
            len = len.min(ZEROS);
            target.write_zeroes(st, to, len, true).await?;
        }
        at += len;
        goes_on = watch(at - range.start, size);
    }
    let rest = size.next_multiple_of(512) - size;
    if at == range.end && rest > 0 && !target_is_zero {
        target.write_zeroes(st, GuestOffset(size), rest, false).await?;
    }
    target.close(st).await?;
    Ok(if at < range.end { Outcome::Stopped } else { Outcome::Complete })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::image::make::{NewImage, make};
    use crate::image::{Format, OpenOptions};
    use crate::qcow2::create::CreateOptions;
    use crate::storage::block_on;
    use crate::storage::mem::MemDisk;

    #[test]
    fn zeros_replace_the_old_bytes_of_a_device() {
        let disk = MemDisk::new();
        let engine = disk.engine(0, 0);
        let open = |name: &str, format| {
            let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
            block_on(&engine, Image::open(&engine, &disk, Path::new(name), &options)).expect("open")
        };
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(1 << 20),
            layout: CreateOptions::new(1 << 20),
            replace: false,
            trust_backing: false,
        };
        let options = OpenOptions::default();
        let made = make(&engine, &disk, Path::new("source"), &new, &options);
        block_on(&engine, made).expect("make");
        let source = open("source", Format::Qcow2);
        let seven = Buf::copy_of(&[7; 65536]);
        block_on(&engine, source.write(&engine, GuestOffset(128 << 10), seven)).expect("write");
        for (range, zero) in [(0..1 << 20, false), (100..400_000, false), (0..1 << 20, true)] {
            let device = disk.add(format!("{range:?} {zero}"), vec![9; 1 << 20]);
            let target = open(&format!("{range:?} {zero}"), Format::Raw);
            let (from, to) = (range.start as usize, range.end as usize);
            let mut watch = |_, _| true;
            let copy = copy_part(&engine, &source, range, (&target, zero), &mut watch);
            assert_eq!(block_on(&engine, copy).expect("a copy"), Outcome::Complete);
            let mut expected = vec![if zero { 9 } else { 0 }; 1 << 20];
            expected[131_072..196_608].fill(7);
            let mut expected = expected[from..to].to_vec();
            expected.resize((to - from).next_multiple_of(512), 0);
            expected.resize(1 << 20, 9);
            assert!(disk.content(device) == expected, "{from}..{to} {zero}");
        }
    }
}
