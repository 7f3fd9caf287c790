//! Rewriting the header: the backing file's name, header extensions, feature bits, the version.
//!
//! The extensions and the name may lie in several sectors, and a power cut keeps any of those. So
//! what lies behind the first sector is written where the header that is there does not look, and
//! each step that counts is one write of the first sector: the header is the old one, or the new
//! one without the names of features, or the new one. R21 in `ORDERING.md` says the same.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::ops::Range;

use crate::bytes::{HostOffset, be32, be64};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::create::feature_names;
use crate::qcow2::format::{
    EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS, EXTENSION_DATA_FILE, EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
};
use crate::qcow2::header::{self, Extension, NAME_LIMIT, V2_LENGTH};
use crate::storage::{Purpose, Storage};
use crate::sync::{Ordering, lock};

/// What a power cut may tear a write at, in bytes.
const SECTOR: usize = 512;
/// Bytes of the header that is made when an image becomes one of version 3.
const V3_LENGTH: usize = 112;

/// Bits of a feature field to set and to clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bits {
    pub(super) set: u64,
    pub(super) clear: u64,
}

/// A name to record, or none; outside of it stands whether that is changed at all.
type Named = Option<Option<String>>;

/// What is changed of a header. Everything else stays, byte for byte.
#[derive(Debug, Clone, Default)]
pub(super) struct HeaderChange {
    /// The format's version, 2 or 3.
    pub(super) version: Option<u32>,
    /// The backing file's name.
    pub(super) backing: Named,
    /// The backing file's format.
    pub(super) backing_format: Named,
    /// The external data file's name.
    pub(super) data_file: Option<String>,
    /// The bytes of the bitmaps extension, or none.
    pub(super) bitmaps: Option<Option<Vec<u8>>>,
    /// Compatible feature bits.
    pub(super) compatible: Bits,
    /// Autoclear feature bits.
    pub(super) autoclear: Bits,
}

/// One write, which is durable before the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    at: usize,
    bytes: Vec<u8>,
}

/// The parts of a header.
#[derive(Debug, Clone)]
struct Parts {
    /// The fields, whose length is the header's.
    fields: Vec<u8>,
    /// Every extension but the names of features, in order.
    extensions: Vec<Extension>,
    /// The names of features.
    features: Option<Vec<u8>>,
    /// The backing file's name.
    name: Vec<u8>,
    /// The bytes of the cluster that the extensions and the name take.
    list: Range<usize>,
    name_place: Range<usize>,
}

impl Parts {
    /// Takes a header apart that was opened before.
    fn parse(cluster: &[u8]) -> Option<Self> {
        let length = match be32(cluster, 4)? {
            2 => usize::try_from(V2_LENGTH).ok()?,
            _ => usize::try_from(be32(cluster, 100)?).ok()?,
        };
        let start = usize::try_from(be64(cluster, 8)?).ok()?;
        let len = usize::try_from(be32(cluster, 16)?).ok()?;
        let name_place = if start == 0 { 0..0 } else { start..start.checked_add(len)? };
        let (all, end) = header::extensions(cluster).ok()?;
        let is_table = |one: &&Extension| one.0 == EXTENSION_FEATURE_NAMES;
        Some(Self {
            fields: cluster.get(..length)?.to_vec(),
            features: all.iter().find(is_table).map(|(_, bytes)| bytes.clone()),
            extensions: all.iter().filter(|one| !is_table(one)).cloned().collect(),
            name: cluster.get(name_place.clone())?.to_vec(),
            list: length..end,
            name_place,
        })
    }

    /// The parts of the changed header. Where things lie is that of the old one.
    fn changed(&self, change: &HeaderChange) -> Option<Self> {
        let mut new = self.clone();
        let old_version = be32(&self.fields, 4)?;
        let version = change.version.unwrap_or(old_version);
        if old_version < 3 && version >= 3 {
            new.fields.resize(V3_LENGTH, 0);
            // Refcounts of version 2 have 16 bits.
            put(&mut new.fields, 96, &4_u32.to_be_bytes())?;
            put(&mut new.fields, 100, &u32::try_from(V3_LENGTH).ok()?.to_be_bytes())?;
            new.features = Some(feature_names());
        } else if version < 3 {
            new.fields.truncate(usize::try_from(V2_LENGTH).ok()?);
            new.features = None;
        }
        put(&mut new.fields, 4, &version.to_be_bytes())?;
        if version >= 3 {
            for (at, bits) in [(80, change.compatible), (88, change.autoclear)] {
                let word = be64(&new.fields, at)? & !bits.clear | bits.set;
                put(&mut new.fields, at, &word.to_be_bytes())?;
            }
        }
        if let Some(name) = &change.backing {
            new.name = name.clone().unwrap_or_default().into_bytes();
        }
        let bytes = |text: &Option<String>| text.clone().map(String::into_bytes);
        if let Some(format) = &change.backing_format {
            new.set(EXTENSION_BACKING_FORMAT, bytes(format));
        }
        if change.data_file.is_some() {
            new.set(EXTENSION_DATA_FILE, bytes(&change.data_file));
        }
        if let Some(bitmaps) = &change.bitmaps {
            new.set(EXTENSION_BITMAPS, bitmaps.clone());
        }
        Some(new)
    }

    /// Replaces the extensions of a kind by one, or by none.
    fn set(&mut self, kind: u32, bytes: Option<Vec<u8>>) {
        let place = self.extensions.iter().position(|one| one.0 == kind);
        self.extensions.retain(|one| one.0 != kind);
        if let Some(bytes) = bytes {
            let place = place.unwrap_or(0).min(self.extensions.len());
            self.extensions.insert(place, (kind, bytes));
        }
    }

    /// The fields and the extensions with their end mark; the name lies at `name_at`.
    fn compose(&self, features: Option<&Vec<u8>>, name_at: usize) -> Option<Vec<u8>> {
        let mut bytes = self.fields.clone();
        let is_named = !self.name.is_empty();
        let place = if is_named { u64::try_from(name_at).ok()? } else { 0 };
        put(&mut bytes, 8, &place.to_be_bytes())?;
        put(&mut bytes, 16, &u32::try_from(self.name.len()).ok()?.to_be_bytes())?;
        let table = features.map(|table| (EXTENSION_FEATURE_NAMES, table.clone()));
        for (kind, content) in self.extensions.iter().chain(&table) {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(content.len()).ok()?.to_be_bytes());
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend(EXTENSION_END.to_be_bytes());
        bytes.extend([0; 4]);
        Some(bytes)
    }

    /// Where the name may lie in a cluster of `size` bytes behind a list that ends at `end`, so
    /// that it covers nothing that the `old` header looks at.
    fn places(&self, old: &Self, end: usize, size: usize) -> impl Iterator<Item = usize> {
        let len = self.name.len();
        let used = [old.list.clone(), old.name_place.clone()];
        let behind = used.iter().map(|range| range.end).max().unwrap_or(0).next_multiple_of(8);
        let stays = (old.name == self.name && len > 0).then_some(old.name_place.start);
        let candidates = [stays, Some(end), Some(behind.max(end))];
        let fits = move |at: &usize| {
            let Some(last) = at.checked_add(len) else { return false };
            // What lies in the first sector changes with the header that looks at it.
            let tail = (*at).max(SECTOR)..last.max(SECTOR);
            let is_free = used.iter().all(|one| tail.start >= one.end || tail.end <= one.start);
            *at >= end && last <= size && (is_free || tail.is_empty() || stays == Some(*at))
        };
        candidates.into_iter().flatten().filter(fits).collect::<Vec<_>>().into_iter()
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) -> Option<()> {
    bytes.get_mut(at..at.checked_add(field.len())?)?.copy_from_slice(field);
    Some(())
}

/// The writes that change a header whose first cluster is given; none when nothing changes.
///
/// # Errors
/// `Refused` when there is no room for what the header has to say.
fn plan(cluster: &[u8], change: &HeaderChange) -> Result<Vec<Step>> {
    let refuse = |why: &str| Err(Error::refused("header", why));
    let parts = Parts::parse(cluster).and_then(|old| Some((old.changed(change)?, old)));
    let Some((new, old)) = parts else { return refuse("it cannot be taken apart") };
    if u64::try_from(new.name.len()).map_or(true, |len| len > NAME_LIMIT) {
        return refuse("the name of a backing file has at most 1023 bytes");
    }
    for features in [new.features.as_ref(), None] {
        let Some(end) = new.compose(features, 0).map(|bytes| bytes.len()) else { continue };
        for name_at in new.places(&old, end, cluster.len()) {
            if let Some(steps) = steps(cluster, &new, features, name_at) {
                return Ok(steps);
            }
        }
    }
    refuse(
        "there is no room for the names and extensions in the first cluster, or in its first \
         sector; choose shorter names, or convert the image to larger clusters",
    )
}

/// The writes that lead to a header whose name lies at `name_at`; `None` when its extensions do
/// not fit.
fn steps(
    cluster: &[u8],
    new: &Parts,
    features: Option<&Vec<u8>>,
    name_at: usize,
) -> Option<Vec<Step>> {
    let least = new.compose(None, name_at)?;
    let whole = new.compose(features, name_at)?;
    if least.len() > SECTOR || whole.len() > cluster.len() {
        return None;
    }
    let name_end = name_at.checked_add(new.name.len())?;
    // The first sector as far as it is the header's; what is left over of an old list goes.
    let sector = |list: &[u8]| {
        let mut bytes = list.get(..list.len().min(SECTOR))?.to_vec();
        bytes.resize(SECTOR, 0);
        if name_at < SECTOR {
            let inside = new.name.get(..new.name.len().min(SECTOR.checked_sub(name_at)?))?;
            put(&mut bytes, name_at, inside)?;
        }
        Some(bytes)
    };
    let mut now = cluster.to_vec();
    let mut steps = Vec::new();
    let mut step = |at: usize, bytes: Vec<u8>| {
        let place = now.get_mut(at..at.checked_add(bytes.len())?)?;
        if *place != bytes {
            place.copy_from_slice(&bytes);
            steps.push(Step { at, bytes });
        }
        Some(())
    };
    let tail_at = name_at.max(SECTOR);
    if name_end > tail_at && !new.name.is_empty() {
        step(tail_at, new.name.get(tail_at.checked_sub(name_at)?..)?.to_vec())?;
    }
    let last = sector(&whole)?;
    let list_tail = whole.get(SECTOR.min(whole.len())..)?;
    let is_there = cluster.get(SECTOR.min(whole.len())..whole.len())? == list_tail;
    if !list_tail.is_empty() && !is_there {
        step(0, sector(&least)?)?;
        step(SECTOR, list_tail.to_vec())?;
    }
    step(0, last)?;
    Some(steps)
}

impl Qcow2 {
    /// Changes the header, durably; everything that it will name is durable before. The image goes
    /// on with what the header says then, except that a change of the version needs it to be opened
    /// anew.
    ///
    /// # Errors
    /// `Refused`, with nothing changed, when there is no room in the first cluster; I/O errors,
    /// after which the image takes no more writes, and the header is the old one or the new one.
    pub(super) async fn rewrite_header(
        &mut self,
        st: &dyn Storage,
        change: &HeaderChange,
    ) -> Result<()> {
        self.check_poison()?;
        let length =
            st.length(self.file).map_err(|error| Error::io("the image's length", error))?;
        let len = self.cluster_size().min(length);
        let mut cluster = self.read_bytes(st, Purpose::HeaderRead, HostOffset(0), len).await?;
        let size = usize::try_from(self.cluster_size()).unwrap_or(cluster.len());
        cluster.resize(size, 0);
        for Step { at, bytes } in plan(&cluster, change)? {
            put(&mut cluster, at, &bytes);
            let at = HostOffset(u64::try_from(at).unwrap_or_default());
            self.switch_header(st, at, bytes).await?;
        }
        self.header = header::parse("header", &cluster)?;
        let header = &self.header;
        *lock(&self.features) = [header.incompatible, header.compatible, header.autoclear];
        self.lazy.store(false, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a panic fails the test"
)]
#[path = "rewrite_tests.rs"]
mod tests;
