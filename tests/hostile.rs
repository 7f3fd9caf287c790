//! Images made to do harm, and damaged ones: every check of the header and of the tables fires with
//! its own kind, what a guest may not reach it does not reach, and nothing panics, hangs, or takes
//! more memory than stated.

#[path = "hostile/headers.rs"]
mod headers;
#[path = "hostile/random.rs"]
mod random;
#[path = "hostile/references.rs"]
mod references;
#[path = "hostile/tables.rs"]
mod tables;

use std::path::Path;

use common::images::{IMAGE, Kind, Layout, Made};
use common::memory::Counting;
use vhost_user_qcow2::error::{CorruptKind, Error, Kind as ErrorKind, Result};
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An image, its bytes open to be spoiled.
struct Victim {
    bytes: Vec<u8>,
    others: Vec<(std::path::PathBuf, Vec<u8>)>,
}

impl Victim {
    fn new(layout: Layout) -> Self {
        let Made { files, .. } = layout.make(1);
        let mut files = files.into_iter();
        let (_, bytes) = files.next().expect("the image comes first");
        Self { bytes, others: files.collect() }
    }

    /// Version 3, clusters of 4 KiB.
    fn plain() -> Self {
        Self::new(Layout::new(12, 800, Kind::Plain))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        let at = usize::try_from(at).expect("small");
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn put32(&mut self, at: u64, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn put64(&mut self, at: u64, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn disk(&self) -> MemDisk {
        let disk = MemDisk::new();
        disk.add(IMAGE, self.bytes.clone());
        for (name, content) in &self.others {
            disk.add(name, content.clone());
        }
        disk
    }

    /// Opens it for writing, or only for reading.
    fn open(&self, read_only: bool) -> (MemDisk, MemEngine, Result<Image>) {
        let disk = self.disk();
        let engine = disk.engine(0, 0);
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let image = Image::open(&engine, &disk, Path::new(IMAGE), &options);
        let image = block_on(&engine, image);
        (disk, engine, image)
    }

    /// Why it cannot be opened for writing; nothing may have been written.
    fn refusal(&self) -> Error {
        let (disk, _, image) = self.open(false);
        let error = image.expect_err("an image that must be refused");
        assert!(disk.look(IMAGE, |now| now == self.bytes).expect("the image"), "it has changed");
        error
    }

    fn corruption(&self) -> CorruptKind {
        let error = self.refusal();
        match error.kind() {
            ErrorKind::Corrupt(kind) => *kind,
            _ => panic!("refused for another reason: {error}"),
        }
    }
}

/// The sentence of a refusal names the file, and each of `parts`.
fn assert_says(error: &Error, parts: &[&str]) {
    let sentence = error.to_string();
    for part in parts.iter().chain(&["disk.qcow2"]) {
        assert!(sentence.contains(part), "{sentence:?} does not say {part:?}");
    }
    assert!(!sentence.contains('\n'), "{sentence:?} is one line");
}
