//! Entries of L1 and L2 tables: removed where they cannot be right, and their COPIED flags.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::qcow2::check::Report;
use crate::qcow2::check::entries::{Entry, Mended};
use crate::qcow2::check::references::References;
use crate::qcow2::check::target::{Root, Target, words};
use crate::qcow2::format::{COMPRESSED, COPIED, OFFSET_MASK};
use crate::storage::Purpose;

/// Bytes of an L1 table that are read at once.
const CHUNK: u64 = 1 << 20;
/// L2 tables that are gone through together; bounds the list of them.
const BATCH: usize = 1 << 16;

/// What is said of bytes that are kept.
const DOUBTFUL: &str = "lies where a refcount block was, and may be damaged";

/// A step of a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Refcounts that are too low are raised.
    Raise,
    /// Entries that cannot be right are removed, COPIED is cleared where it is not true.
    Clear,
    /// Refcounts that are too high are lowered.
    Lower,
    /// COPIED is set where it is true.
    Set,
}

/// Changes the entries that point into the window of `references`, and those that cannot be right.
/// What is lost is told in `notes`.
///
/// # Errors
/// When the host cannot read or write.
pub(super) async fn entries(
    target: &Target<'_>,
    references: &References,
    stage: Stage,
    notes: Option<&mut Report>,
) -> Result<()> {
    let mut mender = Mender { target, references, stage, notes, looks: false, changes: false };
    mender.run().await
}

/// Whether removing what cannot be right will change what the guest reads, or leave it bytes that
/// may not be its own.
///
/// # Errors
/// When the host cannot read.
pub(super) async fn changes_content(target: &Target<'_>) -> Result<bool> {
    let references = &References::new(0, 0);
    let (stage, notes) = (Stage::Clear, None);
    let mut mender = Mender { target, references, stage, notes, looks: true, changes: false };
    mender.run().await?;
    Ok(mender.changes)
}

struct Mender<'m, 'a> {
    target: &'m Target<'a>,
    references: &'m References,
    stage: Stage,
    notes: Option<&'m mut Report>,
    /// Nothing is written.
    looks: bool,
    /// What the guest reads was, or would be, changed.
    changes: bool,
}

impl Mender<'_, '_> {
    async fn run(&mut self) -> Result<()> {
        for root in &self.target.roots {
            if !self.target.rules.cuts(root.at, root.entries * 8) {
                self.root(*root).await?;
            }
        }
        self.tables().await
    }

    /// Whether it is known already what is wanted.
    fn is_done(&self) -> bool {
        self.looks && self.changes
    }

    /// Writes what has changed, if anything shall be.
    async fn write(&self, why: Purpose, at: u64, old: &[u8], new: &[u8]) -> Result<()> {
        if self.looks { Ok(()) } else { self.target.write_changes(why, at, old, new).await }
    }

    /// Whether an entry of an active table shall say COPIED, which says `copied` now.
    fn flag(&self, at: u64, copied: bool) -> bool {
        let cluster = at >> self.target.rules.cluster_bits;
        if !self.references.window().contains(&cluster) {
            return copied;
        }
        let alone = self.references.get(cluster).references == 1;
        alone && (copied || self.stage == Stage::Set)
    }

    fn lost(&mut self, is: bool, what: impl FnOnce() -> String) {
        self.changes |= is;
        if let Some(notes) = self.notes.as_deref_mut().filter(|_| is) {
            notes.losses += 1;
            notes.note(what);
        }
    }

    async fn root(&mut self, root: Root) -> Result<()> {
        let coverage = self.target.header.geometry.l2_coverage();
        let mut index = 0;
        while index < root.entries && !self.is_done() {
            let count = (root.entries - index).min(CHUNK / 8);
            let at = root.at + index * 8;
            let old = self.target.read(Purpose::L1Load, at, count * 8).await?;
            let mut new = Vec::with_capacity(old.len());
            for (step, word) in (0..).zip(words(&old)) {
                let guest = (index + step).saturating_mul(coverage);
                let Mended { mut entry, lost } = self.target.rules.mend_l1(word, guest);
                let place = entry & OFFSET_MASK;
                if root.active && place != 0 {
                    let copied = self.flag(place, entry & COPIED != 0);
                    entry = place | if copied { COPIED } else { 0 };
                }
                let doubtful =
                    self.stage == Stage::Clear && self.target.rules.former.contains(&place);
                self.lost(lost || doubtful, || {
                    let whose = if root.active { "" } else { " of a snapshot" };
                    let what = if lost { "is given up" } else { DOUBTFUL };
                    format!("the L2 table of guest offset {guest:#x}{whose} {what}")
                });
                new.extend(entry.to_be_bytes());
            }
            self.write(Purpose::L1Write, at, &old, &new).await?;
            index += count;
        }
        Ok(())
    }

    /// Goes through the L2 tables in the order of the L1 tables, each one once as far as a list of
    /// bounded length can tell; a second time changes nothing more.
    async fn tables(&mut self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for root in &self.target.roots {
            if self.target.rules.cuts(root.at, root.entries * 8) {
                continue;
            }
            let coverage = self.target.header.geometry.l2_coverage();
            let mut index = 0;
            while index < root.entries {
                let count = (root.entries - index).min(CHUNK / 8);
                let at = root.at + index * 8;
                let bytes = self.target.read(Purpose::L1Load, at, count * 8).await?;
                for (step, word) in (0..).zip(words(&bytes)) {
                    let guest = (index + step).saturating_mul(coverage);
                    let place = self.target.rules.mend_l1(word, guest).entry & OFFSET_MASK;
                    if place != 0 && !self.is_done() && seen.insert(place) {
                        self.table(place, guest, root.active).await?;
                    }
                    if seen.len() >= BATCH {
                        seen.clear();
                    }
                }
                index += count;
            }
        }
        Ok(())
    }

    async fn table(&mut self, at: u64, guest: u64, active: bool) -> Result<()> {
        let cluster = self.target.cluster_size();
        let old = self.target.read(Purpose::L2Load, at, cluster).await?;
        if old.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let mut new = Vec::with_capacity(old.len());
        for (step, bytes) in (0_u64..).zip(old.chunks_exact(self.target.entry_size())) {
            let mut halves = words(bytes);
            let word = halves.next().unwrap_or_default();
            let before = Entry { word, bitmap: halves.next().unwrap_or_default() };
            let guest = guest.saturating_add(step * cluster);
            let Mended { mut entry, lost } = self.target.rules.mend(before, guest);
            let place = entry.word & OFFSET_MASK;
            let plain = entry.word & COMPRESSED == 0 && !self.target.rules.data_file;
            if active && plain && place != 0 {
                let copied = self.flag(place, entry.word & COPIED != 0);
                entry.word = entry.word & !COPIED | if copied { COPIED } else { 0 };
            }
            let doubtful = self.stage == Stage::Clear && self.target.rules.is_doubtful(entry);
            self.lost(lost || doubtful, || {
                let what = if lost { "is given up" } else { DOUBTFUL };
                format!("the cluster of guest offset {guest:#x} {what}")
            });
            // In a data file it is found at another place than before.
            let moved = (before.word ^ entry.word) & OFFSET_MASK != 0;
            self.changes |= self.target.rules.data_file && moved;
            new.extend(entry.word.to_be_bytes());
            if self.target.entry_size() == 16 {
                new.extend(entry.bitmap.to_be_bytes());
            }
        }
        self.write(Purpose::L2Write, at, &old, &new).await
    }
}
