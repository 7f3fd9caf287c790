//! What a repair takes from the guest, or cannot look at: told, and known to whoever relies on it.

use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::Stage;
use vhost_user_qcow2::storage::{Limits, Purpose};

use super::marks::{put, small, word};
use super::*;

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small image")
}

fn disk_of(bytes: Vec<u8>) -> MemDisk {
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    disk
}

/// The refcount table, and the first refcount block.
fn refcounts(bytes: &[u8]) -> (usize, u64) {
    let table = index(word(bytes, 48));
    (table, word(bytes, table))
}

/// A small image with two enabled bitmaps; and where the bitmaps extension is.
fn with_bitmaps() -> (Vec<u8>, usize) {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", IMAGE, "4M"]);
    dir.io(IMAGE, &["write -q -P 7 0 512k".to_owned()]);
    for name in ["first", "second"] {
        dir.img(&["bitmap", "--add", "-g", "4096", IMAGE, name]);
        dir.io(IMAGE, &["write -q -P 8 1M 512k".to_owned()]);
    }
    let bytes = dir.read(IMAGE);
    let kind = 0x2385_2875_u32.to_be_bytes();
    let extension = bytes.windows(4).position(|bytes| bytes == kind).expect("bitmaps");
    (bytes, extension + 8)
}

#[test]
fn bitmaps_that_cannot_be_read_are_one_error_and_the_check_goes_on() {
    let (bytes, _) = with_bitmaps();
    let count = |faults: &Faults| {
        let engine = Fault::new(disk_of(bytes.clone()).engine(0, 1), faults.clone());
        let report = block_on(&engine, check(&engine, IMAGE, FILE, Repair::None));
        (report, faults.count_of(Purpose::HeaderRead))
    };
    let (healthy, reads) = count(&Faults::new());
    let healthy = healthy.expect("a check");
    // The directory and one or two tables are read last.
    for nth in [reads, reads - 1] {
        let faults = Faults::new();
        let purpose = Some(Purpose::HeaderRead);
        faults.add(Rule { purpose, ..Rule::fail(nth, 5) });
        let report = count(&faults).0.expect("the rest is checked");
        assert_eq!(report.check_errors, 1, "{report:?}");
        assert_eq!(report.allocated_clusters, healthy.allocated_clusters, "{report:?}");
    }
}

#[test]
fn what_a_block_counts_that_cannot_be_read_is_judged() {
    let mut bytes = small("cluster_size=64k");
    let (table, block) = refcounts(&bytes);
    put(&mut bytes, table, block | 0x200);
    let disk = disk_of(bytes);
    let found = run(&disk, Repair::None);
    assert!(found.corruptions > found.allocated_clusters, "{found:?}");
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 0, "{report:?}");
}

/// An image on a device with some room, whose refcount block lies behind everything else, and whose
/// refcounts must be made anew; and where the block is.
fn on_a_device() -> (Vec<u8>, u64) {
    const CLUSTER: usize = 4096;
    let mut bytes = small("cluster_size=4k");
    let (table, block) = refcounts(&bytes);
    let moved = bytes.len().next_multiple_of(CLUSTER);
    let content = bytes[index(block)..index(block) + CLUSTER].to_vec();
    bytes.resize(moved, 0);
    bytes.extend(content);
    put(&mut bytes, table, moved as u64);
    bytes[moved + moved / CLUSTER * 2 + 1] = 1;
    bytes[moved + index(block) / CLUSTER * 2 + 1] = 0;
    // A block behind the end of the device.
    put(&mut bytes, table + 8, 1 << 45);
    bytes.resize(moved + 64 * CLUSTER, 0);
    (bytes, moved as u64)
}

#[test]
fn a_rebuild_on_a_device_spares_the_old_refcounts_until_the_header_has_switched() {
    let (bytes, old) = on_a_device();
    let disk = disk_of(bytes);
    disk.set_limits(FILE, Limits { grows: false, ..Limits::default() });
    disk.start_trace();
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 0, "{report:?}");
    let mut switched = false;
    for event in disk.take_trace() {
        let writes = matches!(event.why, Purpose::RefblockInit | Purpose::ReftableWrite);
        if event.stage != Stage::Submitted || switched {
            continue;
        }
        switched = event.why == Purpose::HeaderWrite && event.at == 48;
        let hits = event.at < old + 4096 && old < event.at + event.len;
        assert!(!(writes && hits), "the old block is overwritten: {event:?}");
    }
    assert!(switched, "the refcounts were made anew");
    // Without room behind the old ones, nothing is changed.
    let (mut bytes, old) = on_a_device();
    bytes.truncate(index(old) + 4096);
    let disk = disk_of(bytes.clone());
    disk.set_limits(FILE, Limits { grows: false, ..Limits::default() });
    let engine = disk.engine(0, 1);
    let repaired = block_on(&engine, check(&engine, IMAGE, FILE, Repair::All));
    let error = repaired.expect_err("no room").to_string();
    assert!(error.contains("no room behind the last cluster"), "{error}");
    assert!(disk.content(FILE) == bytes);
}
