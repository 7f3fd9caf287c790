//! What tests of the guest's side share: a driver that lays rings out by hand.
//!
//! It writes descriptors one by one and checks nothing, because that is what a hostile guest does.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The chain goes on with the descriptor in `next`.
pub(crate) const NEXT: u16 = 1;
/// The device writes to it.
pub(crate) const WRITE: u16 = 2;
/// What the status byte holds before the device has written it.
pub(crate) const UNTOUCHED: u8 = 0xee;

/// Request types.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;

/// A piece of guest memory: address, length, whether the device writes to it.
pub(crate) type Piece = (u64, u32, bool);

/// One ring in guest memory, from the driver's side.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) size: u16,
    /// Where the descriptor table is; the two rings follow, 64 KiB apart.
    pub(crate) table: u64,
    /// Entries made available so far.
    pub(crate) available: u16,
    /// Entries of the used ring seen so far.
    pub(crate) seen: u16,
    /// The next descriptor that is not in use; tests use few.
    pub(crate) next: u16,
}

impl Driver {
    pub(crate) fn new(memory: &GuestMemoryMmap, table: u64, size: u16) -> Self {
        let memory = memory.clone();
        Self { memory, size, table, available: 0, seen: 0, next: 0 }
    }

    /// A driver whose rings stand at `index` already.
    pub(crate) fn at(memory: &GuestMemoryMmap, table: u64, size: u16, index: u16) -> Self {
        let driver = Self { available: index, seen: index, ..Self::new(memory, table, size) };
        driver.store(driver.available_ring() + 2, index);
        driver.store(driver.used_ring() + 2, index);
        driver
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.table + 0x1_0000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.table + 0x2_0000
    }

    pub(crate) fn store(&self, at: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(at)).expect("ring memory");
    }

    pub(crate) fn load(&self, at: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(at)).expect("ring memory"))
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("guest memory");
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("guest memory");
        bytes
    }

    /// Writes a descriptor into any table.
    pub(crate) fn put(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(at.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Writes a chain into a table from entry `first` on, wrapping at `size`.
    pub(crate) fn put_chain(&self, table: u64, size: u16, first: u16, pieces: &[Piece]) {
        for (index, (at, len, writable)) in pieces.iter().enumerate() {
            let place = (usize::from(first) + index) % usize::from(size);
            let next = (place + 1) % usize::from(size);
            let more = if index + 1 < pieces.len() { NEXT } else { 0 };
            let flags = more | if *writable { WRITE } else { 0 };
            self.put(table, place as u16, *at, *len, flags, next as u16);
        }
    }

    /// Makes a descriptor available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.store(self.available_ring() + 4 + slot * 2, head);
        self.available = self.available.wrapping_add(1);
        self.store(self.available_ring() + 2, self.available);
    }

    /// Makes a chain of descriptors in the ring's own table available; returns its head.
    pub(crate) fn send(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next;
        self.put_chain(self.table, self.size, head, pieces);
        self.next = ((usize::from(head) + pieces.len()) % usize::from(self.size)) as u16;
        self.offer(head);
        head
    }

    /// New entries of the used ring: head and length.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let mut list = Vec::new();
        while self.seen != self.load(self.used_ring() + 2) {
            let at = self.used_ring() + 4 + u64::from(self.seen % self.size) * 8;
            let [head, len] = [at, at + 4].map(|at| {
                u32::from_le(self.memory.read_obj(GuestAddress(at)).expect("ring memory"))
            });
            list.push((u16::try_from(head).expect("a head"), len));
            self.seen = self.seen.wrapping_add(1);
        }
        list
    }
}

/// The bytes of a request's header.
pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// An eventfd that tests watch, and the end that is passed on.
pub(crate) fn event() -> (EventConsumer, EventNotifier) {
    new_event_consumer_and_notifier(EventFlag::NONBLOCK).expect("an eventfd")
}

/// Whether an event was signalled since this was last asked.
pub(crate) fn was_signalled(event: &EventConsumer) -> bool {
    event.consume().is_ok()
}
