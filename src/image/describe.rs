//! What an operator is told of a disk's layers.

use crate::image::chain::Layer;
use crate::image::{Format, Image};
use crate::qcow2::Qcow2;
use crate::storage::FileId;

/// One layer of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerInfo {
    /// The image's file.
    pub file: FileId,
    /// The file with the guest's bytes, if that is another.
    pub data_file: Option<FileId>,
    /// Its format.
    pub format: Format,
    /// The size in bytes of the disk that it describes.
    pub size: u64,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
}

/// What only qcow2 images have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Info {
    /// The format's version, 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Internal snapshots.
    pub snapshots: u32,
}

impl Qcow2Info {
    fn of(image: &Qcow2) -> Self {
        let header = image.header();
        let (version, snapshots) = (header.version, header.snapshots);
        Self { version, cluster_size: image.cluster_size(), snapshots }
    }
}

impl Image {
    /// The layers, the one that is written to first.
    pub fn layers(&self) -> impl Iterator<Item = LayerInfo> {
        self.chain.0.iter().map(|layer| {
            let size = layer.size();
            match layer {
                Layer::Raw(raw) => LayerInfo {
                    file: raw.file(),
                    data_file: None,
                    format: Format::Raw,
                    size,
                    qcow2: None,
                },
                Layer::Qcow2(image) => {
                    let (file, data) = (image.file(), image.data_file());
                    LayerInfo {
                        file,
                        data_file: (data != file).then_some(data),
                        format: Format::Qcow2,
                        size,
                        qcow2: Some(Qcow2Info::of(image)),
                    }
                }
            }
        })
    }
}
