//! Images in every layout, made by `qemu-img`, with known content.

use std::path::{Path, PathBuf};

use vhost_user_qcow2::storage::mem::MemDisk;

use crate::qemu::Dir;
use crate::sectors::{SECTOR, Tag, bytes_of};

/// The name of the image in every directory and simulated host.
pub const IMAGE: &str = "disk.qcow2";

/// What an image is built on, and how its first content got into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is allocated.
    Empty,
    /// Some clusters are allocated.
    Plain,
    /// Everything is allocated beforehand, in the given way; some clusters are written.
    Preallocated(&'static str),
    /// The content is compressed, in the given way.
    Compressed(&'static str),
    /// Over a raw file of so many sectors.
    OverRaw(usize),
    /// Over a qcow2 file over a raw file, with other cluster sizes and lengths; all three hold
    /// something.
    Chain,
    /// Over a compressed qcow2 file.
    OverCompressed(&'static str),
    /// With two internal snapshots, and writes between and after them.
    Snapshots,
    /// With an external data file, which is also a raw image or not.
    DataFile {
        /// Whether it is.
        raw: bool,
    },
}

/// How an image is laid out.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// Whether entries describe subclusters.
    pub extended: bool,
    /// Whether refcounts may be written late.
    pub lazy: bool,
    /// The disk's size in sectors.
    pub sectors: usize,
    /// What it is built on.
    pub kind: Kind,
}

impl Layout {
    /// Version 3 with 16-bit refcounts.
    pub const fn new(cluster_bits: u32, sectors: usize, kind: Kind) -> Self {
        let (extended, lazy) = (false, false);
        Self { cluster_bits, refcount_bits: 16, version: 3, extended, lazy, sectors, kind }
    }

    /// The same with refcounts of another width.
    #[must_use]
    pub const fn with_refcount_bits(self, refcount_bits: u32) -> Self {
        Self { refcount_bits, ..self }
    }

    /// The same in version 2.
    #[must_use]
    pub const fn version_2(self) -> Self {
        Self { version: 2, ..self }
    }

    /// The same with extended L2 entries; clusters have 16 KiB at least.
    #[must_use]
    pub const fn extended(self) -> Self {
        Self { extended: true, ..self }
    }

    /// The same with lazy refcounts.
    #[must_use]
    pub const fn lazy(self) -> Self {
        Self { lazy: true, ..self }
    }

    fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let (cluster, bits) = (1_u64 << self.cluster_bits, self.refcount_bits);
        let mut options = format!("compat={compat},cluster_size={cluster},refcount_bits={bits}");
        for (wanted, name) in [(self.extended, "extended_l2"), (self.lazy, "lazy_refcounts")] {
            if wanted {
                options += &format!(",{name}=on");
            }
        }
        options
    }

    /// Makes the image and everything below it, with content drawn from `seed`.
    pub fn make(&self, seed: u64) -> Made {
        let mut maker = Maker {
            dir: Dir::new(),
            random: fastrand::Rng::with_seed(seed),
            layout: *self,
            tags: vec![0; self.sectors],
            next: 0,
        };
        let snapshots = maker.make();
        let keep = |(name, _): &(PathBuf, Vec<u8>)| !name.starts_with("content.raw");
        let mut files: Vec<_> = maker.dir.files().into_iter().filter(keep).collect();
        // The image is the first file of every simulated host.
        files.sort_by_key(|(name, _)| name != Path::new(IMAGE));
        Made { layout: *self, files, tags: maker.tags, snapshots }
    }
}

/// An image that was made, and what it holds.
#[derive(Clone)]
pub struct Made {
    /// How it is laid out.
    pub layout: Layout,
    /// The image and the files it refers to.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// What each sector holds.
    pub tags: Vec<Tag>,
    /// The internal snapshots by name, and what they hold.
    pub snapshots: Vec<(&'static str, Vec<Tag>)>,
}

impl Made {
    /// A simulated host with these files.
    pub fn disk(&self) -> MemDisk {
        let disk = MemDisk::new();
        for (name, content) in &self.files {
            disk.add(name, content.clone());
        }
        disk
    }

    /// The image's own file.
    pub fn image(&mut self) -> &mut Vec<u8> {
        let own = self.files.iter_mut().find(|(name, _)| name == Path::new(IMAGE));
        &mut own.expect("every maker makes one").1
    }

    /// Adds `count` clusters behind the end of the file that are counted and not used.
    ///
    /// # Panics
    /// When the first refcount block does not reach that far, or counts are no whole bytes.
    pub fn leak(&mut self, count: usize) {
        let (bits, width) = (self.layout.cluster_bits, self.layout.refcount_bits as usize / 8);
        assert!(width > 0, "counts of whole bytes");
        let bytes = self.image();
        let word = |at: usize| {
            let word = bytes[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_be_bytes(word)).expect("a small file")
        };
        let block = word(word(48));
        let first = bytes.len().div_ceil(1 << bits);
        bytes.resize((first + count) << bits, 0);
        assert!((first + count) * width <= 1 << bits, "one refcount block");
        for cluster in first..first + count {
            bytes[block + (cluster + 1) * width - 1] = 1;
        }
    }
}

struct Maker {
    dir: Dir,
    random: fastrand::Rng,
    layout: Layout,
    tags: Vec<Tag>,
    next: Tag,
}

impl Maker {
    fn make(&mut self) -> Vec<(&'static str, Vec<Tag>)> {
        let (options, sectors) = (self.layout.options(), self.layout.sectors);
        let mut snapshots = Vec::new();
        match self.layout.kind {
            Kind::Empty => self.create(IMAGE, &options, sectors),
            Kind::Plain => {
                self.draw();
                self.convert(IMAGE, &options, false);
            }
            Kind::Preallocated(how) => {
                self.create(IMAGE, &format!("{options},preallocation={how}"), sectors);
                self.write_some(IMAGE, sectors);
            }
            Kind::Compressed(how) => {
                self.draw();
                self.convert(IMAGE, &with_compression(&options, how), true);
            }
            Kind::OverRaw(length) => {
                self.over_raw("base.raw", length);
                let backed = format!("{options},backing_file=base.raw,backing_fmt=raw");
                self.create(IMAGE, &backed, sectors);
                self.write_some(IMAGE, sectors);
            }
            Kind::Chain => {
                self.over_raw("base.raw", sectors / 2 + 3);
                let middle = "cluster_size=4096,backing_file=base.raw,backing_fmt=raw";
                let length = sectors - sectors / 8 - 5;
                self.create("middle.qcow2", middle, length);
                self.write_some("middle.qcow2", length);
                self.tags[length..].fill(0);
                let backed = format!("{options},backing_file=middle.qcow2,backing_fmt=qcow2");
                self.create(IMAGE, &backed, sectors);
                self.write_some(IMAGE, sectors);
            }
            Kind::OverCompressed(how) => {
                self.draw();
                self.convert("base.qcow2", &with_compression("cluster_size=16384", how), true);
                let backed = format!("{options},backing_file=base.qcow2,backing_fmt=qcow2");
                self.create(IMAGE, &backed, sectors);
            }
            Kind::Snapshots => {
                self.draw();
                self.convert(IMAGE, &options, false);
                for name in ["one", "two"] {
                    self.dir.img(&["snapshot", "-c", name, IMAGE]);
                    snapshots.push((name, self.tags.clone()));
                    self.write_some(IMAGE, sectors);
                }
            }
            Kind::DataFile { raw } => {
                let raw = if raw { "on" } else { "off" };
                let file = format!("{options},data_file=guest.data,data_file_raw={raw}");
                self.create(IMAGE, &file, sectors);
                self.write_some(IMAGE, sectors);
            }
        }
        snapshots
    }

    fn create(&self, name: &str, options: &str, sectors: usize) {
        let size = (sectors * SECTOR).to_string();
        self.dir.img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size]);
    }

    fn convert(&self, name: &str, options: &str, compress: bool) {
        self.dir.write("content.raw", &bytes_of(0, &self.tags));
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if compress {
            arguments.push("-c");
        }
        arguments.extend(["content.raw", name]);
        self.dir.img(&arguments);
    }

    fn over_raw(&mut self, name: &str, length: usize) {
        self.draw();
        let mut tags = self.tags.clone();
        tags.resize(length, 1);
        self.dir.write(name, &bytes_of(0, &tags));
        if length < self.tags.len() {
            self.tags[length..].fill(0);
        }
    }

    /// Draws content for the whole disk: runs of one version each, every third one of zeros.
    fn draw(&mut self) {
        let mut at = 0;
        while at < self.tags.len() {
            let run = self.random.usize(1..=64).min(self.tags.len() - at);
            self.next += 1;
            let tag = if self.random.u8(0..3) == 0 { 0 } else { self.next };
            self.tags[at..at + run].fill(tag);
            at += run;
        }
    }

    /// Writes some ranges of the first `length` sectors of an image.
    fn write_some(&mut self, image: &str, length: usize) {
        let mut commands = Vec::new();
        for number in 0..6 {
            let run = self.random.usize(1..=length.div_ceil(10));
            let at = self.random.usize(0..=length - run);
            self.next += 1;
            self.tags[at..at + run].fill(self.next);
            let piece = format!("content.raw{number}");
            self.dir.write(&piece, &bytes_of(at, &self.tags[at..at + run]));
            commands.push(format!("write -q -s {piece} {} {}", at * SECTOR, run * SECTOR));
        }
        self.dir.io(image, &commands);
        for number in 0..6 {
            let piece = self.dir.path().join(format!("content.raw{number}"));
            std::fs::remove_file(piece).expect("removing a piece");
        }
    }
}

fn with_compression(options: &str, how: &str) -> String {
    // Version 2 knows zlib only, and no option for it.
    if how == "zlib" { options.to_owned() } else { format!("{options},compression_type={how}") }
}
