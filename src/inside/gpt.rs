//! GUID partition tables, by the gptman crate. What it takes on trust is checked here before.

use std::io::{Seek, SeekFrom};

use gptman::{GPT, GPTHeader, GPTPartitionEntry};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::image::blocking::{Disk, View};
use crate::inside::damaged;
use crate::inside::edit::Planned;
use crate::inside::source::Source;
use crate::inside::table::{Kind, Label, Partition, Table};

/// Most entries of a table. The specification has at least 128; tools make no more than this.
const MOST_ENTRIES: u32 = 4096;
/// The size of an entry in bytes: others are allowed, and were never seen.
const ENTRY: u32 = 128;
const SIGNATURE: &[u8; 8] = b"EFI PART";

/// The GPT of the disk, if it has one: its first copy, or the last one if that is damaged.
pub(super) fn read(source: &mut Source) -> Result<Option<Table>> {
    let failed = |error| Error::io("reading the partition table", error);
    let mut wrong = None;
    for sector_size in [512, 4096] {
        let sectors = source.len() / sector_size;
        let places = [(1, false), (sectors.saturating_sub(1), true)];
        for (place, from_backup) in places.into_iter().filter(|(place, _)| *place < sectors) {
            let at = place * sector_size;
            if source.peek::<8>(at).map_err(failed)? != *SIGNATURE {
                continue;
            }
            match read_at(source, at, sector_size, from_backup) {
                Ok(table) => return Ok(Some(table)),
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
    }
    wrong.map_or(Ok(None), Err)
}

fn read_at(source: &mut Source, at: u64, sector_size: u64, from_backup: bool) -> Result<Table> {
    let wrong = |why: String| damaged("partition table (GPT)", why);
    let of_crate = |error: gptman::Error| wrong(error.to_string());
    let failed = |error| Error::io("reading the partition table", error);
    source.seek(SeekFrom::Start(at)).map_err(failed)?;
    let header = GPTHeader::read_from(source).map_err(of_crate)?;
    let (count, entry) = (header.number_of_partition_entries, header.size_of_partition_entry);
    if count > MOST_ENTRIES || entry != ENTRY {
        let why =
            format!("{count} entries of {entry} bytes; up to {MOST_ENTRIES} of {ENTRY} are read");
        return Err(wrong(why));
    }
    let array = u64::from(count) * u64::from(entry);
    let first = header.partition_entry_lba.checked_mul(sector_size);
    if first.and_then(|first| first.checked_add(array)).is_none_or(|end| end > source.len()) {
        return Err(wrong("its entries lie beyond the disk".to_owned()));
    }
    let entries = header.read_partitions(source, sector_size).map_err(of_crate)?;
    let used = (1..).zip(&entries).filter(|(_, entry)| entry.is_used());
    let partitions: Option<Vec<_>> =
        used.map(|(number, entry)| partition(number, entry, sector_size)).collect();
    let bytes = |sector: u64| sector.checked_mul(sector_size);
    let last = header.last_usable_lba.checked_add(1).and_then(bytes);
    Ok(Table {
        label: Label::Gpt,
        id: Uuid::from_bytes_le(header.disk_guid).to_string(),
        sector_size,
        usable: bytes(header.first_usable_lba).zip(last.and_then(|last| last.checked_sub(1))),
        from_backup,
        partitions: partitions
            .ok_or_else(|| wrong("a partition ends before it begins, or is too large".into()))?,
    })
}

fn partition(number: u32, entry: &GPTPartitionEntry, sector_size: u64) -> Option<Partition> {
    let sectors = entry.ending_lba.checked_sub(entry.starting_lba)?.checked_add(1)?;
    let (start, size) =
        (entry.starting_lba.checked_mul(sector_size)?, sectors.checked_mul(sector_size)?);
    start.checked_add(size)?;
    Some(Partition {
        number,
        start,
        size,
        kind: Kind::Guid(Uuid::from_bytes_le(entry.partition_type_guid)),
        guid: Some(Uuid::from_bytes_le(entry.unique_partition_guid)),
        name: Some(entry.partition_name.as_str().to_owned()).filter(|name| !name.is_empty()),
        attributes: entry.attribute_bits,
        bootable: false,
    })
}

/// The first and the last byte that a new table leaves for partitions.
pub(super) fn usable(disk_size: u64, sector_size: u64) -> Option<(u64, u64)> {
    // The table takes 128 entries of 128 bytes, its header a sector, and all of it is there twice;
    // before the first copy lies the MBR.
    let array = (128 * u64::from(ENTRY)).div_ceil(sector_size);
    let sectors = disk_size / sector_size;
    let (first, last) = (2 + array, sectors.checked_sub(array + 2)?);
    (first < last).then(|| (first * sector_size, (last + 1) * sector_size - 1))
}

/// Writes a table with both copies and a protective MBR. The caller has checked the places.
pub(super) fn write(disk: &Disk, sector_size: u64, planned: &[Planned]) -> Result<()> {
    let wrong = |error: gptman::Error| damaged("writing the partition table", error.to_string());
    let mut view = View::new(disk, 0, disk.size())?;
    let guid = Uuid::new_v4().to_bytes_le();
    let mut table = GPT::new_from(&mut view, sector_size, guid).map_err(wrong)?;
    for one in planned {
        let Kind::Guid(kind) = one.kind else {
            return Err(Error::refused("partition table", "a GPT has GUIDs as types"));
        };
        table[one.number] = GPTPartitionEntry {
            partition_type_guid: kind.to_bytes_le(),
            unique_partition_guid: one.guid.unwrap_or_else(Uuid::new_v4).to_bytes_le(),
            starting_lba: one.start / sector_size,
            ending_lba: (one.start + one.size) / sector_size - 1,
            attribute_bits: if one.bootable { 1 << 2 } else { 0 },
            partition_name: one.name.as_deref().unwrap_or("").into(),
        };
    }
    table.write_into(&mut view).map_err(wrong)?;
    GPT::write_protective_mbr_into(&mut view, sector_size).map_err(wrong)
}
