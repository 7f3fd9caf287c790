//! The images that the rows are measured on.
//!
//! Each is made when a row asks for it. Guest data is random bytes, so that nothing can be detected
//! as zeros; the large images map every cluster to a hole, so that they take little of the disk.

use std::fs::{self, File};
use std::io::{BufWriter, Error, Read, Result, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::Advice;
use tempfile::TempDir;

use crate::server::{Disk, Side};

/// The working set of most rows, in bytes.
pub(crate) const SPAN: u64 = 512 << 20;
/// The usual cluster, in bytes.
pub(crate) const CLUSTER: u64 = 64 << 10;

/// A directory of images, which vanishes at the end.
#[derive(Debug)]
pub(crate) struct Images {
    directory: TempDir,
}

impl Images {
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent)?;
        let directory = tempfile::Builder::new().prefix("images-").tempdir_in(parent)?;
        Ok(Self { directory })
    }

    /// Where a file of that name lies.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes `name` unless it is there.
    fn once(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.file(name);
        if !path.exists() {
            make(&path)?;
            // What the host still has to write would disturb whoever is measured first, and what
            // it keeps in memory depends on how the file was made.
            forget(&path)?;
        }
        Ok(path)
    }

    /// A raw image full of data.
    pub(crate) fn raw(&self) -> Result<Disk> {
        self.once("flat.raw", |path| write_noise(path, SPAN)).map(Disk::raw)
    }

    /// The same as qcow2. All readers share one; whoever writes has one of the same layout.
    pub(crate) fn flat(&self, writer: Option<Side>) -> Result<Disk> {
        let raw = self.raw()?.path;
        let name = format!("flat-{}.qcow2", writer.map_or("shared", Side::word));
        let make = |path: &Path| {
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(path)])?;
            // It was read as a whole; its own readers shall find it as `warm` leaves it.
            forget(&raw)
        };
        self.once(&name, make).map(Disk::qcow2)
    }

    /// An empty image, made anew with every call.
    pub(crate) fn empty(&self, side: Side, bytes: u64) -> Result<Disk> {
        let path = self.file(&format!("empty-{}.qcow2", side.word()));
        remove(&path)?;
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), &bytes.to_string()])?;
        File::open(&path)?.sync_all()?;
        Ok(Disk::qcow2(path))
    }

    /// A raw image that the host has room for, none of which is in memory; anew with every call.
    pub(crate) fn preallocated(&self, bytes: u64) -> Result<Disk> {
        let path = self.file("preallocated.raw");
        remove(&path)?;
        write_noise(&path, bytes)?;
        forget(&path)?;
        Ok(Disk::raw(path))
    }

    /// A chain of so many layers, the working set spread evenly over them by chance.
    pub(crate) fn chain(&self, layers: usize) -> Result<Disk> {
        let name = |layer: usize| format!("layer-{layer}.qcow2");
        let mut random = fastrand::Rng::with_seed(8);
        let mut commands = vec![String::new(); layers];
        for cluster in 0..SPAN / CLUSTER {
            let at = cluster * CLUSTER;
            let pattern = 1 + cluster % 255;
            commands[random.usize(0..layers)] += &format!("write -q -P {pattern} {at} {CLUSTER}\n");
        }
        for (layer, commands) in commands.iter().enumerate() {
            let make = |path: &Path| {
                let below = format!("backing_file={},backing_fmt=qcow2", name(layer.max(1) - 1));
                let mut words = vec!["create", "-q", "-f", "qcow2"];
                words.extend(if layer == 0 { vec![] } else { vec!["-o", &below] });
                let size = SPAN.to_string();
                words.extend([text(path), &size]);
                qemu_img(&words)?;
                feed("qemu-io", &["-f", "qcow2", "-t", "unsafe", text(path)], commands)
            };
            self.once(&name(layer), make)?;
        }
        let backing = (0..layers - 1).map(|layer| self.file(&name(layer))).collect();
        Ok(Disk { backing, ..Disk::qcow2(self.file(&name(layers - 1))) })
    }

    /// A compressed image; `kind` is `zlib` or `zstd`.
    pub(crate) fn compressed(&self, kind: &str, bytes: u64) -> Result<Disk> {
        let plain = self.once("compressible.raw", |path| write_prose(path, bytes))?;
        let make = |path: &Path| {
            let option = format!("compression_type={kind}");
            let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option];
            qemu_img(&[&words[..], &[text(&plain), text(path)]].concat())
        };
        self.once(&format!("{kind}.qcow2"), make).map(Disk::qcow2)
    }

    /// An image all of whose clusters are mapped, each to a hole; `name` tells copies apart.
    pub(crate) fn mapped(&self, name: &str, bytes: u64, cluster: u64) -> Result<Disk> {
        let name = format!("mapped-{name}-{bytes}-{cluster}.qcow2");
        self.once(&name, |path| write_mapped(path, bytes, cluster)).map(Disk::qcow2)
    }

    /// Gives the space of all images whose names begin so back.
    pub(crate) fn discard(&self, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(self.directory.path())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Writes a file's dirty pages and drops it from the page cache.
pub(crate) fn forget(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, 0, Advice::DontNeed)?;
    Ok(())
}

/// Brings a file into the page cache, and whatever is dirty of it to the disk.
///
/// The pages come one by one, as guests' random requests would have brought them. Programs that
/// write or read the whole file leave large folios instead, and ext4 looks at every block of a
/// folio for each write to it: that takes several times as long as anything a server does.
pub(crate) fn warm(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, 0, Advice::Random)?;
    let mut buffer = vec![0; 128 << 10];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// The part of neighbouring guest clusters that are neighbours in the file, as `qemu-img map` sees
/// an image of so many clusters.
pub(crate) fn contiguity(disk: &Disk, clusters: u64) -> Result<f64> {
    let words = ["map", "--output=json", "-f", "qcow2", text(&disk.path)];
    let output = Command::new("qemu-img").args(words).output()?;
    let extents: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let number = |extent: &serde_json::Value, name: &str| extent[name].as_u64();
    let mapped: Vec<_> =
        extents.iter().filter(|extent| number(extent, "offset").is_some()).collect();
    // QEMU cuts an extent in two where nothing but the kind of the host's space changes.
    let broken = mapped.windows(2).filter(|pair| {
        let end = |name| Some(number(pair[0], name)? + number(pair[0], "length")?);
        end("start") != number(pair[1], "start") || end("offset") != number(pair[1], "offset")
    });
    let length: u64 = mapped.iter().filter_map(|extent| number(extent, "length")).sum();
    if length < clusters * CLUSTER {
        return Err(Error::other(format!("only {length} bytes of the image are mapped")));
    }
    Ok(1.0 - broken.count() as f64 / (clusters - 1) as f64)
}

pub(crate) fn remove(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_file(path) } else { Ok(()) }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in plain text")
}

fn qemu_img(words: &[&str]) -> Result<()> {
    feed("qemu-img", words, "")
}

/// Runs a program with `input` at its standard input.
fn feed(program: &str, words: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new(program);
    let mut child = command.args(words).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    child.stdin.take().expect("it was piped").write_all(input.as_bytes())?;
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    Err(Error::other(format!("{program} {} failed: {status}", words.join(" "))))
}

fn write_noise(path: &Path, bytes: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut file = File::create(path)?;
    let mut piece = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        random.fill(&mut piece);
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// Words in random order: they compress to about a third, as text and programs do.
fn write_prose(path: &Path, bytes: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(2);
    let word = |random: &mut fastrand::Rng| -> Vec<u8> {
        let length = random.usize(2..12);
        (0..length).map(|_| random.u8(b'a'..=b'z')).collect()
    };
    let words: Vec<Vec<u8>> = (0..4096).map(|_| word(&mut random)).collect();
    let mut file = BufWriter::new(File::create(path)?);
    let mut written = 0;
    while written < bytes {
        let word = &words[random.usize(0..words.len())];
        file.write_all(word)?;
        file.write_all(b" ")?;
        written += word.len() as u64 + 1;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.set_len(bytes)
}

/// Writes the tables of an image whose clusters are all mapped, one behind the other; the data is
/// left to be a hole. `qemu-img create -o preallocation=metadata` does the same, but takes many
/// minutes for a gigabyte of tables.
fn write_mapped(path: &Path, bytes: u64, cluster: u64) -> Result<()> {
    const COPIED: u64 = 1 << 63;
    let data = bytes / cluster;
    let tables = data.div_ceil(cluster / 8);
    let l1_clusters = (tables * 8).div_ceil(cluster);
    // Refcounts of 16 bits: their own clusters are counted too.
    let (mut blocks, mut reftable) = (0, 0);
    loop {
        let all = 1 + reftable + blocks + l1_clusters + tables + data;
        let needed = all.div_ceil(cluster / 2);
        let needed_table = (needed * 8).div_ceil(cluster);
        if (needed, needed_table) == (blocks, reftable) {
            break;
        }
        (blocks, reftable) = (needed, needed_table);
    }
    let l1 = (1 + reftable + blocks) * cluster;
    let l2 = l1 + l1_clusters * cluster;
    let first = l2 + tables * cluster;
    let all = first / cluster + data;
    let mut out = Padded { file: BufWriter::with_capacity(1 << 20, File::create(path)?), at: 0 };
    out.file.write_all(&header(bytes, cluster, tables, l1, reftable))?;
    out.at = HEADER_BYTES as u64;
    out.fill(cluster)?;
    out.entries((0..blocks).map(|block| (1 + reftable + block) * cluster), cluster)?;
    for _ in 0..all {
        out.file.write_all(&1u16.to_be_bytes())?;
    }
    out.at += all * 2;
    out.fill(cluster)?;
    out.entries((0..tables).map(|table| (l2 + table * cluster) | COPIED), cluster)?;
    out.entries((0..data).map(|index| (first + index * cluster) | COPIED), cluster)?;
    out.file.into_inner().map_err(std::io::IntoInnerError::into_error)?.set_len(all * cluster)
}

const HEADER_BYTES: usize = 112;

/// A header of version 3, and the end of its extensions.
fn header(bytes: u64, cluster: u64, tables: u64, l1: u64, reftable: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let mut word = |at: usize, value: u64| {
        header[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
    };
    for (at, value) in [(0, 0x5146_49fb), (4, 3), (20, u64::from(cluster.ilog2())), (36, tables)] {
        word(at, value);
    }
    for (at, value) in [(56, reftable), (96, 4), (100, 104)] {
        word(at, value);
    }
    for (at, value) in [(24, bytes), (40, l1), (48, cluster)] {
        word(at, value >> 32);
        word(at + 4, value & 0xffff_ffff);
    }
    header
}

/// A file that is written from its start on, with tables that begin at clusters.
struct Padded {
    file: BufWriter<File>,
    at: u64,
}

impl Padded {
    fn entries(&mut self, entries: impl Iterator<Item = u64>, cluster: u64) -> Result<()> {
        for entry in entries {
            self.file.write_all(&entry.to_be_bytes())?;
            self.at += 8;
        }
        self.fill(cluster)
    }

    /// Zeros up to the next cluster.
    fn fill(&mut self, cluster: u64) -> Result<()> {
        let zeros = self.at.next_multiple_of(cluster) - self.at;
        self.file.write_all(&vec![0; zeros as usize])?;
        self.at += zeros;
        Ok(())
    }
}
