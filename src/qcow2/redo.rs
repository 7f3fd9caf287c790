//! Making the changes of a process that died again, before anything is served.
//!
//! The records of a journal are checked against the image first; if they contradict it, or each
//! other, somebody has changed the image meanwhile, and nothing is done. Then every cluster that
//! shall be linked is counted before anything can be allocated, and each entry that the file does
//! not have yet is set in the way of a write. A process that dies in the middle leaves the journal
//! as it was, and the next one finds entries that the records know of.
//!
//! # What is found in the file
//!
//! The entry of a guest cluster is the old one of its first record, or the new one of some record
//! that a flush has written. The last record counts. A change to a compressed cluster is not made
//! again: its request was not answered, or a flush has written it. Then the last other change
//! counts, but nothing is taken back: what was unlinked durably may have been used again.
//!
//! # Refcounts
//!
//! A host cluster that is linked anew counts once. In the file its refcount is zero; or one, since
//! clusters are counted in batches and a flush may have come between; or what it was before it was
//! freed and handed out again, both in memory. Unless it is zero the cluster is ours if nothing in
//! the image refers to it, which a walk over all tables says. What is replaced still counts in the
//! file, because its unlinking was not durable.
//!
//! # What the predecessor had written
//!
//! The kernel has it, and no sync may have followed. So both files count as written from the start,
//! and the first flush syncs them before it writes any table.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::check;
use crate::qcow2::format::{COMPRESSED, COPIED, Cluster, L2Entry, OFFSET_MASK};
use crate::qcow2::geometry::{GuestCluster, HostCluster};
use crate::qcow2::journal::{self, Change, Identity, Journal, SharedWords};
use crate::qcow2::refcount::Run;
use crate::storage::Storage;
use crate::sync::{Arc, Ordering, lock};

/// The highest refcount that a cluster may have kept from before it was freed: more than one of the
/// largest clusters can hold compressed ones.
const MOST_COUNTS: u64 = 1 << 16;

/// One entry to be set.
struct Step {
    cluster: GuestCluster,
    entry: L2Entry,
    /// What the entry says, and what it said.
    new: Cluster,
    found: Cluster,
}

/// What is to be done.
#[derive(Default)]
struct Plan {
    steps: Vec<Step>,
    /// Host clusters that are linked anew, those of them that are not counted, and those that are
    /// counted too high, with the excess.
    links: BTreeSet<u64>,
    uncounted: Vec<u64>,
    overcounted: Vec<(u64, u64)>,
}

fn contradiction(why: impl std::fmt::Display) -> Error {
    let why = format!(
        "the image has changed since the process died that had served it ({why}); nothing was \
         changed. Reset or restart the guest to go on without what it had written last"
    );
    Error::refused("journal", why)
}

/// Whether two entries say the same, but for COPIED, which a repair may have set or cleared. The
/// first cluster of a data file is at offset 0, and there the flag alone says that it is in use.
fn same(one: L2Entry, other: L2Entry) -> bool {
    let flag = if one.word & OFFSET_MASK == 0 { 0 } else { COPIED };
    (one.word ^ other.word) & !flag == 0 && one.bitmap == other.bitmap
}

/// What the entry of a guest cluster shall be, when `found` is in the file: `None` when it is that
/// already.
fn wanted(changes: &[Change], found: L2Entry) -> Result<Option<L2Entry>> {
    let first = changes.first().map(|change| change.old);
    let values: Vec<L2Entry> =
        first.into_iter().chain(changes.iter().map(|change| change.new)).collect();
    let Some(place) = values.iter().rposition(|value| same(*value, found)) else {
        let why = "an entry is neither what it was nor what it became";
        return Err(contradiction(why));
    };
    let mut later = values.into_iter().skip(place + 1);
    Ok(later.rfind(|value| value.word & COMPRESSED == 0))
}

impl Qcow2 {
    /// The journal, if there is one.
    pub(super) fn journal(&self) -> Option<Arc<Journal>> {
        if !self.journaling.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.journal).clone()
    }

    fn journal_identity(&self) -> Identity {
        let rules = self.geometry.rules;
        let kind = u64::from(rules.data_file) << 1 | u64::from(rules.extended);
        let layout = u64::from(rules.version) << 16 | u64::from(rules.cluster_bits) << 8 | kind;
        [self.identity.0, self.identity.1, layout]
    }

    /// Makes the changes again that a predecessor has left in `words`, and notes those to come
    /// there. Nobody else uses the image meanwhile. Returns how many entries were set.
    ///
    /// # Errors
    /// When what is there contradicts the image or itself; then nothing was changed. When the host
    /// cannot read or write; then it may be tried again after the image was opened again.
    pub(crate) async fn attach_journal(
        &self,
        st: &dyn Storage,
        words: Arc<dyn SharedWords>,
    ) -> Result<usize> {
        if let Some(kept) = self.journal() {
            // It could not be let go, perhaps because the host does not write any more.
            if kept.is_in(&words) {
                return Ok(0);
            }
            self.detach_journal(st).await?;
        }
        self.check_poison()?;
        let left = journal::read(&*words, self.journal_identity())?;
        self.distrust_syncs();
        let count = match left.changes.as_slice() {
            [] => 0,
            changes => self.redo(st, changes).await?,
        };
        self.flush(st).await?;
        let journal = Journal::begin(words, self.journal_identity(), &left)?;
        *lock(&self.journal) = Some(Arc::new(journal));
        self.journaling.store(true, Ordering::Release);
        Ok(count)
    }

    /// Says that bytes may have been written by a predecessor and not synced.
    pub(crate) fn distrust_syncs(&self) {
        self.mark_dirty(self.file);
        self.mark_dirty(self.data);
    }

    /// Says that clusters which look free may be in use, until [`Qcow2::expect_nobody`].
    pub(crate) fn expect_predecessor(&self) {
        self.allocator.hold();
    }

    /// Says that what looks free is.
    pub(crate) fn expect_nobody(&self) {
        self.allocator.let_go();
    }

    /// Flushes, empties the journal and notes nothing any more. No request is under way.
    ///
    /// # Errors
    /// As [`Qcow2::flush`]; then what is noted stays there, and changes go on being noted.
    pub(crate) async fn detach_journal(&self, st: &dyn Storage) -> Result<()> {
        let Some(journal) = self.journal() else { return Ok(()) };
        self.flush(st).await?;
        journal.trim(journal.tail());
        self.journaling.store(false, Ordering::Release);
        *lock(&self.journal) = None;
        Ok(())
    }

    async fn redo(&self, st: &dyn Storage, changes: &[Change]) -> Result<usize> {
        if self.writing.load(Ordering::Acquire) {
            return Err(contradiction("another guest has written to it"));
        }
        let plan = self.plan_redo(st, changes).await?;
        let done = self.carry_out(st, plan).await;
        // Some clusters are counted and some are not. Nobody may allocate those, and whoever tries
        // again is to hear what the matter is.
        done.inspect_err(|error| self.poison(error))
    }

    async fn carry_out(&self, st: &dyn Storage, plan: Plan) -> Result<usize> {
        self.allocator.spare(&plan.links);
        self.start_writing(st).await?;
        for cluster in plan.uncounted {
            self.count_found(st, Run::new(cluster, 1)).await?;
        }
        for (cluster, excess) in plan.overcounted {
            for _ in 0..excess {
                self.refcounts.adjust(st, Run::new(cluster, 1), false).await?;
            }
        }
        let count = plan.steps.len();
        for step in plan.steps {
            self.relieve(st).await?;
            let _claim = self.clusters.claim(step.cluster.0..step.cluster.0 + 1).await;
            self.own_table(st, step.cluster).await?;
            self.set_entries(st, step.cluster, 1, |_| step.entry).await?;
            let kept = step.new.host().map(|at| (at, 1));
            self.drop_references(&[step.found], kept);
        }
        Ok(count)
    }

    /// What is to be done, after every check; changes nothing.
    async fn plan_redo(&self, st: &dyn Storage, changes: &[Change]) -> Result<Plan> {
        let mut chains: BTreeMap<u64, Vec<Change>> = BTreeMap::new();
        changes.iter().for_each(|change| chains.entry(change.guest).or_default().push(*change));
        let clusters = self.size().div_ceil(self.cluster_size());
        let mut plan = Plan::default();
        let mut replaced = BTreeSet::new();
        for (guest, changes) in chains {
            let cluster = GuestCluster(guest);
            if guest >= clusters {
                return Err(contradiction(format!("guest cluster {guest} of {clusters}")));
            }
            let found = self.found_entry(st, cluster).await?;
            let Some(mut entry) = wanted(&changes, found)? else { continue };
            let old = self.cluster(found, cluster)?;
            let parsed = self.cluster(entry, cluster).map_err(contradiction)?;
            if let Some(at) = parsed.host().filter(|_| !self.has_data_file()) {
                if old.host() == Some(at) {
                    // What the flag says was decided when the cluster was linked.
                    entry.word = entry.word & !COPIED | found.word & COPIED;
                } else if parsed.own().is_none()
                    || self.regions.contains(at, self.cluster_size())
                    || !plan.links.insert(self.geometry.host_cluster(at).0)
                {
                    return Err(contradiction(format!("guest cluster {guest} cannot be at {at}")));
                }
            }
            replaced.extend(old.host().map(|at| self.geometry.host_cluster(at).0));
            plan.steps.push(Step { cluster, entry, new: parsed, found: old });
        }
        if !self.has_data_file() {
            self.judge_counts(st, &mut plan, &replaced).await?;
        }
        Ok(plan)
    }

    /// Finds out which of the clusters that are to be linked must be counted, and that nothing else
    /// has any of them.
    async fn judge_counts(
        &self,
        st: &dyn Storage,
        plan: &mut Plan,
        replaced: &BTreeSet<u64>,
    ) -> Result<()> {
        let place = |cluster: u64| self.geometry.host_start(HostCluster(cluster));
        for &cluster in replaced {
            if self.refcounts.count(st, HostCluster(cluster)).await? == 0 {
                let why = format!("the cluster at {} is in use and not counted", place(cluster));
                return Err(contradiction(why));
            }
        }
        let mut counted = false;
        for &cluster in &plan.links {
            match self.refcounts.count(st, HostCluster(cluster)).await? {
                0 => plan.uncounted.push(cluster),
                1 => counted = true,
                many @ 2..=MOST_COUNTS => {
                    counted = true;
                    plan.overcounted.push((cluster, many - 1));
                }
                many => {
                    let why = format!("the cluster at {} counts {many} times", place(cluster));
                    return Err(contradiction(why));
                }
            }
        }
        if counted && let Some(at) = check::referred(st, self.file, &plan.links).await? {
            return Err(contradiction(format!("something refers to the cluster at {at}")));
        }
        Ok(())
    }

    /// The entry of a guest cluster as it stands, of which nothing is known yet.
    async fn found_entry(&self, st: &dyn Storage, cluster: GuestCluster) -> Result<L2Entry> {
        if self.l1_entry(cluster)?.1.is_none() {
            return Ok(L2Entry::default());
        }
        let (slot, slice) = (self.geometry.l2_slot(cluster), self.geometry.l2_slice(cluster));
        loop {
            if let Some(entry) = self.l2.peek(slice, |words| self.entry(words, slot)) {
                return Ok(entry);
            }
            self.load_slice(st, cluster).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(word: u64) -> L2Entry {
        L2Entry { word, bitmap: 0 }
    }

    fn chain(words: &[u64]) -> Vec<Change> {
        let change = |pair: &[u64]| Change { guest: 3, old: entry(pair[0]), new: entry(pair[1]) };
        words.windows(2).map(change).collect()
    }

    #[test]
    fn the_last_change_counts_wherever_the_file_stands() {
        let (one, two) = (COPIED | 0x1_0000, COPIED | 0x2_0000);
        let changes = chain(&[0, one, 0, two]);
        for found in [0, one, one & !COPIED] {
            let wanted = wanted(&changes, entry(found)).expect("no contradiction");
            assert_eq!(wanted, Some(entry(two)), "found {found:#x}");
        }
        assert_eq!(wanted(&changes, entry(two)).expect("no contradiction"), None);
        wanted(&changes, entry(COPIED | 0x3_0000)).expect_err("somebody else's");
        wanted(&changes, L2Entry { word: one, bitmap: 1 }).expect_err("somebody else's");
    }

    #[test]
    fn the_first_cluster_of_a_data_file_is_in_use_or_not() {
        let changes = chain(&[0, COPIED]);
        assert_eq!(wanted(&changes, entry(0)).expect("fine"), Some(entry(COPIED)));
        assert_eq!(wanted(&changes, entry(COPIED)).expect("fine"), None);
    }

    #[test]
    fn a_compressed_cluster_is_not_linked_again_and_nothing_before_it_comes_back() {
        let (plain, packed) = (COPIED | 0x1_0000, COMPRESSED | 0x2_0000);
        let (later, packed_later) = (COPIED | 0x4_0000, COMPRESSED | 0x3_0000);
        let changes = chain(&[0, plain, packed]);
        assert_eq!(wanted(&changes, entry(0)).expect("fine"), Some(entry(plain)));
        assert_eq!(wanted(&changes, entry(plain)).expect("fine"), None);
        assert_eq!(wanted(&changes, entry(packed)).expect("fine"), None);
        let changes = chain(&[0, plain, packed, packed_later]);
        assert_eq!(wanted(&changes, entry(packed)).expect("fine"), None);
        let changes = chain(&[0, plain, packed, later]);
        assert_eq!(wanted(&changes, entry(packed)).expect("fine"), Some(entry(later)));
    }
}
