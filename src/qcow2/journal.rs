#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! Changes of the mapping that no flush has covered yet, in memory that outlives the process.
//!
//! Tables reach the file in an order that power cuts respect, by flushes and in no other way. A
//! process that is killed would take along what it has changed since the last one, although its
//! guest, which lives on, was told that it is written. So each change of an L2 entry is noted here
//! before its request is answered, and whoever takes the image over makes the changes again
//! (`redo`). After a power cut there is no journal and no guest, and the file alone counts.
//!
//! # Layout
//!
//! Words of 64 bits in the machine's order. A header: magic and version, the number of records,
//! what tells the image (three words), and the *head*: the first record that no flush is known to
//! cover. Then an array of records of six words: sequence number, guest cluster, the new L2 entry
//! (two words), the old one (two words). A record lies at its sequence number modulo the capacity.
//!
//! # Why a prefix is there
//!
//! An entry is changed in the cache and its record is written under the one lock that changes of
//! the cache take (`Qcow2::set_entries`), so records are written one after the other, in the order
//! of the changes. Of a record the sequence number is stored last. A killed process thus leaves a
//! prefix, which ends with the first record that has not the number that its place asks for; a
//! request whose records are missing was not answered, and its front-end has it carried out again.
//! A record's place is used again only after the head has passed it, so what is torn there was
//! covered by a flush.
//!
//! # Why the head may move
//!
//! A flush reads the *tail*, where the next record goes, before it copies the tables under the same
//! lock: what a record below that tail says is in the copy, or was replaced there by something
//! newer. When the tables are durable the head moves to that tail, and not before. That it moves
//! too late does no harm: records that were covered are followed by all that came after them.
//!
//! A cluster that lost its reference goes to limbo after the record of that loss was written, and
//! is used again only when the loss is durable. So if the last record of a guest cluster refers to
//! a host cluster, nobody else has got it meanwhile, whatever was freed and used again before; and
//! an entry that is found in the file is one that the records of its guest cluster know of.
//!
//! # What is not done again
//!
//! Compressed clusters share host clusters, whose refcounts records do not tell. Their changes are
//! noted, so that what is found in the file is known, but requests that make them wait for a flush.
//! When there is no room, a request makes its change after a flush has made some.

use std::fmt;

use crate::error::{Error, Result};
use crate::qcow2::format::L2Entry;
use crate::sync::{Arc, AtomicU64, Ordering};

/// Memory that outlives the process, as an array of words. Others may write there at any time.
pub trait SharedWords: fmt::Debug + Send + Sync {
    /// How many words there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a word; what was stored before it by whoever stored it is visible afterwards.
    ///
    /// # Panics
    /// When there is no such word.
    fn load(&self, index: usize) -> u64;

    /// Stores a word, after everything that was stored before.
    ///
    /// # Panics
    /// When there is no such word.
    fn store(&self, index: usize, value: u64);
}

/// "qcow2 redo journal", version 1.
const MAGIC: u64 = 0x7132_7265_646f_0001;
/// Words before the records.
const HEADER_WORDS: usize = 8;
/// Words of a record.
const RECORD_WORDS: usize = 6;
/// Records that a region gets room for.
const RECORDS: usize = 16_384;
/// Records that there must be room for: more than one change of entries makes.
const LEAST_RECORDS: u64 = 1024;
/// Words that a region gets for a journal.
pub const JOURNAL_WORDS: usize = HEADER_WORDS + RECORDS * RECORD_WORDS;

/// Where the words of the header are.
const MAGIC_AT: usize = 0;
const CAPACITY: usize = 1;
const IDENTITY: [usize; 3] = [2, 3, 4];
const HEAD: usize = 5;
/// Where the words of a record are, from its beginning.
const SEQUENCE: usize = 0;
const GUEST: usize = 1;
const WORD: usize = 2;
const BITMAP: usize = 3;
const OLD_WORD: usize = 4;
const OLD_BITMAP: usize = 5;

/// What tells images apart, as far as a journal must know.
pub(super) type Identity = [u64; 3];

/// One change of an L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    /// The guest cluster.
    pub(super) guest: u64,
    /// What its entry was.
    pub(super) old: L2Entry,
    /// What its entry is.
    pub(super) new: L2Entry,
}

/// What a predecessor has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// The changes that no flush is known to cover, in the order in which they were made.
    pub(super) changes: Vec<Change>,
    /// The sequence number of the next record.
    next: u64,
}

fn refused(why: impl Into<Box<str>>) -> Error {
    Error::refused("journal", why)
}

/// How many records there is room for.
fn capacity(words: &dyn SharedWords) -> Result<u64> {
    let records = words.len().saturating_sub(HEADER_WORDS) / RECORD_WORDS;
    let records = u64::try_from(records).unwrap_or(0);
    if records < LEAST_RECORDS {
        return Err(refused(format!("room for {records} records, {LEAST_RECORDS} are needed")));
    }
    Ok(records)
}

/// Where the record with a sequence number is.
fn place(sequence: u64, capacity: u64) -> usize {
    let slot = sequence.checked_rem(capacity).and_then(|slot| usize::try_from(slot).ok());
    slot.unwrap_or(0).saturating_mul(RECORD_WORDS).saturating_add(HEADER_WORDS)
}

/// Makes what is there nobody's: for memory whose guest does not rely on it any more.
pub fn forget(words: &dyn SharedWords) {
    if words.len() > MAGIC_AT {
        words.store(MAGIC_AT, 0);
    }
}

/// Reads what is there, and changes nothing. At most as many records are looked at as there is room
/// for, whatever the memory says.
///
/// # Errors
/// When it is too small, was not made by this program, or has changes of another image.
pub(super) fn read(words: &dyn SharedWords, identity: Identity) -> Result<Left> {
    let capacity = capacity(words)?;
    let magic = words.load(MAGIC_AT);
    if magic == 0 {
        return Ok(Left { changes: Vec::new(), next: 1 });
    }
    if magic != MAGIC {
        return Err(refused(format!("version {magic:#x} of its layout is unknown")));
    }
    let (found, head) = (words.load(CAPACITY), words.load(HEAD));
    if found != capacity || head == 0 || head > u64::MAX >> 1 {
        let why = format!("{found} records from {head} on, where there is room for {capacity}");
        return Err(refused(why));
    }
    let mut changes = Vec::new();
    let mut next = head;
    for _ in 0..capacity {
        let at = place(next, capacity);
        let load = |word: usize| words.load(at.saturating_add(word));
        if load(SEQUENCE) != next {
            break;
        }
        let entry = |word, bitmap| L2Entry { word: load(word), bitmap: load(bitmap) };
        let (old, new) = (entry(OLD_WORD, OLD_BITMAP), entry(WORD, BITMAP));
        changes.push(Change { guest: load(GUEST), old, new });
        next = next.saturating_add(1);
    }
    if !changes.is_empty() && IDENTITY.map(|word| words.load(word)) != identity {
        return Err(refused("its changes are those of another image"));
    }
    Ok(Left { changes, next })
}

/// The journal of an image that is served.
pub(super) struct Journal {
    words: Arc<dyn SharedWords>,
    capacity: u64,
    /// As in the header, which others may write to.
    head: AtomicU64,
    tail: AtomicU64,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head, tail) = (&self.head, &self.tail);
        f.debug_struct("Journal").field("head", head).field("tail", tail).finish_non_exhaustive()
    }
}

impl Journal {
    /// Goes on behind what a predecessor has left, all of which is durable.
    ///
    /// # Errors
    /// When the memory is too small.
    pub(super) fn begin(
        words: Arc<dyn SharedWords>,
        identity: Identity,
        left: &Left,
    ) -> Result<Self> {
        let capacity = capacity(&*words)?;
        if words.load(MAGIC_AT) != MAGIC {
            // What a journal that was forgotten has held.
            (0..capacity).for_each(|slot| words.store(place(slot, capacity), 0));
        }
        // The head first: from here on there are no changes whose image would matter.
        words.store(HEAD, left.next);
        words.store(CAPACITY, capacity);
        IDENTITY.into_iter().zip(identity).for_each(|(at, word)| words.store(at, word));
        words.store(MAGIC_AT, MAGIC);
        let (head, tail) = (AtomicU64::new(left.next), AtomicU64::new(left.next));
        Ok(Self { words, capacity, head, tail })
    }

    /// Whether it lies in these words.
    pub(super) fn is_in(&self, words: &Arc<dyn SharedWords>) -> bool {
        Arc::ptr_eq(&self.words, words)
    }

    /// The sequence number of the next record.
    pub(super) fn tail(&self) -> u64 {
        self.tail.load(Ordering::Acquire)
    }

    /// Whether there is room for so many records.
    pub(super) fn has_room(&self, count: u64) -> bool {
        let used = self.tail().saturating_sub(self.head.load(Ordering::Acquire));
        used.saturating_add(count) <= self.capacity
    }

    /// Notes a change, for which there is room. The caller keeps others from doing so at the same
    /// time, and from copying tables.
    pub(super) fn append(&self, change: &Change) {
        let sequence = self.tail.load(Ordering::Relaxed);
        let at = place(sequence, self.capacity);
        let store = |word: usize, value| self.words.store(at.saturating_add(word), value);
        store(GUEST, change.guest);
        store(WORD, change.new.word);
        store(BITMAP, change.new.bitmap);
        store(OLD_WORD, change.old.word);
        store(OLD_BITMAP, change.old.bitmap);
        store(SEQUENCE, sequence);
        self.tail.store(sequence.saturating_add(1), Ordering::Release);
    }

    /// Says that the changes before `mark` are durable. One flush at a time does so.
    pub(super) fn trim(&self, mark: u64) {
        if self.head.load(Ordering::Relaxed) < mark {
            self.words.store(HEAD, mark);
            self.head.store(mark, Ordering::Release);
        }
    }
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test that is wrong may panic"
)]
#[path = "journal_tests.rs"]
mod tests;
