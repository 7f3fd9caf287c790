//! Making a new image.

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::format::{
    AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY_REFCOUNTS, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE,
    EXTENSION_END, EXTENSION_FEATURE_NAMES, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2, MAGIC,
};
use crate::qcow2::header::{Compression, NAME_LIMIT, V2_LENGTH};
use crate::qcow2::layout::Layout;
use crate::storage::{Buf, FileId, Op, Opened, Purpose, Storage};

/// Zeros that take the host's space are written in pieces of at most this many bytes.
const PIECE: u64 = 1 << 20;

/// What is prepared of a new image, so that the guest's first writes find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every table; the data's place is known, but not taken from the host.
    Metadata,
    /// Every table, and the host's space is reserved.
    Falloc,
    /// Every table, and zeros are written everywhere.
    Full,
}

/// How a new image is laid out; version 3, 64 KiB clusters and 16-bit refcounts unless said.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// The format's version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// Whether L2 entries describe subclusters; with clusters of 16 KiB and more.
    pub extended_l2: bool,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// How clusters will be compressed.
    pub compression: Compression,
    /// The backing file's name, as it is recorded.
    pub backing: Option<String>,
    /// The backing file's format, as it is recorded.
    pub backing_format: Option<String>,
    /// The external data file's name, as it is recorded.
    pub data_file: Option<String>,
    /// Whether the external data file stays readable as a raw image; its tables are made then.
    pub data_file_raw: bool,
    /// What is prepared.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The default layout for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }

    /// Whether the options agree with each other and with the format.
    ///
    /// # Errors
    /// `Refused` with what contradicts what.
    pub fn check(&self) -> Result<()> {
        self.normal().layout().map(drop)
    }

    /// With the tables that a raw data file needs.
    fn normal(&self) -> Self {
        let mut normal = self.clone();
        if self.data_file_raw && self.preallocation == Preallocation::Off {
            normal.preallocation = Preallocation::Metadata;
        }
        normal
    }

    /// Where everything goes.
    fn layout(&self) -> Result<Layout> {
        if let Some(why) = self.contradiction() {
            return Err(Error::refused("creating an image", why));
        }
        let layout = Layout::new(self).filter(|_| header(self, None).is_some());
        layout.ok_or_else(|| {
            let why = format!(
                "{} bytes is too large for clusters of {} bytes, or the names of its files do not \
                 fit into one; choose larger clusters",
                self.size,
                1_u64 << self.cluster_bits
            );
            Error::refused("creating an image", why)
        })
    }

    /// What cannot be, if there is such a thing.
    fn contradiction(&self) -> Option<&'static str> {
        let old = self.version < 3;
        let prepared = self.preallocation != Preallocation::Off;
        let names = [&self.backing, &self.backing_format, &self.data_file];
        let limit = usize::try_from(NAME_LIMIT).unwrap_or(usize::MAX);
        let is_name = |name: &&String| {
            !name.is_empty() && name.len() <= limit && !name.chars().any(char::is_control)
        };
        [
            (!(2..=3).contains(&self.version), "the version must be 2 (0.10) or 3 (1.1)"),
            (!(9..=21).contains(&self.cluster_bits), "clusters have 512 bytes to 2 MiB"),
            (self.refcount_order > 6, "refcounts have 1 to 64 bits"),
            (old && self.refcount_order != 4, "version 2 (compat 0.10) has refcounts of 16 bits"),
            (old && self.lazy_refcounts, "lazy refcounts need version 3 (compat 1.1)"),
            (old && self.extended_l2, "extended L2 entries need version 3 (compat 1.1)"),
            (old && self.data_file.is_some(), "a data file needs version 3 (compat 1.1)"),
            (
                old && self.compression != Compression::Zlib,
                "a compression type other than zlib needs version 3 (compat 1.1)",
            ),
            (
                self.extended_l2 && self.cluster_bits < 14,
                "extended L2 entries need clusters of 16 KiB or more",
            ),
            (self.data_file_raw && self.data_file.is_none(), "data_file_raw needs a data_file"),
            (
                self.data_file_raw && self.backing.is_some(),
                "a raw data file holds the whole disk, so that there can be no backing file",
            ),
            (
                prepared && self.backing.is_some() && !self.extended_l2,
                "prepared clusters would hide the backing file, unless there is extended_l2=on",
            ),
            (
                !names.into_iter().flatten().all(|name| is_name(&name)),
                "the name of a file has 1 to 1023 bytes and no control characters",
            ),
        ]
        .into_iter()
        .find_map(|(wrong, why)| wrong.then_some(why))
    }
}

/// Feature names that other programs show when they do not know a bit: kind, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Writes a new, empty image into `file`, and the disk's bytes into `data` if it has a data file;
/// what the files held before is lost. Everything is durable then. The header is written last, so
/// that a file that was not finished is no image.
///
/// # Errors
/// `Refused` when the size or the layout is out of range, and I/O errors.
pub async fn create(
    st: &dyn Storage,
    file: Opened,
    data: Option<Opened>,
    options: &CreateOptions,
) -> Result<()> {
    create_told(st, file, data, options, &mut |_, _| {}).await
}

/// As [`create`]; `progress` is told how many bytes of how many are prepared, when those are
/// written.
///
/// # Errors
/// As [`create`].
pub async fn create_told(
    st: &dyn Storage,
    file: Opened,
    data: Option<Opened>,
    options: &CreateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let options = &options.normal();
    let layout = options.layout()?;
    if options.data_file.is_some() != data.is_some() {
        return Err(Error::refused("creating an image", "its data file is not open"));
    }
    let maker = Maker { st, file: file.id, layout };
    maker.empty(file).await?;
    if let Some(data) = data {
        let size = options.size.next_multiple_of(512);
        prepare(st, data, size, options.preallocation, progress).await?;
    }
    maker.tables().await?;
    let bytes = maker.layout.start(maker.layout.data_clusters);
    let room = (maker.layout.start(layout.data), bytes);
    take(st, file.id, room, options.preallocation, progress).await?;
    step(st, file.id, Op::Sync).await?;
    let header = header(options, Some(&layout)).unwrap_or_default();
    step(st, file.id, Op::Write { at: HostOffset(0), buf: Buf::copy_of(&header) }).await?;
    step(st, file.id, Op::Sync).await
}

/// Makes `file` as long as a disk of `size` bytes, of zeros, and takes as much of the host's space
/// as `preallocation` says; what it held before is lost. Everything is durable then. `progress` is
/// told how many bytes of how many are written.
///
/// # Errors
/// When a block device is too small, and I/O errors.
pub async fn prepare(
    st: &dyn Storage,
    file: Opened,
    size: u64,
    preallocation: Preallocation,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    if st.limits(file.id).grows {
        if file.length > 0 {
            step(st, file.id, Op::Resize { len: 0 }).await?;
        }
        step(st, file.id, Op::Resize { len: size }).await?;
    } else {
        refuse_small(file, size)?;
    }
    take(st, file.id, (0, size), preallocation, progress).await?;
    step(st, file.id, Op::Sync).await
}

fn refuse_small(file: Opened, need: u64) -> Result<()> {
    if need <= file.length {
        return Ok(());
    }
    let why = format!("the device has {} bytes, {need} are needed", file.length);
    Err(Error::refused("creating an image", why))
}

/// Takes the host's space of a range that reads as zeros: where it begins, and how long it is.
pub(crate) async fn take(
    st: &dyn Storage,
    file: FileId,
    (mut at, len): (u64, u64),
    preallocation: Preallocation,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let end = at.saturating_add(len);
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            step(st, file, Op::Zero { at: HostOffset(at), len, unmap: false }).await
        }
        Preallocation::Full => {
            while at < end {
                progress(len.saturating_sub(end.saturating_sub(at)), len);
                let piece = (end - at).min(PIECE);
                let zeros = Buf::zeroed(usize::try_from(piece).expect("a small piece"));
                step(st, file, Op::Write { at: HostOffset(at), buf: zeros }).await?;
                at += piece;
            }
            Ok(())
        }
    }
}

struct Maker<'a> {
    st: &'a dyn Storage,
    file: FileId,
    layout: Layout,
}

impl Maker<'_> {
    /// Makes the file long enough and no image, whatever it was before.
    async fn empty(&self, file: Opened) -> Result<()> {
        let end = self.layout.start(self.layout.end);
        if self.st.limits(file.id).grows {
            if file.length > 0 {
                // New tables under an old header would be a broken image.
                step(self.st, self.file, Op::Resize { len: 0 }).await?;
                step(self.st, self.file, Op::Sync).await?;
            }
            return step(self.st, self.file, Op::Resize { len: end }).await;
        }
        refuse_small(file, end)?;
        let len = self.layout.cluster_size();
        step(self.st, self.file, Op::Zero { at: HostOffset(0), len, unmap: false }).await?;
        step(self.st, self.file, Op::Sync).await
    }

    /// Writes all tables, a cluster at a time: however large the disk is, few are in memory.
    async fn tables(&self) -> Result<()> {
        let layout = &self.layout;
        for index in 0..layout.reftable_clusters {
            self.put(layout.reftable + index, layout.reftable_cluster(index)).await?;
        }
        for index in 0..layout.block_count {
            self.put(layout.blocks + index, layout.block(index)).await?;
        }
        // In a file that grows an empty table is there already.
        let device = !self.st.limits(self.file).grows;
        if device || layout.l2_tables > 0 {
            for index in 0..layout.l1_clusters {
                self.put(layout.l1 + index, layout.l1_cluster(index)).await?;
            }
        }
        for index in 0..layout.l2_tables {
            self.put(layout.l2 + index, layout.l2_table(index)).await?;
        }
        Ok(())
    }

    async fn put(&self, cluster: u64, bytes: Vec<u8>) -> Result<()> {
        let at = HostOffset(self.layout.start(cluster));
        step(self.st, self.file, Op::Write { at, buf: Buf::copy_of(&bytes) }).await
    }
}

async fn step(st: &dyn Storage, file: FileId, op: Op) -> Result<()> {
    let done = st.submit(file, Purpose::Create, op).await;
    done.map_err(|source| Error::io("creating an image", source))
}

/// The bytes of the extension that names feature bits.
pub(super) fn feature_names() -> Vec<u8> {
    let mut names = Vec::new();
    for (kind, bit, name) in FEATURE_NAMES {
        names.extend([kind, bit]);
        names.extend(name.as_bytes());
        names.resize(names.len().next_multiple_of(48), 0);
    }
    names
}

/// The header with its extensions and the backing file's name; `None` when they do not fit into
/// one cluster. Without a layout the places of tables are zero, which has the same length.
pub(super) fn header(options: &CreateOptions, layout: Option<&Layout>) -> Option<Vec<u8>> {
    let cluster = 1_usize << options.cluster_bits;
    let start = start(options, layout);
    let text = |text: &Option<String>| text.as_ref().map(|text| text.clone().into_bytes());
    let mut extensions = Vec::new();
    extensions.extend(text(&options.backing_format).map(|it| (EXTENSION_BACKING_FORMAT, it)));
    extensions.extend(text(&options.data_file).map(|it| (EXTENSION_DATA_FILE, it)));
    let needed = assemble(&start, &extensions, options)?;
    if options.version < 3 {
        return Some(needed).filter(|bytes| bytes.len() <= cluster);
    }
    // The names are a courtesy: small clusters have no room for them.
    extensions.push((EXTENSION_FEATURE_NAMES, feature_names()));
    let all = assemble(&start, &extensions, options)?;
    [all, needed].into_iter().find(|bytes| bytes.len() <= cluster)
}

/// The header's fields with extensions and the backing file's name behind them.
fn assemble(
    start: &[u8],
    extensions: &[(u32, Vec<u8>)],
    options: &CreateOptions,
) -> Option<Vec<u8>> {
    let mut bytes = start.to_vec();
    for (kind, content) in extensions {
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(content.len()).ok()?.to_be_bytes());
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend(EXTENSION_END.to_be_bytes());
    bytes.extend([0; 4]);
    if let Some(name) = &options.backing {
        let place = u64::try_from(bytes.len()).ok()?;
        bytes.get_mut(8..16)?.copy_from_slice(&place.to_be_bytes());
        let len = u32::try_from(name.len()).ok()?;
        bytes.get_mut(16..20)?.copy_from_slice(&len.to_be_bytes());
        bytes.extend(name.as_bytes());
    }
    Some(bytes)
}

/// The header's fields.
fn start(options: &CreateOptions, layout: Option<&Layout>) -> Vec<u8> {
    let place = |which: fn(&Layout) -> u64| layout.map_or(0, |it| it.start(which(it)));
    let mut bytes = Vec::with_capacity(512);
    let mut word = |value: u32| bytes.extend(value.to_be_bytes());
    word(MAGIC);
    word(options.version);
    // The backing file's name is filled in later: offset and length.
    (0..3).for_each(|_| word(0));
    word(options.cluster_bits);
    let mut long = |value: u64| bytes.extend(value.to_be_bytes());
    long(options.size);
    // No encryption; the L1 table's entries.
    long(layout.map_or(0, |it| it.l1_entries));
    long(place(|it| it.l1));
    long(place(|it| it.reftable));
    // The refcount table's clusters; no snapshots.
    long(layout.map_or(0, |it| it.reftable_clusters << 32));
    long(0);
    debug_assert_eq!(bytes.len() as u64, V2_LENGTH);
    if options.version < 3 {
        return bytes;
    }
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    let zstd = options.compression == Compression::Zstd;
    let incompatible = flag(options.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
        | flag(zstd, INCOMPATIBLE_COMPRESSION)
        | flag(options.extended_l2, INCOMPATIBLE_EXTENDED_L2);
    let mut long = |value: u64| bytes.extend(value.to_be_bytes());
    long(incompatible);
    long(flag(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS));
    long(flag(options.data_file_raw, AUTOCLEAR_RAW_DATA));
    bytes.extend(options.refcount_order.to_be_bytes());
    bytes.extend(112_u32.to_be_bytes());
    // The compression type, and padding.
    bytes.extend([u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    bytes
}
