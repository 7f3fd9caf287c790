//! A guest: its memory, its rings, and what it is told.

use std::fs::File;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::driver::{Driver, IN, NEXT, Piece, UNTOUCHED, event, header, was_signalled};
use super::server::eventually;

/// Guest memory far up.
pub(crate) const HIGH: u64 = 1 << 45;
/// Where a driver has its header, status and data; each queue has its own header and status.
const HEADER: u64 = HIGH + 0x20_0000;
const STATUS: u64 = HIGH + 0x21_0000;
pub(crate) const DATA: u64 = HIGH + 0x22_0000;

const MIB: u64 = 1 << 20;

/// A guest: memory in one file, cut into regions as QEMU does, and rings with their eventfds.
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) rings: Vec<Driver>,
    pub(crate) kicks: Vec<EventNotifier>,
    pub(crate) called: Vec<EventConsumer>,
    /// The other ends, which the front-end passes on.
    pub(crate) kicked: Vec<EventConsumer>,
    pub(crate) calls: Vec<EventNotifier>,
    pub(crate) errors: Vec<(EventConsumer, EventNotifier)>,
    /// Requests sent so far on each queue.
    sent: Vec<u64>,
}

/// Guest address, length, offset in the file.
pub(crate) const REGIONS: [(u64, u64, u64); 3] =
    [(HIGH, 8 * MIB, 0), (0, 640 << 10, 8 * MIB), (Guest::HOTPLUG, MIB, 9 * MIB)];

impl Guest {
    /// Bytes of the first region, where rings are.
    pub(crate) const MEMORY: u64 = 8 * MIB;
    /// Where memory comes that is added later.
    pub(crate) const HOTPLUG: u64 = 1 << 30;

    pub(crate) fn new(queues: usize) -> Self {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(10 * MIB).expect("its length");
        let mut regions = REGIONS.map(|(at, size, offset)| {
            let part = FileOffset::new(file.try_clone().expect("a copy"), offset);
            (GuestAddress(at), size as usize, Some(part))
        });
        regions.sort_by_key(|region| region.0);
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).expect("guest memory");
        let ring = |queue| Driver::new(&memory, HIGH + queue as u64 * 0x3_0000, 64);
        let (called, calls) = (0..queues).map(|_| event()).unzip();
        let (kicked, kicks) = (0..queues).map(|_| event()).unzip();
        Self {
            file,
            rings: (0..queues).map(ring).collect(),
            kicks,
            called,
            kicked,
            calls,
            errors: (0..queues).map(|_| event()).collect(),
            sent: vec![0; queues],
        }
    }

    /// Forgets a ring's past, as a driver that resets the device.
    pub(crate) fn restart(&mut self, queue: usize) {
        self.start_at(queue, 0);
    }

    /// A ring that stands at an index.
    pub(crate) fn start_at(&mut self, queue: usize, index: u16) {
        let ring = &self.rings[queue];
        let zeros = vec![0; 1024];
        [ring.available_ring(), ring.used_ring()].iter().for_each(|at| ring.write(*at, &zeros));
        self.rings[queue] = Driver::at(&ring.memory, ring.table, ring.size, index);
        self.sent[queue] = 0;
    }

    /// Makes one request available, without a kick; gives the address of its status byte.
    pub(crate) fn send(&mut self, queue: usize, kind: u32, sector: u64, data: &[Piece]) -> u64 {
        let place = (queue as u64 * 64 + self.sent[queue] % 64) * 16;
        self.sent[queue] += 1;
        let ring = &mut self.rings[queue];
        ring.write(HEADER + place, &header(kind, sector));
        ring.write(STATUS + place, &[UNTOUCHED]);
        let mut pieces = vec![(HEADER + place, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS + place, 1, true));
        ring.send(&pieces);
        STATUS + place
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.kicks[queue].notify().expect("kick");
    }

    /// Waits for an interrupt and gives the statuses of what was answered.
    pub(crate) fn wait(&mut self, queue: usize) -> Vec<u8> {
        let mut statuses = Vec::new();
        eventually("an interrupt", || {
            if was_signalled(&self.called[queue]) {
                statuses = Self::statuses(&mut self.rings[queue]);
            }
            !statuses.is_empty()
        });
        statuses
    }

    /// Waits for an answer without an interrupt.
    pub(crate) fn poll(&mut self, queue: usize) -> Vec<u8> {
        let mut statuses = Vec::new();
        eventually("an answer", || {
            statuses = Self::statuses(&mut self.rings[queue]);
            !statuses.is_empty()
        });
        statuses
    }

    /// The status of each new entry of the used ring: the last byte of its chain.
    fn statuses(ring: &mut Driver) -> Vec<u8> {
        let used = ring.used();
        used.iter().map(|(head, _)| ring.status(*head)).collect()
    }

    /// Waits until the front-end is told of a broken ring.
    pub(crate) fn wait_for_error(&self, queue: usize) {
        eventually("an error", || was_signalled(&self.errors[queue].0));
    }

    /// That a queue is served: reads a sector that nobody writes.
    pub(crate) fn assert_reads(&mut self, queue: usize) {
        let at = DATA + 0x1_0000 + queue as u64 * 512;
        self.rings[queue].write(at, &[UNTOUCHED; 512]);
        self.send(queue, IN, 1000 + queue as u64, &[(at, 512, true)]);
        self.kick(queue);
        assert_eq!(self.wait(queue), [0]);
        let expected = (1000 + queue) as u8;
        assert!(self.rings[queue].read(at, 512).iter().all(|byte| *byte == expected));
    }
}

impl Driver {
    /// The last byte of a chain in the ring's own table: the status byte of a request.
    fn status(&self, head: u16) -> u8 {
        let mut index = head;
        loop {
            let at = self.table + u64::from(index) * 16;
            if self.load(at + 12) & NEXT != 0 {
                index = self.load(at + 14);
                continue;
            }
            let [low, high] = [at, at + 4].map(|at| {
                u32::from_le(self.memory.read_obj(GuestAddress(at)).expect("ring memory"))
            });
            let last = u64::from(high) << 32 | u64::from(low);
            return self.read(last + u64::from(self.load(at + 8)) - 1, 1)[0];
        }
    }
}
