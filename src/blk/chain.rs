#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! The descriptors of one chain (virtio 1.2, 2.7.5), each read from guest memory once.
//!
//! The guest may put anything there and change it at any time. A chain gives at most as many
//! descriptors as its table has entries, and what it gives are copies.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::blk::memory::{Finder, Span};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = size_of::<u128>();

/// One descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub at: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// A descriptor from its bytes, as a little-endian number.
    fn new(bytes: u128) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes.to_le_bytes();
        Self {
            at: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        }
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    /// Whether the device may write to the buffer, and only that.
    pub fn is_writable(&self) -> bool {
        self.has(VRING_DESC_F_WRITE)
    }

    /// Whether it names another one.
    pub fn has_next(&self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }
}

/// The descriptors of one chain, one after the other.
///
/// It ends without a word at a loop, at an index or a table outside its bounds, and after 2^32
/// bytes: then the last descriptor it gave names another one.
#[derive(Debug, Clone)]
pub struct Chain<'a> {
    memory: &'a Finder<'a>,
    table: Span<'a>,
    /// Entries of the table.
    size: u16,
    head: u16,
    next: u16,
    /// How many descriptors it may still give.
    left: u16,
    /// Bytes of all buffers so far.
    bytes: u32,
    is_indirect: bool,
}

/// Bytes of the table of a ring with so many entries.
pub fn table_bytes(size: u16) -> usize {
    usize::from(size).saturating_mul(DESCRIPTOR_BYTES)
}

impl<'a> Chain<'a> {
    /// The chain that begins at `head` of a ring's own table, which has `size` entries.
    pub fn new(memory: &'a Finder<'a>, table: Span<'a>, size: u16, head: u16) -> Self {
        Self { memory, table, size, head, next: head, left: size, bytes: 0, is_indirect: false }
    }

    /// The index of the first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The memory that buffers lie in.
    pub fn memory(&self) -> &'a Finder<'a> {
        self.memory
    }

    fn read(&self, index: u16) -> Option<Descriptor> {
        let bytes = self.table.read(usize::from(index).checked_mul(DESCRIPTOR_BYTES)?);
        bytes.ok().map(u128::from_le).map(Descriptor::new)
    }

    /// Goes on in the table that `descriptor` is about (2.7.5.3); such tables do not nest.
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let bytes = usize::try_from(descriptor.len).ok()?;
        if self.is_indirect || bytes.checked_rem(DESCRIPTOR_BYTES) != Some(0) {
            return None;
        }
        self.size = u16::try_from(bytes.checked_div(DESCRIPTOR_BYTES)?).ok()?;
        self.table = Span::find(self.memory, descriptor.at, bytes);
        (self.next, self.left, self.is_indirect) = (0, self.size, true);
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let descriptor = loop {
            if self.next >= self.size {
                return None;
            }
            self.left = self.left.checked_sub(1)?;
            let descriptor = self.read(self.next)?;
            if !descriptor.has(VRING_DESC_F_INDIRECT) {
                break descriptor;
            }
            self.enter(descriptor)?;
        };
        self.bytes = self.bytes.checked_add(descriptor.len)?;
        if descriptor.has_next() {
            self.next = descriptor.next;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}
