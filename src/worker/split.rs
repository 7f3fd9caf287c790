#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! The words of a split ring (virtio 1.2, 2.7.6 and 2.7.8), and how far it was taken and published.

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use crate::blk::chain::table_bytes;
use crate::blk::memory::{Finder, Span};
use crate::blk::token::Used;
use crate::sync::{Ordering, fence};
use crate::worker::queue::RingError;

/// Where the index is in the available ring and in the used ring, behind the flags.
const INDEX: usize = 2;
/// Where the entries of both begin; one word follows them.
const ENTRIES: usize = 4;
/// Bytes of an entry of the available ring, and of the used ring.
const AVAILABLE_BYTES: usize = 2;
const USED_BYTES: usize = 8;
/// Bytes of both rings beside their entries.
const OTHER_BYTES: usize = 6;

/// What access to guest memory gives.
type Result<T> = std::result::Result<T, GuestMemoryError>;

/// A ring whose size and addresses make sense.
#[derive(Debug)]
pub(super) struct Split {
    /// Entries; a power of two.
    size: u16,
    event_idx: bool,
    /// Guest addresses of its parts.
    table: u64,
    available: u64,
    used: u64,
    /// The next entry of the available ring to take.
    pub(super) next_available: u16,
    /// The next entry of the used ring to fill.
    pub(super) next_used: u16,
}

impl Split {
    /// The ring that `state` describes. The used ring goes on where whoever served it before has
    /// left it.
    ///
    /// # Errors
    /// When size or alignment are wrong, or it does not lie in `memory`.
    pub(super) fn new(
        state: QueueState,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Self, RingError> {
        let mut queue = Queue::try_from(state).map_err(RingError::Setup)?;
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(RingError::OutsideMemory);
        }
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(RingError::Setup)?;
        Ok(Self {
            size: queue.size(),
            event_idx: queue.event_idx_enabled(),
            table: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: used.0,
        })
    }

    /// Entries of the ring.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The guest address of the used ring.
    pub(super) fn used_at(&self) -> u64 {
        self.used
    }

    /// Its descriptors.
    pub(super) fn table<'a>(&self, memory: &Finder<'a>) -> Span<'a> {
        Span::find(memory, self.table, table_bytes(self.size))
    }

    /// What the driver writes.
    pub(super) fn available<'a>(&self, memory: &Finder<'a>) -> Available<'a> {
        let entries = usize::from(self.size).saturating_mul(AVAILABLE_BYTES);
        Available {
            span: Span::find(memory, self.available, entries.saturating_add(OTHER_BYTES)),
            size: self.size,
        }
    }

    /// What the device writes.
    pub(super) fn used<'a>(&self, memory: &Finder<'a>) -> UsedRing<'a> {
        let entries = usize::from(self.size).saturating_mul(USED_BYTES);
        UsedRing {
            span: Span::find(memory, self.used, entries.saturating_add(OTHER_BYTES)),
            size: self.size,
        }
    }

    /// Whether the driver wants to be told that the used index went from `old` to `new` (2.7.7).
    pub(super) fn wants_notification(
        &self,
        memory: &Finder<'_>,
        old: u16,
        new: u16,
    ) -> Result<bool> {
        // The used index must be visible before the driver's wish is read: a driver that changes
        // its wish looks at the index afterwards.
        fence(Ordering::SeqCst);
        let available = self.available(memory);
        if self.event_idx {
            let event = available.event()?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(u32::from(available.flags()?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks for a kick with the next chain. Returns whether there is one already, which nobody will
    /// kick for.
    pub(super) fn arm(&self, memory: &Finder<'_>) -> Result<bool> {
        let used = self.used(memory);
        if self.event_idx {
            used.set_event(self.next_available)?
        } else {
            used.set_flags(0)?
        }
        // The wish must be visible before the index is read, as above with the sides changed.
        fence(Ordering::SeqCst);
        Ok(self.available(memory).index(Ordering::Relaxed)? != self.next_available)
    }

    /// Asks for no kicks. With EVENT_IDX there are none as it is, because the entry that was asked
    /// for lies behind; returns whether anything was written.
    pub(super) fn quieten(&self, memory: &Finder<'_>) -> bool {
        const QUIET: u32 = VRING_USED_F_NO_NOTIFY;
        // It is a hint; a ring that went away is found out where it matters.
        !self.event_idx
            && u16::try_from(QUIET).is_ok_and(|flags| self.used(memory).set_flags(flags).is_ok())
    }
}

/// Where in a ring of `size` entries of `bytes` bytes the entry with a running number lies.
fn entry(number: u16, size: u16, bytes: usize) -> usize {
    let slot = usize::from(number & size.wrapping_sub(1));
    slot.saturating_mul(bytes).saturating_add(ENTRIES)
}

/// The word behind the entries.
fn behind(size: u16, bytes: usize) -> usize {
    usize::from(size).saturating_mul(bytes).saturating_add(ENTRIES)
}

/// The part of a ring that the driver writes, found in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Available<'a> {
    span: Span<'a>,
    size: u16,
}

impl Available<'_> {
    /// How many chains were made available since the ring was new, as far as 16 bits tell.
    pub(super) fn index(&self, order: Ordering) -> Result<u16> {
        Ok(u16::from_le(self.span.load(INDEX, order)?))
    }

    /// The first descriptor of the chain with a running number. Read after the index.
    pub(super) fn head(&self, number: u16) -> Result<u16> {
        let at = entry(number, self.size, AVAILABLE_BYTES);
        Ok(u16::from_le(self.span.load(at, Ordering::Relaxed)?))
    }

    fn flags(&self) -> Result<u16> {
        Ok(u16::from_le(self.span.load(0, Ordering::Relaxed)?))
    }

    /// The entry of the used ring that the driver waits for.
    fn event(&self) -> Result<u16> {
        let at = behind(self.size, AVAILABLE_BYTES);
        Ok(u16::from_le(self.span.load(at, Ordering::Relaxed)?))
    }
}

/// The part of a ring that the device writes, found in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct UsedRing<'a> {
    span: Span<'a>,
    size: u16,
}

impl UsedRing<'_> {
    /// Fills the entry with a running number.
    pub(super) fn put(&self, number: u16, used: Used) -> Result<()> {
        // The head and then the length, each a little-endian word.
        let element = u64::from(used.len) << 32 | u64::from(used.head);
        self.span.write(entry(number, self.size, USED_BYTES), element.to_le())
    }

    /// Gives all entries before this number to the driver.
    pub(super) fn set_index(&self, index: u16) -> Result<()> {
        self.span.store(INDEX, index.to_le(), Ordering::Release)
    }

    fn set_flags(&self, flags: u16) -> Result<()> {
        self.span.store(0, flags.to_le(), Ordering::Relaxed)
    }

    /// Says which entry of the available ring the device waits for.
    fn set_event(&self, number: u16) -> Result<()> {
        self.span.store(behind(self.size, USED_BYTES), number.to_le(), Ordering::Relaxed)
    }
}
