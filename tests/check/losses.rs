//! What a repair takes from the guest, or cannot look at: told, and known to whoever relies on it.

use std::io::{self, Write};

use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::Stage;
use vhost_user_qcow2::storage::{Limits, Purpose};
use vhost_user_qcow2::sync::{Arc, Mutex, lock};

use super::marks::{first_entry, open, put, small, word};
use super::*;

const COPIED: u64 = 1 << 63;

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

/// Whether each of the two bitmaps is marked as in use.
fn in_use(bytes: &[u8], extension: usize) -> [bool; 2] {
    let first = index(word(bytes, extension + 16));
    let name = usize::from(bytes[first + 19]);
    let second = (first + 24 + name).next_multiple_of(8);
    [first, second].map(|entry| bytes[entry + 15] & 1 == 1)
}

#[test]
fn bitmaps_do_not_miss_what_a_repair_takes_from_the_guest() {
    let (mut bytes, extension) = with_bitmaps();
    let healthy = bytes.clone();
    // Refcounts alone: no byte of the guest changes.
    let (_, block) = refcounts(&bytes);
    bytes[index(block) + 1] = 7;
    let disk = disk_of(bytes);
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 0, "{report:?}");
    assert_eq!(in_use(&disk.content(FILE), extension), [false; 2]);
    // A cluster of the guest.
    let mut bytes = healthy;
    let entry = first_entry(&bytes);
    put(&mut bytes, entry, 1 << 45 | COPIED);
    let disk = disk_of(bytes);
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 1, "{report:?}");
    let after = disk.content(FILE);
    assert_eq!(in_use(&after, extension), [true; 2]);
    assert_eq!(after[95] & 1, 1, "they are there, and inconsistent");
    let info = Dir::of(&disk).img(&["info", IMAGE]);
    assert_eq!(info.matches("in-use").count(), 2, "{info}");
}

#[test]
fn no_power_cut_leaves_a_trusted_bitmap_beside_a_cluster_that_was_given_up() {
    let (mut bytes, extension) = with_bitmaps();
    let entry = first_entry(&bytes);
    put(&mut bytes, entry, 1 << 45 | COPIED);
    let (mut before, mut between, mut after) = (0, 0, 0);
    for seed in seeds(20) {
        let test =
            "losses::no_power_cut_leaves_a_trusted_bitmap_beside_a_cluster_that_was_given_up";
        let _repeat = Repeat::new("check", test, seed);
        let disk = disk_of(bytes.clone());
        let engine = disk.engine(0, seed);
        let mut step = || {
            let draws = if disk.unsynced_sectors() > 0 { 4 } else { 0 };
            for draw in 0..draws {
                let crashed = disk.crash(seed * 4 + draw).content(FILE);
                let is_mended = word(&crashed, entry) != 1 << 45 | COPIED;
                match (is_mended, in_use(&crashed, extension)) {
                    (false, [true, true]) => between += 1,
                    (false, _) => before += 1,
                    (true, marks) => {
                        assert_eq!(marks, [true; 2], "a bitmap is trusted");
                        after += 1;
                    }
                }
            }
            engine.is_busy() && engine.wait().is_ok()
        };
        let report = exec::block_on(check(&engine, IMAGE, FILE, Repair::All), &mut step);
        assert!(report.expect("a repair").is_clean());
    }
    println!("{before} power cuts before the marks, {between} before the loss, {after} after it");
    assert!(before > 0 && between > 0 && after > 0);
}

#[test]
fn a_cluster_that_lies_on_a_refcount_block_is_told_as_a_loss() {
    let mut bytes = small("cluster_size=64k");
    let (entry, (_, block)) = (first_entry(&bytes), refcounts(&bytes));
    put(&mut bytes, entry, block | COPIED);
    let disk = disk_of(bytes);
    let report = run(&disk, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.losses, 1, "{report:?}");
    let told = report.findings.iter().any(|finding| finding.contains("may be damaged"));
    assert!(told, "{report:?}");
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
    let mut bytes = small("cluster_size=4k");
    let (table, block) = refcounts(&bytes);
    put(&mut bytes, table, block | 0x200);
    let disk = disk_of(bytes);
    let found = run(&disk, Repair::None);
    assert!(found.corruptions > found.allocated_clusters, "{found:?}");
    // However much is found, what is done or not is told, too.
    let report = run(&disk, Repair::Leaks);
    let told = report.findings.iter().any(|finding| finding.contains("leaks are not repaired"));
    assert!(told, "{report:?}");
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 0, "{report:?}");
}

/// What was logged while `run` ran.
fn logged(run: impl FnOnce()) -> String {
    #[derive(Clone)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let log = Log(Arc::new(Mutex::new(Vec::new())));
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, run);
    let bytes = lock(&log.0).clone();
    String::from_utf8(bytes).expect("text")
}

#[test]
fn what_a_repair_on_opening_gives_up_is_in_the_log() {
    let mut bytes = small("cluster_size=64k");
    let entry = first_entry(&bytes);
    put(&mut bytes, entry, 1 << 45 | COPIED);
    // It was not closed, so it is repaired first.
    put(&mut bytes, 72, 1);
    let disk = disk_of(bytes);
    let engine = disk.engine(0, 1);
    let log = logged(|| drop(open(&disk, &engine).expect("it is repaired")));
    assert!(log.contains("gave up 1 clusters and tables"), "{log}");
    assert!(log.contains("the cluster of guest offset 0x0 is given up"), "{log}");
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

#[test]
fn leaks_are_not_repaired_beside_broken_bitmaps() {
    let (mut bytes, extension) = with_bitmaps();
    let (_, block) = refcounts(&bytes);
    // A leak, and a directory entry whose table lies behind the end.
    bytes[index(block) + 1] = 2;
    let directory = index(word(&bytes, extension + 16));
    put(&mut bytes, directory, 1 << 45);
    let disk = disk_of(bytes.clone());
    let report = run(&disk, Repair::Leaks);
    let told = report.findings.iter().any(|finding| finding.contains("leaks are not repaired"));
    assert!(told && report.leaks > 0 && report.leaks_fixed == 0, "{report:?}");
    assert!(disk.content(FILE) == bytes, "something was changed");
    // A repair of everything gives the bitmaps up, and says so.
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses > 0, "{report:?}");
    assert_eq!(disk.content(FILE)[95] & 1, 0, "they are called valid");
}

#[test]
fn a_directory_with_more_bitmaps_than_the_header_counts_is_not_taken_for_leaks() {
    let (mut bytes, extension) = with_bitmaps();
    for count in [1, 0] {
        bytes[extension + 3] = count;
        let disk = disk_of(bytes.clone());
        let report = run(&disk, Repair::Leaks);
        assert!(report.corruptions > 0 && report.leaks_fixed == 0, "{count}: {report:?}");
        assert!(disk.content(FILE) == bytes, "{count}: something was changed");
        let report = run(&disk, Repair::All);
        assert!(report.is_clean() && report.losses > 0, "{count}: {report:?}");
    }
}
