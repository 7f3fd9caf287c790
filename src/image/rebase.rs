//! Rebase: an overlay gets another backing file.

use std::path::Path;

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::gate::{Format, Gate, OpenOptions};
use crate::image::status::BlockMap;
use crate::image::watch::{Outcome, Watch};
use crate::qcow2::{Qcow2, StatusKind};
use crate::storage::{Buf, FileSource, Storage};

/// Bytes are compared in pieces of at most this many, or of a cluster.
const PIECE: u64 = 1 << 20;

/// A backing file for an image that has one, or none, already.
#[derive(Debug, Clone, Default)]
pub struct NewBacking {
    /// The name that is recorded, relative to the image; without it the image stands alone.
    pub name: Option<String>,
    /// The format that is recorded, which a name needs.
    pub format: Option<Format>,
}

impl NewBacking {
    fn recorded_format(&self) -> Option<&'static str> {
        self.format.filter(|_| self.name.is_some()).map(|format| match format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }

    fn check(&self, path: &Path) -> Result<()> {
        if self.name.is_some() && self.format.is_none() {
            let why = "the format of the new backing file must be given (-F raw or qcow2): it is \
                       never guessed";
            return Err(Error::refused(path.display().to_string(), why));
        }
        Ok(())
    }
}

/// Gives the image at `path` another backing file, and keeps the disk as it is: what the new one
/// would show differently is copied into the image first, and is durable before its header changes
/// (R23 in `ORDERING.md`). When `watch` says no before the end, the image has its old backing file
/// and perhaps more data than before, and the rebase can be done again.
///
/// # Errors
/// As [`Image::open`] for both chains; `Refused` when the header has no room for the name; I/O
/// errors, after which the image has its old backing file, and perhaps more data than before.
pub async fn rebase(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    new: &NewBacking,
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    new.check(path)?;
    let within = |error: Error| error.within(path.display());
    let mut image = Image::open(st, source, path, options).await?;
    image.top_qcow2().map_err(within)?.check_backing(new.name.is_some()).map_err(within)?;
    let gate = Gate::new(st, source, path, options)?;
    let below = match &new.name {
        None => None,
        Some(name) => {
            let target = gate.admit(path, "new backing file", name)?;
            let options = OpenOptions { format: new.format, read_only: true, ..options.clone() };
            Some(Image::open(st, source, &target, &options).await?)
        }
    };
    // What is zeros in the image must say so, even if nothing lies below it now.
    image.top_qcow2().map_err(within)?.set_backed();
    let copied = Copier { st, image: &image, below: below.as_ref() }.run(watch).await;
    let outcome = copied.map_err(within)?;
    image.close(st).await.map_err(within)?;
    if outcome == Outcome::Complete {
        record(st, &mut image, new).await.map_err(within)?;
    }
    Ok(outcome)
}

/// Records another backing file for the image at `path` without looking at it or at the old one:
/// what the disk holds may change with it.
///
/// # Errors
/// As [`Image::open`] for the image alone, and as [`rebase`] for its header.
pub async fn rebase_unsafe(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    new: &NewBacking,
) -> Result<()> {
    new.check(path)?;
    let within = |error: Error| error.within(path.display());
    let mut image = Gate::new(st, source, path, options)?.open_alone(path).await?;
    image.top_qcow2().map_err(within)?.check_backing(new.name.is_some()).map_err(within)?;
    record(st, &mut image, new).await.map_err(within)
}

async fn record(st: &dyn Storage, image: &mut Image, new: &NewBacking) -> Result<()> {
    image.top_qcow2()?.set_backing(st, new.name.as_deref(), new.recorded_format()).await
}

/// Copies into an image what its new backing file would show differently.
struct Copier<'a> {
    st: &'a dyn Storage,
    image: &'a Image,
    below: Option<&'a Image>,
}

impl Copier<'_> {
    async fn run(&self, watch: &mut Watch<'_>) -> Result<Outcome> {
        let Layer::Qcow2(top) = self.image.chain.top() else { return Ok(Outcome::Complete) };
        let maps = (
            BlockMap::new(self.st, self.image).await?,
            match self.below {
                None => None,
                Some(below) => Some(BlockMap::new(self.st, below).await?),
            },
        );
        let (mut at, size) = (0, self.image.size());
        let mut goes_on = watch(0, size);
        while goes_on && at < size {
            let own = top.status(self.st, GuestOffset(at), size - at).await?;
            let mut len = own.len;
            if own.kind == StatusKind::Unallocated {
                // The entries of the image say this of whole units, so that pieces do, too.
                len = len.min(PIECE.max(top.cluster_size()));
                let both_zero = is_zero(self.st, &maps.0, at, len).await?
                    && match &maps.1 {
                        None => true,
                        Some(map) => is_zero(self.st, map, at, len).await?,
                    };
                if !both_zero {
                    self.settle(top, at, len).await?;
                }
            }
            at += len;
            goes_on = watch(at, size);
        }
        Ok(if at < size { Outcome::Stopped } else { Outcome::Complete })
    }

    /// Compares a range that the image does not hold, and writes what differs into it.
    async fn settle(&self, top: &Qcow2, at: u64, len: u64) -> Result<()> {
        let size = usize::try_from(len).expect("a small piece");
        let old = read(self.st, Some(self.image), at, size).await?;
        let new = read(self.st, self.below, at, size).await?;
        let unit = usize::try_from(top.zero_granularity()).expect("at most a cluster");
        let differs: Vec<bool> =
            old.chunks(unit).zip(new.chunks(unit)).map(|(old, new)| old != new).collect();
        let mut from = 0;
        while from < differs.len() {
            let run = differs[from..].iter().take_while(|differs| **differs).count();
            if run > 0 {
                let start = from * unit;
                let end = ((from + run) * unit).min(size);
                self.put(top, at + start as u64, &old[start..end]).await?;
            }
            from += run.max(1);
        }
        Ok(())
    }

    async fn put(&self, top: &Qcow2, at: u64, bytes: &[u8]) -> Result<()> {
        let here = GuestOffset(at);
        if top.can_zero(true) && bytes.iter().all(|byte| *byte == 0) {
            return self.image.write_zeroes(self.st, here, bytes.len() as u64, true).await;
        }
        self.image.write(self.st, here, Buf::copy_of(bytes)).await
    }
}

/// Whether a range is zeros without a look at data; behind the end of a disk it is.
async fn is_zero(st: &dyn Storage, map: &BlockMap<'_>, mut at: u64, len: u64) -> Result<bool> {
    let end = (at + len).min(map.size());
    while at < end {
        let status = map.status(st, GuestOffset(at), end - at).await?;
        if !status.zero {
            return Ok(false);
        }
        at += status.len;
    }
    Ok(true)
}

/// The bytes of a disk; zeros behind its end, or without a disk.
async fn read(st: &dyn Storage, image: Option<&Image>, at: u64, size: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let Some(image) = image else { return Ok(bytes) };
    let inside = image.size().saturating_sub(at).min(size as u64);
    if inside > 0 {
        let inside = usize::try_from(inside).expect("a small piece");
        let buf = Buf::zeroed(inside);
        image.read(st, GuestOffset(at), buf.clone()).await?;
        bytes[..inside].copy_from_slice(&buf.to_vec());
    }
    Ok(bytes)
}
