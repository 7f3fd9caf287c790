//! Space of the host's file system that is asked for before it is needed.
//!
//! A file system that meets writes at a file's end has to find room for each of them. Asked for
//! some of it beforehand, it writes into what the file has already, which takes a fourth less time,
//! and the file is in fewer pieces. Neither the file's length nor its bytes change by that. What is
//! left is given back when the image is closed, and when a guest gives clusters back while the file
//! has stopped growing. A daemon that was killed leaves it with the file, for the next one to use.

use crate::qcow2::Qcow2;
use crate::qcow2::refcount::Run;
use crate::storage::{Op, Purpose, Storage};
use crate::sync::{Mutex, lock};

/// The most bytes that are asked for ahead, and what part of the file that may be.
const MOST: u64 = 4 << 20;
const PART: u64 = 16;

#[derive(Debug, Default)]
struct State {
    /// The cluster up to which space was asked for; zero when nothing is left of it.
    until: u64,
    /// The first cluster behind everything in use when the last flush ended.
    at_flush: u64,
}

/// What was asked for.
#[derive(Debug, Default)]
pub(super) struct Ahead(Mutex<State>);

impl Ahead {
    /// What to ask for when `run` at the end of a file is to be written; `most` clusters more at
    /// most.
    fn stretch(&self, run: Run, most: u64) -> Option<Run> {
        let mut state = lock(&self.0);
        if run.end() <= state.until {
            return None;
        }
        let first = run.first.0.max(state.until);
        state.until = run.end() + most.min(run.end() / PART);
        Some(Run::new(first, state.until - first))
    }

    /// Whether space behind `frontier` was asked for which the file, that has not grown since the
    /// last flush, does not seem to need.
    fn is_idle(&self, frontier: u64) -> bool {
        let mut state = lock(&self.0);
        let before = std::mem::replace(&mut state.at_flush, frontier);
        state.until > 0 && before == frontier
    }

    /// Whether anything was asked for since this was last called.
    fn forget(&self) -> bool {
        std::mem::take(&mut lock(&self.0).until) > 0
    }
}

impl Qcow2 {
    /// Asks for the space of clusters at the end of the file, and for some more. The caller keeps
    /// others from looking for clusters meanwhile.
    pub(super) async fn ask_ahead(&self, st: &dyn Storage, run: Run) {
        let most = MOST >> self.geometry.cluster_bits;
        let Some(run) = self.ahead.stretch(run, most) else { return };
        let at = self.geometry.host_start(run.first);
        let len = run.count << self.geometry.cluster_bits;
        // A wish: who has no room says so when something is written.
        let _ = st.submit(self.file, Purpose::Ahead, Op::Reserve { at, len }).await;
    }

    /// Gives back what was asked for in vain, if clusters were `freed` and the file has not grown
    /// since the last flush. The caller keeps others from looking for clusters meanwhile.
    pub(super) async fn give_ahead_back(&self, st: &dyn Storage, freed: bool) {
        let idle = self.ahead.is_idle(self.allocator.frontier());
        if !freed || !idle || !self.ahead.forget() {
            return;
        }
        // Others write where clusters were handed out; nobody gets any of the rest before the
        // file's length is set, so that no write can lie behind it.
        let rest = self.allocator.withhold();
        let frontier = self.allocator.frontier();
        let behind = rest.map(|rest| rest.run).filter(|run| run.end() == frontier);
        let end = behind.map_or(frontier, |run| run.first.0) << self.geometry.cluster_bits;
        self.cut(st, end).await;
        rest.inspect(|rest| self.allocator.set_reserved(*rest));
    }

    /// Gives back everything that was asked for in vain. Nothing else uses the image meanwhile.
    pub(super) async fn close_ahead(&self, st: &dyn Storage) {
        if self.ahead.forget()
            && let Ok(length) = st.length(self.file)
        {
            self.cut(st, length).await;
        }
    }

    /// Sets the file's length, behind which nothing was written: what the file system keeps there
    /// for the file goes.
    async fn cut(&self, st: &dyn Storage, len: u64) {
        if let Err(error) = st.submit(self.file, Purpose::Ahead, Op::Resize { len }).await {
            tracing::debug!(%error, "the host did not take back what was asked for ahead");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_growing_file_is_ahead_of_its_writes_by_a_part_of_it() {
        let ahead = Ahead::default();
        let asked = |first, count| {
            ahead.stretch(Run::new(first, count), 64).map(|run| run.first.0..run.end())
        };
        assert_eq!(asked(3, 16), Some(3..20), "a small file");
        assert_eq!(asked(19, 1), None);
        assert_eq!(asked(20, 12), Some(20..34));
        assert_eq!(asked(10_000, 16), Some(10_000..10_080), "never more than the most");
        assert_eq!(asked(10_016, 64), None);
    }

    #[test]
    fn a_file_that_grows_keeps_what_was_asked_for() {
        let ahead = Ahead::default();
        ahead.stretch(Run::new(0, 16), 64);
        assert!(!ahead.is_idle(16), "it grew before this flush");
        assert!(!ahead.is_idle(32));
        assert!(ahead.is_idle(32));
        assert!(ahead.forget() && !ahead.forget());
        assert!(!ahead.is_idle(32), "nothing is left");
    }
}
