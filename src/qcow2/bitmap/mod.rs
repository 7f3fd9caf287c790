//! Persistent dirty bitmaps: which parts of the disk were written, for incremental backups.
//!
//! The bitmaps that are enabled are kept true. Before the first write each is marked in the image
//! as in use, which tells everyone that what the image holds of it is not to be trusted; from then
//! on its bits are in memory. A clean close stores them and takes the mark back; after a crash the
//! mark is still there, and the bitmap counts as inconsistent. Bitmaps that are disabled, or
//! inconsistent already, are left as they are.
//!
//! [`Tracker`] is the state; `directory` parses, `bits` holds the bits, `load` and `store` move
//! them; `distrust` is for a repair that takes bytes from the guest, and `edit` for those who
//! choose which bitmaps there are. The bits of all bitmaps take at most [`MEMORY_LIMIT`] bytes. A
//! bitmap that does not fit, or that is of a kind not known, is marked as in use and stays so; a
//! directory that contradicts itself makes all bitmaps invalid, by their autoclear bit. Both are
//! logged, and neither is ever left stale in silence.

mod bits;
mod directory;
mod distrust;
mod edit;
mod load;
mod store;
mod stored;

use std::io;

pub(super) use distrust::distrust;
pub use edit::{BitmapEdit, LoadedBitmap, MergeSource, load_bitmap};
pub use stored::{StoredBitmap, stored_bitmaps};

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::bits::Bits;
use crate::qcow2::bitmap::directory::Part;
use crate::qcow2::format::AUTOCLEAR_BITMAPS;
use crate::qcow2::header::Header;
use crate::storage::{Buf, FileId, Op, Pending, Purpose, Storage};
use crate::sync::{AtomicBool, Mutex, OnceLock, lock};

/// Most bytes of bits that are held in memory, over all bitmaps of an image.
const MEMORY_LIMIT: u64 = 64 << 20;
/// Most bytes that the tables of all bitmaps of an image may take.
const TABLES_LIMIT: u64 = 8 << 20;
/// What a power cut may tear a write at, in bytes.
const SECTOR: u64 = 512;

/// What is done about the bitmaps of an image.
pub(super) enum Bitmaps {
    /// There are none, or they do not matter: nothing will be written.
    None,
    /// The image says that they are valid, but they contradict the format in this way.
    Broken(Error),
    /// They are kept true.
    Tracked(Box<Tracker>),
}

/// The bitmaps of an image that is written to.
pub(super) struct Tracker {
    /// Where the directory lies.
    at: HostOffset,
    /// Its bytes, as they are in the file or will be after the write under way.
    directory: Mutex<Vec<u8>>,
    /// The enabled bitmaps.
    live: Vec<Live>,
}

/// One enabled bitmap.
struct Live {
    name: String,
    /// Where its entry starts in the directory.
    start: usize,
    granularity_bits: u32,
    /// Why it cannot be kept true, if so.
    obstacle: Option<&'static str>,
    /// Where the image holds its bits.
    table: Mutex<Table>,
    /// Its bits, from the first write on; never there when it cannot be kept.
    bits: OnceLock<Bits>,
    /// It was not kept once. What the image holds of it misses changes from then on.
    given_up: AtomicBool,
}

/// Where the image holds the bits of a bitmap.
#[derive(Clone)]
struct Table {
    at: HostOffset,
    parts: Vec<Part>,
}

/// What an image's directory says of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapFacts {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk one of its bits stands for.
    pub granularity: u64,
    /// What the image holds of it is not to be trusted.
    pub in_use: bool,
    /// It is enabled: every change of the disk shall be in it.
    pub auto: bool,
    /// Why it cannot be used here, if so.
    pub obstacle: Option<&'static str>,
}

/// The bitmaps of the image in `file`, in the order of its directory; none where the autoclear bit
/// says that they are not valid.
///
/// # Errors
/// When the directory cannot be read or is malformed.
pub async fn read_bitmaps(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
) -> Result<Vec<BitmapFacts>> {
    Ok(read_entries(st, file, header).await?.iter().map(directory::Entry::facts).collect())
}

/// The entries of the directory; none where the bitmaps are not valid.
async fn read_entries(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
) -> Result<Vec<directory::Entry>> {
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 || header.bitmaps.is_empty() {
        return Ok(Vec::new());
    }
    let wrong = |kind| Error::corrupt("bitmap directory", kind);
    let place = directory::place(&header.bitmaps, header.geometry.cluster_size()).map_err(wrong)?;
    let buf = Buf::zeroed(usize::try_from(place.len).expect("the limit was checked"));
    let read = Op::Read { at: place.at, buf: buf.clone() };
    let done = st.submit(file, Purpose::BitmapLoad, read).await;
    done.map_err(|source| Error::io("reading the image's bitmaps", source))?;
    directory::parse(&buf.to_vec(), place).map_err(wrong)
}

impl Bitmaps {
    /// Whether the image calls bitmaps valid that contradict themselves.
    pub(super) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_))
    }

    /// The autoclear bit that stays set when the image is written to.
    pub(super) fn autoclear(&self) -> u64 {
        match self {
            Self::None | Self::Broken(_) => 0,
            Self::Tracked(_) => AUTOCLEAR_BITMAPS,
        }
    }
}

impl Tracker {
    /// Changes the directory in memory; returns the sectors to write, each with its place.
    fn change(&self, change: impl FnOnce(&mut [u8])) -> Vec<(HostOffset, Vec<u8>)> {
        let mut directory = lock(&self.directory);
        let before = directory.clone();
        change(&mut directory);
        let sector = usize::try_from(SECTOR).expect("small");
        let pairs = before.chunks(sector).zip(directory.chunks(sector));
        let places = (0..).map(|number: u64| self.at + number * SECTOR);
        let changed = places.zip(pairs).filter(|(_, (old, new))| old != new);
        changed.map(|(at, (_, new))| (at, new.to_vec())).collect()
    }
}

impl Qcow2 {
    /// Begins a guest's change of `len` bytes from `at` on: the image says that it is written to,
    /// and the bitmaps say where.
    ///
    /// # Errors
    /// As [`Qcow2::start_writing`].
    pub(crate) async fn start_change(&self, st: &dyn Storage, at: u64, len: u64) -> Result<()> {
        self.start_writing(st).await?;
        self.mark_bitmaps(at, len);
        Ok(())
    }

    /// As [`Qcow2::start_change`] for an image that says so already; false when it does not, or
    /// takes no more writes, which that tells.
    pub(crate) fn note_change(&self, at: u64, len: u64) -> bool {
        let goes_on = self.is_writing();
        if goes_on {
            self.mark_bitmaps(at, len);
        }
        goes_on
    }

    fn mark_bitmaps(&self, at: u64, len: u64) {
        if let Bitmaps::Tracked(tracker) = &self.bitmaps {
            for bits in tracker.live.iter().filter_map(|bitmap| bitmap.bits.get()) {
                bits.mark(at, len);
            }
        }
    }

    /// Before the first write: loads the enabled bitmaps and marks them in the image as in use,
    /// durably.
    ///
    /// # Errors
    /// When the mark cannot be made; the image takes no writes then.
    pub(super) async fn start_bitmaps(&self, st: &dyn Storage) -> Result<()> {
        let tracker = match &self.bitmaps {
            Bitmaps::None => return Ok(()),
            Bitmaps::Tracked(tracker) => tracker,
            Bitmaps::Broken(error) => {
                let what = "the image's dirty bitmaps cannot be kept and are invalid from now on; \
                            qemu-img check -r leaks gives their room back";
                tracing::warn!(%error, "{what}");
                return Ok(());
            }
        };
        for bitmap in &tracker.live {
            self.load_bitmap(st, bitmap).await;
        }
        let mark = |directory: &mut [u8]| {
            for bitmap in &tracker.live {
                directory::set_in_use(directory, bitmap.start, true);
            }
        };
        // Each sector is the old or the new one after a power cut, and they differ in nothing but
        // these marks: no half-written directory can come of it.
        self.write_directory(st, tracker.change(mark)).await
    }

    /// Writes sectors of the directory, and makes them durable.
    async fn write_directory(
        &self,
        st: &dyn Storage,
        sectors: Vec<(HostOffset, Vec<u8>)>,
    ) -> Result<()> {
        write_sectors(st, self.file, sectors).await.map_err(|source| {
            let error = Error::io("writing the bitmap directory", source);
            self.poison(&error);
            error
        })
    }
}

/// Writes sectors of the directory, and makes them durable.
async fn write_sectors(
    st: &dyn Storage,
    file: FileId,
    sectors: Vec<(HostOffset, Vec<u8>)>,
) -> io::Result<()> {
    if sectors.is_empty() {
        return Ok(());
    }
    let write = |(at, bytes): (HostOffset, Vec<u8>)| {
        let op = Op::Write { at, buf: Buf::copy_of(&bytes) };
        st.submit(file, Purpose::DirectoryWrite, op)
    };
    let pending: Vec<Pending> = sectors.into_iter().map(write).collect();
    let mut result = Ok(());
    for write in pending {
        result = result.and(write.await);
    }
    if result.is_ok() {
        result = st.submit(file, Purpose::SyncDirectory, Op::Sync).await;
    }
    result
}
