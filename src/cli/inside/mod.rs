//! Looking inside a disk without a guest: its partitions, and the files in its file systems.

pub(super) mod cat;
pub(super) mod copy_out;
pub(super) mod ls;
pub(super) mod partitions;
pub(super) mod show;
pub(super) mod stat;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use clap::Args;

use crate::cli::image::{Opening, Sharing};
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image::blocking::Disk;
use crate::inside::filesystem::Filesystem;
use crate::inside::source::Source;
use crate::inside::table::{Table, read_table};
use crate::inside::{Limits, Watch};
use crate::storage::files::Options as FileOptions;

/// A partition of an image, or all of it.
#[derive(Debug, Clone, Args)]
pub(super) struct Place {
    /// The image, and after a colon the number, the name or the GUID of a partition; without one,
    /// the file system fills the whole disk
    #[arg(value_name = "IMAGE[:PARTITION]")]
    place: PathBuf,
}

/// How an image is opened and how far it is read.
#[derive(Debug, Clone, Args)]
pub(super) struct Looking {
    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// Give up after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    time_limit: u64,

    /// Give up after so many files and directories
    #[arg(long, value_name = "COUNT", default_value_t = 4 << 20)]
    max_entries: u64,

    /// Give up after so many bytes of files
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = size::parse)]
    max_bytes: u64,
}

impl Looking {
    /// Begins to count, and sees to it that this ends.
    fn watch(&self) -> Rc<Watch> {
        let time = Duration::from_secs(self.time_limit);
        let (entries, bytes) = (self.max_entries, self.max_bytes);
        end_after(self.time_limit);
        Rc::new(Watch::new(Limits { entries, bytes, time, ..Limits::default() }))
    }

    /// The image at `path`, read-only.
    fn disk(&self, path: &Path) -> Result<Rc<Disk>> {
        let how = FileOptions { lock: !self.sharing.force_share(), ..FileOptions::default() };
        Ok(Rc::new(Disk::open_with(path, &self.opening.looking(), how)?))
    }

    /// The file system at a place.
    fn filesystem(&self, place: &Place) -> Result<Filesystem> {
        let watch = self.watch();
        let (path, partition) = place.split();
        let disk = self.disk(path)?;
        let name = place.place.display();
        let source = match (read_table(&disk), partition) {
            (Ok(Some(table)), Some(wanted)) => {
                table.find(wanted).and_then(|found| found.source(&disk, &watch))
            }
            (Ok(None), Some(_)) => {
                let why = "the disk has no partitions; leave the part after the colon away";
                Err(Error::refused("partition table", why))
            }
            (Err(error), Some(_)) => Err(error),
            (Ok(Some(table)), None) if !table.partitions.is_empty() => {
                Err(Error::refused("partition table", which(path, &table)))
            }
            (_, None) => Source::new(&disk, 0, disk.size(), &watch),
        };
        let opened = source.and_then(|source| Filesystem::open(source, &watch));
        opened.map_err(|error| error.within(name))
    }
}

/// A watch looks at the clock whenever the disk is read. A file system can be made so that a crate
/// is busy for long without that, and then this ends the program.
fn end_after(seconds: u64) {
    let time = Duration::from_secs(seconds.saturating_add(1));
    std::thread::spawn(move || {
        std::thread::sleep(time);
        eprintln!("it takes more than {seconds} s; --time-limit allows more");
        std::process::exit(1);
    });
}

/// Asks for a partition.
fn which(path: &Path, table: &Table) -> String {
    let name = path.display();
    let places: Vec<_> =
        table.partitions.iter().map(|one| format!("{name}:{}", one.number)).collect();
    format!("the disk has partitions; say which one: {}", places.join(", "))
}

impl Place {
    /// The image and the partition. A file whose name has a colon is taken for an image.
    fn split(&self) -> (&Path, Option<&str>) {
        let whole = (self.place.as_path(), None);
        if self.place.exists() {
            return whole;
        }
        let text = self.place.to_str().and_then(|text| text.rsplit_once(':'));
        text.map_or(whole, |(path, partition)| (Path::new(path), Some(partition)))
    }
}
