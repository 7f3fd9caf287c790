//! What a repair takes from the guest, or cannot look at: told, and known to whoever relies on it.

use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::Purpose;

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
