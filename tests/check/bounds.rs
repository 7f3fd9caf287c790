//! Large and sparse images: time and memory stay within what is stated.

use std::fs::OpenOptions as FileOptions;
use std::os::unix::fs::FileExt;

use common::images::{Kind, Layout};
use common::memory::{Counting, peak};
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::host::{self, Aio};
use vhost_user_qcow2::storage::{FileSource, OpenMode};

use super::*;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CLUSTER: u64 = 512;

/// An image with clusters of 512 bytes whose `entries` data clusters lie `apart` clusters from each
/// other in a sparse file; none of them is counted.
fn sparse(dir: &Dir, entries: u64, apart: u64) {
    let size = (entries * CLUSTER).to_string();
    let layout = "cluster_size=512,refcount_bits=1";
    dir.img(&["create", "-q", "-f", "qcow2", "-o", layout, IMAGE, &size]);
    let header = dir.read(IMAGE);
    let l1 = u64::from_be_bytes(header[40..48].try_into().expect("eight bytes"));
    let file = FileOptions::new().write(true).open(dir.path().join(IMAGE)).expect("the image");
    let tables = (header.len() as u64).next_multiple_of(CLUSTER);
    let first = (tables / CLUSTER + entries.div_ceil(64)) * CLUSTER;
    let place = |number: u64| first + number * apart * CLUSTER;
    let words = |words: Vec<u64>| words.into_iter().flat_map(u64::to_be_bytes).collect::<Vec<_>>();
    let roots = (0..entries.div_ceil(64)).map(|table| (tables + table * CLUSTER) | (1 << 63));
    file.write_all_at(&words(roots.collect()), l1).expect("writing");
    let leaves = (0..entries).map(|number| place(number) | 1 << 63);
    file.write_all_at(&words(leaves.collect()), tables).expect("writing");
    file.set_len(place(entries)).expect("a sparse file");
}

fn on_host(dir: &Dir, repair: Repair, memory: usize) -> Report {
    let files = Files::new(Options::default());
    let engine = host::engine(Aio::Threads, &files, 0).expect("an engine");
    let mode = OpenMode { read_only: false, backing: false };
    let file = files.open(&dir.path().join(IMAGE), mode).expect("the image");
    let report = check_within(&*engine, IMAGE, file.id, repair, memory);
    block_on(&*engine, report).expect("checking")
}

#[test]
fn more_than_2_to_the_31_clusters_are_checked_and_repaired() {
    let (dir, entries) = (Dir::new(), 2000);
    sparse(&dir, entries, (1 << 31) / (entries - 10));
    let before = on_host(&dir, Repair::None, MEMORY);
    assert!(before.image_end_offset > 1 << 40, "{before:?}");
    // Each data cluster and each L2 table lacks its count, and the flag is true of none.
    let tables = entries.div_ceil(64);
    assert!(before.corruptions >= entries + tables, "{before:?}");
    // With few bytes of memory, the same is found.
    let few = on_host(&dir, Repair::None, 64 << 10);
    assert_eq!((few.corruptions, few.leaks), (before.corruptions, before.leaks));
    let after = on_host(&dir, Repair::All, 64 << 10);
    assert!(after.is_clean() && after.losses == 0, "{after:?}");
    assert_eq!(after.corruptions_fixed, before.corruptions);
    assert!(on_host(&dir, Repair::None, MEMORY).is_clean());
}

#[test]
fn a_sparse_image_takes_no_more_memory_than_stated() {
    const BUDGET: usize = 4 << 20;
    let (dir, entries) = (Dir::new(), 400_000);
    sparse(&dir, entries, 5000);
    let (few, small) = peak(|| on_host(&dir, Repair::None, BUDGET));
    let (many, large) = peak(|| on_host(&dir, Repair::None, MEMORY));
    assert_eq!(few.corruptions, many.corruptions);
    println!("{small} bytes at most, {large} without the bound");
    let room = 8 << 20;
    assert!(large > 2 * (BUDGET as u64 + room), "the image is large enough to tell: {large}");
    assert!(small < BUDGET as u64 + room, "{small}");
}

#[test]
fn an_l1_table_behind_the_end_of_the_file_is_not_repaired_into_a_sound_image() {
    let mut made = Layout::new(12, 800, Kind::Plain).make(0);
    let behind = (made.image().len() as u64).next_multiple_of(4096) + (1 << 20);
    made.image()[40..48].copy_from_slice(&behind.to_be_bytes());
    let disk = made.disk();
    for repair in [Repair::None, Repair::Leaks, Repair::All, Repair::All] {
        let report = run(&disk, repair);
        assert!(report.check_errors > 0, "{repair:?}: {report:?}");
        assert!(disk.content(FILE) == *made.image(), "{repair:?} has changed the image");
    }
}

#[test]
fn a_small_l1_table_right_behind_the_end_of_the_file_is_an_error() {
    let mut made = Layout::new(12, 800, Kind::Plain).make(0);
    let end = (made.image().len() as u64).next_multiple_of(4096);
    let image = made.image();
    image.resize(usize::try_from(end).expect("a small file"), 0);
    image[40..48].copy_from_slice(&end.to_be_bytes());
    let disk = made.disk();
    for repair in [Repair::None, Repair::All] {
        let report = run(&disk, repair);
        assert!(report.check_errors > 0, "{repair:?}: {report:?}");
        assert!(disk.content(FILE) == *made.image(), "{repair:?} has changed the image");
    }
}

#[test]
fn a_compressed_cluster_right_behind_the_end_of_the_file_is_an_error() {
    let mut made = Layout::new(12, 800, Kind::Compressed("zlib")).make(0);
    let image = made.image();
    let end = image.len().next_multiple_of(4096);
    image.resize(end, 0);
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"));
    let place = |word: u64| usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("a small file");
    let entry = place(word(place(word(40))));
    // One sector, the first behind the end.
    image[entry..entry + 8].copy_from_slice(&(1 << 62 | end as u64).to_be_bytes());
    let report = run(&made.disk(), Repair::None);
    let told = |finding: &String| finding.contains("compressed cluster lies beyond the end");
    assert!(report.findings.iter().any(told), "{report:?}");
}
