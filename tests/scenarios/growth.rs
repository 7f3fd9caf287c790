//! Tables that grow: refcount tables of several clusters, counts of the tables themselves, and L1
//! tables whose last cluster is only partly used.

use common::check::check;
use common::images::{IMAGE, Kind, Layout};
use common::qemu::{Dir, Verdict};
use common::workers::open;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, FileId, Limits, block_on};

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{Act, KIB, MIB, Stage, index};

/// Clusters of the refcount table.
fn reftable_clusters(stage: &Stage) -> u64 {
    stage.half_word(56)
}

#[test]
fn the_refcount_table_grows_several_times() {
    // A refcount block counts 64 clusters of 512 bytes, a cluster of the table reaches 2 MiB.
    let mut stage = Stage::new("cluster_size=512,refcount_bits=64", 16 * MIB).tiny();
    assert_eq!(reftable_clusters(&stage), 1);
    let mut sizes = vec![1];
    for step in 0..6 {
        stage.ours(&[Write(step * 1500 * KIB, 1500 * KIB, u8::try_from(step + 1).expect("small"))]);
        sizes.push(reftable_clusters(&stage));
        assert!(stage.report().is_clean(), "{:?}", stage.report());
    }
    assert!(sizes.is_sorted() && sizes[6] >= 4, "{sizes:?}");
    stage.judge();
    // QEMU goes on from there, and we from what it made of it.
    stage.theirs(&[Write(10 * MIB, 3 * MIB, 50)]);
    stage.ours(&[Write(13 * MIB, 2 * MIB, 51), Discard(0, 4 * MIB), Write(MIB, MIB, 52)]);
    stage.judge();
}

#[test]
fn every_position_at_which_the_refcount_table_can_run_out() {
    // Two clusters at a time across the table's end, each time by somebody who has just opened the
    // image; the new table, its blocks and the data compete for the last counts.
    for step in [1, 2, 3] {
        let mut stage = Stage::new("cluster_size=512,refcount_bits=64", 4 * MIB);
        stage.ours(&[Write(0, 1956 * KIB, 1)]);
        let mut at = 1956 * KIB;
        let before = reftable_clusters(&stage);
        let mut turns = 0;
        while reftable_clusters(&stage) == before {
            stage.ours(&[Write(at, step * 512, 2)]);
            at += step * 512;
            turns += 1;
            assert!(stage.report().is_clean(), "at {at}: {:?}", stage.report());
            assert!(turns < 300, "the table does not run out");
        }
        assert!(turns > 1, "it ran out before the test began");
        stage.ours(&[Write(at, 512, 3), Write(at + 16 * KIB, 64 * KIB, 4)]);
        stage.judge();
    }
}

#[test]
fn the_refcount_table_grows_while_snapshots_share_clusters() {
    let mut stage = Stage::new("cluster_size=512,refcount_bits=64", 4 * MIB);
    stage.ours(&[Write(0, 800 * KIB, 1)]);
    let before = reftable_clusters(&stage);
    assert_eq!(before, 1, "the table has grown too early");
    stage.img(&["snapshot", "-c", "one", IMAGE]);
    let held = stage.bytes.clone();
    stage.ours(&[Write(100 * KIB, 1500 * KIB, 2), Unmap(50 * KIB, 30 * KIB)]);
    assert!(reftable_clusters(&stage) > before, "the table has not grown");
    stage.judge();
    assert!(stage.dir.snapshot_bytes(IMAGE, "one") == held, "the snapshot has changed");
    stage.img(&["snapshot", "-a", "one", IMAGE]);
    stage.bytes.clone_from(&held);
    stage.judge();
    stage.img(&["snapshot", "-d", "one", IMAGE]);
    stage.ours(&[Write(0, 2 * MIB, 3)]);
    stage.judge();
}

#[test]
fn refcount_blocks_that_count_nothing_but_tables() {
    // L1 table and refcount table take 128 clusters each, and a block counts 64: some blocks count
    // only parts of tables, and none of those counts itself.
    let options = "refcount_bits=64,cluster_size=512,preallocation=metadata";
    let size = 256 * MIB;
    let window = size - 256 * KIB..size;
    let mut stage = Stage::windowed(Dir::new(), options, size, window).on_host();
    assert_eq!(stage.half_word(36), 8192, "entries of the L1 table");
    assert!(reftable_clusters(&stage) >= 128, "{}", reftable_clusters(&stage));
    stage.ours(&[
        Write(0, 512, 1),
        Discard(128 * MIB, 4 * MIB),
        Write(size - 200 * KIB, 150 * KIB, 2),
        Unmap(size - 100 * KIB, 20 * KIB),
    ]);
    stage.judge();
    stage.ours(&[Write(129 * MIB, 2 * MIB, 3), Write(8 * MIB - 512, 1024, 4)]);
    stage.judge();
}

#[test]
fn new_images_of_ours_with_tables_of_many_clusters() {
    // The same geometry made by us; the guest fills what makes the refcount table move.
    use std::path::Path;
    use vhost_user_qcow2::image::create;
    use vhost_user_qcow2::qcow2::create::CreateOptions;
    use vhost_user_qcow2::storage::block_on;
    use vhost_user_qcow2::storage::mem::MemDisk;

    let disk = MemDisk::new();
    let engine = disk.engine(0, 0);
    let layout =
        CreateOptions { cluster_bits: 9, refcount_order: 6, ..CreateOptions::new(256 * MIB) };
    block_on(&engine, create(&engine, &disk, Path::new(IMAGE), &layout)).expect("creating");
    let dir = Dir::of(&disk);
    assert_eq!(dir.check(IMAGE).0, Verdict::Clean);
    dir.img(&["resize", "-q", "-f", "qcow2", "--shrink", IMAGE, "8M"]);
    let mut stage = Stage::of(dir);
    assert_eq!(stage.half_word(36), 8192, "a table keeps its length when the disk shrinks");
    stage.ours(&[Write(0, 5 * MIB, 1), Write(6 * MIB, MIB, 2)]);
    assert!(reftable_clusters(&stage) > 1);
    stage.judge();
}

#[test]
fn the_last_entries_of_an_l1_table_and_what_lies_behind_it() {
    // An L2 table covers 32 KiB, so that an L1 table of 65 entries ends 8 bytes into its second
    // cluster: a write of whole sectors must not spread anything over what is behind the end.
    for entries in [1, 63, 64, 65, 127, 130] {
        let size = entries * 32 * KIB;
        let mut stage = Stage::new("cluster_size=512", size);
        assert_eq!(stage.half_word(36), entries);
        let l1 = stage.word(40);
        let end = (l1 + entries * 8).next_multiple_of(512);
        let last = (entries - 1) * 32 * KIB;
        let acts: Vec<Act> = [last, 0, last / 2]
            .into_iter()
            .zip(1..)
            .map(|(at, byte)| Write(at / 512 * 512, 1024, byte))
            .collect();
        for act in acts {
            stage.ours(&[act]);
            let bytes = stage.dir.read(IMAGE);
            let behind = index(l1 + entries * 8)..index(end).min(bytes.len());
            assert!(bytes[behind].iter().all(|&byte| byte == 0), "{entries} entries: {act:?}");
            stage.judge();
        }
        // Emptied and filled again, at both ends of the table.
        stage.ours(&[Discard(0, size)]);
        stage.judge();
        stage.ours(&[Write(last, 32 * KIB, 8), Write(0, 512, 9)]);
        stage.judge();
    }
}

#[test]
fn an_l1_table_that_qemu_has_moved() {
    let mut stage = Stage::new("cluster_size=512", 2 * MIB);
    stage.ours(&[Write(0, 2 * MIB, 1)]);
    let (before, entries) = (stage.word(40), stage.half_word(36));
    stage.img(&["resize", "-q", "-f", "qcow2", IMAGE, "9M"]);
    assert!(stage.word(40) != before && stage.half_word(36) > entries, "the table did not move");
    stage.bytes.resize(index(9 * MIB), 0);
    stage.ours(&[Write(2 * MIB - KIB, 4 * MIB, 2), Write(9 * MIB - 512, 512, 3)]);
    stage.judge();
}

#[test]
fn on_a_block_device_refcount_tables_take_room_inside_it() {
    // Blocks for 32 KiB of the device each, and a table that has to grow behind 2 MiB.
    let made = Layout::new(9, 6000, Kind::Empty).with_refcount_bits(64).make(1);
    for room in [4 << 20, 1 << 20] {
        let mut bytes = made.disk().content(FileId(0));
        bytes.resize(room, 0);
        let disk = MemDisk::new();
        let file = disk.add(IMAGE, bytes);
        disk.set_limits(file, Limits { grows: false, ..Limits::default() });
        let engine = disk.engine(0, 1);
        let image = open(&engine, &disk, false).expect("opening");
        let piece = Buf::copy_of(&[7; 40 * 512]);
        let write = |at: u64| {
            let write = image.write(&engine, GuestOffset(at * 512), piece.clone());
            block_on(&engine, write)
        };
        let full = (0..6000).step_by(40).find_map(|at| write(at).err().map(|error| (at, error)));
        assert_eq!(full.is_some(), room == 1 << 20);
        if let Some((at, error)) = full {
            assert!(at > 1500, "the device is full behind {at} sectors");
            assert!(error.to_string().contains("in use up to its end"), "{error}");
            // What is given back can be used at once.
            block_on(&engine, image.discard(&engine, GuestOffset(0), 200 * 512)).expect("discard");
            block_on(&engine, image.flush(&engine)).expect("flush");
            write(at).expect("there is room again");
        }
        block_on(&engine, image.close(&engine)).expect("closing");
        assert_eq!(disk.content(file).len(), room, "the device has grown");
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "{report:?}");
        drop(image);
        let image = open(&engine, &disk, false).expect("opening again");
        let read = Buf::zeroed(40 * 512);
        let last = GuestOffset(if room == 1 << 20 { 240 } else { 5960 } * 512);
        block_on(&engine, image.read(&engine, last, read.clone())).expect("reading");
        assert_eq!(read.to_vec(), piece.to_vec());
    }
}
