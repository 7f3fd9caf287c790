//! Refcount blocks: compared with the references, and changed in place.

use std::ops::Range;

use crate::error::Result;
use crate::qcow2::check::Survey;
use crate::qcow2::check::references::{References, Seen, Use};
use crate::qcow2::check::target::{Block, Target};
use crate::storage::Purpose;

/// L2 tables with data over them that are remembered; more stay as they are.
const MOST_OVERLAPS: usize = 1 << 16;

/// The largest refcount of a width of `1 << order` bits.
pub(super) fn most(order: u32) -> u64 {
    if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
}

/// The refcount at `index` of a block.
pub(super) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bit = index << order;
        return u64::from(block[bit / 8] >> (bit % 8)) & most(order);
    }
    let width = 1 << (order - 3);
    let bytes = &block[index * width..(index + 1) * width];
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount at `index` of a block; the value fits.
pub(super) fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let bit = index << order;
        let low = u8::try_from(value & most(order)).expect("less than a byte");
        let mask = u8::try_from(most(order)).expect("less than a byte") << (bit % 8);
        block[bit / 8] = block[bit / 8] & !mask | low << (bit % 8);
        return;
    }
    let width = 1 << (order - 3);
    let bytes = value.to_be_bytes();
    block[index * width..(index + 1) * width].copy_from_slice(&bytes[8 - width..]);
}

/// A block that counts clusters of a window.
#[derive(Debug, Clone)]
struct Part {
    /// Where it lies.
    at: u64,
    /// The first cluster that it counts.
    first: u64,
    /// The clusters that both have.
    clusters: Range<u64>,
}

impl Part {
    fn index(&self, cluster: u64) -> usize {
        usize::try_from(cluster - self.first).expect("inside a block")
    }
}

/// The blocks that count clusters of the window, some at a time.
fn parts(target: &Target<'_>, window: &Range<u64>) -> Vec<Part> {
    let bits = target.header.geometry.refblock_bits();
    let skip = usize::try_from(window.start >> bits).unwrap_or(usize::MAX);
    let blocks = (0_u64..).zip(&target.blocks).skip(skip);
    let inside = blocks.take_while(|(index, _)| index << bits < window.end);
    let part = |(index, block): (u64, &Block)| {
        let Block::At(at) = *block else { return None };
        let first = index << bits;
        let clusters = first.max(window.start)..(first + (1 << bits)).min(window.end);
        Some(Part { at, first, clusters })
    };
    inside.filter_map(part).collect()
}

/// Compares the refcounts of the window with the references to it.
pub(super) async fn compare(target: &Target<'_>, references: &References, survey: &mut Survey) {
    let window = references.window();
    let order = target.header.geometry.refcount_order;
    for parts in parts(target, &window).chunks(target.ahead()) {
        let places: Vec<u64> = parts.iter().map(|part| part.at).collect();
        let read = target.read_clusters(Purpose::RefblockLoad, &places).await;
        for (part, bytes) in parts.iter().zip(read) {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => {
                    survey.report.failed(&error);
                    continue;
                }
            };
            let zeros = bytes.iter().all(|byte| *byte == 0);
            if zeros && references.is_empty(part.clusters.clone()) {
                continue;
            }
            references.each(part.clusters.clone(), |cluster, seen| {
                let count = get(&bytes, order, part.index(cluster));
                judge(target, cluster, count, seen, survey);
            });
        }
    }
    // What has no block, or one that cannot be read, counts as zero.
    let block_bits = target.header.geometry.refblock_bits();
    let uncounted = |clusters: Range<u64>| {
        let mut blocks =
            clusters.start >> block_bits..=clusters.end.saturating_sub(1) >> block_bits;
        !blocks.all(|block| matches!(target.block_of(block << block_bits), Block::At(_)))
    };
    for (cluster, seen) in references.leaves(uncounted).flatten() {
        if !matches!(target.block_of(cluster), Block::At(_)) {
            survey.rebuild |= seen.references > 0;
            judge(target, cluster, 0, seen, survey);
        }
    }
}

/// Compares one refcount with what refers to its cluster.
fn judge(target: &Target<'_>, cluster: u64, count: u64, seen: Seen, survey: &mut Survey) {
    let most = most(target.header.geometry.refcount_order);
    let at = cluster << target.rules.cluster_bits;
    let need = seen.references.min(most);
    survey.counted.look(at, target.cluster_size(), count, seen.references);
    let report = &mut survey.report;
    if cluster < target.clusters() && (count > 0 || seen.references > 0) {
        let end = (cluster + 1) << target.rules.cluster_bits;
        report.image_end_offset = report.image_end_offset.max(end);
    }
    // So is nearly every cluster of nearly every image.
    if count == 1 && seen.is_sole_data() {
        return;
    }
    let says = || format!("cluster {at:#x}: refcount {count}, {} references", seen.references);
    report.corrupt(seen.references - need, says);
    let overlap = !seen.kind.admits(seen.references);
    if count < need {
        report.corrupt(1, says);
    } else if count > need && cluster < target.clusters() {
        report.leaks += 1;
        report.note(says);
    } else if count > need {
        report.leaks_beyond_end += 1;
        report.note(says);
    } else if overlap && seen.references == need {
        report.corrupt(1, || format!("cluster {at:#x}: metadata is used as something else too"));
    }
    if overlap {
        decide(target, at, seen, survey);
    }
    let report = &mut survey.report;
    let wrong = if count == 1 { seen.shared } else { seen.copied };
    survey.flags = survey.flags.saturating_add(wrong);
    report.corrupt(wrong, || {
        let says = if count == 1 { "do not say" } else { "say" };
        format!("cluster {at:#x}: refcount {count}, {wrong} entries {says} COPIED")
    });
}

/// Decides which of several uses of a cluster a repair gives up.
fn decide(target: &Target<'_>, at: u64, seen: Seen, survey: &mut Survey) {
    if seen.kind.has(Use::BLOCK) {
        let what = || format!("cluster {at:#x}: a refcount block has another use");
        survey.report.corrupt(1, what);
        survey.rebuild = true;
    } else if seen.kind.has(Use::SOLE) {
        // Where the header names a table, entries are removed that point there; what the guest or a
        // snapshot has is worth more than bitmaps.
        let named = target.rules.is_fixed(at) || target.is_snapshot_root(at);
        survey.report.bitmaps_broken |= !named && target.directory.is_some();
    } else if survey.suspects.contains(&at) {
        survey.condemned.insert(at);
    } else if survey.overlapped.len() < MOST_OVERLAPS {
        survey.overlapped.insert(at);
    }
}

/// Raises the refcounts of the window that are too low, or lowers those that are too high.
///
/// # Errors
/// When the host cannot read or write.
pub(super) async fn adjust(
    target: &Target<'_>,
    references: &References,
    raise: bool,
) -> Result<()> {
    let window = references.window();
    let order = target.header.geometry.refcount_order;
    for parts in parts(target, &window).chunks(target.ahead()) {
        let places: Vec<u64> = parts.iter().map(|part| part.at).collect();
        let read = target.read_clusters(Purpose::RefblockLoad, &places).await;
        for (part, bytes) in parts.iter().zip(read) {
            let old = bytes?;
            let mut new = old.clone();
            for cluster in part.clusters.clone() {
                let index = part.index(cluster);
                let have = get(&old, order, index);
                let need = references.get(cluster).references.min(most(order));
                if have != need && (have < need) == raise {
                    set(&mut new, order, index, need);
                }
            }
            target.write_changes(Purpose::RefblockWrite, part.at, &old, &new).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_to_their_place() {
        let mut random = fastrand::Rng::with_seed(3);
        for order in 0..=6 {
            let entries = (512 * 8) >> order;
            let mut block = vec![0; 512];
            let mut model = vec![0; entries];
            for _ in 0..2000 {
                let index = random.usize(0..entries);
                model[index] = random.u64(..) & most(order);
                set(&mut block, order, index, model[index]);
            }
            for (index, value) in model.iter().enumerate() {
                assert_eq!(get(&block, order, index), *value, "width {}", 1 << order);
            }
        }
        let mut block = vec![0; 512];
        set(&mut block, 0, 9, 1);
        assert_eq!(block[1], 2, "the least significant bits come first");
        set(&mut block, 4, 8, 0x1234);
        assert_eq!(block[16..18], [0x12, 0x34]);
    }
}
