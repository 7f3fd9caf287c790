//! A cache of table slices: lock-free hits, single-flight loads, dirty slices pinned.
//!
//! A slice is a piece (at most 4 KiB) of an L2 table or a refcount block, named by its number over
//! all tables, so that a slice keeps its name when its table moves. The directory, a radix tree of
//! atomics, says which slot holds a slice and in which generation. A reader looks up the directory,
//! reads words of the slot, and looks up the directory again: if it says the same, the words were
//! the slice's. Everything that changes a slice or a slot holds one mutex for a few instructions.
//! A change of words is framed by the slot's version, so that a reader sees all of it or none: an
//! entry may have two words.
//!
//! A slice that is dirty, or whose bytes are on their way to the file, never leaves the cache: only
//! a flush makes it clean, which is what keeps the write order in one place.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::error::Result;
use crate::storage::Buf;
use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, FAN_OUT_BITS, Mutex, OnceLock, Ordering, fence, lock,
};

const FAN_OUT: usize = 1 << FAN_OUT_BITS;
/// Slices that are always allowed, however small the budget.
const LEAST: usize = 64;

/// The number of a slice over all tables of one kind.
pub(super) type Slice = u64;

type Leaf = Box<[AtomicU64]>;
type Middle = Box<[OnceLock<Leaf>]>;

/// Slice number → generation and slot.
struct Directory(Box<[OnceLock<Middle>]>);

impl Directory {
    fn new() -> Self {
        Self((0..FAN_OUT).map(|_| OnceLock::new()).collect())
    }

    fn parts(slice: Slice) -> Option<(usize, usize, usize)> {
        let part = |shift: u32| usize::try_from(slice >> shift).ok();
        let top = part(2 * FAN_OUT_BITS).filter(|&top| top < FAN_OUT)?;
        Some((top, part(FAN_OUT_BITS)? % FAN_OUT, part(0)? % FAN_OUT))
    }

    fn get(&self, slice: Slice) -> Option<&AtomicU64> {
        let (top, middle, leaf) = Self::parts(slice)?;
        Some(&self.0[top].get()?[middle].get()?[leaf])
    }

    fn make(&self, slice: Slice) -> &AtomicU64 {
        let (top, middle, leaf) = Self::parts(slice).expect("the open path bounds the disk's size");
        let middles = self.0[top].get_or_init(|| (0..FAN_OUT).map(|_| OnceLock::new()).collect());
        let leaves =
            middles[middle].get_or_init(|| (0..FAN_OUT).map(|_| AtomicU64::new(0)).collect());
        &leaves[leaf]
    }
}

/// A directory word: 0 for nothing, else the generation and the slot's number plus one.
fn directory_word(generation: u32, slot: usize) -> u64 {
    u64::from(generation) << 32 | (slot as u64 + 1)
}

fn slot_of(word: u64) -> Option<usize> {
    let slot = usize::try_from(word & 0xffff_ffff).ok()?;
    slot.checked_sub(1)
}

#[derive(Default)]
struct Slot {
    words: OnceLock<Box<[AtomicU64]>>,
    /// Odd while words are being changed.
    version: AtomicU32,
    /// Set by readers when it is not set: the clock's second chance.
    used: AtomicBool,
}

#[derive(Clone, Copy, Default)]
struct Owner {
    slice: Option<Slice>,
    dirty: bool,
    writing: bool,
}

/// Slots, made in blocks as they are needed: when everything within the budget is dirty, more are
/// made beyond it, at most one for each request under way.
struct Slots(Box<[OnceLock<Box<[Slot]>>]>);

impl Slots {
    fn new() -> Self {
        Self((0..FAN_OUT).map(|_| OnceLock::new()).collect())
    }

    fn get(&self, slot: usize) -> &Slot {
        let block = || (0..FAN_OUT).map(|_| Slot::default()).collect();
        &self.0[slot >> FAN_OUT_BITS].get_or_init(block)[slot % FAN_OUT]
    }
}

struct State {
    owners: Vec<Owner>,
    hand: usize,
    dirty: usize,
    generation: u32,
    loading: HashMap<Slice, Vec<Waker>>,
}

/// A cache of slices of one kind of table.
pub(super) struct TableCache {
    words: usize,
    budget: usize,
    directory: Directory,
    slots: Slots,
    state: Mutex<State>,
}

/// The bytes of one dirty slice at the moment of a freeze.
pub(super) struct Frozen {
    pub(super) slice: Slice,
    pub(super) bytes: Vec<u8>,
}

impl TableCache {
    /// A cache of slices of `slice_size` bytes that keeps about `budget` bytes of them.
    pub(super) fn new(slice_size: u64, budget: u64) -> Self {
        let words = usize::try_from(slice_size / 8).expect("a slice is small");
        let budget = usize::try_from(budget / slice_size).unwrap_or(usize::MAX).max(LEAST);
        Self::of_slots(words, budget.min(1 << 22))
    }

    /// A cache that keeps about `budget` slices of so many words.
    pub(super) fn of_slots(words: usize, budget: usize) -> Self {
        let state =
            State { owners: Vec::new(), hand: 0, dirty: 0, generation: 0, loading: HashMap::new() };
        Self {
            words,
            budget,
            directory: Directory::new(),
            slots: Slots::new(),
            state: Mutex::new(state),
        }
    }

    /// A cache as large as this one, with nothing in it: for when slices belong to other tables.
    pub(super) fn emptied(&self) -> Self {
        Self::new(self.words as u64 * 8, (self.words as u64 * 8).saturating_mul(self.budget as u64))
    }

    /// Runs `read` on the words of a slice, big-endian as in the file; `None` when it is not
    /// cached, or was changed meanwhile. Takes no lock. `read` may see a slice that is just being
    /// replaced or changed: then its result is thrown away, so it must not trust what it reads
    /// beyond computing a result.
    pub(super) fn peek<R>(&self, slice: Slice, read: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let entry = self.directory.get(slice)?;
        let word = entry.load(Ordering::Acquire);
        let slot = self.slots.get(slot_of(word)?);
        let version = slot.version.load(Ordering::Acquire);
        let result = read(slot.words.get()?);
        fence(Ordering::Acquire);
        let same = slot.version.load(Ordering::Relaxed) == version && version.is_multiple_of(2);
        if !same || entry.load(Ordering::Relaxed) != word {
            return None;
        }
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(result)
    }

    /// Runs `change` on the words of a slice and marks it dirty when that returns `Some`; the
    /// outer `None` says that the slice is not cached.
    pub(super) fn update<R>(
        &self,
        slice: Slice,
        change: impl FnOnce(&[AtomicU64]) -> Option<R>,
    ) -> Option<Option<R>> {
        let mut state = lock(&self.state);
        let slot = slot_of(self.directory.get(slice)?.load(Ordering::Relaxed))?;
        let held = self.slots.get(slot);
        let version = held.version.load(Ordering::Relaxed);
        held.version.store(version.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees one of the new words sees the odd version too.
        fence(Ordering::Release);
        let result = held.words.get().and_then(|words| change(words));
        held.version.store(version.wrapping_add(2), Ordering::Release);
        let owner = &mut state.owners[slot];
        if result.is_some() && !owner.dirty {
            owner.dirty = true;
            state.dirty += 1;
        }
        Some(result)
    }

    /// Whether so much is dirty that a flush should come before more is made dirty.
    pub(super) fn is_crowded(&self) -> bool {
        lock(&self.state).dirty > self.budget / 2
    }

    /// Whether anything is dirty.
    pub(super) fn is_dirty(&self) -> bool {
        lock(&self.state).dirty > 0
    }

    /// Copies every dirty slice and marks it as being written; it stays in the cache until
    /// [`TableCache::thaw`].
    pub(super) fn freeze(&self) -> Vec<Frozen> {
        let mut state = lock(&self.state);
        let mut frozen = Vec::with_capacity(state.dirty);
        if state.dirty == 0 {
            return frozen;
        }
        for (slot, owner) in state.owners.iter_mut().enumerate() {
            let Some(slice) = owner.slice.filter(|_| owner.dirty) else { continue };
            let words = self.slots.get(slot).words.get().expect("an owned slot has words");
            let bytes = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes());
            frozen.push(Frozen { slice, bytes: bytes.collect() });
            (owner.dirty, owner.writing) = (false, true);
        }
        state.dirty = 0;
        frozen
    }

    /// Says that the frozen slices are in the file.
    pub(super) fn thaw(&self) {
        for owner in &mut lock(&self.state).owners {
            owner.writing = false;
        }
    }

    /// Makes sure that a slice is cached: at once, by waiting for another task's load, or by
    /// running `read`, which gives the slice's bytes.
    ///
    /// # Errors
    /// What `read` says; a task that waits for a load that fails tries its own.
    pub(super) async fn load<F>(&self, slice: Slice, read: impl FnOnce() -> F) -> Result<()>
    where
        F: Future<Output = Result<Buf>>,
    {
        loop {
            if self.is_cached(slice) {
                return Ok(());
            }
            if let Some(ticket) = self.start_load(slice) {
                let bytes = read().await?.to_vec();
                self.install(slice, &bytes);
                drop(ticket);
                return Ok(());
            }
            Loaded { cache: self, slice }.await;
        }
    }

    fn is_cached(&self, slice: Slice) -> bool {
        self.directory.get(slice).is_some_and(|entry| entry.load(Ordering::Acquire) != 0)
    }

    fn start_load(&self, slice: Slice) -> Option<LoadTicket<'_>> {
        let mut state = lock(&self.state);
        // Another task's load may have ended since the look. To read again would be to read bytes
        // that a flush is about to replace, and to install them when the newer ones are gone.
        if state.loading.contains_key(&slice) || self.is_cached(slice) {
            return None;
        }
        state.loading.insert(slice, Vec::new());
        Some(LoadTicket { cache: self, slice })
    }

    fn install(&self, slice: Slice, bytes: &[u8]) {
        let entry = self.directory.make(slice);
        let mut state = lock(&self.state);
        if entry.load(Ordering::Relaxed) != 0 {
            return;
        }
        let slot = self.take_slot(&mut state);
        if let Some(old) = state.owners[slot].slice.take()
            && let Some(old) = self.directory.get(old)
        {
            old.store(0, Ordering::Relaxed);
        }
        // A reader that sees one of the new words sees the cleared directory entry too.
        fence(Ordering::Release);
        let make = || (0..self.words).map(|_| AtomicU64::new(0)).collect();
        let words = self.slots.get(slot).words.get_or_init(make);
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
            let bytes = bytes.try_into().expect("chunks of eight");
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        state.generation = state.generation.wrapping_add(1);
        state.owners[slot].slice = Some(slice);
        entry.store(directory_word(state.generation, slot), Ordering::Release);
    }

    /// A slot to put a slice in: a new one within the budget, else one that is clean and was not
    /// used since the clock's hand came by, else a new one beyond the budget.
    fn take_slot(&self, state: &mut State) -> usize {
        if state.owners.len() >= self.budget {
            for _ in 0..2 * state.owners.len() {
                let slot = state.hand;
                state.hand = (state.hand + 1) % state.owners.len();
                let owner = state.owners[slot];
                if owner.dirty || owner.writing {
                    continue;
                }
                if !self.slots.get(slot).used.swap(false, Ordering::Relaxed) {
                    return slot;
                }
            }
        }
        state.owners.push(Owner::default());
        state.owners.len() - 1
    }
}

/// The right and duty to load one slice; dropping it wakes those who wait.
struct LoadTicket<'a> {
    cache: &'a TableCache,
    slice: Slice,
}

impl Drop for LoadTicket<'_> {
    fn drop(&mut self) {
        let waiters = lock(&self.cache.state).loading.remove(&self.slice);
        waiters.into_iter().flatten().for_each(Waker::wake);
    }
}

/// Waits until nobody loads a slice.
struct Loaded<'a> {
    cache: &'a TableCache,
    slice: Slice,
}

impl Future for Loaded<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match lock(&self.cache.state).loading.get_mut(&self.slice) {
            Some(waiters) => {
                waiters.push(context.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn ready<F: Future>(future: F) -> F::Output {
        crate::exec::block_on(future, || true)
    }

    fn load(cache: &TableCache, slice: Slice, byte: u8) {
        let bytes = async || Ok(Buf::copy_of(&[byte; 512]));
        ready(cache.load(slice, bytes)).expect("a load from memory");
    }

    fn first(cache: &TableCache, slice: Slice) -> Option<u64> {
        cache.peek(slice, |words| words[0].load(Ordering::Relaxed))
    }

    #[test]
    fn a_dirty_slice_stays_while_clean_ones_come_and_go() {
        let cache = TableCache::new(512, 0);
        load(&cache, 5, 5);
        cache.update(5, |words| Some(words[0].swap(77, Ordering::Relaxed)));
        for slice in 100..1100 {
            load(&cache, slice, 1);
        }
        assert_eq!(first(&cache, 5), Some(77));
        assert!(lock(&cache.state).owners.len() <= LEAST, "clean slices were replaced");
        let frozen = cache.freeze();
        assert_eq!(frozen.len(), 1);
        for slice in 2000..3000 {
            load(&cache, slice, 1);
        }
        assert_eq!(first(&cache, 5), Some(77), "a slice being written must not be reloaded");
        cache.thaw();
        for slice in 3000..4000 {
            load(&cache, slice, 1);
        }
        assert_eq!(first(&cache, 5), None);
    }

    #[test]
    fn one_load_serves_all_who_wait_and_a_failed_one_is_tried_again() {
        let cache = TableCache::new(512, 0);
        let ticket = cache.start_load(9).expect("nobody loads yet");
        let mut other = std::pin::pin!(cache.load(9, async || Ok(Buf::copy_of(&[3; 512]))));
        let mut context = Context::from_waker(Waker::noop());
        assert!(other.as_mut().poll(&mut context).is_pending());
        drop(ticket);
        assert!(other.as_mut().poll(&mut context).is_ready());
        let fails = async || Err(Error::refused("test", "no"));
        assert!(ready(cache.load(10, fails)).is_err());
        load(&cache, 10, 4);
        assert_eq!(first(&cache, 10), Some(u64::from_ne_bytes([4; 8])));
    }

    #[test]
    fn a_slice_that_was_loaded_meanwhile_is_not_read_again() {
        let cache = TableCache::new(512, 0);
        load(&cache, 9, 3);
        assert!(cache.start_load(9).is_none(), "the look came before the load, this after it");
        let mut waits = std::pin::pin!(Loaded { cache: &cache, slice: 9 });
        assert!(waits.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }

    #[test]
    fn slices_of_a_huge_disk_have_a_place() {
        let cache = TableCache::new(512, 0);
        load(&cache, (1 << 36) - 1, 8);
        assert!(first(&cache, (1 << 36) - 1).is_some());
        assert!(first(&cache, 1 << 36).is_none());
    }
}
