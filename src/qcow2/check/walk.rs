//! One walk through all tables of an image, counting references.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::bytes::{be16, be32, be64};
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::check::entries::{Entry, Mapped, Reading};
use crate::qcow2::check::references::{References, Use};
use crate::qcow2::check::target::{Directory, Root, Target, words};
use crate::qcow2::check::{Report, Survey};
use crate::qcow2::format::OFFSET_MASK;
use crate::storage::Purpose;

/// Bytes of an L1 table or a bitmap table that are read at once.
const CHUNK: u64 = 1 << 20;
/// Most entries of L1 and bitmap tables that one walk looks at: 2 GiB of tables. Valid images have
/// a thousandth of that.
const MOST_ENTRIES: u64 = 1 << 28;
/// What an entry of the list of L2 tables costs in bytes, with room to spare.
const TABLE_COST: usize = 96;
/// Wrong tables that are remembered; with more, an image is not worth a repair of its tables.
const MOST_SUSPECTS: usize = 1 << 16;
/// Entries of a bitmap table: bits that must be zero, the offset, and "all bits are set".
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View {
    /// Entries as they will be after a repair.
    pub(super) mended: bool,
    /// The refcount structures, too.
    pub(super) refcounts: bool,
}

impl View {
    pub(super) const AS_IS: Self = Self { mended: false, refcounts: true };
    pub(super) const MENDED: Self = Self { mended: true, refcounts: true };
    /// What new refcount structures must count beside themselves.
    pub(super) const FOR_REBUILD: Self = Self { mended: true, refcounts: false };
}

/// How often an L2 table is referred to.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableUse {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By any.
    pub(super) total: u64,
    /// The first guest offset that it maps, for the first entry that leads to it.
    pub(super) guest: u64,
}

/// L2 tables by offset, from one offset up to another.
pub(super) struct Tables {
    pub(super) found: BTreeMap<u64, TableUse>,
    until: u64,
    most: usize,
}

impl Tables {
    fn new(budget: usize) -> Self {
        let most = (budget / 4 / TABLE_COST).max(16);
        Self { found: BTreeMap::new(), until: u64::MAX, most }
    }

    fn add(&mut self, at: u64, active: bool, guest: u64) {
        if at >= self.until {
            return;
        }
        let table = self.found.entry(at).or_insert(TableUse { active: 0, total: 0, guest });
        if active && table.active == 0 {
            table.guest = guest;
        }
        table.active += u64::from(active);
        table.total += 1;
        if self.found.len() > self.most
            && let Some((last, _)) = self.found.pop_last()
        {
            self.until = last;
        }
    }
}

/// Neighbouring clusters of guest data whose entries say the same: most entries of most tables.
#[derive(Debug, Default)]
struct DataRun {
    clusters: Range<u64>,
    copied: bool,
}

impl DataRun {
    fn of(cluster: u64, copied: bool) -> Self {
        Self { clusters: cluster..cluster.saturating_add(1), copied }
    }

    /// Adds a cluster if it is the next one.
    fn takes(&mut self, cluster: u64, copied: bool) -> bool {
        let next = !self.clusters.is_empty() && self.clusters.end == cluster;
        if !next || self.copied != copied {
            return false;
        }
        self.clusters.end = cluster.saturating_add(1);
        true
    }
}

/// A walk in progress.
pub(super) struct Walk<'w, 'a> {
    target: &'w Target<'a>,
    view: View,
    references: &'w mut References,
    /// Entries that may still be looked at.
    left: u64,
}

impl<'w, 'a> Walk<'w, 'a> {
    pub(super) fn new(target: &'w Target<'a>, view: View, references: &'w mut References) -> Self {
        Self { target, view, references, left: MOST_ENTRIES }
    }

    /// Counts for a repair: everything must be readable.
    ///
    /// # Errors
    /// What the host answered.
    pub(super) async fn count(mut self) -> Result<()> {
        self.run(&mut None).await
    }

    /// Counts, and writes down what is wrong with entries if this walk is the `first`. What cannot
    /// be read is counted.
    ///
    /// # Errors
    /// When the image has more tables than can be looked at.
    pub(super) async fn survey(mut self, survey: &mut Survey, first: bool) -> Result<()> {
        if first {
            return self.run(&mut Some(survey)).await;
        }
        let mut quiet = Survey::new(Report::default(), false);
        self.run(&mut Some(&mut quiet)).await
    }

    async fn run(&mut self, notes: &mut Option<&mut Survey>) -> Result<()> {
        self.header_tables(notes);
        if let Some(directory) = self.target.directory {
            self.bitmaps(directory, notes).await?;
        }
        let mut from = 0;
        loop {
            let mut tables = Tables::new(self.references.budget());
            for root in &self.target.roots {
                self.root(*root, from, &mut tables, notes).await?;
            }
            let places: Vec<u64> = tables.found.keys().copied().collect();
            for (group, places) in places.chunks(self.target.ahead()).enumerate() {
                self.target.tell(group * self.target.ahead(), tables.found.len());
                let read = self.target.read_clusters(Purpose::L2Load, places).await;
                for (at, bytes) in places.iter().zip(read) {
                    match (bytes, notes.as_deref_mut()) {
                        (Ok(bytes), _) => self.table(*at, &bytes, tables.found[at], notes),
                        (Err(error), None) => return Err(error),
                        (Err(error), Some(survey)) => survey.report.failed(&error),
                    }
                }
            }
            if tables.until == u64::MAX {
                return Ok(());
            }
            from = tables.until;
        }
    }

    fn spend(&mut self, entries: u64) -> Result<()> {
        self.left = self.left.checked_sub(entries).ok_or_else(|| {
            let why = "its L1 and bitmap tables have more entries together than are looked at";
            Error::unsupported(self.target.name.as_str(), why)
        })?;
        Ok(())
    }

    /// Counts `times` references to every cluster of a range.
    fn refer(&mut self, at: u64, len: u64, kind: Use, times: u64) {
        let bits = self.target.rules.cluster_bits;
        let last = at.saturating_add(len.saturating_sub(1)) >> bits;
        for cluster in at >> bits..=last {
            self.references.refer(cluster, kind, times);
        }
    }

    /// Refers to a table that must be inside the file.
    fn refer_table(
        &mut self,
        what: &str,
        at: u64,
        len: u64,
        notes: &mut Option<&mut Survey>,
    ) -> bool {
        if len == 0 {
            return false;
        }
        if self.target.rules.cuts(at, len) {
            if let Some(survey) = notes {
                let what = || format!("the {what} at {at:#x} lies beyond the end of the file");
                survey.report.corrupt(1, what);
            }
            return false;
        }
        self.refer(at, len, Use::SOLE, 1);
        true
    }

    fn header_tables(&mut self, notes: &mut Option<&mut Survey>) {
        self.refer(0, 1, Use::SOLE, 1);
        for root in &self.target.roots {
            let what = if root.active { "L1 table" } else { "L1 table of a snapshot" };
            self.refer_table(what, root.at, root.entries * 8, notes);
        }
        let table = &self.target.snapshot_table;
        self.refer_table("snapshot table", table.start, table.end - table.start, notes);
        if !self.view.refcounts {
            return;
        }
        if let Some(table) = &self.target.reftable {
            self.refer(table.start, table.end - table.start, Use::SOLE, 1);
        }
        for &at in &self.target.block_places {
            self.refer(at, 1, Use::BLOCK, 1);
        }
    }

    /// Looks at an L1 table: counts its L2 tables in the first round, and lists those from an
    /// offset on.
    async fn root(
        &mut self,
        root: Root,
        from: u64,
        tables: &mut Tables,
        notes: &mut Option<&mut Survey>,
    ) -> Result<()> {
        if self.target.rules.cuts(root.at, root.entries * 8) {
            // Nothing is known of what it led to, so nothing may be given back.
            if let Some(survey) = notes.as_deref_mut().filter(|_| from == 0) {
                let (table, offset) = ("L1 table", root.at);
                let file_len = self.target.rules.length;
                let kind = CorruptKind::TableBeyondEnd { table, offset, file_len };
                survey.report.failed(&Error::corrupt("counting references", kind));
            }
            return Ok(());
        }
        let coverage = self.target.header.geometry.l2_coverage();
        let mut index = 0;
        while index < root.entries {
            let count = (root.entries - index).min(CHUNK / 8);
            self.spend(count)?;
            let read = self.target.read(Purpose::L1Load, root.at + index * 8, count * 8).await;
            let Some(bytes) = noted(read, notes)? else { return Ok(()) };
            for (step, word) in (0..).zip(words(&bytes)).filter(|(_, word)| *word != 0) {
                let guest = (index + step).saturating_mul(coverage);
                self.l1_entry(word, guest, root.active, from, tables, notes);
            }
            index += count;
        }
        Ok(())
    }

    fn l1_entry(
        &mut self,
        word: u64,
        guest: u64,
        active: bool,
        from: u64,
        tables: &mut Tables,
        notes: &mut Option<&mut Survey>,
    ) {
        let rules = &self.target.rules;
        let word = if self.view.mended { rules.mend_l1(word, guest).entry } else { word };
        let reading = rules.read_l1(word);
        if from == 0 {
            if let Some(survey) = notes {
                let (wrong, why) = (reading.wrong, reading.why);
                survey.report.corrupt(wrong, || {
                    format!("L1 entry of guest offset {guest:#x} ({word:#x}): {why}")
                });
            }
            if let Some((at, copied)) = reading.points.filter(|_| active) {
                self.references.point(at >> self.target.rules.cluster_bits, copied, 1);
            }
            if let Some((at, len)) = reading.refers {
                // An entry that a repair would remove makes no table of what it points to.
                let stays = self.target.rules.mend_l1(word, guest).entry != 0;
                self.refer(at, len, if stays { Use::L2 } else { Use::DATA }, 1);
            }
        }
        if let Some((at, _)) = reading.refers.filter(|(at, _)| *at >= from) {
            tables.add(at, active, guest);
        }
    }

    /// Looks at the entries of an L2 table.
    fn table(&mut self, at: u64, bytes: &[u8], table: TableUse, notes: &mut Option<&mut Survey>) {
        let cluster = self.target.cluster_size();
        let size = self.target.entry_size();
        let (mut entries, mut bad) = (0_u64, 0_u64);
        let (mut expected, mut run) = (None, DataRun::default());
        for (step, entry) in (0_u64..).zip(bytes.chunks_exact(size)) {
            let mut halves = words(entry);
            let word = halves.next().unwrap_or_default();
            let entry = Entry { word, bitmap: halves.next().unwrap_or_default() };
            if entry == (Entry { word: 0, bitmap: 0 }) {
                continue;
            }
            let guest = table.guest.saturating_add(step * cluster);
            let rules = &self.target.rules;
            let entry = if self.view.mended { rules.mend(entry, guest).entry } else { entry };
            let reading = rules.read(entry, guest);
            entries += 1;
            bad += u64::from(reading.wrong > 0);
            if let Some(survey) = notes {
                let report = &mut survey.report;
                let wrong = reading.wrong.saturating_mul(table.total);
                report.corrupt(wrong, || {
                    let why = reading.why;
                    format!("L2 entry of guest offset {guest:#x} ({:#x}): {why}", entry.word)
                });
                statistics(report, &reading, table, &mut expected, cluster);
            }
            self.entry(&reading, table, &mut run);
        }
        self.count_run(run, table);
        if let Some(survey) = notes
            && self.target.rules.data_file
            && (table.active > 1 || bad * 2 > entries)
        {
            self.owner(at, bytes, table, survey);
        }
        // A table without entries may be anything.
        if let Some(survey) = notes
            && (bad * 2 > entries || entries == 0)
            && survey.suspects.len() < MOST_SUSPECTS
        {
            survey.suspects.insert(at);
        }
    }

    /// Finds the only guest offset that an L2 table of a data file can map: most of its entries
    /// point to where they would be then.
    fn owner(&self, at: u64, bytes: &[u8], table: TableUse, survey: &mut Survey) {
        survey.report.corrupt(table.active.saturating_sub(1), || {
            format!("the L2 table at {at:#x} maps several places of a data file")
        });
        let (mut owner, mut votes) = (table.guest, 0_u64);
        let entries = bytes.chunks_exact(self.target.entry_size());
        for (step, word) in (0_u64..).zip(entries).filter_map(|(step, entry)| {
            let place = words(entry).next()? & OFFSET_MASK;
            Some((step, place)).filter(|_| place != 0)
        }) {
            let implied = word.checked_sub(step * self.target.cluster_size());
            votes = match implied {
                Some(implied) if implied == owner => votes + 1,
                Some(implied) if votes == 0 => {
                    owner = implied;
                    1
                }
                _ => votes.saturating_sub(1),
            };
        }
        if survey.owners.len() < MOST_SUSPECTS {
            survey.owners.insert(at, owner);
        }
    }

    fn entry(&mut self, reading: &Reading, table: TableUse, run: &mut DataRun) {
        let bits = self.target.rules.cluster_bits;
        if let (Some((at, len)), Some((place, copied))) = (reading.refers, reading.points)
            && at == place
            && at.trailing_zeros() >= bits
            && len == self.target.cluster_size()
        {
            if !run.takes(at >> bits, copied) {
                let before = std::mem::replace(run, DataRun::of(at >> bits, copied));
                self.count_run(before, table);
            }
            return;
        }
        if let Some((at, len)) = reading.refers {
            self.refer(at, len, Use::DATA, table.total);
        }
        if table.active > 0
            && let Some((at, copied)) = reading.points
        {
            self.references.point(at >> bits, copied, table.active);
        }
    }

    fn count_run(&mut self, run: DataRun, table: TableUse) {
        self.references.refer_run(run.clusters, table.total, (run.copied, table.active));
    }

    /// Counts what the bitmaps have ("Bitmaps" in the specification).
    async fn bitmaps(
        &mut self,
        directory: Directory,
        notes: &mut Option<&mut Survey>,
    ) -> Result<()> {
        self.refer_table("bitmap directory", directory.at, directory.len, notes);
        let read = self.target.read(Purpose::HeaderRead, directory.at, directory.len).await;
        let Some(bytes) = noted(read, notes)? else { return Ok(()) };
        let mut at = 0_usize;
        for number in 0..directory.count {
            let entry = bytes.get(at..).unwrap_or_default();
            let place = be64(entry, 0).zip(be32(entry, 8));
            let sizes = be16(entry, 18).zip(be32(entry, 20));
            let Some(((table, entries), (name, extra))) = place.zip(sizes) else {
                bitmaps_broken(notes, || format!("bitmap {number} lies behind the directory"));
                return Ok(());
            };
            self.bitmap(number, table, u64::from(entries), notes).await?;
            let len = 24 + u64::from(name) + u64::from(extra);
            at = at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX / 2));
            at = at.next_multiple_of(8);
        }
        if at != bytes.len() {
            // Whoever goes by its length finds other bitmaps there than whoever counts.
            let count = directory.count;
            bitmaps_broken(notes, || format!("the bitmap directory does not end behind {count}"));
        }
        Ok(())
    }

    async fn bitmap(
        &mut self,
        number: u32,
        table: u64,
        entries: u64,
        notes: &mut Option<&mut Survey>,
    ) -> Result<()> {
        let cluster = self.target.cluster_size();
        let beyond = self.target.rules.cuts(table, entries * 8);
        if beyond || table & (cluster - 1) != 0 {
            bitmaps_broken(notes, || format!("the table of bitmap {number} cannot be used"));
            return Ok(());
        }
        self.refer_table("bitmap table", table, entries * 8, notes);
        let mut index = 0;
        while index < entries {
            let count = (entries - index).min(CHUNK / 8);
            self.spend(count)?;
            let read = self.target.read(Purpose::HeaderRead, table + index * 8, count * 8).await;
            let Some(bytes) = noted(read, notes)? else { return Ok(()) };
            for word in words(&bytes).filter(|word| *word != 0) {
                let at = word & BITMAP_OFFSET;
                let unaligned = at & (cluster - 1) != 0 || (at != 0 && word & 1 != 0);
                if unaligned || word & BITMAP_RESERVED != 0 || self.target.rules.cuts(at, cluster) {
                    bitmaps_broken(notes, || format!("bitmap {number} has an entry {word:#x}"));
                } else if at != 0 {
                    self.refer(at, cluster, Use::SOLE, 1);
                }
            }
            index += count;
        }
        Ok(())
    }
}

/// What was read; `None` when that failed and was counted.
fn noted(read: Result<Vec<u8>>, notes: &mut Option<&mut Survey>) -> Result<Option<Vec<u8>>> {
    match (read, notes.as_deref_mut()) {
        (Ok(bytes), _) => Ok(Some(bytes)),
        (Err(error), None) => Err(error),
        (Err(error), Some(survey)) => {
            survey.report.failed(&error);
            Ok(None)
        }
    }
}

fn bitmaps_broken(notes: &mut Option<&mut Survey>, what: impl FnOnce() -> String) {
    if let Some(survey) = notes {
        survey.report.bitmaps_broken = true;
        survey.report.corrupt(1, what);
    }
}

/// Counts what the guest's disk has, once for each L1 entry that leads here.
fn statistics(
    report: &mut Report,
    reading: &Reading,
    table: TableUse,
    expected: &mut Option<u64>,
    cluster: u64,
) {
    if table.active == 0 || reading.mapped == Mapped::Nothing {
        return;
    }
    report.allocated_clusters += table.active;
    match reading.mapped {
        Mapped::Plain(at) => {
            let apart = expected.is_some_and(|expected| expected != at);
            report.fragmented_clusters += if apart { table.active } else { 0 };
            *expected = Some(at.saturating_add(cluster));
        }
        _ => {
            // Compressed clusters lie at sectors of their own: a run of them is never one read.
            report.compressed_clusters += table.active;
            report.fragmented_clusters += table.active;
        }
    }
}
