//! The dirty and corrupt bits: set when a contradiction is found, cleared by a repair.

use vhost_user_qcow2::error::{Kind as ErrorKind, Result};
use vhost_user_qcow2::storage::mem::{Effect, Stage};

use super::*;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;

/// A small image made by `qemu-img`, with some content.
pub(super) fn small(options: &str) -> Vec<u8> {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "-o", options, IMAGE, "4M"]);
    dir.io(IMAGE, &["write -q -P 7 0 512k".to_owned(), "write -q -P 8 1M 512k".to_owned()]);
    dir.read(IMAGE)
}

pub(super) fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(super) fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// The place of the first L2 entry.
pub(super) fn first_entry(bytes: &[u8]) -> usize {
    let offset = |word: u64| usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("small");
    offset(word(bytes, offset(word(bytes, 40))))
}

pub(super) fn open(disk: &MemDisk, engine: &dyn Engine) -> Result<Image> {
    let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    block_on(engine, Image::open(engine, disk, Path::new(IMAGE), &options))
}

fn marks(disk: &MemDisk) -> u64 {
    disk.look(IMAGE, |bytes| word(bytes, 72)).expect("the image")
}

#[test]
fn a_contradiction_found_while_writing_marks_the_image_once() {
    let mut bytes = small("cluster_size=64k");
    let entry = first_entry(&bytes);
    let good = word(&bytes, entry);
    put(&mut bytes, entry, good | 0x200);
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let engine = disk.engine(0, 1);
    let image = open(&disk, &engine).expect("nothing is wrong with the L1 table");
    disk.start_trace();
    for _ in 0..3 {
        let read = block_on(&engine, image.read(&engine, GuestOffset(0), Buf::zeroed(512)));
        assert!(matches!(read.expect_err("unaligned").kind(), ErrorKind::Corrupt(_)));
    }
    let good = block_on(&engine, image.read(&engine, GuestOffset(1 << 20), Buf::zeroed(512)));
    good.expect("what can be read is read on");
    let write = image.write(&engine, GuestOffset(2 << 20), Buf::zeroed(512));
    let refused = block_on(&engine, write).expect_err("no more writes");
    assert!(matches!(refused.kind(), ErrorKind::Refused(_)), "{refused}");
    let submitted = |event: &&vhost_user_qcow2::storage::mem::Event| {
        event.stage == Stage::Submitted && event.effect != Effect::None
    };
    let changes: Vec<_> = disk.take_trace().into_iter().filter(|event| submitted(&event)).collect();
    assert_eq!(changes.len(), 2, "one write, one sync: {changes:?}");
    assert_eq!((changes[0].at, changes[0].len), (72, 8));
    assert_eq!(marks(&disk), CORRUPT);
    drop(image);
    // Nobody writes to it until it is repaired.
    let error = open(&disk, &engine).expect_err("marked");
    assert!(error.to_string().contains("qemu-img check -r all"), "{error}");
    let report = run(&disk, Repair::All);
    assert!(report.is_clean() && report.losses == 1, "{report:?}");
    assert_eq!(marks(&disk), 0);
    open(&disk, &engine).expect("it is repaired");
}

#[test]
fn a_write_that_finds_a_contradiction_marks_the_image_too() {
    let mut bytes = small("cluster_size=64k");
    // A guest cluster over the L1 table.
    let (entry, table) = (first_entry(&bytes), word(&bytes, 40));
    put(&mut bytes, entry, table | 1 << 63);
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let engine = disk.engine(0, 1);
    let image = open(&disk, &engine).expect("the entry is looked at later");
    let write = block_on(&engine, image.write(&engine, GuestOffset(0), Buf::zeroed(512)));
    assert!(matches!(write.expect_err("an overlap").kind(), ErrorKind::Corrupt(_)));
    assert_eq!(marks(&disk), CORRUPT);
}

#[test]
fn a_repair_of_leaks_sets_the_flags_that_lower_refcounts_ask_for() {
    // As a snapshot leaves it that was killed: counted twice, and no longer called private.
    let mut bytes = small("cluster_size=64k");
    let entry = first_entry(&bytes);
    let word_there = word(&bytes, entry);
    put(&mut bytes, entry, word_there & !(1 << 63));
    let table = usize::try_from(word(&bytes, 48)).expect("small");
    let block = usize::try_from(word(&bytes, table)).expect("small");
    let cluster = usize::try_from((word_there & 0x00ff_ffff_ffff_fe00) >> 16).expect("small");
    bytes[block + 2 * cluster + 1] = 2;
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let found = run(&disk, Repair::None);
    assert_eq!((found.corruptions, found.leaks), (0, 1), "{found:?}");
    let left = run(&disk, Repair::Leaks);
    assert!(left.is_clean() && left.leaks_fixed == 1, "{left:?}");
    assert!(disk.look(IMAGE, oracle).expect("the image").is_clean());
    assert_eq!(disk.look(IMAGE, |bytes| word(bytes, entry)), Some(word_there));
}

/// Takes the COPIED flag of four clusters that different refcount blocks count, and counts them
/// twice.
fn counted_twice() -> Vec<u8> {
    let mut bytes = small("cluster_size=512");
    let offset = |word: u64| usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("small");
    let (l1, table) = (offset(word(&bytes, 40)), offset(word(&bytes, 48)));
    for index in [0, 15, 32, 47] {
        let entry = offset(word(&bytes, l1 + index * 8));
        let before = word(&bytes, entry);
        assert!(before >> 63 == 1, "a private cluster");
        put(&mut bytes, entry, before & !(1 << 63));
        let cluster = offset(before) >> 9;
        let block = offset(word(&bytes, table + (cluster >> 8) * 8));
        bytes[block + 2 * (cluster & 255) + 1] = 2;
    }
    bytes
}

#[test]
fn a_repair_of_leaks_that_was_killed_is_finished_by_the_next_one() {
    let disk = MemDisk::new();
    disk.add(IMAGE, counted_twice());
    let found = run(&disk, Repair::None);
    assert_eq!((found.corruptions, found.leaks), (0, 4), "{found:?}");
    let engine = disk.engine(0, 1);
    let (mut crashed, mut seed) = (Vec::new(), 0_u64);
    let mut step = || {
        seed += 1;
        if disk.unsynced_sectors() > 0 {
            crashed.push(disk.crash(seed));
        }
        engine.is_busy() && engine.wait().is_ok()
    };
    let repair = check(&engine, IMAGE, FILE, Repair::Leaks);
    assert!(exec::block_on(repair, &mut step).expect("a repair").is_clean());
    let mut halfway = 0;
    for disk in crashed {
        let left = run(&disk, Repair::None);
        halfway += u64::from(left.corruptions > 0 && left.leaks > 0);
        let report = run(&disk, Repair::Leaks);
        assert!(report.is_clean(), "{left:?} becomes {report:?}");
        assert!(disk.look(IMAGE, oracle).expect("the image").is_clean());
    }
    assert!(halfway > 0, "the power was never cut between two refcounts");
}

#[test]
fn version_2_and_images_below_are_not_marked() {
    let mut bytes = small("cluster_size=64k,compat=0.10");
    let entry = first_entry(&bytes);
    let bad = word(&bytes, entry) | 0x200;
    put(&mut bytes, entry, bad);
    let before = bytes.clone();
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let engine = disk.engine(0, 1);
    let image = open(&disk, &engine).expect("opening");
    let read =
        |image: &Image| block_on(&engine, image.read(&engine, GuestOffset(0), Buf::zeroed(512)));
    read(&image).expect_err("unaligned");
    assert!(disk.content(FILE) == before, "version 2 has no such bit");
    let write = image.write(&engine, GuestOffset(2 << 20), Buf::zeroed(512));
    block_on(&engine, write).expect_err("no more writes all the same");

    let dir = Dir::new();
    dir.write("base.qcow2", &before);
    let base = ["-b", "base.qcow2", "-F", "qcow2", IMAGE, "4M"];
    dir.img(&[["create", "-q", "-f", "qcow2"].as_slice(), &base].concat());
    let disk = MemDisk::new();
    disk.add(IMAGE, dir.read(IMAGE));
    disk.add("base.qcow2", before.clone());
    let engine = disk.engine(0, 1);
    let image = open(&disk, &engine).expect("opening");
    let read = block_on(&engine, image.read(&engine, GuestOffset(0), Buf::zeroed(512)));
    read.expect_err("unaligned");
    assert_eq!(marks(&disk), 0, "the overlay is in order");
    let write = image.write(&engine, GuestOffset(2 << 20), Buf::zeroed(512));
    block_on(&engine, write).expect("the overlay takes writes");
}

#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_opened() {
    let mut bytes = small("cluster_size=64k,lazy_refcounts=on");
    // As after a crash: what was allocated is not counted.
    let block = usize::try_from(word(&bytes, usize::try_from(word(&bytes, 48)).expect("small")));
    let block = block.expect("small");
    bytes[block + 10..block + 24].fill(0);
    put(&mut bytes, 72, DIRTY);
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let reader = MemDisk::new();
    reader.add(IMAGE, disk.content(FILE));
    let before = guest_bytes(&reader);
    assert_eq!(marks(&reader), DIRTY, "nothing is repaired when it is opened for reading");
    let engine = disk.engine(0, 1);
    let image = open(&disk, &engine).expect("it is repaired");
    let write = image.write(&engine, GuestOffset(2 << 20), Buf::copy_of(&[9; 65536]));
    block_on(&engine, write).expect("it takes writes");
    block_on(&engine, image.close(&engine)).expect("closing");
    let after = disk.look(IMAGE, oracle).expect("the image");
    assert!(after.is_clean(), "{after:?}");
    assert_eq!(marks(&disk), 0);
    assert!(guest_bytes(&disk)[..2 << 20] == before[..2 << 20]);
}
