//! A host that has no space for a while: with the decorator that waits for it, no request fails,
//! nothing is poisoned, and the image is what it would have been.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::Sectors;
use common::seeds::{Repeat, seeds};
use common::workers::{Mix, Run, open, read_all};
use vhost_user_qcow2::bytes::{GuestOffset, HostOffset};
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::stall::{Outage, Stall};
use vhost_user_qcow2::storage::threads::Threads;
use vhost_user_qcow2::storage::{
    Buf, Engine, FileId, FileSource, Op, OpenMode, Pending, Purpose, Storage, block_on,
};
use vhost_user_qcow2::sync::{Arc, Ordering};
use vhost_user_qcow2::worker::poller::{Poller, Trigger};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

/// The purposes that may need space, data and metadata alike.
const WRITES: [Purpose; 10] = [
    Purpose::GuestWrite,
    Purpose::GuestZero,
    Purpose::HeaderWrite,
    Purpose::L1Write,
    Purpose::L2Write,
    Purpose::L2Init,
    Purpose::ReftableWrite,
    Purpose::RefblockWrite,
    Purpose::RefblockInit,
    Purpose::TableRoom,
];

/// Much shorter than a daemon's, so that a test does not take hours.
const INTERVAL: Duration = Duration::from_micros(200);

fn stall(engine: impl Engine + 'static, interval: Duration, outage: &Arc<Outage>) -> Stall {
    let name = |file: FileId| format!("file {}", file.0);
    Stall::new(Box::new(engine), interval, Arc::clone(outage), name).expect("descriptors")
}

struct Setup {
    made: Made,
    seed: u64,
    requests: usize,
}

struct History {
    disk: MemDisk,
    run: Run,
    outage: Arc<Outage>,
}

impl Setup {
    /// The history under the rules of `faults`, not begun.
    fn start(&self, faults: &Faults) -> History {
        let (disk, outage) = (self.made.disk(), Arc::new(Outage::default()));
        let engine = |lane: usize| -> Rc<dyn Engine> {
            let engine = disk.engine(lane, self.seed + lane as u64);
            engine.set_hold(1);
            Rc::new(stall(Fault::new(engine, faults.clone()), INTERVAL, &outage))
        };
        let engines = vec![engine(0), engine(1)];
        let image = open(&*engines[0], &disk, true).expect("a good image");
        let mix = Mix { read: 1, write: 8, zero: 3, discard: 3, flush: 3, longest: 60 };
        let sectors = Sectors::new(&self.made.tags);
        let run = Run::new(image, engines, sectors, (self.seed, mix), (self.requests, 4));
        History { disk, run, outage }
    }

    /// The history with these rules: as if there had been none.
    fn survives(&self, faults: &Faults) {
        let mut history = self.start(faults);
        history.run.finish();
        history.holds();
    }
}

impl History {
    fn holds(mut self) {
        assert_eq!(self.outage.waiting(), 0, "something waits although all is answered");
        self.run.more(20);
        self.run.finish();
        let engine = self.disk.engine(0, 0);
        let bytes = read_all(&engine, self.run.image()).expect("reading");
        self.run.check_content(&bytes).unwrap_or_else(|what| panic!("{what}"));
        self.run.start_close();
        self.run.finish();
        let report = self.disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "{report:?}");
    }

    fn cut(&self, seed: u64) {
        let crashed = self.disk.crash(seed);
        let report = crashed.look(IMAGE, check).expect("the image");
        assert!(report.corruptions.is_empty(), "after a power cut: {:?}", report.corruptions);
        let engine = crashed.engine(0, seed);
        let image = open(&engine, &crashed, true).expect("opening after a power cut");
        let bytes = read_all(&engine, &image).expect("reading after a power cut");
        self.run.check_crash(&bytes).unwrap_or_else(|what| panic!("after a power cut: {what}"));
    }
}

/// Each operation that may need space finds none, for one attempt, for three, or in the middle;
/// then everything from it on finds none until nothing goes on any more.
fn sweep(test: &str, layout: Layout, requests: usize) {
    let (begun, mut runs, mut tried) = (Instant::now(), 0, BTreeMap::new());
    for seed in seeds(1) {
        let _repeat = Repeat::new("stall", test, seed);
        let setup = Setup { made: layout.make(seed), seed, requests };
        let counted = Faults::new();
        setup.survives(&counted);
        for purpose in WRITES {
            let count = counted.count_of(purpose);
            for nth in 1..=count {
                let fates = [
                    (1, Fate::Fail(ENOSPC)),
                    (3, Fate::Fail(EDQUOT)),
                    (1, Fate::Short { bytes: 1536, errno: ENOSPC }),
                ];
                for (times, fate) in fates {
                    let faults = Faults::new();
                    for nth in nth..nth + times {
                        let purpose = Some(purpose);
                        faults.add(Rule { purpose, nth, sticky: false, fate });
                    }
                    setup.survives(&faults);
                    assert!(faults.fired() > 0, "the rule was never met");
                    runs += 1;
                }
            }
            if count > 0 {
                tried.insert(purpose, count);
                (1..=count).step_by(7).for_each(|nth| full(&setup, purpose, nth));
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{test}: {runs} runs over {tried:?} in {seconds:.1} s");
}

/// From the `nth` operation of a purpose on, nothing finds space; then there is some again.
fn full(setup: &Setup, purpose: Purpose, nth: u64) {
    let faults = Faults::new();
    let rule = |purpose, nth| {
        let (purpose, fate) = (Some(purpose), Fate::Fail(ENOSPC));
        Rule { purpose, nth, sticky: true, fate }
    };
    faults.add(rule(purpose, nth));
    let mut history = setup.start(&faults);
    let mut steps = 0;
    while faults.fired() == 0 && history.run.step() {}
    WRITES.into_iter().for_each(|purpose| faults.add(rule(purpose, 0)));
    let answered = history.run.answered();
    while steps < 2000 && history.run.step() {
        steps += 1;
    }
    assert!(history.run.errors().is_empty());
    // With late refcounts the image is repaired before it is served again.
    let cuts = if setup.made.layout.lazy { 0 } else { 2 };
    (0..cuts).for_each(|seed| history.cut(seed));
    faults.clear();
    history.run.finish();
    assert!(history.run.answered() >= answered);
    history.holds();
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
    clusters_of_512: 40, Layout::new(9, 192, Kind::Plain);
    clusters_of_512_with_a_growing_refcount_table: 30,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64);
    clusters_of_4_kib_over_raw: 40, Layout::new(12, 320, Kind::OverRaw(250));
    subclusters: 40, Layout::new(14, 1200, Kind::OverRaw(900)).extended();
    late_refcounts: 40, Layout::new(12, 320, Kind::Plain).lazy();
    version_2: 40, Layout::new(12, 320, Kind::Plain).version_2();
    snapshots: 30, Layout::new(9, 192, Kind::Snapshots);
    data_file: 40, Layout::new(12, 320, Kind::DataFile { raw: false });
    raw_data_file: 40, Layout::new(12, 320, Kind::DataFile { raw: true });
}

#[test]
fn told_to_end_everything_is_answered() {
    for seed in seeds(20) {
        let _repeat = Repeat::new("stall", "told_to_end_everything_is_answered", seed);
        let made = Layout::new(12, 320, Kind::Plain).make(seed);
        let setup = Setup { made, seed, requests: 40 };
        let faults = Faults::new();
        let mut history = setup.start(&faults);
        for purpose in WRITES {
            let (purpose, fate) = (Some(purpose), Fate::Fail(ENOSPC));
            faults.add(Rule { purpose, nth: 1 + seed % 4, sticky: true, fate });
        }
        (0..500).all(|_| history.run.step());
        assert!(history.outage.waiting() > 0, "nothing waits");
        history.run.tolerate_errors();
        history.outage.over().store(true, Ordering::Relaxed);
        history.run.finish();
        assert_eq!(history.outage.waiting(), 0);
        let errors = history.run.errors();
        assert!(errors.iter().any(|error| error.contains("No space")), "{errors:?}");
        (0..3).for_each(|seed| history.cut(seed));
    }
}

#[test]
fn what_a_guest_discards_makes_room_for_a_write_that_waits() {
    let made = Layout::new(12, 640, Kind::Empty).make(1);
    let (disk, faults, outage) = (made.disk(), Faults::new(), Arc::new(Outage::default()));
    let engine = stall(Fault::new(disk.engine(0, 1), faults.clone()), INTERVAL, &outage);
    let image = open(&engine, &disk, false).expect("opening");
    let place = |sector: u64| GuestOffset(sector * 512);
    let bytes = |sectors: usize| Buf::copy_of(&vec![7; sectors * 512]);
    block_on(&engine, image.write(&engine, place(0), bytes(320))).expect("writing");
    block_on(&engine, image.flush(&engine)).expect("flushing");
    let (purpose, fate) = (Some(Purpose::GuestWrite), Fate::Fail(ENOSPC));
    faults.add(Rule { purpose, nth: 0, sticky: true, fate });
    // From inside one cluster to inside another: it takes along what is around it.
    let mut waiting = Box::pin(image.write(&engine, place(403), bytes(10)));
    let mut context = Context::from_waker(Waker::noop());
    while outage.waiting() == 0 {
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        engine.reap();
    }
    let before = faults.count_of(Purpose::GuestDiscard);
    for part in 0..4 {
        block_on(&engine, image.discard(&engine, place(part * 80), 80 * 512)).expect("discarding");
        block_on(&engine, image.flush(&engine)).expect("flushing");
    }
    assert!(faults.count_of(Purpose::GuestDiscard) > before, "no space is given back");
    assert_eq!(outage.waiting(), 1, "the write waits on");
    faults.clear();
    block_on(&engine, waiting).expect("there is space again");
    let read = read_all(&engine, &image).expect("reading");
    assert!(read[403 * 512..413 * 512].iter().all(|byte| *byte == 7));
    assert!(read[..403 * 512].iter().chain(&read[413 * 512..]).all(|byte| *byte == 0));
    block_on(&engine, image.close(&engine)).expect("closing");
    let report = disk.look(IMAGE, check).expect("the image");
    assert!(report.is_clean(), "{report:?}");
}

/// A file of 4096 zeros, and an engine whose rules a test can change.
fn one_file(interval: Duration) -> (MemDisk, FileId, Faults, Stall) {
    let (disk, faults) = (MemDisk::new(), Faults::new());
    let file = disk.add("disk", vec![0; 4096]);
    let engine = Fault::new(disk.engine(0, 1), faults.clone());
    (disk, file, faults, stall(engine, interval, &Arc::default()))
}

fn write(at: u64) -> Op {
    Op::Write { at: HostOffset(at), buf: Buf::copy_of(&[7; 512]) }
}

fn poll(pending: &mut Pending) -> Poll<std::io::Result<()>> {
    Pin::new(pending).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn space_given_back_ends_the_wait_at_once() {
    let hour = Duration::from_secs(3600);
    let gifts = [
        Op::Discard { at: HostOffset(1024), len: 512 },
        Op::Zero { at: HostOffset(1024), len: 512, unmap: true },
        Op::Resize { len: 2048 },
    ];
    for gift in gifts {
        let (disk, file, faults, engine) = one_file(hour);
        faults.add(Rule::fail(1, ENOSPC));
        faults.add(Rule::fail(2, ENOSPC));
        let mut first = engine.submit(file, Purpose::GuestWrite, write(0));
        let mut second = engine.submit(file, Purpose::GuestWrite, write(512));
        for _ in 0..3 {
            engine.reap();
            assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
        }
        assert!(engine.is_busy());
        block_on(&engine, engine.submit(file, Purpose::GuestDiscard, gift)).expect("a gift");
        for pending in [&mut first, &mut second] {
            let mut look = || {
                engine.reap();
                poll(pending)
            };
            let answer = (0..10).map(|_| look()).find(Poll::is_ready);
            assert!(matches!(answer, Some(Poll::Ready(Ok(())))), "{answer:?}");
        }
        assert!(disk.content(file)[..1024].iter().all(|byte| *byte == 7));
        assert!(!engine.is_busy());
    }
}

#[test]
fn syncs_and_discards_and_other_errors_do_not_wait() {
    let (_disk, file, faults, engine) = one_file(Duration::from_secs(3600));
    let at = HostOffset(0);
    for (errno, op) in [
        (ENOSPC, Op::Sync),
        (ENOSPC, Op::Discard { at, len: 512 }),
        (ENOSPC, Op::Read { at, buf: Buf::zeroed(512) }),
        (EIO, write(0)),
        (EIO, Op::Zero { at, len: 512, unmap: true }),
    ] {
        faults.clear();
        faults.add(Rule::fail(faults.count() + 1, errno));
        let answer = block_on(&engine, engine.submit(file, Purpose::GuestWrite, op.clone()));
        let error = answer.expect_err("a failure");
        assert_eq!(error.raw_os_error(), Some(errno), "{op:?}");
    }
}

#[test]
fn an_answer_that_nobody_wants_leaves_nothing_behind() {
    let (_disk, file, faults, engine) = one_file(Duration::from_secs(3600));
    faults.add(Rule { sticky: true, ..Rule::fail(1, ENOSPC) });
    let mut parked = engine.submit(file, Purpose::GuestWrite, write(0));
    engine.reap();
    assert!(poll(&mut parked).is_pending() && engine.is_busy());
    drop(parked);
    assert!(!engine.is_busy(), "a timer runs for nobody");
}

#[test]
fn the_descriptor_is_readable_when_it_is_time() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let files = Files::new(Options::default());
    let mode = OpenMode { read_only: false, backing: false };
    let id = files.open(file.path(), mode).expect("open").id;
    let faults = Faults::new();
    (1..=2).for_each(|nth| faults.add(Rule::fail(nth, ENOSPC)));
    let inner = Fault::new(Threads::new(&files, 0).expect("threads"), faults.clone());
    let interval = Duration::from_millis(100);
    let engine = stall(inner, interval, &Arc::default());
    let mut poller = Poller::new().expect("a poller");
    poller.add(&engine.pollable(), 0, Trigger::Level).expect("watch the engine");
    let begun = Instant::now();
    let mut pending = engine.submit(id, Purpose::GuestWrite, write(0));
    for _ in 0..2 {
        // On its way, refused, parked.
        assert!(poll(&mut pending).is_pending());
        engine.reap();
        assert!(poll(&mut pending).is_pending());
        assert_eq!(poller.wait(0).expect("wait").count(), 0, "it is not yet time");
        assert_eq!(poller.wait(10_000).expect("wait").count(), 1, "the timer wakes a sleeper");
        assert!(engine.reap() > 0, "what is due is let go");
        assert_eq!(poller.wait(0).expect("wait").count(), 0, "and nothing is due any more");
    }
    block_on(&engine, pending).expect("the third attempt");
    assert!(begun.elapsed() >= interval * 2, "it did not wait");
    assert_eq!(std::fs::read(file.path()).expect("the file"), [7; 512]);
    assert_eq!(poller.wait(300).expect("wait").count(), 0, "nothing ticks when nothing waits");
}
