//! The files of a file system: one view of ext2, ext3, ext4 and FAT.

use std::io;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::inside::ext::{Ext, ExtFile};
use crate::inside::fat::{Fat, FatFile};
use crate::inside::source::Source;
use crate::inside::{Watch, guarded};

/// Most symbolic links on the way to a file.
const MOST_LINKS: u32 = 40;
/// The longest path in bytes, and the longest target of a symbolic link.
const LONGEST_PATH: u64 = 4096;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
            Self::CharacterDevice => "character device",
            Self::BlockDevice => "block device",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }

    /// As the first letter of `ls -l`.
    pub fn letter(self) -> char {
        match self {
            Self::File => '-',
            Self::Directory => 'd',
            Self::Symlink => 'l',
            Self::CharacterDevice => 'c',
            Self::BlockDevice => 'b',
            Self::Fifo => 'p',
            Self::Socket => 's',
        }
    }
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Its length in bytes.
    pub size: u64,
    /// Permissions, with set-uid, set-gid and sticky bits.
    pub mode: u16,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// When its bytes were last changed; a FAT has local times, which are taken for UTC.
    pub modified: Option<SystemTime>,
    /// When it was last looked at.
    pub accessed: Option<SystemTime>,
    /// When it was made.
    pub created: Option<SystemTime>,
}

/// An entry of a directory.
#[derive(Debug)]
pub struct Entry {
    /// Its name: any bytes but 0 and, unless the file system is damaged, `/`.
    pub name: Vec<u8>,
    /// What it is, if that can be read.
    pub node: Result<Node>,
}

impl Entry {
    /// Whether the name leads to one place inside the directory, as a name should.
    pub fn is_plain(&self) -> bool {
        let wrong = |byte: &u8| matches!(byte, b'/' | 0);
        !matches!(&*self.name, b"" | b"." | b"..") && !self.name.iter().any(wrong)
    }
}

/// The point in time so long after, or before, the beginning of 1970.
pub(super) fn time(seconds: i64, nanoseconds: u32) -> Option<SystemTime> {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base =
        if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base?.checked_add(Duration::from_nanos(u64::from(nanoseconds)))
}

/// A file is not there.
pub(super) fn absent(path: &[u8], kind: io::ErrorKind, why: &str) -> Error {
    Error::io(String::from_utf8_lossy(path), io::Error::new(kind, why))
}

/// What kind of file system lies in `source`, as far as it can be told from a few bytes; also of
/// those that cannot be looked into.
///
/// # Errors
/// When the disk cannot be read.
pub fn probe(source: &mut Source) -> Result<Option<&'static str>> {
    let failed = |error| Error::io("looking for a file system", error);
    let first: [u8; 4096] = source.peek(0).map_err(failed)?;
    let at = |at: usize, bytes: &[u8]| first[at..].starts_with(bytes);
    if at(1024 + 56, &[0x53, 0xef]) {
        return Ok(Some(Ext::variant(&first[1024..2048])));
    }
    for (place, magic, name) in [
        (0, &b"XFSB"[..], "xfs"),
        (3, b"NTFS    ", "ntfs"),
        (3, b"EXFAT   ", "exfat"),
        (0, b"LUKS\xba\xbe", "luks"),
        (512, b"LABELONE", "lvm"),
        (0, b"hsqs", "squashfs"),
        (4086, b"SWAPSPACE2", "swap"),
        (1024, &0xf2f5_2010_u32.to_le_bytes(), "f2fs"),
        (1024, &0xe0f5_e1e2_u32.to_le_bytes(), "erofs"),
    ] {
        if at(place, magic) {
            return Ok(Some(name));
        }
    }
    if Fat::is_likely(&first[..512]) {
        return Ok(Some("vfat"));
    }
    let far = |source: &mut Source, at| source.peek::<8>(at).map_err(failed);
    if far(source, 65_600)? == *b"_BHRfS_M" {
        return Ok(Some("btrfs"));
    }
    if far(source, 32_769)?.starts_with(b"CD001") {
        return Ok(Some("iso9660"));
    }
    Ok(None)
}

enum Reader {
    Ext(Ext),
    Fat(Box<Fat>),
}

/// A file system. Paths begin with `/` and are bytes, as Linux has them; a FAT's names are UTF-8
/// here, and upper and lower case are the same there.
pub struct Filesystem {
    reader: Reader,
    kind: &'static str,
    watch: Rc<Watch>,
}

impl std::fmt::Debug for Filesystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filesystem({})", self.kind)
    }
}

impl Filesystem {
    /// The file system in `source`.
    ///
    /// # Errors
    /// `Unsupported` when there is none, or one of a kind or with features that cannot be read;
    /// and when it is damaged.
    pub fn open(mut source: Source, watch: &Rc<Watch>) -> Result<Self> {
        const WHAT: &str = "opening the file system";
        let found = probe(&mut source)?;
        let kind = match found {
            Some(kind @ ("ext2" | "ext3" | "ext4" | "vfat")) => kind,
            Some(other) => {
                let why = format!("it is {other}; ext2, ext3, ext4 and FAT can be looked into");
                return Err(Error::unsupported("file system", why));
            }
            None => {
                let why = "none was found; ext2, ext3, ext4 and FAT can be looked into";
                return Err(Error::unsupported("file system", why));
            }
        };
        let reader = guarded(WHAT, || {
            Ok(match kind {
                "vfat" => Reader::Fat(Box::new(Fat::open(source)?)),
                _ => Reader::Ext(Ext::open(source)?),
            })
        })?;
        Ok(Self { reader, kind, watch: Rc::clone(watch) })
    }

    /// `ext2`, `ext3`, `ext4` or `vfat`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Who counts what is read.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The name that was given to it, if any.
    pub fn label(&self) -> String {
        match &self.reader {
            Reader::Ext(ext) => ext.label(),
            Reader::Fat(fat) => fat.label(),
        }
    }

    /// What lies at a path without symbolic links on the way.
    fn node_at(&self, path: &[u8]) -> Result<Node> {
        guarded("looking at a file", || match &self.reader {
            Reader::Ext(ext) => ext.node(path),
            Reader::Fat(fat) => fat.node(path),
        })
    }

    /// Where `path` leads, as a path without `.`, `..` and symbolic links, and what is there. The
    /// last link is followed only with `follow`.
    ///
    /// # Errors
    /// When there is nothing, the links lead round in a circle, or the file system is damaged.
    pub fn resolve(&self, path: &[u8], follow: bool) -> Result<(Vec<u8>, Node)> {
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
            parts.rev().map(<[u8]>::to_vec).collect()
        };
        // The next part is the last of this list.
        let mut ahead = split(path);
        let (mut here, mut node, mut links) = (Vec::new(), self.node_at(b"/")?, 0);
        while let Some(part) = ahead.pop() {
            if node.kind != Kind::Directory {
                return Err(absent(&here, io::ErrorKind::NotADirectory, "not a directory"));
            }
            match &*part {
                b"." => continue,
                b".." => {
                    let end = here.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                    here.truncate(end);
                    continue;
                }
                _ => {}
            }
            let before = here.len();
            here.push(b'/');
            here.extend(&part);
            if here.len() as u64 > LONGEST_PATH {
                return Err(absent(path, io::ErrorKind::InvalidFilename, "the path is too long"));
            }
            node = self.node_at(&here)?;
            if node.kind == Kind::Symlink && (follow || !ahead.is_empty()) {
                links += 1;
                if links > MOST_LINKS {
                    let why = "too many levels of symbolic links";
                    return Err(absent(path, io::ErrorKind::Other, why));
                }
                let target = self.link_at(&here, node)?;
                here.truncate(if target.starts_with(b"/") { 0 } else { before });
                ahead.extend(split(&target));
                node = Node { kind: Kind::Directory, ..node };
            }
        }
        if here.is_empty() {
            here.push(b'/');
        }
        // What `..` led to was not looked at on the way.
        let node = self.node_at(&here)?;
        Ok((here, node))
    }

    /// Where the symbolic link at `path` leads.
    ///
    /// # Errors
    /// When it is none, or the file system is damaged.
    pub fn read_link(&self, path: &[u8]) -> Result<Vec<u8>> {
        let (path, node) = self.resolve(path, false)?;
        self.link_at(&path, node)
    }

    fn link_at(&self, path: &[u8], node: Node) -> Result<Vec<u8>> {
        // The crate takes memory for all of it.
        if node.size > LONGEST_PATH {
            let why = "the target of the symbolic link is too long";
            return Err(absent(path, io::ErrorKind::InvalidData, why));
        }
        guarded("reading a symbolic link", || match &self.reader {
            Reader::Ext(ext) => ext.link(path),
            Reader::Fat(_) => Err(absent(path, io::ErrorKind::InvalidInput, "no symbolic link")),
        })
    }

    /// The entries of the directory at `path`, sorted by name, without `.` and `..`.
    ///
    /// # Errors
    /// When it is no directory, has more entries than the limits allow, or is damaged.
    pub fn entries(&self, path: &[u8]) -> Result<Vec<Entry>> {
        let (path, node) = self.resolve(path, true)?;
        if node.kind != Kind::Directory {
            return Err(absent(&path, io::ErrorKind::NotADirectory, "not a directory"));
        }
        let mut entries = Vec::new();
        let most = self.watch.limits().directory;
        let mut each = |entry: Entry| -> Result<()> {
            if matches!(&*entry.name, b"." | b"..") {
                return Ok(());
            }
            let failed = |error| Error::io(String::from_utf8_lossy(&path), error);
            self.watch.entry().map_err(failed)?;
            if entries.len() as u64 >= most {
                let why = format!("the directory has more than {most} entries");
                return Err(absent(&path, io::ErrorKind::Other, &why));
            }
            entries.push(entry);
            Ok(())
        };
        guarded("reading a directory", || match &self.reader {
            Reader::Ext(ext) => ext.entries(&path, &mut each),
            Reader::Fat(fat) => fat.entries(&path, &mut each),
        })?;
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// The regular file at `path`, for reading.
    ///
    /// # Errors
    /// When it is no regular file, or the file system is damaged.
    pub fn open_file(&self, path: &[u8]) -> Result<File<'_>> {
        let (path, node) = self.resolve(path, true)?;
        if node.kind != Kind::File {
            let why = format!("it is a {}, not a regular file", node.kind.name());
            return Err(absent(&path, io::ErrorKind::InvalidInput, &why));
        }
        let reader = guarded("opening a file", || {
            Ok(match &self.reader {
                Reader::Ext(ext) => FileReader::Ext(Box::new(ext.open_file(&path)?)),
                Reader::Fat(fat) => FileReader::Fat(Box::new(fat.open_file(&path)?)),
            })
        })?;
        Ok(File { reader, left: node.size, path, watch: &self.watch })
    }
}

enum FileReader<'a> {
    Ext(Box<ExtFile>),
    Fat(Box<FatFile<'a>>),
}

/// A regular file, read from its beginning to its end.
pub struct File<'a> {
    reader: FileReader<'a>,
    left: u64,
    path: Vec<u8>,
    watch: &'a Watch,
}

impl std::fmt::Debug for File<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "File({:?})", String::from_utf8_lossy(&self.path))
    }
}

impl File<'_> {
    /// Fills `bytes` with what comes next; returns how many there were, fewer than asked for only
    /// at the end.
    ///
    /// # Errors
    /// When the disk cannot be read, the file system is damaged or a limit is reached.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let wanted = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
        let failed = |error| Error::io(String::from_utf8_lossy(&self.path), error);
        self.watch.bytes(wanted as u64).map_err(failed)?;
        let mut done = 0;
        while done < wanted {
            let rest = &mut bytes[done..wanted];
            let count = guarded("reading a file", || match &mut self.reader {
                FileReader::Ext(file) => file.read(rest),
                FileReader::Fat(file) => file.read(rest),
            });
            match count.map_err(|error| error.within(String::from_utf8_lossy(&self.path)))? {
                0 => {
                    let why = "the file is shorter than its directory says";
                    return Err(absent(&self.path, io::ErrorKind::InvalidData, why));
                }
                count => done += count,
            }
        }
        self.left -= done as u64;
        Ok(done)
    }
}
