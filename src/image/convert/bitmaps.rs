//! Persistent bitmaps of a disk, in a copy of it: what has changed since the last backup goes with
//! the bytes.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::watch::Outcome;
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::{BitmapEdit, MergeSource, StoredBitmap, read_bitmaps, stored_bitmaps};
use crate::storage::Storage;

/// Bitmaps are stored together whose bits have so many bytes, and at least one.
const TOGETHER: u64 = 32 << 20;
/// Most bytes of tables and bits, over all bitmaps, that are looked at before a copy.
const MOST: u64 = 1 << 30;

/// The bitmaps of a disk that is copied.
#[derive(Debug, Clone, Default)]
pub struct SourceBitmaps {
    /// Those that can be copied, in the order in which the image has them.
    pub usable: Vec<StoredBitmap>,
    /// The names of those that cannot, each with why.
    pub broken: Vec<(String, String)>,
}

fn qcow2(image: &Image) -> Result<&Qcow2> {
    match image.chain.top() {
        Layer::Qcow2(top) => Ok(top),
        Layer::Raw(_) => Err(Error::refused(&*image.name, "a raw image has no bitmaps")),
    }
}

/// The bitmaps of the top layer of `source`. Each is read, so that whoever replaces something by a
/// copy knows before what the copy will hold.
///
/// # Errors
/// `Refused` when that is a raw image; when the list of bitmaps cannot be read.
pub async fn source_bitmaps(st: &dyn Storage, source: &Image) -> Result<SourceBitmaps> {
    let top = qcow2(source)?;
    let (file, header) = (top.file(), top.header());
    let all = stored_bitmaps(st, file, header).await;
    let (mut bitmaps, mut bytes) = (SourceBitmaps::default(), 0_u64);
    for bitmap in all.map_err(|error| error.within(&source.name))? {
        let name = bitmap.facts().name;
        let mut obstacle = bitmap.obstacle(header.size);
        if obstacle.is_none() {
            bytes = bytes.saturating_add(bitmap.cost(header.size));
            let large = "it and those before it are larger than 1 GiB together";
            obstacle = (bytes > MOST).then_some(large);
        }
        if let Some(why) = obstacle {
            bitmaps.broken.push((name, why.to_owned()));
            continue;
        }
        match bitmap.load(st, file, header).await {
            Ok(_) => bitmaps.usable.push(bitmap),
            Err(error) => bitmaps.broken.push((name, error.to_string())),
        }
    }
    Ok(bitmaps)
}

/// Refuses a new target of that version and size in bytes that could not get the bitmaps of
/// `source`, before it is made.
///
/// # Errors
/// `Refused` with what is in the way.
pub fn check_fit(source: &Image, name: &str, version: u32, size: u64) -> Result<()> {
    let from = qcow2(source)?.header().size;
    let refuse = |why: String| Err(Error::refused(name, why));
    if version < 3 {
        return refuse("a version 2 image (compat=0.10) has no bitmaps".to_owned());
    }
    if from != size {
        return refuse(format!("bitmaps of a disk of {from} bytes do not fit one of {size} bytes"));
    }
    Ok(())
}

/// Refuses a target that cannot get `bitmaps`, before anything is copied.
///
/// # Errors
/// `Refused` with what is in the way; when the target's own list of bitmaps cannot be read.
pub async fn check_bitmaps(
    st: &dyn Storage,
    source: &Image,
    bitmaps: &[StoredBitmap],
    target: &Image,
) -> Result<()> {
    let to = qcow2(target)?;
    check_fit(source, &target.name, to.header().version, to.header().size)?;
    let own = read_bitmaps(st, to.file(), to.header()).await;
    let own = own.map_err(|error| error.within(&target.name))?;
    let names: HashSet<String> = bitmaps.iter().map(|bitmap| bitmap.facts().name).collect();
    match own.iter().find(|own| names.contains(&own.name)) {
        Some(bitmap) => {
            let why = format!("it has a bitmap called {:?} already", bitmap.name);
            Err(Error::refused(&*target.name, why))
        }
        None => Ok(()),
    }
}

/// Copies `bitmaps` of `source` to `target`, which nothing else uses: names, granularities, whether
/// they are enabled, and bits. Between two of them `goes_on` says whether to.
///
/// # Errors
/// As [`StoredBitmap::load`] and [`Qcow2::edit_bitmaps`]; some may have been copied then.
pub async fn copy_bitmaps(
    st: &dyn Storage,
    source: &Image,
    bitmaps: &[StoredBitmap],
    target: &mut Image,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Outcome> {
    let from = qcow2(source)?;
    let (mut edits, mut bytes) = (Vec::new(), 0);
    for bitmap in bitmaps {
        if !goes_on() {
            return Ok(Outcome::Stopped);
        }
        let facts = bitmap.facts();
        let name = || facts.name.clone();
        let loaded = bitmap.load(st, from.file(), from.header()).await;
        let loaded = loaded.map_err(|error| error.within(&source.name))?;
        if bytes + loaded.bytes() > TOGETHER {
            store(st, target, std::mem::take(&mut edits)).await?;
            bytes = 0;
        }
        bytes += loaded.bytes();
        edits.push(BitmapEdit::Add { name: name(), granularity: Some(facts.granularity) });
        edits.push(BitmapEdit::Merge { name: name(), source: MergeSource::Loaded(loaded) });
        if !facts.auto {
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
