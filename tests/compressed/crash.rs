//! Power cuts and failures while compressed clusters are written, overwritten and freed.

use std::collections::BTreeMap;
use std::rc::Rc;

use common::check::check;
use common::images::{IMAGE, Kind, Layout};
use common::replay::{Replay, changed};
use common::sectors::{SECTOR, Sectors};
use common::seeds::{Repeat, number, seeds};
use common::workers::{Mix, Run, read_all};
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::{Effect, MemDisk};
use vhost_user_qcow2::storage::{Engine, Purpose, block_on};

use crate::{FILE, Shape, open, options, step, submitted};

/// Power cuts at random moments of random requests on a disk that compresses.
fn cut(test: &str, shape: Shape, points: u64) {
    let points = points * number("CRASH_POINTS").unwrap_or(100_000) / 100_000;
    let (mut cuts, mut compressed, mut shared, mut histories) = (0, 0, 0, 0);
    let empty = shape.disk();
    for seed in seeds(u64::MAX) {
        let _repeat = Repeat::new("compressed", test, seed);
        let disk = MemDisk::new();
        disk.add(IMAGE, empty.content(FILE));
        disk.start_trace();
        let mut random = fastrand::Rng::with_seed(seed);
        let lanes = random.usize(1..=2);
        let engines: Vec<_> = (0..lanes).map(|lane| Rc::new(disk.engine(lane, seed + 7))).collect();
        let image = open(engines[0].as_ref(), &disk, &options(random.bool()));
        let hold = random.u8(0..4);
        engines.iter().for_each(|engine| engine.set_hold(hold));
        let engines = engines.into_iter().map(|engine| engine as Rc<dyn Engine>).collect();
        let mix = Mix {
            read: random.u8(0..3),
            write: 8,
            zero: random.u8(0..4),
            discard: random.u8(0..4),
            flush: random.u8(1..4),
            longest: random.choice([24, 90, 300]).expect("not empty"),
        };
        let sectors = Sectors::new(&vec![0; shape.size / SECTOR]);
        let depth = random.choice([1, 4, 12]).expect("not empty");
        let mut run = Run::new(image, engines, sectors, (seed, mix), (60, depth));
        let mut closing = false;
        loop {
            if !run.step() {
                if closing {
                    break;
                }
                closing = true;
                run.start_close();
            }
            if random.u8(0..12) == 0 {
                for _ in 0..3 {
                    examine(&disk.crash(random.u64(..)), &run, random.u64(..), shape);
                    cuts += 1;
                }
            }
        }
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "after the close: {report:?}");
        let places = submitted(&disk.take_trace(), Purpose::CompressedWrite);
        compressed += places.len();
        let begin_inside = |(at, _): &&(u64, u64)| at % (1 << shape.cluster_bits) != 0;
        shared += places.iter().filter(begin_inside).count();
        histories += 1;
        if cuts >= points {
            break;
        }
    }
    println!(
        "{test}: {cuts} power cuts in {histories} seeds, {compressed} compressed writes, \
         {shared} inside a cluster"
    );
    assert!(compressed > 0 && shared > 0, "nothing was compressed");
}

/// Holds the disk that a power cut has left against what it may hold, and goes on with it.
fn examine(crashed: &MemDisk, run: &Run, seed: u64, shape: Shape) {
    let before = crashed.look(IMAGE, check).expect("the image");
    assert!(before.corruptions.is_empty(), "after the power cut: {:?}", before.corruptions);
    let engine = crashed.engine(0, seed);
    let image = open(&engine, crashed, &options(seed.is_multiple_of(2)));
    let mut bytes = read_all(&engine, &image).expect("reading after the power cut");
    run.check_crash(&bytes).unwrap_or_else(|what| panic!("after the power cut: {what}"));
    if !seed.is_multiple_of(4) {
        return;
    }
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..8 {
        block_on(&engine, step(&engine, &image, &mut bytes, &mut random, shape.cluster()));
    }
    block_on(&engine, image.close(&engine)).expect("closing");
    assert!(read_all(&engine, &image).expect("reading again") == bytes);
    let after = crashed.look(IMAGE, check).expect("the image");
    assert!(after.corruptions.is_empty(), "after going on: {:?}", after.corruptions);
    let (old, new) = (before.all_leaks(), after.all_leaks());
    assert!(new <= old, "going on leaked: {old} clusters before, {new} after");
}

#[test]
fn power_cuts_with_zlib() {
    cut("power_cuts_with_zlib", Shape::new("zlib", 12, 320 * SECTOR), 6000);
}

#[test]
fn power_cuts_with_narrow_counts() {
    let shape = Shape { refcount_bits: 2, ..Shape::new("zlib", 12, 320 * SECTOR) };
    cut("power_cuts_with_narrow_counts", shape, 4000);
}

/// R1 and R2 of `src/qcow2/ORDERING.md`, for entries of compressed clusters.
#[test]
fn counts_and_bytes_are_durable_before_compressed_entries() {
    let test = "counts_and_bytes_are_durable_before_compressed_entries";
    let mut made = Layout::new(12, 320, Kind::Empty).make(0);
    let mut looks = 0;
    for seed in seeds(20) {
        let _repeat = Repeat::new("compressed", test, seed);
        let disk = made.disk();
        disk.start_trace();
        let engine = Rc::new(disk.engine(0, seed));
        engine.set_hold(3);
        let image = open(engine.as_ref(), &disk, &options(false));
        let sectors = Sectors::new(&made.tags);
        let mix = Mix { flush: 3, longest: 60, ..Mix::default() };
        let mut run = Run::new(image, vec![engine], sectors, (seed, mix), (80, 6));
        run.finish();
        run.start_close();
        run.finish();
        let mut replay = Replay::new(&mut made);
        let mut written = BTreeMap::new();
        for event in disk.take_trace() {
            if let (Purpose::CompressedWrite, Effect::Write(bytes)) = (event.why, &event.effect) {
                written.insert(event.at, bytes.clone());
            }
            replay.take(event, &mut |replay, event| {
                if event.why != Purpose::L2Write {
                    return;
                }
                let counts = replay.map().refcounts;
                for (_, entry) in changed(replay, event) {
                    if entry >> 62 != 1 {
                        continue;
                    }
                    let at = entry & ((1 << 58) - 1);
                    let bytes = &written[&at];
                    let durable = replay.durable_at(at, bytes.len() as u64);
                    assert!(&durable == bytes, "the bytes at {at} are not durable");
                    for cluster in at >> 12..=(at + bytes.len() as u64 - 1) >> 12 {
                        let count = usize::try_from(cluster).ok().and_then(|at| counts.get(at));
                        assert!(count.is_some_and(|&count| count > 0), "cluster {cluster}");
                    }
                    looks += 1;
                }
            });
        }
    }
    println!("{test}: held {looks} times");
    assert!(looks > 50, "hardly ever tried: {looks} times");
}

/// Random requests of which operations of one purpose fail, and what must hold after that.
fn fail(purpose: Purpose, nth: u64, seed: u64) -> bool {
    let shape = Shape::new("zlib", 12, 320 * SECTOR);
    let disk = shape.disk();
    let faults = Faults::new();
    faults.add(Rule { purpose: Some(purpose), nth, sticky: false, fate: Fate::Fail(5) });
    let engine = Fault::new(disk.engine(0, seed), faults.clone());
    let image = open(&engine, &disk, &options(true));
    let engine: Rc<dyn Engine> = Rc::new(engine);
    let sectors = Sectors::new(&vec![0; shape.size / SECTOR]);
    let mix = Mix { longest: 60, flush: 2, ..Mix::default() };
    let mut run = Run::new(image, vec![Rc::clone(&engine)], sectors, (seed, mix), (80, 4));
    run.tolerate_errors();
    run.finish();
    let fired = faults.fired() > 0;
    assert_eq!(fired, !run.errors().is_empty(), "{purpose:?} {nth}: {:?}", run.errors());
    faults.clear();
    let bytes = read_all(engine.as_ref(), run.image()).expect("reading still works");
    run.check_content(&bytes).unwrap_or_else(|what| panic!("after the failure: {what}"));
    run.more(20);
    run.finish();
    run.start_close();
    run.finish();
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "{purpose:?} {nth}: {report:?}");
    fired
}

#[test]
fn room_of_a_compressed_write_that_fails_is_given_back() {
    let mut fired = 0;
    for seed in seeds(6) {
        let test = "room_of_a_compressed_write_that_fails_is_given_back";
        let _repeat = Repeat::new("compressed", test, seed);
        for nth in [1, 2, 3, 7, 12] {
            fired += u64::from(fail(Purpose::CompressedWrite, nth, seed));
            fail(Purpose::CompressedRead, nth, seed);
        }
    }
    println!("{fired} writes failed");
    assert!(fired > 20, "only {fired} writes failed");
}
