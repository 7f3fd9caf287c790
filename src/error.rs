//! One error type for the image layer: what failed, on which file, and what to do.
//!
//! Four kinds, because callers do four different things with them: an I/O error becomes IOERR for
//! the guest, a contradiction inside an image stops writes to it, something unsupported or refused
//! is told to the operator before the socket exists.

use std::fmt;
use std::io;

/// The result of every operation of the image layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the file or the step it went wrong in.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {kind}")]
pub struct Error {
    kind: Kind,
    context: Box<str>,
    below: bool,
}

/// The four kinds of failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Kind {
    /// The operating system said no.
    #[error("{0}")]
    Io(io::Error),
    /// The image contradicts itself or the format.
    #[error("the image is corrupt: {0}")]
    Corrupt(CorruptKind),
    /// The image is valid, but uses something this program does not serve.
    #[error("{0}")]
    Unsupported(Box<str>),
    /// Policy: this program could, but must not without being told to.
    #[error("{0}")]
    Refused(Box<str>),
}

impl Error {
    fn new(kind: Kind, context: Box<str>) -> Self {
        Self { kind, context, below: false }
    }

    /// An I/O failure while doing `context`.
    pub fn io(context: impl Into<Box<str>>, source: io::Error) -> Self {
        Self::new(Kind::Io(source), context.into())
    }

    /// A contradiction found in the image while doing `context`.
    pub fn corrupt(context: impl Into<Box<str>>, kind: CorruptKind) -> Self {
        Self::new(Kind::Corrupt(kind), context.into())
    }

    /// A feature that is not served.
    pub fn unsupported(context: impl Into<Box<str>>, what: impl Into<Box<str>>) -> Self {
        Self::new(Kind::Unsupported(what.into()), context.into())
    }

    /// A thing policy forbids; `why` ends with the flag that would allow it, if there is one.
    pub fn refused(context: impl Into<Box<str>>, why: impl Into<Box<str>>) -> Self {
        Self::new(Kind::Refused(why.into()), context.into())
    }

    /// Which kind of failure this is.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The same failure, seen from one level up: `outer: context`.
    #[must_use]
    pub fn within(self, outer: impl fmt::Display) -> Self {
        Self { context: format!("{outer}: {}", self.context).into(), ..self }
    }

    /// The same failure, in a layer below the one that is written to.
    #[must_use]
    pub fn below(self) -> Self {
        Self { below: true, ..self }
    }

    /// Whether the failure is in a layer below the one that is written to.
    pub fn is_below(&self) -> bool {
        self.below
    }
}

/// Exactly what contradicts the format, with the numbers that do.
///
/// One variant for each check, so that a test can name the check that must fire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CorruptKind {
    /// The file ends inside the header.
    #[error("the file has {have} bytes, the header needs {need}")]
    HeaderTruncated {
        /// Bytes in the file.
        have: u64,
        /// Bytes the header takes.
        need: u64,
    },
    /// `cluster_bits` outside 9..=21.
    #[error("cluster_bits is {0}, must be 9 to 21")]
    ClusterBits(u32),
    /// Extended L2 entries with clusters below 16 KiB: a subcluster would be less than a sector.
    #[error("cluster_bits is {0}, extended L2 entries need at least 14")]
    SubclusterSize(u32),
    /// `refcount_order` over 6.
    #[error("refcount_order is {0}, must be at most 6")]
    RefcountOrder(u32),
    /// `header_length` below 104, over the cluster, or no multiple of 8.
    #[error("header_length is {0}")]
    HeaderLength(u32),
    /// A header extension runs past its area.
    #[error("header extension {kind:#010x} of {len} bytes runs past its area")]
    ExtensionLength {
        /// The extension's type.
        kind: u32,
        /// Its stated length in bytes.
        len: u32,
    },
    /// More header extensions than any writer makes.
    #[error("over {0} header extensions")]
    ExtensionCount(usize),
    /// The backing file name lies outside the first cluster or is too long.
    #[error("backing file name of {len} bytes at {offset} does not fit")]
    BackingName {
        /// Byte offset of the name in the file.
        offset: u64,
        /// Length of the name in bytes.
        len: u32,
    },
    /// A name is not UTF-8 or holds a NUL byte.
    #[error("the {0} is not a valid file name")]
    Name(&'static str),
    /// A table does not start at a cluster boundary.
    #[error("the {table} at {offset:#x} is not aligned to a cluster")]
    TableAlignment {
        /// Which table.
        table: &'static str,
        /// Its offset in bytes.
        offset: u64,
    },
    /// A table is larger or smaller than the format allows.
    #[error("the {table} has {entries} entries, {limit} are allowed or needed")]
    TableSize {
        /// Which table.
        table: &'static str,
        /// How many entries it states.
        entries: u64,
        /// The bound that it breaks.
        limit: u64,
    },
    /// A table lies outside the file.
    #[error("the {table} at {offset:#x} lies beyond the end of the file ({file_len} bytes)")]
    TableBeyondEnd {
        /// Which table.
        table: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// The file's length in bytes.
        file_len: u64,
    },
    /// A table lies over another piece of metadata.
    #[error("the {table} at {offset:#x} overlaps other metadata")]
    TableOverlap {
        /// Which table.
        table: &'static str,
        /// Its offset in bytes.
        offset: u64,
    },
    /// The virtual size needs more L1 entries than the format allows.
    #[error("a virtual size of {0} bytes is too large")]
    VirtualSize(u64),
    /// The compression type field disagrees with its incompatible bit.
    #[error("compression type {0} contradicts the incompatible feature bits")]
    CompressionType(u8),
    /// `data_file_raw` without an external data file.
    #[error("raw external data is claimed, but there is no external data file")]
    RawWithoutDataFile,
    /// An L1 entry has reserved bits or an unaligned offset.
    #[error("L1 entry {index} is {entry:#018x}")]
    L1Entry {
        /// Index into the L1 table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// An L2 entry has reserved bits or an unaligned offset, or a flag this image may not use.
    #[error("the L2 entry of guest offset {guest:#x} is {entry:#018x}")]
    L2Entry {
        /// Guest offset the entry maps.
        guest: u64,
        /// The entry.
        entry: u64,
    },
    /// The subcluster bitmap of an extended L2 entry contradicts itself or its entry.
    #[error("the subclusters of guest offset {guest:#x} are {bitmap:#018x}")]
    Subclusters {
        /// Guest offset the entry maps.
        guest: u64,
        /// The bitmap: allocated in the low half, zero in the high half.
        bitmap: u64,
    },
    /// A refcount table entry has reserved bits or an unaligned offset.
    #[error("refcount table entry {index} is {entry:#018x}")]
    ReftableEntry {
        /// Index into the refcount table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// A cluster that is in use has refcount zero.
    #[error("the cluster at {0:#x} is in use but has refcount 0")]
    RefcountUnderflow(u64),
    /// A refcount is lower than the number of references to its cluster.
    #[error("the cluster at {0:#x} is referred to more often than its refcount says")]
    RefcountLow(u64),
    /// An L1 table leads to the same L2 table twice.
    #[error("the L2 table at {0:#x} is named twice by one L1 table")]
    TableTwice(u64),
    /// A refcount would exceed its width.
    #[error("the refcount of the cluster at {0:#x} cannot grow")]
    RefcountOverflow(u64),
    /// Guest data would land on metadata.
    #[error("a write of {len} bytes at {at:#x} would overwrite metadata")]
    MetadataOverlap {
        /// Host offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A compressed cluster does not inflate to one cluster.
    #[error("the compressed cluster at {at:#x} ({bytes} bytes) does not inflate to one cluster")]
    Compressed {
        /// Host offset of the compressed data.
        at: u64,
        /// Upper bound of its length in bytes.
        bytes: u64,
    },
    /// The bitmaps extension of the header, or the size of the directory, is malformed.
    #[error("the bitmaps extension is malformed: {0}")]
    BitmapsExtension(&'static str),
    /// An entry of the bitmap directory is malformed.
    #[error("bitmap directory entry {number} is malformed: {what}")]
    Bitmap {
        /// The number of the entry, from 0.
        number: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A bitmap table entry has reserved bits or an unaligned offset.
    #[error("bitmap table entry {index} is {entry:#018x}")]
    BitmapTableEntry {
        /// Index into the table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// A snapshot table entry is malformed.
    #[error("snapshot table entry {0} is malformed")]
    Snapshot(u32),
}
