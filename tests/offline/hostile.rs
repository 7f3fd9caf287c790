//! Images that lie about what refers to what: nothing is freed, or cut off, that anything still
//! leads to, and a lie costs no more time than the truth.

use common::images::{IMAGE, Kind, Layout, Made};
use common::workers::{open, read_all, write_some};
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::disk::{Act, act};

const COPIED: u64 = 1 << 63;

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The place that an entry of a table leads to.
fn place(bytes: &[u8], at: usize) -> usize {
    usize::try_from(word(bytes, at) & 0x00ff_ffff_ffff_fe00).expect("a small file")
}

fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// The L1 table of the first snapshot.
fn snapshot_l1(bytes: &[u8]) -> usize {
    place(bytes, place(bytes, 64))
}

fn refused(disk: &MemDisk, what: &Act, reason: &str) {
    let before = disk.files();
    let error = act(disk, what).expect_err("a refusal").to_string();
    assert!(error.contains(reason), "{what:?}: {error}");
    assert!(disk.files() == before, "{what:?} has changed something");
}

fn on_snapshot_one() -> [Act; 2] {
    [Act::Delete("one".to_owned()), Act::Apply("one".to_owned())]
}

fn made() -> Made {
    Layout::new(9, 300, Kind::Snapshots).make(1)
}

#[test]
fn a_snapshot_that_names_an_l2_table_twice_frees_nothing() {
    let mut made = made();
    let bytes = made.image();
    let l1 = snapshot_l1(bytes);
    let first = word(bytes, l1);
    put(bytes, l1 + 8, first);
    for what in on_snapshot_one() {
        refused(&made.disk(), &what, "named twice");
    }
}

#[test]
fn a_refusal_leaves_the_marks_of_other_features_alone() {
    let mut made = made();
    let bytes = made.image();
    let l1 = snapshot_l1(bytes);
    let first = word(bytes, l1);
    put(bytes, l1 + 8, first);
    // A feature that any change would make stale.
    put(bytes, 88, 1 << 5);
    for what in on_snapshot_one() {
        refused(&made.disk(), &what, "named twice");
    }
}

#[test]
fn a_snapshot_that_names_one_table_again_and_again_is_refused_at_once() {
    const ENTRIES: u32 = 200_000;
    let mut made = made();
    let bytes = made.image();
    let (entry, at) = (place(bytes, 64), bytes.len().next_multiple_of(512));
    let first = word(bytes, snapshot_l1(bytes));
    bytes.resize(at, 0);
    bytes.extend((0..ENTRIES).flat_map(|_| first.to_be_bytes()));
    put(bytes, entry, at as u64);
    bytes[entry + 8..entry + 12].copy_from_slice(&ENTRIES.to_be_bytes());
    for what in on_snapshot_one() {
        let disk = made.disk();
        disk.start_trace();
        refused(&disk, &what, "named twice");
        let operations = disk.take_trace().len();
        assert!(operations < 1000, "{what:?} took {operations} operations to refuse");
    }
}

#[test]
fn a_snapshot_that_names_a_cluster_more_often_than_was_counted_frees_nothing() {
    let mut made = made();
    let bytes = made.image();
    let table = place(bytes, snapshot_l1(bytes));
    assert_ne!(table, place(bytes, place(bytes, 40)), "a table of the snapshot alone");
    let entries: Vec<usize> = (0..64).map(|slot| table + slot * 8).collect();
    let used: Vec<usize> = entries.into_iter().filter(|at| word(bytes, *at) != 0).collect();
    let shared = word(bytes, used[0]);
    put(bytes, used[1], shared);
    refused(&made.disk(), &on_snapshot_one()[0], "more often than its refcount says");
}

#[test]
fn a_disk_that_shares_what_was_counted_once_is_not_shrunk() {
    let mut made = Layout::new(9, 300, Kind::Plain).make(1);
    let bytes = made.image();
    let l1 = place(bytes, 40);
    let (first, last) = (place(bytes, l1), place(bytes, l1 + 32));
    let slot = (0..64).find(|slot| word(bytes, first + slot * 8) != 0).expect("some data");
    let kept = word(bytes, first + slot * 8);
    put(bytes, last, kept & !COPIED);
    refused(&made.disk(), &Act::Resize(150), "more often than its refcount says");
}

#[test]
fn a_shrink_cuts_off_nothing_that_is_used_and_counts_as_free() {
    let made = Layout::new(12, 16_384, Kind::Empty).make(1);
    let disk = made.disk();
    let engine = disk.engine(0, 1);
    let image = open(&engine, &disk, false).expect("opening");
    let mut tags = vec![0; 2048];
    write_some(&engine, &image, &mut tags, &mut fastrand::Rng::with_seed(1)).expect("writing");
    block_on(&engine, image.close(&engine)).expect("closing");
    let before = read_all(&engine, &image).expect("reading");
    drop(image);
    // The last cluster of the file holds data that the smaller disk keeps.
    let mut bytes = disk.content_of(IMAGE).expect("the image");
    let last = bytes.len().div_ceil(4096) - 1;
    let count = place(&bytes, place(&bytes, 48)) + last * 2;
    assert_eq!(bytes[count..count + 2], [0, 1]);
    bytes[count + 1] = 0;
    let (damaged, length) = (MemDisk::new(), bytes.len());
    damaged.add(IMAGE, bytes);
    act(&damaged, &Act::Resize(8192)).expect("nothing has to be freed");
    assert_eq!(damaged.look(IMAGE, <[u8]>::len), Some(length), "the file was cut");
    let engine = damaged.engine(0, 1);
    let image = open(&engine, &damaged, false).expect("opening");
    let after = read_all(&engine, &image).expect("reading");
    assert!(after == before[..8192 * 512], "the disk has lost data");
}
