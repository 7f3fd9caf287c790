//! Random requests from a host-side client against every kind of image. The answers must agree
//! with the model, and so must what `qemu-img` makes of the image afterwards.

use std::ops::Range;
use std::path::PathBuf;

use fastrand::Rng;
use integration::client::Client;
use integration::daemon::Daemon;
use integration::images;
use integration::model::{Model, SECTOR};
use integration::scratch::{Scratch, number_from_environment, seed};
use integration::workload::{DEPTH, Workload};

const MIB: usize = 1 << 20;

/// One image to be served, and what to expect of it.
struct Case {
    scratch: Scratch,
    seed: u64,
    model: Model,
    image: PathBuf,
    format: &'static str,
    cluster: usize,
    queues: usize,
    arguments: Vec<&'static str>,
    /// A file that must equal the guest's disk byte for byte, besides the image itself.
    raw_twin: Option<PathBuf>,
}

impl Case {
    /// An image of so many bytes that the caller still has to make.
    fn new(name: &str, size: usize) -> Self {
        let (scratch, seed) = (Scratch::new(name), seed());
        let image = scratch.file("disk.qcow2");
        let model = Model::new(seed, size / SECTOR);
        let arguments = vec!["--format", "qcow2"];
        let (format, cluster, queues, raw_twin) = ("qcow2", 64 << 10, 1, None);
        Self { scratch, seed, model, image, format, cluster, queues, arguments, raw_twin }
    }

    /// An empty image with the options of `qemu-img create -o`.
    fn empty(name: &str, size: usize, options: &str, cluster: usize) -> Self {
        let case = Self { cluster, ..Self::new(name, size) };
        images::create(&case.image, "qcow2", options, size);
        case
    }

    /// A raw file called `name` whose first half of every 2 MiB is filled, and the model with it.
    fn half_filled_raw(&mut self, name: &str, sectors: usize) -> PathBuf {
        let path = self.scratch.file(name);
        images::write_raw(&path, &mut self.model, sectors, &half_of_each(2 * MIB, sectors));
        path
    }

    fn run(mut self) {
        self.serve();
    }

    /// Serves the image twice, as what one daemon leaves the next must find.
    fn serve(&mut self) {
        let requests = number_from_environment("REQUESTS", 20_000);
        let mut rng = Rng::with_seed(self.seed);
        for _ in 0..2 {
            let daemon = Daemon::start(&self.scratch, &self.image, &self.arguments);
            let mut client = Client::connect(&self.scratch.socket(), self.queues, DEPTH)
                .expect("connect to the daemon");
            let mut workload = Workload::new(&mut client, &mut self.model, &mut rng, self.cluster);
            let result = workload
                .load(&mut client, requests / 2)
                .and_then(|()| workload.drain(&mut client))
                .and_then(|()| workload.verify_all(&mut client));
            result.unwrap_or_else(|error| panic!("{error}; SEED={}", self.seed));
            drop(client);
            daemon.terminate();
            self.verify_by_qemu_img();
        }
    }

    fn verify_by_qemu_img(&mut self) {
        if self.format == "qcow2" {
            images::assert_clean(&self.image);
        }
        let raw = self.scratch.file("converted.raw");
        images::convert_to_raw(&self.image, self.format, None, &raw);
        let result = images::verify_raw(&raw, &mut self.model, false);
        result.unwrap_or_else(|error| panic!("by qemu-img: {error}; SEED={}", self.seed));
        if let Some(twin) = &self.raw_twin {
            let result = images::verify_raw(twin, &mut self.model, false);
            result.unwrap_or_else(|error| panic!("the raw twin: {error}; SEED={}", self.seed));
        }
    }
}

/// The first half of every `period` bytes, in sectors.
fn half_of_each(period: usize, sectors: usize) -> Vec<Range<usize>> {
    let period = period / SECTOR;
    let starts = (0..sectors).step_by(period);
    starts.map(|start| start..(start + period / 2).min(sectors)).collect()
}

#[test]
fn clusters_of_512_bytes() {
    Case::empty("cluster-512", 16 * MIB, "cluster_size=512", 512).run();
}

#[test]
fn clusters_of_4_kib() {
    Case::empty("cluster-4k", 64 * MIB, "cluster_size=4k", 4 << 10).run();
}

#[test]
fn clusters_of_64_kib() {
    Case::empty("cluster-64k", 64 * MIB, "cluster_size=64k", 64 << 10).run();
}

#[test]
fn clusters_of_2_mib() {
    Case::empty("cluster-2m", 256 * MIB, "cluster_size=2M", 2 * MIB).run();
}

#[test]
fn refcounts_of_1_bit() {
    Case::empty("refcount-1", 64 * MIB, "refcount_bits=1", 64 << 10).run();
}

#[test]
fn refcounts_of_16_bits() {
    Case::empty("refcount-16", 64 * MIB, "refcount_bits=16,cluster_size=16k", 16 << 10).run();
}

#[test]
fn refcounts_of_64_bits() {
    Case::empty("refcount-64", 64 * MIB, "refcount_bits=64", 64 << 10).run();
}

#[test]
fn version_2() {
    Case::empty("version-2", 64 * MIB, "compat=0.10", 64 << 10).run();
}

#[test]
fn preallocated_metadata() {
    Case::empty("preallocated", 64 * MIB, "preallocation=metadata", 64 << 10).run();
}

#[test]
fn subclusters() {
    Case::empty("subclusters", 64 * MIB, "extended_l2=on", 64 << 10).run();
}

#[test]
fn subclusters_over_a_raw_base() {
    let mut case = Case::new("subclusters-over-raw", 64 * MIB);
    case.half_filled_raw("base.raw", 40 * MIB / SECTOR);
    let options = "extended_l2=on,cluster_size=128k,backing_file=base.raw,backing_fmt=raw";
    images::create(&case.image, "qcow2", options, 64 * MIB);
    case.run();
}

#[test]
fn lazy_refcounts() {
    Case::empty("lazy", 64 * MIB, "lazy_refcounts=on", 64 << 10).run();
}

#[test]
fn several_queues() {
    let case = Case::empty("queues", 64 * MIB, "", 64 << 10);
    Case { queues: 4, ..case }.run();
}

#[test]
fn blocks_of_4_kib() {
    let mut case = Case::empty("block-4k", 64 * MIB, "", 64 << 10);
    case.arguments.extend(["--block-size", "4096"]);
    case.run();
}

#[test]
fn threads_instead_of_io_uring() {
    let mut case = Case::empty("threads", 64 * MIB, "", 64 << 10);
    case.arguments.extend(["--aio", "threads"]);
    case.run();
}

#[test]
fn direct_io() {
    let mut case = Case::empty("direct", 64 * MIB, "", 64 << 10);
    case.arguments.extend(["--cache", "none"]);
    case.run();
}

#[test]
fn direct_io_with_threads() {
    let mut case = Case::empty("direct-threads", 32 * MIB, "cluster_size=4k", 4 << 10);
    case.arguments.extend(["--cache", "none", "--aio", "threads"]);
    case.run();
}

#[test]
fn write_through() {
    let mut case = Case::empty("write-through", 32 * MIB, "", 64 << 10);
    case.arguments.extend(["--cache", "writethrough"]);
    case.run();
}

/// An overlay of a base whose clusters are compressed.
fn overlay_of_compressed(compression: &str) {
    let size = 64 * MIB;
    let mut case = Case::new(&format!("base-{compression}"), size);
    let raw = case.half_filled_raw("base.raw", size / SECTOR);
    let base = case.scratch.file("base.qcow2");
    images::convert_from_raw(&raw, &base, &format!("compression_type={compression}"), true);
    images::create_overlay(&case.image, "base.qcow2", "qcow2", size);
    case.run();
}

#[test]
fn overlay_of_a_zlib_base() {
    overlay_of_compressed("zlib");
}

#[test]
fn overlay_of_a_zstd_base() {
    overlay_of_compressed("zstd");
}

/// Writes into an image whose own clusters are compressed.
fn overwrite_compressed(compression: &str) {
    let size = 64 * MIB;
    let mut case = Case::new(&format!("compressed-{compression}"), size);
    let raw = case.half_filled_raw("source.raw", size / SECTOR);
    images::convert_from_raw(&raw, &case.image, &format!("compression_type={compression}"), true);
    case.run();
}

#[test]
fn overwriting_zlib_clusters() {
    overwrite_compressed("zlib");
}

#[test]
fn overwriting_zstd_clusters() {
    overwrite_compressed("zstd");
}

#[test]
fn three_layers_ending_in_raw() {
    let size = 64 * MIB;
    let mut case = Case::new("three-layers", size);
    // The lower layers end inside a cluster: what lies beyond reads as zeroes.
    let raw_sectors = (40 * MIB + 7 * SECTOR) / SECTOR;
    case.half_filled_raw("base.raw", raw_sectors);
    let middle = case.scratch.file("middle.qcow2");
    images::create_overlay(&middle, "base.raw", "raw", 52 * MIB + 3 * SECTOR);
    images::create_overlay(&case.image, "middle.qcow2", "qcow2", size);
    case.run();
}

/// An image whose guest data lies in a file of its own.
fn data_file(name: &str, is_raw: bool) {
    let size = 64 * MIB;
    let case = Case::new(name, size);
    let data = case.scratch.file("disk.data");
    let raw = if is_raw { "on" } else { "off" };
    let options = format!("data_file={},data_file_raw={raw}", data.display());
    images::create(&case.image, "qcow2", &options, size);
    let raw_twin = is_raw.then_some(data);
    Case { raw_twin, ..case }.run();
}

#[test]
fn external_data_file() {
    data_file("data-file", false);
}

#[test]
fn external_raw_data_file() {
    data_file("data-file-raw", true);
}

#[test]
fn raw_image() {
    let size = 64 * MIB;
    let mut case = Case::new("raw", size);
    case.image = case.half_filled_raw("disk.raw", size / SECTOR);
    case.arguments = vec!["--format", "raw"];
    Case { format: "raw", cluster: 4 << 10, ..case }.run();
}

#[test]
fn internal_snapshot_stays_as_it_is() {
    let size = 64 * MIB;
    let mut case = Case::new("snapshot", size);
    let raw = case.half_filled_raw("source.raw", size / SECTOR);
    images::convert_from_raw(&raw, &case.image, "", false);
    let path = case.image.as_os_str();
    images::qemu_img(&["snapshot".as_ref(), "-c".as_ref(), "before".as_ref(), path]);
    let mut before = case.model.clone();
    case.serve();
    let frozen = case.scratch.file("frozen.raw");
    images::convert_to_raw(&case.image, "qcow2", Some("before"), &frozen);
    let result = images::verify_raw(&frozen, &mut before, false);
    result.unwrap_or_else(|error| panic!("the snapshot: {error}; SEED={}", case.seed));
}
