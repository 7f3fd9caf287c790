//! Slices of tables: read without a lock, changed, written back, replaced.

use shuttle::future::block_on;
use shuttle::thread;

use super::table::{Slice, TableCache};
use crate::error::Error;
use crate::storage::Buf;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};

/// Words of a slice: two, so that half of one and half of another could be seen.
const WORDS: usize = 2;
/// How many slices the file has.
const SLICES: usize = 3;

/// A file of slices and the cache over it. Each word holds the number of its slice and how often it
/// was changed.
struct Tables {
    cache: TableCache,
    file: Mutex<[[u64; WORDS]; SLICES]>,
}

fn slice_of(word: u64) -> Slice {
    word >> 32
}

impl Tables {
    fn new() -> Self {
        let words = |slice| [(slice as u64) << 32; WORDS];
        let file = Mutex::new(std::array::from_fn(words));
        Self { cache: TableCache::of_slots(WORDS, 1), file }
    }

    fn load(&self, slice: Slice) {
        let read = async || {
            let words = lock(&self.file)[slice as usize];
            // The bytes are on their way.
            thread::yield_now();
            Ok(Buf::copy_of(&words.map(u64::to_ne_bytes).concat()))
        };
        block_on(self.cache.load(slice, read)).expect("a file that can be read");
    }

    /// Looks at a slice.
    fn peek(&self, slice: Slice) {
        let seen = self.cache.peek(slice, |words| {
            words.iter().map(|word| word.load(Ordering::Relaxed)).collect::<Vec<u64>>()
        });
        let Some(words) = seen else { return };
        assert!(slice_of(words[0]) == slice, "slice {slice} shows {words:x?}");
        assert!(words.iter().all(|&word| word == words[0]), "slice {slice} shows {words:x?}");
    }

    /// Adds one to both words of a slice, which is loaded as often as it takes.
    fn change(&self, slice: Slice) {
        let add = |words: &[AtomicU64]| {
            for word in words {
                word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
            Some(())
        };
        while self.cache.update(slice, add).is_none() {
            self.load(slice);
        }
    }

    /// What a flush does with the tables; there is one flush at a time.
    fn flush(&self) {
        for frozen in self.cache.freeze() {
            thread::yield_now();
            let words = frozen.bytes.chunks_exact(8);
            let words = words.map(|word| u64::from_ne_bytes(word.try_into().expect("eight")));
            let mut file = lock(&self.file);
            for (target, word) in file[frozen.slice as usize].iter_mut().zip(words) {
                *target = word;
            }
        }
        self.cache.thaw();
    }
}

/// Slices take turns in one slot while another thread looks at them.
///
/// # Panics
/// When a look at a slice shows words of another.
pub fn a_look_at_a_slice_never_shows_another() {
    let tables = Tables::new();
    tables.load(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            tables.load(1);
            tables.load(0);
        });
        scope.spawn(|| {
            tables.peek(0);
            tables.peek(1);
        });
    });
}

/// One thread changes both words of a slice while another looks at it.
///
/// # Panics
/// When a look shows one word changed and the other not.
pub fn a_look_at_a_slice_shows_all_of_a_change_or_none() {
    let tables = Tables::new();
    tables.load(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            tables.change(0);
            tables.change(0);
        });
        scope.spawn(|| {
            tables.peek(0);
            tables.peek(0);
        });
    });
}

/// Slices are changed, flushed and replaced while another thread looks at them.
///
/// # Panics
/// When a look at a slice shows words of another, or half of a change.
pub fn a_look_between_changes_and_flushes_is_sound() {
    let tables = Tables::new();
    tables.load(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            tables.load(1);
            tables.load(0);
        });
        scope.spawn(|| {
            tables.peek(0);
            tables.peek(1);
            tables.peek(0);
        });
        scope.spawn(|| {
            tables.change(0);
            tables.flush();
        });
    });
}

/// Two threads change one slice while it is flushed, replaced by another, and loaded again.
///
/// # Panics
/// When a change is gone in the end.
pub fn no_change_is_lost_between_cache_and_file() {
    let tables = Tables::new();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                tables.change(2);
                tables.change(2);
            });
        }
        scope.spawn(|| {
            tables.flush();
            tables.flush();
        });
        scope.spawn(|| {
            tables.load(0);
            tables.load(1);
        });
    });
    tables.flush();
    assert_eq!(lock(&tables.file)[2], [2 << 32 | 4; WORDS], "of four changes");
}

/// Three threads want a slice at once; the first read fails.
///
/// # Panics
/// When two read it at once, one reads it although it is cached, or one waits for ever.
pub fn one_load_serves_all_who_wait() {
    let cache = TableCache::of_slots(WORDS, 1);
    let (reading, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = || {
        let read = async || {
            assert!(!reading.swap(true, Ordering::SeqCst), "two read one slice at once");
            let number = reads.fetch_add(1, Ordering::SeqCst);
            reading.store(false, Ordering::SeqCst);
            if number == 0 {
                return Err(Error::refused("a slice", "the first read fails"));
            }
            Ok(Buf::copy_of(&[7; WORDS * 8]))
        };
        block_on(cache.load(1, read))
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                if load().is_err() {
                    load().expect("the first read fails, and no other");
                }
                assert!(cache.peek(1, |_| ()).is_some(), "nothing else wants its slot");
            });
        }
    });
    assert_eq!(reads.load(Ordering::SeqCst), 2, "one that failed, and one for all");
}
