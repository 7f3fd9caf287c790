//! The layers of a disk, top first, and finding the one that holds a byte.

use std::ops::Range;

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::hints::Hints;
use crate::qcow2::header::Compression;
use crate::qcow2::{CompressedExtent, Extent, Qcow2};
use crate::raw::Raw;
use crate::storage::{FileId, Storage};

/// One layer. A closed set: adding a format means adding it here.
#[derive(Debug)]
pub(crate) enum Layer {
    /// A raw file.
    Raw(Raw),
    /// A qcow2 image.
    Qcow2(Box<Qcow2>),
}

/// Where a run of guest bytes lives, over all layers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// In a file, as they are; or nowhere; never `Backing` or `Compressed`.
    Plain(Extent),
    /// In a compressed cluster of a layer's file.
    Compressed { file: FileId, kind: Compression, cluster_size: u64, extent: CompressedExtent },
}

impl Place {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Plain(extent) => extent.len(),
            Self::Compressed { extent, .. } => extent.len,
        }
    }
}

/// The layers of a disk, and what is remembered of those below the top.
#[derive(Debug)]
pub(crate) struct Chain(pub(crate) Vec<Layer>, Hints);

impl Layer {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(image) => image.size(),
        }
    }

    /// Where bytes live, if that is known at once.
    fn lookup(&self, at: GuestOffset, len: u64) -> Result<Option<Extent>> {
        match self {
            Self::Raw(raw) => Ok(Some(Extent::Data { file: raw.file(), at: raw.host(at), len })),
            Self::Qcow2(image) => image.lookup(at, len),
        }
    }

    async fn map(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<Extent> {
        match (self.lookup(at, len)?, self) {
            (None, Self::Qcow2(image)) => image.map(st, at, len).await,
            (Some(extent), _) => Ok(extent),
            (None, Self::Raw(_)) => unreachable!("a raw file has no tables"),
        }
    }
}

impl Chain {
    /// A chain of layers, top first.
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let hints = hints(&layers);
        Self(layers, hints)
    }

    /// Forgets what was found out about layers: the top has another size, and what was asked of a
    /// piece up to its old end does not hold behind it.
    pub(crate) fn forget_hints(&mut self) {
        self.1 = hints(&self.0);
    }

    /// The layer that is written to.
    pub(crate) fn top(&self) -> &Layer {
        &self.0[0]
    }

    /// As [`Chain::resolve`] where the bytes lie as they are and that is known at once; `None`
    /// where tables must be loaded or layers be asked one after the other.
    pub(crate) fn lookup(&self, at: GuestOffset, len: u64) -> Result<Option<Extent>> {
        match self.top().lookup(at, len)? {
            Some(Extent::Backing { len }) => self.lookup_below(at, len),
            Some(plain @ (Extent::Data { .. } | Extent::Zero { .. })) => Ok(Some(plain)),
            Some(Extent::Compressed(_)) | None => Ok(None),
        }
    }

    fn lookup_below(&self, at: GuestOffset, len: u64) -> Result<Option<Extent>> {
        let Some((layer, len)) = self.hint(at, len) else { return Ok(None) };
        let Some(layer) = self.0.get(layer) else { return Ok(Some(Extent::Zero { len })) };
        // What the last cluster of a shorter layer has behind that layer's end is not the disk's.
        let inside = layer.size().saturating_sub(at.0);
        if inside == 0 {
            return Ok(Some(Extent::Zero { len }));
        }
        let len = len.min(inside);
        Ok(match layer.lookup(at, len).map_err(Error::below)? {
            Some(plain @ (Extent::Data { .. } | Extent::Zero { .. })) => Some(plain),
            _ => None,
        })
    }

    /// The layer that is known to hold the bytes from `at` on, and how many of `len` that is.
    fn hint(&self, at: GuestOffset, len: u64) -> Option<(usize, u64)> {
        let layer = self.1.layer(at)?;
        let (start, piece) = self.1.piece(at);
        Some((layer, len.min(piece - (at - start))))
    }

    /// Where the bytes from `at` on live, as far as that is one place of at most `len` bytes.
    pub(crate) async fn resolve(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
    ) -> Result<Place> {
        let (_, place) = self.walk(st, 0..1, at, len).await?;
        let len = match place {
            Place::Plain(Extent::Backing { len }) => len,
            place => return Ok(place),
        };
        if self.1.is_empty() {
            return self.walk(st, 1..self.0.len(), at, len).await.map(|(_, place)| settled(place));
        }
        if self.1.layer(at).is_none() {
            self.find_piece(st, at).await?;
        }
        let (from, len) = self.hint(at, len).unwrap_or((1, len));
        self.walk(st, from..self.0.len(), at, len).await.map(|(_, place)| settled(place))
    }

    /// Finds out which layer holds a byte's piece, and remembers that if it is one for all of it.
    async fn find_piece(&self, st: &dyn Storage, at: GuestOffset) -> Result<()> {
        let (start, piece) = self.1.piece(at);
        let inside = piece.min(self.top().size() - start.0);
        let (layer, place) = self.walk(st, 1..self.0.len(), start, inside).await?;
        if place.len() == inside {
            self.1.remember(at, layer);
        }
        Ok(())
    }

    /// Asks some layers one after the other where the bytes from `at` on live; returns which one
    /// knows. `Backing` is the answer, and the number of the next layer, if none does.
    async fn walk(
        &self,
        st: &dyn Storage,
        layers: Range<usize>,
        at: GuestOffset,
        mut len: u64,
    ) -> Result<(usize, Place)> {
        let end = layers.end;
        for depth in layers {
            let layer = &self.0[depth];
            // A layer that is shorter than the one above reads as zeros behind its end.
            let inside = layer.size().saturating_sub(at.0);
            if inside == 0 {
                return Ok((depth, Place::Plain(Extent::Zero { len })));
            }
            len = len.min(inside);
            let extent = layer.map(st, at, len).await;
            match extent.map_err(|error| if depth > 0 { error.below() } else { error })? {
                Extent::Backing { len: run } => len = run,
                Extent::Compressed(extent) => {
                    let Layer::Qcow2(image) = layer else {
                        unreachable!("raw is never compressed")
                    };
                    let (file, kind) = (image.file(), image.compression());
                    let cluster_size = image.cluster_size();
                    let place = Place::Compressed { file, kind, cluster_size, extent };
                    return Ok((depth, place));
                }
                plain => return Ok((depth, Place::Plain(plain))),
            }
        }
        Ok((end, Place::Plain(Extent::Backing { len })))
    }
}

fn hints(layers: &[Layer]) -> Hints {
    let bits = |layer: &Layer| match layer {
        Layer::Raw(_) => None,
        Layer::Qcow2(image) => Some(image.cluster_size().ilog2()),
    };
    let smallest = layers.iter().filter_map(bits).min().unwrap_or(u32::MAX);
    let size = layers.first().map_or(0, Layer::size);
    Hints::new(layers.len(), size, smallest)
}

/// What no layer holds are zeros.
fn settled(place: Place) -> Place {
    match place {
        Place::Plain(Extent::Backing { len }) => Place::Plain(Extent::Zero { len }),
        place => place,
    }
}
