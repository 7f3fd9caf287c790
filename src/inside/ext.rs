//! ext2, ext3 and ext4, by the ext4-view crate.

use std::io;

use ext4_view::{Ext4, Ext4Error, FileType, Metadata, Timestamp};

use crate::error::{Error, Result};
use crate::inside::damaged;
use crate::inside::filesystem::{Entry, Kind, Node, absent, time};
use crate::inside::source::Source;

/// Most block groups: with groups of the usual 128 MiB, half a petabyte. The crate takes 16 bytes
/// of memory for each before it has read one.
const MOST_GROUPS: u64 = 4 << 20;

/// A file system.
pub(super) struct Ext(Ext4);

/// A file that is read.
pub(super) struct ExtFile(ext4_view::File);

fn error_at(path: &[u8], error: Ext4Error) -> Error {
    let name = String::from_utf8_lossy(path);
    match error {
        Ext4Error::NotFound => absent(path, io::ErrorKind::NotFound, "there is no such file"),
        Ext4Error::NotADirectory => absent(path, io::ErrorKind::NotADirectory, "not a directory"),
        Ext4Error::Encrypted => Error::unsupported(name, "it is encrypted"),
        Ext4Error::Incompatible(what) => {
            Error::unsupported(name, format!("a feature that cannot be read: {what}"))
        }
        // What the disk answered is one of ours, put into a box by the crate.
        Ext4Error::Io(inner) => match inner.downcast::<io::Error>() {
            Ok(inner) => Error::io(name, *inner),
            Err(inner) => Error::io(name, io::Error::other(inner)),
        },
        other => damaged(name, other.to_string()),
    }
}

/// A little-endian number in a superblock.
fn word(superblock: &[u8], at: usize) -> u64 {
    let bytes: Option<[u8; 4]> = superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)))
}

fn stamp(stamp: Timestamp) -> Option<std::time::SystemTime> {
    time(stamp.seconds(), stamp.nanoseconds())
}

fn node(metadata: &Metadata) -> Node {
    Node {
        kind: match metadata.file_type() {
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::CharacterDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            _ => Kind::File,
        },
        size: metadata.len(),
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified: stamp(metadata.modified()),
        accessed: stamp(metadata.accessed()),
        created: metadata.created().and_then(stamp),
    }
}

impl Ext {
    /// Which of the three it is, by the features in its superblock: those that came with ext4, or
    /// a journal.
    pub(super) fn variant(superblock: &[u8]) -> &'static str {
        let (journal, incompatible, read_only) =
            (word(superblock, 0x5c) & 4, word(superblock, 0x60), word(superblock, 0x64));
        // Extents, 64 bit, flexible groups, inline data; huge files to metadata checksums.
        match (incompatible & 0x83c0, read_only & 0x578, journal) {
            (0, 0, 0) => "ext2",
            (0, 0, _) => "ext3",
            _ => "ext4",
        }
    }

    pub(super) fn open(mut source: Source) -> Result<Self> {
        let bytes: [u8; 1024] =
            source.peek(1024).map_err(|error| Error::io("reading the superblock", error))?;
        check(&bytes, source.len())?;
        Ext4::load(Box::new(source)).map(Self).map_err(|error| error_at(b"file system", error))
    }

    pub(super) fn label(&self) -> String {
        let bytes = self.0.label().as_bytes();
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    pub(super) fn node(&self, path: &[u8]) -> Result<Node> {
        let found = self.0.symlink_metadata(path);
        found.map(|metadata| node(&metadata)).map_err(|error| error_at(path, error))
    }

    pub(super) fn link(&self, path: &[u8]) -> Result<Vec<u8>> {
        let target = self.0.read_link(path).map_err(|error| error_at(path, error))?;
        Ok(target.as_ref().to_vec())
    }

    pub(super) fn entries(
        &self,
        path: &[u8],
        each: &mut dyn FnMut(Entry) -> Result<()>,
    ) -> Result<()> {
        let list = self.0.read_dir(path).map_err(|error| error_at(path, error))?;
        for entry in list {
            let entry = entry.map_err(|error| error_at(path, error))?;
            let name = entry.file_name().as_ref().to_vec();
            let found = entry.metadata().map(|metadata| node(&metadata));
            let node = found.map_err(|error| error_at(&name, error));
            each(Entry { name, node })?;
        }
        Ok(())
    }

    pub(super) fn open_file(&self, path: &[u8]) -> Result<ExtFile> {
        self.0.open(path).map(ExtFile).map_err(|error| error_at(path, error))
    }
}

impl ExtFile {
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        self.0.read_bytes(bytes).map_err(|error| error_at(b"data", error))
    }
}

/// Refuses a superblock that would make the crate take memory without bound.
fn check(superblock: &[u8], len: u64) -> Result<()> {
    let wrong = |why: String| Err(damaged("file system", why));
    let exponent = word(superblock, 0x18);
    if exponent > 6 {
        return wrong(format!("blocks of 2^{} bytes", exponent.saturating_add(10)));
    }
    let block_size = 1024_u64 << exponent;
    let high = if word(superblock, 0x60) & 0x80 == 0 { 0 } else { word(superblock, 0x150) };
    let blocks = high << 32 | word(superblock, 0x04);
    if blocks.checked_mul(block_size).is_none_or(|bytes| bytes > len) {
        return wrong(format!("{blocks} blocks of {block_size} bytes in a place of {len} bytes"));
    }
    let per_group = word(superblock, 0x20);
    if per_group == 0 || blocks / per_group > MOST_GROUPS {
        return wrong(format!("{blocks} blocks in groups of {per_group}"));
    }
    Ok(())
}
