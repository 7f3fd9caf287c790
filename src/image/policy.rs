//! What the operator wants done with discards, and with zeros that guests write as bytes.

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::storage::{Buf, Storage};

/// The smallest piece of a larger write that is looked at for itself, in bytes: below that, what a
/// hole saves is not worth cutting the write into several.
const PIECE: u64 = 64 << 10;

/// What becomes of a guest's discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discards {
    /// They are accepted and do nothing, and write-zeroes keeps the host's space.
    Ignore,
    /// The host gets its space back.
    #[default]
    Unmap,
}

/// What becomes of a guest's writes of nothing but zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Writes are not looked at.
    #[default]
    Off,
    /// They become write-zeroes that keep the host's space.
    On,
    /// They become write-zeroes that give the host's space back.
    Unmap,
}

/// The operator's choices of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// What becomes of discards.
    pub discards: Discards,
    /// What becomes of writes of zeros.
    pub detect_zeroes: DetectZeroes,
}

impl Policy {
    /// Refuses choices that contradict each other, as QEMU does.
    ///
    /// # Errors
    /// Refused when zeros shall give space back that discards must keep.
    pub fn check(self) -> Result<Self> {
        if self.discards == Discards::Ignore && self.detect_zeroes == DetectZeroes::Unmap {
            let why = "--detect-zeroes unmap gives space back, which --discard ignore forbids; \
                       use --detect-zeroes on";
            return Err(Error::refused("arguments", why));
        }
        Ok(self)
    }

    /// Whether the guest may give the host's space back.
    pub fn unmaps(self) -> bool {
        self.discards == Discards::Unmap
    }

    /// Whether writes are looked at, and if so, whether their zeros give space back.
    pub(super) fn looks_for_zeros(self) -> Option<bool> {
        match self.detect_zeroes {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(false),
            DetectZeroes::Unmap => Some(true),
        }
    }
}

/// A part of a write, from `offset` on in its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    offset: u64,
    len: u64,
    zero: bool,
}

impl Image {
    /// Writes `buf` at `at`, its zeros as write-zeroes: all of it, or else the whole units inside.
    ///
    /// The guest may change its memory after the look. Then it finds zeros, which is what was there
    /// at some moment of the write, as with a device that reads the memory early.
    pub(super) async fn write_sparse(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: &Buf,
        unmap: bool,
    ) -> Result<()> {
        let len = buf.len() as u64;
        if buf.is_zero(0, buf.len()) {
            return self.write_zeroes(st, at, len, unmap).await;
        }
        let unit = self.discard_granularity().max(PIECE);
        let index = |value: u64| usize::try_from(value).expect("inside a buffer");
        for part in parts(at, len, unit, |from, len| buf.is_zero(index(from), index(len))) {
            let here = at + part.offset;
            if part.zero {
                self.write_zeroes(st, here, part.len, unmap).await?;
            } else {
                let bytes = super::part(buf, index(part.offset), part.len);
                self.write_mode(st, here, &bytes, self.compress).await?;
            }
        }
        Ok(())
    }
}

/// Cuts a write of `len` bytes at `at` where whole aligned units begin or end to be zeros.
fn parts(
    at: GuestOffset,
    len: u64,
    unit: u64,
    mut is_zero: impl FnMut(u64, u64) -> bool,
) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut offset = 0;
    while offset < len {
        let to_boundary = unit - (at.0 + offset) % unit;
        let piece = to_boundary.min(len - offset);
        let zero = piece == unit && is_zero(offset, piece);
        match parts.last_mut() {
            Some(last) if last.zero == zero => last.len += piece,
            _ => parts.push(Part { offset, len: piece, zero }),
        }
        offset += piece;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_units_of_zeros_are_cut_out() {
        // Units of 8 bytes; the write begins at 5. Everything is zeros but byte 20 of the disk.
        let zero = |offset: u64, len: u64| !(offset..offset + len).contains(&15);
        let part = |offset, len, zero| Part { offset, len, zero };
        assert_eq!(
            parts(GuestOffset(5), 30, 8, zero),
            [part(0, 3, false), part(3, 8, true), part(11, 8, false), part(19, 8, true)]
                .into_iter()
                .chain([part(27, 3, false)])
                .collect::<Vec<_>>()
        );
        assert_eq!(parts(GuestOffset(8), 16, 8, |_, _| true), [part(0, 16, true)]);
        assert_eq!(parts(GuestOffset(9), 15, 8, |_, _| false), [part(0, 15, false)]);
        assert_eq!(parts(GuestOffset(1), 6, 8, |_, _| true), [part(0, 6, false)]);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for discards in [Discards::Ignore, Discards::Unmap] {
            for detect_zeroes in [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap] {
                let policy = Policy { discards, detect_zeroes };
                let wrong = discards == Discards::Ignore && detect_zeroes == DetectZeroes::Unmap;
                assert_eq!(policy.check().is_err(), wrong, "{policy:?}");
            }
        }
        assert_eq!(Policy::default().looks_for_zeros(), None);
    }
}
