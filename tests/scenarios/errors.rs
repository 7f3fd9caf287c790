//! Failures in the middle of requests that need several things, and what is left for the next one.

use common::images::IMAGE;
use common::qemu::{Dir, Verdict};
use common::workers::options;
use std::path::Path;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::{Purpose, block_on};

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{BACKED, KIB, MIB, Stage, base};

#[test]
fn an_allocation_that_fails_in_its_second_half_takes_nothing() {
    // A refcount block counts 128 clusters: the disk's first 123 KiB and the tables fill the first.
    let mut stage = Stage::new("refcount_bits=64,cluster_size=1k", MIB);
    stage.ours(&[Write(0, 124 * KIB, 1)]);
    stage.ours(&[Discard(121 * KIB, KIB), Discard(123 * KIB, KIB)]);
    stage.judge();
    let reftable = stage.word(48);
    let second = stage.word(reftable + 8);
    assert!(second != 0, "one refcount block was enough");
    stage.poke(reftable + 14, &[6]);
    assert!(stage.word(reftable + 8) != second);
    let before = stage.dir.read(IMAGE);
    match stage.open() {
        Err(error) => println!("refused at once: {error}"),
        Ok(session) => {
            let error = session.act(Write(121 * KIB, 3 * KIB, 2)).expect_err("no block");
            println!("refused by the write: {error}");
            session.act(Write(0, 512, 3)).expect_err("an image that is known to be corrupt");
            let disk = session.disk.clone().expect("a simulated host");
            drop(session);
            stage.put_back(&disk);
        }
    }
    // With the entry as it was, the image is what it was: nothing was linked, nothing counted.
    stage.poke(reftable + 8, &second.to_be_bytes());
    stage.poke(72, &before[72..80]);
    stage.judge();
    stage.ours(&[Write(121 * KIB, 3 * KIB, 2)]);
    stage.judge();
}

#[test]
fn a_read_or_write_that_fails_in_the_middle_of_an_allocation_is_tried_again() {
    let purposes = [Purpose::GuestWrite, Purpose::CowRead, Purpose::L2Load, Purpose::RefblockLoad];
    for purpose in purposes {
        for nth in 1..4 {
            let dir = base(MIB, &[Write(0, MIB, 50)]);
            let options_of = format!("refcount_bits=64,cluster_size=1k,{BACKED}");
            let mut stage = Stage::windowed(dir, &options_of, MIB, 0..MIB).tiny();
            stage.ours(&[Write(0, 200 * KIB, 1), Discard(100 * KIB, 60 * KIB)]);
            let disk = stage.host();
            let faults = Faults::new();
            let engine = Fault::new(disk.engine(0, nth), faults.clone());
            let least = options(true);
            let open = Image::open(&engine, &disk, Path::new(IMAGE), &least);
            let image = block_on(&engine, open).expect("opening");
            let base = faults.count_of(purpose);
            faults.add(Rule {
                purpose: Some(purpose),
                nth: base + nth,
                sticky: false,
                fate: Fate::Fail(5),
            });
            let act = Write(90 * KIB + 512, 80 * KIB, 2);
            let run = |act: crate::stage::Act| block_on(&engine, act.run(&engine, &image));
            let failed = run(act).is_err();
            assert_eq!(failed, faults.fired() > 0, "{purpose:?} {nth}");
            faults.clear();
            // The guest tries again, elsewhere too; the clusters are not lost.
            for act in [act, Write(300 * KIB, 100 * KIB, 3), Write(100 * KIB, 10 * KIB, 4)] {
                run(act).unwrap_or_else(|error| panic!("{purpose:?} {nth}: {error}"));
                stage.expect(&[act]);
            }
            block_on(&engine, image.close(&engine)).expect("close");
            stage.put_back(&disk);
            stage.judge();
        }
    }
}

#[test]
fn zeros_that_give_up_more_refcount_blocks_than_the_cache_holds() {
    // A refcount block counts 512 clusters of 4 KiB: nine blocks, and a cache of the least size.
    let size = 16 * MIB;
    let mut stage = Stage::new("cluster_size=4k,refcount_bits=64", size).tiny();
    stage.ours(&[Write(0, size, 1)]);
    stage.judge();
    stage.ours(&[Unmap(0, size)]);
    stage.judge();
    assert_eq!(stage.report().mapped, 0);
    let length = stage.file_length();
    stage.ours(&[Write(0, size / 2, 2), Write(size / 2, size / 2, 3)]);
    assert!(stage.file_length() <= length.max(17 * MIB), "freed clusters were not used again");
    stage.judge();
}

#[test]
fn qemu_img_commits_an_overlay_of_zeros_that_we_wrote() {
    let size = 8 * MIB;
    let layout = "cluster_size=4k,refcount_bits=64";
    let mut below = Stage::new(layout, size).tiny();
    below.ours(&[Write(0, size, 1)]);
    let dir = Dir::new();
    dir.write("base.qcow2", &below.dir.read(IMAGE));
    let mut stage = Stage::windowed(dir, &format!("{layout},{BACKED}"), size, 0..size).tiny();
    stage.ours(&[Unmap(0, size - MIB), Write(MIB, MIB, 2)]);
    stage.judge();
    stage.img(&["commit", "-q", "-f", "qcow2", IMAGE]);
    // What is now in the base is served by us, and written to.
    let dir = Dir::new();
    dir.write(IMAGE, &stage.dir.read("base.qcow2"));
    assert_eq!(dir.check(IMAGE).0, Verdict::Clean);
    let mut merged = Stage::of(dir).tiny();
    assert!(merged.bytes == stage.bytes, "the commit has other bytes");
    merged.ours(&[Write(512, 3 * MIB, 3)]);
    merged.judge();
}
