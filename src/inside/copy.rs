//! Files of a guest to the host, without letting the guest choose where to.
//!
//! Names come from whoever made the image. None is used that leads elsewhere, nothing is written
//! through a symbolic link, none of two entries with one name is taken for the other, and
//! directories are entered only if they are some. Symbolic links are made as they are, wherever
//! they lead: making one touches nothing there.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::error::{Error, Result};
use crate::inside::filesystem::{Entry, Filesystem, Kind, Node};

/// What is read at once, in bytes.
const PIECE: usize = 1 << 20;
/// What is left out of a file when it is all zeros, in bytes.
const HOLE: usize = 4096;

/// How files are copied.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Directories with all that is in them.
    pub recursive: bool,
    /// Files that are there already are replaced.
    pub replace: bool,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// What was left out: special files.
    pub skipped: u64,
    /// What could not be copied.
    pub failed: u64,
    /// Bytes of files, holes included.
    pub bytes: u64,
}

/// Something that was not copied, and why.
#[derive(Debug)]
pub struct Omission {
    /// Its path in the file system.
    pub path: Vec<u8>,
    /// Why.
    pub why: Error,
    /// Whether it is only left out, and nothing is wrong.
    pub skipped: bool,
}

/// Copies what `path` leads to in `filesystem` to `target`: into it, if it is a directory, else as
/// it. Bits for set-uid, set-gid and sticky are not kept, and neither are owners: the files belong
/// to whoever copies. `tell` learns of everything that was left out.
///
/// # Errors
/// When there is nothing at `path`, the host cannot write, or a limit is reached. What is damaged
/// inside directories is told, and the rest is copied.
pub fn copy_out(
    filesystem: &Filesystem,
    path: &[u8],
    target: &Path,
    options: Options,
    tell: &mut dyn FnMut(Omission),
) -> Result<Copied> {
    let (path, node) = filesystem.resolve(path, !options.recursive)?;
    if node.kind == Kind::Directory && !options.recursive {
        let why = "it is a directory; -R copies those";
        return Err(Error::refused(String::from_utf8_lossy(&path), why));
    }
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    // The root has no name of its own: what is in it goes into the target.
    let inside = target.is_dir() && !name.is_empty();
    let target = if inside { target.join(OsStr::from_bytes(name)) } else { target.to_owned() };
    let mut copy =
        Copy { filesystem, options, tell, copied: Copied::default(), piece: vec![0; PIECE] };
    match copy.one(&path, node, &target, 0) {
        Ok(()) => Ok(copy.copied),
        Err(Failure::Host(error) | Failure::Image(error)) => Err(error),
    }
}

/// Whose fault it is that something could not be copied.
enum Failure {
    /// The host's, or a limit is reached: there is no use in going on.
    Host(Error),
    /// The image's: the next file may be well.
    Image(Error),
}

struct Copy<'a> {
    filesystem: &'a Filesystem,
    options: Options,
    tell: &'a mut dyn FnMut(Omission),
    copied: Copied,
    piece: Vec<u8>,
}

fn host(target: &Path, error: io::Error) -> Failure {
    Failure::Host(Error::io(target.display().to_string(), error))
}

impl Copy<'_> {
    /// An error of the image's, unless going on has no use.
    fn image(&self, error: Error) -> Failure {
        let over = self.filesystem.watch().is_over();
        if over { Failure::Host(error) } else { Failure::Image(error) }
    }

    fn one(&mut self, path: &[u8], node: Node, target: &Path, depth: usize) -> Result<(), Failure> {
        match node.kind {
            Kind::File => self.file(path, node, target),
            Kind::Directory => self.directory(path, node, target, depth),
            Kind::Symlink => self.link(path, node, target),
            other => {
                let why = format!("it is a {}, which is not copied", other.name());
                let why = Error::unsupported(String::from_utf8_lossy(path), why);
                self.copied.skipped += 1;
                (self.tell)(Omission { path: path.to_vec(), why, skipped: true });
                Ok(())
            }
        }
    }

    /// Makes room for something that is no directory.
    fn clear(&self, target: &Path) -> Result<(), Failure> {
        if self.options.replace {
            match fs::remove_file(target) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(host(target, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8], node: Node, target: &Path) -> Result<(), Failure> {
        let mut source = self.filesystem.open_file(path).map_err(|error| self.image(error))?;
        self.clear(target)?;
        // A file of that name is not opened: it might be a link that leads elsewhere.
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(target).map_err(|error| host(target, error))?;
        let mut end = 0;
        loop {
            let count = match source.read(&mut self.piece) {
                Ok(count) => count,
                Err(error) => {
                    // Half a file would look like a whole one.
                    drop(fs::remove_file(target));
                    return Err(self.image(error));
                }
            };
            if count == 0 {
                break;
            }
            let done = write_sparse(&mut file, &self.piece[..count]);
            done.map_err(|error| host(target, error))?;
            end += count as u64;
        }
        file.set_len(end).map_err(|error| host(target, error))?;
        self.copied.files += 1;
        self.copied.bytes += end;
        keep(&file, node).map_err(|error| host(target, error))
    }

    fn link(&mut self, path: &[u8], node: Node, target: &Path) -> Result<(), Failure> {
        let leads = self.filesystem.read_link(path).map_err(|error| self.image(error))?;
        self.clear(target)?;
        let leads = OsStr::from_bytes(&leads);
        std::os::unix::fs::symlink(leads, target).map_err(|error| host(target, error))?;
        self.copied.links += 1;
        let (accessed, modified) = (stamp(node.accessed), stamp(node.modified));
        let done =
            utimensat(AT_FDCWD, target, &accessed, &modified, UtimensatFlags::NoFollowSymlink);
        done.map_err(|error| host(target, error.into()))
    }

    fn directory(
        &mut self,
        path: &[u8],
        node: Node,
        target: &Path,
        depth: usize,
    ) -> Result<(), Failure> {
        let refuse = |why: String| Error::refused(String::from_utf8_lossy(path), why);
        let most = self.filesystem.watch().limits().depth;
        if depth >= most {
            let why = refuse(format!("directories lie more than {most} deep"));
            return Err(Failure::Image(why));
        }
        let entries = self.filesystem.entries(path).map_err(|error| self.image(error))?;
        let made = DirBuilder::new().mode(0o700).create(target);
        match made {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Only the directory that the caller named may be there as a symbolic link.
                let found = if depth == 0 { target.metadata() } else { target.symlink_metadata() };
                if !found.map_err(|error| host(target, error))?.is_dir() {
                    let why = format!("{} is there, and no directory", target.display());
                    return Err(Failure::Host(refuse(why)));
                }
            }
            Err(error) => return Err(host(target, error)),
        }
        self.copied.directories += 1;
        let mut last: Option<Vec<u8>> = None;
        for entry in entries {
            let mut inner = path.to_vec();
            if !inner.ends_with(b"/") {
                inner.push(b'/');
            }
            inner.extend(&entry.name);
            match self.entry(&entry, &inner, target, depth, last.as_ref()) {
                Ok(()) => {}
                Err(Failure::Image(why)) => {
                    self.copied.failed += 1;
                    (self.tell)(Omission { path: inner, why, skipped: false });
                }
                Err(failure) => return Err(failure),
            }
            last = Some(entry.name);
        }
        // Last of all: what is written into a directory changes its time, and may be forbidden.
        let mut options = OpenOptions::new();
        let opened = options.read(true).open(target);
        let file = opened.map_err(|error| host(target, error))?;
        keep(&file, node).map_err(|error| host(target, error))
    }

    fn entry(
        &mut self,
        entry: &Entry,
        path: &[u8],
        target: &Path,
        depth: usize,
        last: Option<&Vec<u8>>,
    ) -> Result<(), Failure> {
        let refuse =
            |why: &str| Err(Failure::Image(Error::refused(String::from_utf8_lossy(path), why)));
        if !entry.is_plain() {
            return refuse("a name that would lead elsewhere");
        }
        // They are sorted, so two of one name follow each other.
        if last == Some(&entry.name) {
            return refuse("a second entry of the same name");
        }
        let node = match &entry.node {
            Ok(node) => *node,
            Err(error) => {
                let why =
                    Error::io("entry", io::Error::new(ErrorKind::InvalidData, error.to_string()));
                return Err(self.image(why));
            }
        };
        self.one(path, node, &target.join(OsStr::from_bytes(&entry.name)), depth + 1)
    }
}

fn stamp(time: Option<std::time::SystemTime>) -> TimeSpec {
    let since = time.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    TimeSpec::from_duration(since.unwrap_or_default())
}

/// Gives a copy the permissions and times of its original.
fn keep(file: &File, node: Node) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(u32::from(node.mode & 0o777)))?;
    let mut times = FileTimes::new();
    if let Some(accessed) = node.accessed {
        times = times.set_accessed(accessed);
    }
    if let Some(modified) = node.modified {
        times = times.set_modified(modified);
    }
    file.set_times(times)
}

/// Appends `bytes`; where they are zeros, a hole. The file's length is the caller's to set.
fn write_sparse(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.chunks(HOLE).take_while(|part| part.iter().all(|byte| *byte == 0));
        let hole: usize = zeros.map(<[u8]>::len).sum();
        if hole > 0 {
            file.seek(SeekFrom::Current(i64::try_from(hole).expect("inside a buffer")))?;
            rest = &rest[hole..];
        }
        let data = rest.chunks(HOLE).take_while(|part| part.iter().any(|byte| *byte != 0));
        let data: usize = data.map(<[u8]>::len).sum();
        file.write_all(&rest[..data])?;
        rest = &rest[data..];
    }
    Ok(())
}
