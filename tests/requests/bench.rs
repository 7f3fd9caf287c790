//! A worker on a simulated disk, and the memory and ring of its guest.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use vhost_user_qcow2::blk::limit::Limiter;
use vhost_user_qcow2::blk::serve::Context;
use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::raw::Raw;
use vhost_user_qcow2::storage::fault::{Fault, Faults};
use vhost_user_qcow2::storage::mem::{Event, MemDisk, MemEngine, Stage};
use vhost_user_qcow2::storage::{FileId, Purpose};
use vhost_user_qcow2::worker::queue::RingSetup;
use vhost_user_qcow2::worker::{GuestMemory, Worker, worker};
use virtio_queue::QueueState;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::EventConsumer;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::driver::{Driver, IN, Piece, UNTOUCHED, event, header, was_signalled};

pub(crate) const DISK: u64 = 1 << 20;
/// Guest memory: two regions that touch, so that a buffer may lie in both, and a hole.
pub(crate) const RAM: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), 4 << 20),
    (GuestAddress(4 << 20), 4 << 20),
    (GuestAddress(1 << 50), 1 << 20),
];
pub(crate) const BORDER: u64 = 4 << 20;
pub(crate) const HOLE: u64 = 16 << 20;
/// Where rings are, 256 KiB apart.
pub(crate) const RINGS: u64 = 0;
/// Where tests put their headers, data and status bytes.
pub(crate) const HEADER: u64 = 0x20_0000;
pub(crate) const STATUS: u64 = 0x20_1000;
pub(crate) const TABLE: u64 = 0x21_0000;
pub(crate) const DATA: u64 = 0x30_0000;

/// The descriptor is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

impl Driver {
    /// What the session would tell a worker.
    pub(crate) fn state(&self, event_idx: bool) -> QueueState {
        QueueState {
            max_size: 1024,
            next_avail: self.available,
            next_used: 0,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.table,
            avail_ring: self.available_ring(),
            used_ring: self.used_ring(),
        }
    }

    /// Makes a chain in a table at `table` available, through one descriptor of the ring.
    pub(crate) fn send_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        self.put_chain(table, u16::MAX, 0, pieces);
        let head = self.next;
        self.put(self.table, head, table, pieces.len() as u32 * 16, INDIRECT, 0);
        self.next = (head + 1) % self.size;
        self.offer(head);
        head
    }

    /// Asks for an interrupt once the used index has gone past `index`.
    pub(crate) fn want_used(&self, index: u16) {
        self.store(self.available_ring() + 4 + u64::from(self.size) * 2, index);
    }

    /// The entry that the device waits for.
    pub(crate) fn wanted_by_device(&self) -> u16 {
        self.load(self.used_ring() + 4 + u64::from(self.size) * 8)
    }
}

/// The bytes of one discard or write-zeroes segment.
pub(crate) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A copy of a descriptor as a file, made as front-ends do: through a socket.
pub(crate) fn pass(descriptor: &impl AsRawFd) -> File {
    let (left, right) = UnixStream::pair().expect("a pair");
    left.send_with_fd(&b"x"[..], descriptor.as_raw_fd()).expect("send");
    let (_, file) = right.recv_with_fd(&mut [0]).expect("receive");
    file.expect("a descriptor")
}

/// A worker on a simulated disk, and its guest.
pub(crate) struct Bench<F> {
    pub(crate) disk: MemDisk,
    pub(crate) file: FileId,
    pub(crate) faults: Faults,
    pub(crate) engine: Rc<Fault<MemEngine>>,
    pub(crate) device: Arc<Device>,
    pub(crate) worker: Worker<F>,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) driver: Driver,
    pub(crate) call: EventConsumer,
    pub(crate) error: EventConsumer,
}

pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) read_only: bool,
    pub(crate) event_idx: bool,
    pub(crate) has_flush: bool,
    pub(crate) size: u16,
    pub(crate) start: u16,
    pub(crate) limiter: Arc<Limiter>,
}

impl Default for Options {
    fn default() -> Self {
        let limiter = Limiter::new();
        let (read_only, event_idx, has_flush) = (false, false, true);
        Self { seed: 1, read_only, event_idx, has_flush, size: 64, start: 0, limiter }
    }
}

/// The byte that the disk holds at an offset before anything was written.
pub(crate) fn pattern(at: u64) -> u8 {
    (at / 512 * 7 + at % 251) as u8
}

pub(crate) fn bench(options: Options) -> Bench<impl Future<Output = ()>> {
    let disk = MemDisk::new();
    let file = disk.add("disk", (0..DISK).map(pattern).collect());
    let faults = Faults::new();
    let engine = Rc::new(Fault::new(disk.engine(1, options.seed), faults.clone()));
    let image = Arc::new(Image::from_raw(Raw::new(file, DISK), options.read_only));
    let device = Device::new(image, Settings::default()).with_limiter(options.limiter);
    let device = Arc::new(device);
    let context = Rc::new(Context::new(Arc::clone(&device), engine.clone()));
    let mut worker = worker(context, 256, || {});
    let memory = GuestMemoryMmap::from_ranges(&RAM).expect("guest memory");
    worker.set_memory(Arc::new(GuestMemory::new(memory.clone(), Vec::new())));
    let driver = Driver::at(&memory, RINGS, options.size, options.start);
    let ((call, to_guest), (error, to_front_end)) = (event(), event());
    let setup = RingSetup {
        state: driver.state(options.event_idx),
        kick: None,
        call: Some(to_guest),
        error: Some(pass(&to_front_end)),
        has_flush: options.has_flush,
        inflight: None,
    };
    worker.start(0, setup).expect("the ring is served");
    assert!(was_signalled(&call), "a ring that starts tells the guest to look");
    Bench { disk, file, faults, engine, device, worker, memory, driver, call, error }
}

impl<F: Future<Output = ()>> Bench<F> {
    /// Takes turns until nothing is left to do.
    pub(crate) fn run(&mut self) {
        for _ in 0..100_000 {
            if !self.worker.turn().any() && self.worker.is_idle() {
                return;
            }
        }
        panic!("the worker does not come to rest");
    }

    /// Sends a chain, waits for it, and gives the length in the used ring.
    pub(crate) fn carry(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.driver.send(pieces);
        self.run();
        let used = self.driver.used();
        assert_eq!(used.len(), 1, "{used:?}");
        assert_eq!(used[0].0, head);
        used[0].1
    }

    /// A request of one header, one piece of data and one status byte; gives the status.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        self.driver.write(HEADER, &header(kind, sector));
        self.driver.write(STATUS, &[UNTOUCHED]);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS, 1, true));
        let len = self.carry(&pieces);
        let writable: u32 = pieces.iter().filter(|piece| piece.2).map(|piece| piece.1).sum();
        assert_eq!(len, writable, "the used length is that of the writable part");
        self.driver.read(STATUS, 1)[0]
    }

    /// That the worker is alive and the disk as `disk` says.
    pub(crate) fn assert_serves(&mut self) {
        self.driver.write(DATA, &[0; 512]);
        assert_eq!(self.request(IN, 3, &[(DATA, 512, true)]), 0);
        let expected = self.disk.content(self.file)[3 * 512..4 * 512].to_vec();
        assert_eq!(self.driver.read(DATA, 512), expected);
    }

    pub(crate) fn submitted(&self, why: Purpose) -> usize {
        let events: Vec<Event> = self.disk.take_trace();
        events.iter().filter(|event| event.stage == Stage::Submitted && event.why == why).count()
    }
}
