//! The bitmaps extension of the header, the bitmap directory, and bitmap tables, parsed and
//! checked ("Bitmaps extension" and "Bitmaps" in the specification).

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::HashSet;

use crate::bytes::{HostOffset, be16, be32, be64};
use crate::error::CorruptKind;
use crate::qcow2::bitmap::BitmapFacts;
use crate::qcow2::format::OFFSET_MASK;

/// Bytes of the extension.
const EXTENSION_LENGTH: usize = 24;
/// Most bitmaps an image may have.
pub(super) const COUNT_LIMIT: u32 = 65535;
/// Largest directory in bytes that is read.
pub(super) const DIRECTORY_LIMIT: u64 = 64 << 20;
/// Bytes of a directory entry before its extra data and its name.
const FIXED: usize = 24;
/// Longest name of a bitmap in bytes.
pub(super) const NAME_LIMIT: usize = 1023;
/// The type of bitmaps that say which parts of the disk were written.
const DIRTY_TRACKING: u8 = 1;
/// Bits of a table entry that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// Flag: what the image holds of the bitmap is not to be trusted.
pub(super) const IN_USE: u32 = 1;
/// Flag: the bitmap is enabled, every change of the disk shall be in it.
const AUTO: u32 = 1 << 1;
/// Flag: the bitmap can be used without understanding its extra data.
const EXTRA_COMPATIBLE: u32 = 1 << 2;

/// Where the bitmap directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: HostOffset,
    pub(super) len: u64,
    count: u32,
}

/// Parses the extension's bytes; an image has one at most.
///
/// # Errors
/// When its fields contradict the specification or exceed what is read.
pub(super) fn place(extensions: &[Vec<u8>], cluster: u64) -> Result<Place, CorruptKind> {
    let wrong = CorruptKind::BitmapsExtension;
    let [bytes] = extensions else { return Err(wrong("there are several")) };
    if bytes.len() != EXTENSION_LENGTH {
        return Err(wrong("it does not have 24 bytes"));
    }
    let short = wrong("it ends early");
    let count = be32(bytes, 0).ok_or(short)?;
    let reserved = be32(bytes, 4).ok_or(short)?;
    let len = be64(bytes, 8).ok_or(short)?;
    let at = HostOffset(be64(bytes, 16).ok_or(short)?);
    if reserved != 0 {
        return Err(wrong("its reserved bytes are not zero"));
    }
    if count == 0 || count > COUNT_LIMIT {
        return Err(wrong("the number of bitmaps is not between 1 and 65535"));
    }
    if len < u64::from(count).saturating_mul(32) {
        return Err(wrong("the directory is too small for so many bitmaps"));
    }
    if len > DIRECTORY_LIMIT {
        return Err(wrong("the directory is larger than 64 MiB"));
    }
    if at.0 == 0 || at.within(cluster) != 0 {
        return Err(wrong("the directory is not aligned to a cluster"));
    }
    Ok(Place { at, len, count })
}

/// One entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where the entry starts in the directory.
    pub(super) start: usize,
    pub(super) table_at: HostOffset,
    pub(super) table_entries: u64,
    pub(super) granularity_bits: u32,
    /// The name, in a form that can be shown.
    pub(super) name: String,
    /// The name is not as it is stored, which is no UTF-8.
    pub(super) renamed: bool,
    flags: u32,
    kind: u8,
    extra: usize,
}

impl Entry {
    /// Whether the bitmap is enabled and can be trusted, so that a write makes it stale.
    pub(super) fn is_live(&self) -> bool {
        self.flags & AUTO != 0 && self.flags & IN_USE == 0
    }

    /// What there is to tell of the bitmap.
    pub(super) fn facts(&self) -> BitmapFacts {
        BitmapFacts {
            name: self.name.clone(),
            granularity: 1_u64.checked_shl(self.granularity_bits).unwrap_or(u64::MAX),
            in_use: self.flags & IN_USE != 0,
            auto: self.flags & AUTO != 0,
            obstacle: self.obstacle(),
        }
    }

    /// Why changes cannot be recorded in the bitmap, if so.
    pub(super) fn obstacle(&self) -> Option<&'static str> {
        if self.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            Some("it has flags that are not known")
        } else if self.kind != DIRTY_TRACKING {
            Some("its type is not known")
        } else if self.extra > 0 && self.flags & EXTRA_COMPATIBLE == 0 {
            Some("it has extra data that is not known")
        } else {
            None
        }
    }
}

/// Parses the whole directory.
///
/// # Errors
/// When an entry is malformed, or the entries do not fill the directory.
pub(super) fn parse(bytes: &[u8], place: Place) -> Result<Vec<Entry>, CorruptKind> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut start = 0_usize;
    for number in 0..place.count {
        let wrong = |what| CorruptKind::Bitmap { number, what };
        let rest = bytes.get(start..).ok_or(wrong("the directory ends early"))?;
        let (entry, name, len) = entry(rest, start).map_err(wrong)?;
        if !names.insert(name) {
            return Err(wrong("another bitmap has the same name"));
        }
        entries.push(entry);
        start = start.checked_add(len).ok_or(wrong("the entry is too long"))?;
    }
    if start != bytes.len() {
        return Err(CorruptKind::BitmapsExtension("the directory is longer than its entries"));
    }
    Ok(entries)
}

/// The entry that `bytes` start with, its name as stored, and its length with padding.
fn entry(bytes: &[u8], start: usize) -> Result<(Entry, &[u8], usize), &'static str> {
    const SHORT: &str = "the directory ends early";
    let half = |at| be32(bytes, at).ok_or(SHORT);
    let extra = usize::try_from(half(20)?).map_err(|_| SHORT)?;
    let name_len = be16(bytes, 18).map(usize::from).ok_or(SHORT)?;
    let kind = bytes.get(16).copied().ok_or(SHORT)?;
    let granularity_bits = bytes.get(17).copied().map(u32::from).ok_or(SHORT)?;
    let name_at = FIXED.checked_add(extra).ok_or(SHORT)?;
    let end = name_at.checked_add(name_len).ok_or(SHORT)?;
    let name = bytes.get(name_at..end).ok_or(SHORT)?;
    let len = end.checked_next_multiple_of(8).filter(|&len| len <= bytes.len()).ok_or(SHORT)?;
    if name.is_empty() || name.len() > NAME_LIMIT {
        return Err("the name does not have 1 to 1023 bytes");
    }
    if granularity_bits > 63 {
        return Err("the granularity is over 63 bits");
    }
    let entry = Entry {
        start,
        table_at: HostOffset(be64(bytes, 0).ok_or(SHORT)?),
        table_entries: u64::from(half(8)?),
        granularity_bits,
        name: String::from_utf8_lossy(name).into_owned(),
        renamed: std::str::from_utf8(name).is_err(),
        flags: half(12)?,
        kind,
        extra,
    };
    Ok((entry, name, len))
}

/// Sets or clears IN_USE in the entry at `start`, whose bytes were parsed before.
pub(super) fn set_in_use(directory: &mut [u8], start: usize, in_use: bool) {
    let at = start.saturating_add(12);
    let old = be32(directory, at).unwrap_or_default();
    let new = if in_use { old | IN_USE } else { old & !IN_USE };
    put(directory, at, &new.to_be_bytes());
}

/// Says where the table of the entry at `start` lies.
pub(super) fn set_table(directory: &mut [u8], start: usize, at: HostOffset) {
    put(directory, start, &at.0.to_be_bytes());
}

/// Says whether changes are recorded in the bitmap whose entry is given.
pub(super) fn set_enabled(entry: &mut [u8], enabled: bool) {
    let old = be32(entry, 12).unwrap_or_default();
    let new = if enabled { old | AUTO } else { old & !AUTO };
    put(entry, 12, &new.to_be_bytes());
}

/// The bytes of an entry of a new, enabled bitmap whose table has so many entries and no place yet,
/// and what they say. The name has 1 to 1023 bytes.
///
/// # Errors
/// When the table is larger than an entry can say.
pub(super) fn new_entry(
    name: &str,
    granularity_bits: u32,
    table_entries: u64,
) -> Result<(Vec<u8>, Entry), CorruptKind> {
    let wrong = |what| CorruptKind::Bitmap { number: 0, what };
    let entries = u32::try_from(table_entries).map_err(|_| wrong("the table is too large"))?;
    let name_len = u16::try_from(name.len()).map_err(|_| wrong("the name is too long"))?;
    let bits = u8::try_from(granularity_bits).map_err(|_| wrong("the granularity is too large"))?;
    let mut bytes = vec![0; 8];
    bytes.extend(entries.to_be_bytes());
    bytes.extend(AUTO.to_be_bytes());
    bytes.extend([DIRTY_TRACKING, bits]);
    bytes.extend(name_len.to_be_bytes());
    // No extra data.
    bytes.extend([0; 4]);
    bytes.extend(name.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let (parsed, _, _) = entry(&bytes, 0).map_err(wrong)?;
    Ok((bytes, parsed))
}

/// The bytes of the extension that names a directory.
pub(super) fn extension(count: u32, len: u64, at: HostOffset) -> Vec<u8> {
    let mut bytes = count.to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(len.to_be_bytes());
    bytes.extend(at.0.to_be_bytes());
    bytes
}

fn put(directory: &mut [u8], at: usize, field: &[u8]) {
    let target = directory.get_mut(at..at.saturating_add(field.len()));
    target.expect("the entry was parsed").copy_from_slice(field);
}

/// What an entry of a bitmap table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A cluster of zeros.
    Zeros,
    /// A cluster of ones.
    Ones,
    /// A cluster of the file.
    At(HostOffset),
}

impl Part {
    /// Reads entry number `index` of a table.
    ///
    /// # Errors
    /// When reserved bits are set, or the offset is not that of a cluster.
    pub(super) fn parse(entry: u64, index: u64, cluster: u64) -> Result<Self, CorruptKind> {
        let at = HostOffset(entry & OFFSET_MASK);
        let low = entry & 1;
        if entry & TABLE_RESERVED != 0 || at.within(cluster) != 0 || (at.0 != 0 && low != 0) {
            return Err(CorruptKind::BitmapTableEntry { index, entry });
        }
        Ok(match (at.0, low) {
            (0, 0) => Self::Zeros,
            (0, _) => Self::Ones,
            _ => Self::At(at),
        })
    }

    /// The entry that says this.
    pub(super) fn entry(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::At(at) => at.0,
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
