#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! Finding guest addresses: which of the regions that the front-end has shared hold them.
//!
//! What was found is kept for a turn of the worker and no longer, so nothing has to be found again
//! when the front-end changes the memory.

use std::cell::Cell;

use vm_memory::{AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend};
use vm_memory::{GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vm_memory::{VolatileMemory, VolatileSlice};

use crate::sync::Ordering;

/// The guest's memory, for many look-ups: most addresses lie in the region of the one before.
#[derive(Debug)]
pub struct Finder<'a> {
    map: &'a GuestMemoryMmap,
    last: Cell<Option<&'a GuestRegionMmap>>,
}

impl<'a> Finder<'a> {
    /// Looks up addresses in `map`.
    pub fn new(map: &'a GuestMemoryMmap) -> Self {
        Self { map, last: Cell::new(None) }
    }

    fn region(&self, at: u64) -> Option<&'a GuestRegionMmap> {
        let holds =
            |region: &&GuestRegionMmap| at.wrapping_sub(region.start_addr().0) < region.len();
        self.last.get().filter(holds).or_else(|| {
            let found = self.map.find_region(GuestAddress(at));
            self.last.set(found);
            found
        })
    }

    /// The bytes from `at` on, if one region holds all of them.
    pub fn slice(&self, at: u64, len: usize) -> Option<VolatileSlice<'a, ()>> {
        let region = self.region(at)?;
        let offset = usize::try_from(at.wrapping_sub(region.start_addr().0)).ok()?;
        VolatileMemory::get_slice(&**region, offset, len).ok()
    }

    /// Gives the bytes from `at` on to `each`, in as many slices as regions hold them; returns
    /// whether all of them lie in guest memory.
    pub fn slices(&self, at: u64, len: usize, mut each: impl FnMut(VolatileSlice<'a, ()>)) -> bool {
        if len == 0 {
            return true;
        }
        if let Some(slice) = self.slice(at, len) {
            each(slice);
            return true;
        }
        let mut mapped = true;
        for slice in GuestMemoryBackend::get_slices(self.map, GuestAddress(at), len) {
            match slice {
                Ok(slice) => each(slice),
                Err(_) => mapped = false,
            }
        }
        mapped
    }
}

/// A range of guest memory that was found once and is used several times.
#[derive(Debug, Clone, Copy)]
pub enum Span<'a> {
    /// In one region.
    Whole(VolatileSlice<'a, ()>),
    /// From this address on across regions, or not in memory at all: looked up at each use.
    Scattered(&'a GuestMemoryMmap, u64),
}

/// What access to guest memory gives.
type Result<T> = std::result::Result<T, GuestMemoryError>;

impl<'a> Span<'a> {
    /// The range of `len` bytes from `at` on.
    pub fn find(memory: &Finder<'a>, at: u64, len: usize) -> Self {
        memory.slice(at, len).map_or(Self::Scattered(memory.map, at), Self::Whole)
    }

    /// Reads a value, in one access where one region holds the range.
    ///
    /// # Errors
    /// When it does not lie in guest memory.
    pub fn read<T: ByteValued>(&self, offset: usize) -> Result<T> {
        match self {
            Self::Whole(slice) => Ok(slice.get_ref(offset)?.load()),
            Self::Scattered(map, at) => map.read_obj(address(*at, offset)?),
        }
    }

    /// Writes a value, in one access where one region holds the range.
    ///
    /// # Errors
    /// When it does not lie in guest memory.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) -> Result<()> {
        match self {
            Self::Whole(slice) => {
                slice.get_ref(offset)?.store(value);
                Ok(())
            }
            Self::Scattered(map, at) => map.write_obj(value, address(*at, offset)?),
        }
    }

    /// Reads a value that the guest changes at the same time.
    ///
    /// # Errors
    /// When it does not lie in guest memory, or not at a multiple of its size.
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        match self {
            Self::Whole(slice) => Ok(slice.load(offset, order)?),
            Self::Scattered(map, at) => map.load(address(*at, offset)?, order),
        }
    }

    /// Writes a value that the guest reads at the same time.
    ///
    /// # Errors
    /// When it does not lie in guest memory, or not at a multiple of its size.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) -> Result<()> {
        match self {
            Self::Whole(slice) => Ok(slice.store(value, offset, order)?),
            Self::Scattered(map, at) => map.store(value, address(*at, offset)?, order),
        }
    }
}

fn address(at: u64, offset: usize) -> Result<GuestAddress> {
    let address = u64::try_from(offset).ok().and_then(|offset| at.checked_add(offset));
    address.map(GuestAddress).ok_or(GuestMemoryError::GuestAddressOverflow)
}
