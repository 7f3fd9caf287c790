//! The layers of a disk, top first, and finding the one that holds a byte.

use crate::bytes::GuestOffset;
use crate::error::Result;
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

/// The layers of a disk.
#[derive(Debug)]
pub(crate) struct Chain(pub(crate) Vec<Layer>);

impl Layer {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(image) => image.size(),
        }
    }

    async fn map(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<Extent> {
        match self {
            Self::Raw(raw) => {
                let (file, at) = (raw.file(), raw.host(at));
                Ok(Extent::Data { file, at, len })
            }
            Self::Qcow2(image) => match image.lookup(at, len)? {
                Some(extent) => Ok(extent),
                None => image.map(st, at, len).await,
            },
        }
    }
}

impl Chain {
    /// The layer that is written to.
    pub(crate) fn top(&self) -> &Layer {
        &self.0[0]
    }

    /// Where the bytes from `at` on live, as far as that is one place of at most `len` bytes.
    pub(crate) async fn resolve(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        mut len: u64,
    ) -> Result<Place> {
        for (depth, layer) in self.0.iter().enumerate() {
            // A layer that is shorter than the one above reads as zeros behind its end.
            let inside = layer.size().saturating_sub(at.0);
            if inside == 0 {
                return Ok(Place::Plain(Extent::Zero { len }));
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
                    return Ok(Place::Compressed { file, kind, cluster_size, extent });
                }
                plain => return Ok(Place::Plain(plain)),
            }
        }
        Ok(Place::Plain(Extent::Zero { len }))
    }
}
