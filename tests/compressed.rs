//! Compressed clusters: written by us, read by us and by `qemu-img`, overwritten, freed, cut off by
//! power cuts, and held inflated in memory.

#[path = "compressed/cache.rs"]
mod cache;
#[path = "compressed/crash.rs"]
mod crash;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::check::check;
use common::images::IMAGE;
use common::qemu::{Dir, Verdict};
use common::sectors::SECTOR;
use common::seeds::{Repeat, seeds};
use common::workers::read_all;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::qcow2::{CacheSizes, InflatedBytes};
use vhost_user_qcow2::storage::mem::{Event, MemDisk, MemEngine, Stage};
use vhost_user_qcow2::storage::{Buf, Engine, FileId, Limits, Purpose, block_on};

const FILE: FileId = FileId(0);

/// What an image is made of.
#[derive(Debug, Clone, Copy)]
struct Shape {
    how: &'static str,
    cluster_bits: u32,
    refcount_bits: u32,
    size: usize,
    extended: bool,
}

impl Shape {
    const fn new(how: &'static str, cluster_bits: u32, size: usize) -> Self {
        Self { how, cluster_bits, refcount_bits: 16, size, extended: false }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    /// A simulated host with an empty image.
    fn disk(&self) -> MemDisk {
        let dir = Dir::new();
        let Self { how, cluster_bits, refcount_bits, size, extended } = self;
        let options = format!(
            "compression_type={how},cluster_size={},refcount_bits={refcount_bits},extended_l2={}",
            1 << cluster_bits,
            if *extended { "on" } else { "off" },
        );
        dir.img(&["create", "-q", "-f", "qcow2", "-o", &options, IMAGE, &size.to_string()]);
        let disk = MemDisk::new();
        disk.add(IMAGE, dir.read(IMAGE));
        disk
    }
}

/// Options of a disk that compresses; with `tiny`, caches hold as little as they can.
fn options(tiny: bool) -> OpenOptions {
    let least = CacheSizes { l2_bytes: 0, refcount_bytes: 0 };
    let caches = if tiny { least } else { CacheSizes::default() };
    OpenOptions { caches, compress: true, ..OpenOptions::default() }
}

fn open(engine: &dyn Engine, disk: &MemDisk, options: &OpenOptions) -> Image {
    let image = Image::open(engine, disk, Path::new(IMAGE), options);
    block_on(engine, image).expect("open")
}

fn read(engine: &MemEngine, image: &Image, at: usize, len: usize) -> Vec<u8> {
    let buf = Buf::zeroed(len);
    block_on(engine, image.read(engine, GuestOffset(at as u64), buf.clone())).expect("read");
    buf.to_vec()
}

/// Bytes that shrink: more or less, by `grain`.
fn text(random: &mut fastrand::Rng, len: usize, grain: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    if grain == 1 {
        bytes.resize(len, 0);
        random.fill(&mut bytes);
    }
    while bytes.len() < len {
        let run = random.usize(1..=grain).min(len - bytes.len());
        bytes.resize(bytes.len() + run, random.u8(..));
    }
    bytes
}

/// Whole clusters, or any range, of the disk.
fn draw(random: &mut fastrand::Rng, size: usize, cluster: usize) -> (usize, usize) {
    if random.bool() {
        let clusters = size.div_ceil(cluster);
        let first = random.usize(0..clusters);
        let count = random.usize(1..=4).min(clusters - first).min(((4 << 20) / cluster).max(1));
        let at = first * cluster;
        return (at, (count * cluster).min(size - at));
    }
    let at = random.usize(0..size / SECTOR);
    let count = random.usize(1..=(2 * cluster / SECTOR).clamp(8, 200)).min(size / SECTOR - at);
    (at * SECTOR, count * SECTOR)
}

/// One random request, given to the image and to the bytes of the model.
async fn step(
    engine: &MemEngine,
    image: &Image,
    model: &mut [u8],
    random: &mut fastrand::Rng,
    cluster: usize,
) {
    let (at, len) = draw(random, model.len(), cluster);
    let guest = GuestOffset(at as u64);
    let target = &mut model[at..at + len];
    match random.u8(0..12) {
        0..=4 => {
            // From what hardly shrinks to what nearly vanishes.
            let grain = random.choice([1, 3, 20, 500]).expect("not empty");
            target.copy_from_slice(&text(random, len, grain));
            image.write(engine, guest, Buf::copy_of(target)).await.expect("write");
        }
        5 => {
            let first = at / cluster * cluster;
            let last = (first + cluster).min(model.len());
            let target = &mut model[first..last];
            target.copy_from_slice(&text(random, last - first, 9));
            let guest = GuestOffset(first as u64);
            let done = image.write_compressed(engine, guest, Buf::copy_of(target)).await;
            done.expect("write compressed");
        }
        6 => {
            target.fill(0);
            let done = image.write_zeroes(engine, guest, len as u64, random.bool()).await;
            done.expect("zero");
        }
        7 => {
            image.discard(engine, guest, len as u64).await.expect("discard");
            let buf = Buf::zeroed(len);
            image.read(engine, guest, buf.clone()).await.expect("read");
            for (now, old) in buf.to_vec().chunks(SECTOR).zip(target.chunks_mut(SECTOR)) {
                assert!(now == old || now.iter().all(|&byte| byte == 0), "after a discard");
                old.copy_from_slice(now);
            }
        }
        8 => image.flush(engine).await.expect("flush"),
        _ => {
            let buf = Buf::zeroed(len);
            image.read(engine, guest, buf.clone()).await.expect("read");
            assert!(buf.to_vec() == target, "a read of {len} bytes at {at}");
        }
    }
}

/// The submitted operations of a trace for one reason: place and length.
fn submitted(trace: &[Event], why: Purpose) -> Vec<(u64, u64)> {
    let hits = trace.iter().filter(|event| event.stage == Stage::Submitted && event.why == why);
    hits.map(|event| (event.at, event.len)).collect()
}

/// Random requests on one image over three rounds of open and close; returns how many clusters
/// were written compressed.
fn model(shape: Shape, seed: u64, requests: usize, block: u32) -> usize {
    let disk = shape.disk();
    disk.set_limits(FILE, Limits { request_alignment: block, ..Limits::default() });
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; shape.size.next_multiple_of(SECTOR)];
    let mut compressed = 0;
    disk.start_trace();
    for round in 0..3 {
        let engine = disk.engine(round, random.u64(..));
        let tiny = random.bool();
        let inflated = InflatedBytes(random.choice([0, 1 << 20, 16 << 20]).expect("not empty"));
        let image = open(&engine, &disk, &OpenOptions { inflated, ..options(tiny) });
        for _ in 0..requests {
            let request = step(&engine, &image, &mut bytes, &mut random, shape.cluster());
            block_on(&engine, request);
        }
        block_on(&engine, image.close(&engine)).expect("close");
        assert!(read_all(&engine, &image).expect("read") == bytes, "the whole disk, {shape:?}");
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "{shape:?}: {report:?}");
        for (at, len) in submitted(&disk.take_trace(), Purpose::CompressedWrite) {
            assert_eq!((at | len) % u64::from(block), 0, "{len} bytes at {at}, {shape:?}");
            compressed += 1;
        }
    }
    let dir = Dir::of(&disk);
    let (verdict, printed) = dir.check(IMAGE);
    assert_eq!(verdict, Verdict::Clean, "{shape:?}: {printed}");
    let found = dir.guest_bytes(IMAGE);
    assert!(found[..] == bytes[..found.len()], "qemu-img reads other bytes: {shape:?}");
    compressed
}

fn models(test: &str, how: &'static str, count: u64) {
    for seed in seeds(count) {
        let _repeat = Repeat::new("compressed", test, seed);
        for (cluster_bits, size) in
            [(9, 60 << 10), (12, 300 << 10), (16, (3 << 20) + 7 * SECTOR), (21, (9 << 20) + 1000)]
        {
            for refcount_bits in [1, 2, 16, 64] {
                let shape = Shape { refcount_bits, ..Shape::new(how, cluster_bits, size) };
                let requests = if cluster_bits == 21 { 20 } else { 80 };
                let compressed = model(shape, seed, requests, 1);
                assert_eq!(compressed > 0, refcount_bits > 1, "{compressed} in {shape:?}");
            }
        }
    }
}

#[test]
fn zlib_in_every_layout() {
    models("zlib_in_every_layout", "zlib", 1);
}

#[test]
fn zstd_in_every_layout() {
    models("zstd_in_every_layout", "zstd", 1);
}

#[test]
fn files_that_take_whole_blocks_only() {
    for seed in seeds(1) {
        let _repeat = Repeat::new("compressed", "files_that_take_whole_blocks_only", seed);
        for block in [512, 4096] {
            for (cluster_bits, possible) in [(9, false), (12, block == 512), (16, true)] {
                let shape = Shape::new("zlib", cluster_bits, 40 << cluster_bits);
                let compressed = model(shape, seed, 100, block);
                assert_eq!(compressed > 0, possible, "{compressed} of {block} in {shape:?}");
            }
        }
    }
}

#[test]
fn images_with_subclusters() {
    for seed in seeds(3) {
        let _repeat = Repeat::new("compressed", "images_with_subclusters", seed);
        let shape = Shape { extended: true, ..Shape::new("zstd", 14, 40 << 14) };
        assert!(model(shape, seed, 150, 1) > 0);
    }
}

#[test]
fn the_file_is_as_small_as_qemu_makes_it() {
    let mut random = fastrand::Rng::with_seed(4);
    for how in ["zlib", "zstd"] {
        let shape = Shape::new(how, 16, 8 << 20);
        let bytes = text(&mut random, shape.size, 30);
        let disk = shape.disk();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, &OpenOptions::default());
        for (step, bytes) in bytes.chunks(shape.cluster()).enumerate() {
            let at = GuestOffset((step * shape.cluster()) as u64);
            let written = image.write_compressed(&engine, at, Buf::copy_of(bytes));
            block_on(&engine, written).expect("write compressed");
        }
        block_on(&engine, image.close(&engine)).expect("close");
        let dir = Dir::of(&disk);
        dir.write("bytes.raw", &bytes);
        let option = format!("compression_type={how}");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option];
        dir.img(&[&convert[..], &["bytes.raw", "theirs.qcow2"]].concat());
        dir.img(&["compare", "-f", "qcow2", "-F", "raw", IMAGE, "bytes.raw"]);
        let (ours, theirs) = (dir.read(IMAGE).len(), dir.read("theirs.qcow2").len());
        println!("{how}: {ours} bytes, qemu-img {theirs}");
        assert!(ours < bytes.len() * 3 / 4 && ours < theirs + theirs / 10, "{ours} > {theirs}");
    }
}

#[test]
fn a_disk_that_cannot_be_compressed_is_refused() {
    let dir = Dir::new();
    let options = "data_file=guest.data";
    dir.img(&["create", "-q", "-f", "qcow2", "-o", options, IMAGE, "1M"]);
    let disk = MemDisk::new();
    for (name, content) in dir.files() {
        disk.add(name, content);
    }
    let engine = disk.engine(0, 0);
    let wanted = OpenOptions { compress: true, ..OpenOptions::default() };
    let opened = block_on(&engine, Image::open(&engine, &disk, Path::new(IMAGE), &wanted));
    let error = opened.expect_err("it has a data file").to_string();
    assert!(error.contains(IMAGE) && error.contains("external data file"), "{error}");
    let image = open(&engine, &disk, &OpenOptions::default());
    let cluster = Buf::zeroed(1 << 16);
    let written = image.write_compressed(&engine, GuestOffset(0), cluster.clone());
    block_on(&engine, written).expect_err("it has a data file");

    let shape = Shape::new("zlib", 16, (1 << 20) + 512);
    let disk = shape.disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, &OpenOptions::default());
    for (at, len) in [(512, 1 << 16), (0, 512), (0, 1 << 17), (1 << 20, 1 << 16)] {
        let part = Buf::zeroed(len);
        let written = image.write_compressed(&engine, GuestOffset(at), part);
        block_on(&engine, written).expect_err("not one cluster");
    }
    let last = image.write_compressed(&engine, GuestOffset(1 << 20), Buf::zeroed(512));
    block_on(&engine, last).expect("the disk's last cluster");
}

/// A disk of 64 KiB clusters, each filled with `noise` bytes of noise and then with a constant.
fn filled(clusters: usize, noise: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; clusters << 16];
    for cluster in bytes.chunks_mut(1 << 16) {
        random.fill(&mut cluster[..noise]);
        cluster[noise..].fill(random.u8(..));
    }
    bytes
}

fn write_all(engine: &MemEngine, image: &Image, bytes: &[u8]) {
    let written = image.write(engine, GuestOffset(0), Buf::copy_of(bytes));
    block_on(engine, written).expect("write");
    block_on(engine, image.flush(engine)).expect("flush");
}

#[test]
fn a_shared_cluster_is_punched_when_the_last_reference_is_gone() {
    let shape = Shape::new("zlib", 16, 16 << 16);
    let disk = shape.disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, &options(false));
    disk.start_trace();
    // Each takes a little over a third of a host cluster.
    let bytes = filled(16, 24_000, 1);
    write_all(&engine, &image, &bytes);
    let places = submitted(&disk.take_trace(), Purpose::CompressedWrite);
    assert_eq!(places.len(), 16, "all were compressed");
    let touched = |&(at, len): &(u64, u64)| at >> 16..=(at + len - 1) >> 16;
    let mut left: BTreeMap<u64, usize> = BTreeMap::new();
    for cluster in places.iter().flat_map(touched) {
        *left.entry(cluster).or_default() += 1;
    }
    assert!(left.values().any(|&count| count == 4), "{left:?}");
    let mut order: Vec<usize> = (0..16).collect();
    fastrand::Rng::with_seed(3).shuffle(&mut order);
    for (step, &index) in order.iter().enumerate() {
        let at = GuestOffset((index as u64) << 16);
        block_on(&engine, image.discard(&engine, at, 1 << 16)).expect("discard");
        block_on(&engine, image.flush(&engine)).expect("flush");
        let mut punched = BTreeSet::new();
        for (at, len) in submitted(&disk.take_trace(), Purpose::GuestDiscard) {
            punched.extend(at >> 16..(at + len) >> 16);
        }
        for cluster in touched(&places[index]) {
            *left.get_mut(&cluster).expect("it was counted") -= 1;
        }
        let last = places.iter().flat_map(touched).max();
        let free = |(&cluster, &count): (&u64, &usize)| (count == 0).then_some(cluster);
        let expected: BTreeSet<u64> = left.iter().filter_map(free).collect();
        left.retain(|_, count| *count > 0);
        // More may be packed into the last one.
        let differ: Vec<&u64> = expected.symmetric_difference(&punched).collect();
        assert!(differ.iter().all(|&&cluster| Some(cluster) == last), "{expected:?} {punched:?}");
        for &other in &order[step + 1..] {
            let own = &bytes[other << 16..(other + 1) << 16];
            assert!(read(&engine, &image, other << 16, 1 << 16) == own, "cluster {other}");
        }
    }
    block_on(&engine, image.close(&engine)).expect("close");
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean() && report.mapped == 0, "{report:?}");
}
