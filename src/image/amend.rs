//! Changes of what a qcow2 image says of itself: its header, and its bitmaps.

use std::path::{Path, PathBuf};

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::gate::{Format, Gate, OpenOptions};
use crate::image::watch::{Outcome, Watch};
use crate::qcow2::bitmap::{BitmapEdit, LoadedBitmap, MergeSource, load_bitmap};
use crate::qcow2::{Amend, NewSize, StatusKind, check};
use crate::storage::{Buf, FileSource, Storage};

/// Zeros are written in pieces of at most this many bytes.
const PIECE: u64 = 1 << 20;

/// Changes the header of the image at `path`. For version 2 every cluster of zeros becomes one of
/// bytes, or of nothing where nothing lies below; when `watch` says no before the end of that, the
/// header stays as it is, and the change can be made again.
///
/// # Errors
/// As [`Image::open`] and [`crate::qcow2::Qcow2::amend`].
pub async fn amend(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    amend: &Amend,
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    let within = |error: Error| error.within(path.display());
    let down = amend.version.is_some_and(|version| version < 3);
    let mut image = if down {
        Image::open(st, source, path, options).await?
    } else {
        Gate::new(st, source, path, options)?.open_alone(path).await?
    };
    let top = image.top_qcow2().map_err(within)?;
    top.check_amend(amend).map_err(within)?;
    if down && top.header().version > 2 {
        let outcome = expand_zeros(st, &image, watch).await.map_err(within)?;
        image.close(st).await.map_err(within)?;
        if outcome == Outcome::Stopped {
            return Ok(outcome);
        }
    }
    image.top_qcow2()?.amend(st, amend).await.map_err(within)?;
    Ok(Outcome::Complete)
}

/// Whether the image at `path` can be changed so, get refcounts of `1 << order` bits, and then get
/// a disk of `size` bytes, of those that are asked for; opening it repairs what a crash has left of
/// late refcounts, and nothing else is changed.
///
/// # Errors
/// As [`amend`] and [`resize`](super::resize), when one of them would be refused.
pub async fn check_changes(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    amend: &Amend,
    (order, size): (Option<u32>, Option<u64>),
) -> Result<()> {
    let within = |error: Error| error.within(path.display());
    let down = amend.version.is_some_and(|version| version < 3);
    // What the image refers to need not be there when that is changed. How long a backing file is
    // matters to version 2 alone.
    let renamed = amend.backing.is_some() || amend.data_file.is_some();
    let mut image = if down || (size.is_some() && amend.version.is_none() && !renamed) {
        Image::open(st, source, path, options).await?
    } else {
        Gate::new(st, source, path, options)?.open_alone(path).await?
    };
    let backing_length = image.chain.0.get(1).map(Layer::size);
    let top = image.top_qcow2().map_err(within)?;
    let order = order.unwrap_or(top.header().geometry.refcount_order);
    top.check_amend_after(amend, order).map_err(within)?;
    if let Some(size) = size {
        let version = amend.version.unwrap_or(top.header().version);
        let new = NewSize { size, shrink: false, backing_length };
        top.check_resize_after(st, new, version).await.map_err(within)?;
    }
    image.close(st).await.map_err(within)
}

/// Gives the image at `path` refcounts of `1 << order` bits; nothing else is opened. `progress` is
/// told how far it is.
///
/// # Errors
/// As [`Image::open`] and [`check::widen_refcounts`].
pub async fn amend_refcounts(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    order: u32,
    progress: &check::Told<'_>,
) -> Result<()> {
    // Opening it repairs what a crash has left of late refcounts.
    let mut image = Gate::new(st, source, path, options)?.open_alone(path).await?;
    let name = path.display().to_string();
    let file = image.top_qcow2().map_err(|error| error.within(&name))?.file();
    image.close(st).await.map_err(|error| error.within(&name))?;
    // What is in memory of the old refcounts must never be written.
    drop(image);
    check::widen_refcounts(st, &name, file, order, progress).await
}

/// Leaves no cluster of zeros: version 2 cannot say that.
async fn expand_zeros(st: &dyn Storage, image: &Image, watch: &mut Watch<'_>) -> Result<Outcome> {
    let Layer::Qcow2(top) = image.chain.top() else { return Ok(Outcome::Complete) };
    let backed = image.chain.0.len() > 1;
    let (mut at, size) = (0, image.size());
    while at < size {
        if !watch(at, size) {
            return Ok(Outcome::Stopped);
        }
        let here = GuestOffset(at);
        let status = top.status(st, here, size - at).await?;
        let mut len = status.len;
        if status.kind == StatusKind::Zero && backed {
            len = len.min(PIECE);
            let zeros = Buf::zeroed(usize::try_from(len).expect("a small piece"));
            image.write(st, here, zeros).await?;
        } else if status.kind == StatusKind::Zero {
            image.discard(st, here, len).await?;
        }
        at += len;
    }
    watch(size, size);
    Ok(Outcome::Complete)
}

/// One change of the bitmaps of an image, as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapAction {
    /// A new one, with so many bytes of the disk for each bit.
    Add(Option<u64>),
    /// It goes.
    Remove,
    /// No bit is set any more.
    Clear,
    /// Changes are recorded in it.
    Enable,
    /// Changes are recorded in it no more.
    Disable,
    /// What is set in the bitmap of this name is set in it as well.
    Merge(String),
}

/// An image whose bitmaps are merged into those of another one.
#[derive(Debug, Clone)]
pub struct MergeFrom {
    /// Its path.
    pub path: PathBuf,
    /// Its format; without it the file must have qcow2's magic.
    pub format: Option<Format>,
}

/// Makes changes of the bitmap called `name` of the image at `path`, in order, all of them or none.
/// Nothing but the image is opened, and the image `from` that bitmaps to merge are taken from.
///
/// # Errors
/// As [`Image::open`] and [`crate::qcow2::Qcow2::edit_bitmaps`].
pub async fn edit_bitmap(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    (name, actions): (&str, &[BitmapAction]),
    from: Option<&MergeFrom>,
) -> Result<()> {
    let mut edits = Vec::new();
    let own = || name.to_owned();
    for action in actions {
        edits.push(match action {
            BitmapAction::Add(granularity) => {
                BitmapEdit::Add { name: own(), granularity: *granularity }
            }
            BitmapAction::Remove => BitmapEdit::Remove(own()),
            BitmapAction::Clear => BitmapEdit::Clear(own()),
            BitmapAction::Enable => BitmapEdit::Enable(own()),
            BitmapAction::Disable => BitmapEdit::Disable(own()),
            BitmapAction::Merge(other) => {
                let source = match from {
                    None => MergeSource::Own(other.clone()),
                    Some(from) => {
                        MergeSource::Loaded(load(st, source, from, options, other).await?)
                    }
                };
                BitmapEdit::Merge { name: own(), source }
            }
        });
    }
    let mut image = Gate::new(st, source, path, options)?.open_alone(path).await?;
    let within = |error: Error| error.within(path.display());
    let top = image.top_qcow2().map_err(within)?;
    top.edit_bitmaps(st, edits).await.map_err(within)
}

/// A bitmap of another image.
async fn load(
    st: &dyn Storage,
    source: &dyn FileSource,
    from: &MergeFrom,
    options: &OpenOptions,
    name: &str,
) -> Result<LoadedBitmap> {
    let options = OpenOptions { format: from.format, read_only: true, ..options.clone() };
    let image = Gate::new(st, source, &from.path, &options)?.open_alone(&from.path).await?;
    let within = |error: Error| error.within(from.path.display());
    match image.chain.top() {
        Layer::Raw(_) => Err(within(Error::unsupported("bitmap", "a raw image has none"))),
        Layer::Qcow2(image) => {
            load_bitmap(st, image.file(), image.header(), name).await.map_err(within)
        }
    }
}
