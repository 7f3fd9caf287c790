//! Numbers of the format: magic, feature bits, table entries.
//!
//! Section names are those of the qcow2 specification (docs/interop/qcow2 in QEMU's tree).

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::CorruptKind;

/// The first four bytes of an image: `QFI` and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;

/// Incompatible feature: the image was not closed, refcounts may be too low.
pub const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible feature: a contradiction was found, no one may write.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data lies in an external data file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: the compression type is not zlib.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries have 16 bytes and describe subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// Compatible feature: refcounts may be written late, while the dirty bit is set.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;

/// Autoclear feature: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature: the external data file can be read as a raw image.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

/// Header extension: end of the extensions.
pub const EXTENSION_END: u32 = 0;
/// Header extension: the backing file's format, a string.
pub const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: names of feature bits.
pub const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: where the bitmap directory lies.
pub const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Header extension: the external data file's name, a string.
pub const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// The offset bits of L1, L2 and refcount table entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 and L2 entries: the refcount of what the entry points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// L2 entries: the rest is a compressed cluster descriptor.
pub const COMPRESSED: u64 = 1 << 62;
/// L2 entries of version 3: the cluster reads as zeros.
pub const ZERO: u64 = 1;

/// Where a compressed cluster lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compressed {
    /// First byte of the compressed data.
    pub at: HostOffset,
    /// Upper bound of its length in bytes; it ends at a multiple of 512 in the file.
    pub bytes: u64,
}

/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// One L2 entry as it stands in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct L2Entry {
    /// The cluster descriptor.
    pub word: u64,
    /// The subclusters: bit n says that subcluster n is allocated, bit 32 + n that it reads as
    /// zeros. 0 without extended L2 entries.
    pub bitmap: u64,
}

impl L2Entry {
    /// An entry of a cluster in which the subclusters of `allocated` hold data and those of `zero`
    /// are zeros.
    pub fn extended(word: u64, allocated: u32, zero: u32) -> Self {
        Self { word, bitmap: u64::from(zero) << SUBCLUSTERS | u64::from(allocated) }
    }

    /// The two halves of the bitmap: allocated, zero.
    fn halves(self) -> (u32, u32) {
        let [z3, z2, z1, z0, a3, a2, a1, a0] = self.bitmap.to_be_bytes();
        (u32::from_be_bytes([a3, a2, a1, a0]), u32::from_be_bytes([z3, z2, z1, z0]))
    }
}

/// What one L2 entry says, after every check ("Standard Cluster Descriptor", "Compressed Clusters
/// Descriptor" and "Extended L2 Entries").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing here: the backing file shows through, or zeros.
    Unallocated,
    /// Guest bytes, at the same distances.
    Data {
        /// The host cluster.
        at: HostOffset,
        /// Whether nothing else refers to it.
        copied: bool,
    },
    /// Zeros without a host cluster.
    ZeroPlain,
    /// Zeros, and a host cluster kept for later.
    ZeroAllocated {
        /// The host cluster.
        at: HostOffset,
        /// Whether nothing else refers to it.
        copied: bool,
    },
    /// One compressed cluster.
    Compressed(Compressed),
    /// Subclusters of different kinds; those in neither set show the backing file. Only with
    /// extended L2 entries.
    Mixed {
        /// The host cluster, if any subcluster needs one or one is kept for later.
        at: Option<HostOffset>,
        /// Whether nothing else refers to the host cluster.
        copied: bool,
        /// Subclusters whose bytes are in the host cluster, one bit each.
        allocated: u32,
        /// Subclusters that read as zeros.
        zero: u32,
    },
}

impl Cluster {
    /// The host cluster that the entry keeps, other than a compressed one.
    pub fn host(&self) -> Option<HostOffset> {
        match *self {
            Self::Data { at, .. } | Self::ZeroAllocated { at, .. } => Some(at),
            Self::Mixed { at, .. } => at,
            Self::Unallocated | Self::ZeroPlain | Self::Compressed(_) => None,
        }
    }

    /// The host cluster, if nothing else refers to it.
    pub fn own(&self) -> Option<HostOffset> {
        match *self {
            Self::Data { at, copied: true } | Self::ZeroAllocated { at, copied: true } => Some(at),
            Self::Mixed { at, copied: true, .. } => at,
            _ => None,
        }
    }

    /// Which subclusters have bytes of their own, and which are zeros, one bit each; all or none
    /// of them without extended L2 entries.
    pub fn subclusters(&self) -> (u32, u32) {
        match *self {
            Self::Unallocated => (0, 0),
            Self::Data { .. } | Self::Compressed(_) => (u32::MAX, 0),
            Self::ZeroPlain | Self::ZeroAllocated { .. } => (0, u32::MAX),
            Self::Mixed { allocated, zero, .. } => (allocated, zero),
        }
    }
}

/// How an image's L2 entries are read.
#[derive(Debug, Clone, Copy)]
pub struct EntryRules {
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// The header's version, 2 or 3.
    pub version: u32,
    /// Whether guest data lies in an external data file.
    pub data_file: bool,
    /// Whether entries describe subclusters.
    pub extended: bool,
}

impl EntryRules {
    /// Reads the L2 entry that maps `guest` (any offset in the cluster, for the error).
    ///
    /// # Errors
    /// When the entry contradicts the format or the image's features.
    pub fn parse(&self, entry: L2Entry, guest: GuestOffset) -> Result<Cluster, CorruptKind> {
        let word = entry.word;
        let corrupt = CorruptKind::L2Entry { guest: guest.0, entry: word };
        if word & COMPRESSED != 0 {
            return if self.data_file {
                Err(corrupt)
            } else {
                Ok(Cluster::Compressed(self.compressed(word)))
            };
        }
        let at = HostOffset(word & OFFSET_MASK);
        let copied = word & COPIED != 0;
        if at.0.trailing_zeros() < self.cluster_bits && at.0 != 0 {
            return Err(corrupt);
        }
        // Offset 0 is a place only in a data file, and there only with COPIED set.
        let present = at.0 != 0 || (self.data_file && copied);
        if present && self.data_file && at.0 >> self.cluster_bits != guest.0 >> self.cluster_bits {
            return Err(corrupt);
        }
        if self.extended {
            let bitmap = CorruptKind::Subclusters { guest: guest.0, bitmap: entry.bitmap };
            return subclusters(entry, present.then_some(at)).ok_or(bitmap);
        }
        match (word & ZERO != 0, present) {
            (true, _) if self.version < 3 => Err(corrupt),
            (true, true) => Ok(Cluster::ZeroAllocated { at, copied }),
            (true, false) => Ok(Cluster::ZeroPlain),
            (false, true) => Ok(Cluster::Data { at, copied }),
            (false, false) => Ok(Cluster::Unallocated),
        }
    }

    /// The descriptor of a compressed cluster: the offset's width depends on the cluster size, and
    /// the sector count is of sectors after the first.
    fn compressed(&self, entry: u64) -> Compressed {
        let offset_bits = 70_u32.saturating_sub(self.cluster_bits);
        let offset_mask = (1_u64 << offset_bits).wrapping_sub(1);
        let at = entry & offset_mask;
        let sectors = (entry & !(COPIED | COMPRESSED)) >> offset_bits;
        let bytes = sectors.saturating_add(1).saturating_mul(512).saturating_sub(at & 511);
        Compressed { at: HostOffset(at), bytes }
    }
}

/// What an extended entry says: one of the plain kinds where all subclusters agree. `None` when a
/// subcluster is both allocated and zero, allocated without a host cluster, or the zero flag of
/// plain entries is set.
fn subclusters(entry: L2Entry, at: Option<HostOffset>) -> Option<Cluster> {
    let copied = entry.word & COPIED != 0;
    let (allocated, zero) = entry.halves();
    let contradiction =
        allocated & zero != 0 || (at.is_none() && allocated != 0) || entry.word & ZERO != 0;
    if contradiction {
        return None;
    }
    Some(match (at, allocated, zero) {
        (Some(at), u32::MAX, _) => Cluster::Data { at, copied },
        (Some(at), _, u32::MAX) => Cluster::ZeroAllocated { at, copied },
        (None, _, u32::MAX) => Cluster::ZeroPlain,
        (None, _, 0) => Cluster::Unallocated,
        _ => Cluster::Mixed { at, copied, allocated, zero },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EntryRules =
        EntryRules { cluster_bits: 16, version: 3, data_file: false, extended: false };

    fn plain(word: u64) -> L2Entry {
        L2Entry { word, bitmap: 0 }
    }
    const GUEST: GuestOffset = GuestOffset(0x7_0000);

    #[test]
    fn a_zero_flag_is_never_read_as_an_offset() {
        assert_eq!(RULES.parse(plain(ZERO), GUEST), Ok(Cluster::ZeroPlain));
        let entry = COPIED | 0x5_0000 | ZERO;
        let at = HostOffset(0x5_0000);
        assert_eq!(
            RULES.parse(plain(entry), GUEST),
            Ok(Cluster::ZeroAllocated { at, copied: true })
        );
        let old = EntryRules { version: 2, ..RULES };
        assert!(old.parse(plain(ZERO), GUEST).is_err());
    }

    #[test]
    fn unaligned_offsets_are_refused() {
        assert!(RULES.parse(plain(COPIED | 0x5_0200), GUEST).is_err());
    }

    #[test]
    fn a_data_file_maps_each_cluster_to_its_own_place() {
        let rules = EntryRules { data_file: true, ..RULES };
        let here = Cluster::Data { at: HostOffset(0x7_0000), copied: true };
        assert_eq!(rules.parse(plain(COPIED | 0x7_0000), GUEST), Ok(here));
        assert!(rules.parse(plain(COPIED | 0x8_0000), GUEST).is_err());
        assert!(rules.parse(plain(COMPRESSED | 0x7_0000), GUEST).is_err());
        let first = Cluster::Data { at: HostOffset(0), copied: true };
        assert_eq!(rules.parse(plain(COPIED), GuestOffset(0)), Ok(first));
        assert_eq!(rules.parse(plain(0), GuestOffset(0)), Ok(Cluster::Unallocated));
    }

    #[test]
    fn compressed_descriptors_split_at_the_width_of_the_cluster_size() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of sectors.
        let entry = COMPRESSED | 3 << 54 | 0x1_2345;
        let expected = Compressed { at: HostOffset(0x1_2345), bytes: 4 * 512 - 0x145 };
        assert_eq!(RULES.parse(plain(entry), GUEST), Ok(Cluster::Compressed(expected)));
    }

    #[test]
    fn subclusters_that_agree_read_as_plain_clusters() {
        let rules = EntryRules { extended: true, ..RULES };
        let at = HostOffset(0x5_0000);
        let parse =
            |word, allocated, zero| rules.parse(L2Entry::extended(word, allocated, zero), GUEST);
        let here = COPIED | at.0;
        assert_eq!(parse(here, u32::MAX, 0), Ok(Cluster::Data { at, copied: true }));
        assert_eq!(parse(here, 0, u32::MAX), Ok(Cluster::ZeroAllocated { at, copied: true }));
        assert_eq!(parse(0, 0, u32::MAX), Ok(Cluster::ZeroPlain));
        assert_eq!(parse(0, 0, 0), Ok(Cluster::Unallocated));
        let mixed = Cluster::Mixed { at: Some(at), copied: true, allocated: 1, zero: 6 };
        assert_eq!(parse(here, 1, 6), Ok(mixed));
        let nowhere = Cluster::Mixed { at: None, copied: false, allocated: 0, zero: 6 };
        assert_eq!(parse(0, 0, 6), Ok(nowhere));
        for (word, allocated, zero) in [(here, 3, 6), (0, 1, 0), (here | ZERO, 1, 0)] {
            assert!(parse(word, allocated, zero).is_err(), "{word:#x} {allocated} {zero}");
        }
    }
}
