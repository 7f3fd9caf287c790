//! What is to be said of an image without reading its tables: its files, its header, and the lists
//! of its snapshots and bitmaps.

use std::path::{Path, PathBuf};

use crate::bytes::round_up;
use crate::error::{Error, Result};
use crate::image::gate::{DEPTH_LIMIT, Format, Gate, OpenOptions};
use crate::qcow2::bitmap::{self, BitmapFacts};
use crate::qcow2::header::Header;
use crate::qcow2::open::{read_header, read_snapshots};
use crate::qcow2::snapshot::Snapshot;
use crate::storage::{FileSource, OpenMode, Opened, Storage};

/// What is known of one image file.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its path: that of the image asked for as it was given, and as the references lead on.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The disk's size in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// The file's length in bytes.
    pub file_length: u64,
    /// The host's space in bytes that the file takes.
    pub allocated: u64,
    /// Whether it is a block device.
    pub is_device: bool,
    /// What a qcow2 image says of itself.
    pub qcow2: Option<Box<Qcow2Facts>>,
}

/// What a qcow2 image says of itself.
#[derive(Debug, Clone)]
pub struct Qcow2Facts {
    /// The header.
    pub header: Header,
    /// The internal snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps, where they are valid.
    pub bitmaps: Vec<BitmapFacts>,
}

impl Facts {
    /// The recorded name of the backing file.
    pub fn backing(&self) -> Option<&str> {
        self.qcow2.as_ref()?.header.backing.as_deref()
    }

    /// The path of the backing file as the recorded name leads to it from the image's own path.
    pub fn full_backing(&self) -> Option<PathBuf> {
        Some(beside(&self.path, self.backing()?))
    }
}

/// A reference as a path: relative ones start at the directory of the file that has them.
fn beside(path: &Path, reference: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(reference)
}

/// Looks at the image at `path`, and with `chain` at the images below it as well; nothing else is
/// opened, also no data files. Images that could not be written to can be looked at.
///
/// # Errors
/// As [`Image::open`](crate::image::Image::open) for what concerns files, headers, and lists of
/// snapshots and bitmaps.
pub async fn inspect(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    chain: bool,
) -> Result<Vec<Facts>> {
    let gate = Gate::new(st, source, path, options)?;
    let mut next = Some((path.to_owned(), path.to_owned(), options.format));
    let (mut all, mut seen) = (Vec::new(), Vec::new());
    while let Some((shown, path, format)) = next.take() {
        let name = path.display().to_string();
        if all.len() >= DEPTH_LIMIT {
            let why = format!("the backing chain is deeper than {DEPTH_LIMIT} layers");
            return Err(Error::refused(name, why));
        }
        let file = source.open(&path, OpenMode { read_only: true, backing: !all.is_empty() })?;
        gate.refuse_cycle(&name, file, &mut seen)?;
        let facts = look(st, &name, shown, file, format).await?;
        if let (true, Some(qcow2)) = (chain, &facts.qcow2)
            && let Some(below) = gate.backing(&path, &qcow2.header)?
            && let Some(shown) = facts.full_backing()
        {
            next = Some((shown, below.path, below.format));
        }
        all.push(facts);
    }
    Ok(all)
}

async fn look(
    st: &dyn Storage,
    name: &str,
    path: PathBuf,
    file: Opened,
    format: Option<Format>,
) -> Result<Facts> {
    let allocated = st.allocated(file.id).map_err(|error| Error::io(name, error))?;
    let qcow2 = match format {
        Some(Format::Raw) => None,
        Some(Format::Qcow2) | None => {
            let header = read_header(st, name, file).await?;
            let list = read_snapshots(st, file.id, &header).await;
            let (snapshots, _) = list.map_err(|error| error.within(name))?;
            let bitmaps = bitmap::read_bitmaps(st, file.id, &header).await;
            let bitmaps = bitmaps.map_err(|error| error.within(name))?;
            Some(Box::new(Qcow2Facts { header, snapshots, bitmaps }))
        }
    };
    let size = qcow2.as_ref().map_or(file.length, |facts| facts.header.size);
    Ok(Facts {
        path,
        format: if qcow2.is_some() { Format::Qcow2 } else { Format::Raw },
        virtual_size: round_up(size, 512),
        file_length: file.length,
        allocated,
        is_device: !st.limits(file.id).grows,
        qcow2,
    })
}
