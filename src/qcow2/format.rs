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

/// What one L2 entry says, after every check ("Standard Cluster Descriptor" and "Compressed
/// Clusters Descriptor").
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
}

impl EntryRules {
    /// Reads the L2 entry that maps `guest` (any offset in the cluster, for the error).
    ///
    /// # Errors
    /// When the entry contradicts the format or the image's features.
    pub fn parse(&self, entry: u64, guest: GuestOffset) -> Result<Cluster, CorruptKind> {
        let corrupt = CorruptKind::L2Entry { guest: guest.0, entry };
        if entry & COMPRESSED != 0 {
            return if self.data_file {
                Err(corrupt)
            } else {
                Ok(Cluster::Compressed(self.compressed(entry)))
            };
        }
        let at = HostOffset(entry & OFFSET_MASK);
        let copied = entry & COPIED != 0;
        if at.0.trailing_zeros() < self.cluster_bits && at.0 != 0 {
            return Err(corrupt);
        }
        // Offset 0 is a place only in a data file, and there only with COPIED set.
        let present = at.0 != 0 || (self.data_file && copied);
        if present && self.data_file && at.0 >> self.cluster_bits != guest.0 >> self.cluster_bits {
            return Err(corrupt);
        }
        match (entry & ZERO != 0, present) {
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

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EntryRules = EntryRules { cluster_bits: 16, version: 3, data_file: false };
    const GUEST: GuestOffset = GuestOffset(0x7_0000);

    #[test]
    fn a_zero_flag_is_never_read_as_an_offset() {
        assert_eq!(RULES.parse(ZERO, GUEST), Ok(Cluster::ZeroPlain));
        let entry = COPIED | 0x5_0000 | ZERO;
        let at = HostOffset(0x5_0000);
        assert_eq!(RULES.parse(entry, GUEST), Ok(Cluster::ZeroAllocated { at, copied: true }));
        let old = EntryRules { version: 2, ..RULES };
        assert!(old.parse(ZERO, GUEST).is_err());
    }

    #[test]
    fn unaligned_offsets_are_refused() {
        assert!(RULES.parse(COPIED | 0x5_0200, GUEST).is_err());
    }

    #[test]
    fn a_data_file_maps_each_cluster_to_its_own_place() {
        let rules = EntryRules { data_file: true, ..RULES };
        let here = Cluster::Data { at: HostOffset(0x7_0000), copied: true };
        assert_eq!(rules.parse(COPIED | 0x7_0000, GUEST), Ok(here));
        assert!(rules.parse(COPIED | 0x8_0000, GUEST).is_err());
        assert!(rules.parse(COMPRESSED | 0x7_0000, GUEST).is_err());
        let first = Cluster::Data { at: HostOffset(0), copied: true };
        assert_eq!(rules.parse(COPIED, GuestOffset(0)), Ok(first));
        assert_eq!(rules.parse(0, GuestOffset(0)), Ok(Cluster::Unallocated));
    }

    #[test]
    fn compressed_descriptors_split_at_the_width_of_the_cluster_size() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of sectors.
        let entry = COMPRESSED | 3 << 54 | 0x1_2345;
        let expected = Compressed { at: HostOffset(0x1_2345), bytes: 4 * 512 - 0x145 };
        assert_eq!(RULES.parse(entry, GUEST), Ok(Cluster::Compressed(expected)));
    }
}
