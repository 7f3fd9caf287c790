//! A disk for programs that do one thing after the other: scripts, tools, tests.
//!
//! [`Disk`] owns all it needs, files and engine included, and each of its calls ends when the work
//! is done. [`View`] is a byte range of it, a partition say, as `std::io` knows files.
//!
//! ```
//! use std::io::{Read, Seek, SeekFrom, Write};
//! use vhost_user_qcow2::image::OpenOptions;
//! use vhost_user_qcow2::image::blocking::{self, Disk};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let path = directory.path().join("disk.qcow2");
//! blocking::create(&path, 64 << 20)?;
//!
//! let disk = Disk::open(&path, &OpenOptions::default())?;
//! assert_eq!(disk.size(), 64 << 20);
//! disk.write_at(4096, b"hello")?;
//! disk.flush()?;
//!
//! // The second mebibyte of the disk, as if it were a file.
//! let mut view = disk.view(1 << 20, 1 << 20)?;
//! view.seek(SeekFrom::End(-3))?;
//! view.write_all(b"end")?;
//! let mut bytes = [0; 3];
//! disk.read_at((2 << 20) - 3, &mut bytes)?;
//! assert_eq!(&bytes, b"end");
//! disk.close()?;
//! # Ok(())
//! # }
//! ```

use std::borrow::Borrow;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::bytes::GuestOffset;
use crate::error::{Error, Kind, Result};
use crate::image::{Format, Image, LayerFiles, OpenOptions};
use crate::qcow2::create::CreateOptions;
use crate::storage::files::{Files, Options as FileOptions};
use crate::storage::host::{self, Aio};
use crate::storage::{Buf, Engine, FileSource, OpenMode, block_on};
use crate::sync::Arc;

/// What is read at once where less was asked for, in bytes: readers of file systems ask for a few
/// bytes here and there, and each operation costs about as much as copying this.
const LINE: u64 = 64 << 10;
/// How many lines are kept.
const LINES: usize = 64;
/// The longest operation, in bytes.
const LONGEST: usize = 4 << 20;

/// A layer by its paths, for [`Disk::open_explicit`].
#[derive(Debug, Clone)]
pub struct LayerPaths {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The external data file, for an image that keeps its data in one.
    pub data_file: Option<PathBuf>,
}

/// A disk, its files and the engine that reaches them. Belongs to one thread.
///
/// Dropping it closes the image as [`Disk::close`] does, but nobody is told of errors.
pub struct Disk {
    image: Image,
    engine: Box<dyn Engine>,
    lines: RefCell<VecDeque<(u64, Box<[u8]>)>>,
    closed: Cell<bool>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image.fmt(f)
    }
}

/// Makes an empty qcow2 image of `size` bytes, a multiple of 512, at `path`, where nothing must be.
///
/// # Errors
/// As [`image::create`](crate::image::create).
pub fn create(path: impl AsRef<Path>, size: u64) -> Result<()> {
    let (files, engine) = host(FileOptions::default())?;
    let options = CreateOptions::new(size);
    block_on(&*engine, crate::image::create(&*engine, &*files, path.as_ref(), &options))
}

fn host(options: FileOptions) -> Result<(Arc<Files>, Box<dyn Engine>)> {
    let files = Files::new(options);
    let engine = host::engine(Aio::Auto, &files, 0)?;
    Ok((files, engine))
}

impl Disk {
    /// Opens the image at `path` and the files it refers to, as far as `options` let it.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        Self::open_with(path, options, FileOptions::default())
    }

    /// As [`Disk::open`] with a choice of how files are opened, without locks for example.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_with(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        how: FileOptions,
    ) -> Result<Self> {
        let (files, engine) = host(how)?;
        let opened = Image::open(&*engine, &*files, path.as_ref(), options);
        let image = block_on(&*engine, opened)?;
        Ok(Self::new(image, engine))
    }

    /// Opens a chain of images, the top one first, whatever their headers say about where backing
    /// and data files lie.
    ///
    /// ```
    /// use vhost_user_qcow2::image::blocking::{Disk, LayerPaths};
    /// use vhost_user_qcow2::image::{Format, OpenOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// let path = directory.path().join("disk.raw");
    /// std::fs::write(&path, [7; 4096])?;
    /// let layers = [LayerPaths { path, format: Format::Raw, data_file: None }];
    /// let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    /// let disk = Disk::open_explicit(&layers, &options)?;
    /// let mut bytes = [0; 2];
    /// disk.read_at(4094, &mut bytes)?;
    /// assert_eq!(bytes, [7, 7]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Image::from_files`], and when a file cannot be opened.
    pub fn open_explicit(layers: &[LayerPaths], options: &OpenOptions) -> Result<Self> {
        let (files, engine) = host(FileOptions::default())?;
        let mut opened = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            let backing = index > 0;
            let read_only = backing || options.read_only;
            let file = files.open(&layer.path, OpenMode { read_only, backing })?;
            let data = layer.data_file.as_ref();
            let mode = OpenMode { read_only, backing: false };
            opened.push(LayerFiles {
                name: layer.path.display().to_string(),
                format: layer.format,
                file,
                data_file: data.map(|path| files.open(path, mode)).transpose()?,
            });
        }
        let image = block_on(&*engine, Image::from_files(&*engine, &opened, options))?;
        Ok(Self::new(image, engine))
    }

    /// A disk over an image that `engine` reaches.
    pub fn new(image: Image, engine: Box<dyn Engine>) -> Self {
        Self { image, engine, lines: RefCell::default(), closed: Cell::new(false) }
    }

    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    /// The image, for what has no call here; [`Disk::run`] runs its methods. What they change is
    /// not noticed by reads that were answered before, unless [`Disk::forget`] is called.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The storage that the image's methods need.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// Runs a future that uses [`Disk::engine`] to its end.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        block_on(&*self.engine, future)
    }

    /// Forgets what was read before.
    pub fn forget(&self) {
        self.lines.borrow_mut().clear();
    }

    /// Fills `bytes` from the disk's byte `at` on.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_at(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        if at.checked_add(len).is_none_or(|end| end > self.size()) {
            let why = format!("{len} bytes at {at} lie beyond the disk's {} bytes", self.size());
            return Err(Error::refused("disk", why));
        }
        if len >= LINE {
            return self.read_long(at, bytes);
        }
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let inside = usize::try_from(at % LINE).expect("less than a line");
            let (line, space) = (at - at % LINE, usize::try_from(LINE).expect("small") - inside);
            let (now, later) = rest.split_at_mut(space.min(rest.len()));
            self.with_line(line, |line| now.copy_from_slice(&line[inside..inside + now.len()]))?;
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    fn read_long(&self, mut at: u64, bytes: &mut [u8]) -> Result<()> {
        for part in bytes.chunks_mut(LONGEST) {
            let buf = Buf::zeroed(part.len());
            self.run(self.image.read_into(&*self.engine, GuestOffset(at), &buf))?;
            buf.copy_to(0, part);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Calls `look` with the line at `line`, which is at the front of the kept ones afterwards.
    fn with_line(&self, line: u64, look: impl FnOnce(&[u8])) -> Result<()> {
        let mut lines = self.lines.borrow_mut();
        match lines.iter().position(|(at, _)| *at == line) {
            Some(0) => {}
            Some(place) => {
                let found = lines.remove(place).expect("its place was just found");
                lines.push_front(found);
            }
            None => {
                let len = LINE.min(self.size() - line);
                let mut bytes = vec![0; usize::try_from(len).expect("a line")];
                self.read_long(line, &mut bytes)?;
                lines.truncate(LINES - 1);
                lines.push_front((line, bytes.into()));
            }
        }
        look(&lines[0].1);
        Ok(())
    }

    /// Writes `bytes` at the disk's byte `at`. Durable after the next [`Disk::flush`].
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let end = at.saturating_add(bytes.len() as u64);
        self.lines
            .borrow_mut()
            .retain(|(line, kept)| line + kept.len() as u64 <= at || *line >= end);
        let mut at = at;
        for part in bytes.chunks(LONGEST) {
            let buf = Buf::copy_of(part);
            self.run(self.image.write_from(&*self.engine, GuestOffset(at), &buf))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush(&self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        self.run(self.image.flush(&*self.engine))
    }

    /// Makes everything durable and ends the use of the image.
    ///
    /// # Errors
    /// As [`Image::close`].
    pub fn close(self) -> Result<()> {
        self.end()
    }

    fn end(&self) -> Result<()> {
        if self.is_read_only() || self.closed.replace(true) {
            return Ok(());
        }
        self.run(self.image.close(&*self.engine))
    }

    /// The `len` bytes from `start` on, as `std::io` knows files.
    ///
    /// # Errors
    /// Refused when they lie beyond the disk.
    pub fn view(&self, start: u64, len: u64) -> Result<View<&Self>> {
        View::new(self, start, len)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // `close` is there for those who want to know.
        let _ = self.end();
    }
}

/// A byte range of a disk with a position, as `std::io` knows files: a partition, say. Several may
/// look at one disk, borrowed or shared as an `Rc<Disk>`.
#[derive(Debug, Clone)]
pub struct View<D> {
    disk: D,
    start: u64,
    len: u64,
    position: u64,
}

impl<D: Borrow<Disk>> View<D> {
    /// The `len` bytes of `disk` from `start` on.
    ///
    /// # Errors
    /// Refused when they lie beyond the disk.
    pub fn new(disk: D, start: u64, len: u64) -> Result<Self> {
        let size = disk.borrow().size();
        if start.checked_add(len).is_none_or(|end| end > size) {
            let why = format!("{len} bytes at {start} lie beyond the disk's {size} bytes");
            return Err(Error::refused("disk", why));
        }
        Ok(Self { disk, start, len, position: 0 })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many of `wanted` bytes lie between the position and the end.
    fn ahead(&self, wanted: usize) -> usize {
        let left = self.len.saturating_sub(self.position);
        usize::try_from(left).map_or(wanted, |left| left.min(wanted))
    }
}

/// The same error for those who expect one of `std::io`.
fn io_error(error: Error) -> io::Error {
    match error.kind() {
        Kind::Io(source) => io::Error::new(source.kind(), error),
        _ => io::Error::other(error),
    }
}

impl<D: Borrow<Disk>> Read for View<D> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.ahead(bytes.len());
        let at = self.start + self.position;
        if count > 0 {
            self.disk.borrow().read_at(at, &mut bytes[..count]).map_err(io_error)?;
        }
        self.position += count as u64;
        Ok(count)
    }
}

impl<D: Borrow<Disk>> Write for View<D> {
    /// Writes nothing behind the end: there `write_all` fails with `WriteZero`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.ahead(bytes.len());
        if count > 0 {
            let at = self.start + self.position;
            self.disk.borrow().write_at(at, &bytes[..count]).map_err(io_error)?;
        }
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.borrow().flush().map_err(io_error)
    }
}

impl<D: Borrow<Disk>> Seek for View<D> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        let why = "a position before the beginning, or too large";
        self.position = position.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, why))?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::mem::MemDisk;

    fn disk(read_only: bool) -> Disk {
        let bytes: Vec<u8> = (0..300_032_u32).map(|at| (at / 7) as u8).collect();
        let host = MemDisk::new();
        let id = host.add("disk", bytes.clone());
        let image = Image::from_raw(crate::raw::Raw::new(id, bytes.len() as u64), read_only);
        Disk::new(image, Box::new(host.engine(0, 7)))
    }

    fn expected(at: u64, len: usize) -> Vec<u8> {
        (at..at + len as u64).map(|at| (at / 7) as u8).collect()
    }

    #[test]
    fn short_and_long_reads_give_the_same() {
        let disk = disk(true);
        for (at, len) in [(0, 1), (65_530, 20), (65_536, 65_536), (1, 200_000), (300_031, 1)] {
            let mut bytes = vec![0; len];
            disk.read_at(at, &mut bytes).expect("inside");
            assert_eq!(bytes, expected(at, len), "{len} bytes at {at}");
        }
        assert!(disk.read_at(300_032, &mut [0]).is_err());
        assert!(disk.read_at(u64::MAX, &mut [0, 0]).is_err());
        assert!(disk.write_at(0, &[1]).is_err(), "read-only");
    }

    #[test]
    fn a_write_is_seen_by_the_next_read() {
        let disk = disk(false);
        let mut bytes = [0; 4];
        disk.read_at(65_534, &mut bytes).expect("read");
        disk.write_at(65_535, &[251, 252]).expect("write");
        disk.read_at(65_534, &mut bytes).expect("read");
        let old = expected(65_534, 4);
        assert_eq!(bytes, [old[0], 251, 252, old[3]]);
    }

    #[test]
    fn a_view_ends_where_it_ends() {
        let disk = disk(false);
        let mut view = disk.view(1000, 50).expect("inside");
        let mut all = Vec::new();
        view.read_to_end(&mut all).expect("all of it");
        assert_eq!(all, expected(1000, 50));
        assert_eq!(view.seek(SeekFrom::Current(-2)).expect("back"), 48);
        assert_eq!(view.write(b"abcdef").expect("two fit"), 2);
        assert_eq!(view.write(b"cdef").expect("none fits"), 0);
        assert_eq!(view.seek(SeekFrom::Start(500)).expect("beyond"), 500);
        assert_eq!(view.read(&mut [0; 4]).expect("nothing there"), 0);
        assert!(view.seek(SeekFrom::End(-51)).is_err());
        let mut bytes = [0; 3];
        disk.read_at(1048, &mut bytes).expect("read");
        assert_eq!(bytes, [b'a', b'b', expected(1050, 1)[0]]);
        assert!(disk.view(300_000, 33).is_err() && disk.view(u64::MAX, 1).is_err());
    }
}
