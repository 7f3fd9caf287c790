//! Clusters that lost a reference and may not be touched yet.
//!
//! A cluster rests here until the entry that dropped it is durable (else a crash brings the old
//! reference back, to a cluster that holds somebody else's bytes) and until every request that may
//! have seen the old entry has ended. Only then is its refcount lowered, its hole punched, and the
//! cluster given to the next writer.

use crate::qcow2::refcount::Run;
use crate::sync::{Mutex, lock};

#[derive(Debug, Clone, Copy)]
struct Item {
    run: Run,
    epoch: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Dropped by entries that are not frozen yet.
    open: Vec<Item>,
    /// Dropped by entries that the flush under way makes durable.
    sealed: Vec<Item>,
    /// Dropped by entries that are durable, or never referenced.
    durable: Vec<Item>,
}

/// All clusters at rest.
#[derive(Debug, Default)]
pub(super) struct Limbo(Mutex<State>);

impl Limbo {
    /// A run lost one reference by a change of an entry in memory, in that epoch.
    pub(super) fn unlinked(&self, run: Run, epoch: u64) {
        lock(&self.0).open.push(Item { run, epoch });
    }

    /// A run was counted but no entry refers to it in the file, nor ever did.
    pub(super) fn never_linked(&self, run: Run, epoch: u64) {
        lock(&self.0).durable.push(Item { run, epoch });
    }

    /// A flush begins: what was unlinked before belongs to it.
    pub(super) fn seal(&self) {
        let mut state = lock(&self.0);
        let mut open = std::mem::take(&mut state.open);
        state.sealed.append(&mut open);
    }

    /// The flush has made its entries durable.
    pub(super) fn release(&self) {
        let mut state = lock(&self.0);
        let mut sealed = std::mem::take(&mut state.sealed);
        state.durable.append(&mut sealed);
    }

    /// Takes at most `most` runs that nobody can see any more in `epoch`.
    pub(super) fn take(&self, epoch: u64, most: usize) -> Vec<Run> {
        let mut state = lock(&self.0);
        let mut taken = Vec::new();
        state.durable.retain(|item| {
            let ready = taken.len() < most && item.epoch + 2 <= epoch;
            if ready {
                taken.push(item.run);
            }
            !ready
        });
        taken
    }

    /// How many clusters rest here.
    pub(super) fn clusters(&self) -> u64 {
        let state = lock(&self.0);
        let all = state.open.iter().chain(&state.sealed).chain(&state.durable);
        all.map(|item| item.run.count).sum()
    }

    /// How many runs rest here; more than some thousands ask for a flush.
    pub(super) fn len(&self) -> usize {
        let state = lock(&self.0);
        state.open.len() + state.sealed.len() + state.durable.len()
    }

    /// Whether runs wait for a flush.
    pub(super) fn needs_flush(&self) -> bool {
        !lock(&self.0).open.is_empty()
    }
}
