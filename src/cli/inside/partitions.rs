//! `partitions`: a disk's partition table, told or made.

use std::path::PathBuf;
use std::rc::Rc;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::cli::image::{print, print_json};
use crate::cli::inside::Looking;
use crate::cli::inside::show::{Form, safe};
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image::blocking::Disk;
use crate::inside::edit::{self, Label, NewPartition, create_table};
use crate::inside::filesystem::probe;
use crate::inside::table::{Kind, Partition, Table, read_table};
use crate::inside::types;

const EXAMPLES: &str = "\
A partition of --add is `name=value,...`:
  start=SIZE    where it begins [default: the next whole MiB]
  size=SIZE     how large it is [default: what is left]
  type=TYPE     a name of --types, a GUID, or for an MBR a hexadecimal number [default: linux]
  name=TEXT     its name, in a GPT
  uuid=GUID     its own GUID, in a GPT [default: a new one]
  bootable      an old BIOS boots from it
More than four partitions of an MBR: the fourth and all after it become logical ones, from 5 on.

Exit status: 0 done, 1 there is no partition table, or something is wrong.

Examples:
  vhost-user-qcow2 partitions disk.qcow2
  vhost-user-qcow2 partitions --json disk.qcow2
  vhost-user-qcow2 partitions --create gpt --add size=512M,type=uefi,name=boot \\
      --add type=linux,name=root disk.qcow2
  vhost-user-qcow2 partitions --create mbr --add bootable disk.qcow2";

/// A kind of table on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum TableKind {
    /// GUID partition table
    Gpt,
    /// Master boot record
    #[value(alias = "dos")]
    Mbr,
}

/// The arguments of `partitions`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Partitions {
    /// The image
    #[arg(required_unless_present = "types")]
    image: Option<PathBuf>,

    /// Write a new partition table
    #[arg(long, value_name = "KIND")]
    create: Option<TableKind>,

    /// A partition of the new table; repeatable
    #[arg(long, value_name = "PARTITION", requires = "create", value_parser = parse)]
    add: Vec<NewPartition>,

    /// Replace a table or a file system that is there
    #[arg(long, requires = "create")]
    force: bool,

    /// List the types that have names
    #[arg(long)]
    types: bool,

    #[command(flatten)]
    looking: Looking,

    #[command(flatten)]
    form: Form,
}

/// A partition as `--add` takes it.
fn parse(text: &str) -> Result<NewPartition, String> {
    let mut new = NewPartition::default();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match (name, value) {
            ("bootable", "") => new.bootable = true,
            (_, "") => return Err(format!("{part:?} should be name=value, or bootable")),
            ("start", _) => new.start = Some(size::parse(value)?),
            ("size", _) => new.size = Some(size::parse(value)?),
            ("type", _) => new.kind = Some(value.to_owned()),
            ("name", _) => new.name = Some(value.to_owned()),
            ("uuid", _) => {
                let guid = value.parse().map_err(|_| format!("{value:?} is no GUID"))?;
                new.guid = Some(guid);
            }
            _ => {
                return Err(format!("{name:?} is none of start, size, type, name, uuid, bootable"));
            }
        }
    }
    Ok(new)
}

impl Partitions {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When the table cannot be read or written, or the partitions do not fit.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        if self.types {
            let lines = types::known().map(|(name, title)| format!("{name:<14} {title}\n"));
            print(&lines.collect::<String>())?;
        }
        let Some(image) = &self.image else { return Ok(0) };
        let within = |error: Error| error.within(image.display());
        if let Some(kind) = self.create {
            return self.create(image, kind).map(|()| 0).map_err(within);
        }
        let watch = self.looking.watch();
        let disk = self.looking.disk(image)?;
        let Some(table) = read_table(&disk).map_err(within)? else {
            eprintln!("{}: there is no partition table", image.display());
            return Ok(1);
        };
        let filesystems: Vec<_> = table
            .partitions
            .iter()
            .map(|one| one.source(&disk, &watch).and_then(|mut source| probe(&mut source)))
            .map(|found| found.unwrap_or_default())
            .collect();
        if self.form.is_json() {
            print_json(&json_of(image, &table, &filesystems))?;
        } else {
            print(&human_of(image, &disk, &table, &filesystems))?;
        }
        Ok(0)
    }

    fn create(&self, image: &PathBuf, kind: TableKind) -> Result<()> {
        let disk = Rc::new(Disk::open(image, &self.looking.opening.options())?);
        if !self.force
            && let Some(what) = edit::occupied(&disk)?
        {
            let why = match what {
                "gpt" | "dos" | "damaged" => format!("there is a partition table ({what})"),
                other => format!("there is a file system ({other}) on the whole disk"),
            };
            return Err(Error::refused("disk", format!("{why}; --force replaces it")));
        }
        let label = match kind {
            TableKind::Gpt => Label::Gpt,
            TableKind::Mbr => Label::Mbr,
        };
        create_table(&disk, label, &self.add)?;
        match Rc::try_unwrap(disk) {
            Ok(disk) => disk.close(),
            Err(disk) => disk.flush(),
        }
    }
}

fn kind_title(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Guid(guid) => types::title_of_guid(guid),
        Kind::Mbr(kind) => types::title_of_mbr(kind),
    }
}

fn kind_code(kind: Kind) -> String {
    match kind {
        Kind::Guid(guid) => guid.to_string().to_uppercase(),
        Kind::Mbr(kind) => format!("{kind:x}"),
    }
}

/// The keys of `sfdisk --json`, and more that it does not have.
fn json_of(image: &std::path::Path, table: &Table, filesystems: &[Option<&str>]) -> Value {
    let (name, unit) = (image.display().to_string(), table.sector_size);
    let partition = |(one, filesystem): (&Partition, &Option<&str>)| {
        let mut value = json!({
            "node": format!("{name}{}", one.number),
            "start": one.start / unit,
            "size": one.size / unit,
            "type": kind_code(one.kind),
            "number": one.number,
            "start-bytes": one.start,
            "size-bytes": one.size,
            "type-name": kind_title(one.kind),
            "filesystem": filesystem,
        });
        if let Some(guid) = one.guid {
            value["uuid"] = guid.to_string().to_uppercase().into();
        }
        if let Some(name) = &one.name {
            value["name"] = name.as_str().into();
        }
        if one.bootable {
            value["bootable"] = true.into();
        }
        if one.attributes != 0 {
            value["attributes"] = format!("{:#018x}", one.attributes).into();
        }
        value
    };
    let mut object = Map::new();
    object.insert("label".into(), table.label.name().into());
    let gpt = table.label == Label::Gpt;
    let id = if gpt { table.id.to_uppercase() } else { table.id.clone() };
    object.insert("id".into(), id.into());
    object.insert("device".into(), name.as_str().into());
    object.insert("unit".into(), "sectors".into());
    if let Some((first, last)) = table.usable {
        object.insert("firstlba".into(), (first / unit).into());
        object.insert("lastlba".into(), (last / unit).into());
    }
    object.insert("sectorsize".into(), unit.into());
    let partitions: Value = table.partitions.iter().zip(filesystems).map(partition).collect();
    object.insert("partitions".into(), partitions);
    json!({"partitiontable": object})
}

/// A size with one digit behind the point.
fn short(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 2)) != 0 {
        unit += 1;
    }
    let tenths = (bytes >> (10 * unit)) * 10 / 1024;
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

fn human_of(
    image: &std::path::Path,
    disk: &Disk,
    table: &Table,
    filesystems: &[Option<&str>],
) -> String {
    let mut text = format!(
        "{}: {} ({} bytes), {}, id {}, sectors of {} bytes\n",
        image.display(),
        short(disk.size()),
        disk.size(),
        table.label.name(),
        table.id,
        table.sector_size
    );
    if table.from_backup {
        text.push_str("The table at the disk's start is damaged; this is the copy at its end.\n");
    }
    text.push_str(&format!(
        "{:>3} {:>15} {:>15} {:>10}  {:<10} {}\n",
        "", "start", "bytes", "size", "files", "type, name"
    ));
    for (one, filesystem) in table.partitions.iter().zip(filesystems) {
        let kind = kind_title(one.kind).map_or_else(|| kind_code(one.kind), str::to_owned);
        let name = one.name.as_ref().map_or_else(String::new, |name| format!(", {name:?}"));
        let name = safe(name.as_bytes());
        let boot = if one.bootable { ", bootable" } else { "" };
        let beyond = one.start.saturating_add(one.size) > disk.size();
        let beyond = if beyond { ", ends beyond the disk" } else { "" };
        text.push_str(&format!(
            "{:>3} {:>15} {:>15} {:>10}  {:<10} {kind}{name}{boot}{beyond}\n",
            one.number,
            one.start,
            one.size,
            short(one.size),
            filesystem.unwrap_or("-"),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_parsed() {
        let new = parse("start=1M,size=2G,type=uefi,name=boot,bootable").expect("right");
        assert_eq!((new.start, new.size), (Some(1 << 20), Some(2 << 30)));
        assert_eq!((new.kind.as_deref(), new.name.as_deref()), (Some("uefi"), Some("boot")));
        assert!(new.bootable && new.guid.is_none());
        assert!(parse("").is_ok());
        for wrong in ["size", "size=x", "colour=red", "uuid=7", "bootable=yes"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_short() {
        let cases = [(512, "0.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB")];
        for (bytes, text) in cases.into_iter().chain([(u64::MAX, "15.9 EiB")]) {
            assert_eq!(short(bytes), text);
        }
    }
}
