//! A checker of its own: reads an image's bytes by the specification, shares no code with what is
//! tested, and is fast enough to run after every one of a hundred thousand power cuts.

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bits of entries that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const BITMAPS_EXTENSION: u64 = 0x2385_2875;
/// More findings than these are not written down.
const MOST: usize = 16;

/// What the checker found.
#[derive(Debug, Default, Clone)]
pub struct Report {
    /// What is wrong, in words; empty when nothing is.
    pub corruptions: Vec<String>,
    /// Clusters of the file with a refcount above the number of references.
    pub leaks: u64,
    /// Clusters behind the end of the file with a refcount.
    pub leaks_beyond: u64,
    /// Guest clusters that are data, compressed, or allocated zeros.
    pub mapped: u64,
}

impl Report {
    /// All leaks.
    pub fn all_leaks(&self) -> u64 {
        self.leaks + self.leaks_beyond
    }

    /// Whether there is nothing to report.
    pub fn is_clean(&self) -> bool {
        self.corruptions.is_empty() && self.all_leaks() == 0
    }
}

/// What a cluster is used for; metadata may have one use only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    Header = 1,
    Reftable,
    Refblock,
    L1,
    L2,
    Snapshots,
    Bitmaps,
    Data,
}

struct Walk<'a> {
    bytes: &'a [u8],
    version: u32,
    cluster_bits: u32,
    order: u32,
    data_file: bool,
    extended: bool,
    reftable: (u64, u64),
    /// References and use of each cluster of the file.
    references: Vec<u32>,
    uses: Vec<u8>,
    report: Report,
    /// Whether COPIED flags may lag behind refcounts; then the clusters of entries that have it.
    interrupted: Option<Vec<u64>>,
}

fn be16(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    Some(u64::from(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

fn be32(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    Some(u64::from(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?)))
}

/// A word of a table; bytes behind the end of the file are zeros.
fn be64(bytes: &[u8], at: u64) -> u64 {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    let mut word = [0; 8];
    word.iter_mut().zip(rest).for_each(|(byte, found)| *byte = *found);
    u64::from_be_bytes(word)
}

/// Checks the image whose file holds `bytes`.
pub fn check(bytes: &[u8]) -> Report {
    let Some(mut walk) = Walk::new(bytes) else {
        let corruptions = vec!["this is no image".to_owned()];
        return Report { corruptions, ..Report::default() };
    };
    walk.tables();
    walk.compare();
    walk.report
}

/// Checks an image after a power cut in the middle of a change of many refcounts: a COPIED flag may
/// be missing, or stand beside a refcount that is too high, but not on a cluster that is shared.
pub fn check_interrupted(bytes: &[u8]) -> Report {
    let Some(mut walk) = Walk::new(bytes) else { return check(bytes) };
    walk.interrupted = Some(Vec::new());
    walk.tables();
    walk.compare();
    for cluster in walk.interrupted.take().unwrap_or_default() {
        let at = usize::try_from(cluster).unwrap_or(usize::MAX);
        let users = walk.references.get(at).copied().unwrap_or(0);
        if users != 1 {
            walk.corrupt(|| format!("cluster {cluster:#x} has COPIED and {users} users"));
        }
    }
    walk.report
}

/// What the tables of an image say, for tests that look closer than [`check`].
#[derive(Debug, Default, Clone)]
pub struct Map {
    /// The refcount of each cluster of the file.
    pub refcounts: Vec<u64>,
    /// How many references there are to each cluster of the file.
    pub references: Vec<u32>,
    /// Host offset of each guest cluster's entry in the active tables, where it is plain.
    pub guest: Vec<Option<u64>>,
}

/// Reads an image's tables; empty when it is no image.
pub fn map(bytes: &[u8]) -> Map {
    let Some(mut walk) = Walk::new(bytes) else { return Map::default() };
    walk.tables();
    let clusters = 0..walk.references.len() as u64;
    let refcounts = clusters.map(|cluster| walk.refcount(cluster)).collect();
    let (l1_at, entries) = (be64(bytes, 40), be32(bytes, 36).unwrap_or(0));
    let mut guest = Vec::new();
    for index in 0..entries {
        let table = be64(bytes, l1_at + index * 8) & OFFSET_MASK;
        for slot in 0..walk.cluster_size() / walk.entry_size() {
            let at = table + slot * walk.entry_size();
            let entry = if table == 0 { 0 } else { be64(bytes, at) };
            let at = entry & OFFSET_MASK;
            guest.push((at != 0 && entry & COMPRESSED == 0).then_some(at));
        }
    }
    Map { refcounts, references: walk.references, guest }
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let word = |at| be32(bytes, at);
        let version = u32::try_from(word(4)?).ok()?;
        let cluster_bits = u32::try_from(word(20)?).ok()?;
        let known = word(0)? == 0x5146_49fb && (2..=3).contains(&version);
        if !known || !(9..=21).contains(&cluster_bits) {
            return None;
        }
        let order = if version == 3 { u32::try_from(word(96)?).ok()? } else { 4 };
        let incompatible = if version == 3 { be64(bytes, 72) } else { 0 };
        if order > 6 || incompatible & !0b1_1111 != 0 {
            return None;
        }
        let clusters = bytes.len().div_ceil(1 << cluster_bits);
        Some(Self {
            bytes,
            version,
            cluster_bits,
            order,
            data_file: incompatible & 4 != 0,
            extended: incompatible & 16 != 0,
            reftable: (be64(bytes, 48), word(56)? << cluster_bits >> 3),
            references: vec![0; clusters],
            uses: vec![0; clusters],
            report: Report::default(),
            interrupted: None,
        })
    }

    fn corrupt(&mut self, what: impl FnOnce() -> String) {
        if self.report.corruptions.len() < MOST {
            self.report.corruptions.push(what());
        }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Counts one reference to every cluster of a range.
    fn refer(&mut self, at: u64, len: u64, what: Use) {
        let last = at.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        for cluster in at >> self.cluster_bits..=last {
            let index = usize::try_from(cluster).unwrap_or(usize::MAX);
            let Some(count) = self.references.get_mut(index) else {
                self.corrupt(|| format!("{what:?} at {at:#x} lies behind the end of the file"));
                return;
            };
            *count += 1;
            let before = std::mem::replace(&mut self.uses[index], what as u8);
            let shared = what == Use::L2 || what == Use::Data;
            if before != 0 && (before != what as u8 || !shared) {
                self.corrupt(|| format!("{what:?} lies over other metadata, cluster {cluster:#x}"));
            }
        }
    }

    /// Refers to a table; `false` when it cannot be read.
    fn table(&mut self, at: u64, len: u64, what: Use) -> bool {
        if at & (self.cluster_size() - 1) != 0 || at >> 56 != 0 {
            self.corrupt(|| format!("{what:?} at {at:#x} is not aligned"));
            return false;
        }
        let end = (self.references.len() as u64) << self.cluster_bits;
        if at.saturating_add(len) > end {
            self.corrupt(|| format!("{what:?} at {at:#x} lies behind the end of the file"));
            return false;
        }
        self.refer(at, len, what);
        true
    }

    fn tables(&mut self) {
        let header = |at| be32(self.bytes, at).unwrap_or(0);
        let (l1_entries, snapshots) = (header(36), header(60));
        let (l1_at, snapshots_at) = (be64(self.bytes, 40), be64(self.bytes, 64));
        self.refer(0, 1, Use::Header);
        let (at, entries) = self.reftable;
        self.table(at, entries * 8, Use::Reftable);
        for index in 0..entries {
            let entry = be64(self.bytes, at + index * 8);
            self.reserved(entry, !OFFSET_MASK, || format!("refcount table entry {index}"));
            if entry & OFFSET_MASK != 0 {
                self.table(entry & OFFSET_MASK, self.cluster_size(), Use::Refblock);
            }
        }
        let coverage = self.cluster_size() * self.cluster_size() / self.entry_size();
        if l1_entries.saturating_mul(coverage) < be64(self.bytes, 24) {
            self.corrupt(|| format!("{l1_entries} entries of the L1 table are too few"));
        }
        self.l1(l1_at, l1_entries, true);
        self.snapshots(snapshots_at, snapshots);
        if self.version == 3 {
            self.bitmaps();
        }
    }

    fn l1(&mut self, at: u64, entries: u64, active: bool) {
        if entries == 0 || !self.table(at, entries * 8, Use::L1) {
            return;
        }
        for index in 0..entries {
            let entry = be64(self.bytes, at + index * 8);
            let table = entry & OFFSET_MASK;
            self.reserved(entry, L1_RESERVED, || format!("L1 entry {index}"));
            if table == 0 && entry != 0 {
                self.corrupt(|| format!("L1 entry {index} is {entry:#x}: flags without a table"));
            }
            if table == 0 || !self.table(table, self.cluster_size(), Use::L2) {
                continue;
            }
            if active {
                self.copied(entry, table, || format!("L1 entry {index}"));
            }
            self.l2(table, index, active);
        }
    }

    fn l2(&mut self, table: u64, l1_index: u64, active: bool) {
        let entries = self.cluster_size() / self.entry_size();
        for index in 0..entries {
            let at = table + index * self.entry_size();
            let entry = be64(self.bytes, at);
            let guest = l1_index * entries + index;
            if self.extended {
                self.subclusters(entry, be64(self.bytes, at + 8), guest);
            }
            if entry == 0 {
                continue;
            }
            if entry & COMPRESSED != 0 {
                self.compressed(entry, guest);
                continue;
            }
            let at = entry & OFFSET_MASK;
            self.reserved(entry, L2_RESERVED, || format!("L2 entry of guest cluster {guest}"));
            if entry & 1 != 0 && (self.version < 3 || self.extended) {
                self.corrupt(|| format!("a zero flag where there are none, guest cluster {guest}"));
            }
            if self.data_file {
                let right = at == guest << self.cluster_bits;
                self.report.mapped += u64::from(right);
                if (at != 0 || entry & COPIED != 0) && !right {
                    self.corrupt(|| format!("guest cluster {guest} lies at {at:#x} of its file"));
                }
                continue;
            }
            if at == 0 {
                continue;
            }
            self.report.mapped += 1;
            if at & (self.cluster_size() - 1) != 0 {
                self.corrupt(|| format!("guest cluster {guest} at {at:#x} is not aligned"));
                continue;
            }
            self.refer(at, self.cluster_size(), Use::Data);
            if active {
                self.copied(entry, at, || format!("L2 entry of guest cluster {guest}"));
            }
        }
    }

    /// The bitmap of an extended entry: no subcluster is both allocated and zero, none is allocated
    /// without a host cluster, and a compressed cluster has no subclusters.
    fn subclusters(&mut self, entry: u64, bitmap: u64, guest: u64) {
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        let plain = entry & COMPRESSED == 0;
        let placed = entry & OFFSET_MASK != 0 || (self.data_file && entry & COPIED != 0);
        let fine = allocated & zero == 0 && (allocated == 0 || placed) && (plain || bitmap == 0);
        if !fine {
            self.corrupt(|| format!("guest cluster {guest} is {entry:#x} with {bitmap:#x}"));
        }
    }

    fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn compressed(&mut self, entry: u64, guest: u64) {
        let shift = 70 - self.cluster_bits;
        let at = entry & ((1 << shift) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> shift;
        // From the first byte to the end of the last sector.
        let end = (at / 512 + sectors + 1) * 512;
        if entry & COPIED != 0 || self.data_file {
            self.corrupt(|| format!("a compressed cluster with a flag, guest cluster {guest}"));
        }
        self.report.mapped += 1;
        self.refer(at, end - at, Use::Data);
    }

    /// The COPIED flag must say whether the refcount is one.
    fn copied(&mut self, entry: u64, at: u64, what: impl Fn() -> String) {
        let count = self.refcount(at >> self.cluster_bits);
        if let Some(flagged) = &mut self.interrupted {
            flagged.extend((entry & COPIED != 0).then_some(at >> self.cluster_bits));
            return;
        }
        if (entry & COPIED != 0) != (count == 1) {
            self.corrupt(|| format!("{} is {entry:#x}, refcount {count}", what()));
        }
    }

    fn reserved(&mut self, entry: u64, bits: u64, what: impl Fn() -> String) {
        if entry & bits != 0 {
            self.corrupt(|| format!("{} is {entry:#x}: reserved bits", what()));
        }
    }

    fn snapshots(&mut self, at: u64, count: u64) {
        let mut end = at;
        let mut tables = Vec::new();
        for number in 0..count {
            let sizes = [be16(self.bytes, end + 12), be16(self.bytes, end + 14)];
            let (Some(extra), [Some(id), Some(name)]) = (be32(self.bytes, end + 36), sizes) else {
                self.corrupt(|| format!("snapshot {number} lies behind the end of the file"));
                return;
            };
            let entries = be32(self.bytes, end + 8).unwrap_or(0);
            tables.push((be64(self.bytes, end), entries));
            end = (end + 40 + extra + id + name).next_multiple_of(8);
        }
        if count > 0 && self.table(at, end - at, Use::Snapshots) {
            tables.into_iter().for_each(|(at, entries)| self.l1(at, entries, false));
        }
    }

    fn bitmaps(&mut self) {
        let mut at = be32(self.bytes, 100).unwrap_or(0);
        while let (Some(kind), Some(len)) = (be32(self.bytes, at), be32(self.bytes, at + 4)) {
            if kind == 0 || at >= self.cluster_size() {
                return;
            }
            if kind == BITMAPS_EXTENSION && len >= 24 && be64(self.bytes, 88) & 1 != 0 {
                self.directory(be64(self.bytes, at + 24), be64(self.bytes, at + 16));
            }
            at += 8 + len.next_multiple_of(8);
        }
    }

    fn directory(&mut self, at: u64, len: u64) {
        if !self.table(at, len, Use::Bitmaps) {
            return;
        }
        let mut entry = at;
        while entry < at + len {
            let (table, size) = (be64(self.bytes, entry), be32(self.bytes, entry + 8));
            let (name, extra) = (be16(self.bytes, entry + 18), be32(self.bytes, entry + 20));
            let (Some(size), Some(name), Some(extra)) = (size, name, extra) else { return };
            if size > 0 && self.table(table, size * 8, Use::Bitmaps) {
                for index in 0..size {
                    let cluster = be64(self.bytes, table + index * 8) & OFFSET_MASK;
                    if cluster != 0 {
                        self.table(cluster, self.cluster_size(), Use::Bitmaps);
                    }
                }
            }
            entry += (24 + name + extra).next_multiple_of(8);
        }
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let per_block = self.cluster_bits + 3 - self.order;
        let (index, within) = (cluster >> per_block, cluster & ((1 << per_block) - 1));
        let (table, entries) = self.reftable;
        if index >= entries {
            return 0;
        }
        let block = be64(self.bytes, table + index * 8) & OFFSET_MASK;
        if block == 0 { 0 } else { self.count_in(block, within) }
    }

    fn count_in(&self, block: u64, within: u64) -> u64 {
        let bit = within << self.order;
        let at = usize::try_from(block + bit / 8).unwrap_or(usize::MAX);
        let byte = |step: usize| self.bytes.get(at.saturating_add(step)).copied().unwrap_or(0);
        if self.order < 3 {
            return u64::from(byte(0) >> (bit % 8)) & ((1 << (1 << self.order)) - 1);
        }
        (0..1 << (self.order - 3)).fold(0, |value, step| value << 8 | u64::from(byte(step)))
    }

    fn compare(&mut self) {
        for cluster in 0..self.references.len() {
            let (have, need) = (self.refcount(cluster as u64), self.references[cluster].into());
            if have < need {
                self.corrupt(|| {
                    format!("cluster {cluster:#x}: refcount {have}, {need} references")
                });
            }
            self.report.leaks += u64::from(have > need);
        }
        // Counts of clusters behind the end of the file.
        let per_block = 1 << (self.cluster_bits + 3 - self.order);
        let (table, entries) = self.reftable;
        let end = self.references.len() as u64;
        for index in end / per_block..entries {
            let block = be64(self.bytes, table + index * 8) & OFFSET_MASK;
            if block != 0 && self.has_bytes(block) {
                let first = end.saturating_sub(index * per_block).min(per_block);
                let counted = (first..per_block).filter(|&at| self.count_in(block, at) != 0);
                self.report.leaks_beyond += counted.count() as u64;
            }
        }
    }

    fn has_bytes(&self, block: u64) -> bool {
        let at = usize::try_from(block).unwrap_or(usize::MAX).min(self.bytes.len());
        let end = (at + (1 << self.cluster_bits)).min(self.bytes.len());
        self.bytes[at..end].iter().any(|&byte| byte != 0)
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
