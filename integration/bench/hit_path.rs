//! Requests that find everything in memory, in one thread and always the same: what an instruction
//! counter is run on (`integration/instructions.rs`).
//!
//! `hit-path read|write COUNT` takes so many requests of 4 KiB, 32 in flight, from a ring through
//! the worker, the request parser and the tables of a qcow2 image, and back. The host's part is
//! left out: the guest's transfers have happened as soon as they are submitted.

use std::hint::black_box;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use vhost_user_qcow2::blk::serve::Context;
use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::image::{self, Image, OpenOptions};
use vhost_user_qcow2::qcow2::create::CreateOptions;
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};
use vhost_user_qcow2::storage::{
    Buf, Engine, FileId, Lane, Limits, Op, Pending, Purpose, Storage, block_on,
};
use vhost_user_qcow2::worker::queue::RingSetup;
use vhost_user_qcow2::worker::{GuestMemory, TASKS, Worker, worker};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

const DISK: u64 = 64 << 20;
const CLUSTER: usize = 64 << 10;
const BLOCK: u64 = 4096;
/// Requests in flight; each has a header, data and a status byte.
const DEPTH: u16 = 32;
const RING: u16 = 128;
// Guest addresses.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const HEADERS: u64 = 0x3_0000;
const STATUS: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const MEMORY: usize = 4 << 20;
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// A simulated disk on which the guest's own transfers take no time and move nothing.
struct Hollow(MemEngine);

impl Storage for Hollow {
    fn limits(&self, file: FileId) -> Limits {
        self.0.limits(file)
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.0.length(file)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        match why {
            Purpose::GuestRead | Purpose::GuestWrite => Pending::ready(Ok(())),
            _ => self.0.submit(file, why, op),
        }
    }

    fn lane(&self) -> Lane {
        self.0.lane()
    }
}

impl Engine for Hollow {
    fn reap(&self) -> usize {
        self.0.reap()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.0.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.0.is_busy()
    }

    fn pollable(&self) -> RawFd {
        self.0.pollable()
    }

    fn wait(&self) -> io::Result<()> {
        self.0.wait()
    }
}

/// The guest's side of the ring: descriptors are laid out once and used again and again.
struct Guest {
    memory: GuestMemoryMmap,
    available: u16,
}

impl Guest {
    fn new(memory: GuestMemoryMmap, write: bool) -> Self {
        let guest = Self { memory, available: 0 };
        for slot in 0..DEPTH {
            let place = u64::from(slot);
            let data = if write { NEXT } else { NEXT | WRITABLE };
            guest.describe(slot * 3, (HEADERS + place * 16, 16), NEXT);
            guest.describe(slot * 3 + 1, (DATA + place * BLOCK, BLOCK as u32), data);
            guest.describe(slot * 3 + 2, (STATUS + place, 1), WRITABLE);
            guest.put(HEADERS + place * 16, u64::from(write));
        }
        guest
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("guest memory");
    }

    fn describe(&self, index: u16, (address, length): (u64, u32), flags: u16) {
        let at = TABLE + u64::from(index) * 16;
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, index + 1);
    }

    /// Asks for the block of every slot.
    fn send(&mut self, random: &mut fastrand::Rng) {
        for slot in 0..DEPTH {
            let sector = random.u64(0..DISK / BLOCK) * BLOCK / 512;
            self.put(HEADERS + u64::from(slot) * 16 + 8, sector);
            self.put(STATUS + u64::from(slot), 0xffu8);
            self.put(AVAILABLE + 4 + u64::from(self.available % RING) * 2, slot * 3);
            self.available = self.available.wrapping_add(1);
        }
        // The next completion shall be told.
        let told = self.available.wrapping_sub(DEPTH);
        self.put(AVAILABLE + 4 + u64::from(RING) * 2, told);
        self.put(AVAILABLE + 2, self.available);
    }

    fn assert_answered(&self) {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("guest memory");
        assert_eq!(used, self.available, "not everything was answered");
        let mut status = [1; DEPTH as usize];
        self.memory.read_slice(&mut status, GuestAddress(STATUS)).expect("guest memory");
        assert_eq!(status, [0; DEPTH as usize], "a request has failed");
    }
}

/// An image all of whose clusters are allocated and whose tables are in memory.
fn full_image(disk: &MemDisk, engine: &Hollow) -> Result<Image> {
    let path = Path::new("disk.qcow2");
    block_on(engine, image::create(engine, disk, path, &CreateOptions::new(DISK)))?;
    let image = block_on(engine, Image::open(engine, disk, path, &OpenOptions::default()))?;
    for cluster in 0..DISK / CLUSTER as u64 {
        let at = GuestOffset(cluster * CLUSTER as u64);
        block_on(engine, image.write(engine, at, Buf::zeroed(CLUSTER)))?;
    }
    block_on(engine, image.flush(engine))?;
    Ok(image)
}

/// What the worker's thread does when it is kicked, up to where it would sleep. Counters are turned
/// on in here and nowhere else, so it must stay a function of its own.
#[inline(never)]
fn take_turns<F: Future<Output = ()>>(worker: &mut Worker<F>) {
    while worker.turn().any() {}
    black_box(worker.park());
    worker.unpark();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (write, count) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [kind @ ("read" | "write"), count] => (kind == "write", count.parse().ok()),
        _ => (false, None),
    };
    let Some(count) = count else {
        eprintln!("usage: hit-path read|write COUNT");
        std::process::exit(2);
    };
    let disk = MemDisk::new();
    let engine = Rc::new(Hollow(disk.engine(1, 1)));
    let image = full_image(&disk, &engine).expect("an image in memory");
    let device = Arc::new(Device::new(Arc::new(image), Settings::default()));
    let mut worker = worker(Rc::new(Context::new(device, engine)), TASKS, || {});
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
    worker.set_memory(Arc::new(GuestMemory::new(memory.clone(), Vec::new())));
    let (called, call) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).expect("an eventfd");
    let mut guest = Guest::new(memory, write);
    let state = QueueState {
        max_size: RING,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: true,
        size: RING,
        ready: true,
        desc_table: TABLE,
        avail_ring: AVAILABLE,
        used_ring: USED,
    };
    let setup = RingSetup {
        state,
        kick: None,
        call: Some(call),
        error: None,
        has_flush: true,
        inflight: None,
    };
    worker.start(0, setup).expect("the ring is served");
    let mut random = fastrand::Rng::with_seed(1);
    let mut done: u64 = 0;
    while done < count {
        guest.send(&mut random);
        take_turns(&mut worker);
        guest.assert_answered();
        called.consume().expect("the guest is told once for each batch");
        done += u64::from(DEPTH);
    }
    println!("{done}");
}
