//! Whether two disks hold the same bytes, and how large a copy would be.

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::chain::Layer;
use crate::image::status::{BlockMap, Status};
use crate::image::watch::Progress;
use crate::qcow2::bitmap::read_bitmaps;
use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::measure::{bitmap_bytes, fully_allocated};
use crate::storage::{Buf, Storage};

/// Bytes are read and compared in pieces of at most this many.
const PIECE: u64 = 1 << 20;
/// The unit in bytes in which differences are told.
const SECTOR: usize = 512;

/// The first thing in which two disks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// One is longer; only told where the sizes have to be the same.
    Size,
    /// The sector at this offset in bytes.
    Content(u64),
    /// What the images say of the bytes from this offset on; only told where that has to be the
    /// same.
    Status(u64),
}

/// Compares two disks; what one of them is longer must be zeros. With `strict` they have the same
/// size, and the same bytes are allocated. `progress` is told how far it is.
///
/// # Errors
/// When one of them cannot be read.
pub async fn compare(
    st: &dyn Storage,
    (first, second): (&BlockMap<'_>, &BlockMap<'_>),
    strict: bool,
    progress: &mut Progress<'_>,
) -> Result<Option<Difference>> {
    let (sizes, mut at) = ((first.size(), second.size()), 0);
    if strict && sizes.0 != sizes.1 {
        return Ok(Some(Difference::Size));
    }
    let (common, end) = (sizes.0.min(sizes.1), sizes.0.max(sizes.1));
    let mut runs = (Run::new(first, strict), Run::new(second, strict));
    while at < common {
        progress(at, end);
        let one = runs.0.at(st, at, common).await?;
        let other = runs.1.at(st, at, common).await?;
        let run = one.len.min(other.len);
        // Whether a run goes on to the disk's end is part of what qemu-img compares.
        let flags = |it: &Status| {
            let ends = at + it.len == common;
            (it.present, it.zero, it.data, it.compressed, it.place.is_some(), ends)
        };
        if strict && flags(&one) != flags(&other) {
            return Ok(Some(Difference::Status(at)));
        }
        if one.zero && other.zero {
            at += run;
            continue;
        }
        let (here, len) = (GuestOffset(at), run.min(PIECE));
        let left = bytes(st, first, &one, here, len).await?;
        let right = bytes(st, second, &other, here, len).await?;
        if let Some(place) = mismatch(&left, &right) {
            return Ok(Some(Difference::Content(at + place)));
        }
        at += len;
    }
    let longer = if sizes.0 > common { first } else { second };
    only_zeros(st, longer, common, progress).await
}

/// The run of a disk that a comparison is in: it is looked up once, however many pieces it is
/// compared in.
struct Run<'a> {
    disk: &'a BlockMap<'a>,
    /// Whether runs are as long as can be.
    whole: bool,
    /// The run, and where it ends.
    status: Option<(Status, u64)>,
}

impl<'a> Run<'a> {
    fn new(disk: &'a BlockMap<'a>, whole: bool) -> Self {
        Self { disk, whole, status: None }
    }

    /// What the bytes from `at` on are, up to the end of their run or `end`. The place is that of
    /// the run's first byte.
    async fn at(&mut self, st: &dyn Storage, at: u64, end: u64) -> Result<Status> {
        let (status, end) = match self.status {
            Some((status, end)) if at < end => (status, end),
            _ => {
                let (start, len) = (GuestOffset(at), end - at);
                let status = if self.whole {
                    self.disk.run(st, start, len).await?
                } else {
                    self.disk.status(st, start, len).await?
                };
                (status, at + status.len)
            }
        };
        self.status = Some((status, end));
        Ok(Status { len: end - at, ..status })
    }
}

/// The first sector from `at` on that is not zeros.
async fn only_zeros(
    st: &dyn Storage,
    disk: &BlockMap<'_>,
    mut at: u64,
    progress: &mut Progress<'_>,
) -> Result<Option<Difference>> {
    while at < disk.size() {
        progress(at, disk.size());
        let status = disk.status(st, GuestOffset(at), disk.size() - at).await?;
        let mut len = status.len;
        if !status.zero {
            len = len.min(PIECE);
            let found = bytes(st, disk, &status, GuestOffset(at), len).await?;
            if let Some(place) = mismatch(&found, &vec![0; found.len()]) {
                return Ok(Some(Difference::Content(at + place)));
            }
        }
        at += len;
    }
    Ok(None)
}

async fn bytes(
    st: &dyn Storage,
    disk: &BlockMap<'_>,
    status: &Status,
    at: GuestOffset,
    len: u64,
) -> Result<Vec<u8>> {
    let size = usize::try_from(len).expect("a small piece");
    if status.zero {
        return Ok(vec![0; size]);
    }
    let buf = Buf::zeroed(size);
    disk.image().read(st, at, buf.clone()).await?;
    Ok(buf.to_vec())
}

/// The offset of the first sector that differs.
fn mismatch(left: &[u8], right: &[u8]) -> Option<u64> {
    if left == right {
        return None;
    }
    let mut pairs = left.chunks(SECTOR).zip(right.chunks(SECTOR));
    pairs.position(|(left, right)| left != right).map(|sector| (sector * SECTOR) as u64)
}

/// How large the file of a copy becomes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// With what the disk holds now.
    pub required: u64,
    /// When every cluster is allocated.
    pub fully_allocated: u64,
    /// What copies of its bitmaps take besides, where source and copy can have such.
    pub bitmaps: Option<u64>,
}

/// How large a qcow2 copy of a disk becomes, laid out as `options` say but for the size; without a
/// disk, how large a new image becomes.
///
/// # Errors
/// `Refused` when the layout is out of range; when the disk's tables or bitmaps cannot be read.
pub async fn measure(
    st: &dyn Storage,
    disk: Option<&BlockMap<'_>>,
    options: &CreateOptions,
) -> Result<Measure> {
    let cluster = 1_u64 << options.cluster_bits.min(21);
    let size = disk.map_or(options.size, BlockMap::size);
    let round = |bytes: u64| bytes.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
    let fully_allocated = fully_allocated(&CreateOptions { size, ..options.clone() })?;
    let whole = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    let mut required = 0;
    if let Some(disk) = disk {
        let mut at = 0;
        while at < size && options.backing.is_none() && !whole {
            let status = disk.status(st, GuestOffset(at), size - at).await?;
            let mut end = at + status.len;
            if status.data && !status.zero {
                end = round(end);
                required += end - at / cluster * cluster;
            }
            at = end;
        }
    }
    if whole || (disk.is_some() && options.backing.is_some()) {
        // What a copy shares with the backing file is not known: at worst nothing.
        required = round(size);
    }
    let bitmaps = match disk.map(|disk| disk.image().chain.top()) {
        Some(Layer::Qcow2(image)) if image.header().version > 2 && options.version > 2 => {
            let bitmaps = read_bitmaps(st, image.file(), image.header()).await?;
            Some(bitmap_bytes(&bitmaps, size, cluster))
        }
        _ => None,
    };
    let required = fully_allocated.checked_sub(round(size)).and_then(|it| it.checked_add(required));
    let required = required.ok_or_else(|| Error::refused("measuring", "the disk is too large"))?;
    Ok(Measure { required, fully_allocated, bitmaps })
}
