//! Starting the way to the disk before a flush asks for it.
//!
//! A guest that makes a few writes durable at a time, as databases do, sends its flush when it has
//! been told of the writes: until then the disk has nothing to do. Where a few writes and a flush
//! have followed each other lately, the next few writes are started as soon as a worker has nothing
//! else to do, and the flush waits for the rest of their way only. A guess that turns out wrong
//! costs the writing of [`A_FEW`] bytes, which the kernel would have begun some seconds later.
//!
//! A start may fail, and the kernel need not tell a later sync of that. So a start and a sync of
//! one file never overlap, and once a start has lost something all syncs fail that begin later:
//! none says that bytes are durable which are nowhere.

use std::io;

use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering, lock};

/// The most bytes between two syncs for which writes are started early.
const A_FEW: u64 = 256 << 10;
/// How many syncs in a row must have come after so few bytes.
const IN_A_ROW: u32 = 4;

/// What is known of the syncs of one file, by all engines together.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// Bytes written since the last sync began.
    written: AtomicU64,
    /// Syncs in a row that came after a few bytes.
    row: AtomicU32,
    /// Held during a start.
    calls: Mutex<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    /// Syncs under way.
    syncs: u32,
    /// Whether this kind of file can be started at all, once that is known.
    works: Option<bool>,
    /// The error of a start that may have lost something.
    lost: Option<i32>,
}

impl Early {
    /// Says that so many bytes were written.
    pub(super) fn wrote(&self, len: u64) {
        self.written.fetch_add(len, Ordering::Relaxed);
    }

    /// Whether a few bytes were written and a sync of them is expected.
    fn is_due(&self) -> bool {
        (1..=A_FEW).contains(&self.written.load(Ordering::Relaxed))
            && self.row.load(Ordering::Relaxed) >= IN_A_ROW
    }

    /// Starts what was written if a sync is expected and none is under way; `call` does it.
    pub(super) fn start(&self, call: impl FnOnce() -> io::Result<()>) {
        if !self.is_due() {
            return;
        }
        let Ok(mut calls) = self.calls.try_lock() else { return };
        if calls.syncs > 0 || calls.works == Some(false) {
            return;
        }
        match call().map_err(|error| error.raw_os_error()) {
            Ok(()) => calls.works = Some(true),
            // Everything is as dirty as before.
            Err(Some(libc::EINTR | libc::EAGAIN | libc::ENOMEM)) => {}
            Err(Some(libc::EINVAL | libc::ENOSYS | libc::EPERM | libc::ESPIPE))
                if calls.works.is_none() =>
            {
                calls.works = Some(false);
            }
            Err(code) => calls.lost = calls.lost.or(code).or(Some(libc::EIO)),
        }
    }

    /// Says that a sync begins; waits for a start under way. [`Early::sync_ended`] must follow.
    pub(super) fn sync_begins(&self) {
        let mut calls = lock(&self.calls);
        calls.syncs += 1;
        match self.written.swap(0, Ordering::Relaxed) {
            0 => {}
            1..=A_FEW => {
                let more = (self.row.load(Ordering::Relaxed) + 1).min(IN_A_ROW);
                self.row.store(more, Ordering::Relaxed);
            }
            _ => self.row.store(0, Ordering::Relaxed),
        }
    }

    /// Says that a sync has ended with `result`; returns how it has ended in truth.
    ///
    /// # Errors
    /// Those of the sync, and of starts before it.
    pub(super) fn sync_ended(&self, result: io::Result<()>) -> io::Result<()> {
        let mut calls = lock(&self.calls);
        calls.syncs = calls.syncs.saturating_sub(1);
        result.and(calls.lost.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code))))
    }

    #[cfg(test)]
    pub(super) fn has_started(&self) -> bool {
        lock(&self.calls).works == Some(true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn starts(early: &Early) -> bool {
        let mut started = false;
        early.start(|| {
            started = true;
            Ok(())
        });
        started
    }

    fn sync(early: &Early) -> Option<i32> {
        early.sync_begins();
        early.sync_ended(Ok(())).err().and_then(|error| error.raw_os_error())
    }

    fn fail(early: &Early, code: i32) {
        early.wrote(4096);
        early.start(|| Err(io::Error::from_raw_os_error(code)));
    }

    /// A file whose guest flushes after every few writes.
    fn trained() -> Early {
        let early = Early::default();
        for _ in 0..IN_A_ROW {
            early.wrote(4096);
            assert!(!starts(&early), "not known yet");
            assert_eq!(sync(&early), None);
        }
        early
    }

    #[test]
    fn a_few_writes_before_the_next_sync_are_started() {
        let early = trained();
        assert!(!starts(&early), "nothing was written");
        early.wrote(4096);
        early.wrote(4096);
        assert!(starts(&early));
        early.sync_begins();
        early.wrote(4096);
        assert!(!starts(&early), "a sync is under way");
        early.sync_ended(Ok(())).expect("a sync");
        assert!(starts(&early));
        assert_eq!((sync(&early), sync(&early)), (None, None), "the second is one of nothing");
        early.wrote(4096);
        assert!(starts(&early), "which says nothing new");
    }

    #[test]
    fn a_guest_that_stops_flushing_is_noticed() {
        let early = trained();
        let mut bytes = 0;
        for _ in 0..10_000 {
            early.wrote(4096);
            bytes += 4096 * u64::from(starts(&early));
        }
        assert_eq!(bytes, A_FEW);
        for _ in 0..=IN_A_ROW {
            assert_eq!(sync(&early), None);
            early.wrote(4096);
        }
        assert!(starts(&early), "four small syncs after the large one");
        // One that writes much between its flushes gains nothing.
        let busy = Early::default();
        for _ in 0..100 {
            busy.wrote(A_FEW + 1);
            assert!(!starts(&busy));
            assert_eq!(sync(&busy), None);
            busy.wrote(4096);
            assert!(!starts(&busy));
        }
    }

    #[test]
    fn after_a_loss_no_sync_says_that_all_is_well() {
        for code in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
            let early = trained();
            fail(&early, code);
            assert_eq!((sync(&early), sync(&early)), (Some(code), Some(code)));
        }
        let early = trained();
        early.sync_begins();
        let own = early.sync_ended(Err(io::Error::from_raw_os_error(libc::EROFS)));
        assert_eq!(own.expect_err("its own").raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    fn what_may_be_tried_again_is_no_loss_and_what_never_works_is_not_tried() {
        let early = trained();
        for code in [libc::EINTR, libc::EAGAIN, libc::ENOMEM] {
            fail(&early, code);
            assert_eq!(sync(&early), None);
        }
        fail(&early, libc::EINVAL);
        assert_eq!(sync(&early), None);
        early.wrote(4096);
        assert!(!starts(&early), "this kind of file has no such thing");
        let early = trained();
        early.wrote(4096);
        assert!(starts(&early));
        fail(&early, libc::EINVAL);
        assert_eq!(sync(&early), Some(libc::EINVAL), "it has worked before");
    }

    #[test]
    fn a_sync_beside_a_start_that_fails_is_told() {
        let early = trained();
        early.wrote(4096);
        let (begun, begins) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                early.start(|| {
                    begun.send(()).expect("somebody waits");
                    thread::sleep(Duration::from_millis(20));
                    Err(io::Error::from_raw_os_error(libc::EIO))
                });
            });
            begins.recv().expect("a start");
            assert_eq!(sync(&early), Some(libc::EIO));
        });
    }
}
