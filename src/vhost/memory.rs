#![expect(unsafe_code, reason = "a part of a mapping is a region of guest memory")]
//! The guest's memory as the front-end describes it: regions of files it has passed.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::bytes::{round_down, round_up};
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::worker::GuestMemory;

/// Most regions: as many as QEMU and the kernel have.
pub const MAX_SLOTS: usize = 509;
/// The smallest unit of a mapping in bytes.
const PAGE: u64 = 4096;

/// One region of the guest's memory.
#[derive(Debug, Clone)]
struct Region {
    /// First guest address.
    guest: u64,
    /// Length in bytes.
    size: u64,
    /// First address in the front-end's own address space, which ring addresses refer to.
    user: u64,
    /// Where it begins in its file.
    offset: u64,
    region: Arc<GuestRegionMmap>,
    /// The mapping that the region is a part of.
    mapping: Arc<MmapRegion>,
}

/// All regions, by guest address.
#[derive(Debug, Clone, Default)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

fn refused(region: &VhostUserMemoryRegion, why: impl std::fmt::Display) -> Error {
    let (guest, size) = (region.guest_phys_addr, region.memory_size);
    Error::refused(format!("memory region of {size:#x} bytes at {guest:#x}"), why.to_string())
}

impl MemoryTable {
    /// Maps a region and adds it.
    ///
    /// # Errors
    /// When the file cannot be mapped, the region reaches beyond it or overlaps another, or there
    /// are too many.
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        if self.regions.len() == MAX_SLOTS {
            return Err(refused(region, format!("there are {MAX_SLOTS} regions already")));
        }
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let end = guest.checked_add(size).filter(|_| size != 0);
        let end = end.ok_or_else(|| refused(region, "it is empty or wraps around"))?;
        let place = self.regions.partition_point(|other| other.guest < guest);
        let (before, after) = self.regions.split_at(place);
        let overlaps = before.last().is_some_and(|other| other.guest + other.size > guest)
            || after.first().is_some_and(|other| other.guest < end);
        if overlaps {
            return Err(refused(region, "it overlaps another"));
        }
        let (part, mapping) = map(region, file)?;
        let part = GuestRegionMmap::with_arc(part, GuestAddress(guest))
            .ok_or_else(|| refused(region, "it wraps around"))?;
        let offset = region.mmap_offset;
        let region = Region { guest, size, user, offset, region: Arc::new(part), mapping };
        self.regions.insert(place, region);
        Ok(())
    }

    /// Removes the region with these addresses and this size; returns whether there was one.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> bool {
        let wanted = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let before = self.regions.len();
        self.regions.retain(|other| (other.guest, other.size, other.user) != wanted);
        self.regions.len() != before
    }

    /// The regions as the front-end has described them, with their files.
    pub(super) fn described(&self) -> impl Iterator<Item = (VhostUserMemoryRegion, &File)> {
        self.regions.iter().filter_map(|region| {
            let Region { guest, size, user, offset, mapping, .. } = region;
            let file = mapping.file_offset()?.file();
            Some((VhostUserMemoryRegion::new(*guest, *size, *user, *offset), file))
        })
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The guest address of an address in the front-end's address space.
    pub fn translate(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            (offset < region.size).then(|| region.guest + offset)
        })
    }

    /// The memory for the workers.
    pub fn memory(&self) -> Arc<GuestMemory> {
        let regions = self.regions.iter().map(|part| Arc::clone(&part.region)).collect();
        // It fails for an empty list alone: the regions are in order and do not overlap.
        let map = GuestMemoryMmap::from_arc_regions(regions).unwrap_or_default();
        let mappings = self.regions.iter().map(|part| Arc::clone(&part.mapping)).collect();
        Arc::new(GuestMemory::new(map, mappings))
    }
}

/// Maps a region; returns it and the whole mapping, which is larger where the file consists of huge
/// pages: those are only mapped whole, while a region may begin anywhere in one.
fn map(region: &VhostUserMemoryRegion, file: File) -> Result<(Arc<MmapRegion>, Arc<MmapRegion>)> {
    let (offset, size) = (region.mmap_offset, region.memory_size);
    let metadata = file.metadata().map_err(|error| refused(region, error))?;
    let end = offset.checked_add(size).ok_or_else(|| refused(region, "it wraps around"))?;
    if metadata.is_file() && end > metadata.len() {
        // The first access would kill the process.
        let why = format!("its file ends at {:#x}, the region at {end:#x}", metadata.len());
        return Err(refused(region, why));
    }
    let unit = metadata.blksize().max(PAGE);
    let unit = if unit.is_power_of_two() { unit } else { PAGE };
    let start = round_down(offset, unit);
    let last = round_up(end, unit);
    let last = if metadata.is_file() && last > metadata.len() { end } else { last };
    let length = |bytes: u64| {
        usize::try_from(bytes).map_err(|_| refused(region, "it is larger than the address space"))
    };
    let whole = MmapRegion::from_file(FileOffset::new(file, start), length(last - start)?);
    let whole = Arc::new(whole.map_err(|error| refused(region, error))?);
    if (start, last) == (offset, end) {
        return Ok((Arc::clone(&whole), whole));
    }
    let address = whole.as_ptr().wrapping_add(length(offset - start)?);
    // SAFETY: the range lies in `whole`, which every holder of the part holds too: `GuestMemory`
    // keeps both.
    let part =
        unsafe { MmapRegion::build_raw(address, length(size)?, whole.prot(), whole.flags()) };
    let part = part.map_err(|error| refused(region, error))?;
    Ok((Arc::new(part), whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn memory_file(pages: u64) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(pages * PAGE).expect("its length");
        file
    }

    fn region(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, size, user, offset)
    }

    #[test]
    fn parts_of_one_file_are_regions_at_their_own_addresses() {
        let file = memory_file(16);
        let mut table = MemoryTable::default();
        // The guest's low memory and the rest of the file far above, with a hole between.
        let high = 1 << 52;
        for part in
            [region(high, 12 * PAGE, 0x7000_4000, 4 * PAGE), region(0, 3 * PAGE, 0x10_0000, 0)]
        {
            table.add(&part, file.try_clone().expect("a copy")).expect("it is mapped");
        }
        let memory = table.memory();
        memory.map().write_obj(0x1234_5678u32, GuestAddress(high + 8)).expect("write");
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 4 * PAGE + 8).expect("read");
        assert_eq!(u32::from_ne_bytes(bytes), 0x1234_5678);
        assert_eq!(table.translate(0x7000_4010), Some(high + 0x10));
        assert_eq!(table.translate(0x10_0000 + 3 * PAGE), None, "the end is outside");
        assert_eq!(table.translate(0xf_ffff), None);
        assert!(!table.remove(&region(0, 3 * PAGE, 0x20_0000, 0)), "another address");
        assert!(table.remove(&region(0, 3 * PAGE, 0x10_0000, 0)));
        assert_eq!(table.translate(0x10_0000), None);
        let old = memory.map().read_obj::<u32>(GuestAddress(0));
        assert!(old.is_ok(), "who holds the memory keeps the region mapped");
    }

    #[test]
    fn impossible_regions_are_refused() {
        let mut table = MemoryTable::default();
        table.add(&region(PAGE, 2 * PAGE, 0, 0), memory_file(2)).expect("it is mapped");
        for (guest, size, offset, why) in [
            (0, 2 * PAGE, 0, "overlaps"),
            (2 * PAGE, PAGE, 0, "overlaps"),
            (PAGE, 2 * PAGE, 0, "overlaps"),
            (8 * PAGE, 3 * PAGE, 0, "its file ends"),
            (8 * PAGE, PAGE, 2 * PAGE, "its file ends"),
            (8 * PAGE, 0, 0, "empty"),
            (u64::MAX - 10, PAGE, 0, "wraps"),
            (8 * PAGE, PAGE, u64::MAX - 10, "wraps"),
        ] {
            let error = table.add(&region(guest, size, 0, offset), memory_file(2));
            let error = error.expect_err("it is refused").to_string();
            assert!(error.contains(why), "{error}");
        }
        table.add(&region(0, PAGE, 0, 0), memory_file(1)).expect("neighbours do not overlap");
        table.add(&region(3 * PAGE, PAGE, 0, 0), memory_file(1)).expect("nor do these");
    }

    #[test]
    fn the_number_of_regions_is_bounded() {
        let file = memory_file(1);
        let mut table = MemoryTable::default();
        for slot in 0..=MAX_SLOTS as u64 {
            let copy = file.try_clone().expect("a copy");
            let added = table.add(&region(slot * PAGE, PAGE, slot * PAGE, 0), copy);
            assert_eq!(added.is_ok(), slot < MAX_SLOTS as u64);
        }
    }
}
