//! Checking an image that nobody else uses, and repairing it.
//!
//! A check walks every table once, counts the references to each host cluster, and compares them
//! with the refcounts: `target` is the image and what its header names, `entries` reads one entry
//! of a table, `walk` goes through all of them, `references` counts in bounded memory, `blocks`
//! compares with the refcounts, `mend` and `rebuild` change what is wrong; `counted` says
//! whether refcounts can be relied on.
//!
//! What is counted follows `qemu-img check`: a cluster whose refcount is too high is one leak, one
//! whose refcount is too low is one corruption, and so is each entry with a wrong COPIED flag and
//! each thing that is wrong with an entry. Beyond what that tool looks at, these are corruptions
//! here: metadata with a second use although its refcount is two, a zero flag where the version or
//! the kind of L2 entries has none, and a cluster of an external data file at another offset than
//! the guest's. Counts of clusters behind the end of the file are told apart, since that tool does
//! not see them.
//!
//! # Memory and time
//!
//! At most [`MEMORY`] bytes and a few clusters are taken for counts, whatever the image says; two
//! bytes for each cluster of a densely used file, so that 8 TiB with clusters of 64 KiB are counted
//! in one walk. Beside that there are the refcount table (at most 8 MiB), the list of snapshots,
//! and pieces of tables of a few MiB. A larger file is done in windows, one walk over the tables
//! for each. There is no bound on the number of clusters. Each L2 table is read once in a walk,
//! however many L1 entries lead to it, and in the order of the file.
//!
//! # The order of a repair
//!
//! 1. Refcounts that are too low are raised, in place or in new refcount structures at the end of
//!    the file; then a sync (R1, R4, R5 of `ORDERING.md`).
//! 2. Entries that cannot be right are removed, and COPIED is cleared where it is not true; sync.
//! 3. Refcounts that are too high are lowered; sync (R6).
//! 4. COPIED is set where it is true; sync.
//! 5. When a second check finds nothing, the dirty and corrupt bits are cleared; sync.
//!
//! A crash in between leaves an image that the same repair finishes. A repair of leaks is step 3,
//! and step 4 where nothing else is wrong but flags.

mod blocks;
mod counted;
mod entries;
mod mend;
mod rebuild;
mod references;
mod target;
mod walk;

use std::collections::{BTreeMap, BTreeSet};

pub(super) use counted::{Counted, counted, referred};
pub(super) use references::{References, Use};

use crate::error::{Error, Result};
use crate::qcow2::bitmap::distrust;
use crate::qcow2::check::mend::Stage;
use crate::qcow2::check::target::Target;
use crate::qcow2::check::walk::{View, Walk};
use crate::qcow2::format::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY,
};
use crate::qcow2::mark;
use crate::storage::{FileId, Purpose, Storage};

/// Most bytes that counts of references take.
pub const MEMORY: usize = 256 << 20;
/// Findings beyond that are counted and not kept.
const MOST_FINDINGS: usize = 100;

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Everything that can be repaired. What cannot be right is removed, which may lose data of
    /// the guest that could not be read any more; each loss is told.
    All,
}

/// What a check has found; after a repair, what is left, and what was repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Contradictions: refcounts that are too low, wrong flags, entries that cannot be right.
    pub corruptions: u64,
    /// Clusters of the file whose refcount is too high.
    pub leaks: u64,
    /// Clusters behind the end of the file that have a refcount.
    pub leaks_beyond_end: u64,
    /// What could not be looked at. Nothing is given back while there is such a thing.
    pub check_errors: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Guest clusters, and whole L2 tables, that the repair had to give up.
    pub losses: u64,
    /// The end in bytes of the last cluster that is in use.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Clusters of the guest's disk that have a host cluster.
    pub allocated_clusters: u64,
    /// Those of them that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// What was found and done, in words; the first hundred of each check, and of the repair.
    pub findings: Vec<String>,
    /// How many more findings there were.
    pub more_findings: u64,
    /// The bitmaps contradict themselves.
    bitmaps_broken: bool,
}

impl Report {
    /// Whether there is nothing wrong.
    pub fn is_clean(&self) -> bool {
        self.is_consistent() && self.leaks == 0 && self.leaks_beyond_end == 0
    }

    /// Whether there is nothing wrong but leaks.
    pub fn is_consistent(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(what());
        } else {
            self.more_findings += 1;
        }
    }

    fn corrupt(&mut self, count: u64, what: impl FnOnce() -> String) {
        if count > 0 {
            self.corruptions = self.corruptions.saturating_add(count);
            self.note(what);
        }
    }

    fn failed(&mut self, error: &Error) {
        self.check_errors += 1;
        self.note(|| error.to_string());
    }
}

/// What one check has found, for the repair that may follow.
struct Survey {
    report: Report,
    /// The refcount structures cannot be repaired in place.
    rebuild: bool,
    /// L2 tables most of whose entries are wrong.
    suspects: BTreeSet<u64>,
    /// Those of them that something else uses too.
    condemned: BTreeSet<u64>,
    /// Other L2 tables that entries take for data.
    overlapped: BTreeSet<u64>,
    /// L2 tables of a data file that are in the wrong place, and the right one.
    owners: BTreeMap<u64, u64>,
    /// What refcounts are worth.
    counted: Counted,
    /// How many of the corruptions are COPIED flags that are wrong, or missing.
    flags: u64,
}

impl Survey {
    fn new(report: Report, rebuild: bool) -> Self {
        Self {
            report,
            rebuild,
            suspects: BTreeSet::new(),
            condemned: BTreeSet::new(),
            overlapped: BTreeSet::new(),
            owners: BTreeMap::new(),
            counted: Counted::default(),
            flags: 0,
        }
    }

    /// Tells what was decided to those who read entries.
    fn instruct(&self, target: &mut Target<'_>, former: &BTreeSet<u64>) {
        target.rules.former.clone_from(former);
        target.rules.condemned.clone_from(&self.condemned);
        target.rules.overlapped.clone_from(&self.overlapped);
        target.rules.owners.clone_from(&self.owners);
    }
}

/// Checks the image in `file`, and repairs what `repair` allows. Nobody else may use the image,
/// and its data file need not be open.
///
/// # Errors
/// When the header cannot be used, or a repair cannot be written; what was done up to then has left
/// the image no worse. What a check alone cannot read is counted in the report.
pub async fn check(st: &dyn Storage, name: &str, file: FileId, repair: Repair) -> Result<Report> {
    check_within(st, name, file, repair, MEMORY).await
}

/// Told how many bytes of how many of an image's L2 tables were looked at. A repair looks at them
/// several times, and tells of each time.
pub type Told<'a> = dyn Fn(u64, u64) + 'a;

/// As [`check`]; `progress` is told how far it is.
///
/// # Errors
/// As [`check`].
pub async fn check_told(
    st: &dyn Storage,
    name: &str,
    file: FileId,
    repair: Repair,
    progress: &Told<'_>,
) -> Result<Report> {
    let target = Target::load(st, name, file).await?;
    check_target(Target { progress: Some(progress), ..target }, repair, MEMORY).await
}

/// Gives the image in `file` refcounts of `1 << order` bits, 0 to 6. Nobody else may use it. New
/// refcount structures are written first, and the header names them and their width by one write
/// (R5 of `ORDERING.md`); the old ones are free then. `progress` is told how far it is.
///
/// # Errors
/// `Refused` when anything is wrong with the image, leaks included, and when some cluster is
/// referred to more often than such a refcount can say; when the host cannot write.
pub async fn widen_refcounts(
    st: &dyn Storage,
    name: &str,
    file: FileId,
    order: u32,
    progress: &Told<'_>,
) -> Result<()> {
    let target = Target::load(st, name, file).await?;
    let mut target = Target { progress: Some(progress), ..target };
    let marked = target.header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT) != 0;
    if marked || !survey(&target, MEMORY).await?.report.is_clean() {
        let why = "refcounts that are not right are not copied; repair it first (check -r all)";
        return Err(Error::refused(name, why));
    }
    if target.header.geometry.refcount_order == order {
        return Ok(());
    }
    if target.header.version < 3 || order > 6 {
        let why = "refcounts have 16 bits in version 2 (compat=0.10), and 1 to 64 in version 3";
        return Err(Error::refused(name, why));
    }
    prepare(&target).await?;
    rebuild::widen(&mut target, MEMORY, order).await
}

/// As [`check`], with another bound in bytes for the counts of references.
///
/// # Errors
/// As [`check`].
pub async fn check_within(
    st: &dyn Storage,
    name: &str,
    file: FileId,
    repair: Repair,
    memory: usize,
) -> Result<Report> {
    check_target(Target::load(st, name, file).await?, repair, memory).await
}

async fn check_target(target: Target<'_>, repair: Repair, memory: usize) -> Result<Report> {
    let (st, file, name) = (target.st, target.file, target.name.clone());
    let progress = target.progress;
    let before = survey(&target, memory).await?;
    if repair == Repair::None {
        return Ok(before.report);
    }
    let marked = target.header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT) != 0;
    let mut report = before.report.clone();
    if !report.is_clean() {
        let mut notes = Report::default();
        let done = match repair {
            Repair::All => repair_all(target, before, memory, &mut notes).await?,
            _ => repair_leaks(&target, &before, memory, &mut notes).await?,
        };
        if done {
            let now = Target { progress, ..Target::load(st, &name, file).await? };
            let after = survey(&now, memory).await?.report;
            report = compared(report, after);
        }
        report.losses = notes.losses;
        // However much was found: what was done is told.
        report.findings.append(&mut notes.findings);
        report.more_findings += notes.more_findings;
    }
    if marked && report.is_consistent() {
        mark::change(st, file, 0, INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT).await?;
    }
    Ok(report)
}

/// What is left, and what is not.
fn compared(before: Report, after: Report) -> Report {
    let mut report = Report {
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        findings: before.findings,
        more_findings: before.more_findings + after.more_findings,
        ..after
    };
    let left = after.findings.into_iter().map(|finding| format!("after the repair: {finding}"));
    report.findings.extend(left);
    report
}

/// Looks at everything and changes nothing.
async fn survey(target: &Target<'_>, memory: usize) -> Result<Survey> {
    let mut survey = Survey::new(target.report.clone(), target.rebuild);
    let disk = target.header.size.div_ceil(512).saturating_mul(512);
    survey.report.total_clusters = disk.div_ceil(target.cluster_size());
    let mut first = 0;
    while first < u64::MAX {
        let mut references = References::new(first, memory);
        let walk = Walk::new(target, View::AS_IS, &mut references);
        walk.survey(&mut survey, first == 0).await?;
        blocks::compare(target, &references, &mut survey).await;
        first = references.window().end;
    }
    Ok(survey)
}

/// Lowers refcounts that are too high, if all references are known, and sets the flags that say so.
async fn repair_leaks(
    target: &Target<'_>,
    before: &Survey,
    memory: usize,
    notes: &mut Report,
) -> Result<bool> {
    let unknown = before.report.check_errors > 0 || before.report.bitmaps_broken;
    if unknown || before.rebuild {
        notes.note(|| {
            "leaks are not repaired, because the tables contradict themselves too much to know \
             what is in use; repair everything"
                .to_owned()
        });
        return Ok(false);
    }
    prepare(target).await?;
    // Where nothing but leaks and flags is wrong, all references are known: the flags are what a
    // refcount of one asks for after it, or after a repair that was killed before it set them.
    let flags = before.report.corruptions == before.flags;
    let stages = if flags { &[Stage::Lower, Stage::Set][..] } else { &[Stage::Lower] };
    each_window(target, View::AS_IS, memory, stages, notes).await?;
    Ok(true)
}

/// Repairs everything that can be.
async fn repair_all(
    mut target: Target<'_>,
    before: Survey,
    memory: usize,
    notes: &mut Report,
) -> Result<bool> {
    if before.report.check_errors > 0 {
        notes.note(|| {
            "nothing is repaired, because not everything could be looked at; copy what can be \
             read to a new image with qemu-img convert"
                .to_owned()
        });
        return Ok(false);
    }
    prepare(&target).await?;
    if before.report.bitmaps_broken {
        mark::clear_autoclear(target.st, target.file, AUTOCLEAR_BITMAPS).await?;
        notes.note(|| "the bitmaps contradict themselves and are given up".to_owned());
        notes.losses += 1;
        target = target.reload().await?;
    }
    let places = target.block_places.iter().copied().filter(|_| before.rebuild);
    let former = places.collect();
    before.instruct(&mut target, &former);
    if mend::changes_content(&target).await? && distrust_bitmaps(&target, notes).await? {
        target = target.reload().await?;
        before.instruct(&mut target, &former);
    }
    let stages = if before.rebuild {
        rebuild::rebuild(&target, memory).await?;
        target = target.reload().await?;
        before.instruct(&mut target, &former);
        notes.note(|| "the refcount structures were made anew".to_owned());
        [Stage::Clear, Stage::Lower, Stage::Set].as_slice()
    } else {
        [Stage::Raise, Stage::Clear, Stage::Lower, Stage::Set].as_slice()
    };
    each_window(&target, View::MENDED, memory, stages, notes).await?;
    Ok(true)
}

/// Makes sure that nobody trusts a bitmap which misses what the repair takes from the guest (R10);
/// says whether the image has none any more.
async fn distrust_bitmaps(target: &Target<'_>, notes: &mut Report) -> Result<bool> {
    if target.directory.is_none() {
        return Ok(false);
    }
    let marked = distrust(target.st, target.file, &target.header).await?;
    if marked {
        notes.note(|| "enabled bitmaps miss the repair and are inconsistent now".to_owned());
    } else {
        mark::clear_autoclear(target.st, target.file, AUTOCLEAR_BITMAPS).await?;
        notes.note(|| "the bitmaps contradict themselves and are given up".to_owned());
        notes.losses += 1;
    }
    Ok(!marked)
}

/// Clears the autoclear bits of what our writes may make stale (R10). Bitmaps stay: as long as what
/// the guest can read is not changed, they are true.
async fn prepare(target: &Target<'_>) -> Result<()> {
    let stale = target.header.autoclear & !(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA);
    if target.header.version > 2 && stale != 0 {
        mark::clear_autoclear(target.st, target.file, stale).await?;
    }
    Ok(())
}

/// Runs the stages one after the other over the whole file, with a sync after each.
async fn each_window(
    target: &Target<'_>,
    view: View,
    memory: usize,
    stages: &[Stage],
    notes: &mut Report,
) -> Result<()> {
    let mut whole = None;
    for stage in stages {
        let mut first = 0;
        while first < u64::MAX {
            let references = match whole.take() {
                Some(references) => references,
                None => {
                    let mut references = References::new(first, memory);
                    Walk::new(target, view, &mut references).count().await?;
                    references
                }
            };
            match stage {
                Stage::Raise => blocks::adjust(target, &references, true).await?,
                Stage::Lower => blocks::adjust(target, &references, false).await?,
                Stage::Clear | Stage::Set => {
                    mend::entries(target, &references, *stage, (first == 0).then_some(&mut *notes))
                        .await?;
                }
            }
            first = references.window().end;
            whole = Some(references).filter(References::is_whole);
        }
        target.sync(Purpose::SyncTables).await?;
    }
    Ok(())
}
