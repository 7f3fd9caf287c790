//! Making a partition table: where partitions go, and what is written.

use std::rc::Rc;

use uuid::Uuid;

pub use crate::inside::table::Label;

use crate::bytes::round_up;
use crate::error::{Error, Result};
use crate::image::blocking::Disk;
use crate::inside::source::Source;
use crate::inside::table::{Kind, read_table};
use crate::inside::{Limits, Watch, filesystem, gpt, mbr, types};

/// Partitions begin at multiples of this, in bytes: what every tool does, and no device has larger
/// blocks.
const ALIGNMENT: u64 = 1 << 20;
/// Most partitions of a GPT that is made here.
const MOST: usize = 128;
/// Most characters of a name, in units of UTF-16.
const LONGEST_NAME: usize = 36;

/// A partition that shall be.
#[derive(Debug, Clone, Default)]
pub struct NewPartition {
    /// First byte; without it, after the one before, at the next whole MiB.
    pub start: Option<u64>,
    /// Length in bytes; without it, up to the next partition that has a start, or the end.
    pub size: Option<u64>,
    /// What it is for: a name of [`types::known`], a GUID, or for an MBR a hexadecimal number.
    /// Without it, Linux.
    pub kind: Option<String>,
    /// Its name, which an MBR has no place for.
    pub name: Option<String>,
    /// Its own GUID, for a GPT; without it, a new one.
    pub guid: Option<Uuid>,
    /// Whether an old BIOS boots from it.
    pub bootable: bool,
}

/// A partition with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) number: u32,
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: Kind,
    pub(super) guid: Option<Uuid>,
    pub(super) name: Option<String>,
    pub(super) bootable: bool,
    /// How far before a logical partition the sector lies that describes it, in bytes.
    pub(super) before: u64,
}

impl Planned {
    pub(super) fn is_extended(&self) -> bool {
        matches!(self.kind, Kind::Mbr(kind) if mbr::is_extended(kind))
    }
}

fn refuse<T>(why: impl Into<Box<str>>) -> Result<T> {
    Err(Error::refused("partition table", why))
}

/// What a new table would destroy: a table that is there, or a file system on the whole disk.
///
/// # Errors
/// When the disk cannot be read. A damaged table counts as one.
pub fn occupied(disk: &Rc<Disk>) -> Result<Option<&'static str>> {
    match read_table(disk) {
        Ok(Some(table)) => return Ok(Some(table.label.name())),
        Err(_) => return Ok(Some("damaged")),
        Ok(None) => {}
    }
    let watch = Rc::new(Watch::new(Limits::default()));
    filesystem::probe(&mut Source::new(disk, 0, disk.size(), &watch)?)
}

/// Writes a new partition table with `partitions` to `disk`, numbered in their order, and makes it
/// durable. What was in an older table is lost, what is in its partitions stays where it is.
///
/// An MBR has four partitions; where there shall be more, the fourth and all after it become
/// logical ones, which begin with number 5.
///
/// # Errors
/// Refused when partitions do not fit, overlap or have what the table has no place for; and I/O
/// errors.
pub fn create_table(disk: &Rc<Disk>, label: Label, partitions: &[NewPartition]) -> Result<()> {
    let planned = plan(disk.size(), label, partitions)?;
    erase_headers(disk)?;
    match label {
        Label::Gpt => gpt::write(disk, mbr::SECTOR, &planned)?,
        Label::Mbr => {
            let (signature, ..) = Uuid::new_v4().as_fields();
            mbr::write(disk, &planned, signature)?;
        }
    }
    disk.flush()
}

/// Removes the headers of an older GPT, which would be believed more than a new MBR.
fn erase_headers(disk: &Disk) -> Result<()> {
    for sector in [512, 4096] {
        let last = (disk.size() / sector).saturating_sub(1) * sector;
        for at in [sector, last] {
            let mut bytes = [0; 8];
            if at + 8 <= disk.size() {
                disk.read_at(at, &mut bytes)?;
            }
            if &bytes == b"EFI PART" {
                disk.write_at(at, &[0; 512])?;
            }
        }
    }
    Ok(())
}

/// Gives every partition its place.
fn plan(disk_size: u64, label: Label, partitions: &[NewPartition]) -> Result<Vec<Planned>> {
    let usable = match label {
        Label::Gpt => gpt::usable(disk_size, mbr::SECTOR),
        Label::Mbr => disk_size.checked_sub(1).map(|last| (mbr::SECTOR, last)),
    };
    let Some((first, last)) = usable.filter(|(first, last)| first < last) else {
        return refuse(format!("a disk of {disk_size} bytes has no room for one"));
    };
    if partitions.len() > MOST {
        return refuse(format!("{} partitions; {MOST} is the most", partitions.len()));
    }
    // An MBR with more than four partitions keeps those from the fourth on in an extended one.
    let primary = if label == Label::Mbr && partitions.len() > 4 { 3 } else { partitions.len() };
    let mut planned = Vec::with_capacity(partitions.len() + 1);
    let mut free = first;
    for (index, new) in partitions.iter().enumerate() {
        let before = if index < primary { 0 } else { ALIGNMENT };
        let limit =
            partitions[index + 1..].iter().find_map(|later| later.start).unwrap_or(last + 1);
        let number = u32::try_from(index + if before == 0 { 1 } else { 2 }).unwrap_or(u32::MAX);
        let one = place(label, new, (number, before), (free, limit.min(last + 1)))?;
        free = one.start + one.size;
        planned.push(one);
    }
    if let Some(one) = planned.get(primary) {
        let (start, end) = (one.start - one.before, last + 1);
        planned.push(Planned {
            number: 4,
            start,
            size: (end - start) / mbr::SECTOR * mbr::SECTOR,
            kind: Kind::Mbr(0x0f),
            guid: None,
            name: None,
            bootable: false,
            before: 0,
        });
    }
    Ok(planned)
}

/// Places one partition into the bytes from `free` to `limit`.
fn place(
    label: Label,
    new: &NewPartition,
    (number, before): (u32, u64),
    (free, limit): (u64, u64),
) -> Result<Planned> {
    let aligned = free.checked_add(before).and_then(|at| at.checked_next_multiple_of(ALIGNMENT));
    let start = new.start.or(aligned).unwrap_or(u64::MAX);
    if !start.is_multiple_of(mbr::SECTOR) {
        return refuse(format!("partition {number} starts at {start}, inside a sector"));
    }
    if start.checked_sub(before).is_none_or(|first| first < free) {
        let why =
            format!("partition {number} starts at {start}, and what is before it ends at {free}");
        return refuse(if before == 0 { why } else { format!("{why}; a logical one needs 1 MiB") });
    }
    let Some(space) = limit.checked_sub(start).filter(|space| *space >= mbr::SECTOR) else {
        return refuse(format!("there is no room for partition {number}"));
    };
    let size = new.size.map_or(space / mbr::SECTOR * mbr::SECTOR, |size| {
        round_up(size.min(u64::MAX - mbr::SECTOR), mbr::SECTOR)
    });
    if size > space || size == 0 {
        return refuse(format!(
            "partition {number} has {size} bytes, and there are {space} for it"
        ));
    }
    let text = new.kind.as_deref().unwrap_or("linux");
    let kind = match label {
        Label::Gpt => types::guid(text).map(Kind::Guid),
        Label::Mbr => types::mbr(text).filter(|kind| !mbr::is_extended(*kind)).map(Kind::Mbr),
    };
    let Some(kind) = kind else {
        return refuse(format!(
            "{text:?} is no type of a partition here; `partitions --types` lists some"
        ));
    };
    if label == Label::Mbr && (new.name.is_some() || new.guid.is_some()) {
        return refuse("partitions of an MBR have neither names nor GUIDs");
    }
    let name = new.name.as_deref().unwrap_or_default();
    if name.encode_utf16().count() > LONGEST_NAME || name.contains('\0') {
        return refuse(format!("the name {name:?} has more than {LONGEST_NAME} characters"));
    }
    let (guid, name, bootable) = (new.guid, new.name.clone(), new.bootable);
    Ok(Planned { number, start, size, kind, guid, name, bootable, before })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(disk: u64, label: Label, new: &[NewPartition]) -> Result<Vec<(u32, u64, u64)>> {
        let planned = plan(disk, label, new)?;
        Ok(planned.iter().map(|one| (one.number, one.start, one.size)).collect())
    }

    fn sized(size: u64) -> NewPartition {
        NewPartition { size: Some(size), ..NewPartition::default() }
    }

    #[test]
    fn partitions_begin_at_whole_mebibytes_and_fill_the_rest() {
        const MIB: u64 = 1 << 20;
        let rest = NewPartition::default();
        let found =
            places(64 * MIB, Label::Gpt, &[sized(3 * MIB + 1), rest.clone()]).expect("fits");
        let end = 64 * MIB - 33 * 512;
        assert_eq!(found, [(1, MIB, 3 * MIB + 512), (2, 5 * MIB, end - 5 * MIB)]);
        let last = NewPartition { start: Some(32 * MIB), ..NewPartition::default() };
        let found = places(64 * MIB, Label::Mbr, &[rest, last]).expect("fits");
        assert_eq!(found, [(1, MIB, 31 * MIB), (2, 32 * MIB, 32 * MIB)]);
    }

    #[test]
    fn more_than_four_of_an_mbr_are_logical() {
        const MIB: u64 = 1 << 20;
        let found = places(64 * MIB, Label::Mbr, &[(); 5].map(|()| sized(2 * MIB))).expect("fits");
        let expected = [(1, 1, 2), (2, 3, 2), (3, 5, 2), (5, 8, 2), (6, 11, 2), (4, 7, 57)];
        assert_eq!(found, expected.map(|(number, at, size)| (number, at * MIB, size * MIB)));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        const MIB: u64 = 1 << 20;
        let at = |start| NewPartition { start: Some(start), ..NewPartition::default() };
        let kind = |kind: &str| NewPartition { kind: Some(kind.into()), ..NewPartition::default() };
        let named = NewPartition { name: Some("x".repeat(37)), ..NewPartition::default() };
        for (disk, label, new) in [
            (MIB, Label::Gpt, vec![sized(512)]),
            (4 * MIB, Label::Gpt, vec![sized(3 * MIB)]),
            (4 * MIB, Label::Gpt, vec![sized(0)]),
            (4 * MIB, Label::Gpt, vec![sized(MIB), at(MIB)]),
            (4 * MIB, Label::Gpt, vec![at(100)]),
            (4 * MIB, Label::Gpt, vec![at(512)]),
            (4 * MIB, Label::Mbr, vec![at(0)]),
            (4 * MIB, Label::Gpt, vec![at(u64::MAX - 511)]),
            (4 * MIB, Label::Gpt, vec![sized(u64::MAX)]),
            (4 * MIB, Label::Gpt, vec![kind("0x83")]),
            (4 * MIB, Label::Mbr, vec![kind("0x05")]),
            (4 * MIB, Label::Gpt, vec![named.clone()]),
            (4 * MIB, Label::Mbr, vec![NewPartition { name: Some("a".into()), ..named }]),
            (0, Label::Mbr, vec![]),
        ] {
            assert!(places(disk, label, &new).is_err(), "{disk} {label:?} {new:?}");
        }
        assert_eq!(places(4 * MIB, Label::Gpt, &[]).expect("an empty table"), []);
    }
}
