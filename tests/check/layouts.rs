//! Healthy images of many layouts, made by `qemu-img` once for a test.

use std::path::{Path, PathBuf};

use common::images::IMAGE;
use common::qemu::Dir;
use vhost_user_qcow2::storage::mem::MemDisk;

/// How an image got its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Some clusters, some zeros, some discarded again.
    Plain,
    /// As plain, with compressed clusters between.
    Compressed,
    /// As plain, with two internal snapshots and writes after them.
    Snapshots,
    /// As plain, with two bitmaps.
    Bitmaps,
    /// As plain, over a raw file.
    Backed,
    /// All clusters have been allocated beforehand.
    Preallocated,
}

/// A healthy image.
pub(crate) struct Base {
    /// How it is laid out, for failures.
    pub(crate) name: String,
    /// The image first, then the files that it refers to.
    pub(crate) files: Vec<(PathBuf, Vec<u8>)>,
}

impl Base {
    /// The image's own bytes.
    pub(crate) fn image(&self) -> &[u8] {
        &self.files[0].1
    }

    /// A simulated host with `image` in the place of the image.
    pub(crate) fn disk(&self, image: Vec<u8>) -> MemDisk {
        let disk = MemDisk::new();
        disk.add(IMAGE, image);
        for (name, content) in &self.files[1..] {
            disk.add(name, content.clone());
        }
        disk
    }
}

/// One image of every layout.
pub(crate) fn bases() -> Vec<Base> {
    bases_of(|_, _| true).collect()
}

/// One image of every layout with a cluster size (its log2) and options that are `wanted`.
pub(crate) fn bases_of(wanted: impl Fn(u32, &str) -> bool) -> impl Iterator<Item = Base> {
    use Content::{Backed, Bitmaps, Compressed, Plain, Preallocated, Snapshots};
    const OLD: &str = "compat=0.10";
    let layouts = [
        ("", 9, 200, Plain),
        ("refcount_bits=1", 9, 200, Plain),
        ("refcount_bits=64", 9, 200, Plain),
        ("refcount_bits=2", 9, 200, Snapshots),
        ("refcount_bits=8", 9, 200, Compressed),
        ("", 9, 200, Bitmaps),
        (OLD, 9, 200, Snapshots),
        (OLD, 9, 200, Compressed),
        ("", 12, 5000, Plain),
        ("", 12, 5000, Backed),
        ("refcount_bits=1", 12, 5000, Preallocated),
        ("refcount_bits=4", 12, 5000, Compressed),
        ("refcount_bits=32", 12, 5000, Snapshots),
        ("compression_type=zstd", 12, 5000, Compressed),
        ("lazy_refcounts=on", 12, 5000, Plain),
        ("data_file=guest.data", 12, 5000, Plain),
        ("data_file=guest.data,data_file_raw=on", 12, 5000, Plain),
        (OLD, 12, 5000, Plain),
        (OLD, 12, 5000, Backed),
        ("", 16, 4096, Plain),
        ("", 16, 4096, Snapshots),
        ("", 16, 4096, Compressed),
        ("", 16, 4096, Bitmaps),
        ("refcount_bits=64", 16, 4096, Snapshots),
        ("extended_l2=on", 14, 4096, Plain),
        ("extended_l2=on", 16, 4096, Snapshots),
        ("extended_l2=on", 16, 4096, Compressed),
        ("extended_l2=on", 14, 4096, Backed),
        ("extended_l2=on,data_file=guest.data", 16, 4096, Plain),
        (OLD, 16, 4096, Snapshots),
        ("", 21, 12 << 10, Plain),
        ("refcount_bits=1", 21, 12 << 10, Plain),
    ];
    let wanted = move |(options, bits, _, _): &(&str, u32, u64, Content)| wanted(*bits, options);
    layouts
        .into_iter()
        .filter(wanted)
        .map(|(options, bits, kib, content)| make(options, bits, kib, content))
}

fn make(options: &str, cluster_bits: u32, kib: u64, content: Content) -> Base {
    let name = format!("{content:?}, {}-byte clusters, {options}", 1 << cluster_bits);
    let dir = Dir::new();
    let (cluster, size) = (1_u64 << cluster_bits, kib << 10);
    let mut all = format!("cluster_size={cluster}");
    if !options.is_empty() {
        all = format!("{all},{options}");
    }
    match content {
        Content::Backed => {
            let pattern: Vec<u8> =
                (0..size).map(|at| u8::try_from(at % 251).expect("small")).collect();
            dir.write("base.raw", &pattern);
            all.push_str(",backing_file=base.raw,backing_fmt=raw");
        }
        Content::Preallocated => all.push_str(",preallocation=falloc"),
        _ => {}
    }
    dir.img(&["create", "-q", "-f", "qcow2", "-o", &all, IMAGE, &size.to_string()]);
    let mut random = fastrand::Rng::with_seed(u64::from(cluster_bits) + kib);
    let compress = content == Content::Compressed;
    dir.io(IMAGE, &writes(&mut random, cluster, size, compress));
    match content {
        Content::Snapshots => {
            for snapshot in ["one", "two"] {
                dir.img(&["snapshot", "-c", snapshot, IMAGE]);
                dir.io(IMAGE, &writes(&mut random, cluster, size, false));
            }
        }
        Content::Bitmaps => {
            for bitmap in ["first", "second"] {
                dir.img(&["bitmap", "-g", "4096", "--add", IMAGE, bitmap]);
                dir.io(IMAGE, &writes(&mut random, cluster, size, false));
            }
        }
        _ => {}
    }
    let mut files = dir.files();
    files.sort_by_key(|(name, _)| name != Path::new(IMAGE));
    Base { name, files }
}

/// Commands of `qemu-io` that leave clusters of every kind.
fn writes(random: &mut fastrand::Rng, cluster: u64, size: u64, compress: bool) -> Vec<String> {
    let clusters = size / cluster;
    let mut commands = Vec::new();
    // Compressed clusters come first: an allocated one cannot be compressed any more.
    let step = usize::try_from((clusters / 40).max(1)).expect("small");
    for number in (0..clusters).step_by(step).filter(|_| compress) {
        let pattern = random.u8(1..);
        commands.push(format!("write -q -c -P {pattern} {} {cluster}", number * cluster));
    }
    for step in 0..14 {
        let first = random.u64(0..clusters);
        let count = random.u64(1..=(clusters / 12).max(1)).min(clusters - first);
        let (at, len) = (first * cluster, count * cluster);
        let pattern = random.u8(1..);
        commands.push(match step % 7 {
            5 => format!("write -q -z {at} {len}"),
            6 => format!("discard -q {at} {len}"),
            _ => {
                let inside = random.u64(0..cluster / 512) * 512;
                let len = (len - inside).max(512);
                format!("write -q -P {pattern} {} {len}", at + inside)
            }
        });
    }
    commands
}
