//! Making images of every kind, with the files they refer to.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::image::gate::{Format, Gate, OpenOptions, directory};
use crate::image::watch::Progress;
use crate::qcow2::create::{self, CreateOptions};
use crate::storage::{FileSource, OpenMode, Opened, Storage};

/// An image to make.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Its format.
    pub format: Format,
    /// The disk's size in bytes; without it the disk is as large as the backing file's.
    pub size: Option<u64>,
    /// Everything else; a raw image has only a size and a preallocation.
    pub layout: CreateOptions,
    /// Whether a file that is there already becomes the image, and loses what it holds.
    pub replace: bool,
    /// Whether the backing file need not be there.
    pub trust_backing: bool,
}

/// Makes an image at `path`; returns the layout that it has. The files it refers to go through the
/// same gate as when it is opened; `options` say what the gate lets through. A data file is made,
/// or emptied, with it.
///
/// # Errors
/// `Refused` and `Unsupported` before anything is touched, when options contradict each other, the
/// size is not known, or a reference could not be opened; then I/O errors.
pub async fn make(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    new: &NewImage,
    options: &OpenOptions,
) -> Result<CreateOptions> {
    make_told(st, source, path, new, options, &mut |_, _| {}).await
}

/// As [`make`]; `progress` is told how many bytes of how many are prepared, when those are written.
///
/// # Errors
/// As [`make`].
pub async fn make_told(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    new: &NewImage,
    options: &OpenOptions,
    progress: &mut Progress<'_>,
) -> Result<CreateOptions> {
    if options.read_only {
        return Err(Error::refused(path.display().to_string(), "nothing is made read-only"));
    }
    let size = match (new.size, &new.layout.backing) {
        (size, Some(_)) if !new.trust_backing => {
            let below = backing_size(st, source, path, &new.layout, options).await?;
            size.unwrap_or(below)
        }
        (Some(size), _) => size,
        (None, _) => {
            let why = "the disk's size is not known; give one";
            return Err(Error::refused(path.display().to_string(), why));
        }
    };
    let layout = CreateOptions { size, ..new.layout.clone() };
    let within = |error: Error| error.within(path.display());
    if new.format == Format::Qcow2 {
        layout.check().map_err(within)?;
    }
    let data = match &layout.data_file {
        Some(name) => {
            let gate = Gate::new(st, source, path, options)?;
            Some(open(source, &gate.admit_new(path, "data file", name)?, new.replace)?)
        }
        None => None,
    };
    let file = open(source, path, new.replace)?;
    let made = match new.format {
        Format::Qcow2 => create::create_told(st, file, data, &layout, progress).await,
        Format::Raw => create::prepare(st, file, size, layout.preallocation, progress).await,
    };
    made.map_err(within)?;
    Ok(layout)
}

/// The size of the disk that the backing file holds, opened as if the image were there.
async fn backing_size(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    layout: &CreateOptions,
    options: &OpenOptions,
) -> Result<u64> {
    let name = path.display().to_string();
    let format = match layout.backing_format.as_deref() {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => {
            let why = format!("backing files of the format {other} are not supported");
            return Err(Error::unsupported(name, why));
        }
        None => {
            let why = "the backing file's format must be recorded; give it with -F qcow2 or raw";
            return Err(Error::refused(name, why));
        }
    };
    let options = OpenOptions { format: Some(format), read_only: true, ..options.clone() };
    let gate = Gate::new(st, source, path, &options)?;
    let reference = layout.backing.as_deref().unwrap_or_default();
    let below: PathBuf = gate.admit(path, "backing file", reference)?;
    let layers = gate.open_chain(&below).await?;
    Ok(layers.first().map_or(0, |layer| layer.size()))
}

/// Opens a file to be made into something: a new one, or one that may be replaced.
fn open(source: &dyn FileSource, path: &Path, replace: bool) -> Result<Opened> {
    if replace && source.canonical(path).is_ok() {
        return source.open(path, OpenMode { read_only: false, backing: false });
    }
    source.create(path)
}

/// The path of a file that the image at `path` refers to by `name`.
pub fn reference(path: &Path, name: &str) -> PathBuf {
    directory(path).join(name)
}
