//! A cache of inflated clusters: guests read 4 KiB at a time, and each such read of a compressed
//! cluster would inflate all of it again.
//!
//! One cache serves all layers of a disk and all workers. Entries are found by where the compressed
//! bytes lie. A host cluster may be freed and others' compressed bytes come to lie in the same
//! place, so entries go just before such bytes are linked. By then every request that could have
//! seen the old entry of the L2 table has ended (R7 of `ORDERING.md`), so nobody puts it back; a
//! load that is under way against all rules, of an image that contradicts itself, is marked and not
//! kept.
//!
//! Locks are held for a look-up, never while a cluster is read or inflated: the first who asks for
//! a cluster loads it, others wait for that.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Bound::{Excluded, Unbounded};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::error::Result;
use crate::qcow2::format::Compressed;
use crate::storage::FileId;
use crate::sync::{Arc, AtomicU64, CacheLine, Mutex, Ordering, lock};

/// log2 of the parts that have locks of their own.
const SHARD_BITS: u32 = 4;

/// Bytes of inflated clusters that a disk keeps in memory, over all of its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflatedBytes(pub u64);

impl Default for InflatedBytes {
    /// 16 MiB: 256 clusters of the usual size.
    fn default() -> Self {
        Self(16 << 20)
    }
}

/// Where compressed bytes lie: file, first byte, length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key(FileId, u64, u64);

enum Slot {
    /// Somebody loads it. `stale` says that the place was written to meanwhile.
    Loading { waiters: Vec<Waker>, stale: bool },
    /// `used` is the clock's second chance; the first read leaves it unset, so that what is read
    /// once from end to end goes before what is read again and again.
    Ready { cluster: Arc<Vec<u8>>, used: bool },
}

#[derive(Default)]
struct Shard {
    slots: BTreeMap<Key, Slot>,
    /// Where the clock's hand points: the last key it has passed.
    hand: Option<Key>,
}

impl Shard {
    /// Takes one entry out that was not used since the hand came by; returns its bytes.
    fn evict(&mut self) -> Option<u64> {
        for _ in 0..2 * self.slots.len() {
            let behind = self.hand.map_or(Unbounded, Excluded);
            let next = self.slots.range((behind, Unbounded)).next();
            let Some((&key, _)) = next.or_else(|| self.slots.first_key_value()) else { break };
            self.hand = Some(key);
            match self.slots.get_mut(&key) {
                Some(Slot::Ready { used, .. }) if *used => *used = false,
                Some(Slot::Ready { cluster, .. }) => {
                    let bytes = cluster.len() as u64;
                    self.slots.remove(&key);
                    return Some(bytes);
                }
                _ => {}
            }
        }
        None
    }

    /// Takes out what overlaps a range of a file, where nothing is longer than `reach`; returns
    /// the bytes of it.
    fn forget(&mut self, file: FileId, range: &Range<u64>, reach: u64) -> u64 {
        let from = Key(file, range.start.saturating_sub(reach), 0);
        let overlap = self.slots.range_mut(from..Key(file, range.end, 0));
        let overlap = overlap.filter(|(key, _)| key.1.saturating_add(key.2) > range.start);
        let (mut bytes, mut gone) = (0, Vec::new());
        for (key, slot) in overlap {
            match slot {
                Slot::Loading { stale, .. } => *stale = true,
                Slot::Ready { cluster, .. } => {
                    bytes += cluster.len() as u64;
                    gone.push(*key);
                }
            }
        }
        for key in gone {
            self.slots.remove(&key);
        }
        bytes
    }
}

/// The inflated clusters of one disk.
pub(crate) struct Inflated {
    shards: Box<[CacheLine<Mutex<Shard>>]>,
    budget: u64,
    /// Bytes of all entries.
    held: AtomicU64,
    /// Counts evictions, so that every shard has its turn.
    turn: AtomicU64,
}

/// What there is to do for a reader.
enum Found<'a> {
    Cluster(Arc<Vec<u8>>),
    Load(Ticket<'a>),
    Wait,
}

impl Inflated {
    /// An empty cache that holds at most `budget` bytes.
    pub(crate) fn new(InflatedBytes(budget): InflatedBytes) -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| CacheLine::default()).collect();
        Self { shards, budget, held: AtomicU64::new(0), turn: AtomicU64::new(0) }
    }

    fn shard(&self, key: &Key) -> &Mutex<Shard> {
        // Fibonacci hashing: neighbours in the file get different shards.
        let hash = (key.1 >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SHARD_BITS);
        &self.shards[usize::try_from(hash).expect("a few bits")].0
    }

    /// The inflated cluster that lies compressed at `place`: at once, by waiting for another
    /// task's load, or by running `load`.
    ///
    /// # Errors
    /// What `load` says; a task that waits for a load that fails tries its own.
    pub(crate) async fn get<F>(
        &self,
        file: FileId,
        place: Compressed,
        load: impl FnOnce() -> F,
    ) -> Result<Arc<Vec<u8>>>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        let key = Key(file, place.at.0, place.bytes);
        loop {
            match self.find(key) {
                Found::Cluster(cluster) => return Ok(cluster),
                Found::Load(ticket) => {
                    let cluster = Arc::new(load().await?);
                    self.keep(key, &cluster);
                    drop(ticket);
                    return Ok(cluster);
                }
                Found::Wait => Loaded { cache: self, key }.await,
            }
        }
    }

    fn find(&self, key: Key) -> Found<'_> {
        let mut shard = lock(self.shard(&key));
        match shard.slots.get_mut(&key) {
            Some(Slot::Ready { cluster, used }) => {
                *used = true;
                Found::Cluster(Arc::clone(cluster))
            }
            Some(Slot::Loading { .. }) => Found::Wait,
            None => {
                let slot = Slot::Loading { waiters: Vec::new(), stale: false };
                shard.slots.insert(key, slot);
                Found::Load(Ticket { cache: self, key })
            }
        }
    }

    /// Turns a load into an entry, unless it must not or cannot be kept.
    fn keep(&self, key: Key, cluster: &Arc<Vec<u8>>) {
        let bytes = cluster.len() as u64;
        let mut shard = lock(self.shard(&key));
        let fresh = matches!(shard.slots.get(&key), Some(Slot::Loading { stale: false, .. }));
        if !fresh || bytes > self.budget {
            return;
        }
        // Counted first: whoever takes the entry out must not count below zero.
        self.held.fetch_add(bytes, Ordering::Relaxed);
        let slot = Slot::Ready { cluster: Arc::clone(cluster), used: false };
        let before = shard.slots.insert(key, slot);
        drop(shard);
        if let Some(Slot::Loading { waiters, .. }) = before {
            waiters.into_iter().for_each(Waker::wake);
        }
        self.shrink();
    }

    /// Evicts until the budget is kept.
    fn shrink(&self) {
        let mut idle = 0;
        while self.held.load(Ordering::Relaxed) > self.budget && idle < self.shards.len() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) & ((1 << SHARD_BITS) - 1);
            let shard = &self.shards[usize::try_from(turn).expect("a few bits")].0;
            match lock(shard).evict() {
                Some(bytes) => {
                    self.held.fetch_sub(bytes, Ordering::Relaxed);
                    idle = 0;
                }
                None => idle += 1,
            }
        }
    }

    /// Drops whatever overlaps a range of a file: other bytes lie there from now on. Nothing
    /// compressed in the file is longer than `reach` bytes.
    pub(crate) fn forget(&self, file: FileId, range: Range<u64>, reach: u64) {
        for shard in &self.shards {
            let gone = lock(&shard.0).forget(file, &range, reach);
            self.held.fetch_sub(gone, Ordering::Relaxed);
        }
    }
}

/// The right and duty to load one cluster; when it is dropped without a cluster, the next one who
/// waits may try.
struct Ticket<'a> {
    cache: &'a Inflated,
    key: Key,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut shard = lock(self.cache.shard(&self.key));
        if !matches!(shard.slots.get(&self.key), Some(Slot::Loading { .. })) {
            return;
        }
        let slot = shard.slots.remove(&self.key);
        drop(shard);
        if let Some(Slot::Loading { waiters, .. }) = slot {
            waiters.into_iter().for_each(Waker::wake);
        }
    }
}

/// Waits until nobody loads a cluster.
struct Loaded<'a> {
    cache: &'a Inflated,
    key: Key,
}

impl Future for Loaded<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match lock(self.cache.shard(&self.key)).slots.get_mut(&self.key) {
            Some(Slot::Loading { waiters, .. }) => {
                waiters.push(context.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::error::Error;

    const FILE: FileId = FileId(3);

    fn place(at: u64) -> Compressed {
        Compressed { at: HostOffset(at), bytes: 512 }
    }

    fn ready<F: Future>(future: F) -> F::Output {
        crate::exec::block_on(future, || true)
    }

    /// Reads through the cache; says whether that loaded.
    fn read(cache: &Inflated, at: u64, byte: u8) -> (u8, bool) {
        let mut loaded = false;
        let load = async || {
            loaded = true;
            Ok(vec![byte; 4096])
        };
        let cluster = ready(cache.get(FILE, place(at), load)).expect("from memory");
        (cluster[0], loaded)
    }

    #[test]
    fn a_place_that_was_written_to_is_loaded_again_and_its_neighbours_are_not() {
        let cache = Inflated::new(InflatedBytes(1 << 20));
        for at in [1000, 4095, 4096, 8191, 8192] {
            read(&cache, at, 1);
        }
        cache.forget(FileId(4), 0..1 << 20, 8192);
        cache.forget(FILE, 4096..8192, 8192);
        cache.forget(FILE, 100_000..104_096, 8192);
        let expected = [(1000, 1), (4095, 2), (4096, 2), (8191, 2), (8192, 1)];
        for (at, byte) in expected {
            assert_eq!(read(&cache, at, 2), (byte, byte == 2), "at {at}");
        }
        assert_eq!(cache.held.load(Ordering::Relaxed), 5 * 4096);
    }

    #[test]
    fn the_budget_is_kept_and_what_is_used_again_stays() {
        let cache = Inflated::new(InflatedBytes(64 * 4096));
        read(&cache, 0, 1);
        for step in 1..4000 {
            read(&cache, step * 512, 1);
            assert!(!read(&cache, 0, 1).1, "evicted after {step} others");
            assert!(cache.held.load(Ordering::Relaxed) <= 64 * 4096);
        }
        let kept: usize = cache.shards.iter().map(|shard| lock(&shard.0).slots.len()).sum();
        assert_eq!(kept, 64);
        let none = Inflated::new(InflatedBytes(4095));
        assert!(read(&none, 0, 1).1 && read(&none, 0, 1).1);
        assert_eq!(none.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn one_load_serves_all_who_wait_and_a_failed_one_is_tried_again() {
        let cache = Inflated::new(InflatedBytes::default());
        let key = Key(FILE, 0, 512);
        let Found::Load(ticket) = cache.find(key) else { panic!("nobody loads yet") };
        let mut other = std::pin::pin!(cache.get(FILE, place(0), async || Ok(vec![2; 4096])));
        let mut context = Context::from_waker(Waker::noop());
        assert!(other.as_mut().poll(&mut context).is_pending());
        cache.keep(key, &Arc::new(vec![1; 4096]));
        drop(ticket);
        let Poll::Ready(Ok(cluster)) = other.as_mut().poll(&mut context) else { panic!("ready") };
        assert_eq!(cluster[0], 1, "the first one's load");
        let fails = async || Err(Error::refused("test", "no"));
        assert!(ready(cache.get(FILE, place(512), fails)).is_err());
        assert_eq!(read(&cache, 512, 4), (4, true));
    }

    #[test]
    fn a_load_of_a_place_that_is_written_to_meanwhile_is_not_kept() {
        let cache = Inflated::new(InflatedBytes::default());
        let key = Key(FILE, 512, 512);
        let Found::Load(ticket) = cache.find(key) else { panic!("nobody loads yet") };
        cache.forget(FILE, 0..4096, 8192);
        cache.keep(key, &Arc::new(vec![1; 4096]));
        drop(ticket);
        assert_eq!(read(&cache, 512, 2), (2, true));
    }
}
