//! Opening a chain whose files the caller has opened: no name in a header is looked at.

use crate::error::{Error, Result};
use crate::image::chain::Layer;
use crate::image::gate::DEPTH_LIMIT;
use crate::image::{Format, Image, OpenOptions};
use crate::qcow2::open::{Parts, read_header, repair_dirty};
use crate::qcow2::{Inflated, Qcow2};
use crate::raw::Raw;
use crate::storage::{Opened, Storage};
use crate::sync::Arc;

/// One layer of a disk, with the files that belong to it.
#[derive(Debug, Clone)]
pub struct LayerFiles {
    /// What the layer is called in errors.
    pub name: String,
    /// The image's format.
    pub format: Format,
    /// The image file.
    pub file: Opened,
    /// The external data file, for an image that keeps its data in one.
    pub data_file: Option<Opened>,
}

impl Image {
    /// A disk over files that are open: `layers` are the image, its backing file, that one's
    /// backing file and so on. What the headers say about where those lie is not used; only that
    /// there are backing and data files must agree.
    ///
    /// The top layer is written to unless `options` are read-only; of the other options, those for
    /// paths and formats have no meaning here.
    ///
    /// ```
    /// use vhost_user_qcow2::bytes::GuestOffset;
    /// use vhost_user_qcow2::image::{Format, Image, LayerFiles, OpenOptions};
    /// use vhost_user_qcow2::storage::mem::MemDisk;
    /// use vhost_user_qcow2::storage::{Buf, FileSource, OpenMode, block_on};
    ///
    /// # fn main() -> vhost_user_qcow2::error::Result<()> {
    /// // Any `Storage` serves: here a simulated disk, in a program one of `storage::host`.
    /// let host = MemDisk::new();
    /// host.add("base.raw", b"the guest's bytes".repeat(1000));
    /// let engine = host.engine(0, 1);
    /// let mode = OpenMode { read_only: true, backing: false };
    /// let file = host.open("base.raw".as_ref(), mode)?;
    /// let layer =
    ///     LayerFiles { name: "base".into(), format: Format::Raw, file, data_file: None };
    /// let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    ///
    /// let bytes = block_on(&engine, async {
    ///     let image = Image::from_files(&engine, &[layer], &options).await?;
    ///     let buf = Buf::zeroed(11);
    ///     image.read_into(&engine, GuestOffset(0), &buf).await?;
    ///     Ok::<_, vhost_user_qcow2::error::Error>(buf.to_vec())
    /// })?;
    /// assert_eq!(bytes, b"the guest's");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When there are no layers or too many, one file is used twice, a header asks for a backing or
    /// data file that is not there or is silent about one that is, and as [`Image::open`] for what
    /// concerns headers and tables.
    pub async fn from_files(
        st: &dyn Storage,
        layers: &[LayerFiles],
        options: &OpenOptions,
    ) -> Result<Self> {
        let Some(top) = layers.first().filter(|_| layers.len() <= DEPTH_LIMIT) else {
            let why = format!("{} layers make no disk; 1 to {DEPTH_LIMIT} do", layers.len());
            return Err(Error::refused("disk", why));
        };
        refuse_twice(layers)?;
        let inflated = Arc::new(Inflated::new(options.inflated));
        let mut opened = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            let (first, last) = (index == 0, index + 1 == layers.len());
            let read_only = !first || options.read_only;
            let place = Place { backed: !last, read_only };
            opened.push(open(st, layer, place, options, &inflated).await?);
        }
        let mut image = Self::from_layers(opened, options.read_only).with_policy(options.policy);
        (image.inflated, image.compress) = (inflated, options.compress);
        image.name = top.name.as_str().into();
        if options.compress {
            image.compressible().map_err(|error| error.within(&top.name))?;
        }
        Ok(image)
    }
}

/// What a layer's place in the chain means for it.
#[derive(Clone, Copy)]
struct Place {
    backed: bool,
    read_only: bool,
}

/// One file must not be two layers: a write to it would change what lies below.
fn refuse_twice(layers: &[LayerFiles]) -> Result<()> {
    let mut seen = Vec::new();
    for layer in layers {
        for file in [Some(layer.file), layer.data_file].into_iter().flatten() {
            if seen.contains(&file.identity) {
                return Err(Error::refused(&*layer.name, "its file is in the chain twice"));
            }
            seen.push(file.identity);
        }
    }
    Ok(())
}

async fn open(
    st: &dyn Storage,
    layer: &LayerFiles,
    place: Place,
    options: &OpenOptions,
    inflated: &Arc<Inflated>,
) -> Result<Layer> {
    let refuse = |why: &str| Err(Error::refused(&*layer.name, why));
    if layer.format == Format::Raw {
        return match (place.backed, layer.data_file) {
            (true, _) => refuse("a raw image has no backing file, but a layer was given below it"),
            (_, Some(_)) => refuse("a raw image has no data file, but one was given"),
            _ => Ok(Layer::Raw(Raw::new(layer.file.id, layer.file.length))),
        };
    }
    let (mut file, mut header) = (layer.file, read_header(st, &layer.name, layer.file).await?);
    if !place.read_only {
        (file, header) = repair_dirty(st, &layer.name, file, header).await?;
    }
    match (header.backing.is_some(), place.backed) {
        (true, false) => return refuse("it has a backing file, and no layer was given below it"),
        (false, true) => return refuse("it has no backing file, but a layer was given below it"),
        _ => {}
    }
    match (header.geometry.rules.data_file, layer.data_file.is_some()) {
        (true, false) => return refuse("it has an external data file, and none was given"),
        (false, true) => return refuse("it has no external data file, but one was given"),
        _ => {}
    }
    let parts = Parts {
        data: layer.data_file.map(|file| file.id),
        backed: place.backed,
        read_only: place.read_only,
        caches: options.caches,
    };
    let image = Qcow2::open(st, &layer.name, file, header, parts).await?;
    Ok(Layer::Qcow2(Box::new(image.with_inflated(Arc::clone(inflated)))))
}
