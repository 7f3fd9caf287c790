//! Chains by their heads, without the guest's available ring.
//!
//! The entry of the available ring that named a chain may have been used again while the chain was
//! under way, so chains that are taken once more are named by a ring of our own: one page of memory
//! beside the guest's, in a map that nothing but the walk along descriptors sees.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::sync::Arc;
use crate::worker::queue::RingError;

/// Bytes of the ring's memory.
const PAGE: u64 = 4096;
/// Where the index and the entries of an available ring are.
const INDEX_AT: u64 = 2;
const ENTRIES_AT: u64 = 4;

/// Gives the chain with this head.
///
/// # Errors
/// When the guest's memory fills the address space.
pub(super) fn chain(
    head: u16,
    state: QueueState,
    memory: &GuestMemoryMmap,
    each: impl FnMut(DescriptorChain<&GuestMemoryMmap>),
) -> Result<(), RingError> {
    let at = gap(memory).ok_or(RingError::OutsideMemory)?;
    let page = GuestRegionMmap::<()>::from_range(at, PAGE as usize, None);
    let page = page.map_err(|_| RingError::OutsideMemory)?;
    let memory = memory.insert_region(Arc::new(page)).map_err(|_| RingError::OutsideMemory)?;
    memory.write_obj(1_u16.to_le(), at.unchecked_add(INDEX_AT))?;
    memory.write_obj(head.to_le(), at.unchecked_add(ENTRIES_AT))?;
    let state = QueueState { avail_ring: at.0, next_avail: 0, ready: true, ..state };
    let mut queue = Queue::try_from(state).map_err(RingError::Setup)?;
    queue.set_ready(true);
    queue.iter(&memory).map_err(RingError::Available)?.for_each(each);
    Ok(())
}

/// A page's room in the address space that the guest's memory leaves. Not the first page: a ring
/// at address zero is none.
fn gap(memory: &GuestMemoryMmap) -> Option<GuestAddress> {
    let mut at = PAGE;
    for region in memory.iter() {
        if at.checked_add(PAGE)? <= region.start_addr().0 {
            break;
        }
        at = at.max(region.last_addr().0.checked_add(1)?.checked_next_multiple_of(PAGE)?);
    }
    at.checked_add(PAGE).map(|_| GuestAddress(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_beside_the_memory() {
        let none = GuestMemoryMmap::default();
        assert_eq!(gap(&none), Some(GuestAddress(PAGE)));
        for (ranges, expected) in [
            (&[(0, 0x1000)][..], 0x1000),
            (&[(0, 0x800)], 0x1000),
            (&[(0, 0x1800)], 0x2000),
            (&[(0x1000, 0x1000), (0x2800, 0x800)], 0x3000),
            (&[(0x1800, 0x800), (0x3000, 0x1000)], 0x2000),
            (&[(1 << 45, 0x1000)], 0x1000),
        ] {
            let regions: Vec<_> =
                ranges.iter().map(|(at, size)| (GuestAddress(*at), *size)).collect();
            let memory = GuestMemoryMmap::from_ranges(&regions).expect("memory");
            assert_eq!(gap(&memory), Some(GuestAddress(expected)), "{ranges:x?}");
        }
    }
}
