//! What a disk's bytes are, over all layers, with no data read: the map of an image.

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::qcow2::StatusKind;
use crate::storage::{FileId, Storage};

/// What a run of a disk's bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Length in bytes.
    pub len: u64,
    /// The layer that says so: 0 is the top one. For bytes that no layer has, the last one that
    /// reaches so far.
    pub depth: usize,
    /// Some layer has an entry for the bytes, be it data or zeros.
    pub present: bool,
    /// The bytes are zeros.
    pub zero: bool,
    /// There are bytes to be read; when they are zeros too, their place was prepared and not
    /// written yet.
    pub data: bool,
    /// The bytes are compressed.
    pub compressed: bool,
    /// The file and the place in it of the first byte; those after it follow.
    pub place: Option<(FileId, HostOffset)>,
}

impl Status {
    /// Whether `next`, which begins where this ends, is more of the same.
    pub fn joins(&self, next: &Self) -> bool {
        let follows = match (self.place, next.place) {
            (None, None) => true,
            (Some((file, at)), Some((other, next))) => file == other && at + self.len == next,
            _ => false,
        };
        let flags = |it: &Self| (it.depth, it.present, it.zero, it.data, it.compressed);
        follows && flags(self) == flags(next)
    }
}

/// A disk that is looked at as a whole.
#[derive(Debug)]
pub struct BlockMap<'a> {
    image: &'a Image,
    /// For each layer whether its data clusters may be holes of the host's file.
    prepared: Vec<bool>,
}

impl<'a> BlockMap<'a> {
    /// Prepares to look at `image`, which nobody changes meanwhile.
    ///
    /// # Errors
    /// When the host does not answer, or refcounts cannot be read.
    pub async fn new(st: &dyn Storage, image: &'a Image) -> Result<Self> {
        let mut prepared = Vec::new();
        for layer in &image.chain.0 {
            prepared.push(match layer {
                Layer::Raw(_) => true,
                Layer::Qcow2(image) => image.is_prepared(st).await?,
            });
        }
        Ok(Self { image, prepared })
    }

    /// What the bytes from `at` on are, as far as they are one run of at most `len` bytes. `len` is
    /// not zero and ends inside the disk.
    ///
    /// # Errors
    /// When a table cannot be read or contradicts the format.
    pub async fn status(&self, st: &dyn Storage, at: GuestOffset, mut len: u64) -> Result<Status> {
        let layers = &self.image.chain.0;
        let mut nothing = Status {
            len,
            depth: 0,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            place: None,
        };
        for (depth, layer) in layers.iter().enumerate() {
            let inside = layer.size().saturating_sub(at.0);
            if inside == 0 {
                // The layer above ends a disk that this one is too short for.
                break;
            }
            len = len.min(inside);
            let found = match layer {
                Layer::Raw(raw) => {
                    let place = (raw.file(), raw.host(at));
                    let data = Status {
                        len,
                        depth,
                        present: true,
                        zero: false,
                        data: true,
                        compressed: false,
                        place: Some(place),
                    };
                    return holes(st, data, false);
                }
                Layer::Qcow2(image) => image.status(st, at, len).await,
            };
            let found = found.map_err(|error| if depth > 0 { error.below() } else { error })?;
            let Layer::Qcow2(image) = layer else { unreachable!("raw is answered above") };
            let status = Status {
                len: found.len,
                depth,
                present: found.kind != StatusKind::Unallocated,
                zero: matches!(found.kind, StatusKind::Zero | StatusKind::Unallocated),
                data: matches!(found.kind, StatusKind::Data | StatusKind::Compressed),
                compressed: found.kind == StatusKind::Compressed,
                place: found.host.map(|host| (image.data_file(), host)),
            };
            if found.kind == StatusKind::Data && self.prepared[depth] {
                return holes(st, status, true);
            }
            if status.present {
                return Ok(status);
            }
            len = found.len;
            nothing = status;
        }
        Ok(nothing)
    }

    /// As [`BlockMap::status`], with neighbours that are more of the same joined.
    ///
    /// # Errors
    /// As [`BlockMap::status`].
    pub async fn run(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<Status> {
        let mut run = self.status(st, at, len).await?;
        while run.len < len {
            let next = self.status(st, at + run.len, len - run.len).await?;
            if !run.joins(&next) {
                break;
            }
            run.len += next.len;
        }
        Ok(run)
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// The disk.
    pub fn image(&self) -> &'a Image {
        self.image
    }
}

/// The part of data up to where the host's file changes between data and a hole. A hole of a
/// `prepared` place is data that are zeros, one of a raw file is only zeros.
fn holes(st: &dyn Storage, data: Status, prepared: bool) -> Result<Status> {
    let Some((file, at)) = data.place else { return Ok(data) };
    let run = st.host_run(file, at);
    let run = run.map_err(|error| Error::io("looking for holes in the image's file", error))?;
    let len = data.len.min(run.len);
    Ok(if run.data {
        Status { len, ..data }
    } else {
        Status { len, zero: true, data: prepared, ..data }
    })
}
