//! The driver's side of a split ring (virtio 1.2, 2.7).

use std::collections::VecDeque;
use std::io::{Error, Result};
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where the two rings are behind the descriptor table.
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x8000;

/// A piece of guest memory that a request consists of.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Guest address.
    pub at: u64,
    /// Bytes.
    pub length: u32,
    /// Whether the device writes to it.
    pub writable: bool,
}

/// One ring.
pub struct Ring {
    memory: GuestMemoryMmap,
    table: u64,
    size: u16,
    event_idx: bool,
    /// Entries made available, entries of the used ring seen, and what the daemon was told of.
    available: u16,
    seen: u16,
    told: u16,
    /// Most chains at a time: so many descriptors are left for those that are to come.
    most: usize,
    /// Descriptors that are not in use.
    free: VecDeque<u16>,
    /// By head: the slot that waits for it, and the descriptors of its chain.
    chains: Vec<Option<(usize, Vec<u16>)>>,
}

impl Ring {
    pub(super) fn new(
        memory: &GuestMemoryMmap,
        table: u64,
        size: u16,
        event_idx: bool,
        (start, most): (u16, usize),
    ) -> Self {
        let mut ring = Self {
            memory: memory.clone(),
            table,
            size,
            event_idx,
            available: start,
            seen: start,
            told: start,
            most,
            free: (0..size).collect(),
            chains: vec![None; usize::from(size)],
        };
        ring.store(ring.available_ring() + 2, start);
        ring.store(ring.used_ring() + 2, start);
        ring.want_interrupt();
        ring
    }

    /// Guest address of the descriptor table.
    #[must_use]
    pub fn table(&self) -> u64 {
        self.table
    }

    /// Guest address of the available ring.
    #[must_use]
    pub fn available_ring(&self) -> u64 {
        self.table + AVAILABLE
    }

    /// Guest address of the used ring.
    #[must_use]
    pub fn used_ring(&self) -> u64 {
        self.table + USED
    }

    /// How far the driver is.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// How far the daemon is.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.load(self.used_ring() + 2)
    }

    fn store(&self, at: u64, value: u16) {
        let stored = self.memory.store(value.to_le(), GuestAddress(at), Ordering::Release);
        stored.expect("rings lie in memory");
    }

    fn load(&self, at: u64) -> u16 {
        let loaded = self.memory.load(GuestAddress(at), Ordering::Acquire);
        u16::from_le(loaded.expect("rings lie in memory"))
    }

    fn put(&self, table: u64, index: u16, piece: &Piece, flags: u16, next: u16) {
        let mut bytes = piece.at.to_le_bytes().to_vec();
        bytes.extend(piece.length.to_le_bytes());
        let writable = if piece.writable { WRITE } else { 0 };
        bytes.extend((flags | writable).to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = GuestAddress(table + u64::from(index) * 16);
        self.memory.write_slice(&bytes, at).expect("tables lie in memory");
    }

    /// Makes a chain available; with the table at `indirect` if there is not much room.
    pub(super) fn offer(&mut self, slot: usize, pieces: &[Piece], indirect: u64) -> Result<()> {
        let crowded = self.free.len() < self.most + pieces.len();
        let count = if crowded { 1 } else { pieces.len() };
        if self.free.len() < count {
            return Err(Error::other("the ring is full"));
        }
        let chain: Vec<u16> = self.free.drain(..count).collect();
        if crowded {
            for (index, piece) in (0_u16..).zip(pieces) {
                let flags = if usize::from(index) + 1 < pieces.len() { NEXT } else { 0 };
                self.put(indirect, index, piece, flags, index + 1);
            }
            let length = pieces.len() as u32 * 16;
            let whole = Piece { at: indirect, length, writable: false };
            self.put(self.table, chain[0], &whole, INDIRECT, 0);
        } else {
            for (index, piece) in pieces.iter().enumerate() {
                let next = chain.get(index + 1);
                let flags = if next.is_some() { NEXT } else { 0 };
                let next = next.copied().unwrap_or_default();
                self.put(self.table, chain[index], piece, flags, next);
            }
        }
        let head = chain[0];
        self.chains[usize::from(head)] = Some((slot, chain));
        let entry = self.available_ring() + 4 + u64::from(self.available % self.size) * 2;
        self.store(entry, head);
        self.available = self.available.wrapping_add(1);
        self.store(self.available_ring() + 2, self.available);
        Ok(())
    }

    /// The next answer: its slot and the bytes that were written.
    pub(super) fn take_used(&mut self) -> Result<Option<(usize, u32)>> {
        if self.seen == self.used_index() {
            self.want_interrupt();
            if self.seen == self.used_index() {
                return Ok(None);
            }
        }
        let ahead = self.used_index().wrapping_sub(self.seen);
        let waiting = self.available.wrapping_sub(self.seen);
        if ahead > waiting {
            let why = format!("{ahead} answers came to {waiting} requests");
            return Err(Error::other(why));
        }
        let at = self.used_ring() + 4 + u64::from(self.seen % self.size) * 8;
        let [head, length] = [at, at + 4].map(|at| {
            u32::from_le(self.memory.read_obj(GuestAddress(at)).expect("rings lie in memory"))
        });
        let chain = self.chains.get_mut(head as usize).and_then(Option::take);
        let Some((slot, chain)) = chain else {
            return Err(Error::other(format!("head {head} was answered and was not asked for")));
        };
        self.free.extend(chain);
        self.seen = self.seen.wrapping_add(1);
        Ok(Some((slot, length)))
    }

    /// Asks for an interrupt with the next answer; the used index must be looked at once more.
    fn want_interrupt(&mut self) {
        if self.event_idx {
            self.store(self.available_ring() + 4 + u64::from(self.size) * 2, self.seen);
        }
        fence(Ordering::SeqCst);
    }

    /// Whether the daemon is to be told of what was made available since this was asked last.
    pub(super) fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (std::mem::replace(&mut self.told, self.available), self.available);
        if old == new {
            return false;
        }
        if self.event_idx {
            let event = self.load(self.used_ring() + 4 + u64::from(self.size) * 8);
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        self.load(self.used_ring()) & 1 == 0
    }
}
