#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! Which chains of one ring are under way, in memory that outlives the process: "Inflight I/O
//! tracking" of the vhost-user specification, for split rings.
//!
//! The front-end keeps the memory and gives it to whoever serves the ring next. If that is because
//! the predecessor was killed, the chains it had taken and not published are taken again before any
//! other: nothing is lost, and since a chain counts as finished from the same moment on at which
//! the guest sees it on the used ring, nothing is answered twice.
//!
//! # What one ring's record holds
//!
//! A header of 16 bytes (features, version, number of entries, head of the last batch, used index)
//! and 16 bytes for each descriptor (whether a chain that begins there is under way, the next head
//! of the same batch, a counter that tells in which order chains were taken), in the machine's byte
//! order. Every store is one atomic release store, so a killed process leaves a prefix of them:
//!
//! 1. A chain is marked when it is taken, before anything is done for it.
//! 2. A batch that is done with is linked, the newest head last.
//! 3. The used ring's index is stored. Here the guest owns the batch.
//! 4. The marks of the batch are cleared.
//! 5. The record's used index is stored: steps 3 and 4 are complete.
//!
//! [`Record::recover`] finds out from the two used indices whether the crash came between 3 and 5,
//! and then finishes 4 and 5. Every chain that was taken is either on the used ring or marked, so
//! taking goes on at the used index plus the number of marks, whatever base a front-end tells: some
//! tell the available index, behind which the requests that nobody has seen yet would be lost.
//!
//! # Why a request may be carried out twice
//!
//! The predecessor may have carried out a marked chain in full. Each kind of request can be
//! repeated as long as nobody has seen its answer. A read, and asking for the serial number, change
//! nothing. A write stores the same bytes: the guest must leave the buffer alone until the answer.
//! That it goes to another place of the image the second time (a compressed cluster, a cluster that
//! was taken and never linked) is at worst a leak. Discard and write-zeroes leave the range as the
//! first time, and a second flush has less to do. Requests that overlap and are under way at the
//! same time have no order, before a crash or after: a guest that wants one waits for an answer
//! before it sends the next, and what was answered is not repeated.
//!
//! # What else must outlive the process
//!
//! A guest that does not notice the restart reads back what it was told is written, flushed or not.
//! Bytes are the kernel's once they are written, but a change of an image's tables is in memory
//! until a flush. So while somebody keeps a record, such changes are noted in a journal beside it
//! before the request is answered ([`crate::qcow2::journal`]). Where there is no room for one, and
//! for compressed clusters, the request is answered after a flush, one for all that wait
//! ([`crate::image::Image::hand_over`]).
//!
//! What the predecessor had handed to the kernel cannot come later than what is repeated: the image
//! stays locked until the kernel has finished with it (see `storage::lock`).
//!
//! # Whom the record is believed
//!
//! The front-end can write anything there at any time. A record is looked at once, at the start of
//! its ring; it is read within bounds, loops end, and one that contradicts the ring is refused.
//! What is wrong in a plausible way harms the front-end's own guest and nobody else.

use std::collections::VecDeque;

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

use crate::blk::token::Used;
use crate::sync::{Arc, Ordering};

/// The version of the layout; zero in a record that was never used.
const VERSION: u16 = 1;
/// Bytes before the entries.
const HEADER_BYTES: usize = 16;
/// Bytes of an entry.
const ENTRY_BYTES: usize = 16;
/// A multiple of this is where a record begins.
const ALIGNMENT: usize = 64;

/// Where the fields of the header are.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES: usize = 10;
const LAST_HEAD: usize = 12;
const USED_INDEX: usize = 14;
/// Where the fields of an entry are, from its beginning.
const MARK: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Bytes from one queue's record to the next, for queues of a size.
pub fn stride(queue_size: u16) -> usize {
    let entries = usize::from(queue_size).saturating_mul(ENTRY_BYTES);
    entries.saturating_add(HEADER_BYTES).next_multiple_of(ALIGNMENT)
}

/// Why a record cannot belong to the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A layout that is not known.
    #[error("version {version} with features {features:#x} is unknown")]
    Layout {
        /// The version.
        version: u16,
        /// The features.
        features: u64,
    },
    /// The ring has descriptors that the record has no entry for.
    #[error("it has {entries} entries, the ring {size} descriptors")]
    Size {
        /// Entries by the record's header.
        entries: u16,
        /// The ring's size.
        size: u16,
    },
    /// The used ring is where no batch can have brought it.
    #[error("the used index was {recorded} and is {used}, in a ring of {size}")]
    UsedIndex {
        /// By the record.
        recorded: u16,
        /// By the ring.
        used: u16,
        /// The ring's size.
        size: u16,
    },
    /// A head that is no descriptor of the ring.
    #[error("descriptor {head} is named in a ring of {size}")]
    Head {
        /// The index.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// The guest has not made so many chains available.
    #[error("{marked} chains are marked, only {available} wait for an answer")]
    Marks {
        /// Chains under way by the record.
        marked: usize,
        /// Chains that were made available and not answered.
        available: u16,
    },
}

/// What is to be done first in a ring.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Heads of the chains to take again, in the order in which they were taken.
    pub replay: VecDeque<u16>,
    /// The entry of the available ring to go on with.
    pub next_available: u16,
}

/// One ring's record.
pub struct Record {
    memory: Arc<MmapRegion>,
    start: usize,
    entries: u16,
    /// The counter of the next chain.
    counter: u64,
    /// Called before and after each store.
    #[cfg(test)]
    pub(super) observer: Option<Box<dyn Fn() + Send>>,
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Record({} entries at {:#x})", self.entries, self.start)
    }
}

impl Record {
    /// The record with so many entries at an offset of a mapping; `None` when it does not lie
    /// there in full, or not aligned.
    pub fn new(memory: Arc<MmapRegion>, start: usize, entries: u16) -> Option<Self> {
        let bytes = stride(entries);
        let inside = start.checked_add(bytes).is_some_and(|end| end <= memory.len());
        if !inside || !start.is_multiple_of(ALIGNMENT) {
            return None;
        }
        Some(Self {
            memory,
            start,
            entries,
            counter: 0,
            #[cfg(test)]
            observer: None,
        })
    }

    fn slice(&self) -> VolatileSlice<'_> {
        let slice = self.memory.get_slice(self.start, stride(self.entries));
        slice.expect("it lies in the mapping, which was checked")
    }

    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        self.slice().load(at, Ordering::Acquire).expect("aligned and inside")
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        #[cfg(test)]
        self.observe();
        self.slice().store(value, at, Ordering::Release).expect("aligned and inside");
        #[cfg(test)]
        self.observe();
    }

    /// Where a field of a head's entry is. Heads come from the ring or were checked.
    fn at(head: u16, field: usize) -> usize {
        let entry = usize::from(head).saturating_mul(ENTRY_BYTES);
        entry.saturating_add(HEADER_BYTES).saturating_add(field)
    }

    /// Puts the record in order and says where a ring of `size` descriptors goes on, whose used and
    /// available index are given. Nothing is changed in a record that is refused.
    ///
    /// # Errors
    /// What cannot be true.
    pub fn recover(
        &mut self,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Recovered, RecordError> {
        let (features, version): (u64, u16) = (self.load(FEATURES), self.load(VERSION_AT));
        let entries: u16 = self.load(ENTRIES);
        if version > VERSION || (version == VERSION && features != 0) {
            return Err(RecordError::Layout { version, features });
        }
        // A driver may use less of a queue than the front-end has offered it.
        if size > self.entries || (version == VERSION && entries != self.entries) {
            return Err(RecordError::Size { entries: entries.min(self.entries), size });
        }
        if version == 0 {
            self.begin(used);
            return Ok(Recovered { replay: VecDeque::new(), next_available: used });
        }
        let finished = self.last_batch(size, used)?;
        let mut marked = Vec::new();
        for head in 0..self.entries {
            if self.load::<u8>(Self::at(head, MARK)) == 0 || finished.contains(&head) {
                continue;
            }
            if head >= size {
                return Err(RecordError::Head { head, size });
            }
            marked.push((self.load::<u64>(Self::at(head, COUNTER)), head));
        }
        marked.sort_unstable();
        let waiting = available.wrapping_sub(used);
        let count = u16::try_from(marked.len()).ok().filter(|count| *count <= waiting);
        let Some(count) = count else {
            return Err(RecordError::Marks { marked: marked.len(), available: waiting });
        };
        self.clear(finished.iter().copied());
        self.store(USED_INDEX, used);
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered {
            replay: marked.into_iter().map(|(_, head)| head).collect(),
            next_available: used.wrapping_add(count),
        })
    }

    /// Makes a record of zeros one of a ring that stands at `used`. Its version says last that it
    /// is one: until then it is begun again.
    fn begin(&self, used: u16) {
        for head in 0..self.entries {
            self.store(Self::at(head, MARK), 0_u8);
        }
        self.store(FEATURES, 0_u64);
        self.store(ENTRIES, self.entries);
        self.store(LAST_HEAD, 0_u16);
        self.store(USED_INDEX, used);
        self.store(VERSION_AT, VERSION);
    }

    /// The heads of the batch that the guest has and that may still be marked.
    fn last_batch(&self, size: u16, used: u16) -> Result<Vec<u16>, RecordError> {
        let recorded: u16 = self.load(USED_INDEX);
        let count = used.wrapping_sub(recorded);
        if count > size {
            return Err(RecordError::UsedIndex { recorded, used, size });
        }
        let mut heads = Vec::with_capacity(usize::from(count));
        let mut head: u16 = self.load(LAST_HEAD);
        for _ in 0..count {
            if head >= size {
                return Err(RecordError::Head { head, size });
            }
            heads.push(head);
            head = self.load(Self::at(head, NEXT));
        }
        Ok(heads)
    }

    /// Marks a chain as under way. Its head is a descriptor of the ring.
    pub fn take(&mut self, head: u16) {
        self.store(Self::at(head, COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(Self::at(head, MARK), 1_u8);
    }

    /// Links chains that are done with; the used ring's index comes next.
    pub fn link(&self, batch: &[Used]) {
        let mut last: u16 = self.load(LAST_HEAD);
        for used in batch {
            self.store(Self::at(used.head, NEXT), last);
            last = used.head;
            self.store(LAST_HEAD, last);
        }
    }

    /// Says that the chains linked last are on the used ring, which is at `used` now.
    pub fn finish(&self, batch: &[Used], used: u16) {
        self.clear(batch.iter().map(|used| used.head));
        self.store(USED_INDEX, used);
    }

    fn clear(&self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.store(Self::at(head, MARK), 0_u8);
        }
    }
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "a test that is wrong may panic"
)]
#[path = "inflight_tests.rs"]
mod tests;
