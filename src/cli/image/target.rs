//! Where a verb makes an image: in a file that appears when it is complete, or in place.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::cli::image::Tool;
use crate::error::Result;
use crate::image::OpenOptions;
use crate::image::make::{self, NewImage};
use crate::storage::appear::{Appearing, Foreseen};
use crate::storage::files::{Files, Options};
use crate::storage::{FileSource, OpenMode};
use crate::sync::Arc;

/// Whether bytes can only be written in place.
pub(super) fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Locks what is there at `target`, whether other files are shared or not: somebody who uses it
/// keeps it. The lock ends with what is returned.
///
/// # Errors
/// When somebody uses it, or it is no file that an image could be.
pub(super) fn lock_old(target: &Path) -> Result<Option<Arc<Files>>> {
    if target.metadata().is_err() {
        return Ok(None);
    }
    let files = Files::new(Options::default());
    files.open(target, OpenMode { read_only: false, backing: false })?;
    Ok(Some(files))
}

/// Makes an empty image at `path`, or in the `file` that will be there. Its files are closed again,
/// so that they can be opened as an image.
///
/// # Errors
/// As [`make::make`].
pub(super) fn make(
    tool: &Tool,
    path: &Path,
    new: &NewImage,
    options: &OpenOptions,
    file: Option<&Appearing>,
) -> Result<()> {
    let maker = Tool::with(tool.files.options())?;
    let foreseen = file.map(|file| Foreseen { source: &*maker.files, path, file });
    let source: &dyn FileSource = match &foreseen {
        Some(foreseen) => foreseen,
        None => &*maker.files,
    };
    maker.run(make::make(&*maker.engine, source, path, new, options)).map(drop)
}

/// The data file of a new image at `target`, if it has one that is not there yet.
pub(super) fn begun(target: &Path, new: &NewImage) -> Option<PathBuf> {
    let data = new.layout.data_file.as_ref().map(|name| make::reference(target, name));
    data.filter(|path| path.symlink_metadata().is_err())
}

/// Removes a file that was begun; the error that matters is the first one.
pub(super) fn discard(file: Option<&Path>) {
    if let Some(path) = file {
        let _ = std::fs::remove_file(path);
    }
}
