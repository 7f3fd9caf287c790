//! The partition table in the master boot record. Four entries of 16 bytes, and a list of further
//! sectors of the same form for logical partitions: less than a crate for it would bring along.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::error::{Error, Result};
use crate::image::blocking::Disk;
use crate::inside::damaged;
use crate::inside::edit::Planned;
use crate::inside::source::Source;
use crate::inside::table::{Kind, Label, Partition, Table};

/// The unit of the table: an MBR on disks with larger sectors counts in those, but such disks have
/// a GPT.
pub(super) const SECTOR: u64 = 512;
/// Where the entries begin.
const ENTRIES: usize = 446;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the entry that keeps tools which know no GPT from a disk that has one.
const PROTECTIVE: u8 = 0xee;
/// Most logical partitions; a list that is longer leads round in a circle.
const MOST_LOGICAL: usize = 128;

/// Whether a type is that of an extended partition.
pub(super) fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// One entry, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    bootable: bool,
    kind: u8,
    start: u64,
    sectors: u64,
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let end = at.checked_add(4)?;
    let bytes: [u8; 4] = bytes.get(at..end)?.try_into().ok()?;
    Some(u64::from(u32::from_le_bytes(bytes)))
}

/// The entries of a sector, used or not; nothing when it has no signature.
fn entries(sector: &[u8; 512]) -> Option<Vec<Entry>> {
    let (table, signature) = (sector.get(ENTRIES..510)?, sector.get(510..)?);
    if signature != SIGNATURE {
        return None;
    }
    let entry = |bytes: &[u8]| {
        Some(Entry {
            bootable: *bytes.first()? == 0x80,
            kind: *bytes.get(4)?,
            start: word(bytes, 8)?,
            sectors: word(bytes, 12)?,
        })
    };
    table.chunks_exact(16).map(entry).collect()
}

/// Whether the sector is one with partitions, and not the start of a file system that has the same
/// signature: there the table's place is code or text, and flags are no flags.
fn is_table(sector: &[u8; 512], entries: &[Entry]) -> bool {
    let flags = sector.get(ENTRIES..510).unwrap_or_default().chunks_exact(16);
    let flags_are_flags = flags.filter_map(<[u8]>::first).all(|flag| matches!(flag, 0x00 | 0x80));
    flags_are_flags
        && entries.iter().any(|entry| entry.kind != 0)
        && entries.iter().all(|entry| entry.kind == 0 || entry.sectors != 0)
}

fn partition(number: u32, entry: Entry) -> Partition {
    Partition {
        number,
        start: entry.start.saturating_mul(SECTOR),
        size: entry.sectors.saturating_mul(SECTOR),
        kind: Kind::Mbr(entry.kind),
        guid: None,
        name: None,
        attributes: 0,
        bootable: entry.bootable,
    }
}

/// The table of a disk whose first sector is `first`, if it has one.
pub(super) fn read(source: &mut Source, first: &[u8; 512]) -> Result<Option<Table>> {
    let Some(found) = entries(first).filter(|found| is_table(first, found)) else {
        return Ok(None);
    };
    if found.iter().all(|entry| matches!(entry.kind, 0 | PROTECTIVE)) {
        let why = "the disk's MBR says that it has a GPT, and neither copy of that is there";
        return Err(damaged("partition table", why));
    }
    let used = (1..).zip(&found).filter(|(_, entry)| entry.kind != 0);
    let mut partitions: Vec<_> = used.map(|(number, entry)| partition(number, *entry)).collect();
    if let Some(extended) = found.iter().find(|entry| is_extended(entry.kind)) {
        for (number, entry) in (5..).zip(logical(source, *extended)?) {
            partitions.push(partition(number, entry));
        }
    }
    Ok(Some(Table {
        label: Label::Mbr,
        id: format!("0x{:08x}", word(first, 440).unwrap_or_default()),
        sector_size: SECTOR,
        usable: None,
        from_backup: false,
        partitions,
    }))
}

/// The logical partitions inside `extended`, in sectors of the disk.
fn logical(source: &mut Source, extended: Entry) -> Result<Vec<Entry>> {
    let wrong = |why: String| damaged("extended partition", why);
    let mut found = Vec::new();
    let mut place = extended.start;
    for _ in 0..MOST_LOGICAL {
        let at = place.saturating_mul(SECTOR);
        if at >= source.len() {
            return Err(wrong(format!("its list leads to sector {place}, beyond the disk")));
        }
        let sector = source.peek(at).map_err(|error| Error::io("reading the partitions", error))?;
        // An extended partition without any logical ones may have nothing at its start.
        let Some(entries) = entries(&sector) else { return Ok(found) };
        let mut entries = entries.into_iter();
        let (own, next) = (entries.next(), entries.next());
        if let Some(own) = own.filter(|own| own.kind != 0 && own.sectors != 0) {
            // A partition is counted from its own sector, the next sector from the first one.
            found.push(Entry { start: own.start.saturating_add(place), ..own });
        }
        match next.filter(|next| is_extended(next.kind) && next.start != 0) {
            Some(next) => place = extended.start.saturating_add(next.start),
            None => return Ok(found),
        }
    }
    Err(wrong(format!("more than {MOST_LOGICAL} logical partitions, or a list without an end")))
}

/// The 16 bytes of an entry. Its cylinders and heads say "too large for me", as on all disks of
/// today.
fn encode(kind: u8, bootable: bool, start: u64, size: u64) -> Result<[u8; 16]> {
    let sectors = |bytes: u64| {
        let sectors = bytes.checked_div(SECTOR).and_then(|sectors| u32::try_from(sectors).ok());
        sectors.map(u32::to_le_bytes).ok_or_else(|| {
            let why = "an MBR reaches 2 TiB; make a GPT (--create gpt)";
            Error::refused("partition table", why)
        })
    };
    const FAR: [u8; 3] = [0xfe, 0xff, 0xff];
    let mut entry = Vec::with_capacity(16);
    entry.push(if bootable { 0x80 } else { 0 });
    entry.extend(FAR);
    entry.push(kind);
    entry.extend(FAR);
    entry.extend(sectors(start)?);
    entry.extend(sectors(size)?);
    entry.try_into().map_err(|_| damaged("partition table", "an entry of another length"))
}

/// A sector with up to four entries, and what was in it before in front of them.
fn sector(before: &[u8], entries: &[[u8; 16]]) -> Vec<u8> {
    let mut bytes = before.to_vec();
    bytes.resize(ENTRIES, 0);
    bytes.extend(entries.iter().flatten());
    bytes.resize(510, 0);
    bytes.extend(SIGNATURE);
    bytes
}

/// Writes a table. Boot code that is there stays; the disk gets a new signature. The caller has
/// checked the places, and that there is room for the sector of each logical partition.
pub(super) fn write(disk: &Disk, planned: &[Planned], signature: u32) -> Result<()> {
    let mut code = [0; 440];
    disk.read_at(0, &mut code)?;
    let mut before = code.to_vec();
    before.extend(signature.to_le_bytes());
    let mut entries = [[0; 16]; 4];
    for (entry, number) in entries.iter_mut().zip(1..) {
        if let Some(one) = planned.iter().find(|one| one.number == number) {
            *entry = encode_planned(one, one.start)?;
        }
    }
    // From the last sector to the first: the table leads nowhere that is not yet written.
    let extended = planned.iter().find(|one| one.is_extended());
    let logical: Vec<_> = planned.iter().filter(|one| one.number > 4).collect();
    for (index, one) in logical.iter().enumerate().rev() {
        let place = one.start.saturating_sub(one.before);
        let mut list = vec![encode_planned(one, one.before)?];
        let next = index.checked_add(1).and_then(|next| logical.get(next));
        if let (Some(next), Some(extended)) = (next, extended) {
            let there = next.start.saturating_sub(next.before);
            let (start, size) =
                (there.saturating_sub(extended.start), next.size.saturating_add(next.before));
            list.push(encode(0x05, false, start, size)?);
        }
        disk.write_at(place, &sector(&[], &list))?;
    }
    if let (Some(extended), true) = (extended, logical.is_empty()) {
        disk.write_at(extended.start, &sector(&[], &[]))?;
    }
    disk.write_at(0, &sector(&before, &entries))
}

fn encode_planned(one: &Planned, start: u64) -> Result<[u8; 16]> {
    let Kind::Mbr(kind) = one.kind else {
        return Err(Error::refused("partition table", "an MBR has numbers as types"));
    };
    encode(kind, one.bootable, start, one.size)
}
