//! A process that is killed at any moment, while its guest lives on: whoever takes the image over
//! with the journal has every answered request, flushed or not; the image stays free of corruption;
//! and what the takeover has made durable, power cuts leave alone.
//!
//! A kill is no power cut: what was written to the files is there, what was under way may be.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::{Sectors, bytes_of, tags_of};
use common::seeds::{Repeat, number, seeds};
use common::workers::{Mix, Run, open, read_all};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::qcow2::journal::{JOURNAL_WORDS, SharedWords};
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};
use vhost_user_qcow2::storage::{Buf, Engine, FileId, Limits, Purpose, block_on};

/// Memory that outlives the simulated process.
#[derive(Debug)]
struct Words(Vec<AtomicU64>);

impl Words {
    /// Zeros, with room for so many words.
    fn new(length: usize) -> Arc<Self> {
        Arc::new(Self((0..length).map(|_| AtomicU64::new(0)).collect()))
    }

    /// The memory as it is now, for whoever comes next.
    fn copy(&self) -> Arc<Self> {
        let copy = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        Arc::new(Self(self.0.iter().map(copy).collect()))
    }
}

impl SharedWords for Words {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Acquire)
    }

    fn store(&self, index: usize, value: u64) {
        self.0[index].store(value, Ordering::Release);
    }
}

/// Words for a little more than a thousand changes: a busy history fills them.
const SMALL: usize = 8 + 1030 * 6;

/// A host with an image and memory, between two processes.
struct Host {
    disk: MemDisk,
    words: Arc<Words>,
    /// What the guest knows, and what flushes have made durable.
    sectors: Sectors,
}

/// What a test has come to.
#[derive(Default)]
struct Totals {
    kills: u64,
    redone: u64,
    changes: usize,
    cuts: u64,
}

/// The disk that is left after a power cut may not have lost anything that was durable.
fn cut(totals: &mut Totals, crashed: &MemDisk, sectors: &Sectors, seed: u64) {
    totals.cuts += 1;
    let dirty = crashed.look(IMAGE, |bytes| bytes[7] == 3 && bytes[79] & 1 == 1);
    let report = crashed.look(IMAGE, check).expect("the image");
    let sound = report.corruptions.is_empty() || dirty.expect("the image");
    assert!(sound, "after the power cut: {:?}", report.corruptions);
    let engine = crashed.engine(0, seed);
    let image = open(&engine, crashed, false).expect("opening after the power cut");
    let bytes = read_all(&engine, &image).expect("reading after the power cut");
    sectors.check_crash(&bytes).unwrap_or_else(|what| panic!("after the power cut: {what}"));
}

/// Takes the host over: opens the image and makes the changes again, with power cuts on the way,
/// until that is done, or killed.
fn take_over(
    totals: &mut Totals,
    host: &Host,
    random: &mut fastrand::Rng,
    killed: bool,
) -> Option<Image> {
    let engine = Rc::new(host.disk.engine(0, random.u64(..)));
    let image = Rc::new(open(engine.as_ref(), &host.disk, random.bool()).expect("opening"));
    engine.set_hold(random.u8(0..3));
    let done: Rc<Cell<Option<Result<usize>>>> = Rc::default();
    let mut tasks = TaskSet::new(1, || {});
    let (words, result) = (Arc::clone(&host.words), Rc::clone(&done));
    let (own, taken) = (Rc::clone(&engine), Rc::clone(&image));
    tasks.spawn(async move {
        result.set(Some(taken.attach_journal(own.as_ref(), words).await));
    });
    let end = if killed { random.u32(0..60) } else { u32::MAX };
    for _ in 0..end {
        tasks.run_ready();
        if tasks.is_idle() {
            break;
        }
        engine.reap();
        if random.u8(0..6) == 0 {
            let seed = random.u64(..);
            cut(totals, &host.disk.crash(seed), &host.sectors, seed);
        }
    }
    let changes = done.take()?.expect("taking over");
    totals.redone += u64::from(changes > 0);
    totals.changes += changes;
    drop(tasks);
    Some(Rc::into_inner(image).expect("nobody else has it"))
}

/// Serves random requests on an image that was taken over, until the process is killed.
fn serve(totals: &mut Totals, host: &Host, image: Image, random: &mut fastrand::Rng) -> Host {
    let engines: Vec<Rc<dyn Engine>> = (0..random.usize(1..=2))
        .map(|lane| {
            let engine: MemEngine = host.disk.engine(lane, random.u64(..));
            engine.set_hold(random.u8(0..4));
            Rc::new(engine) as Rc<dyn Engine>
        })
        .collect();
    let mix = Mix {
        read: random.u8(0..3),
        write: 8,
        zero: random.u8(0..5),
        discard: random.u8(0..5),
        flush: random.u8(0..3),
        longest: random.choice([4, 24, 90, 300]).expect("not empty"),
    };
    let depth = random.choice([1, 4, 12]).expect("not empty");
    let requests = random.usize(1..80);
    let last = Rc::clone(&engines[0]);
    let sectors = host.sectors.clone();
    let mut run = Run::new(image, engines, sectors, (random.u64(..), mix), (requests, depth));
    let end = random.u32(0..400);
    for _ in 0..end {
        if !run.step() {
            break;
        }
        if random.u8(0..40) == 0 {
            let seed = random.u64(..);
            cut(totals, &host.disk.crash(seed), &run.sectors(), seed);
        }
    }
    if run.alive() == 0 && random.u8(0..4) == 0 {
        // The guest stops and starts again.
        block_on(last.as_ref(), run.image().detach_journal(last.as_ref())).expect("stopping");
    }
    totals.kills += 1;
    let disk = host.disk.kill(random.u64(..));
    Host { disk, words: host.words.copy(), sectors: run.sectors() }
}

/// One image that is served and killed several times.
fn history(totals: &mut Totals, made: &Made, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let length = if random.bool() { SMALL } else { JOURNAL_WORDS };
    let mut host =
        Host { disk: made.disk(), words: Words::new(length), sectors: Sectors::new(&made.tags) };
    for _ in 0..random.usize(1..5) {
        if random.u8(0..4) == 0 && take_over(totals, &host, &mut random, true).is_none() {
            totals.kills += 1;
            let disk = host.disk.kill(random.u64(..));
            host = Host { disk, words: host.words.copy(), sectors: host.sectors };
        }
        let image = take_over(totals, &host, &mut random, false).expect("it was not killed");
        examine(totals, &mut host, &image, &mut random);
        host = serve(totals, &host, image, &mut random);
    }
    let image = take_over(totals, &host, &mut random, false).expect("it was not killed");
    examine(totals, &mut host, &image, &mut random);
    let engine = host.disk.engine(0, seed);
    block_on(&engine, image.close(&engine)).expect("closing");
    let report = host.disk.look(IMAGE, check).expect("the image");
    assert!(report.corruptions.is_empty(), "after the close: {:?}", report.corruptions);
}

/// What was answered is there after a takeover, and stays there whatever the power does.
fn examine(totals: &mut Totals, host: &mut Host, image: &Image, random: &mut fastrand::Rng) {
    let engine = host.disk.engine(0, random.u64(..));
    let bytes = read_all(&engine, image).expect("reading after the kill");
    let checked = host.sectors.check_read(0, &bytes, host.sectors.now());
    checked.unwrap_or_else(|what| panic!("after the kill: {what}"));
    let lazy = host.disk.look(IMAGE, |bytes| bytes[7] == 3 && bytes[79] & 1 == 1);
    let report = host.disk.look(IMAGE, check).expect("the image");
    let sound = report.corruptions.is_empty() || lazy.expect("the image");
    assert!(sound, "after the kill: {:?}", report.corruptions);
    let tags = tags_of(0, &bytes).expect("checked above");
    assert!(bytes_of(0, &tags) == bytes, "whole sectors");
    host.sectors = Sectors::new(&tags);
    for _ in 0..2 {
        let seed = random.u64(..);
        cut(totals, &host.disk.crash(seed), &host.sectors, seed);
    }
}

fn outlive(test: &str, layout: Layout, count: u64) {
    let begun = Instant::now();
    let made = layout.make(count);
    let mut totals = Totals::default();
    let count = count * number("OUTLIVE").unwrap_or(100) / 100;
    for seed in seeds(count.max(1)) {
        let _repeat = Repeat::new("outlive", test, seed);
        history(&mut totals, &made, seed);
    }
    let Totals { kills, redone, changes, cuts } = totals;
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{test}: {kills} kills, {redone} times {changes} changes were made again, {cuts} power \
         cuts, {seconds:.1} s"
    );
    assert!(redone > 0 || count < 20, "no change was ever made again");
}

macro_rules! layouts {
    ($($name:ident: $count:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            outlive(stringify!($name), $layout, $count);
        })*
    };
}

layouts! {
    clusters_of_512: 300, Layout::new(9, 192, Kind::Plain);
    clusters_of_512_with_a_growing_refcount_table: 60,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64);
    clusters_of_4_kib: 300, Layout::new(12, 320, Kind::Plain);
    clusters_of_4_kib_with_counts_of_one_bit: 200,
        Layout::new(12, 320, Kind::Plain).with_refcount_bits(1);
    clusters_of_64_kib: 100, Layout::new(16, 2048, Kind::Plain);
    version_2: 200, Layout::new(12, 320, Kind::Plain).version_2();
    an_empty_image: 200, Layout::new(9, 192, Kind::Empty);
    preallocated: 100, Layout::new(12, 320, Kind::Preallocated("metadata"));
    over_raw: 200, Layout::new(12, 320, Kind::OverRaw(250));
    over_compressed: 100, Layout::new(12, 320, Kind::OverCompressed("zstd"));
    compressed: 100, Layout::new(12, 320, Kind::Compressed("zlib"));
    extended: 150, Layout::new(14, 640, Kind::Plain).extended();
    extended_over_raw: 100, Layout::new(14, 640, Kind::OverRaw(500)).extended();
    extended_snapshots: 100, Layout::new(14, 640, Kind::Snapshots).extended();
    lazy: 150, Layout::new(9, 192, Kind::Plain).lazy();
    lazy_snapshots: 100, Layout::new(12, 320, Kind::Snapshots).lazy();
    snapshots: 200, Layout::new(9, 192, Kind::Snapshots);
    snapshots_of_4_kib: 150, Layout::new(12, 320, Kind::Snapshots);
    data_file: 150, Layout::new(12, 320, Kind::DataFile { raw: false });
    raw_data_file: 100, Layout::new(12, 320, Kind::DataFile { raw: true });
}

/// A host whose process was killed after it had answered writes that no flush has covered.
fn left_behind(made: &Made) -> Host {
    let (disk, words) = (made.disk(), Words::new(JOURNAL_WORDS));
    let engine = disk.engine(0, 1);
    let image = open(&engine, &disk, false).expect("opening");
    let attached = image.attach_journal(&engine, Arc::<Words>::clone(&words));
    assert_eq!(block_on(&engine, attached).expect("nothing is left"), 0);
    let mut tags = made.tags.clone();
    for sector in (0..tags.len()).step_by(24) {
        tags[sector] = 7000;
        let (at, buf) =
            (GuestOffset(sector as u64 * 512), Buf::copy_of(&bytes_of(sector, &[7000])));
        block_on(&engine, image.write(&engine, at, buf)).expect("writing");
        block_on(&engine, image.hand_over(&engine)).expect("no flush is needed");
    }
    Host { disk: disk.kill(1), words: words.copy(), sectors: Sectors::new(&tags) }
}

#[test]
fn a_journal_is_refused_when_somebody_has_changed_the_image() {
    let made = Layout::new(12, 960, Kind::Empty).make(0);
    let host = left_behind(&made);
    let engine = host.disk.engine(0, 2);
    // Somebody else takes the image and allocates clusters.
    let image = open(&engine, &host.disk, false).expect("opening");
    let write = image.write(&engine, GuestOffset(4096 * 100), Buf::copy_of(&[9; 4096]));
    block_on(&engine, write).expect("writing");
    block_on(&engine, image.close(&engine)).expect("closing");
    drop(image);
    let before = host.disk.files();
    let image = open(&engine, &host.disk, false).expect("opening");
    let words: Arc<Words> = host.words.copy();
    let attached = block_on(&engine, image.attach_journal(&engine, words));
    let error = attached.expect_err("it was changed").to_string();
    assert!(error.contains(IMAGE) && error.contains("has changed since"), "{error}");
    assert!(host.disk.files() == before, "something was changed");
}

/// What was answered is there, on a disk that may have grown.
fn assert_all_there(host: &Host, image: &Image) {
    let engine = host.disk.engine(0, 5);
    let bytes = read_all(&engine, image).expect("reading");
    let checked = host.sectors.check_read(0, &bytes[..192 * 512], host.sectors.now());
    checked.unwrap_or_else(|what| panic!("after the takeover: {what}"));
    block_on(&engine, image.close(&engine)).expect("closing");
    let report = host.disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_resize_before_the_guest_is_back_spares_what_it_was_told_is_written() {
    let made = Layout::new(9, 192, Kind::Empty).make(0);
    let host = left_behind(&made);
    let engine = host.disk.engine(0, 2);
    let mut image = open(&engine, &host.disk, false).expect("opening");
    image.expect_predecessor();
    let smaller = block_on(&engine, image.resize(&engine, 4096, true));
    let error = smaller.expect_err("it would cut the file").to_string();
    assert!(error.contains("a guest may come back"), "{error}");
    // The L1 table needs more clusters than it has.
    block_on(&engine, image.resize(&engine, 8 << 20, false)).expect("growing");
    let words: Arc<Words> = host.words.copy();
    let attached = block_on(&engine, image.attach_journal(&engine, words));
    assert!(attached.expect("what looked free was spared") > 0);
    image.expect_nobody();
    block_on(&engine, image.resize(&engine, 4 << 20, true)).expect("shrinking");
    assert_all_there(&host, &image);
}

#[test]
fn a_takeover_that_fails_half_way_is_not_called_a_change_by_somebody_else() {
    let made = Layout::new(9, 192, Kind::Empty).make(0);
    let host = left_behind(&made);
    let faults = Faults::new();
    let engine = Fault::new(host.disk.engine(0, 2), faults.clone());
    let image = open(&engine, &host.disk, false).expect("opening");
    faults.add(Rule { purpose: Some(Purpose::L2Init), ..Rule::fail(1, 5) });
    let attach = |image: &Image| {
        let words: Arc<Words> = host.words.copy();
        block_on(&engine, image.attach_journal(&engine, words))
    };
    attach(&image).expect_err("a table cannot be written");
    faults.clear();
    let again = attach(&image).expect_err("half of it was done").to_string();
    assert!(!again.contains("has changed since"), "{again}");
    let write = image.write(&engine, GuestOffset(0), Buf::copy_of(&[9; 512]));
    block_on(&engine, write).expect_err("what is not counted looks free");
    drop(image);
    let image = open(&engine, &host.disk, false).expect("opening again");
    assert!(attach(&image).expect("nothing is in the way") > 0);
    assert_all_there(&host, &image);
}

#[test]
fn a_block_device_has_room_for_tables_beside_what_is_made_again() {
    let made = Layout::new(9, 192, Kind::Empty).make(0);
    let host = left_behind(&made);
    let (room, file) = (64 << 10, FileId(0));
    let length = host.disk.content(file).len();
    let disk = MemDisk::new();
    let mut bytes = host.disk.content(file);
    bytes.resize(length + room, 0);
    assert_eq!(disk.add(IMAGE, bytes), file);
    disk.set_limits(file, Limits { grows: false, ..Limits::default() });
    let host = Host { disk, ..host };
    let engine = host.disk.engine(0, 2);
    let image = open(&engine, &host.disk, false).expect("opening");
    image.expect_predecessor();
    let words: Arc<Words> = host.words.copy();
    let attached = block_on(&engine, image.attach_journal(&engine, words));
    assert!(attached.expect("there is room") > 0);
    image.expect_nobody();
    assert_all_there(&host, &image);
}

#[test]
fn a_journal_that_could_not_be_let_go_is_gone_on_with() {
    let made = Layout::new(12, 960, Kind::Empty).make(0);
    let (disk, words) = (made.disk(), Words::new(JOURNAL_WORDS));
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, 1), faults.clone());
    let image = open(&engine, &disk, false).expect("opening");
    let attach = || image.attach_journal(&engine, Arc::<Words>::clone(&words));
    assert_eq!(block_on(&engine, attach()).expect("nothing is left"), 0);
    let write = image.write(&engine, GuestOffset(0), Buf::copy_of(&bytes_of(0, &[7])));
    block_on(&engine, write).expect("writing");
    block_on(&engine, image.hand_over(&engine)).expect("no flush is needed");
    let fate = Fate::Fail(28);
    faults.add(Rule { purpose: Some(Purpose::L2Write), nth: 1, sticky: true, fate });
    block_on(&engine, image.detach_journal(&engine)).expect_err("nothing can be flushed");
    // The guest's driver starts again: it can read what it has written.
    assert_eq!(block_on(&engine, attach()).expect("it was never let go"), 0);
    let tags = tags_of(0, &read_all(&engine, &image).expect("reading")).expect("whole sectors");
    assert_eq!(tags[0], 7);
    drop(image);
    let disk = disk.kill(1);
    let engine = disk.engine(0, 2);
    let image = open(&engine, &disk, false).expect("opening");
    let changes = block_on(&engine, image.attach_journal(&engine, words)).expect("it is there");
    assert_eq!(changes, 1);
    let tags = tags_of(0, &read_all(&engine, &image).expect("reading")).expect("whole sectors");
    assert_eq!(tags[0], 7);
}

#[test]
fn a_journal_of_another_image_is_refused_and_lies_do_no_harm() {
    let made = Layout::new(12, 960, Kind::Plain).make(0);
    let host = left_behind(&made);
    let mut random = fastrand::Rng::with_seed(3);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..300 {
        let words = host.words.copy();
        for _ in 0..random.usize(1..3) {
            let at = random.usize(0..8 + 40 * 6);
            let old = words.load(at);
            let values =
                [0, u64::MAX, old ^ 1 << random.u32(..64), old.wrapping_add(4096), random.u64(..)];
            words.store(at, random.choice(values).expect("some"));
        }
        let disk = host.disk.kill(0);
        let engine = disk.engine(0, 4);
        let image = open(&engine, &disk, false).expect("opening");
        match block_on(&engine, image.attach_journal(&engine, words)) {
            Ok(_) => taken += 1,
            Err(_) => refused += 1,
        }
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
    }
    println!("{refused} were refused, {taken} taken");
    assert!(refused > 20 && taken > 20);
}
