//! Offsets as types, rounding, and big-endian words.

use std::fmt;
use std::ops::{Add, Sub};

macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The largest multiple of `unit` (a power of two) that is not above this offset.
            #[must_use]
            pub const fn round_down(self, unit: u64) -> Self {
                Self(round_down(self.0, unit))
            }

            /// Bytes from the last multiple of `unit` (a power of two) to this offset.
            #[must_use]
            pub const fn within(self, unit: u64) -> u64 {
                self.0 & (unit - 1)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl Sub for $name {
            type Output = u64;
            fn sub(self, earlier: Self) -> u64 {
                self.0 - earlier.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset_type! {
    /// A byte offset on the disk that the guest sees.
    GuestOffset
}
offset_type! {
    /// A byte offset in a file of the host.
    HostOffset
}

/// The largest multiple of `unit` (a power of two) that is not above `value`.
#[must_use]
pub const fn round_down(value: u64, unit: u64) -> u64 {
    value & !(unit - 1)
}

/// The smallest multiple of `unit` (a power of two) that is not below `value`; saturates at the
/// largest multiple that fits.
#[must_use]
pub const fn round_up(value: u64, unit: u64) -> u64 {
    match value.checked_add(unit - 1) {
        Some(sum) => round_down(sum, unit),
        None => round_down(u64::MAX, unit),
    }
}

/// The big-endian `u64` at byte `at`, if the slice reaches that far.
#[must_use]
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(word.try_into().ok()?))
}

/// The big-endian `u32` at byte `at`, if the slice reaches that far.
#[must_use]
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(word.try_into().ok()?))
}

/// The big-endian `u16` at byte `at`, if the slice reaches that far.
#[must_use]
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(word.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_meets_the_edges() {
        assert_eq!(round_up(0, 512), 0);
        assert_eq!(round_up(1, 512), 512);
        assert_eq!(round_up(512, 512), 512);
        assert_eq!(round_up(u64::MAX, 512), u64::MAX - 511);
        assert_eq!(round_down(1023, 512), 512);
        assert_eq!(GuestOffset(65537).within(65536), 1);
    }

    #[test]
    fn words_outside_the_slice_are_none() {
        assert_eq!(be32(&[0, 0, 1, 2], 0), Some(0x102));
        assert_eq!(be32(&[0, 0, 1, 2], 1), None);
        assert_eq!(be64(&[0; 8], usize::MAX), None);
    }
}
