//! Looks at a cached slice while it is replaced or changed.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use loom::thread;

use super::table::{Slice, TableCache};
use crate::storage::Buf;
use crate::sync::{AtomicU64, Ordering};

/// Words of a slice: two, so that half of one and half of another could be seen.
const WORDS: usize = 2;

/// Puts a slice into the cache whose words hold its number and `times`. Nobody else loads.
fn load(cache: &TableCache, slice: Slice, times: u64) {
    let word = slice << 32 | times;
    let read = async || Ok(Buf::copy_of(&[word; WORDS].map(u64::to_ne_bytes).concat()));
    let load = pin!(cache.load(slice, read));
    let done = load.poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(done, Poll::Ready(Ok(()))), "there is nothing to wait for");
}

fn change(cache: &TableCache, slice: Slice) {
    let add = |words: &[AtomicU64]| {
        for word in words {
            word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        Some(())
    };
    cache.update(slice, add).flatten().expect("it is cached");
}

fn look(cache: &TableCache, slice: Slice) -> Option<u64> {
    let words = cache.peek(slice, |words| {
        [words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)]
    })?;
    assert!(words[0] >> 32 == slice, "slice {slice} shows {words:x?}");
    assert!(words[0] == words[1], "slice {slice} shows {words:x?}");
    Some(words[0])
}

/// Runs both at once on a cache of one slot that holds slice 0. Both run in threads of their own:
/// the checker takes what the first thread does after a start for what it did before.
fn race(write: fn(&TableCache), look: fn(&TableCache)) {
    let cache = Arc::new(TableCache::of_slots(WORDS, 1));
    load(&cache, 0, 0);
    let spawn = |run: fn(&TableCache)| {
        let cache = Arc::clone(&cache);
        thread::spawn(move || run(&cache))
    };
    for thread in [spawn(write), spawn(look)] {
        thread.join().expect("a thread of the scenario");
    }
}

/// A slice takes the slot from another while both are looked at.
///
/// # Panics
/// When a look at one shows words of the other.
pub fn a_look_at_a_slice_never_shows_another() {
    let looks = |cache: &TableCache| {
        look(cache, 0);
        look(cache, 1);
    };
    race(|cache| load(cache, 1, 0), looks);
}

/// A slice leaves its slot and comes back to it with other words.
///
/// # Panics
/// When a look shows words of two stays, or of the slice between them.
pub fn a_look_at_a_slice_never_shows_two_stays() {
    let loads = |cache: &TableCache| {
        load(cache, 1, 0);
        load(cache, 0, 5);
    };
    race(loads, |cache| {
        look(cache, 0);
    });
}

/// Both words of a slice are changed while it is looked at.
///
/// # Panics
/// When a look shows one word changed and the other not, or an older change after a newer one.
pub fn a_look_at_a_slice_shows_all_of_a_change_or_none() {
    let looks = |cache: &TableCache| {
        let (first, second) = (look(cache, 0), look(cache, 0));
        assert!(second.is_none() || first <= second, "{first:?}, then {second:?}");
    };
    race(|cache| change(cache, 0), looks);
}
