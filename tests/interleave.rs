//! Many requests at once, by several workers, in every order: each answer is held against what the
//! sectors may hold, nothing waits for ever, and the image is clean at the end.
//!
//! Requests that change the disk never overlap, but share clusters; reads overlap everything.
//! Operations finish in an order drawn from the seed, each as late as the seed says.

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

fn run(made: &Made, seed: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = made.disk();
    let engines: Vec<_> =
        (0..WORKERS).map(|lane| Rc::new(disk.engine(lane, seed * 8 + lane as u64))).collect();
    let image = open(engines[0].as_ref(), &disk, random.bool()).expect("opening");
    for engine in &engines {
        engine.set_hold(random.choice([0, 1, 7, 40]).expect("not empty"));
    }
    let mix = Mix {
        read: random.u8(2..8),
        write: random.u8(4..10),
        zero: random.u8(0..5),
        discard: random.u8(0..5),
        flush: random.u8(0..3),
        longest: random.choice([2, 9, 40, 200]).expect("not empty"),
    };
    let last = Rc::clone(&engines[0]);
    let engines = engines.into_iter().map(|engine| engine as Rc<dyn Engine>).collect();
    let sectors = Sectors::new(&made.tags);
    let depth = random.usize(1..=DEPTH);
    let mut run = Run::new(image, engines, sectors, (seed, mix), (400, depth));
    run.finish();
    let bytes = read_all(last.as_ref(), run.image()).expect("reading it all");
    run.check_content(&bytes).unwrap_or_else(|what| panic!("at the end: {what}"));
    block_on(last.as_ref(), run.image().close(last.as_ref())).expect("closing");
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "after the close: {report:?}");
    let image = open(last.as_ref(), &disk, false).expect("opening again");
    assert!(read_all(last.as_ref(), &image).expect("reading again") == bytes, "after reopening");
    if seed.is_multiple_of(100) {
        let dir = Dir::of(&disk);
        let (verdict, printed) = dir.check(IMAGE);
        assert_eq!(verdict, Verdict::Clean, "{printed}");
        assert!(dir.guest_bytes(IMAGE) == bytes, "qemu-img reads other bytes");
    }
    run.answered()
}

fn interleave(test: &str, layout: Layout, count: u64) {
    let begun = Instant::now();
    let made = layout.make(1);
    let (mut answered, range) = (0, seeds(count));
    for seed in range.clone() {
        let _repeat = Repeat::new("interleave", test, seed);
        answered += run(&made, seed);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let count = range.end - range.start;
    println!("{test}: {answered} requests with {count} seeds, {seconds:.1} s");
}

macro_rules! layouts {
    ($($name:ident: $count:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            interleave(stringify!($name), $layout, $count);
        })*
    };
}

layouts! {
    clusters_of_512: 600, Layout::new(9, 600, Kind::Plain);
    clusters_of_512_with_wide_counts: 400,
        Layout::new(9, 600, Kind::Plain).with_refcount_bits(64);
    more_tables_than_the_cache_holds: 60,
        Layout::new(9, 20_000, Kind::Empty).with_refcount_bits(64);
    clusters_of_4_kib: 800, Layout::new(12, 800, Kind::Plain);
    clusters_of_4_kib_on_a_small_disk: 800, Layout::new(12, 160, Kind::Empty);
    clusters_of_64_kib: 300, Layout::new(16, 2048, Kind::Plain);
    clusters_of_2_mib: 30, Layout::new(21, 8192, Kind::Empty);
    version_2: 400, Layout::new(12, 800, Kind::Plain).version_2();
    counts_of_one_bit: 400, Layout::new(12, 800, Kind::Plain).with_refcount_bits(1);
    chain: 600, Layout::new(13, 800, Kind::Chain);
    over_compressed: 300, Layout::new(12, 800, Kind::OverCompressed("zlib"));
    compressed: 600, Layout::new(13, 800, Kind::Compressed("zstd"));
    extended: 400, Layout::new(14, 800, Kind::Plain).extended();
    extended_chain: 400, Layout::new(14, 800, Kind::Chain).extended();
    extended_snapshots: 300, Layout::new(15, 800, Kind::Snapshots).extended();
    extended_data_file: 200, Layout::new(14, 800, Kind::DataFile { raw: false }).extended();
    lazy: 300, Layout::new(9, 600, Kind::Plain).lazy();
    snapshots: 600, Layout::new(9, 600, Kind::Snapshots);
    snapshots_of_4_kib: 400, Layout::new(12, 800, Kind::Snapshots);
    data_file: 400, Layout::new(12, 800, Kind::DataFile { raw: false });
    raw_data_file: 400, Layout::new(12, 800, Kind::DataFile { raw: true });
}
