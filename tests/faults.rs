//! Every operation of a history fails once, in every way: the caller gets an error or success,
//! nothing panics or hangs, the image stays free of corruption, and what a flush covered is there.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::Sectors;
use common::seeds::{Repeat, seeds};
use common::workers::{Mix, Run, open, read_all};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, Engine, Purpose, block_on};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// The purposes after whose failure the state of the medium is unknown.
const POISONING: [Purpose; 8] = [
    Purpose::SyncData,
    Purpose::SyncReftable,
    Purpose::SyncTables,
    Purpose::SyncHeader,
    Purpose::RefblockWrite,
    Purpose::ReftableWrite,
    Purpose::L2Write,
    Purpose::L1Write,
];

/// Every purpose there is.
const PURPOSES: [Purpose; 27] = [
    Purpose::GuestRead,
    Purpose::GuestWrite,
    Purpose::GuestZero,
    Purpose::GuestDiscard,
    Purpose::CowRead,
    Purpose::CompressedRead,
    Purpose::CompressedWrite,
    Purpose::HeaderRead,
    Purpose::HeaderWrite,
    Purpose::L1Load,
    Purpose::L1Write,
    Purpose::L2Load,
    Purpose::L2Write,
    Purpose::L2Init,
    Purpose::ReftableLoad,
    Purpose::ReftableWrite,
    Purpose::RefblockLoad,
    Purpose::RefblockWrite,
    Purpose::RefblockInit,
    Purpose::TableRoom,
    Purpose::SnapshotRead,
    Purpose::SyncData,
    Purpose::SyncReftable,
    Purpose::SyncTables,
    Purpose::SyncHeader,
    Purpose::Ahead,
    Purpose::Create,
];

/// What a sweep did.
#[derive(Default)]
struct Tally {
    runs: u64,
    refused: u64,
    points: u64,
    leaks: u64,
}

struct Sweep {
    made: Made,
    seed: u64,
    requests: usize,
    tally: Tally,
}

impl Sweep {
    /// The history under the rules of `faults`; `None` when the image cannot be opened.
    fn run(&mut self, faults: &Faults) -> Option<(MemDisk, Rc<dyn Engine>, Run)> {
        let disk = self.made.disk();
        let engine = Fault::new(disk.engine(0, self.seed), faults.clone());
        let Ok(image) = open(&engine, &disk, true) else {
            assert!(faults.fired() > 0, "opening failed without a failure");
            return None;
        };
        engine.inner().set_hold(1);
        let engine: Rc<dyn Engine> = Rc::new(engine);
        let sectors = Sectors::new(&self.made.tags);
        let mix = Mix { read: 1, write: 8, zero: 3, discard: 3, flush: 3, longest: 60 };
        let (seed, engines) = ((self.seed, mix), vec![Rc::clone(&engine)]);
        let mut run = Run::new(image, engines, sectors, seed, (self.requests, 4));
        run.tolerate_errors();
        let mut random = fastrand::Rng::with_seed(self.seed + 1);
        while run.step() {
            if faults.fired() > 0 && random.u8(0..60) == 0 {
                self.cut(&disk, &run, random.u64(..));
            }
        }
        Some((disk, engine, run))
    }

    /// A power cut on top of the failure.
    fn cut(&mut self, disk: &MemDisk, run: &Run, seed: u64) {
        self.tally.points += 1;
        let crashed = disk.crash(seed);
        let report = crashed.look(IMAGE, check).expect("the image");
        assert!(report.corruptions.is_empty(), "after a power cut: {:?}", report.corruptions);
        let engine = crashed.engine(0, seed);
        let image = open(&engine, &crashed, true).expect("opening after a power cut");
        let bytes = read_all(&engine, &image).expect("reading after a power cut");
        run.check_crash(&bytes).unwrap_or_else(|what| panic!("after a power cut: {what}"));
    }

    /// The history with one rule, and everything that must hold after it.
    fn try_rule(&mut self, rule: Rule) {
        self.tally.runs += 1;
        let faults = Faults::new();
        faults.add(rule);
        let Some((disk, engine, mut run)) = self.run(&faults) else { return };
        assert!(faults.fired() > 0, "the rule was never met");
        let failed = !matches!(rule.fate, Fate::Delay(_));
        assert!(failed || run.errors().is_empty(), "late is no error: {:?}", run.errors());
        for draw in 0..3 {
            self.cut(&disk, &run, draw);
        }
        faults.clear();
        let poisoned = self.is_refused(engine.as_ref(), &run);
        let must = failed && rule.purpose.is_some_and(|purpose| POISONING.contains(&purpose));
        assert!(!must || poisoned, "goes on after a failure of {:?}", rule.purpose);
        self.tally.refused += u64::from(poisoned);
        let bytes = read_all(engine.as_ref(), run.image()).expect("reading still works");
        run.check_content(&bytes).unwrap_or_else(|what| panic!("after the failure: {what}"));
        if poisoned {
            return self.cut(&disk, &run, 3);
        }
        // The cause is gone: the image works as before.
        run.more(20);
        run.finish();
        run.start_close();
        run.finish();
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.corruptions.is_empty(), "after the close: {:?}", report.corruptions);
        self.tally.leaks += u64::from(report.all_leaks() > 0);
        assert!(failed || report.is_clean(), "a late answer made a leak");
        self.cut(&disk, &run, 4);
    }

    /// Whether the image refuses writes and flushes; it must refuse both or none.
    fn is_refused(&self, engine: &dyn Engine, run: &Run) -> bool {
        let empty = run.image().write(engine, GuestOffset(0), Buf::zeroed(0));
        let write = block_on(engine, empty).is_err();
        let flush = block_on(engine, run.image().flush(engine)).is_err();
        assert!(flush || !write, "refuses writes, but a flush succeeds");
        assert!(write || !flush, "refuses flushes, but accepts writes");
        flush
    }
}

/// Every operation of the history fails in every way, each in a run of its own.
fn sweep(test: &str, layout: Layout, requests: usize) {
    let begun = Instant::now();
    let mut total = 0;
    for seed in seeds(1) {
        let _repeat = Repeat::new("faults", test, seed);
        let tally = Tally::default();
        let mut sweep = Sweep { made: layout.make(seed), seed, requests, tally };
        let faults = Faults::new();
        sweep.run(&faults).expect("opening without failures");
        let mut operations = BTreeMap::new();
        for purpose in PURPOSES {
            let count = faults.count_of(purpose);
            (1..=count).for_each(|nth| sweep.every_fate(purpose, nth));
            if count > 0 {
                operations.insert(purpose, count);
            }
        }
        assert_eq!(operations.values().sum::<u64>(), faults.count(), "a purpose is missing");
        total += faults.count();
        let Tally { runs, refused, points, leaks } = sweep.tally;
        println!(
            "{test}: {runs} runs, of which {refused} refused everything from the failure on and \
             {leaks} left leaks; {points} power cuts; operations failed: {operations:?}"
        );
    }
    println!("{test}: {total} operations in {:.1} s", begun.elapsed().as_secs_f64());
}

impl Sweep {
    fn every_fate(&mut self, purpose: Purpose, nth: u64) {
        let rule = Rule { purpose: Some(purpose), nth, sticky: false, fate: Fate::Delay(30) };
        self.try_rule(rule);
        for errno in [EIO, ENOSPC] {
            let rule = Rule { fate: Fate::Fail(errno), ..rule };
            self.try_rule(rule);
            self.try_rule(Rule { sticky: true, ..rule });
            // A sector is never torn, also not by a short transfer.
            let bytes = if errno == EIO { 512 } else { 1536 };
            self.try_rule(Rule { fate: Fate::Short { bytes, errno }, ..rule });
        }
    }
}

#[test]
fn no_room_for_a_table_is_an_error_of_one_request() {
    // An L1 table of three sectors, and a refcount table that grows.
    let made = Layout::new(9, 9000, Kind::Empty).with_refcount_bits(64).make(1);
    let mut count = 0;
    for nth in 1.. {
        let (disk, faults) = (made.disk(), Faults::new());
        let purpose = Some(Purpose::TableRoom);
        faults.add(Rule { purpose, ..Rule::fail(nth, ENOSPC) });
        let engine = Fault::new(disk.engine(0, nth), faults.clone());
        let image = open(&engine, &disk, nth.is_multiple_of(2)).expect("opening");
        let mut failed = 0;
        for at in (0..9000_u64).step_by(45) {
            let bytes = Buf::copy_of(&[7; 45 * 512]);
            let write = || image.write(&engine, GuestOffset(at * 512), bytes.clone());
            if block_on(&engine, write()).is_err() {
                failed += 1;
                block_on(&engine, write()).expect("there is room again");
            }
            block_on(&engine, image.flush(&engine)).expect("nothing is poisoned");
        }
        block_on(&engine, image.close(&engine)).expect("closing");
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "{nth}: {report:?}");
        assert_eq!(failed, faults.fired(), "{nth}");
        if failed == 0 {
            break;
        }
        count += 1;
    }
    println!("no_room_for_a_table_is_an_error_of_one_request: {count} failures");
    assert!(count > 3, "three sectors, and a table that grows: {count}");
}

macro_rules! layouts {
    ($($name:ident: $requests:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            sweep(stringify!($name), $layout, $requests);
        })*
    };
}

layouts! {
    clusters_of_512: 60, Layout::new(9, 192, Kind::Plain);
    clusters_of_512_with_a_growing_refcount_table: 40,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64);
    clusters_of_4_kib: 60, Layout::new(12, 320, Kind::Plain);
    version_2_over_raw: 60, Layout::new(12, 320, Kind::OverRaw(250)).version_2();
    compressed: 60, Layout::new(12, 320, Kind::Compressed("zlib"));
    chain: 60, Layout::new(12, 320, Kind::Chain);
    extended_chain: 40, Layout::new(14, 640, Kind::Chain).extended();
    snapshots: 60, Layout::new(9, 192, Kind::Snapshots);
    data_file: 60, Layout::new(12, 320, Kind::DataFile { raw: false });
    raw_data_file: 60, Layout::new(12, 320, Kind::DataFile { raw: true });
}
