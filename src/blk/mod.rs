//! The virtio-blk device: what it offers, its configuration space, and its requests.
//!
//! Section numbers are those of the virtio specification 1.2; 5.2 is the block device.

mod bucket;
pub mod chain;
pub mod complain;
pub mod limit;
pub mod memory;
pub mod rates;
pub mod request;
pub mod serve;
pub mod stats;
pub mod token;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::blk::limit::Limiter;
use crate::image::Image;
use crate::raw::Raw;
use crate::storage::FileId;
use crate::sync::{Arc, AtomicBool, Ordering};

/// Bytes in a sector: the unit of every offset and length on the wire, whatever the block size.
pub const SECTOR: u64 = 512;
/// Bytes of a serial number (5.2.6.1).
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most sectors of one discard or write-zeroes segment: 256 MiB, so that one request does not
/// keep the others waiting for seconds.
pub const MAX_ERASE_SECTORS: u32 = 512 << 10;
/// Most segments of one discard or write-zeroes request.
pub const MAX_ERASE_SEGMENTS: u32 = 32;
/// Bytes of configuration space that can be read: those that the device does not know are zeros.
pub const CONFIG_BYTES: u32 = 256;

/// Most data descriptors that the guest is asked to use in a request; more are served too.
const SEG_MAX: u32 = 126;
/// The host's unit of reading and writing in bytes, told to guests as the physical block.
const PHYSICAL_BLOCK: u32 = 4096;
/// Where the write-cache byte lies in the configuration space.
const WRITEBACK_OFFSET: u32 = 32;

/// The feature bit that tells whether a guest knows when to flush.
pub const FEATURE_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// The feature bit of notifications that say which entry they wait for.
pub const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What the operator chose for the device.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The guest's logical block in bytes: 512 or 4096.
    pub block_size: u32,
    /// Queues offered.
    pub queues: u16,
    /// The largest queue accepted; a power of two.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number, padded with NUL bytes.
    pub serial: [u8; SERIAL_BYTES],
    /// Whether the device starts with a write cache: completed writes wait for a flush.
    pub write_back: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            block_size: 512,
            queues: 64,
            queue_size: 1024,
            serial: *b"vhost-user-qcow2\0\0\0\0",
            write_back: true,
        }
    }
}

/// One virtio-blk device over one image; shared by the session and all workers.
#[derive(Debug)]
pub struct Device {
    image: Arc<Image>,
    settings: Settings,
    write_back: AtomicBool,
    limiter: Arc<Limiter>,
}

impl Device {
    /// A device over `image`.
    pub fn new(image: Arc<Image>, settings: Settings) -> Self {
        let write_back = AtomicBool::new(settings.write_back);
        Self { image, settings, write_back, limiter: Limiter::new() }
    }

    /// The same device with rate limits that it may share with others over the same image.
    #[must_use]
    pub fn with_limiter(self, limiter: Arc<Limiter>) -> Self {
        Self { limiter, ..self }
    }

    /// What limits the rates of all workers together.
    pub fn limiter(&self) -> &Arc<Limiter> {
        &self.limiter
    }

    /// The same device over a disk of no bytes, which stands in while the image is changed.
    #[must_use]
    pub fn without_image(&self) -> Self {
        Self::of_no_bytes(self.settings.clone()).with_limiter(Arc::clone(&self.limiter))
    }

    /// A device over a disk of no bytes, which stands in until there is an image.
    pub fn of_no_bytes(settings: Settings) -> Self {
        let nothing = Image::from_raw(Raw::new(FileId(u32::MAX), 0), true);
        Self::new(Arc::new(nothing), settings)
    }

    /// The guest's disk, if nothing else holds it.
    pub fn image_mut(&mut self) -> Option<&mut Image> {
        Arc::get_mut(&mut self.image)
    }

    /// The guest's disk.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What the operator chose.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether completed writes may wait for a flush; the guest may change it.
    pub fn is_write_back(&self) -> bool {
        self.write_back.load(Ordering::Relaxed)
    }

    /// Lets completed writes wait for a flush from now on, or not.
    pub fn set_write_back(&self, write_back: bool) {
        self.write_back.store(write_back, Ordering::Relaxed);
    }

    /// The virtio feature bits offered (5.2.3 and 6).
    ///
    /// SIZE_MAX is not among them: some guests then cut requests to a size that hurts.
    pub fn features(&self) -> u64 {
        let mut features = bits(&[
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ]);
        if self.settings.queues > 1 {
            features |= bits(&[VIRTIO_BLK_F_MQ]);
        }
        features |= if self.image.is_read_only() {
            bits(&[VIRTIO_BLK_F_RO])
        } else {
            bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES])
        };
        features
    }

    /// `len` bytes of the configuration space from `offset` on (5.2.4), for a driver that has
    /// a write cache or not; `None` when they reach beyond [`CONFIG_BYTES`].
    ///
    /// Front-ends ask for as many bytes as their own idea of the structure has, so any range is
    /// served, and what this device does not know is zero.
    pub fn read_config(&self, offset: u32, len: u32, write_back: bool) -> Option<Vec<u8>> {
        let end = offset.checked_add(len).filter(|end| *end <= CONFIG_BYTES)?;
        let mut space = self.config(write_back);
        space.resize(CONFIG_BYTES as usize, 0);
        space.truncate(end as usize);
        Some(space.split_off(offset as usize))
    }

    /// The fields of `struct virtio_blk_config` in order, little endian.
    fn config(&self, write_back: bool) -> Vec<u8> {
        let block = self.settings.block_size;
        let physical = PHYSICAL_BLOCK.max(block);
        let granularity = u32::try_from(self.image.discard_granularity()).unwrap_or(physical);
        let granularity = granularity.max(physical);
        let mut space = Vec::with_capacity(CONFIG_BYTES as usize);
        space.extend((self.image.size() / SECTOR).to_le_bytes());
        space.extend(0u32.to_le_bytes()); // size_max
        let seg_max = SEG_MAX.min(u32::from(self.settings.queue_size).saturating_sub(2)).max(1);
        space.extend(seg_max.to_le_bytes());
        space.extend([0; 4]); // geometry
        space.extend(block.to_le_bytes());
        // Topology: log2 of blocks in a physical block, the offset of the first aligned one, and
        // the smallest and the best size of a transfer in blocks.
        space.extend([physical.ilog2().abs_diff(block.ilog2()) as u8, 0]);
        space.extend(((physical / block) as u16).to_le_bytes());
        space.extend((granularity / block).to_le_bytes());
        space.extend([u8::from(write_back), 0]);
        space.extend(self.settings.queues.to_le_bytes());
        let (sectors, segments) = match self.image.is_read_only() {
            true => (0, 0),
            false => (MAX_ERASE_SECTORS, MAX_ERASE_SEGMENTS),
        };
        space.extend(sectors.to_le_bytes());
        space.extend(segments.to_le_bytes());
        space.extend((granularity / SECTOR as u32).to_le_bytes());
        space.extend(sectors.to_le_bytes());
        space.extend(segments.to_le_bytes());
        let may_unmap = !self.image.is_read_only() && self.image.policy().unmaps();
        space.push(u8::from(may_unmap)); // write_zeroes_may_unmap
        space
    }
}

/// What a write of `bytes` at `offset` of the configuration space makes of the write cache. The
/// driver may set that byte (5.2.5), and no other: `None` is for everything else.
pub fn write_cache(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset, bytes) {
        (WRITEBACK_OFFSET, [value @ (0 | 1)]) => Some(*value == 1),
        _ => None,
    }
}

fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().fold(0, |mask, number| mask | 1 << number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::policy::{Discards, Policy};

    fn device(read_only: bool, settings: Settings) -> Device {
        let image = Image::from_raw(Raw::new(FileId(0), 10 << 20), read_only);
        Device::new(Arc::new(image), settings)
    }

    #[test]
    fn the_configuration_space_is_served_at_any_offset_and_length() {
        let device = device(false, Settings::default());
        let whole = device.read_config(0, CONFIG_BYTES, true).expect("all of it");
        assert_eq!(whole.len(), 256);
        assert!(whole[60..].iter().all(|byte| *byte == 0));
        for (offset, len) in [(0, 57), (0, 60), (0, 200), (3, 57), (31, 1), (255, 1), (256, 0)] {
            let part = device.read_config(offset, len, true).expect("inside");
            assert_eq!(part, whole[offset as usize..(offset + len) as usize]);
        }
        for (offset, len) in [(0, 257), (256, 1), (u32::MAX, 1), (1, u32::MAX)] {
            assert_eq!(device.read_config(offset, len, true), None);
        }
    }

    #[test]
    fn the_fields_lie_where_the_specification_puts_them() {
        let settings = Settings { queues: 5, ..Settings::default() };
        let space = device(false, settings).read_config(0, 60, true).expect("inside");
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!(word(0), (10 << 20) / 512);
        assert_eq!((word(8), word(12), word(20)), (0, 126, 512));
        assert_eq!(space[24..28], [3, 0, 8, 0]);
        assert_eq!(word(28), 8);
        assert_eq!(space[32..36], [1, 0, 5, 0]);
        assert_eq!((word(36), word(40), word(44)), (MAX_ERASE_SECTORS, 32, 8));
        assert_eq!((word(48), word(52), space[56]), (MAX_ERASE_SECTORS, 32, 1));
    }

    #[test]
    fn blocks_of_4096_bytes_are_their_own_physical_blocks() {
        let settings = Settings { block_size: 4096, queue_size: 16, ..Settings::default() };
        let space = device(false, settings).read_config(0, 60, true).expect("inside");
        assert_eq!(space[12..16], 14u32.to_le_bytes(), "a small queue bounds the segments");
        assert_eq!(space[20..24], 4096u32.to_le_bytes());
        assert_eq!(space[24..32], [0, 0, 1, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn ignored_discards_are_offered_and_give_nothing_back() {
        let policy = Policy { discards: Discards::Ignore, ..Policy::default() };
        let image = Image::from_raw(Raw::new(FileId(0), 10 << 20), false).with_policy(policy);
        let device = Device::new(Arc::new(image), Settings::default());
        let erase = bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        assert_eq!(device.features() & erase, erase);
        assert_eq!(device.read_config(56, 1, true), Some(vec![0]), "write-zeroes cannot unmap");
    }

    #[test]
    fn only_the_write_cache_byte_can_be_written() {
        assert_eq!((write_cache(32, &[0]), write_cache(32, &[1])), (Some(false), Some(true)));
        for (offset, bytes) in [(0, &[1][..]), (32, &[2]), (32, &[1, 0]), (32, &[]), (31, &[1])] {
            assert_eq!(write_cache(offset, bytes), None);
        }
        let device = device(false, Settings::default());
        assert_eq!(device.read_config(32, 1, false), Some(vec![0]));
        assert_eq!(device.read_config(32, 1, true), Some(vec![1]));
    }

    #[test]
    fn a_read_only_disk_offers_no_way_to_change_it() {
        let (writable, frozen) =
            (device(false, Settings::default()), device(true, Settings::default()));
        let erase = bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        assert_eq!(writable.features() & erase, erase);
        assert_eq!(frozen.features() & erase, 0);
        assert_ne!(frozen.features() & bits(&[VIRTIO_BLK_F_RO]), 0);
        assert_eq!(writable.features() & bits(&[1]), 0, "SIZE_MAX is not offered");
    }
}
