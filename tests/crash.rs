//! Power cuts at any moment: the image stays free of corruption, what a flush covered is there,
//! what no flush covered is old or new, and the image can be used on.
//!
//! A history is a run of random requests on one simulated disk. Between any two operations of it,
//! also while some are under way, also during a flush or the close, the power is cut several times
//! in different ways, and each disk that may be left is examined.

use std::rc::Rc;
use std::time::Instant;

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::{Sectors, tags_of};
use common::seeds::{Repeat, number, seeds};
use common::workers::{Mix, Run, open, read_all, write_some};
use vhost_user_qcow2::storage::Engine;
use vhost_user_qcow2::storage::mem::MemDisk;

/// What all power cuts of a test have in common, and what came of them.
struct Cutter {
    made: Made,
    points: u64,
    leaks: u64,
    went_on: u64,
    /// Images that the open had to repair.
    repaired: u64,
    /// The disk that a history goes on with after some power cuts.
    survivor: Option<(MemDisk, Sectors)>,
}

impl Cutter {
    /// Examines the disk that a power cut has left.
    fn examine(&mut self, crashed: MemDisk, run: &Run, seed: u64) {
        self.points += 1;
        let mut before = crashed.look(IMAGE, check).expect("the image");
        // Refcounts that come late are repaired by the next open.
        let dirty = crashed.look(IMAGE, |bytes| bytes[7] == 3 && bytes[79] & 1 == 1);
        let dirty = dirty.expect("the image");
        let sound = before.corruptions.is_empty();
        assert!(sound || dirty, "after the power cut: {:?}", before.corruptions);
        self.leaks += u64::from(before.all_leaks() > 0);
        let engine = crashed.engine(0, seed);
        let image =
            open(&engine, &crashed, seed.is_multiple_of(2)).expect("opening after the power cut");
        if dirty {
            self.repaired += u64::from(!sound);
            before = crashed.look(IMAGE, check).expect("the image");
            assert!(before.is_clean(), "after the repair: {before:?}");
        }
        let bytes = read_all(&engine, &image).expect("reading after the power cut");
        run.check_crash(&bytes).unwrap_or_else(|what| panic!("after the power cut: {what}"));
        if !seed.is_multiple_of(4) {
            return;
        }
        self.went_on += 1;
        let mut tags = tags_of(0, &bytes).expect("checked above");
        let mut random = fastrand::Rng::with_seed(seed);
        write_some(&engine, &image, &mut tags, &mut random).expect("writing after the power cut");
        let bytes = read_all(&engine, &image).expect("reading again");
        assert!(tags_of(0, &bytes).as_ref() == Some(&tags), "what was written reads back");
        block_on_close(&engine, &image);
        let after = crashed.look(IMAGE, check).expect("the image");
        assert!(after.corruptions.is_empty(), "after going on: {:?}", after.corruptions);
        let (old, new) = (before.all_leaks(), after.all_leaks());
        assert!(new <= old, "going on leaked: {old} clusters before, {new} after");
        if seed.is_multiple_of(512) {
            self.survivor = Some((crashed, Sectors::new(&tags)));
        }
    }
}

fn block_on_close(engine: &dyn Engine, image: &vhost_user_qcow2::image::Image) {
    vhost_user_qcow2::storage::block_on(engine, image.close(engine)).expect("closing");
}

/// One history, and others on disks that its power cuts have left.
fn histories(cutter: &mut Cutter, seed: u64) {
    let mut next = Some((cutter.made.disk(), Sectors::new(&cutter.made.tags)));
    for generation in 0..3 {
        let Some((disk, sectors)) = next else { break };
        history(cutter, (disk, sectors), seed + (generation << 32));
        next = cutter.survivor.take();
    }
}

/// Random requests and a close, with power cuts on the way.
fn history(cutter: &mut Cutter, (disk, sectors): (MemDisk, Sectors), seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let lanes = random.usize(1..=2);
    let tiny = random.bool();
    let engines: Vec<_> = (0..lanes).map(|lane| Rc::new(disk.engine(lane, seed + 7))).collect();
    let image = open(engines[0].as_ref(), &disk, tiny).expect("opening");
    let hold = random.u8(0..4);
    engines.iter().for_each(|engine| engine.set_hold(hold));
    let engines = engines.into_iter().map(|engine| engine as Rc<dyn Engine>).collect();
    let mix = Mix {
        read: random.u8(0..3),
        write: 8,
        zero: random.u8(0..5),
        discard: random.u8(0..5),
        flush: random.u8(1..4),
        longest: random.choice([4, 24, 90, 300]).expect("not empty"),
    };
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
                let draw = random.u64(..);
                cutter.examine(disk.crash(draw), &run, draw);
            }
        }
    }
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.corruptions.is_empty(), "after the close: {:?}", report.corruptions);
    cutter.examine(disk.crash(seed), &run, seed | 1);
}

/// Every disk that a power cut may leave while at most ten sectors are not durable: all subsets.
fn enumerate(test: &str, layout: Layout, count: u64) {
    let begun = Instant::now();
    let made = layout.make(0);
    let mut cutter = Cutter { made, points: 0, leaks: 0, went_on: 0, repaired: 0, survivor: None };
    let mut moments = [0; 11];
    for seed in seeds(count) {
        let _repeat = Repeat::new("crash", test, seed);
        let disk = cutter.made.disk();
        let engine: Rc<dyn Engine> = Rc::new(disk.engine(0, seed));
        let image = open(engine.as_ref(), &disk, false).expect("opening");
        let sectors = Sectors::new(&cutter.made.tags);
        let mix = Mix { read: 0, write: 4, zero: 2, discard: 2, flush: 5, longest: 3 };
        let mut run = Run::new(image, vec![engine], sectors, (seed, mix), (25, 2));
        let mut random = fastrand::Rng::with_seed(seed);
        while run.step() {
            let unsynced = disk.unsynced_sectors();
            // Large sets at some moments only: the time doubles with each sector.
            if unsynced > 10 || random.usize(0..1 << unsynced) > 40 {
                continue;
            }
            moments[unsynced] += 1;
            for kept in 0..1 << unsynced {
                cutter.examine(disk.crash_exactly(kept), &run, random.u64(..) | 1);
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let points = cutter.points;
    println!("{test}: {points} power cuts; moments by sectors: {moments:?}, {seconds:.1} s");
}

#[test]
fn all_subsets_of_the_sectors_that_are_not_durable() {
    let layout = Layout::new(9, 96, Kind::Plain);
    enumerate("all_subsets_of_the_sectors_that_are_not_durable", layout, 12);
}

#[test]
fn all_subsets_with_snapshots() {
    let layout = Layout::new(9, 96, Kind::Snapshots);
    enumerate("all_subsets_with_snapshots", layout, 12);
}

/// Histories on one layout until `points` power cuts of the 100,000 of the ordinary run are done.
fn cut(test: &str, layout: Layout, points: u64) {
    let begun = Instant::now();
    let made = layout.make(points);
    let mut cutter = Cutter { made, points: 0, leaks: 0, went_on: 0, repaired: 0, survivor: None };
    let points = points * number("CRASH_POINTS").unwrap_or(100_000) / 100_000;
    let mut count = 0;
    for seed in seeds(u64::MAX) {
        let _repeat = Repeat::new("crash", test, seed);
        histories(&mut cutter, seed);
        count += 1;
        if cutter.points >= points {
            break;
        }
    }
    let Cutter { points, leaks, went_on, repaired, .. } = cutter;
    assert!(repaired > 0 || !layout.lazy, "no refcount was ever late");
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{test}: {points} power cuts in {count} seeds, {leaks} left leaks, \
         {repaired} were repaired, {went_on} went on, {seconds:.1} s"
    );
}

macro_rules! layouts {
    ($($name:ident: $points:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            cut(stringify!($name), $layout, $points);
        })*
    };
}

layouts! {
    clusters_of_512: 12_000, Layout::new(9, 192, Kind::Plain);
    clusters_of_512_with_wide_counts: 8_000,
        Layout::new(9, 192, Kind::Plain).with_refcount_bits(64);
    clusters_of_512_with_a_growing_refcount_table: 2_000,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64);
    clusters_of_4_kib: 12_000, Layout::new(12, 320, Kind::Plain);
    clusters_of_4_kib_with_counts_of_one_bit: 8_000,
        Layout::new(12, 320, Kind::Plain).with_refcount_bits(1);
    clusters_of_64_kib: 4_000, Layout::new(16, 2048, Kind::Plain);
    version_2: 6_000, Layout::new(12, 320, Kind::Plain).version_2();
    an_empty_image: 6_000, Layout::new(9, 192, Kind::Empty);
    preallocated: 4_000, Layout::new(12, 320, Kind::Preallocated("metadata"));
    over_raw: 8_000, Layout::new(12, 320, Kind::OverRaw(250));
    version_2_over_raw: 4_000, Layout::new(9, 192, Kind::OverRaw(250)).version_2();
    over_compressed: 6_000, Layout::new(12, 320, Kind::OverCompressed("zstd"));
    compressed: 6_000, Layout::new(12, 320, Kind::Compressed("zlib"));
    extended: 6_000, Layout::new(14, 640, Kind::Plain).extended();
    extended_over_raw: 4_000, Layout::new(14, 640, Kind::OverRaw(500)).extended();
    extended_snapshots: 4_000, Layout::new(14, 640, Kind::Snapshots).extended();
    lazy: 4_000, Layout::new(9, 192, Kind::Plain).lazy();
    lazy_snapshots: 3_000, Layout::new(12, 320, Kind::Snapshots).lazy();
    lazy_growing_refcount_table: 1_000,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64).lazy();
    snapshots: 8_000, Layout::new(9, 192, Kind::Snapshots);
    snapshots_of_4_kib: 4_000, Layout::new(12, 320, Kind::Snapshots);
    data_file: 4_000, Layout::new(12, 320, Kind::DataFile { raw: false });
}
