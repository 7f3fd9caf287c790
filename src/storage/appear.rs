//! A file that appears under its name only when it is complete: until then it has no name, so that
//! whatever ends the program, nothing half-written is left.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

use super::{FileSource, OpenMode, Opened};
use crate::error::{Error, Result};

/// A new file on its way to a name.
#[derive(Debug)]
pub struct Appearing {
    file: File,
    /// Where it will appear, with links resolved.
    target: PathBuf,
    /// The name it has meanwhile, where the file system knows no files without one.
    meanwhile: Option<PathBuf>,
}

impl Appearing {
    /// Makes an empty file that will appear at `target`, in place of what is there now.
    ///
    /// # Errors
    /// When the directory does not exist or nothing can be made in it.
    pub fn new(target: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot create {}", target.display()), error);
        let target = resolved(target).map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(directory(&target));
        let (file, meanwhile) = match unnamed {
            Ok(file) if Path::new("/proc/self/fd").exists() => (file, None),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(failed(error));
            }
            _ => {
                let name = neighbour(&target);
                (options.create_new(true).open(&name).map_err(failed)?, Some(name))
            }
        };
        if let Ok(old) = fs::metadata(&target) {
            let mode = fs::Permissions::from_mode(old.permissions().mode());
            file.set_permissions(mode).map_err(failed)?;
        }
        Ok(Self { file, target, meanwhile })
    }

    /// The path by which this process can open it now.
    fn path(&self) -> PathBuf {
        let unnamed = || PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        self.meanwhile.clone().unwrap_or_else(unnamed)
    }

    /// Gives the file its name; with `durable` the bytes, and then the name, are durable when this
    /// returns.
    ///
    /// # Errors
    /// I/O errors; then the name is what it was before, unless only its durability is in question.
    pub fn publish(mut self, durable: bool) -> Result<()> {
        let named = self.give_name(durable);
        named.map_err(|error| Error::io(format!("cannot make {}", self.target.display()), error))
    }

    fn give_name(&mut self, durable: bool) -> io::Result<()> {
        if durable {
            self.file.sync_all()?;
        }
        let from = match self.meanwhile.take() {
            Some(name) => name,
            None => {
                let unnamed = self.path();
                let link = |to: &Path| {
                    linkat(AT_FDCWD, &unnamed, AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)
                };
                match link(&self.target) {
                    Ok(()) => return self.sync_directory(durable),
                    // Only a rename puts a file in the place of another.
                    Err(nix::errno::Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let name = neighbour(&self.target);
                link(&name)?;
                name
            }
        };
        let renamed = fs::rename(&from, &self.target);
        if renamed.is_err() {
            self.meanwhile = Some(from);
        }
        renamed?;
        self.sync_directory(durable)
    }

    fn sync_directory(&self, durable: bool) -> io::Result<()> {
        if !durable {
            return Ok(());
        }
        File::open(directory(&self.target))?.sync_all()
    }
}

impl Drop for Appearing {
    fn drop(&mut self) {
        if let Some(name) = &self.meanwhile {
            // Best effort: a file of that name hides nothing.
            let _ = fs::remove_file(name);
        }
    }
}

/// The path with all links resolved; what it leads to need not exist.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = path.file_name().ok_or(error)?;
            Ok(fs::canonicalize(directory(path))?.join(name))
        }
        found => found,
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// A name beside `target` that nobody else uses.
fn neighbour(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.{}.part", std::process::id()))
}

/// Opens files as another source does, but for one that is still to appear.
#[derive(Debug)]
pub struct Foreseen<'a> {
    /// Where all other files come from.
    pub source: &'a dyn FileSource,
    /// The path as it will be asked for.
    pub path: &'a Path,
    /// The file that will be there.
    pub file: &'a Appearing,
}

impl FileSource for Foreseen<'_> {
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Opened> {
        if path != self.path {
            return self.source.open(path, mode);
        }
        let opened = self.source.open(&self.file.path(), mode);
        opened.map_err(|error| error.within(path.display()))
    }

    fn create(&self, path: &Path) -> Result<Opened> {
        self.source.create(path)
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        if path == self.path { Ok(self.file.target.clone()) } else { self.source.canonical(path) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("a directory");
        let name = |entry: io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
        let mut names: Vec<_> =
            entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_when_it_is_complete_and_never_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let target = directory.path().join("disk");
        for (named, text) in [(false, "one"), (false, "two"), (true, "three"), (true, "four")] {
            let before = names(directory.path());
            let mut new = Appearing::new(&target).expect("a file");
            if named {
                // As where the file system has no files without names.
                let name = neighbour(&target);
                let file = OpenOptions::new().create_new(true).write(true).open(&name);
                (new.file, new.meanwhile) = (file.expect("a file"), Some(name));
            } else {
                assert_eq!(names(directory.path()), before);
            }
            new.file.write_all(text.as_bytes()).expect("write");
            new.publish(true).expect("a name");
            assert_eq!(fs::read_to_string(&target).expect("the file"), text);
            assert_eq!(names(directory.path()), ["disk"]);
        }
        for named in [false, true] {
            let mut new = Appearing::new(&target).expect("a file");
            if named {
                let name = neighbour(&target);
                fs::write(&name, "five").expect("write");
                new.meanwhile = Some(name);
            }
            drop(new);
            assert_eq!(fs::read_to_string(&target).expect("the file"), "four");
            assert_eq!(names(directory.path()), ["disk"]);
        }
    }

    #[test]
    fn links_stay_and_permissions_are_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let (disk, link) = (directory.path().join("disk"), directory.path().join("link"));
        fs::write(&disk, "old").expect("write");
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o640)).expect("permissions");
        std::os::unix::fs::symlink("disk", &link).expect("a link");
        Appearing::new(&link).expect("a file").publish(false).expect("a name");
        assert_eq!(fs::read(&disk).expect("the file"), b"");
        assert_eq!(fs::metadata(&disk).expect("it").permissions().mode() & 0o777, 0o640);
        assert!(fs::symlink_metadata(&link).expect("it").is_symlink());
        Appearing::new(&directory.path().join("no/disk")).expect_err("no directory");
    }
}
