//! How large an image's file becomes.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use crate::error::{Error, Result};
use crate::qcow2::bitmap::BitmapFacts;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::layout::Counts;

/// The size in bytes of the file of an image laid out like this when every cluster is allocated.
/// What is counted is what `qemu-img measure` counts: tables in whole clusters.
///
/// # Errors
/// `Refused` when the layout is out of range.
pub fn fully_allocated(options: &CreateOptions) -> Result<u64> {
    options.check()?;
    total(options).ok_or_else(|| {
        let why = format!("a disk of {} bytes is too large", options.size);
        Error::refused("measuring", why)
    })
}

fn total(options: &CreateOptions) -> Option<u64> {
    let cluster = 1_u64.checked_shl(options.cluster_bits)?;
    let entry = if options.extended_l2 { 16 } else { 8 };
    let guest = options.size.div_ceil(cluster);
    let l2_tables = guest.div_ceil(cluster.checked_div(entry)?);
    let l1 = l2_tables.div_ceil(cluster.checked_div(8)?);
    let clusters = guest.checked_add(l2_tables)?.checked_add(l1)?.checked_add(1)?;
    let counts = Counts::unlimited(cluster, options.refcount_order, clusters)?;
    let clusters = clusters.checked_add(counts.table)?.checked_add(counts.blocks)?;
    clusters.checked_mul(cluster)
}

/// Bytes that copies of these bitmaps take in an image whose clusters have `cluster` bytes, with a
/// disk of `size` bytes: each bitmap and its table in whole clusters, and one directory.
pub fn bitmap_bytes(bitmaps: &[BitmapFacts], size: u64, cluster: u64) -> u64 {
    let (mut bytes, mut directory) = (0_u64, 0_u64);
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
        let bits = size.div_ceil(bitmap.granularity.max(1));
        let clusters = bits.div_ceil(8).div_ceil(cluster.max(1));
        let table = clusters.saturating_mul(8).div_ceil(cluster.max(1));
        bytes = bytes.saturating_add(clusters.saturating_add(table).saturating_mul(cluster));
        let name = u64::try_from(bitmap.name.len()).unwrap_or(u64::MAX);
        let entry = name.saturating_add(24).checked_next_multiple_of(8).unwrap_or(u64::MAX);
        directory = directory.saturating_add(entry);
    }
    bytes.saturating_add(directory.div_ceil(cluster.max(1)).saturating_mul(cluster))
}
