//! New refcount structures, when the old ones cannot be repaired in place or refcounts get another
//! width.
//!
//! They are written to clusters that nothing uses, not even the old structures, behind everything
//! that stays; the header's twelve bytes that name the table are written last. Until then the image
//! is as it was, after that every refcount is right: the clusters of the old structures are free.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::check::blocks::{get, most, set};
use crate::qcow2::check::references::References;
use crate::qcow2::check::target::Target;
use crate::qcow2::check::walk::{View, Walk};
use crate::qcow2::header::{REFTABLE_AT, REFTABLE_LIMIT};
use crate::storage::Purpose;

/// Where the header says how wide refcounts are.
const ORDER_AT: u64 = 96;
/// How many places between old structures are tried before one behind them all.
const MOST_PLACES: usize = 64;

/// Where the new structures go.
struct Plan {
    /// First cluster of the table.
    table: u64,
    /// Clusters of the table.
    table_clusters: u64,
    /// The cluster of each block, by its number.
    blocks: BTreeMap<u64, u64>,
    /// The first cluster behind everything.
    end: u64,
}

/// Writes new refcount structures and switches to them.
///
/// # Errors
/// When the host cannot write, or when the file has more clusters than a refcount table of legal
/// size can count.
pub(super) async fn rebuild(target: &Target<'_>, memory: usize) -> Result<()> {
    let plan = write(target, memory, Overflow::Kept).await?;
    switch(target, &plan, None).await
}

/// As [`rebuild`] for an image without anything wrong, with refcounts of `1 << order` bits.
///
/// # Errors
/// As [`rebuild`]; `Refused` when a cluster is referred to more often than such a refcount says.
pub(super) async fn widen(target: &mut Target<'_>, memory: usize, order: u32) -> Result<()> {
    target.header.geometry.refcount_order = order;
    let plan = write(target, memory, Overflow::Refused).await?;
    switch(target, &plan, Some(order)).await
}

/// What becomes of a cluster that is referred to more often than its refcount can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overflow {
    /// It keeps the largest refcount there is.
    Kept,
    /// There will be no such refcounts.
    Refused,
}

/// Writes new blocks and makes them durable; nothing names them yet.
async fn write(target: &Target<'_>, memory: usize, overflow: Overflow) -> Result<Plan> {
    let most = most(target.header.geometry.refcount_order);
    let (mut used, mut last) = (BTreeMap::new(), 0);
    let mut first = 0;
    let bits = target.header.geometry.refblock_bits();
    while first < u64::MAX {
        let references = count(target, first, memory).await?;
        for (cluster, seen) in references.leaves(|_| true).flatten() {
            if seen.references > most && overflow == Overflow::Refused {
                let why = format!(
                    "a cluster is referred to {} times, and refcounts of {} bits say {most} at \
                     most; take wider ones, or delete snapshots first",
                    seen.references,
                    1_u64 << target.header.geometry.refcount_order
                );
                return Err(Error::refused(target.name.as_str(), why));
            }
            if seen.references > 0 {
                used.insert(cluster >> bits, 0);
                last = cluster;
            }
            limit(target, used.len())?;
        }
        first = references.window().end;
    }
    let plan = plan(target, used, last)?;
    first = 0;
    let mut written = None;
    while first < u64::MAX {
        let references = count(target, first, memory).await?;
        for (&index, &place) in &plan.blocks {
            write_block(target, &references, &plan, (index, place), &mut written).await?;
        }
        first = references.window().end;
    }
    target.sync(Purpose::SyncData).await?;
    Ok(plan)
}

async fn count(target: &Target<'_>, first: u64, memory: usize) -> Result<References> {
    let mut references = References::new(first, memory);
    Walk::new(target, View::FOR_REBUILD, &mut references).count().await?;
    Ok(references)
}

/// Refuses more blocks than a table may name.
fn limit(target: &Target<'_>, blocks: usize) -> Result<()> {
    let (entries, limit) = (blocks as u64, REFTABLE_LIMIT / 8);
    if entries <= limit {
        return Ok(());
    }
    let kind = CorruptKind::TableSize { table: "refcount table", entries, limit };
    Err(Error::corrupt(target.name.as_str(), kind))
}

/// Finds places for the blocks that are `used` and for those that count the new structures.
fn plan(target: &Target<'_>, used: BTreeMap<u64, u64>, last: u64) -> Result<Plan> {
    if target.st.limits(target.file).grows {
        return plan_at(target, used, target.clusters().max(last + 1));
    }
    // A block device has its length from the start: there the room is behind what is in use, and
    // the structures that the header names until the end may lie there, too.
    let bits = target.header.geometry.cluster_bits;
    let table = target.reftable.clone().unwrap_or_default();
    let mut old: BTreeSet<u64> = target.block_places.iter().map(|at| at >> bits).collect();
    old.extend(table.start >> bits..table.end >> bits);
    let mut start = last + 1;
    for _ in 0..MOST_PLACES {
        let plan = plan_at(target, used.clone(), start)?;
        match old.range(start..plan.end).next_back() {
            None => return inside(target, plan),
            Some(place) => start = place + 1,
        }
    }
    let behind = old.last().map_or(start, |place| start.max(place + 1));
    inside(target, plan_at(target, used, behind)?)
}

/// Refuses a plan that does not fit into a file that cannot grow.
fn inside(target: &Target<'_>, plan: Plan) -> Result<Plan> {
    if plan.end <= target.rules.length >> target.header.geometry.cluster_bits {
        return Ok(plan);
    }
    let why = "there is no room behind the last cluster for new refcount structures; copy the \
               image to a larger device";
    Err(Error::refused(target.name.as_str(), why))
}

/// The plan whose table is at that cluster, and whose blocks follow it.
fn plan_at(target: &Target<'_>, used: BTreeMap<u64, u64>, table: u64) -> Result<Plan> {
    let geometry = target.header.geometry;
    let bits = geometry.refblock_bits();
    let mut blocks = used;
    let mut end = table;
    let table_clusters = loop {
        let highest = blocks.keys().next_back().copied().unwrap_or(0);
        let table_clusters = ((highest + 1) * 8).div_ceil(geometry.cluster_size());
        limit(target, usize::try_from(highest + 1).unwrap_or(usize::MAX))?;
        let next = table + table_clusters + blocks.len() as u64;
        if next == end {
            break table_clusters;
        }
        end = next;
        for index in table >> bits..=(end - 1) >> bits {
            blocks.insert(index, 0);
        }
    };
    for (place, slot) in (table + table_clusters..).zip(blocks.values_mut()) {
        *slot = place;
    }
    Ok(Plan { table, table_clusters, blocks, end })
}

/// Writes the part of a block that counts clusters of the window; the rest of it is zero, or was
/// written with the window before, which `written` tells.
async fn write_block(
    target: &Target<'_>,
    references: &References,
    plan: &Plan,
    (index, place): (u64, u64),
    written: &mut Option<u64>,
) -> Result<()> {
    let geometry = target.header.geometry;
    let (bits, order) = (geometry.refblock_bits(), geometry.refcount_order);
    let window = references.window();
    let first = index << bits;
    let clusters = first.max(window.start)..(first + (1 << bits)).min(window.end);
    if clusters.is_empty() {
        return Ok(());
    }
    let at = place << geometry.cluster_bits;
    let mut block = if *written == Some(index) {
        target.read(Purpose::RefblockLoad, at, geometry.cluster_size()).await?
    } else {
        vec![0; usize::try_from(geometry.cluster_size()).expect("at most 2 MiB")]
    };
    for cluster in clusters {
        let own = u64::from((plan.table..plan.end).contains(&cluster));
        let count = references.get(cluster).references + own;
        let slot = usize::try_from(cluster - first).expect("inside a block");
        set(&mut block, order, slot, count.min(most(order)));
        debug_assert_eq!(get(&block, order, slot), count.min(most(order)));
    }
    *written = Some(index);
    target.write(Purpose::RefblockInit, at, &block).await
}

/// Writes the table, and then its place in the header, together with the width of refcounts if that
/// is another one.
async fn switch(target: &Target<'_>, plan: &Plan, order: Option<u32>) -> Result<()> {
    let bits = target.header.geometry.cluster_bits;
    let len = usize::try_from(plan.table_clusters << bits).expect("bounded by the limit");
    let mut table = vec![0; len];
    for (index, place) in &plan.blocks {
        let at = usize::try_from(index * 8).expect("bounded by the limit");
        table[at..at + 8].copy_from_slice(&(place << bits).to_be_bytes());
    }
    let at = plan.table << bits;
    target.write(Purpose::ReftableWrite, at, &table).await?;
    target.sync(Purpose::SyncReftable).await?;
    let clusters = u32::try_from(plan.table_clusters).expect("bounded by the limit");
    let mut field = [at.to_be_bytes().as_slice(), &clusters.to_be_bytes()].concat();
    if let Some(order) = order {
        // What lies between is written as it is: all of it is in one sector.
        let between = REFTABLE_AT.0 + field.len() as u64;
        let len = ORDER_AT - between;
        field.extend(target.read(Purpose::HeaderRead, between, len).await?);
        field.extend(order.to_be_bytes());
    }
    target.write(Purpose::HeaderWrite, REFTABLE_AT.0, &field).await?;
    target.sync(Purpose::SyncHeader).await
}
