//! Persistent bitmaps of a disk, in a copy of it: what has changed since the last backup goes with
//! the bytes.

use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::watch::Outcome;
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::{BitmapEdit, BitmapFacts, MergeSource, load_bitmap, read_bitmaps};
use crate::storage::Storage;

/// Bitmaps are stored together whose bits have so many bytes, and at least one.
const TOGETHER: u64 = 32 << 20;

/// The bitmaps of a disk that is copied.
#[derive(Debug, Clone, Default)]
pub struct SourceBitmaps {
    /// Those that can be copied, in the order in which the image has them.
    pub usable: Vec<BitmapFacts>,
    /// The names of those that cannot, each with why.
    pub broken: Vec<(String, &'static str)>,
}

fn qcow2(image: &Image) -> Result<&Qcow2> {
    match image.chain.top() {
        Layer::Qcow2(top) => Ok(top),
        Layer::Raw(_) => Err(Error::refused(&*image.name, "a raw image has no bitmaps")),
    }
}

/// The bitmaps of the top layer of `source`.
///
/// # Errors
/// `Refused` when that is a raw image; when the list of bitmaps cannot be read.
pub async fn source_bitmaps(st: &dyn Storage, source: &Image) -> Result<SourceBitmaps> {
    let top = qcow2(source)?;
    let all = read_bitmaps(st, top.file(), top.header()).await;
    let mut bitmaps = SourceBitmaps::default();
    for bitmap in all.map_err(|error| error.within(&source.name))? {
        let inconsistent = "it is inconsistent, since it was in use when a program died";
        match bitmap.obstacle.or(bitmap.in_use.then_some(inconsistent)) {
            Some(why) => bitmaps.broken.push((bitmap.name, why)),
            None => bitmaps.usable.push(bitmap),
        }
    }
    Ok(bitmaps)
}

/// Refuses a target that cannot get `bitmaps`, before anything is copied.
///
/// # Errors
/// `Refused` with what is in the way; when the target's own list of bitmaps cannot be read.
pub async fn check_bitmaps(
    st: &dyn Storage,
    source: &Image,
    bitmaps: &[BitmapFacts],
    target: &Image,
) -> Result<()> {
    let (from, to) = (qcow2(source)?, qcow2(target)?);
    let refuse = |why: String| Err(Error::refused(&*target.name, why));
    if to.header().version < 3 {
        return refuse("a version 2 image (compat=0.10) has no bitmaps".to_owned());
    }
    let sizes = (from.header().size, to.header().size);
    if sizes.0 != sizes.1 {
        return refuse(format!(
            "bitmaps of a disk of {} bytes do not fit one of {} bytes",
            sizes.0, sizes.1
        ));
    }
    let own = read_bitmaps(st, to.file(), to.header()).await;
    let own = own.map_err(|error| error.within(&target.name))?;
    let same = own.iter().find(|own| bitmaps.iter().any(|bitmap| bitmap.name == own.name));
    match same {
        Some(bitmap) => refuse(format!("it has a bitmap called {:?} already", bitmap.name)),
        None => Ok(()),
    }
}

/// Copies `bitmaps` of `source` to `target`, which nothing else uses: names, granularities, whether
/// they are enabled, and bits. Between two of them `goes_on` says whether to.
///
/// # Errors
/// As [`load_bitmap`] and [`Qcow2::edit_bitmaps`]; some may have been copied then.
pub async fn copy_bitmaps(
    st: &dyn Storage,
    source: &Image,
    bitmaps: &[BitmapFacts],
    target: &mut Image,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Outcome> {
    let from = qcow2(source)?;
    let (mut edits, mut bytes) = (Vec::new(), 0);
    for bitmap in bitmaps {
        if !goes_on() {
            return Ok(Outcome::Stopped);
        }
        let name = || bitmap.name.clone();
        let loaded = load_bitmap(st, from.file(), from.header(), &bitmap.name).await;
        let loaded = loaded.map_err(|error| error.within(&source.name))?;
        if bytes + loaded.bytes() > TOGETHER {
            store(st, target, std::mem::take(&mut edits)).await?;
            bytes = 0;
        }
        bytes += loaded.bytes();
        edits.push(BitmapEdit::Add { name: name(), granularity: Some(bitmap.granularity) });
        edits.push(BitmapEdit::Merge { name: name(), source: MergeSource::Loaded(loaded) });
        if !bitmap.auto {
            edits.push(BitmapEdit::Disable(name()));
        }
    }
    store(st, target, edits).await?;
    Ok(Outcome::Complete)
}

async fn store(st: &dyn Storage, target: &mut Image, edits: Vec<BitmapEdit>) -> Result<()> {
    if edits.is_empty() {
        return Ok(());
    }
    let name = target.name.clone();
    let stored = target.top_qcow2()?.edit_bitmaps(st, edits).await;
    stored.map_err(|error| error.within(name))
}
