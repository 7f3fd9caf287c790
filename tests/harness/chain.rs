//! A guest that lays anything out in its memory and makes it available to a worker.
//!
//! What must hold: every chain that was taken comes back once, with a length that its writable
//! descriptors have room for; the device writes into those descriptors and its own ring, and
//! nowhere else; the worker comes to rest, and serves a well-made ring afterwards.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use common::memory::peak;
use vhost_user_qcow2::blk::serve::Context;
use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::raw::Raw;
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::worker::queue::RingSetup;
use vhost_user_qcow2::worker::{GuestMemory, Worker, worker};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Seed;
use crate::driver::{Driver, FLUSH, IN, NEXT, OUT, Piece, UNTOUCHED, WRITE, header};

/// Most bytes of memory that a guest may make us take.
pub const MOST_MEMORY: u64 = 32 << 20;
/// Most turns until a worker has come to rest.
const MOST_TURNS: u32 = 10_000;
const MOST_COMMANDS: usize = 64;
/// Bytes of guest memory that are compared at once.
const PAGE: usize = 512;
/// Entries of the ring.
const SIZE: u16 = 16;
/// The disk, when it is a raw one.
const DISK: u64 = 64 << 10;
/// Guest memory: rings in the first region, which touches the second, and a third far away.
const RAM: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), BORDER as usize),
    (GuestAddress(BORDER), 0x2000),
    (GuestAddress(FAR), 0x1000),
];
const BORDER: u64 = 0x2_1000;
const FAR: u64 = 1 << 40;
/// Parts of the ring: descriptors, available ring, used ring.
const RING: [Range<u64>; 3] = [0..256, 0x1_0000..0x1_0040, USED];
const USED: Range<u64> = 0x2_0000..0x2_0100;
/// Two tables for chains that are not in the ring's own.
const TABLES: [u64; 3] = [0, 0x6000, 0x7000];
/// Where a command's address is counted from.
const AREAS: [u64; 16] = [
    0x1000,
    0x2000,
    0x3000,
    0x4000,
    0x6000,
    0x7000,
    0x8000,
    BORDER - 512,
    BORDER + 0x2000 - 512,
    FAR,
    FAR + 0x1000 - 512,
    0,
    0x1_0000,
    0x2_0000,
    0x9_0000,
    u64::MAX - 1024,
];
const INDIRECT: u16 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const KINDS: [u32; 8] = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, OUT, IN];

/// What became of an input, so that a test can tell that it does not only make refusals.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Chains that came back.
    pub used: u32,
    /// Requests that were done.
    pub succeeded: u64,
}

/// Runs one input.
///
/// # Panics
/// When something that must hold does not.
pub fn run(input: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    let ((), used) = peak(|| {
        let mut input = Unstructured::new(input);
        let choices = input.arbitrary().unwrap_or(0);
        let nth = if choices & 1 != 0 { input.arbitrary().unwrap_or(0) } else { 0 };
        let (mut bench, faults) = bench(choices, nth);
        // The end of the input is the end of the choices.
        let _ = bench.obey_all(&mut input);
        bench.run();
        faults.clear();
        bench.serve_another();
        let stats = &bench.worker.context().stats;
        outcome.used = bench.used;
        outcome.succeeded = stats.reads.get() + stats.writes.get() + stats.erases.get();
    });
    assert!(used < MOST_MEMORY, "{used} bytes of memory");
    outcome
}

/// What a chain that was made available asks for, by a walk of our own before it is taken.
#[derive(Debug, Default, Clone)]
struct Walk {
    writable: Vec<Range<u64>>,
    /// Where its descriptors are.
    tables: Vec<Range<u64>>,
    room: u64,
}

/// A worker and the guest it serves.
struct Bench<F> {
    worker: Worker<F>,
    memory: GuestMemoryMmap,
    driver: Driver,
    event_idx: bool,
    /// Heads that were made available and not taken.
    offered: Vec<u16>,
    /// The guest has changed its rings by other means than making chains available, or has had the
    /// device do so: what is taken is not known.
    wild: bool,
    used: u32,
    sequence: u8,
}

fn bench(choices: u8, nth: u8) -> (Bench<impl Future<Output = ()>>, Faults) {
    let disk = MemDisk::new();
    let faults = Faults::new();
    let read_only = choices & 2 != 0;
    let image = if choices & 4 != 0 {
        disk.add("disk.qcow2", Seed::of("plain").bytes.clone());
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let engine = disk.engine(0, 0);
        let image = Image::open(&engine, &disk, Path::new("disk.qcow2"), &options);
        block_on(&engine, image).expect("the image is sound")
    } else {
        let file = disk.add("disk", (0..DISK).map(|at| (at / 512) as u8).collect());
        Image::from_raw(Raw::new(file, DISK), read_only)
    };
    let device = Arc::new(Device::new(Arc::new(image), Settings::default()));
    if choices & 1 != 0 {
        faults.add(Rule { sticky: choices & 0x80 != 0, ..Rule::fail(u64::from(nth) + 1, 5) });
    }
    let engine = Rc::new(Fault::new(disk.engine(1, u64::from(choices)), faults.clone()));
    let context = Rc::new(Context::new(device, engine));
    let tasks = if choices & 8 != 0 { 2 } else { 64 };
    let mut worker = worker(context, tasks, || {});
    let memory = GuestMemoryMmap::from_ranges(&RAM).expect("guest memory");
    worker.set_memory(Arc::new(GuestMemory::new(memory.clone(), Vec::new())));
    let start = if choices & 16 != 0 { u16::MAX - 3 } else { 0 };
    let driver = Driver::at(&memory, 0, SIZE, start);
    let event_idx = choices & 32 != 0;
    worker.start(0, setup(&driver, event_idx, choices & 64 == 0)).expect("the ring is served");
    let bench = Bench {
        worker,
        memory,
        driver,
        event_idx,
        offered: Vec::new(),
        wild: false,
        used: 0,
        sequence: 0,
    };
    (bench, faults)
}

fn setup(driver: &Driver, event_idx: bool, has_flush: bool) -> RingSetup {
    let state = QueueState {
        max_size: SIZE,
        next_avail: driver.available,
        next_used: 0,
        event_idx_enabled: event_idx,
        size: SIZE,
        ready: true,
        desc_table: driver.table,
        avail_ring: driver.available_ring(),
        used_ring: driver.used_ring(),
    };
    RingSetup { state, kick: None, call: None, error: None, has_flush, inflight: None }
}

fn overlaps(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// The same bytes as ranges that are in order and do not touch. A chain may name a thousand, and
/// there are dozens of chains.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Whether any of the `joined` ranges has bytes in common with `range`.
fn touches(joined: &[Range<u64>], range: &Range<u64>) -> bool {
    let place = joined.partition_point(|one| one.end <= range.start);
    joined.get(place).is_some_and(|one| overlaps(one, range))
}

fn address(input: &mut Unstructured<'_>) -> Result<u64> {
    let area = AREAS[usize::from(input.arbitrary::<u8>()?) % AREAS.len()];
    Ok(area.wrapping_add(u64::from(input.arbitrary::<u8>()?) * 4))
}

fn length(input: &mut Unstructured<'_>) -> Result<u32> {
    let choice: u8 = input.arbitrary()?;
    match choice {
        0..0x80 => Ok(u32::from(choice) * 16),
        0x80..0xc0 => Ok(u32::from(choice & 0x3f)),
        0xc0..0xe0 => Ok(u32::from(input.arbitrary::<u16>()?)),
        0xe0..0xf0 => input.arbitrary(),
        _ => Ok(u32::MAX - u32::from(choice & 0xf)),
    }
}

fn sector(input: &mut Unstructured<'_>) -> Result<u64> {
    match input.arbitrary::<u8>()? {
        choice @ 0..0xf0 => Ok(u64::from(choice)),
        0xf0..0xf8 => input.arbitrary(),
        choice => Ok((u64::MAX / 512).wrapping_add(u64::from(choice))),
    }
}

fn kind(input: &mut Unstructured<'_>) -> Result<u32> {
    match input.arbitrary::<u8>()? {
        0xff => input.arbitrary(),
        choice => Ok(KINDS[usize::from(choice) % KINDS.len()]),
    }
}

impl<F: Future<Output = ()>> Bench<F> {
    fn obey_all(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..MOST_COMMANDS {
            if input.is_empty() {
                break;
            }
            self.obey(input)?;
        }
        Ok(())
    }

    fn obey(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.arbitrary::<u8>()? % 10 {
            0 => {
                let table = TABLES[usize::from(input.arbitrary::<u8>()?) % TABLES.len()];
                let index = u64::from(input.arbitrary::<u8>()? % 20);
                let (at, len) = (address(input)?, length(input)?);
                let flags = u16::from(input.arbitrary::<u8>()?);
                let next = u16::from(input.arbitrary::<u8>()? % 20);
                let mut bytes = at.to_le_bytes().to_vec();
                bytes.extend(len.to_le_bytes());
                bytes.extend([flags, next].map(u16::to_le_bytes).concat());
                self.put(table + index * 16, &bytes);
            }
            1 => {
                let at = address(input)?;
                let bytes = header(kind(input)?, sector(input)?);
                self.put(at, &bytes);
            }
            2 => {
                let at = address(input)?;
                let mut bytes = sector(input)?.to_le_bytes().to_vec();
                bytes.extend(length(input)?.to_le_bytes());
                bytes.extend(u32::from(input.arbitrary::<u8>()? >> 6).to_le_bytes());
                self.put(at, &bytes);
            }
            3 => {
                let at = address(input)?;
                let bytes = input.bytes(8)?.to_vec();
                self.put(at, &bytes);
            }
            4 | 5 => {
                let head = u16::from(input.arbitrary::<u8>()?);
                let head = if head < 0xf0 { head % SIZE } else { head };
                self.offer(head);
            }
            6 => self.run(),
            _ => self.request(input)?,
        }
        Ok(())
    }

    /// The guest writes something somewhere.
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let range = at..at.saturating_add(bytes.len() as u64);
        // Descriptors are the guest's to change while the device does not look.
        self.wild |= RING[1..].iter().any(|part| overlaps(part, &range));
        // What does not lie in memory is not written.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn offer(&mut self, head: u16) {
        self.driver.offer(head);
        self.offered.push(head);
    }

    /// A request as drivers make them, in the ring's table or in another, with data in pieces.
    fn request(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let shape: u8 = input.arbitrary()?;
        let kind = kind(input)?;
        let bytes = header(kind, sector(input)?);
        let place = u64::from(self.sequence % 16) * 64;
        self.sequence = self.sequence.wrapping_add(1);
        let (head_at, status_at) = (0x1000 + place, 0x2000 + place);
        self.put(head_at, &bytes);
        self.put(status_at, &[UNTOUCHED]);
        let mut pieces: Vec<Piece> = vec![(head_at, 16, false)];
        for _ in 0..shape & 3 {
            pieces.push((address(input)?, length(input)?, matches!(kind, IN | GET_ID)));
        }
        pieces.push((status_at, 1, true));
        if shape & 4 == 0 {
            let head = self.driver.send(&pieces);
            self.offered.push(head);
            return Ok(());
        }
        let table = TABLES[1] + place * 2;
        self.driver.put_chain(table, u16::MAX, 0, &pieces);
        let head = self.driver.next;
        let len = pieces.len() as u32 * 16 + u32::from(shape >> 7);
        self.driver.put(0, head, table, len, INDIRECT, 0);
        self.driver.next = (head + 1) % SIZE;
        self.offer(head);
        Ok(())
    }

    /// Follows a chain without taking it for a sound one.
    fn walk(&self, head: u16) -> Walk {
        let mut walk = Walk::default();
        self.follow(&mut walk, 0, u64::from(SIZE), u64::from(head), true);
        walk
    }

    fn follow(&self, walk: &mut Walk, table: u64, count: u64, first: u64, outer: bool) {
        let mut index = first;
        for _ in 0..count.min(1024) {
            let Some(at) = table.checked_add(index * 16).filter(|_| index < count) else { break };
            let mut bytes = [0; 16];
            if self.memory.read_slice(&mut bytes, GuestAddress(at)).is_err() {
                break;
            }
            walk.tables.push(at..at + 16);
            let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 2)) << 16;
            let (start, len) = (long(0) | long(4) << 32, long(8));
            let (flags, next) = (word(12), word(14));
            if flags & INDIRECT != 0 {
                if outer {
                    self.follow(walk, start, len / 16, 0, false);
                }
                break;
            }
            if flags & WRITE != 0 {
                walk.writable.push(start..start.saturating_add(len));
                walk.room += len;
            }
            if flags & NEXT == 0 {
                break;
            }
            index = u64::from(next);
        }
    }

    /// Lets the worker take turns until nothing is left to do, and looks at what it has done.
    fn run(&mut self) {
        let offered = std::mem::take(&mut self.offered);
        let open = self.worker.ring(0).is_some_and(|ring| ring.is_open());
        let walks: Vec<Walk> = offered.iter().map(|head| self.walk(*head)).collect();
        let writable = joined(walks.iter().flat_map(|walk| &walk.writable).cloned().collect());
        let mut tables = walks.iter().flat_map(|walk| &walk.tables).chain(&RING);
        // The device was told to overwrite descriptors or rings, and does.
        self.wild |= tables.any(|table| touches(&writable, table));
        let before = self.content();
        self.rest();
        if self.wild {
            return;
        }
        self.compare(&before, &writable);
        let used = self.driver.used();
        self.used += used.len() as u32;
        // A head that is no descriptor, or more chains than the ring has entries, break the ring.
        let sound = offered.iter().take_while(|head| **head < SIZE).count();
        let taken = if offered.len() > usize::from(SIZE) || !open { 0 } else { sound };
        let mut rooms: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
        for (head, walk) in offered.iter().zip(&walks).take(taken) {
            rooms.entry(*head).or_default().push(walk.room);
        }
        assert_eq!(used.len(), taken, "{offered:?} were made available, {used:?} came back");
        for (head, len) in used {
            let room = rooms.get_mut(&head).and_then(Vec::pop);
            let room = room.unwrap_or_else(|| panic!("{head} came back too often: {offered:?}"));
            assert!(u64::from(len) <= room, "{len} bytes were written to {room} of {head}");
        }
        let open = self.worker.ring(0).is_some_and(|ring| ring.is_open());
        assert!(open || taken < offered.len() || offered.is_empty(), "the ring was sound");
    }

    fn rest(&mut self) {
        for _ in 0..MOST_TURNS {
            if !self.worker.turn().any() && self.worker.is_idle() {
                let _ = self.worker.park();
                self.worker.unpark();
                return;
            }
        }
        panic!("the worker does not come to rest");
    }

    fn content(&self) -> Vec<Vec<u8>> {
        let read = |(at, len): (GuestAddress, usize)| {
            let mut bytes = vec![0; len];
            self.memory.read_slice(&mut bytes, at).expect("guest memory");
            bytes
        };
        RAM.map(read).to_vec()
    }

    /// The device writes to what it was given to write to, and to the used ring.
    fn compare(&self, before: &[Vec<u8>], writable: &[Range<u64>]) {
        let after = self.content();
        let given = |at| USED.contains(&at) || touches(writable, &(at..at + 1));
        for ((start, _), (old, new)) in RAM.iter().zip(before.iter().zip(&after)) {
            // Page by page first: in a fuzzer, a comparison of two bytes is a call.
            for (page, (old, new)) in old.chunks(PAGE).zip(new.chunks(PAGE)).enumerate() {
                if old == new {
                    continue;
                }
                for (offset, (old, new)) in old.iter().zip(new).enumerate() {
                    let at = start.0 + (page * PAGE + offset) as u64;
                    assert!(old == new || given(at), "{at:#x} was {old:#x} and is {new:#x}");
                }
            }
        }
    }

    /// A ring that is laid out anew is served.
    fn serve_another(&mut self) {
        self.worker.stop(0);
        self.rest();
        self.worker.take_stopped().expect("nothing is under way");
        self.driver = Driver::at(&self.memory, 0, SIZE, 7);
        let setup = setup(&self.driver, self.event_idx, true);
        self.worker.start(0, setup).expect("the ring is served");
        self.driver.write(0x1000, &header(IN, 1));
        self.driver.write(0x2000, &[UNTOUCHED]);
        let head = self.driver.send(&[(0x1000, 16, false), (0x3000, 512, true), (0x2000, 1, true)]);
        self.rest();
        assert_eq!(self.driver.used(), [(head, 513)]);
        assert_eq!(self.driver.read(0x2000, 1), [0]);
    }
}
