//! The image being checked: its header, the places of its tables, and its bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::bytes::{HostOffset, be32, be64, round_up};
use crate::error::{Error, Kind, Result};
use crate::qcow2::check::entries::Rules;
use crate::qcow2::check::{Report, Told};
use crate::qcow2::format::{AUTOCLEAR_BITMAPS, INCOMPATIBLE_EXTENDED_L2, OFFSET_MASK};
use crate::qcow2::header::{self, Header, REFTABLE_AT};
use crate::qcow2::open::read_header;
use crate::qcow2::snapshot::{self, Parsed};
use crate::storage::{Buf, FileId, Op, Opened, Pending, Purpose, Storage};

/// Header extension: where the directory of bitmaps is.
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Largest L1 table of a snapshot in bytes, as for the active one.
const L1_LIMIT: u64 = 32 << 20;
/// Largest directory of bitmaps in bytes.
const DIRECTORY_LIMIT: u64 = 64 << 20;
/// Tables are read this many bytes at once, or one by one when they are larger.
const AHEAD: u64 = 1 << 20;

/// Where the refcounts of a run of clusters are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// Nowhere: they are all zero.
    Absent,
    /// In the refcount block at this offset.
    At(u64),
    /// The refcount table names no block that can be read.
    Unknown,
}

/// A table of table or cluster offsets: an L1 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Root {
    pub(super) at: u64,
    pub(super) entries: u64,
    /// Whether it is the guest's, not a snapshot's.
    pub(super) active: bool,
}

/// The directory of bitmaps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) count: u32,
}

/// One image, with nobody else using it.
pub(super) struct Target<'a> {
    pub(super) st: &'a dyn Storage,
    pub(super) name: String,
    pub(super) file: FileId,
    pub(super) header: Header,
    pub(super) rules: Rules,
    /// The active L1 table first, then the snapshots'.
    pub(super) roots: Vec<Root>,
    pub(super) snapshot_table: Range<u64>,
    pub(super) directory: Option<Directory>,
    /// Where the refcount table is, when it can be used.
    pub(super) reftable: Option<Range<u64>>,
    pub(super) blocks: Vec<Block>,
    /// The refcount structures that are references themselves, one for each use.
    pub(super) block_places: Vec<u64>,
    /// What was wrong up to here.
    pub(super) report: Report,
    /// The refcount structures cannot be repaired in place.
    pub(super) rebuild: bool,
    /// Told how many bytes of how many of its L2 tables a walk has looked at.
    pub(super) progress: Option<&'a Told<'a>>,
}

impl<'a> Target<'a> {
    /// Reads what the header names.
    ///
    /// # Errors
    /// When the header cannot be read or used.
    pub(super) async fn load(st: &'a dyn Storage, name: &str, file: FileId) -> Result<Self> {
        let length = st.length(file).map_err(|error| Error::io(name, error))?;
        let (header, usable) = lenient_header(st, name, file, length).await?;
        let geometry = header.geometry;
        let rules = Rules {
            cluster_bits: geometry.cluster_bits,
            version: header.version,
            data_file: geometry.rules.data_file,
            extended: header.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            length,
            fixed: Vec::new(),
            condemned: BTreeSet::new(),
            overlapped: BTreeSet::new(),
            owners: BTreeMap::new(),
            former: BTreeSet::new(),
        };
        let active = Root { at: header.l1_at.0, entries: header.l1_entries, active: true };
        let mut target = Self {
            st,
            name: name.to_owned(),
            file,
            header,
            rules,
            roots: vec![active],
            snapshot_table: 0..0,
            directory: None,
            reftable: None,
            blocks: Vec::new(),
            block_places: Vec::new(),
            report: Report::default(),
            rebuild: false,
            progress: None,
        };
        target.read_snapshots().await;
        target.read_directory().await;
        target.read_reftable(usable).await;
        target.fix_places();
        Ok(target)
    }

    /// The same image as it is now.
    ///
    /// # Errors
    /// As [`Target::load`].
    pub(super) async fn reload(&self) -> Result<Self> {
        let now = Self::load(self.st, &self.name, self.file).await?;
        Ok(Self { progress: self.progress, ..now })
    }

    /// Tells how many of how many L2 tables a walk has looked at.
    pub(super) fn tell(&self, done: usize, all: usize) {
        if let Some(progress) = self.progress {
            let bytes = |tables: usize| (tables as u64).saturating_mul(self.cluster_size());
            progress(bytes(done), bytes(all));
        }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        self.rules.cluster_size()
    }

    /// Bytes of one L2 entry.
    pub(super) fn entry_size(&self) -> usize {
        if self.rules.extended { 16 } else { 8 }
    }

    /// Clusters of the file.
    pub(super) fn clusters(&self) -> u64 {
        self.rules.length.div_ceil(self.cluster_size())
    }

    /// Whether a snapshot's L1 table lies there.
    pub(super) fn is_snapshot_root(&self, at: u64) -> bool {
        let mut roots = self.roots.iter().filter(|root| !root.active);
        roots.any(|root| (root.at..root.at.saturating_add(root.entries * 8)).contains(&at))
    }

    /// The block that counts `cluster`.
    pub(super) fn block_of(&self, cluster: u64) -> Block {
        let index = usize::try_from(cluster >> self.header.geometry.refblock_bits());
        index.ok().and_then(|index| self.blocks.get(index)).copied().unwrap_or(Block::Absent)
    }

    async fn read_snapshots(&mut self) {
        let (at, count) = (self.header.snapshots_at.0, self.header.snapshots);
        if count == 0 {
            return;
        }
        let mut len = self.cluster_size();
        let snapshots = loop {
            let bytes = match self.read(Purpose::SnapshotRead, at, len).await {
                Ok(bytes) => bytes,
                Err(error) => return self.report.failed(&error),
            };
            match snapshot::parse(&bytes, count) {
                Ok(Parsed::All(snapshots, len)) => {
                    self.snapshot_table = at..at.saturating_add(len);
                    break snapshots;
                }
                Ok(Parsed::NeedMore) if len < snapshot::TABLE_LIMIT => len = len.saturating_mul(2),
                Ok(Parsed::NeedMore) | Err(_) => {
                    // What the snapshots own is not known: nothing may be given back.
                    self.report.check_errors += 1;
                    return self.report.corrupt(1, || "the snapshot table is malformed".to_owned());
                }
            }
        };
        for one in snapshots {
            let root = Root { at: one.l1_at.0, entries: one.l1_entries, active: false };
            let wrong = root.at & (self.cluster_size() - 1) != 0 || root.entries > L1_LIMIT >> 3;
            if wrong {
                let what = || format!("the L1 table of snapshot {:?} cannot be used", one.name);
                self.report.corrupt(1, what);
                self.report.check_errors += 1;
            } else {
                self.roots.push(root);
            }
        }
    }

    async fn read_directory(&mut self) {
        if self.header.version < 3 || self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return;
        }
        let cluster = self.cluster_size();
        let bytes = match self.read(Purpose::HeaderRead, 0, cluster).await {
            Ok(bytes) => bytes,
            Err(error) => return self.report.failed(&error),
        };
        let Some((at, len, count)) = bitmaps_extension(&bytes) else { return };
        if at & (cluster - 1) != 0 || len > DIRECTORY_LIMIT || self.rules.cuts(at, len) {
            self.report.bitmaps_broken = true;
            self.report.corrupt(1, || format!("the bitmap directory at {at:#x} cannot be used"));
        } else {
            self.directory = Some(Directory { at, len, count });
        }
    }

    async fn read_reftable(&mut self, usable: bool) {
        let cluster = self.cluster_size();
        let (at, len) = (self.header.reftable_at.0, self.header.reftable_clusters * cluster);
        if !usable || self.rules.cuts(at, len) {
            self.rebuild = true;
            return self.report.corrupt(1, || "the refcount table cannot be used".to_owned());
        }
        self.reftable = Some(at..at + len);
        let bytes = match self.read(Purpose::ReftableLoad, at, len).await {
            Ok(bytes) => bytes,
            Err(error) => return self.report.failed(&error),
        };
        let mut seen = BTreeSet::new();
        for (index, word) in words(&bytes).enumerate() {
            let block = self.read_block_entry(index, word, &mut seen);
            self.blocks.push(block);
        }
        while self.blocks.last() == Some(&Block::Absent) {
            self.blocks.pop();
        }
    }

    fn read_block_entry(&mut self, index: usize, word: u64, seen: &mut BTreeSet<u64>) -> Block {
        let at = word & OFFSET_MASK;
        let mut wrong = |what: &str| {
            self.rebuild = true;
            self.report.corrupt(1, || format!("refcount table entry {index} ({word:#x}): {what}"));
        };
        if at & (self.rules.cluster_size() - 1) != 0 {
            wrong("the block is not aligned to a cluster");
            return Block::Unknown;
        }
        if at >= round_up(self.rules.length, self.rules.cluster_size()) {
            wrong("the block lies beyond the end of the file");
            return Block::Absent;
        }
        if word & !OFFSET_MASK != 0 {
            wrong("reserved bits are set");
            return Block::Absent;
        }
        if at != 0 {
            self.block_places.push(at);
        }
        match at {
            0 => Block::Absent,
            _ if seen.insert(at) => Block::At(at),
            _ => Block::Unknown,
        }
    }

    /// The tables that the header names; nothing else can be there.
    fn fix_places(&mut self) {
        let end = |at: u64, len: u64| at..round_up(at.saturating_add(len), self.cluster_size());
        let mut fixed = vec![end(0, 1), end(self.header.l1_at.0, self.header.l1_entries * 8)];
        let table = &self.snapshot_table;
        fixed.push(end(table.start, table.end - table.start));
        fixed.extend(self.reftable.clone().filter(|_| !self.rebuild));
        fixed.retain(|range| !range.is_empty());
        fixed.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in fixed {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        self.rules.fixed = merged;
    }

    /// Reads bytes; past the end of the file they are zeros.
    ///
    /// # Errors
    /// What the host answered.
    pub(super) async fn read(&self, why: Purpose, at: u64, len: u64) -> Result<Vec<u8>> {
        let (buf, pending) = self.start_read(why, at, len);
        pending.await.map_err(|error| self.io(why, error))?;
        Ok(buf.to_vec())
    }

    fn start_read(&self, why: Purpose, at: u64, len: u64) -> (Buf, Pending) {
        let buf = Buf::zeroed(usize::try_from(len).expect("tables are bounded"));
        let op = Op::Read { at: HostOffset(at), buf: buf.clone() };
        (buf, self.st.submit(self.file, why, op))
    }

    /// How many clusters are read at once.
    pub(super) fn ahead(&self) -> usize {
        usize::try_from((AHEAD >> self.rules.cluster_bits).clamp(1, 64)).expect("small")
    }

    /// Reads the clusters at these places, all at once.
    pub(super) async fn read_clusters(&self, why: Purpose, at: &[u64]) -> Vec<Result<Vec<u8>>> {
        let start = |&at: &u64| self.start_read(why, at, self.cluster_size());
        let started: Vec<_> = at.iter().map(start).collect();
        let mut clusters = Vec::with_capacity(at.len());
        for (buf, pending) in started {
            let read = pending.await.map_err(|error| self.io(why, error));
            clusters.push(read.map(|()| buf.to_vec()));
        }
        clusters
    }

    /// Writes the sectors of `new` that differ from `old`, which was read from `at`.
    ///
    /// # Errors
    /// What the host answered.
    pub(super) async fn write_changes(
        &self,
        why: Purpose,
        at: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<()> {
        const SECTOR: usize = 512;
        let differs = |(old, new): (&[u8], &[u8])| old != new;
        let sectors: Vec<bool> = old.chunks(SECTOR).zip(new.chunks(SECTOR)).map(differs).collect();
        let mut next = 0;
        while let Some(skip) = sectors[next..].iter().position(|differs| *differs) {
            let first = next + skip;
            let run = sectors[first..].iter().take_while(|differs| **differs).count();
            next = first + run;
            let bytes = &new[first * SECTOR..(next * SECTOR).min(new.len())];
            self.write(why, at + (first * SECTOR) as u64, bytes).await?;
        }
        Ok(())
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// What the host answered.
    pub(super) async fn write(&self, why: Purpose, at: u64, bytes: &[u8]) -> Result<()> {
        let op = Op::Write { at: HostOffset(at), buf: Buf::copy_of(bytes) };
        self.st.submit(self.file, why, op).await.map_err(|error| self.io(why, error))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the host answered.
    pub(super) async fn sync(&self, why: Purpose) -> Result<()> {
        self.st.submit(self.file, why, Op::Sync).await.map_err(|error| self.io(why, error))
    }

    fn io(&self, why: Purpose, error: std::io::Error) -> Error {
        Error::io(format!("{}: {why:?}", self.name), error)
    }
}

/// The big-endian words of a table.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_be_bytes(*word))
}

/// The header; also when only its words on the refcount table are unusable, which `false` says.
async fn lenient_header(
    st: &dyn Storage,
    name: &str,
    file: FileId,
    length: u64,
) -> Result<(Header, bool)> {
    let opened = Opened { id: file, identity: (0, 0), length };
    let strict = match read_header(st, name, opened).await {
        Ok(header) => return Ok((header, true)),
        Err(error) => error,
    };
    if !matches!(strict.kind(), Kind::Corrupt(_)) {
        return Err(strict);
    }
    let len = length.min(2 << 20);
    let buf = Buf::zeroed(usize::try_from(len).expect("bounded"));
    let op = Op::Read { at: HostOffset(0), buf: buf.clone() };
    let read = st.submit(file, Purpose::HeaderRead, op).await;
    read.map_err(|error| Error::io(name, error))?;
    let mut bytes = buf.to_vec();
    let Ok(cluster) = header::cluster_size(name, &bytes) else { return Err(strict) };
    bytes.truncate(usize::try_from(cluster).expect("at most 2 MiB"));
    let words = [cluster.to_be_bytes().as_slice(), &1_u32.to_be_bytes()].concat();
    let place = usize::try_from(REFTABLE_AT.0).expect("in the first sector");
    match bytes.get_mut(place..place + words.len()) {
        Some(field) => field.copy_from_slice(&words),
        None => return Err(strict),
    }
    match header::parse(name, &bytes) {
        Ok(header) => Ok((header, false)),
        Err(_) => Err(strict),
    }
}

/// Where the directory of bitmaps is, how long it is, and how many bitmaps it lists.
fn bitmaps_extension(bytes: &[u8]) -> Option<(u64, u64, u32)> {
    let mut at = usize::try_from(be32(bytes, 100)?).ok()?;
    loop {
        let (kind, len) = (be32(bytes, at)?, be32(bytes, at.checked_add(4)?)?);
        if kind == 0 {
            return None;
        }
        let content = at.checked_add(8)?;
        if kind == EXTENSION_BITMAPS {
            let count = be32(bytes, content)?;
            return Some((be64(bytes, content + 16)?, be64(bytes, content + 8)?, count));
        }
        at = content.checked_add(usize::try_from(len).ok()?)?.checked_next_multiple_of(8)?;
    }
}
