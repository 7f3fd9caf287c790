//! Zeros and discards: where the host's space goes, what a backing file shows, and how version 2
//! differs.

use common::images::IMAGE;
use common::qemu::Dir;

use crate::stage::Act::{Discard, Unmap, Write, Zero};
use crate::stage::{BACKED, KIB, MIB, Stage, base, index};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The L2 entry of a cluster of 64 KiB.
fn entry(stage: &Stage, cluster: u64) -> u64 {
    let l2 = stage.word(stage.word(40)) & OFFSET_MASK;
    assert!(l2 != 0, "no L2 table");
    stage.word(l2 + cluster * 8)
}

/// The refcount of the cluster of 64 KiB at a host offset.
fn refcount(stage: &Stage, at: u64) -> u64 {
    let block = stage.word(stage.word(48)) & OFFSET_MASK;
    stage.word(block + at / (64 * KIB) * 2) >> 48
}

#[test]
fn zero_clusters_keep_their_place_until_it_is_given_up() {
    let cluster = 64 * KIB;
    let mut stage = Stage::new("compat=1.1", 16 * cluster);
    stage.ours(&[Write(0, 4 * cluster, 1)]);
    let places: Vec<u64> = (0..4).map(|step| entry(&stage, step) & OFFSET_MASK).collect();
    let length = stage.file_length();
    stage.ours(&[Zero(0, 4 * cluster)]);
    for (step, &place) in (0..).zip(&places) {
        assert_eq!(entry(&stage, step), 1 << 63 | place | 1, "zeros with their place");
    }
    stage.judge();
    // Written to again, in part and whole: the old place is used.
    stage.ours(&[Write(512, 512, 2), Write(cluster, cluster, 3)]);
    for (step, &place) in (0..2).zip(&places) {
        assert_eq!(entry(&stage, step), 1 << 63 | place, "the place is used again");
    }
    stage.judge();
    // Discarded: the place of a zero cluster, and of one with data, is free.
    stage.ours(&[Discard(0, 3 * cluster)]);
    for (step, &place) in (0..3).zip(&places) {
        assert_eq!(entry(&stage, step) & OFFSET_MASK, 0, "still there");
        assert_eq!(refcount(&stage, place), 0, "still counted");
    }
    stage.judge();
    // Zeros where there is nothing cost nothing; unmapped ones give their place back.
    stage.ours(&[Zero(8 * cluster, 4 * cluster), Unmap(3 * cluster, cluster)]);
    assert_eq!(entry(&stage, 3) & OFFSET_MASK, 0);
    assert_eq!(refcount(&stage, places[3]), 0);
    assert!(stage.file_length() <= length);
    stage.judge();
    // The same places serve the next writers.
    stage.ours(&[Write(8 * cluster, 4 * cluster, 9)]);
    assert!(stage.file_length() <= length, "the file has grown");
    stage.judge();
}

#[test]
fn zeros_that_qemu_left_with_a_place() {
    let mut stage = Stage::new("compat=1.1,preallocation=metadata", MIB);
    stage.theirs(&[Zero(0, MIB)]);
    let length = stage.file_length();
    stage.ours(&[Write(KIB, KIB, 1), Write(128 * KIB, 64 * KIB, 2), Discard(256 * KIB, 64 * KIB)]);
    stage.judge();
    stage.theirs(&[Write(300 * KIB, 8 * KIB, 3), Discard(128 * KIB, 64 * KIB)]);
    stage.ours(&[Write(130 * KIB, 8 * KIB, 4)]);
    assert!(stage.file_length() <= length, "the file has grown");
    stage.judge();
}

#[test]
fn compressed_clusters_are_discarded_one_by_one() {
    let cluster = 64 * KIB;
    for ours in [true, false] {
        let mut stage = Stage::new("compat=1.1", 8 * cluster);
        let commands: Vec<String> =
            (0..6).map(|at| format!("write -q -c -P {} {}k 64k", at + 1, at * 64)).collect();
        stage.dir.io(IMAGE, &commands);
        for at in 0..6 {
            stage.expect(&[Write(at * cluster, cluster, u8::try_from(at + 1).expect("small"))]);
        }
        let place = entry(&stage, 0) & OFFSET_MASK & !0xffff;
        assert_eq!(refcount(&stage, place), 6, "all in one cluster");
        // One in the middle, one that is only touched, and two neighbours.
        let acts = [
            Discard(2 * cluster, cluster),
            Discard(3 * cluster + 512, cluster - 512),
            Discard(4 * cluster, 2 * cluster),
        ];
        if ours {
            stage.ours(&acts)
        } else {
            stage.theirs(&acts)
        }
        assert_eq!(refcount(&stage, place), 3);
        stage.judge();
        stage.ours(&[Write(512, 512, 9), Unmap(cluster, cluster)]);
        assert_eq!(refcount(&stage, place), 1);
        stage.judge();
        stage.ours(&[Discard(0, 8 * cluster)]);
        assert_eq!(refcount(&stage, place), 0);
        stage.judge();
    }
}

#[test]
fn unaligned_zeros_over_a_backing_file() {
    // The backing file has data, zeros and nothing in turns, and ends inside a cluster.
    let below: Vec<_> = (0..10).map(|step| Write(step * 40 * KIB, 24 * KIB, 50)).collect();
    for compat in ["compat=1.1", "compat=0.10"] {
        for (name, act) in [("zero", Zero as fn(u64, u64) -> _), ("unmap", Unmap)] {
            for cluster in [4 * KIB, 64 * KIB] {
                let size = 512 * KIB;
                let dir = base(390 * KIB + 512, &below[..9]);
                let options = format!("{compat},cluster_size={cluster},{BACKED}");
                let mut stage = Stage::windowed(dir, &options, size, 0..size);
                stage.ours(&[
                    act(512, 512),
                    act(24 * KIB, 16 * KIB),
                    act(64 * KIB - 512, 1024),
                    act(66 * KIB, 100 * KIB),
                    act(200 * KIB + 512, 64 * KIB),
                    act(300 * KIB, 80 * KIB),
                    // Over the end of the backing file, and behind it.
                    act(388 * KIB, 20 * KIB),
                    act(448 * KIB, 64 * KIB),
                ]);
                stage.judge();
                // What reads as zeros by an entry can be written to in part.
                stage.ours(&[
                    Write(70 * KIB, 512, 1),
                    Write(390 * KIB, KIB, 2),
                    Write(500 * KIB, KIB, 3),
                ]);
                stage.judge();
                stage.theirs(&[act(0, 32 * KIB), act(100 * KIB + 512, 3 * KIB)]);
                stage.ours(&[Write(4 * KIB, KIB, 4), act(8 * KIB, 150 * KIB)]);
                stage.judge();
                println!("{compat} {name} {cluster}: {} bytes", stage.file_length());
            }
        }
    }
}

#[test]
fn whole_zero_clusters_over_a_backing_file_take_no_space() {
    let size = 640 * KIB;
    let dir = base(size, &[Write(0, size, 50)]);
    let mut stage = Stage::windowed(dir, BACKED, size, 0..size);
    stage.ours(&[
        Zero(64 * KIB, 192 * KIB),
        Unmap(320 * KIB, 64 * KIB),
        Discard(512 * KIB, 128 * KIB),
    ]);
    for cluster in [1, 2, 3, 5] {
        assert_eq!(entry(&stage, cluster), 1, "cluster {cluster} is a zero without a place");
    }
    // A discard leaves what was never written as it is.
    for cluster in [0, 4, 6, 7, 8, 9] {
        assert_eq!(entry(&stage, cluster), 0, "cluster {cluster} is the backing file's");
    }
    stage.judge();
}

#[test]
fn a_discard_of_more_than_two_gigabytes_reaches_the_host() {
    use std::os::unix::fs::MetadataExt;

    let size = 2100 * MIB;
    let options = "cluster_size=1M,preallocation=metadata";
    let mut stage = Stage::windowed(Dir::new(), options, size, 0..16 * MIB).on_host();
    // The ends change places in the file, so that the file's length cannot shrink much.
    stage.theirs(&[Discard(0, 10 * MIB), Discard(size - 10 * MIB, 10 * MIB)]);
    stage.ours(&[Write(size - 10 * MIB, 10 * MIB, 1), Write(0, 10 * MIB, 2)]);
    stage.judge();
    let blocks =
        |stage: &Stage| stage.dir.path().join(IMAGE).metadata().expect("the image").blocks() * 512;
    let before = blocks(&stage);
    assert!(before >= 20 * MIB, "{before} bytes");
    stage.ours(&[Discard(0, size)]);
    let after = blocks(&stage);
    assert!(after + 19 * MIB <= before, "{before} bytes before, {after} after");
    stage.judge();
}

#[test]
fn discards_by_version_and_backing_file() {
    let size = 512 * KIB;
    for compat in ["compat=0.10", "compat=1.1"] {
        for backed in [false, true] {
            let stage = || {
                let dir = if backed { base(size, &[Write(0, size, 50)]) } else { Dir::new() };
                let name = if backed { format!(",{BACKED}") } else { String::new() };
                let mut stage = Stage::windowed(dir, &format!("{compat}{name}"), size, 0..size);
                stage.theirs(&[Write(0, 256 * KIB, 1)]);
                stage
            };
            let acts = [
                // Less than a cluster, parts of two, whole ones, never written ones.
                Discard(512, 60 * KIB),
                Discard(100 * KIB, 60 * KIB),
                Discard(128 * KIB, 128 * KIB),
                Discard(384 * KIB, 128 * KIB),
            ];
            let (mut by_us, mut by_them) = (stage(), stage());
            by_us.ours(&acts);
            by_them.theirs(&acts);
            by_us.judge();
            // Where version 2 has a backing file, QEMU drops nothing either.
            by_them.judge();
            // Where nothing was written, QEMU makes zeros of a discard and we leave it.
            let written = index(256 * KIB);
            assert!(by_us.bytes[..written] == by_them.bytes[..written]);
            let dropped = (2..4).all(|cluster| entry(&by_us, cluster) & OFFSET_MASK == 0);
            assert_eq!(dropped, !(backed && compat == "compat=0.10"), "{compat}, {backed}");
            assert!(entry(&by_us, 0) & OFFSET_MASK != 0, "a part of a cluster was dropped");
        }
    }
}
