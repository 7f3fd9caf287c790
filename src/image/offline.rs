//! Snapshots and sizes of images that nothing else uses: each function opens the image through the
//! gate, does one thing, and leaves everything durable.

use std::path::Path;

use crate::error::{Error, Result};
use crate::image::chain::Layer;
use crate::image::transfer::Batch;
use crate::image::watch::Progress;
use crate::image::{Format, Image, OpenOptions};
use crate::qcow2::check::{self, Repair, Report};
use crate::qcow2::create::Preallocation;
use crate::qcow2::snapshot::{NewSnapshot, Snapshot};
use crate::qcow2::{NewSize, Qcow2};
use crate::raw::Raw;
use crate::storage::{Buf, FileSource, Op, OpenMode, Purpose, Storage};

/// The internal snapshots of the image at `path`, oldest first.
///
/// # Errors
/// As [`Image::open`], and when the table of snapshots is malformed.
pub async fn snapshots(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
) -> Result<Vec<Snapshot>> {
    let options = OpenOptions { read_only: true, ..options.clone() };
    let image = Image::open(st, source, path, &options).await?;
    match image.chain.top() {
        Layer::Raw(_) => Ok(Vec::new()),
        Layer::Qcow2(image) => {
            let listed = image.snapshots(st).await;
            listed.map(|(list, _)| list).map_err(|error| error.within(path.display()))
        }
    }
}

/// Takes a snapshot of the image at `path`; returns it as it is recorded.
///
/// # Errors
/// As [`Image::open`] and [`Qcow2::create_snapshot`].
pub async fn create_snapshot(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    new: &NewSnapshot,
) -> Result<Snapshot> {
    let mut image = Image::open(st, source, path, options).await?;
    let done = image.top_qcow2()?.create_snapshot(st, new).await;
    done.map_err(|error| error.within(path.display()))
}

/// Makes the disk of the image at `path` what it was when a snapshot, given by id or name, was
/// taken.
///
/// # Errors
/// As [`Image::open`] and [`Qcow2::apply_snapshot`].
pub async fn apply_snapshot(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    snapshot: &str,
) -> Result<()> {
    let mut image = Image::open(st, source, path, options).await?;
    let done = image.top_qcow2()?.apply_snapshot(st, snapshot).await;
    done.map_err(|error| error.within(path.display()))
}

/// Deletes a snapshot, given by id or name, of the image at `path`.
///
/// # Errors
/// As [`Image::open`] and [`Qcow2::delete_snapshot`].
pub async fn delete_snapshot(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    snapshot: &str,
) -> Result<()> {
    let mut image = Image::open(st, source, path, options).await?;
    let done = image.top_qcow2()?.delete_snapshot(st, snapshot).await;
    done.map_err(|error| error.within(path.display()))
}

/// Gives the disk of the image at `path` another size in bytes, a multiple of 512; what is new
/// reads as zeros. `shrink` says that it may become smaller.
///
/// # Errors
/// As [`Image::open`] and [`Qcow2::resize`].
pub async fn resize(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    (size, shrink): (u64, bool),
) -> Result<()> {
    let mut image = Image::open(st, source, path, options).await?;
    let done = image.resize(st, size, shrink).await;
    done.map_err(|error| error.within(path.display()))
}

/// Takes the host's space of a raw image at `path` from the byte `from` on, which reads as zeros;
/// `progress` is told how many bytes of how many are written.
///
/// # Errors
/// When the file cannot be opened, and I/O errors.
pub async fn take_tail(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    from: u64,
    preallocation: Preallocation,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let file = source.open(path, OpenMode { read_only: false, backing: false })?;
    let len = file.length.saturating_sub(from);
    crate::qcow2::create::take(st, file.id, (from, len), preallocation, progress).await?;
    let done = st.submit(file.id, Purpose::SyncData, Op::Sync).await;
    done.map_err(|source| Error::io("making room durable", source))
}

/// Checks the image at `path`, and repairs what `repair` allows; nothing else is opened. Nobody
/// else may use it. `progress` is told how far it is, as for [`check::check_told`].
///
/// # Errors
/// `Unsupported` for a raw image, which has nothing to check; when the file cannot be opened, and
/// as [`check::check`].
pub async fn check_image(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    repair: Repair,
    progress: &check::Told<'_>,
) -> Result<Report> {
    let name = path.display().to_string();
    if options.format == Some(Format::Raw) {
        return Err(Error::unsupported(name, "raw images have nothing that could be checked"));
    }
    if options.read_only && repair != Repair::None {
        return Err(Error::refused(name, "an image that is opened read-only is not repaired"));
    }
    let mode = OpenMode { read_only: repair == Repair::None, backing: false };
    let file = source.open(path, mode)?;
    check::check_told(st, &name, file.id, repair, progress).await
}

impl Image {
    pub(super) fn top_qcow2(&mut self) -> Result<&mut Qcow2> {
        if self.read_only {
            return Err(Error::refused("disk", "it was opened read-only"));
        }
        match self.chain.0.first_mut() {
            Some(Layer::Qcow2(image)) => Ok(image),
            _ => Err(Error::unsupported("disk", "only a qcow2 image has what this changes")),
        }
    }

    /// Gives the disk another size in bytes, a multiple of 512, as [`resize`] does; nothing else
    /// uses it, which the exclusive reference says. Guests may go on with it afterwards.
    ///
    /// # Errors
    /// As [`Qcow2::resize`]; the disk then has the size that [`Image::size`] tells. It is the old
    /// one unless this failed at the end, on the way to give space back: then a shrink has
    /// happened, and a disk that has grown takes no more writes.
    pub async fn resize(&mut self, st: &dyn Storage, size: u64, shrink: bool) -> Result<()> {
        let done = match self.chain.top() {
            Layer::Raw(_) => self.resize_raw(st, size, shrink).await,
            Layer::Qcow2(_) => self.resize_qcow2(st, size, shrink).await,
        };
        self.size = self.chain.top().size();
        self.chain.forget_hints();
        done
    }

    async fn resize_qcow2(&mut self, st: &dyn Storage, size: u64, shrink: bool) -> Result<()> {
        let backing_length = self.chain.0.get(1).map(Layer::size);
        let new = NewSize { size, shrink, backing_length };
        let top = self.top_qcow2()?;
        top.check_resize(st, new).await?;
        let old = top.size();
        if size > old {
            self.clear_tail(st, new).await?;
        }
        self.top_qcow2()?.resize(st, new).await?;
        self.size = size;
        let top = self.top_qcow2()?;
        if size < old && !top.header().is_raw_data() {
            // Who makes the disk larger again may be a program that shows what it finds there. A
            // raw data file ends with the disk.
            self.clear_tail(st, new).await?;
            self.top_qcow2()?.close(st).await?;
        }
        Ok(())
    }

    async fn resize_raw(&mut self, st: &dyn Storage, size: u64, shrink: bool) -> Result<()> {
        let read_only = self.read_only;
        let Some(Layer::Raw(raw)) = self.chain.0.first_mut() else {
            unreachable!("checked by the caller")
        };
        let refuse = |why: String| Err(Error::refused("resize", why));
        if read_only {
            return refuse("it was opened read-only".to_owned());
        }
        if !size.is_multiple_of(512) {
            return refuse(format!("{size} bytes is no multiple of 512"));
        }
        if size < raw.size() && !shrink {
            return refuse(format!(
                "the disk would shrink from {} to {size} bytes and lose what lies behind; say that \
                 it may (--shrink) once the guest uses no more than that",
                raw.size()
            ));
        }
        if !st.limits(raw.file()).grows {
            return fit_device(st, raw, size);
        }
        let failed = |source| Error::io("resizing the image", source);
        let resized = st.submit(raw.file(), Purpose::Resize, Op::Resize { len: size }).await;
        resized.map_err(failed)?;
        raw.set_size(size);
        raw.flush(st).await
    }

    /// Fills the last cluster with zeros behind the disk's end, where it holds older bytes or would
    /// show those of the layer below.
    async fn clear_tail(&self, st: &dyn Storage, new: NewSize) -> Result<()> {
        let Layer::Qcow2(image) = self.chain.top() else { unreachable!("checked by the caller") };
        let Some((at, len)) = image.tail(st, new).await? else { return Ok(()) };
        image.start_writing(st).await?;
        let zeros = Buf::zeroed(usize::try_from(len).expect("less than a cluster"));
        let mut batch = Batch::default();
        let result = self.write_parts(st, at, (&zeros, 0), false, &mut batch, &mut None).await;
        let written = batch.finish().await;
        image.mark_dirty(image.data_file());
        result.and(written)
    }
}

/// Takes into use what a block device has become: its size is its own, and is changed elsewhere.
fn fit_device(st: &dyn Storage, raw: &mut Raw, size: u64) -> Result<()> {
    let failed = |source| Error::io("asking for the block device's size", source);
    let length = st.length(raw.file()).map_err(failed)?;
    if size > length {
        let why = format!(
            "a block device has a size of its own, and this one has {length} bytes; make it larger \
             first"
        );
        return Err(Error::refused("resize", why));
    }
    raw.set_size(size);
    Ok(())
}
