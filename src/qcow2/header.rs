//! The header and its extensions, parsed once into fields that cannot be wrong.
//!
//! The first cluster is never rewritten: fields are changed in place, each inside one sector, so
//! unknown fields and extensions survive byte for byte.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::bytes::{HostOffset, be32, be64};
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::format::{self, EntryRules, MAGIC};
use crate::qcow2::geometry::Geometry;

/// Bytes of a version 2 header.
pub const V2_LENGTH: u64 = 72;
/// Smallest length of a version 3 header in bytes.
const V3_LENGTH: u64 = 104;
/// Where the incompatible, compatible and autoclear bits lie in the file, eight bytes each.
pub const FEATURES_AT: HostOffset = HostOffset(72);
/// Where the disk's size lies in the file; the encryption method and the L1 table's entries and
/// offset follow it.
pub const SIZE_AT: HostOffset = HostOffset(24);
/// Where the L1 table's entries and offset lie in the file.
pub const L1_TABLE_AT: HostOffset = HostOffset(36);
/// Where the number of snapshots and their table's offset lie in the file.
pub const SNAPSHOTS_AT: HostOffset = HostOffset(60);
/// Where the refcount table's offset and cluster count lie in the file.
pub const REFTABLE_AT: HostOffset = HostOffset(48);
/// Largest L1 table in bytes that is opened or made.
pub const L1_LIMIT: u64 = 32 << 20;
/// Whether a disk of `size` bytes, whose L1 table has so many entries, is opened and made.
pub(super) fn is_size_allowed(size: u64, l1_entries: u64) -> bool {
    size >> 61 == 0 && l1_entries <= L1_LIMIT >> 3
}

/// Largest refcount table in bytes that is opened or made.
pub const REFTABLE_LIMIT: u64 = 8 << 20;
/// Most snapshots an image may have.
pub const SNAPSHOT_LIMIT: u64 = 65536;
/// Longest backing file name in bytes.
pub const NAME_LIMIT: u64 = 1023;
/// Smallest log2 of the cluster size with extended L2 entries: a subcluster is a sector or more.
const EXTENDED_LEAST_BITS: u32 = 14;
/// More header extensions than any writer makes.
const EXTENSION_LIMIT: usize = 256;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// What the header of an image says, checked.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Sizes.
    pub geometry: Geometry,
    /// The disk's size in bytes.
    pub size: u64,
    /// Where the L1 table lies.
    pub l1_at: HostOffset,
    /// Entries of the L1 table.
    pub l1_entries: u64,
    /// Where the refcount table lies.
    pub reftable_at: HostOffset,
    /// Clusters of the refcount table.
    pub reftable_clusters: u64,
    /// How many internal snapshots there are.
    pub snapshots: u32,
    /// Where the snapshot table lies.
    pub snapshots_at: HostOffset,
    /// Incompatible feature bits, all known.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits, also unknown ones.
    pub autoclear: u64,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The backing file's name as recorded.
    pub backing: Option<String>,
    /// The backing file's format as recorded.
    pub backing_format: Option<String>,
    /// The external data file's name as recorded.
    pub data_file: Option<String>,
    /// The bytes of each bitmaps extension, not checked: they are ignored unless the autoclear
    /// features say that the bitmaps are valid.
    pub bitmaps: Vec<Vec<u8>>,
}

/// The cluster size that the first bytes of an image state, for reading the rest of the header.
///
/// # Errors
/// When these are not the first bytes of an image of a known version.
pub fn cluster_size(name: &str, start: &[u8]) -> Result<u64> {
    let have = u64::try_from(start.len()).unwrap_or(u64::MAX);
    let short = CorruptKind::HeaderTruncated { have, need: V2_LENGTH };
    let truncated = || Error::corrupt(name, short);
    let magic = be32(start, 0).ok_or_else(truncated)?;
    if magic != MAGIC {
        return Err(Error::refused(
            name,
            "this is not a qcow2 image (no qcow2 magic); if it is a raw image, pass --format raw",
        ));
    }
    let version = be32(start, 4).ok_or_else(truncated)?;
    if !(2..=3).contains(&version) {
        let why = format!("qcow2 version {version} is not supported, only 2 and 3");
        return Err(Error::unsupported(name, why));
    }
    if have < V2_LENGTH {
        return Err(truncated());
    }
    let bits = be32(start, 20).ok_or_else(truncated)?;
    if !(9..=21).contains(&bits) {
        return Err(Error::corrupt(name, CorruptKind::ClusterBits(bits)));
    }
    1_u64.checked_shl(bits).ok_or_else(truncated)
}

/// The header's bytes and the name of the image for errors.
struct Fields<'a> {
    bytes: &'a [u8],
    have: u64,
}

impl Fields<'_> {
    fn u32(&self, at: usize) -> Result<u32, CorruptKind> {
        let need = u64::try_from(at).unwrap_or(u64::MAX).saturating_add(4);
        be32(self.bytes, at).ok_or(CorruptKind::HeaderTruncated { have: self.have, need })
    }

    fn u64(&self, at: usize) -> Result<u64, CorruptKind> {
        let need = u64::try_from(at).unwrap_or(u64::MAX).saturating_add(8);
        be64(self.bytes, at).ok_or(CorruptKind::HeaderTruncated { have: self.have, need })
    }
}

/// The version 3 part of the header, with version 2's defaults.
struct Features {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    length: u32,
    compression: u8,
}

impl Features {
    fn parse(fields: &Fields<'_>, version: u32, cluster: u64) -> Result<Self, CorruptKind> {
        if version == 2 {
            let length = 72;
            let (incompatible, compatible, autoclear) = (0, 0, 0);
            return Ok(Self {
                incompatible,
                compatible,
                autoclear,
                refcount_order: 4,
                length,
                compression: 0,
            });
        }
        let length = fields.u32(100)?;
        let in_range = (V3_LENGTH..=cluster).contains(&u64::from(length));
        if !in_range || length.trailing_zeros() < 3 {
            return Err(CorruptKind::HeaderLength(length));
        }
        let has_compression = u64::from(length) > V3_LENGTH;
        let compression =
            if has_compression { fields.bytes.get(104).copied().unwrap_or(0) } else { 0 };
        Ok(Self {
            incompatible: fields.u64(72)?,
            compatible: fields.u64(80)?,
            autoclear: fields.u64(88)?,
            refcount_order: fields.u32(96)?,
            length,
            compression,
        })
    }

    fn compression(&self) -> Result<Compression, CorruptKind> {
        let other = self.incompatible & format::INCOMPATIBLE_COMPRESSION != 0;
        match (self.compression, other) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (kind, _) => Err(CorruptKind::CompressionType(kind)),
        }
    }
}

/// Parses the first cluster of an image.
///
/// # Errors
/// `Corrupt` with the check that fired; `Unsupported` with the name of the feature.
pub fn parse(name: &str, bytes: &[u8]) -> Result<Header> {
    let cluster = cluster_size(name, bytes)?;
    let fields = Fields { bytes, have: u64::try_from(bytes.len()).unwrap_or(u64::MAX) };
    let corrupt = |kind| Error::corrupt(name, kind);
    let version = fields.u32(4).map_err(corrupt)?;
    let features = Features::parse(&fields, version, cluster).map_err(corrupt)?;
    let extensions = Extensions::parse(&fields, features.length, cluster).map_err(corrupt)?;
    refuse_unserved(name, &features, &extensions, fields.u32(32).map_err(corrupt)?)?;
    let refcount_order = features.refcount_order;
    if refcount_order > 6 {
        return Err(corrupt(CorruptKind::RefcountOrder(refcount_order)));
    }
    let cluster_bits = fields.u32(20).map_err(corrupt)?;
    let data_file = features.incompatible & format::INCOMPATIBLE_DATA_FILE != 0;
    let extended = features.incompatible & format::INCOMPATIBLE_EXTENDED_L2 != 0;
    if extended && cluster_bits < EXTENDED_LEAST_BITS {
        return Err(corrupt(CorruptKind::SubclusterSize(cluster_bits)));
    }
    let rules = EntryRules { cluster_bits, version, data_file, extended };
    let header = Header {
        version,
        geometry: Geometry { cluster_bits, refcount_order, rules },
        size: fields.u64(24).map_err(corrupt)?,
        l1_entries: u64::from(fields.u32(36).map_err(corrupt)?),
        l1_at: HostOffset(fields.u64(40).map_err(corrupt)?),
        reftable_at: HostOffset(fields.u64(48).map_err(corrupt)?),
        reftable_clusters: u64::from(fields.u32(56).map_err(corrupt)?),
        snapshots: fields.u32(60).map_err(corrupt)?,
        snapshots_at: HostOffset(fields.u64(64).map_err(corrupt)?),
        incompatible: features.incompatible,
        compatible: features.compatible,
        autoclear: features.autoclear,
        compression: features.compression().map_err(corrupt)?,
        backing: backing_name(&fields, cluster).map_err(corrupt)?,
        backing_format: extensions.text(format::EXTENSION_BACKING_FORMAT).map_err(corrupt)?,
        data_file: extensions.text(format::EXTENSION_DATA_FILE).map_err(corrupt)?,
        bitmaps: extensions.all(format::EXTENSION_BITMAPS),
    };
    header.check().map_err(corrupt)?;
    Ok(header)
}

impl Header {
    /// The checks that need several fields ("Header" and the limits every reader keeps).
    fn check(&self) -> Result<(), CorruptKind> {
        let cluster = self.geometry.cluster_size();
        let table = |table, at: HostOffset| {
            if at.within(cluster) == 0 && at.0 >> 56 == 0 {
                Ok(())
            } else {
                Err(CorruptKind::TableAlignment { table, offset: at.0 })
            }
        };
        let size = |table, entries, limit| {
            if entries <= limit {
                Ok(())
            } else {
                Err(CorruptKind::TableSize { table, entries, limit })
            }
        };
        let needed = self.geometry.l1_entries(self.size);
        if !is_size_allowed(self.size, needed) {
            return Err(CorruptKind::VirtualSize(self.size));
        }
        size("L1 table", self.l1_entries, L1_LIMIT >> 3)?;
        if self.l1_entries < needed {
            let (table, entries) = ("L1 table", self.l1_entries);
            return Err(CorruptKind::TableSize { table, entries, limit: needed });
        }
        table("L1 table", self.l1_at)?;
        table("refcount table", self.reftable_at)?;
        let limit = REFTABLE_LIMIT >> self.geometry.cluster_bits;
        size("refcount table", self.reftable_clusters, limit)?;
        if self.reftable_clusters == 0 || self.reftable_at.0 == 0 {
            return Err(CorruptKind::TableSize { table: "refcount table", entries: 0, limit: 1 });
        }
        size("snapshot table", u64::from(self.snapshots), SNAPSHOT_LIMIT)?;
        if self.snapshots > 0 {
            table("snapshot table", self.snapshots_at)?;
        }
        let raw = self.autoclear & format::AUTOCLEAR_RAW_DATA != 0;
        if raw && self.version > 2 && !self.geometry.rules.data_file {
            return Err(CorruptKind::RawWithoutDataFile);
        }
        Ok(())
    }

    /// Whether refcounts may be written late.
    pub fn is_lazy(&self) -> bool {
        self.version >= 3 && self.compatible & format::COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Whether the external data file must stay readable as a raw image.
    pub fn is_raw_data(&self) -> bool {
        self.geometry.rules.data_file && self.autoclear & format::AUTOCLEAR_RAW_DATA != 0
    }
}

/// Refuses, by name, what this program does not serve.
fn refuse_unserved(
    name: &str,
    features: &Features,
    extensions: &Extensions<'_>,
    crypt_method: u32,
) -> Result<()> {
    let method = match crypt_method {
        0 => None,
        1 => Some("legacy AES"),
        2 => Some("LUKS"),
        _ => Some("an unknown method"),
    };
    if let Some(method) = method {
        let why = format!(
            "the image is encrypted ({method}), which is not supported; \
             decrypt it with qemu-img convert first"
        );
        return Err(Error::unsupported(name, why));
    }
    let known = format::INCOMPATIBLE_DIRTY
        | format::INCOMPATIBLE_CORRUPT
        | format::INCOMPATIBLE_DATA_FILE
        | format::INCOMPATIBLE_COMPRESSION
        | format::INCOMPATIBLE_EXTENDED_L2;
    let unknown = features.incompatible & !known;
    if unknown == 0 {
        return Ok(());
    }
    let names: Vec<String> = (0..64_u32)
        .filter(|bit| unknown >> bit & 1 == 1)
        .map(|bit| extensions.feature(bit))
        .collect();
    let why = format!("the image uses features that are not supported: {}", names.join(", "));
    Err(Error::unsupported(name, why))
}

fn backing_name(fields: &Fields<'_>, cluster: u64) -> Result<Option<String>, CorruptKind> {
    let (offset, len) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let outside = CorruptKind::BackingName { offset, len };
    let end = offset.checked_add(u64::from(len)).ok_or(outside)?;
    if end > cluster || offset < V2_LENGTH || u64::from(len) > NAME_LIMIT {
        return Err(outside);
    }
    let start = usize::try_from(offset).map_err(|_| outside)?;
    let end = usize::try_from(end).map_err(|_| outside)?;
    let bytes = fields.bytes.get(start..end).ok_or(outside)?;
    text(bytes, "backing file name").map(Some)
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, CorruptKind> {
    let text = std::str::from_utf8(bytes).map_err(|_| CorruptKind::Name(what))?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(CorruptKind::Name(what));
    }
    Ok(text.to_owned())
}

/// A header extension: its kind and its bytes.
pub(super) type Extension = (u32, Vec<u8>);

/// The header extensions of an image whose first cluster is given, in order, and where the list
/// ends with its end mark.
pub(super) fn extensions(cluster: &[u8]) -> Result<(Vec<Extension>, usize), CorruptKind> {
    let have = u64::try_from(cluster.len()).unwrap_or(u64::MAX);
    let fields = Fields { bytes: cluster, have };
    let start = match fields.u32(4)? {
        2 => u32::try_from(V2_LENGTH).unwrap_or(u32::MAX),
        _ => fields.u32(100)?,
    };
    let found = Extensions::parse(&fields, start, have)?;
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    let step = |at: usize, len: usize| at.saturating_add(8).saturating_add(len).next_multiple_of(8);
    let last = found.0.iter().fold(start, |at, (_, bytes)| step(at, bytes.len()));
    let end = last.saturating_add(8).min(cluster.len());
    Ok((found.0.into_iter().map(|(kind, bytes)| (kind, bytes.to_vec())).collect(), end))
}

/// The header extensions, in order ("Header extensions").
struct Extensions<'a>(Vec<(u32, &'a [u8])>);

impl<'a> Extensions<'a> {
    fn parse(fields: &Fields<'a>, start: u32, cluster: u64) -> Result<Self, CorruptKind> {
        // The extensions end where the backing file name starts, or with the cluster.
        let name_at = fields.u64(8)?;
        let end = if name_at == 0 { cluster } else { name_at.min(cluster) };
        let end = usize::try_from(end).unwrap_or(usize::MAX).min(fields.bytes.len());
        let mut at = usize::try_from(start).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        while let Some(kind) = be32(fields.bytes, at).filter(|_| at.saturating_add(8) <= end) {
            if kind == format::EXTENSION_END {
                break;
            }
            let len = fields.u32(at.saturating_add(4))?;
            let past = CorruptKind::ExtensionLength { kind, len };
            let first = at.saturating_add(8);
            let size = usize::try_from(len).map_err(|_| past)?;
            let last = first.checked_add(size).filter(|&last| last <= end).ok_or(past)?;
            found.push((kind, fields.bytes.get(first..last).ok_or(past)?));
            if found.len() > EXTENSION_LIMIT {
                return Err(CorruptKind::ExtensionCount(EXTENSION_LIMIT));
            }
            at = last.next_multiple_of(8);
        }
        Ok(Self(found))
    }

    /// The bytes of every extension of a kind.
    fn all(&self, kind: u32) -> Vec<Vec<u8>> {
        let found = self.0.iter().filter(|(found, _)| *found == kind);
        found.map(|(_, bytes)| bytes.to_vec()).collect()
    }

    fn text(&self, kind: u32) -> Result<Option<String>, CorruptKind> {
        let Some((_, bytes)) = self.0.iter().find(|(found, _)| *found == kind) else {
            return Ok(None);
        };
        let what = match kind {
            format::EXTENSION_DATA_FILE => "data file name",
            _ => "backing file format",
        };
        text(bytes, what).map(Some)
    }

    /// The name of an incompatible feature bit, from the image's own table where it has one.
    fn feature(&self, bit: u32) -> String {
        let table = self.0.iter().find(|(kind, _)| *kind == format::EXTENSION_FEATURE_NAMES);
        let named = table.and_then(|(_, table)| {
            let entry = table.chunks_exact(48).find(|entry| {
                entry.first() == Some(&0) && entry.get(1).map(|&byte| u32::from(byte)) == Some(bit)
            })?;
            let name = entry.get(2..)?.split(|&byte| byte == 0).next()?;
            text(name, "feature name").ok()
        });
        match named {
            Some(name) => format!("{name} (incompatible bit {bit})"),
            None => format!("incompatible bit {bit}"),
        }
    }
}
