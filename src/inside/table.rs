//! Partition tables as they are found, GPT and MBR, and choosing a partition of one.

use std::rc::Rc;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::image::blocking::Disk;
use crate::inside::source::Source;
use crate::inside::{Limits, Watch, gpt, guarded, mbr};

/// What kind of table it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    /// GUID partition table (UEFI specification, chapter 5).
    Gpt,
    /// The table in the master boot record, with extended partitions.
    Mbr,
}

impl Label {
    /// Its name, as sfdisk writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt => "gpt",
            Self::Mbr => "dos",
        }
    }
}

/// A partition table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its kind.
    pub label: Label,
    /// The disk's GUID, or the disk signature of an MBR in hexadecimal.
    pub id: String,
    /// The unit of the table in bytes: 512 or 4096.
    pub sector_size: u64,
    /// First and last byte that partitions of a GPT may take.
    pub usable: Option<(u64, u64)>,
    /// Whether the copy at the disk's end was taken, since the one at its start is damaged.
    pub from_backup: bool,
    /// The partitions in use, in the order of their numbers.
    pub partitions: Vec<Partition>,
}

/// What a partition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A GUID.
    Guid(Uuid),
    /// The number in an MBR.
    Mbr(u8),
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1 on; logical ones of an MBR from 5 on.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is for.
    pub kind: Kind,
    /// Its own GUID.
    pub guid: Option<Uuid>,
    /// Its name.
    pub name: Option<String>,
    /// The attribute bits of a GPT; 0 else.
    pub attributes: u64,
    /// Whether an MBR marks it as the one to boot from.
    pub bootable: bool,
}

impl Partition {
    /// Whether it only holds logical partitions.
    pub fn is_extended(&self) -> bool {
        matches!(self.kind, Kind::Mbr(kind) if mbr::is_extended(kind))
    }

    /// Its bytes.
    ///
    /// # Errors
    /// Refused when it ends beyond the disk.
    pub fn source(&self, disk: &Rc<Disk>, watch: &Rc<Watch>) -> Result<Source> {
        Source::new(disk, self.start, self.size, watch).map_err(|_| {
            let (number, end) = (self.number, self.start.saturating_add(self.size));
            let why = format!("partition {number} ends at {end}, the disk at {}", disk.size());
            Error::refused("partition table", why)
        })
    }
}

impl Table {
    /// The partition that `wanted`, a number, a name or a GUID, stands for.
    ///
    /// # Errors
    /// Refused when there is none, or several have that name.
    pub fn find(&self, wanted: &str) -> Result<&Partition> {
        let number: Option<u32> = wanted.parse().ok();
        let guid = Uuid::try_parse(wanted).ok();
        let matches = |one: &&Partition| match (number, guid) {
            (Some(number), _) => one.number == number,
            (_, Some(guid)) => one.guid == Some(guid),
            _ => one.name.as_deref() == Some(wanted),
        };
        let mut found = self.partitions.iter().filter(matches);
        let refuse = |why: String| Err(Error::refused("partition table", why));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (Some(_), Some(_)) => {
                refuse(format!("several partitions are {wanted:?}; say a number"))
            }
            (None, _) => {
                let numbers: Vec<_> =
                    self.partitions.iter().map(|one| one.number.to_string()).collect();
                let there = if numbers.is_empty() { "none".into() } else { numbers.join(", ") };
                refuse(format!("there is no partition {wanted:?}; there is {there}"))
            }
        }
    }
}

/// The partition table of `disk`, if it has one.
///
/// # Errors
/// When it cannot be read, or there is one that is damaged.
pub fn read_table(disk: &Rc<Disk>) -> Result<Option<Table>> {
    let watch = Rc::new(Watch::new(Limits::default()));
    let mut source = Source::new(disk, 0, disk.size(), &watch)?;
    guarded("partition table", || {
        let first: [u8; 512] =
            source.peek(0).map_err(|error| Error::io("reading the first sector", error))?;
        // A GPT is looked for first: its MBR only keeps others from the disk, and tools that know
        // no GPT may have damaged it.
        match gpt::read(&mut source)? {
            Some(table) => Ok(Some(table)),
            None => mbr::read(&mut source, &first),
        }
    })
}
