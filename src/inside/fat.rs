//! FAT12, FAT16 and FAT32, by the fatfs crate.

use std::io::{self, Read};
use std::time::SystemTime;

use fatfs::{DateTime, Dir, DirEntry, FileAttributes, FileSystem, FsOptions};

use crate::error::{Error, Result};
use crate::inside::filesystem::{Entry, Kind, Node, absent, time};
use crate::inside::source::Source;

/// A file system.
pub(super) struct Fat(FileSystem<Source>);

/// A file that is read.
pub(super) struct FatFile<'a>(fatfs::File<'a, Source>);

const ROOT: Node = Node {
    kind: Kind::Directory,
    size: 0,
    mode: 0o755,
    uid: 0,
    gid: 0,
    modified: None,
    accessed: None,
    created: None,
};

/// A date and a time of day in local time, which is taken for UTC; nothing where it is no date.
fn stamp(date: fatfs::Date, hours: u16, minutes: u16, seconds: u16) -> Option<SystemTime> {
    let (year, month, day) = (i64::from(date.year), i64::from(date.month), i64::from(date.day));
    if !(1..=12).contains(&month) || day == 0 || hours > 23 || minutes > 59 || seconds > 59 {
        return None;
    }
    // Days since 1970 by counting years from March on, so that the leap day is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let days_before = (153 * ((month + 9) % 12) + 2) / 5;
    let days = 365 * year + year / 4 - year / 100 + year / 400 + days_before + day - 1 - 719_468;
    let in_day = i64::from(hours) * 3600 + i64::from(minutes) * 60 + i64::from(seconds);
    time(days * 86_400 + in_day, 0)
}

fn moment(moment: DateTime) -> Option<SystemTime> {
    stamp(moment.date, moment.time.hour, moment.time.min, moment.time.sec)
}

fn node(entry: &DirEntry<'_, Source>) -> Node {
    let locked = entry.attributes().contains(FileAttributes::READ_ONLY);
    let (kind, mode) = if entry.is_dir() { (Kind::Directory, 0o755) } else { (Kind::File, 0o644) };
    Node {
        kind,
        size: if entry.is_dir() { 0 } else { entry.len() },
        mode: if locked { mode & !0o222 } else { mode },
        modified: moment(entry.modified()),
        accessed: stamp(entry.accessed(), 0, 0, 0),
        created: moment(entry.created()),
        ..ROOT
    }
}

fn failed(path: &[u8], error: io::Error) -> Error {
    Error::io(String::from_utf8_lossy(path), error)
}

impl Fat {
    /// Whether a first sector is likely that of a FAT: a jump over its table, and numbers in that
    /// which are possible.
    pub(super) fn is_likely(sector: &[u8]) -> bool {
        let (jump, end) = (sector.first(), sector.get(510..512));
        let size =
            sector.get(11..13).map_or(0, |word| u16::from(word[0]) | u16::from(word[1]) << 8);
        let (cluster, fats) = (sector.get(13).copied().unwrap_or(0), sector.get(16));
        matches!(jump, Some(0xeb | 0xe9))
            && end == Some(&[0x55, 0xaa])
            && matches!(size, 512 | 1024 | 2048 | 4096)
            && cluster.is_power_of_two()
            && matches!(fats, Some(1 | 2))
    }

    pub(super) fn open(mut source: Source) -> Result<Self> {
        // The crate wants to begin at the beginning.
        io::Seek::rewind(&mut source).map_err(|error| failed(b"file system", error))?;
        let opened = FileSystem::new(source, FsOptions::new());
        opened.map(Self).map_err(|error| failed(b"file system", error))
    }

    pub(super) fn label(&self) -> String {
        let label = self.0.volume_label();
        if label.trim() == "NO NAME" { String::new() } else { label.trim().to_owned() }
    }

    /// The entry at `path`; nothing for the root, which has none.
    fn find(&self, path: &[u8]) -> Result<Option<DirEntry<'_, Source>>> {
        let mut found: Option<DirEntry<'_, Source>> = None;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            let directory = match &found {
                None => self.0.root_dir(),
                Some(entry) if entry.is_dir() => entry.to_dir(),
                Some(_) => {
                    return Err(absent(path, io::ErrorKind::NotADirectory, "not a directory"));
                }
            };
            found = Some(lookup(&directory, part, path)?);
        }
        Ok(found)
    }

    pub(super) fn node(&self, path: &[u8]) -> Result<Node> {
        Ok(self.find(path)?.map_or(ROOT, |entry| node(&entry)))
    }

    pub(super) fn entries(
        &self,
        path: &[u8],
        each: &mut dyn FnMut(Entry) -> Result<()>,
    ) -> Result<()> {
        let directory = match self.find(path)? {
            None => self.0.root_dir(),
            Some(entry) if entry.is_dir() => entry.to_dir(),
            Some(_) => return Err(absent(path, io::ErrorKind::NotADirectory, "not a directory")),
        };
        for entry in directory.iter() {
            let entry = entry.map_err(|error| failed(path, error))?;
            each(Entry { name: entry.file_name().into_bytes(), node: Ok(node(&entry)) })?;
        }
        Ok(())
    }

    pub(super) fn open_file(&self, path: &[u8]) -> Result<FatFile<'_>> {
        let entry = self.find(path)?.filter(DirEntry::is_file);
        let entry =
            entry.ok_or_else(|| absent(path, io::ErrorKind::IsADirectory, "a directory"))?;
        Ok(FatFile(entry.to_file()))
    }
}

/// The entry with that name. Upper and lower case are the same, and so are the long and the short
/// name, but the name as it is written goes first.
fn lookup<'a>(
    directory: &Dir<'a, Source>,
    name: &[u8],
    path: &[u8],
) -> Result<DirEntry<'a, Source>> {
    let nothing = || absent(path, io::ErrorKind::NotFound, "there is no such file");
    let name = std::str::from_utf8(name).map_err(|_| nothing())?;
    let folded = name.to_lowercase();
    let mut second = None;
    for entry in directory.iter() {
        let entry = entry.map_err(|error| failed(path, error))?;
        let long = entry.file_name();
        if long == name {
            return Ok(entry);
        }
        if second.is_none()
            && (long.to_lowercase() == folded || entry.short_file_name().to_lowercase() == folded)
        {
            second = Some(entry);
        }
    }
    second.ok_or_else(nothing)
}

impl FatFile<'_> {
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        self.0.read(bytes).map_err(|error| Error::io("data", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn dates_are_counted() {
        let seconds = |year, month, day| {
            let found = stamp(fatfs::Date { year, month, day }, 1, 2, 3)?;
            found.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
        };
        assert_eq!(seconds(1980, 1, 1), Some(315_532_800 + 3723));
        assert_eq!(seconds(2000, 2, 29), Some(951_782_400 + 3723));
        assert_eq!(seconds(2024, 3, 1), Some(1_709_251_200 + 3723));
        assert_eq!(seconds(2107, 12, 31), Some(4_354_732_800 + 3723));
        assert_eq!(
            (seconds(1980, 0, 1), seconds(1980, 13, 1), seconds(1980, 1, 0)),
            (None, None, None)
        );
    }
}
