//! The table of internal snapshots ("Snapshots" in the specification).
//!
//! Entries are kept as the bytes they were read from, so that extra data nobody here knows, and
//! the size of the virtual machine's state, survive every change of the table.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::bytes::{HostOffset, be16, be32, be64};
use crate::error::CorruptKind;

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most bytes of extra data in one entry.
const EXTRA_LIMIT: u32 = 1024;
/// Bytes of extra data in an entry of ours: state size, disk size, instruction count.
const EXTRA_WRITTEN: u32 = 24;
/// Largest table in bytes that is read.
pub(in crate::qcow2) const TABLE_LIMIT: u64 = 64 << 20;

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
    /// The rest of that time in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the virtual machine had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of virtual machine state.
    pub vm_state_size: u64,
    /// The disk's size in bytes when it was taken, where recorded.
    pub disk_size: Option<u64>,
    /// Instructions executed until then, where recorded.
    pub icount: Option<u64>,
    /// The entry as it is in the file, without the padding behind it.
    pub(super) bytes: Vec<u8>,
}

/// What a parse of the first bytes of a table gives.
pub(in crate::qcow2) enum Parsed {
    /// All entries, and how many bytes they take.
    All(Vec<Snapshot>, u64),
    /// The bytes end inside an entry.
    NeedMore,
}

/// Parses `count` entries from the first bytes of a table.
///
/// # Errors
/// When an entry is malformed; the number of the entry.
pub(in crate::qcow2) fn parse(bytes: &[u8], count: u32) -> Result<Parsed, CorruptKind> {
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

/// The bytes of a table with these entries.
pub(super) fn serialise(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        bytes.extend_from_slice(&snapshot.bytes);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

impl Snapshot {
    /// Makes the bytes of an entry from its other fields; names are shorter than 64 KiB and the L1
    /// table has fewer than 2^32 entries.
    pub(super) fn encode(&mut self) {
        let l1_entries = u32::try_from(self.l1_entries).unwrap_or(u32::MAX);
        let len = |text: &str| u16::try_from(text.len()).unwrap_or(u16::MAX);
        let state = u32::try_from(self.vm_state_size).unwrap_or(0);
        let mut bytes = Vec::new();
        bytes.extend(self.l1_at.0.to_be_bytes());
        bytes.extend(l1_entries.to_be_bytes());
        bytes.extend(len(&self.id).to_be_bytes());
        bytes.extend(len(&self.name).to_be_bytes());
        bytes.extend(self.date_seconds.to_be_bytes());
        bytes.extend(self.date_nanoseconds.to_be_bytes());
        bytes.extend(self.vm_clock_nanoseconds.to_be_bytes());
        bytes.extend(state.to_be_bytes());
        bytes.extend(EXTRA_WRITTEN.to_be_bytes());
        bytes.extend(self.vm_state_size.to_be_bytes());
        bytes.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        bytes.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.name.as_bytes());
        self.bytes = bytes;
    }
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
        date_nanoseconds: half(20),
        vm_clock_nanoseconds: word(24),
        vm_state_size: be64(extra, 0).unwrap_or_else(|| u64::from(half(32))),
        disk_size: be64(extra, 8),
        // All ones say that instructions were not counted.
        icount: be64(extra, 16).filter(|&icount| icount != u64::MAX),
        bytes: bytes.get(..end).unwrap_or_default().to_vec(),
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
    fn entries_survive_with_extra_data_that_nobody_knows() {
        let mut bytes = table();
        // Sixteen more bytes of extra data, between the known ones and the names.
        bytes.splice(56..56, (1..17).collect::<Vec<u8>>());
        bytes[39] = 32;
        let whole = [table(), bytes, table()].concat();
        let Ok(Parsed::All(mut snapshots, _)) = parse(&whole, 3) else { panic!("three entries") };
        assert_eq!(serialise(&snapshots), whole);
        assert_eq!(snapshots[1].icount, Some(0x0102_0304_0506_0708));
        snapshots.remove(0);
        assert_eq!(serialise(&snapshots), whole[table().len()..]);
    }

    #[test]
    fn an_entry_of_ours_reads_back() {
        let Ok(Parsed::All(mut snapshots, _)) = parse(&table(), 1) else { panic!("an entry") };
        let mut made = snapshots.remove(0);
        made.icount = Some(9);
        made.vm_clock_nanoseconds = 1 << 40;
        made.date_nanoseconds = 77;
        made.name = "Käse".to_owned();
        made.encode();
        let bytes = serialise(std::slice::from_ref(&made));
        let Ok(Parsed::All(read, len)) = parse(&bytes, 1) else { panic!("an entry") };
        assert_eq!((read, len), (vec![made], bytes.len() as u64));
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
