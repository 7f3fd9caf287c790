//! The guest behind a front-end: its memory, two rings with requests in them, and descriptors.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::driver::{Driver, FLUSH, IN, OUT, Piece, UNTOUCHED, event, header, was_signalled};
use crate::messages::open;

/// Guest address, length, offset in the file.
pub(crate) type Region = (u64, u64, u64);
/// Where the first region is.
const HIGH: u64 = 1 << 45;
/// Two rings lie in the first region, and what they refer to behind them.
pub(crate) const REGIONS: [Region; 2] = [(HIGH, 0xa_0000, 0), (0, 0x4_0000, 0xa_0000)];
/// Where the guest's memory is in the front-end's address space.
pub(crate) const USER: u64 = 0x7fff_0000_0000;
/// Headers, status bytes and data.
const AREA: u64 = HIGH + 0x6_0000;

/// A region as on the wire: guest address, length, front-end's address, offset.
pub(crate) fn region((guest, size, offset): Region) -> Vec<u8> {
    [guest, size, USER + offset, offset].into_iter().flat_map(u64::to_ne_bytes).collect()
}

/// A guest with two rings.
pub(crate) struct Guest {
    pub(crate) file: File,
    memory: GuestMemoryMmap,
    rings: [Driver; 2],
    /// The guest's ends, and those that are passed on.
    kicks: [(EventConsumer, EventNotifier); 2],
    calls: [(EventConsumer, EventNotifier); 2],
    errors: (EventConsumer, EventNotifier),
}

impl Guest {
    /// Entries of a ring.
    pub(crate) const SIZE: u16 = 16;
    /// Requests that each ring begins with.
    pub(crate) const REQUESTS: u32 = 3;

    pub(crate) fn new() -> Self {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile());
        let file = file.expect("a file");
        file.set_len(REGIONS.iter().map(|(_, size, _)| size).sum()).expect("its length");
        let mut parts = REGIONS.map(|(at, size, offset)| {
            let part = FileOffset::new(file.try_clone().expect("a copy"), offset);
            (GuestAddress(at), size as usize, Some(part))
        });
        parts.sort_by_key(|part| part.0);
        let memory = GuestMemoryMmap::from_ranges_with_files(parts).expect("guest memory");
        let rings = Self::fresh(&memory);
        let (kicks, calls) = ([event(), event()], [event(), event()]);
        Self { file, memory, rings, kicks, calls, errors: event() }
    }

    fn fresh(memory: &GuestMemoryMmap) -> [Driver; 2] {
        [0, 1].map(|queue| Driver::at(memory, HIGH + queue * 0x3_0000, Self::SIZE, 0))
    }

    /// Lays both rings out anew: a read, a write and a flush are available in each.
    pub(crate) fn reset(&mut self) {
        self.rings = Self::fresh(&self.memory);
        for (ring, area) in self.rings.iter_mut().zip([AREA, AREA + 0x1_0000]) {
            // Whatever a guest has asked for may have come here.
            ring.write(ring.table, &[0; 256]);
            ring.store(ring.available_ring(), 0);
            ring.store(ring.used_ring(), 0);
            let (head, status, data) = (area, area + 0x1000, area + 0x2000);
            for (number, kind) in [IN, OUT, FLUSH].into_iter().enumerate() {
                let place = number as u64 * 16;
                ring.write(head + place, &header(kind, 2));
                ring.write(status + place, &[UNTOUCHED]);
                let mut pieces: Vec<Piece> = vec![(head + place, 16, false)];
                if kind != FLUSH {
                    pieces.push((data, 512, kind == IN));
                }
                pieces.push((status + place, 1, true));
                ring.send(&pieces);
            }
        }
        for (consumer, _) in self.kicks.iter().chain(&self.calls).chain([&self.errors]) {
            was_signalled(consumer);
        }
    }

    /// How many requests have come back.
    pub(crate) fn used(&self) -> u32 {
        self.rings.iter().map(|ring| u32::from(ring.load(ring.used_ring() + 2))).sum()
    }

    /// All requests were done.
    pub(crate) fn assert_done(&mut self) {
        for (ring, area) in self.rings.iter_mut().zip([AREA, AREA + 0x1_0000]) {
            assert_eq!(ring.used().len(), Self::REQUESTS as usize);
            for number in 0..u64::from(Self::REQUESTS) {
                assert_eq!(ring.read(area + 0x1000 + number * 16, 1), [0]);
            }
        }
    }

    /// Waits until so many requests have come back.
    pub(crate) fn wait_for(&self, count: u32, patience: Duration) {
        let start = Instant::now();
        while self.used() < count {
            assert!(start.elapsed() < patience, "a guest is not served");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// What each queue writes is what it reads; all earlier requests have come back.
    pub(crate) fn assert_keeps(&mut self, byte: u8, patience: Duration) {
        let before = self.used();
        for (step, kind) in [OUT, IN].into_iter().enumerate() {
            for (queue, area) in [AREA, AREA + 0x1_0000].into_iter().enumerate() {
                let (ring, place) = (&mut self.rings[queue], (8 + step as u64) * 16);
                let data = area + 0x3000 + step as u64 * 0x1000;
                ring.write(area + place, &header(kind, 16 + 8 * queue as u64));
                ring.write(area + 0x1000 + place, &[UNTOUCHED]);
                let content = if kind == OUT { byte.wrapping_add(queue as u8) } else { UNTOUCHED };
                ring.write(data, &[content; 1024]);
                ring.send(&[
                    (area + place, 16, false),
                    (data, 1024, kind == IN),
                    (area + 0x1000 + place, 1, true),
                ]);
                self.kick(queue);
            }
            self.wait_for(before + 2 * (step as u32 + 1), patience);
        }
        for (queue, area) in [AREA, AREA + 0x1_0000].into_iter().enumerate() {
            let ring = &mut self.rings[queue];
            let statuses = [8u64, 9].map(|place| ring.read(area + 0x1000 + place * 16, 1)[0]);
            assert_eq!(statuses, [0; 2]);
            let read = ring.read(area + 0x4000, 1024);
            assert!(read.iter().all(|seen| *seen == byte.wrapping_add(queue as u8)));
        }
    }

    pub(crate) fn kick(&self, queue: usize) {
        // A counter that is full was signalled.
        let _ = self.kicks[queue].1.notify();
    }

    pub(crate) fn kick_end(&self, queue: usize) -> RawFd {
        self.kicks[queue].0.as_raw_fd()
    }

    pub(crate) fn call_end(&self, queue: usize) -> RawFd {
        self.calls[queue].1.as_raw_fd()
    }

    pub(crate) fn error_end(&self) -> RawFd {
        self.errors.1.as_raw_fd()
    }

    /// Descriptors, used ring and available ring, as the front-end knows them.
    pub(crate) fn addresses(&self, queue: usize) -> [u64; 3] {
        let ring = &self.rings[queue];
        [ring.table, ring.used_ring(), ring.available_ring()].map(|at| at - HIGH + USER)
    }
}

/// Descriptors that belong to nothing that a front-end would pass.
pub(crate) struct Menu {
    short: File,
    others: Vec<File>,
    sockets: (UnixStream, UnixStream),
}

impl Menu {
    pub(crate) fn new() -> Self {
        let short = tempfile::tempfile().expect("a file");
        short.set_len(100).expect("its length");
        let others = ["/dev/null", "/", "/dev/zero", "/proc/self/status"].map(open).into();
        Self { short, others, sockets: UnixStream::pair().expect("a pair") }
    }

    pub(crate) fn pick(&self, choice: u8) -> RawFd {
        match usize::from(choice) % 8 {
            0 => self.short.as_raw_fd(),
            1 => self.sockets.0.as_raw_fd(),
            2 => self.sockets.1.as_raw_fd(),
            other => self.others[other % self.others.len()].as_raw_fd(),
        }
    }
}
