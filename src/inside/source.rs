//! A part of a disk as the crates that know file systems want to read it: watched, and never
//! written.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::rc::Rc;

use ext4_view::Ext4Read;

use crate::error::Result;
use crate::image::blocking::{Disk, View};
use crate::inside::Watch;

/// A byte range of a disk. Clones share the watch, each has a position of its own.
#[derive(Clone)]
pub struct Source {
    view: View<Rc<Disk>>,
    watch: Rc<Watch>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({} bytes)", self.view.len())
    }
}

impl Source {
    /// The `len` bytes of `disk` from `start` on.
    ///
    /// # Errors
    /// Refused when they lie beyond the disk.
    pub fn new(disk: &Rc<Disk>, start: u64, len: u64, watch: &Rc<Watch>) -> Result<Self> {
        Ok(Self { view: View::new(Rc::clone(disk), start, len)?, watch: Rc::clone(watch) })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.view.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.view.is_empty()
    }

    /// Who counts what is read.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The first `N` bytes from `at` on; zeros behind the end.
    pub(super) fn peek<const N: usize>(&mut self, at: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.seek(SeekFrom::Start(at))?;
        let mut done = 0;
        while done < N {
            match Read::read(self, &mut bytes[done..])? {
                0 => break,
                count => done += count,
            }
        }
        Ok(bytes)
    }
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.watch.read()?;
        self.view.read(bytes)
    }
}

impl Seek for Source {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.view.seek(to)
    }
}

impl Write for Source {
    /// The FAT crate asks for something that it could write to.
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is only looked at"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Ext4Read for Source {
    fn read(
        &mut self,
        start: u64,
        bytes: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.seek(SeekFrom::Start(start))?;
        self.read_exact(bytes)?;
        Ok(())
    }
}
