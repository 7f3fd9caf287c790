//! Many requests at once, by several workers, in every order: each answer is held against what the
//! sectors may hold, nothing waits for ever, and the image is clean at the end.
//!
//! Requests that change the disk never overlap, but share clusters; reads overlap everything.
//! Operations finish in an order drawn from the seed, each as late as the seed says. Histories are
//! short and seeds many: which of two tasks comes first matters more than how long they go on.
//!
//! Every layout has its turn: seed `n` runs on layout `n` modulo their number. `SEEDS=100000` runs
//! as many seeds, `SEED=n` one.

use std::rc::Rc;
use std::time::Instant;

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::qemu::{Dir, Verdict};
use common::sectors::Sectors;
use common::seeds::{Repeat, seeds};
use common::workers::{Mix, Run, open, read_all};
use vhost_user_qcow2::storage::{Engine, block_on};

/// How many workers serve the disk.
const WORKERS: usize = 4;
/// Most requests under way on each.
const DEPTH: usize = 16;
/// Seeds of an ordinary run: about a minute of one core.
const SEEDS: u64 = 12_000;
/// Tests that share the seeds, so that they share the cores as well.
const PARTS: u64 = 4;
/// After so many seeds the images begin with other content.
const SEEDS_OF_ONE_CONTENT: u64 = 20_000;
/// Every so many seeds `qemu-img` judges the image too.
const JUDGED_BY_QEMU: u64 = 997;

/// The layouts in turn; those with small clusters come more often, as more happens there.
const LAYOUTS: [Layout; 32] = [
    Layout::new(9, 600, Kind::Plain),
    Layout::new(9, 600, Kind::Plain).with_refcount_bits(64),
    // More tables than the smallest cache holds.
    Layout::new(9, 6000, Kind::Empty).with_refcount_bits(64),
    Layout::new(12, 400, Kind::Plain),
    Layout::new(12, 160, Kind::Empty),
    Layout::new(12, 800, Kind::Plain).with_refcount_bits(1),
    Layout::new(12, 400, Kind::Plain).version_2(),
    Layout::new(16, 1024, Kind::Plain),
    Layout::new(13, 800, Kind::Chain),
    Layout::new(9, 500, Kind::Chain),
    Layout::new(12, 500, Kind::Chain).version_2(),
    Layout::new(12, 400, Kind::OverRaw(333)),
    Layout::new(12, 800, Kind::OverCompressed("zlib")),
    Layout::new(13, 800, Kind::Compressed("zstd")),
    Layout::new(9, 400, Kind::Compressed("zlib")),
    Layout::new(12, 400, Kind::Compressed("zlib")).version_2(),
    Layout::new(9, 600, Kind::Snapshots),
    Layout::new(12, 800, Kind::Snapshots),
    Layout::new(12, 400, Kind::Snapshots).with_refcount_bits(4),
    Layout::new(12, 400, Kind::DataFile { raw: false }),
    Layout::new(9, 400, Kind::DataFile { raw: false }),
    Layout::new(12, 400, Kind::DataFile { raw: true }),
    Layout::new(12, 400, Kind::Preallocated("metadata")),
    Layout::new(14, 600, Kind::Plain).extended(),
    Layout::new(14, 600, Kind::Snapshots).extended(),
    Layout::new(14, 600, Kind::Chain).extended(),
    Layout::new(14, 600, Kind::Empty).extended().lazy().with_refcount_bits(64),
    Layout::new(16, 1024, Kind::OverCompressed("zlib")).extended(),
    Layout::new(14, 600, Kind::DataFile { raw: false }).extended(),
    Layout::new(12, 400, Kind::Snapshots).lazy(),
    Layout::new(9, 600, Kind::Plain).lazy(),
    // One layout of large clusters, where requests share almost every one.
    Layout::new(21, 4096, Kind::Empty),
];

fn mix(random: &mut fastrand::Rng) -> Mix {
    Mix {
        read: random.u8(2..8),
        write: random.u8(4..10),
        zero: random.u8(0..5),
        discard: random.u8(0..5),
        flush: random.u8(0..3),
        longest: random.choice([2, 5, 9, 40, 200]).expect("not empty"),
    }
}

fn run(made: &Made, seed: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = made.disk();
    let engines: Vec<_> =
        (0..WORKERS).map(|lane| Rc::new(disk.engine(lane, seed * 8 + lane as u64))).collect();
    let image = open(engines[0].as_ref(), &disk, random.bool()).expect("opening");
    for engine in &engines {
        engine.set_hold(random.choice([0, 1, 7, 40]).expect("not empty"));
    }
    let last = Rc::clone(&engines[0]);
    let engines = engines.into_iter().map(|engine| engine as Rc<dyn Engine>).collect();
    let sectors = Sectors::new(&made.tags);
    let depth = random.choice([1, 4, DEPTH, DEPTH]).expect("not empty");
    let requests = random.usize(WORKERS * DEPTH..=3 * WORKERS * DEPTH);
    let mut run = Run::new(image, engines, sectors, (seed, mix(&mut random)), (requests, depth));
    run.finish();
    let bytes = read_all(last.as_ref(), run.image()).expect("reading it all");
    run.check_content(&bytes).unwrap_or_else(|what| panic!("at the end: {what}"));
    block_on(last.as_ref(), run.image().close(last.as_ref())).expect("closing");
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "after the close: {report:?}");
    let image = open(last.as_ref(), &disk, false).expect("opening again");
    assert!(read_all(last.as_ref(), &image).expect("reading again") == bytes, "after reopening");
    if seed.is_multiple_of(JUDGED_BY_QEMU) {
        let dir = Dir::of(&disk);
        let (verdict, printed) = dir.check(IMAGE);
        assert_eq!(verdict, Verdict::Clean, "{printed}");
        assert!(dir.guest_bytes(IMAGE) == bytes, "qemu-img reads other bytes");
    }
    run.answered()
}

/// Runs the seeds that are `part` modulo [`PARTS`].
fn interleave(part: u64) {
    let begun = Instant::now();
    let mut made: Vec<Option<(u64, Made)>> = vec![None; LAYOUTS.len()];
    let (mut answered, mut count) = (0, 0);
    for seed in seeds(SEEDS).filter(|seed| seed % PARTS == part) {
        let turn = usize::try_from(seed % LAYOUTS.len() as u64).expect("an index");
        let (layout, content) = (LAYOUTS[turn], 1 + seed / SEEDS_OF_ONE_CONTENT);
        let test = format!("part_{part} # {layout:?}");
        let _repeat = Repeat::new("interleave", &test, seed);
        let fresh = made[turn].take().filter(|(of, _)| *of == content);
        let (_, made) = made[turn].insert(fresh.unwrap_or_else(|| (content, layout.make(content))));
        answered += run(made, seed);
        count += 1;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("part {part}: {answered} requests with {count} seeds, {seconds:.1} s");
}

macro_rules! parts {
    ($($name:ident: $part:literal;)*) => {
        $(#[test]
        fn $name() {
            interleave($part);
        })*
    };
}

parts! {
    part_0: 0;
    part_1: 1;
    part_2: 2;
    part_3: 3;
}
