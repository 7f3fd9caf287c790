//! A crash between any two stores, and records that nobody sane has written.

use std::collections::BTreeSet;

use virtio_queue::QueueState;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::blk::memory::Finder;
use crate::blk::token::{Status, Token};
use crate::sync::{Mutex, lock};
use crate::worker::queue::{Ring, RingSetup};

/// Where the rings are; the descriptor table is at zero and is never looked into here.
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0x1_0000;
const MEMORY: usize = 0x2_0000;

impl Record {
    pub(super) fn observe(&self) {
        if let Some(observer) = &self.observer {
            observer();
        }
    }
}

fn mapping(bytes: &[u8]) -> Arc<MmapRegion> {
    let memory = MmapRegion::new(bytes.len()).expect("memory");
    memory.get_slice(0, bytes.len()).expect("all of it").copy_from(bytes);
    Arc::new(memory)
}

fn bytes_of(memory: &MmapRegion) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.get_slice(0, memory.len()).expect("all of it").copy_to(&mut bytes[..]);
    bytes
}

/// The guest's part of a ring: who waits for what.
#[derive(Clone)]
struct Guest {
    memory: GuestMemoryMmap,
    size: u16,
}

impl Guest {
    fn new(size: u16, index: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let guest = Self { memory, size };
        guest.store(AVAILABLE + 2, index);
        guest.store(USED + 2, index);
        guest
    }

    fn store(&self, at: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(at)).expect("inside");
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(at)).expect("inside"))
    }

    fn offer(&self, head: u16) {
        let index = self.load(AVAILABLE + 2);
        self.store(AVAILABLE + 4 + u64::from(index % self.size) * 2, head);
        self.store(AVAILABLE + 2, index.wrapping_add(1));
    }

    fn used(&self) -> u16 {
        self.load(USED + 2)
    }

    /// What lies in the rings.
    fn image(&self) -> Vec<u8> {
        let ring = usize::from(self.size) * 8 + 8;
        let mut bytes = vec![0; 2 * ring];
        let (available, used) = bytes.split_at_mut(ring);
        self.memory.read_slice(available, GuestAddress(AVAILABLE)).expect("inside");
        self.memory.read_slice(used, GuestAddress(USED)).expect("inside");
        bytes
    }

    fn of_image(size: u16, bytes: &[u8]) -> Self {
        let guest = Self::new(size, 0);
        let (available, used) = bytes.split_at(bytes.len() / 2);
        guest.memory.write_slice(available, GuestAddress(AVAILABLE)).expect("inside");
        guest.memory.write_slice(used, GuestAddress(USED)).expect("inside");
        guest
    }

    fn ring(&self, record: Record) -> Result<Ring, String> {
        let state = QueueState {
            max_size: self.size,
            size: self.size,
            // What cloud-hypervisor tells, and what would lose everything that is under way.
            next_avail: self.load(AVAILABLE + 2),
            next_used: 0,
            event_idx_enabled: false,
            ready: true,
            desc_table: 0,
            avail_ring: AVAILABLE,
            used_ring: USED,
        };
        let (kick, call, error) = (None, None, None);
        let setup = RingSetup { state, kick, call, error, has_flush: true, inflight: Some(record) };
        Ring::new(0, setup, &self.memory).map_err(|error| error.to_string())
    }

    fn pop(&self, ring: &mut Ring, most: usize, taken: &mut Vec<(u16, Token)>) -> usize {
        let room = std::cell::Cell::new(most);
        let count = ring.pop(
            &Finder::new(&self.memory),
            || room.get() > 0,
            |chain, completions| {
                room.set(room.get() - 1);
                let head = chain.head();
                taken.push((head, Token::new(completions, Used { head, len: 0 }, None)));
            },
        );
        count.expect("a sound ring")
    }
}

/// What a crash at one moment leaves: the rings, the record, and what the driver knows of.
#[derive(PartialEq)]
struct Crash {
    rings: Vec<u8>,
    record: Vec<u8>,
}

/// A daemon's life with one ring; every moment of it is noted.
struct Life {
    guest: Guest,
    record: Arc<MmapRegion>,
    ring: Ring,
    taken: Vec<(u16, Token)>,
    /// Heads in the order in which they were made available, and in which they were answered.
    offered: Vec<u16>,
    answered: Vec<u16>,
    crashes: Arc<Mutex<Vec<Crash>>>,
}

impl Life {
    fn begin(guest: Guest, record: &[u8], watch: bool) -> Self {
        let memory = mapping(record);
        let crashes = Arc::new(Mutex::new(Vec::new()));
        let mut record = Record::new(Arc::clone(&memory), 0, guest.size).expect("it fits");
        if watch {
            let (guest, memory, list) = (guest.clone(), Arc::clone(&memory), Arc::clone(&crashes));
            record.observer = Some(Box::new(move || {
                let crash = Crash { rings: guest.image(), record: bytes_of(&memory) };
                // Stores that change nothing leave what was tried already.
                let mut list = lock(&list);
                if list.last() != Some(&crash) {
                    list.push(crash);
                }
            }));
        }
        let ring = guest.ring(record).expect("a sound record");
        let (taken, offered, answered) = (Vec::new(), Vec::new(), Vec::new());
        Self { guest, record: memory, ring, taken, offered, answered, crashes }
    }

    /// One step at random: the driver offers, the worker pops, requests end in any order.
    fn step(&mut self, random: &mut fastrand::Rng) {
        let waiting: BTreeSet<u16> = self.waiting(self.answered.len()).into_iter().collect();
        let free: Vec<u16> = (0..self.guest.size).filter(|head| !waiting.contains(head)).collect();
        for _ in 0..random.usize(0..=free.len().min(9)) {
            let head = free[random.usize(..free.len())];
            if !self.waiting(self.answered.len()).contains(&head) {
                self.guest.offer(head);
                self.offered.push(head);
            }
        }
        self.guest.pop(&mut self.ring, random.usize(0..8), &mut self.taken);
        for _ in 0..random.usize(0..=self.taken.len()) {
            let (head, token) = self.taken.swap_remove(random.usize(..self.taken.len()));
            token.complete(Status::Ok);
            self.answered.push(head);
        }
        self.ring.publish(&Finder::new(&self.guest.memory)).expect("a sound ring");
    }

    /// Heads that wait when so many answers were seen.
    fn waiting(&self, answers: usize) -> Vec<u16> {
        let mut waiting = self.offered.clone();
        for head in &self.answered[..answers] {
            let place = waiting.iter().position(|other| other == head).expect("it was offered");
            waiting.remove(place);
        }
        waiting
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.ring.completions.abandon();
    }
}

/// Lets a successor live on after a crash: it must take exactly the chains that wait.
fn recover(size: u16, crash: &Crash, expected: &[u16], watch: bool) -> Vec<Crash> {
    let guest = Guest::of_image(size, &crash.rings);
    let mut life = Life::begin(guest.clone(), &crash.record, watch);
    while guest.pop(&mut life.ring, 8, &mut life.taken) > 0 {}
    let mut heads: Vec<u16> = life.taken.iter().map(|(head, _)| *head).collect();
    heads.sort_unstable();
    assert_eq!(heads, expected, "what is taken after a crash");
    assert_eq!(life.ring.next_available(), guest.load(AVAILABLE + 2));
    while let Some((_, token)) = life.taken.pop() {
        token.complete(Status::Ok);
    }
    let before = guest.used();
    life.ring.publish(&Finder::new(&guest.memory)).expect("a sound ring");
    assert_eq!(usize::from(guest.used().wrapping_sub(before)), expected.len());
    assert!(life.ring.is_drained());
    // A third one finds nothing to do.
    let mut record = Record::new(Arc::clone(&life.record), 0, size).expect("it fits");
    let recovered = record.recover(size, guest.used(), guest.load(AVAILABLE + 2));
    let next_available = guest.used();
    assert_eq!(recovered, Ok(Recovered { replay: VecDeque::new(), next_available }));
    std::mem::take(&mut *lock(&life.crashes))
}

/// Runs a life, ends it between any two stores, and does the same with some of the recoveries.
fn crash_everywhere(seed: u64, size: u16, index: u16, steps: usize) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let guest = Guest::new(size, index);
    let mut life = Life::begin(guest, &vec![0; stride(size)], true);
    let mut tried = 0;
    for _ in 0..steps {
        life.step(&mut random);
        for crash in std::mem::take(&mut *lock(&life.crashes)) {
            // The driver's view at that moment.
            let guest = Guest::of_image(size, &crash.rings);
            let answers = guest.used().wrapping_sub(index);
            let offers = guest.load(AVAILABLE + 2).wrapping_sub(index);
            let mut then = life.offered[..usize::from(offers)].to_vec();
            for head in &life.answered[..usize::from(answers)] {
                let place = then.iter().position(|other| other == head).expect("offered");
                then.remove(place);
            }
            then.sort_unstable();
            tried += 1;
            let watch = random.u16(..size.max(16)) == 0;
            for again in recover(size, &crash, &then, watch) {
                let used = Guest::of_image(size, &again.rings).used().wrapping_sub(index);
                // The second life answers everything with one batch.
                let left = if used == answers { &then[..] } else { &[] };
                tried += 1;
                recover(size, &again, left, false);
            }
        }
    }
    tried
}

#[test]
fn a_crash_between_any_two_stores_loses_nothing_and_repeats_no_answer() {
    let mut tried = 0;
    for (size, index, steps) in [(2, 0, 60), (4, 65_533, 60), (8, 65_500, 60), (64, 65_530, 30)] {
        for seed in 0..3 {
            eprintln!("size {size}, seed {seed}");
            tried += crash_everywhere(seed, size, index, steps);
        }
    }
    eprintln!("{tried} crashes");
    assert!(tried > 3000, "{tried} crashes");
    crash_everywhere(9, 1024, 65_000, 6);
}

#[test]
fn a_full_ring_is_taken_again_in_its_order() {
    for size in [2, 64, 1024, 32_768] {
        let start = 65_530;
        let memory = mapping(&vec![0; stride(size)]);
        let mut record = Record::new(Arc::clone(&memory), 0, size).expect("it fits");
        let fresh = record.recover(size, start, start).expect("a fresh record");
        assert_eq!(fresh, Recovered { replay: VecDeque::new(), next_available: start });
        let order: Vec<u16> = (0..size).map(|head| head ^ 1).collect();
        order.iter().for_each(|head| record.take(*head));
        let end = start.wrapping_add(size);
        let mut record = Record::new(memory, 0, size).expect("it fits");
        let recovered = record.recover(size, start, end).expect("a sound record");
        assert_eq!(recovered.replay, order);
        assert_eq!(recovered.next_available, end);
    }
}

#[test]
fn a_fresh_record_takes_the_rings_index_and_clears_nothing_wrongly() {
    let memory = mapping(&vec![0; stride(8)]);
    let mut record = Record::new(Arc::clone(&memory), 0, 8).expect("it fits");
    assert_eq!(record.recover(8, 500, 503).expect("fresh").next_available, 500);
    record.take(0);
    let mut record = Record::new(memory, 0, 8).expect("it fits");
    assert_eq!(record.recover(8, 500, 503).expect("sound").replay, [0]);
}

#[test]
fn what_contradicts_the_ring_is_refused_and_left_alone() {
    type Change = fn(&Record);
    let size = 8;
    let cases: [(Change, RecordError); 9] = [
        (|record| record.store(VERSION_AT, 2_u16), RecordError::Layout { version: 2, features: 0 }),
        (|record| record.store(FEATURES, 1_u64), RecordError::Layout { version: 1, features: 1 }),
        (|record| record.store(ENTRIES, 4_u16), RecordError::Size { entries: 4, size }),
        (|record| record.store(ENTRIES, 9_u16), RecordError::Size { entries: 8, size }),
        (
            |record| record.store(USED_INDEX, 101_u16),
            RecordError::UsedIndex { recorded: 101, used: 100, size },
        ),
        (
            |record| record.store(USED_INDEX, 91_u16),
            RecordError::UsedIndex { recorded: 91, used: 100, size },
        ),
        (
            |record| {
                record.store(USED_INDEX, 99_u16);
                record.store(LAST_HEAD, 8_u16);
            },
            RecordError::Head { head: 8, size },
        ),
        (
            |record| {
                record.store(USED_INDEX, 98_u16);
                record.store(Record::at(0, NEXT), 65_535_u16);
            },
            RecordError::Head { head: 65_535, size },
        ),
        (
            |record| (2..5).for_each(|head| record.store(Record::at(head, MARK), 1_u8)),
            RecordError::Marks { marked: 4, available: 3 },
        ),
    ];
    for (change, expected) in cases {
        let memory = mapping(&vec![0; stride(size)]);
        let mut record = Record::new(Arc::clone(&memory), 0, size).expect("it fits");
        record.recover(size, 100, 103).expect("fresh");
        record.take(1);
        change(&record);
        let before = bytes_of(&memory);
        assert_eq!(record.recover(size, 100, 103), Err(expected));
        assert_eq!(bytes_of(&memory), before);
    }
}

#[test]
fn a_ring_may_be_smaller_than_its_record_and_not_larger() {
    let memory = mapping(&vec![0; stride(128)]);
    let mut record = Record::new(Arc::clone(&memory), 0, 128).expect("it fits");
    record.recover(64, 0, 0).expect("a small ring");
    let error = RecordError::Size { entries: 128, size: 256 };
    assert_eq!(record.recover(256, 0, 0), Err(error));
    record.take(100);
    assert_eq!(record.recover(64, 0, 1), Err(RecordError::Head { head: 100, size: 64 }));
    assert!(Record::new(Arc::clone(&memory), 0, 256).is_none(), "it would reach beyond");
    assert!(Record::new(Arc::clone(&memory), 8, 16).is_none(), "it is not aligned");
    assert!(Record::new(memory, usize::MAX - 63, 16).is_none(), "it wraps");
}

#[test]
fn any_bytes_are_refused_or_give_heads_of_the_ring() {
    let mut random = fastrand::Rng::with_seed(7);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..20_000 {
        let size = 1 << random.u16(1..6);
        let memory = mapping(&vec![0; stride(size)]);
        let mut record = Record::new(Arc::clone(&memory), 0, size).expect("it fits");
        record.recover(size, 7, 7).expect("fresh");
        for _ in 0..random.usize(0..6) {
            let near = random.u16(..size + 2);
            let (head, value) =
                (random.u16(..size), if random.bool() { near } else { random.u16(..) });
            match random.u8(..8) {
                0 => record.store(LAST_HEAD, value),
                1 => record.store(USED_INDEX, value),
                2 => record.store(Record::at(head, COUNTER), random.u64(..)),
                3 if random.u8(..20) == 0 => record.store(VERSION_AT, value),
                4 => record.store(Record::at(head, MARK), random.u8(..)),
                _ => record.store(Record::at(head, NEXT), value),
            }
        }
        let (used, waiting) = (random.u16(..12), random.u16(..=size));
        match record.recover(size, used, used.wrapping_add(waiting)) {
            Err(_) => refused += 1,
            Ok(recovered) => {
                taken += recovered.replay.len();
                let heads: BTreeSet<u16> = recovered.replay.iter().copied().collect();
                assert_eq!(heads.len(), recovered.replay.len());
                assert!(
                    heads.iter().all(|head| *head < size) && heads.len() <= usize::from(waiting)
                );
            }
        }
    }
    assert!(refused > 1000 && taken > 1000, "{refused} refused, {taken} taken");
}
