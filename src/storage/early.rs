//! Starting the way to the disk before a flush asks for it.
//!
//! A guest that makes a few writes durable at a time, as databases do, sends its flush when it has
//! been told of the writes: until then the disk has nothing to do. Where a few writes and a flush
//! have followed each other lately, the next few writes are started as soon as the worker has
//! nothing else to do, and the flush waits for the rest of their way only. A guess that turns out
//! wrong costs the writing of no more than [`A_FEW`] bytes, most of which was to come anyway.

use std::cell::RefCell;

use super::FileId;

/// The most bytes between two syncs of one file for which its writes are started early.
const A_FEW: u64 = 256 << 10;
/// How many syncs in a row must have come after so few bytes.
const IN_A_ROW: u8 = 4;

/// What one engine has seen of one file.
#[derive(Debug, Default)]
struct Seen {
    /// Bytes written since the last sync.
    written: u64,
    /// Some of them have not been started.
    waiting: bool,
    /// Syncs in a row that came after a few bytes.
    row: u8,
}

/// What one engine expects of its files' next syncs.
#[derive(Debug, Default)]
pub(super) struct Early {
    files: RefCell<Vec<Seen>>,
}

impl Early {
    fn with<T>(&self, file: FileId, change: impl FnOnce(&mut Seen) -> T) -> T {
        let index = usize::try_from(file.0).expect("an index of the table of files");
        let mut files = self.files.borrow_mut();
        if files.len() <= index {
            files.resize_with(index + 1, Seen::default);
        }
        change(&mut files[index])
    }

    /// Says that so many bytes of a file were written to the page cache.
    pub(super) fn wrote(&self, file: FileId, len: u64) {
        self.with(file, |seen| {
            seen.written = seen.written.saturating_add(len);
            if seen.written > A_FEW {
                seen.row = 0;
            }
            seen.waiting = seen.row >= IN_A_ROW;
        });
    }

    /// Says that a sync of a file begins.
    pub(super) fn syncs(&self, file: FileId) {
        self.with(file, |seen| {
            if std::mem::take(&mut seen.written) > 0 {
                seen.row = (seen.row + 1).min(IN_A_ROW);
            }
            seen.waiting = false;
        });
    }

    /// Starts what is expected to be synced soon, with a call of `start` for each such file.
    pub(super) fn start(&self, mut start: impl FnMut(FileId)) {
        for (seen, index) in self.files.borrow_mut().iter_mut().zip(0..) {
            if std::mem::take(&mut seen.waiting) {
                start(FileId(index));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId(1);

    fn started(early: &Early) -> Vec<FileId> {
        let mut files = Vec::new();
        early.start(|file| files.push(file));
        files
    }

    /// An engine whose guest flushes after every few writes.
    fn trained() -> Early {
        let early = Early::default();
        for _ in 0..IN_A_ROW {
            early.wrote(FILE, 4096);
            assert!(started(&early).is_empty(), "not known yet");
            early.syncs(FILE);
        }
        early
    }

    #[test]
    fn a_few_writes_before_the_next_sync_are_started_once() {
        let early = trained();
        assert!(started(&early).is_empty(), "nothing was written");
        early.wrote(FILE, 4096);
        early.wrote(FILE, 4096);
        assert_eq!(started(&early), [FILE]);
        assert!(started(&early).is_empty());
        early.wrote(FILE, 4096);
        assert_eq!(started(&early), [FILE], "more of them");
        early.wrote(FILE, 4096);
        early.syncs(FILE);
        assert!(started(&early).is_empty(), "the sync does it");
        // One of nothing says nothing new.
        early.syncs(FILE);
        early.wrote(FILE, 4096);
        assert_eq!(started(&early), [FILE]);
    }

    #[test]
    fn a_guest_that_stops_flushing_is_noticed() {
        let early = trained();
        let mut bytes = 0;
        for _ in 0..10_000 {
            early.wrote(FILE, 4096);
            bytes += 4096 * started(&early).len() as u64;
        }
        assert_eq!(bytes, A_FEW);
        early.syncs(FILE);
        early.wrote(FILE, 4096);
        assert!(started(&early).is_empty(), "it has to be seen again");
        // One that writes much between its flushes gains nothing.
        let busy = Early::default();
        for _ in 0..100 {
            busy.wrote(FILE, A_FEW + 1);
            busy.wrote(FILE, 4096);
            assert!(started(&busy).is_empty());
            busy.syncs(FILE);
        }
    }
}
