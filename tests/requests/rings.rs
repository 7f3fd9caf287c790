//! The ring itself: indices, notifications, what breaks it, and how it is given back.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;

use vhost_user_qcow2::blk::serve::Context;
use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::raw::Raw;
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};
use vhost_user_qcow2::storage::{Engine, FileId, Lane, Limits, Op, Pending, Purpose, Storage};
use vhost_user_qcow2::worker::inflight::{Record, stride};
use vhost_user_qcow2::worker::queue::RingSetup;
use vhost_user_qcow2::worker::{GuestMemory, worker};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};
use vmm_sys_util::event::EventNotifier;

use super::bench::{
    BORDER, Bench, DATA, DISCARD, DISK, GET_ID, HEADER, HOLE, Options, RINGS, STATUS, TABLE,
    WRITE_ZEROES, bench, pattern, segment,
};
use super::driver::{Driver, FLUSH, IN, OUT, UNTOUCHED, event, header, was_signalled};

#[test]
fn indices_wrap_around() {
    for (size, event_idx) in [(4, false), (4, true), (64, true), (1024, false)] {
        let start = 65_530;
        let mut bench = bench(Options { size, event_idx, start, ..Options::default() });
        for round in 0..200u64 {
            bench.driver.want_used(bench.driver.seen);
            bench.driver.write(DATA, &[round as u8; 512]);
            assert_eq!(bench.request(OUT, round, &[(DATA, 512, false)]), 0);
            assert!(was_signalled(&bench.call), "round {round} of {size}");
        }
        assert_eq!(bench.driver.seen, start.wrapping_add(200));
        let content = bench.disk.content(bench.file);
        assert!((0..200).all(|sector| content[sector * 512 + 100] == sector as u8));
    }
}

#[test]
fn a_guest_is_told_when_it_wants_to_be_and_once_for_a_batch() {
    let mut bench = bench(Options { event_idx: true, ..Options::default() });
    bench.driver.write(HEADER, &header(FLUSH, 0));
    let flush = [(HEADER, 16, false), (STATUS, 1, true)];
    // Not before the fifth is done.
    bench.driver.want_used(4);
    for done in 1..=8 {
        bench.driver.send(&flush);
        bench.run();
        assert_eq!(was_signalled(&bench.call), done == 5, "after {done}");
    }
    // Somewhere in the batch: once.
    bench.driver.want_used(10);
    for _ in 0..6 {
        bench.driver.send(&flush);
    }
    bench.run();
    assert!(was_signalled(&bench.call) && !was_signalled(&bench.call));
    assert_eq!(bench.driver.used().len(), 14);
}

#[test]
fn without_event_idx_the_guests_flag_is_obeyed() {
    let mut bench = bench(Options::default());
    bench.driver.write(HEADER, &header(FLUSH, 0));
    for quiet in [0, 1, 0] {
        bench.driver.store(bench.driver.available_ring(), quiet);
        bench.driver.send(&[(HEADER, 16, false), (STATUS, 1, true)]);
        bench.run();
        assert_eq!(bench.driver.used().len(), 1);
        assert_eq!(was_signalled(&bench.call), quiet == 0);
    }
}

#[test]
fn kicks_are_asked_for_only_before_sleeping_and_a_late_chain_is_not_missed() {
    for event_idx in [false, true] {
        let mut bench = bench(Options { event_idx, ..Options::default() });
        let wants = |driver: &Driver| match event_idx {
            true => driver.wanted_by_device() == driver.available,
            false => driver.load(driver.used_ring()) == 0,
        };
        bench.driver.write(HEADER, &header(FLUSH, 0));
        let flush = [(HEADER, 16, false), (STATUS, 1, true)];
        bench.driver.send(&flush);
        bench.run();
        assert!(!wants(&bench.driver), "awake: no kick is wanted");
        assert!(bench.worker.park(), "nothing to do");
        assert!(wants(&bench.driver), "asleep: the next chain must be kicked for");
        bench.worker.unpark();
        // The guest adds a chain between the last turn and the sleep, and does not kick.
        bench.driver.send(&flush);
        assert!(!bench.worker.park(), "the chain is seen");
        bench.worker.unpark();
        bench.run();
        assert_eq!(bench.driver.used().len(), 2);
    }
}

/// A ring that is polled and has no descriptors.
pub(crate) fn setup(state: QueueState) -> RingSetup {
    RingSetup { state, kick: None, call: None, error: None, has_flush: true, inflight: None }
}

/// The record of a ring whose process has died with its first `count` chains under way.
pub(crate) fn left(count: usize, entries: u16) -> Record {
    let memory = MmapRegion::new(stride(entries)).expect("memory");
    let bytes = memory.as_volatile_slice();
    let header = [1, entries, 0, 0].map(u16::to_ne_bytes).concat();
    bytes.write_slice(&header, 8).expect("the header");
    for head in 0..count {
        bytes.write_slice(&[1], 16 + head * 16).expect("a mark");
        bytes.write_slice(&(head as u64).to_ne_bytes(), 24 + head * 16).expect("a counter");
    }
    Record::new(Arc::new(memory), 0, entries).expect("it lies inside")
}

/// A second ring on the same worker.
pub(crate) fn second_ring<F: Future<Output = ()>>(bench: &mut Bench<F>) -> (Driver, EventNotifier) {
    let driver = Driver::new(&bench.memory, RINGS + 0x4_0000, 16);
    let (_, call) = event();
    let setup = RingSetup {
        state: driver.state(false),
        kick: None,
        call: Some(call.try_clone().expect("a copy")),
        error: None,
        has_flush: true,
        inflight: None,
    };
    bench.worker.start(1, setup).expect("the second ring is served");
    (driver, call)
}

/// Something that a driver does to its ring.
type Break = fn(&mut Driver);

#[test]
fn a_broken_ring_is_told_of_and_the_others_go_on() {
    let breaks: [(&str, Break); 3] = [
        ("the available index jumps", |driver| {
            driver.store(driver.available_ring() + 2, driver.available.wrapping_add(65));
        }),
        ("the available index goes back", |driver| {
            driver.store(driver.available_ring() + 2, driver.available.wrapping_sub(1));
        }),
        ("a descriptor that does not exist", |driver| driver.offer(64)),
    ];
    for (what, break_it) in breaks {
        let mut bench = bench(Options::default());
        let (mut other, _call) = second_ring(&mut bench);
        bench.assert_serves();
        bench.engine.inner().set_hold(20);
        bench.driver.write(HEADER, &header(IN, 0));
        bench.driver.send(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        bench.worker.turn();
        break_it(&mut bench.driver);
        bench.run();
        assert!(was_signalled(&bench.error), "{what}");
        assert_eq!(bench.driver.used().len(), 1, "{what}: what was taken is answered");
        bench.driver.send(&[(HEADER, 16, false), (STATUS, 1, true)]);
        bench.run();
        assert!(bench.driver.used().is_empty(), "{what}: nothing more is taken");
        assert!(!was_signalled(&bench.error), "{what}: it is told once");
        other.write(HEADER, &header(FLUSH, 0));
        other.send(&[(HEADER, 16, false), (STATUS, 1, true)]);
        bench.run();
        assert_eq!(other.used().len(), 1, "{what}: the other ring");
        bench.worker.stop(0);
        assert!(bench.worker.take_stopped().is_some(), "{what}: it can be stopped");
    }
}

#[test]
fn rings_outside_memory_are_refused() {
    let mut bench = bench(Options::default());
    let good = Driver::new(&bench.memory, RINGS + 0x4_0000, 16).state(false);
    let start = |bench: &mut Bench<_>, state| {
        let setup = RingSetup {
            state,
            kick: None,
            call: None,
            error: None,
            has_flush: true,
            inflight: None,
        };
        bench.worker.start(1, setup).map(drop)
    };
    let edge = (8 << 20) - 64;
    for at in [HOLE, edge, u64::MAX - 63] {
        let mut states = [good; 3];
        states[0].desc_table = at & !15;
        states[1].avail_ring = (edge + 60) & !1;
        states[2].used_ring = at & !3;
        for state in states {
            start(&mut bench, state).expect_err("it does not lie in memory");
        }
    }
    let changes: [fn(&mut QueueState); 6] = [
        |state| state.size = 0,
        |state| state.size = 12,
        |state| state.size = 2048,
        |state| state.desc_table += 8,
        |state| state.avail_ring += 1,
        |state| state.used_ring += 2,
    ];
    for change in changes {
        let mut state = good;
        change(&mut state);
        start(&mut bench, state).expect_err("size or alignment");
    }
    start(&mut bench, good).expect("the original is good");
    bench.assert_serves();
}

#[test]
fn stopping_waits_for_what_was_taken_and_leaves_the_rest() {
    let mut bench = bench(Options { size: 256, ..Options::default() });
    bench.engine.inner().set_hold(30);
    bench.driver.write(HEADER, &header(IN, 0));
    let read = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
    for _ in 0..70 {
        bench.driver.send(&read);
    }
    bench.worker.turn();
    bench.worker.stop(0);
    assert!(bench.worker.take_stopped().is_none(), "requests are under way");
    let stopped = loop {
        bench.worker.turn();
        if let Some(stopped) = bench.worker.take_stopped() {
            break stopped;
        }
    };
    let taken = stopped.next_available;
    assert!((1..70).contains(&taken), "a turn takes a batch: {taken}");
    assert_eq!(bench.driver.used().len(), usize::from(taken));
    assert!(bench.worker.is_idle());
    // Somebody else goes on from there.
    let mut state = bench.driver.state(false);
    state.next_avail = taken;
    let setup =
        RingSetup { state, kick: None, call: None, error: None, has_flush: true, inflight: None };
    bench.worker.start(0, setup).expect("it is served again");
    bench.run();
    assert_eq!(bench.driver.used().len(), usize::from(70 - taken));
}

#[test]
fn requests_keep_the_memory_they_began_with() {
    let mut bench = bench(Options::default());
    bench.engine.inner().set_hold(200);
    bench.driver.write(HEADER, &header(IN, 9));
    bench.driver.write(STATUS, &[UNTOUCHED]);
    bench.driver.send(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    bench.worker.turn();
    // The ring is in both memories, as the session makes sure; everything else is gone.
    let ring = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4_0000)]).expect("memory");
    let shared = GuestMemory::new(ring, Vec::new());
    bench.worker.set_memory(Arc::new(shared));
    bench.run();
    assert_eq!(bench.driver.read(STATUS, 1), [0]);
    assert_eq!(bench.driver.read(DATA, 512)[0], pattern(9 * 512));
}

#[test]
fn more_requests_than_slots_wait_in_the_ring() {
    let mut bench = bench(Options { size: 1024, ..Options::default() });
    bench.engine.inner().set_hold(3);
    bench.driver.write(HEADER, &header(IN, 0));
    let read = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
    for _ in 0..1000 {
        bench.driver.send_indirect(TABLE, &read);
    }
    bench.run();
    assert_eq!(bench.driver.used().len(), 1000);
    assert_eq!(bench.worker.context().stats.reads.get(), 1000);
}

#[test]
fn random_bytes_in_place_of_a_ring_hurt_nobody() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let event_idx = random.bool();
        let mut bench = bench(Options { seed, event_idx, ..Options::default() });
        bench.engine.inner().set_hold(random.u8(0..4));
        let (mut other, _call) = second_ring(&mut bench);
        for _ in 0..30 {
            scribble(&mut random, &mut bench.driver);
            for _ in 0..random.u8(1..4) {
                bench.worker.turn();
            }
            if random.u8(0..4) == 0 && bench.worker.park() {
                bench.worker.unpark();
            }
        }
        bench.run();
        other.write(STATUS, &[UNTOUCHED]);
        other.write(HEADER, &header(IN, 0));
        other.send(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        bench.run();
        assert_eq!(other.used().len(), 1, "seed {seed}: the other ring is served");
        assert_eq!(other.read(STATUS, 1), [0], "seed {seed}");
        bench.worker.stop(0);
        bench.run();
        assert!(bench.worker.take_stopped().is_some(), "seed {seed}: no request was lost");
    }
}

/// Puts chains into the ring as no driver would: mostly possible values, in no order.
pub(crate) fn scribble(random: &mut fastrand::Rng, driver: &mut Driver) {
    let places = [0, HEADER, STATUS, TABLE, DATA, BORDER - 8, HOLE, 1 << 50, u64::MAX];
    for _ in 0..random.u8(1..20) {
        let table = if random.bool() { RINGS } else { TABLE };
        let index = random.u16(0..64);
        let at = random.choice(places).expect("a place").wrapping_add(random.u64(0..64));
        let len = random.choice([0, 1, 15, 16, 17, 512, 513, 4096, u32::MAX]).expect("a length");
        let flags = random.u16(0..8);
        driver.put(table, index, at, len, flags, random.u16(0..70));
    }
    let kind = random.choice([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99]).expect("a kind");
    let sector = random.choice([0, 7, DISK / 512 - 1, DISK / 512, u64::MAX]).expect("a sector");
    driver.write(HEADER, &header(kind, sector));
    driver.write(DATA, &segment(sector, random.u32(0..20), random.u32(0..3)));
    for _ in 0..random.u8(0..8) {
        driver.offer(random.u16(0..64));
    }
    if random.u8(0..100) == 0 {
        driver.store(driver.available_ring() + 2, random.u16(..));
    }
}

/// An engine whose kernel takes nothing for a while.
struct Reluctant {
    inner: MemEngine,
    refusals: Cell<u32>,
}

impl Storage for Reluctant {
    fn limits(&self, file: FileId) -> Limits {
        self.inner.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.inner.length(file)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        self.inner.submit(file, why, op)
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl Engine for Reluctant {
    fn reap(&self) -> usize {
        if self.refusals.get() == 0 { self.inner.reap() } else { 0 }
    }

    fn submit_all(&self) -> io::Result<()> {
        let left = self.refusals.get();
        self.refusals.set(left.saturating_sub(1));
        if left == 0 { Ok(()) } else { Err(io::ErrorKind::ResourceBusy.into()) }
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy()
    }

    fn pollable(&self) -> RawFd {
        -1
    }

    fn wait(&self) -> io::Result<()> {
        self.inner.wait()
    }
}

#[test]
fn operations_that_the_kernel_refused_are_handed_over_again() {
    let disk = MemDisk::new();
    let file = disk.add("disk", vec![5; 4096]);
    let engine = Rc::new(Reluctant { inner: disk.engine(1, 0), refusals: Cell::new(3) });
    let image = Arc::new(Image::from_raw(Raw::new(file, 4096), false));
    let device = Arc::new(Device::new(image, Settings::default()));
    let mut worker = worker(Rc::new(Context::new(device, engine)), 4, || {});
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory");
    worker.set_memory(Arc::new(GuestMemory::new(memory.clone(), Vec::new())));
    let mut driver = Driver::new(&memory, RINGS, 16);
    let (kick, _kicker) = event();
    let state = driver.state(false);
    let setup = RingSetup {
        state,
        kick: Some(kick),
        call: None,
        error: None,
        has_flush: true,
        inflight: None,
    };
    worker.start(0, setup).expect("the ring is served");
    driver.write(HEADER, &header(IN, 0));
    driver.send(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    for _ in 0..3 {
        worker.turn();
        assert!(worker.needs_polling(), "nobody would wake the worker");
    }
    while worker.turn().any() {}
    assert!(!worker.needs_polling());
    assert_eq!(driver.used().len(), 1);
}

#[test]
fn a_request_that_changes_after_it_was_taken_is_what_it_was() {
    let mut bench = bench(Options::default());
    let before: Vec<u8> = bench.disk.content(bench.file);
    for rewrite in 0..3u64 {
        bench.engine.inner().set_hold(3);
        bench.driver.write(HEADER, &header(IN, 9));
        bench.driver.write(STATUS, &[UNTOUCHED; 2]);
        let head = bench.driver.send(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        bench.worker.turn();
        // The guest makes a write elsewhere of it, with another length and another status byte.
        bench.driver.write(HEADER, &header(OUT, 700));
        match rewrite {
            0 => {}
            1 => bench.driver.put(RINGS, head + 1, HOLE, u32::MAX, 0, 0),
            _ => bench.driver.put(RINGS, head + 2, STATUS + 1, 9000, 2, 0),
        }
        bench.run();
        assert_eq!(bench.driver.used(), [(head, 513)], "{rewrite}");
        assert_eq!(bench.driver.read(STATUS, 2), [0, UNTOUCHED], "{rewrite}");
        assert_eq!(bench.driver.read(DATA, 1), [pattern(9 * 512)], "{rewrite}");
        assert!(bench.disk.content(bench.file) == before, "{rewrite}: nothing was written");
    }
}
