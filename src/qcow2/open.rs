//! From a file to a [`Qcow2`]: read the header, check it, load the L1 and refcount tables.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::bytes::{HostOffset, be64, round_up};
use crate::error::{CorruptKind, Error, Result};
use crate::flush_gate::FlushGate;
use crate::qcow2::ahead::Ahead;
use crate::qcow2::alloc::Allocator;
use crate::qcow2::bitmap::Bitmaps;
use crate::qcow2::check::{self, Repair};
use crate::qcow2::claims::Claims;
use crate::qcow2::compress_write::Packer;
use crate::qcow2::epoch::Epochs;
use crate::qcow2::format::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, OFFSET_MASK};
use crate::qcow2::header::{self, Header};
use crate::qcow2::limbo::Limbo;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::regions::Regions;
use crate::qcow2::snapshot::{self, Parsed, Snapshot};
use crate::qcow2::table::TableCache;
use crate::qcow2::{CacheSizes, Inflated, InflatedBytes, Qcow2};
use crate::storage::{Buf, FileId, Op, Opened, Purpose, Storage};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, OnceLock};

/// What an image is opened with, beside its own file.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    /// The external data file, when the header asks for one.
    pub data: Option<FileId>,
    /// Whether a layer lies below.
    pub backed: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Memory for tables.
    pub caches: CacheSizes,
}

/// Reads and checks the header of the image in `file`, and opens nothing else.
///
/// # Errors
/// What [`header::parse`] says, and I/O errors, with `name` in front.
pub async fn read_header(st: &dyn Storage, name: &str, file: Opened) -> Result<Header> {
    const START: u64 = 4096;
    let start = read(st, file.id, Purpose::HeaderRead, HostOffset(0), START.min(file.length));
    let start = start.await.map_err(|error| error.within(name))?;
    let cluster = header::cluster_size(name, &start)?;
    if cluster <= START {
        return header::parse(name, &start);
    }
    let whole = read(st, file.id, Purpose::HeaderRead, HostOffset(0), cluster.min(file.length));
    header::parse(name, &whole.await.map_err(|error| error.within(name))?)
}

/// The internal snapshots of the image in `file`, and how many bytes their table takes.
///
/// # Errors
/// When the table cannot be read or is malformed.
pub async fn read_snapshots(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    let (at, count) = (header.snapshots_at, header.snapshots);
    let mut len = header.geometry.cluster_size();
    loop {
        let bytes = read(st, file, Purpose::SnapshotRead, at, len).await?;
        let parsed = snapshot::parse(&bytes, count);
        match parsed.map_err(|kind| Error::corrupt("snapshot table", kind))? {
            Parsed::All(snapshots, len) => return Ok((snapshots, len)),
            Parsed::NeedMore if len < snapshot::TABLE_LIMIT => len *= 2,
            Parsed::NeedMore => {
                return Err(Error::corrupt("snapshot table", CorruptKind::Snapshot(count)));
            }
        }
    }
}

async fn read(
    st: &dyn Storage,
    file: FileId,
    why: Purpose,
    at: HostOffset,
    len: u64,
) -> Result<Vec<u8>> {
    let len = usize::try_from(len).expect("tables are bounded");
    let buf = Buf::zeroed(len);
    let done = st.submit(file, why, Op::Read { at, buf: buf.clone() }).await;
    done.map_err(|source| Error::io(format!("{why:?}"), source))?;
    Ok(buf.to_vec())
}

async fn read_table(
    st: &dyn Storage,
    file: Opened,
    why: Purpose,
    at: HostOffset,
    entries: u64,
) -> Result<Vec<u64>> {
    let bytes = read(st, file.id, why, at, entries * 8).await?;
    Ok((0..bytes.len() / 8).filter_map(|index| be64(&bytes, index * 8)).collect())
}

impl Qcow2 {
    /// Opens the image in `file`, whose header was read by [`read_header`].
    ///
    /// # Errors
    /// When a table lies outside the file or over another; when the image is marked dirty or
    /// corrupt and shall be written to.
    pub async fn open(
        st: &dyn Storage,
        name: &str,
        file: Opened,
        header: Header,
        parts: Parts,
    ) -> Result<Self> {
        if !parts.read_only {
            refuse_marked(name, &header)?;
        }
        let geometry = header.geometry;
        let end = round_up(file.length, geometry.cluster_size());
        let regions = table_regions(&header, end).map_err(|kind| Error::corrupt(name, kind))?;
        let l1 = read_table(st, file, Purpose::L1Load, header.l1_at, header.l1_entries);
        let l1 = l1.await.map_err(|error| error.within(name))?;
        let entries = header.reftable_clusters * (geometry.cluster_size() / 8);
        let table = read_table(st, file, Purpose::ReftableLoad, header.reftable_at, entries);
        let table = table.await.map_err(|error| error.within(name))?;
        let l2_need = header.l1_entries.saturating_mul(geometry.cluster_size());
        let mut image = Self {
            file: file.id,
            identity: file.identity,
            data: parts.data.unwrap_or(file.id),
            geometry,
            backed: parts.backed,
            l2: TableCache::new(geometry.slice_size(), parts.caches.l2_bytes.min(l2_need)),
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            l1_dirty: Mutex::new(BTreeSet::new()),
            refcounts: Refcounts::new(
                file.id,
                geometry,
                header.reftable_at,
                table,
                parts.caches.refcount_bytes,
            ),
            allocator: Allocator::new(file.length, geometry.cluster_bits, st.limits(file.id).grows),
            refill: Claims::default(),
            clusters: Claims::default(),
            tables: Claims::default(),
            regions,
            limbo: Limbo::default(),
            bitmaps: Bitmaps::None,
            epochs: Epochs::new(),
            flush: FlushGate::default(),
            ahead: Ahead::default(),
            links: AtomicU64::new(0),
            stored_links: AtomicU64::new(0),
            journal: Mutex::new(None),
            journaling: AtomicBool::new(false),
            packer: Packer::default(),
            inflated: Arc::new(Inflated::new(InflatedBytes(0))),
            image_dirty: AtomicBool::new(false),
            data_dirty: AtomicBool::new(false),
            features: Mutex::new([header.incompatible, header.compatible, header.autoclear]),
            writing: AtomicBool::new(false),
            lazy: AtomicBool::new(header.is_lazy()),
            bitmaps_stay: AtomicBool::new(false),
            starting: Claims::default(),
            poison: OnceLock::new(),
            marked: AtomicBool::new(false),
            header,
        };
        if !parts.read_only {
            image.guard_snapshots(st, end).await.map_err(|error| error.within(name))?;
            image.guard_tables(end).map_err(|kind| Error::corrupt(name, kind))?;
            let bitmaps = image.open_bitmaps(st, end).await;
            image.bitmaps = bitmaps.map_err(|error| error.within(name))?;
        }
        Ok(image)
    }

    /// The internal snapshots, and how many bytes their table takes.
    ///
    /// # Errors
    /// When the table cannot be read or is malformed.
    pub async fn snapshots(&self, st: &dyn Storage) -> Result<(Vec<Snapshot>, u64)> {
        read_snapshots(st, self.file, &self.header).await
    }

    /// Guards the snapshot table and the snapshots' L1 tables against guest data.
    pub(super) async fn guard_snapshots(&self, st: &dyn Storage, end: u64) -> Result<()> {
        if self.header.snapshots == 0 {
            return Ok(());
        }
        let (snapshots, len) = self.snapshots(st).await?;
        let tables = snapshots.iter().map(|one| ("snapshot's L1 table", one.l1_at, one.l1_entries));
        let whole = ("snapshot table", self.header.snapshots_at, len / 8);
        for (table, at, entries) in tables.chain([whole]).filter(|(_, _, entries)| *entries > 0) {
            let (offset, len) = (at.0, entries * 8);
            let kind = if offset.saturating_add(len) > end {
                CorruptKind::TableBeyondEnd { table, offset, file_len: end }
            } else if self.regions.contains(at, len) {
                CorruptKind::TableOverlap { table, offset }
            } else {
                self.regions.add(at, len);
                continue;
            };
            return Err(Error::corrupt("internal snapshots", kind));
        }
        Ok(())
    }

    /// Guards refcount blocks and L2 tables against guest data, and refuses an image in which one
    /// of them lies over other metadata, or outside the file: the file would grow up to it, and the
    /// guest's own bytes would be the table.
    pub(super) fn guard_tables(&self, end: u64) -> Result<(), CorruptKind> {
        let cluster = self.geometry.cluster_size();
        let l1 = self.l1.iter().map(|entry| entry.load(crate::sync::Ordering::Relaxed));
        let l2 = l1.map(|entry| ("L2 table", HostOffset(entry & OFFSET_MASK)));
        let blocks = self.refcounts.blocks().into_iter().map(|at| ("refcount block", at));
        for (table, at) in blocks.chain(l2) {
            let offset = at.0;
            if offset == 0 {
                continue;
            }
            if at.within(cluster) != 0 {
                return Err(CorruptKind::TableAlignment { table, offset });
            }
            if offset >= end {
                return Err(CorruptKind::TableBeyondEnd { table, offset, file_len: end });
            }
            if self.regions.contains(at, cluster) {
                return Err(CorruptKind::TableOverlap { table, offset });
            }
            self.regions.add(at, cluster);
        }
        Ok(())
    }
}

/// Repairs an image that was not closed and is about to be written to: its refcounts may be behind.
/// Returns the file and its header as they are then; an image that is not marked dirty, or that is
/// marked corrupt, is left alone.
///
/// # Errors
/// When the repair cannot be written, or leaves something behind.
pub async fn repair_dirty(
    st: &dyn Storage,
    name: &str,
    file: Opened,
    header: Header,
) -> Result<(Opened, Header)> {
    let marks = header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    if marks != INCOMPATIBLE_DIRTY {
        return Ok((file, header));
    }
    tracing::info!("{name} was not closed, its refcounts are repaired first");
    let began = Instant::now();
    let report = check::check(st, name, file.id, Repair::All).await?;
    let (milliseconds, left) = (began.elapsed().as_millis(), report.corruptions);
    tracing::warn!(
        "{name} was not closed: repaired {} corruptions and {} leaks in {milliseconds} ms, gave up \
         {} clusters and tables, {left} corruptions and {} leaks are left",
        report.corruptions_fixed,
        report.leaks_fixed,
        report.losses,
        report.leaks,
    );
    if report.losses > 0 {
        // What the guest has lost is told in full, not only counted.
        report.findings.iter().for_each(|finding| tracing::warn!("{name}: {finding}"));
    }
    if !report.is_consistent() {
        let finding = report.findings.last().map_or("", String::as_str);
        let why = format!(
            "the image was not closed, and a repair leaves {left} corruptions and {} things that \
             cannot be read ({finding}); copy it to a new image with qemu-img convert, or pass \
             --read-only",
            report.check_errors
        );
        return Err(Error::refused(name, why));
    }
    let length = st.length(file.id).map_err(|error| Error::io(name, error))?;
    let file = Opened { length, ..file };
    Ok((file, read_header(st, name, file).await?))
}

fn refuse_marked(name: &str, header: &Header) -> Result<()> {
    let state = if header.incompatible & INCOMPATIBLE_CORRUPT != 0 {
        "marked corrupt"
    } else if header.incompatible & INCOMPATIBLE_DIRTY != 0 {
        "marked dirty: its refcounts were not written before a crash"
    } else {
        return Ok(());
    };
    let why =
        format!("the image is {state}; repair it with qemu-img check -r all, or pass --read-only");
    Err(Error::refused(name, why))
}

/// The places of the header, the L1 table and the refcount table.
pub(super) fn table_regions(header: &Header, end: u64) -> Result<Regions, CorruptKind> {
    let cluster = header.geometry.cluster_size();
    let regions = Regions::new(header.geometry.cluster_bits);
    regions.add(HostOffset(0), cluster);
    let tables = [
        ("L1 table", header.l1_at, header.l1_entries * 8),
        ("refcount table", header.reftable_at, header.reftable_clusters * cluster),
    ];
    for (table, at, len) in tables {
        if len == 0 {
            continue;
        }
        let offset = at.0;
        if offset.saturating_add(len) > end {
            return Err(CorruptKind::TableBeyondEnd { table, offset, file_len: end });
        }
        if regions.contains(at, len) {
            return Err(CorruptKind::TableOverlap { table, offset });
        }
        regions.add(at, len);
    }
    Ok(regions)
}
