//! Images made by `qemu-img` over the matrix of its options, with patterns written by `qemu-io`:
//! we read the same bytes, and what we write, `qemu-img` reads and finds clean.
//!
//! `tests/data/README.md` is the recipe. Images are made when the tests run; none is kept.

use std::path::Path;

use common::check::check;
use common::images::IMAGE;
use common::qemu::{Dir, Verdict};
use common::seeds::{Repeat, seeds};
use common::workers::{open, options, read_all};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, block_on};

/// What an image is made of beside its geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    Plain,
    OverRaw,
    OverQcow2,
    Zlib,
    Zstd,
    DataFile,
    RawDataFile,
    Snapshot,
    Preallocated(&'static str),
    LazyRefcounts,
    Extended,
    ExtendedOverQcow2,
    ExtendedSnapshot,
    ExtendedZstd,
}

impl Flavour {
    fn is_extended(self) -> bool {
        use Flavour::{Extended, ExtendedOverQcow2, ExtendedSnapshot, ExtendedZstd};
        matches!(self, Extended | ExtendedOverQcow2 | ExtendedSnapshot | ExtendedZstd)
    }

    fn is_over_qcow2(self) -> bool {
        matches!(self, Flavour::OverQcow2 | Flavour::ExtendedOverQcow2)
    }

    fn is_compressed(self) -> bool {
        matches!(self, Flavour::Zlib | Flavour::Zstd | Flavour::ExtendedZstd)
    }

    fn has_snapshot(self) -> bool {
        matches!(self, Flavour::Snapshot | Flavour::ExtendedSnapshot)
    }
}

/// One point of the matrix.
#[derive(Debug, Clone, Copy)]
struct Point {
    compat: &'static str,
    cluster: usize,
    refcount_bits: u32,
    flavour: Flavour,
}

impl Point {
    /// Whether `qemu-img` makes such images.
    fn exists(&self) -> bool {
        let old = self.compat == "0.10";
        let new_only = matches!(
            self.flavour,
            Flavour::Zstd | Flavour::DataFile | Flavour::RawDataFile | Flavour::LazyRefcounts
        ) || self.flavour.is_extended();
        let shared = self.flavour.has_snapshot();
        if self.flavour.is_extended() && self.cluster < 16384 {
            return false;
        }
        !(old && (new_only || self.refcount_bits != 16)) && !(shared && self.refcount_bits == 1)
    }

    /// Bytes of the disk: some clusters, and a part of one.
    fn size(&self) -> usize {
        if self.cluster < 65_536 { (2 << 20) + 3 * 512 } else { (9 << 20) + 3 * 512 }
    }

    fn options(&self) -> String {
        let Self { compat, cluster, refcount_bits, .. } = self;
        let more = match self.flavour {
            Flavour::OverRaw => ",backing_file=base.raw,backing_fmt=raw",
            Flavour::OverQcow2 => ",backing_file=base.qcow2,backing_fmt=qcow2",
            Flavour::Zstd => ",compression_type=zstd",
            Flavour::DataFile => ",data_file=guest.data",
            Flavour::RawDataFile => ",data_file=guest.data,data_file_raw=on",
            Flavour::LazyRefcounts => ",lazy_refcounts=on",
            Flavour::Extended | Flavour::ExtendedSnapshot => ",extended_l2=on",
            Flavour::ExtendedZstd => ",extended_l2=on,compression_type=zstd",
            Flavour::ExtendedOverQcow2 => {
                ",extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2"
            }
            Flavour::Preallocated(how) => &format!(",preallocation={how}"),
            _ => "",
        };
        format!("compat={compat},cluster_size={cluster},refcount_bits={refcount_bits}{more}")
    }

    /// The image and what it refers to, in a directory of its own.
    fn make(&self, random: &mut fastrand::Rng) -> Dir {
        let dir = Dir::new();
        let size = self.size();
        match self.flavour {
            Flavour::OverRaw => {
                let mut base = vec![0; size - 70_000];
                random.fill(&mut base);
                dir.write("base.raw", &base);
            }
            flavour if flavour.is_over_qcow2() => {
                dir.img(&["create", "-q", "-f", "qcow2", "base.qcow2", "12M"]);
                dir.io("base.qcow2", &patterns(random, 12 << 20, false));
            }
            _ => {}
        }
        dir.img(&["create", "-q", "-f", "qcow2", "-o", &self.options(), IMAGE, &size.to_string()]);
        if self.flavour.is_compressed() {
            dir.io(IMAGE, &compressed(random, size, self.cluster));
        }
        let whole = !matches!(self.flavour, Flavour::DataFile | Flavour::RawDataFile);
        dir.io(IMAGE, &patterns(random, size, whole));
        if self.flavour.has_snapshot() {
            dir.img(&["snapshot", "-c", "one", IMAGE]);
            dir.io(IMAGE, &patterns(random, size, true));
        }
        dir
    }
}

/// Writes, zeroes and discards of random ranges, each byte pattern another.
fn patterns(random: &mut fastrand::Rng, size: usize, discard: bool) -> Vec<String> {
    let mut commands = Vec::new();
    for step in 1..20 {
        let len = random.usize(1..=400) * 512;
        let at = random.usize(0..=(size - len) / 512) * 512;
        commands.push(match step % 5 {
            1 => format!("write -q -z {at} {len}"),
            2 => format!("write -q -z -u {at} {len}"),
            3 if discard => format!("discard -q {at} {len}"),
            _ => format!("write -q -P {} {at} {len}", random.u8(1..)),
        });
    }
    commands
}

/// Compressed writes of whole clusters, neighbours among them.
fn compressed(random: &mut fastrand::Rng, size: usize, cluster: usize) -> Vec<String> {
    let clusters = size / cluster;
    let mut commands = Vec::new();
    let mut next = 0;
    while next < clusters && commands.len() < 60 {
        next += random.usize(0..3).min(clusters - 1 - next);
        let (at, byte) = (next * cluster, random.u8(1..));
        commands.push(format!("write -q -c -P {byte} {at} {cluster}"));
        next += 1;
    }
    commands
}

/// A host with the files of a directory, the image first.
fn load(dir: &Dir) -> MemDisk {
    let disk = MemDisk::new();
    let mut files = dir.files();
    files.sort_by_key(|(name, _)| name != Path::new(IMAGE));
    files.into_iter().for_each(|(name, content)| {
        disk.add(name, content);
    });
    disk
}

/// Random changes; `bytes` is kept up to date.
fn change(disk: &MemDisk, image: &Image, bytes: &mut [u8], random: &mut fastrand::Rng) {
    let engine = disk.engine(0, random.u64(..));
    for step in 0..40 {
        let len = random.usize(1..=300) * 512;
        let at = random.usize(0..=(bytes.len() - len) / 512) * 512;
        let (guest, target) = (GuestOffset(at as u64), &mut bytes[at..at + len]);
        block_on(&engine, async {
            if step % 4 == 0 {
                target.fill(0);
                image.write_zeroes(&engine, guest, len as u64, random.bool()).await.expect("zero");
            } else {
                random.fill(target);
                image.write(&engine, guest, Buf::copy_of(target)).await.expect("write");
            }
        });
    }
    block_on(&engine, image.close(&engine)).expect("close");
}

fn golden(point: Point, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = point.make(&mut random);
    let mut bytes = dir.guest_bytes(IMAGE);
    let disk = load(&dir);
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "our checker on qemu's image: {report:?}");
    let engine = disk.engine(0, seed);
    let image = open(&engine, &disk, seed % 2 == 1).expect("open");
    assert!(read_all(&engine, &image).expect("read") == bytes, "we read other bytes");
    change(&disk, &image, &mut bytes, &mut random);
    assert!(read_all(&engine, &image).expect("read") == bytes, "we read back other bytes");
    let snapshot = point.flavour.has_snapshot().then(|| dir.snapshot_bytes(IMAGE, "one"));
    let dir = Dir::of(&disk);
    let (verdict, printed) = dir.check(IMAGE);
    assert_eq!(verdict, Verdict::Clean, "{printed}");
    assert!(dir.guest_bytes(IMAGE) == bytes, "qemu-img reads other bytes");
    if let Some(old) = snapshot {
        assert!(dir.snapshot_bytes(IMAGE, "one") == old, "the snapshot has changed");
    }
    if point.flavour == Flavour::RawDataFile {
        // qemu-img fills the data file up to a whole cluster.
        let data = dir.read("guest.data");
        assert!(data[..point.size()] == bytes, "the data file is no raw image");
        let end = point.size().next_multiple_of(point.cluster);
        assert!(data.len() <= end, "the data file has grown beyond the disk");
    }
}

/// All of the matrix with one cluster size.
fn matrix(test: &str, cluster: usize) {
    let flavours = [
        Flavour::Plain,
        Flavour::OverRaw,
        Flavour::OverQcow2,
        Flavour::Zlib,
        Flavour::Zstd,
        Flavour::DataFile,
        Flavour::RawDataFile,
        Flavour::Snapshot,
        Flavour::Preallocated("metadata"),
        Flavour::Preallocated("falloc"),
        Flavour::LazyRefcounts,
        Flavour::Extended,
        Flavour::ExtendedOverQcow2,
        Flavour::ExtendedSnapshot,
        Flavour::ExtendedZstd,
    ];
    let mut made = 0;
    for seed in seeds(1) {
        for compat in ["0.10", "1.1"] {
            for refcount_bits in [1, 16, 64] {
                for flavour in flavours {
                    let point = Point { compat, cluster, refcount_bits, flavour };
                    if point.exists() {
                        let _repeat = Repeat::new("golden", test, seed);
                        golden(point, seed);
                        made += 1;
                    }
                }
            }
        }
    }
    println!("{test}: {made} images");
}

#[test]
fn clusters_of_512() {
    matrix("clusters_of_512", 512);
}

#[test]
fn clusters_of_4_kib() {
    matrix("clusters_of_4_kib", 4096);
}

#[test]
fn clusters_of_64_kib() {
    matrix("clusters_of_64_kib", 65_536);
}

#[test]
fn clusters_of_2_mib() {
    matrix("clusters_of_2_mib", 2 << 20);
}

#[test]
fn header_extensions_and_unknown_fields_survive_byte_for_byte() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "1M"]);
    let mut image = dir.read(IMAGE);
    // An extension that nobody knows, before those that were there: the header grows by 16 bytes
    // that nobody knows either.
    let length = 112;
    let rest = image[length..4096].to_vec();
    image[100..104].copy_from_slice(&128_u32.to_be_bytes());
    image[length..length + 16].copy_from_slice(&[0xab; 16]);
    let unknown = [0x1234_5678_u32.to_be_bytes(), 5_u32.to_be_bytes()].concat();
    image[128..136].copy_from_slice(&unknown);
    image[136..144].copy_from_slice(b"hello\0\0\0");
    image[144..4096].copy_from_slice(&rest[..4096 - 144]);
    let before = image[..65_536].to_vec();
    let disk = MemDisk::new();
    disk.add(IMAGE, image);
    let engine = disk.engine(0, 0);
    let options = options(false);
    let image = block_on(&engine, Image::open(&engine, &disk, Path::new(IMAGE), &options));
    let image = image.expect("open");
    block_on(&engine, image.write(&engine, GuestOffset(0), Buf::copy_of(&[1; 4096])))
        .expect("write");
    block_on(&engine, image.close(&engine)).expect("close");
    assert!(disk.look(IMAGE, |now| now[..65_536] == before).expect("the image"));
    assert_eq!(Dir::of(&disk).check(IMAGE).0, Verdict::Clean);
}

#[test]
fn a_small_write_allocates_the_subclusters_it_touches_and_no_other() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    dir.io("base.qcow2", &["write -q -P 7 0 1M".to_owned()]);
    let backed = "extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2";
    dir.img(&["create", "-q", "-f", "qcow2", "-o", backed, IMAGE, "1M"]);
    let disk = load(&dir);
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("open");
    let mut bytes = dir.guest_bytes(IMAGE);
    // Subclusters have 2 KiB: one byte over an edge takes two of them, and zeros take one away.
    for (at, len) in [(65_536 + 4096, 512), (131_072 - 512, 1024)] {
        bytes[at..at + len].fill(1);
        let write =
            image.write(&engine, GuestOffset(at as u64), Buf::copy_of(&bytes[at..at + len]));
        block_on(&engine, write).expect("write");
    }
    bytes[131_072..133_120].fill(0);
    block_on(&engine, image.write_zeroes(&engine, GuestOffset(131_072), 2048, true)).expect("zero");
    block_on(&engine, image.close(&engine)).expect("close");
    let dir = Dir::of(&disk);
    assert_eq!(dir.check(IMAGE).0, Verdict::Clean);
    assert!(dir.guest_bytes(IMAGE) == bytes, "qemu-img reads other bytes");
    let map = dir.img(&["map", "--output=json", IMAGE]);
    let own: Vec<&str> = map.lines().filter(|line| line.contains("\"depth\": 0")).collect();
    let expected = [(69_632, 2048, true), (129_024, 2048, true), (131_072, 2048, false)];
    assert_eq!(own.len(), expected.len(), "{map}");
    for (line, (start, length, data)) in own.iter().zip(expected) {
        let start = format!("\"start\": {start}, \"length\": {length}");
        assert!(line.contains(&start) && line.contains(&format!("\"data\": {data}")), "{map}");
    }
}
