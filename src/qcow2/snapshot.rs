//! The table of internal snapshots ("Snapshots" in the specification).
//!
//! Serving a disk needs it only to keep guest data away from what the snapshots own; the table
//! itself is never changed while a guest is attached.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::bytes::{HostOffset, be16, be32, be64};
use crate::error::CorruptKind;

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most bytes of extra data in one entry.
const EXTRA_LIMIT: u32 = 1024;
/// Largest table in bytes that is read.
pub(super) const TABLE_LIMIT: u64 = 64 << 20;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the snapshot's L1 table lies.
    pub l1_at: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u64,
    /// Its unique number as a string.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date_seconds: u32,
    /// Bytes of virtual machine state.
    pub vm_state_size: u64,
    /// The disk's size in bytes when it was taken, where recorded.
    pub disk_size: Option<u64>,
}

/// What a parse of the first bytes of a table gives.
pub(super) enum Parsed {
    /// All entries, and how many bytes they take.
    All(Vec<Snapshot>, u64),
    /// The bytes end inside an entry.
    NeedMore,
}

/// Parses `count` entries from the first bytes of a table.
///
/// # Errors
/// When an entry is malformed; the number of the entry.
pub(super) fn parse(bytes: &[u8], count: u32) -> Result<Parsed, CorruptKind> {
    let mut snapshots = Vec::new();
    let mut at = 0_usize;
    for number in 0..count {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some((snapshot, len)) = entry(rest, number)? else { return Ok(Parsed::NeedMore) };
        snapshots.push(snapshot);
        at = at.saturating_add(len).next_multiple_of(8);
    }
    Ok(Parsed::All(snapshots, u64::try_from(at).unwrap_or(u64::MAX)))
}

fn entry(bytes: &[u8], number: u32) -> Result<Option<(Snapshot, usize)>, CorruptKind> {
    let Some(extra_len) = be32(bytes, 36) else { return Ok(None) };
    if extra_len > EXTRA_LIMIT {
        return Err(CorruptKind::Snapshot(number));
    }
    let size = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
    let short = |at| be16(bytes, at).map(usize::from).unwrap_or_default();
    let id_at = FIXED.saturating_add(size(extra_len));
    let name_at = id_at.saturating_add(short(12));
    let end = name_at.saturating_add(short(14));
    let parts = (bytes.get(FIXED..id_at), bytes.get(id_at..name_at), bytes.get(name_at..end));
    let (Some(extra), Some(id), Some(name)) = parts else { return Ok(None) };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let word = |at| be64(bytes, at).unwrap_or_default();
    let half = |at| be32(bytes, at).unwrap_or_default();
    let snapshot = Snapshot {
        l1_at: HostOffset(word(0)),
        l1_entries: u64::from(half(8)),
        id: text(id),
        name: text(name),
        date_seconds: half(16),
        vm_state_size: be64(extra, 0).unwrap_or_else(|| u64::from(half(32))),
        disk_size: be64(extra, 8),
    };
    Ok(Some((snapshot, end)))
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, clippy::as_conversions, reason = "a panic fails the test")]
mod tests {
    use super::*;

    fn table() -> Vec<u8> {
        let mut bytes = vec![0; FIXED];
        bytes[0..8].copy_from_slice(&0x5_0000_u64.to_be_bytes());
        bytes[11] = 7;
        bytes[13] = 1;
        bytes[15] = 4;
        bytes[39] = 16;
        bytes.extend([0; 8]);
        bytes.extend(0x10_0000_u64.to_be_bytes());
        bytes.extend(b"1snap");
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn entries_follow_each_other_at_multiples_of_eight() {
        let bytes = table().repeat(2);
        let Ok(Parsed::All(snapshots, len)) = parse(&bytes, 2) else { panic!("two entries") };
        assert_eq!(len, bytes.len() as u64);
        assert_eq!(snapshots[1].name, "snap");
        assert_eq!(snapshots[1].l1_entries, 7);
        assert_eq!(snapshots[1].disk_size, Some(0x10_0000));
    }

    #[test]
    fn a_table_that_is_cut_off_asks_for_more_and_nonsense_is_refused() {
        let bytes = table();
        for len in 0..61 {
            assert!(matches!(parse(&bytes[..len], 1), Ok(Parsed::NeedMore)), "{len} bytes");
        }
        let mut bytes = bytes;
        bytes[37] = 1;
        assert!(matches!(parse(&bytes, 1), Err(CorruptKind::Snapshot(0))));
    }
}
