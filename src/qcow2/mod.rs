//! qcow2 images: where the guest's bytes live.
//!
//! In reading order: [`mod@format`] and [`geometry`] hold the numbers, [`header`] and `open` turn a
//! file into a [`Qcow2`], `table` caches tables, `map` looks entries up, `refcount` and `alloc`
//! find room, `ahead` asks the host for it, `claims` keeps writers of one cluster apart, `write`,
//! `fill` and `discard` change entries, `flush` makes changes durable in the order that
//! `ORDERING.md` states, `limbo` and `epoch` decide when a freed cluster may be used again. Of
//! compressed clusters, `compress` knows the encodings, `compress_write` where new ones go,
//! `inflated` what was read, `inflaters` who does the work. `snapshot` and `resize` change images
//! that nothing else uses, through what they share in `offline`; `bitmap` keeps dirty bitmaps true.
//! `journal` notes what a killed process must not take along, and `redo` does it again.
//!
//! [`check`] looks for contradictions in an image that nobody uses and repairs them, `mark` changes
//! the header's feature bits in place, `rewrite` and `amend` the rest of the header.
//!
//! A method without a [`Storage`](crate::storage::Storage) argument cannot do I/O and cannot wait.

mod ahead;
mod alloc;
mod amend;
pub mod bitmap;
pub mod check;
mod claims;
mod compress;
mod compress_write;
pub mod create;
mod discard;
mod epoch;
mod fill;
mod flush;
pub mod format;
pub mod geometry;
pub mod header;
mod inflated;
mod inflaters;
pub mod journal;
mod layout;
mod limbo;
mod map;
mod mark;
pub mod measure;
mod offline;
pub mod open;
pub mod packing;
mod redo;
mod refcount;
mod regions;
mod resize;
mod rewrite;
pub mod snapshot;
mod status;
pub mod stream;
mod table;
mod write;

use std::collections::BTreeSet;
use std::fmt;

pub use amend::Amend;
pub(crate) use compress::deflate;
pub(crate) use discard::Erase;
pub(crate) use epoch::{Epochs, Stay};
pub(crate) use inflated::Inflated;
pub use inflated::InflatedBytes;
pub(crate) use inflaters::{Inflaters, Packed};
pub(crate) use map::CompressedExtent;
pub use map::{Extent, WriteTarget};
pub use resize::NewSize;
pub use status::{LayerStatus, StatusKind};
pub use write::WritePlan;

use crate::bytes::{HostOffset, round_up};
use crate::error::{CorruptKind, Error, Kind, Result};
use crate::flush_gate::FlushGate;
use crate::qcow2::ahead::Ahead;
use crate::qcow2::alloc::Allocator;
use crate::qcow2::bitmap::Bitmaps;
use crate::qcow2::claims::Claims;
use crate::qcow2::compress_write::Packer;
use crate::qcow2::format::INCOMPATIBLE_CORRUPT;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Compression, Header};
use crate::qcow2::journal::Journal;
use crate::qcow2::limbo::Limbo;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::regions::Regions;
use crate::qcow2::table::TableCache;
use crate::storage::{FileId, Storage};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, OnceLock, Ordering};

/// How much memory an image's tables may take.
#[derive(Debug, Clone, Copy)]
pub struct CacheSizes {
    /// Most bytes of L2 tables kept; less is taken when the disk needs less.
    pub l2_bytes: u64,
    /// Most bytes of refcount blocks kept.
    pub refcount_bytes: u64,
}

impl Default for CacheSizes {
    /// L2 tables of a 1 TiB disk with 64 KiB clusters.
    fn default() -> Self {
        Self { l2_bytes: 128 << 20, refcount_bytes: 4 << 20 }
    }
}

/// One open qcow2 image; shared by all workers.
pub struct Qcow2 {
    file: FileId,
    /// Device and inode of the file.
    identity: (u64, u64),
    /// The file that holds guest data: the external data file, or the image itself.
    data: FileId,
    header: Header,
    geometry: Geometry,
    /// Whether a backing file shows through where nothing is allocated.
    backed: bool,
    l1: Box<[AtomicU64]>,
    l1_dirty: Mutex<BTreeSet<usize>>,
    l2: TableCache,
    refcounts: Refcounts,
    allocator: Allocator,
    ahead: Ahead,
    /// One task at a time looks for clusters.
    refill: Claims,
    /// Guest clusters whose entries are being changed.
    clusters: Claims,
    /// L1 entries that are being changed.
    tables: Claims,
    regions: Regions,
    limbo: Limbo,
    bitmaps: Bitmaps,
    epochs: Epochs,
    flush: FlushGate,
    /// Changes of L2 entries so far that no journal can bring back, and how many of them are in the
    /// file.
    links: AtomicU64,
    stored_links: AtomicU64,
    /// Where changes of L2 entries are noted, and whether they are.
    journal: Mutex<Option<Arc<Journal>>>,
    journaling: AtomicBool,
    /// Where compressed clusters go, and what was inflated of those that are there.
    packer: Packer,
    inflated: Arc<Inflated>,
    /// Bytes were written since the last sync, to the image and to the data file.
    image_dirty: AtomicBool,
    data_dirty: AtomicBool,
    /// The header's feature bits as they are in the file: incompatible, compatible, autoclear.
    features: Mutex<[u64; 3]>,
    /// The header's feature bits are true of what we write.
    writing: AtomicBool,
    /// Refcounts are written when there is nothing better to do, since the dirty bit is set.
    lazy: AtomicBool,
    /// Nothing that is written changes the guest's bytes: bitmaps of changed clusters stay true.
    bitmaps_stay: AtomicBool,
    starting: Claims,
    poison: OnceLock<Box<str>>,
    /// The image was found to contradict itself, and this was dealt with.
    marked: AtomicBool,
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2").field("file", &self.file).field("header", &self.header).finish()
    }
}

impl Qcow2 {
    /// The disk's size in bytes, rounded up to a sector of 512 bytes: the last cluster has room
    /// for the rest of the sector.
    pub fn size(&self) -> u64 {
        round_up(self.header.size, 512)
    }

    /// The same image, with a cache of inflated clusters that it shares with other layers.
    pub(crate) fn with_inflated(self, inflated: Arc<Inflated>) -> Self {
        Self { inflated, ..self }
    }

    /// What the header says, but for feature bits and the refcount table, which change while
    /// the image is written to.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes in a cluster: the unit in which space is given back.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// The file that holds tables, and compressed clusters.
    pub(crate) fn file(&self) -> FileId {
        self.file
    }

    /// The file that holds guest data.
    pub(crate) fn data_file(&self) -> FileId {
        self.data
    }

    pub(crate) fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    pub(crate) fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Whether guest data lies in a file of its own.
    fn has_data_file(&self) -> bool {
        self.geometry.rules.data_file
    }

    /// Says that bytes of a file were written and are not synced.
    pub(crate) fn mark_dirty(&self, file: FileId) {
        let flag = if file == self.file { &self.image_dirty } else { &self.data_dirty };
        if !flag.load(Ordering::Acquire) {
            flag.store(true, Ordering::Release);
        }
    }

    /// Refuses after a metadata write or a sync has failed: what is durable is not known then, and
    /// nothing may be acknowledged.
    ///
    /// # Errors
    /// The first failure, again.
    pub(crate) fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(why) => {
                let why = format!("writes are refused since an earlier failure: {why}");
                Err(Error::refused("qcow2", why))
            }
        }
    }

    /// Stops every writer of an image that contradicts itself, this one and those to come: sets
    /// the header's corrupt bit, once, and refuses writes from here on. What `error` says was found
    /// in this image, which is open for writing. Other kinds of errors, and compressed data that
    /// does not inflate, do not count: the tables are not in question then.
    pub(crate) async fn mark_corrupt(&self, st: &dyn Storage, error: &Error) {
        let kind = error.kind();
        let tables = !matches!(kind, Kind::Corrupt(CorruptKind::Compressed { .. }));
        if !matches!(kind, Kind::Corrupt(_)) || !tables || error.is_below() {
            return;
        }
        if self.marked.swap(true, Ordering::AcqRel) {
            return;
        }
        let _ = self.poison.set(error.to_string().into());
        // Whoever sets the dirty bit writes the same bytes.
        let _claim = self.starting.claim(0..1).await;
        let mark = match self.header.version {
            2 => "version 2 has no mark for it".to_owned(),
            _ => match mark::change(st, self.file, INCOMPATIBLE_CORRUPT, 0).await {
                Ok(()) => "it is marked corrupt".to_owned(),
                Err(error) => format!("it could not be marked corrupt ({error})"),
            },
        };
        tracing::error!(
            "{error}; the image takes no more writes, {mark}: repair it with qemu-img check -r all"
        );
    }

    /// Remembers the first failure that makes what is durable unknown.
    fn poison(&self, error: &Error) {
        let first = self.poison.set(error.to_string().into()).is_ok();
        // A contradiction is told by whoever marks the image.
        if first && !matches!(error.kind(), Kind::Corrupt(_)) {
            let what = "the image takes no more writes; restart after fixing the cause";
            tracing::error!(%error, "{what}");
        }
    }

    /// Refuses guest data where metadata is.
    pub(crate) fn check_overlap(&self, file: FileId, at: HostOffset, len: u64) -> Result<()> {
        if file != self.file {
            return Ok(());
        }
        self.regions.check(at, len).map_err(|kind| {
            let error = Error::corrupt("writing guest data", kind);
            // Whoever answers the guest marks the image, and says so in the log.
            let _ = self.poison.set(error.to_string().into());
            error
        })
    }
}
