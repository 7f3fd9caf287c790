//! Power cuts at every moment of each operation: there is no corruption, the operation has happened
//! or has not, nothing of the disk or of a snapshot is lost, and the image can be used on.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use common::check::{check, check_interrupted};
use common::images::{IMAGE, Kind, Layout};
use common::sectors::tags_of;
use common::seeds::{Repeat, seeds};
use common::workers::{open, read_all, write_some};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Engine, block_on};

use crate::disk::{Act, Contents, act, contents};

/// All subsets are tried of at most so many sectors.
const EXHAUSTIVE: usize = 9;

#[derive(Default)]
struct Cuts {
    points: u64,
    exhaustive: u64,
    before: u64,
    after: u64,
    went_on: u64,
}

pub(crate) fn look(disk: &MemDisk) -> Contents {
    disk.look(IMAGE, contents).expect("the image")
}

impl Cuts {
    /// Examines what a power cut has left: the state before or after.
    fn examine(&mut self, crashed: &MemDisk, states: [&Contents; 2], seed: u64) {
        self.points += 1;
        let report = crashed.look(IMAGE, check_interrupted).expect("the image");
        assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
        let now = look(crashed);
        if &now == states[0] {
            self.before += 1;
        } else if &now == states[1] {
            self.after += 1;
        } else {
            panic!("a state between: {}", difference(&now, states));
        }
        if seed.is_multiple_of(16) {
            self.went_on += 1;
            go_on(crashed, &now, seed);
        }
    }
}

fn difference(now: &Contents, states: [&Contents; 2]) -> String {
    let sizes = |state: &Contents| {
        let names = state.snapshots.iter().map(|(name, bytes)| (name.clone(), bytes.len()));
        (state.disk.len(), names.collect::<Vec<_>>())
    };
    let [now_sizes, before, after] = [now, states[0], states[1]].map(sizes);
    let same = |state: &Contents| {
        let pairs = state.snapshots.iter().zip(&now.snapshots);
        (state.disk == now.disk, pairs.map(|(one, two)| one == two).collect::<Vec<_>>())
    };
    format!(
        "{now_sizes:?}, before {before:?} {:?}, after {after:?} {:?}",
        same(states[0]),
        same(states[1])
    )
}

/// The image is used on: written to, and all snapshots deleted after another was taken. Nobody
/// else's bytes change, and what was counted too high stays a leak.
pub(crate) fn go_on(disk: &MemDisk, now: &Contents, seed: u64) {
    let before = disk.look(IMAGE, check_interrupted).expect("the image").all_leaks();
    let engine = disk.engine(0, seed);
    let image = open(&engine, disk, seed.is_multiple_of(32)).expect("opening after the cut");
    let bytes = read_all(&engine, &image).expect("reading after the cut");
    assert!(bytes == now.disk, "our reader and theirs differ");
    let mut tags = tags_of(0, &bytes).expect("sectors of one version each");
    let mut random = fastrand::Rng::with_seed(seed);
    if !tags.is_empty() {
        write_some(&engine, &image, &mut tags, &mut random).expect("writing after the cut");
    }
    block_on(&engine, image.close(&engine)).expect("closing");
    act(disk, &Act::Create("later".to_owned())).expect("a snapshot after the cut");
    let later = look(disk);
    let old = &later.snapshots[..now.snapshots.len()];
    assert!(old == now.snapshots, "a snapshot has changed");
    assert!(tags_of(0, &later.disk).as_ref() == Some(&tags), "the disk has changed");
    for (name, _) in &later.snapshots {
        act(disk, &Act::Delete(name.clone())).expect("deleting after the cut");
        assert!(look(disk).disk == later.disk, "deleting {name:?} has changed the disk");
    }
    let report = disk.look(IMAGE, check_interrupted).expect("the image");
    assert!(report.corruptions.is_empty(), "after going on: {:?}", report.corruptions);
    // A cluster that was counted too high and shared is a leak of its own once it is not.
    let after = report.all_leaks();
    assert!(before > 0 || after == 0, "going on leaked {after} clusters");
}

/// Carries an operation out and cuts the power at each moment between.
fn cut(cuts: &mut Cuts, disk: &MemDisk, what: &Act, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let before = look(disk);
    let whole = copy(disk);
    act(&whole, what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
    let after = look(&whole);
    assert!(check(&whole.content_of(IMAGE).expect("the image")).is_clean());
    let engine = disk.engine(0, seed);
    engine.set_hold(random.u8(0..4));
    let mut running = pin!(what.run(&engine, disk, random.bool()));
    loop {
        let done = running.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let unsynced = disk.unsynced_sectors();
        // Large sets at some moments only: the time doubles with each sector.
        if unsynced <= EXHAUSTIVE && random.usize(0..1 << unsynced) <= 24 {
            cuts.exhaustive += 1;
            for kept in 0..1 << unsynced {
                let draw = random.u64(..);
                cuts.examine(&disk.crash_exactly(kept), [&before, &after], draw);
            }
        } else if random.u8(0..4) == 0 {
            for _ in 0..4 {
                let draw = random.u64(..);
                cuts.examine(&disk.crash(draw), [&before, &after], draw);
            }
        }
        if let Poll::Ready(result) = done {
            result.unwrap_or_else(|error| panic!("{what:?}: {error}"));
            break;
        }
        engine.wait().expect("a simulated wait");
    }
    assert!(disk.look(IMAGE, check).expect("the image").is_clean());
    assert!(look(disk) == after, "the same operation has the same result");
}

pub(crate) fn copy(disk: &MemDisk) -> MemDisk {
    let copied = MemDisk::new();
    disk.files().into_iter().for_each(|(name, content)| {
        copied.add(name, content);
    });
    copied
}

/// A history of each operation, with writes between them.
fn histories(test: &str, layout: Layout, count: u64) {
    let begun = Instant::now();
    let made = layout.make(3);
    let mut cuts = Cuts::default();
    let sectors = layout.sectors;
    let named = |name: &str| name.to_owned();
    for seed in seeds(count) {
        let _repeat = Repeat::new("offline", test, seed);
        let disk = made.disk();
        let mut acts = vec![
            Act::Create(named("new")),
            Act::Apply(named("one")),
            Act::Delete(named("two")),
            Act::Create(named("newer")),
            Act::Delete(named("one")),
            Act::Apply(named("new")),
            Act::Delete(named("new")),
        ];
        if layout.version == 3 {
            acts.insert(5, Act::Resize(sectors * 2 + 3));
            acts.insert(2, Act::Resize(sectors / 3 + 1));
        }
        if made.snapshots.is_empty() {
            // Resizing alone, in an image without snapshots.
            acts = vec![Act::Resize(sectors * 3), Act::Resize(5), Act::Resize(sectors)];
        }
        for (number, what) in (0..).zip(acts) {
            cut(&mut cuts, &disk, &what, seed * 16 + number);
            let engine = disk.engine(0, seed);
            let image = open(&engine, &disk, false).expect("opening");
            let bytes = read_all(&engine, &image).expect("reading");
            let mut tags = tags_of(0, &bytes).expect("sectors of one version each");
            let mut random = fastrand::Rng::with_seed(seed * 16 + number);
            write_some(&engine, &image, &mut tags, &mut random).expect("writing");
            block_on(&engine, image.close(&engine)).expect("close");
        }
    }
    let Cuts { points, exhaustive, before, after, went_on } = cuts;
    println!(
        "{test}: {points} power cuts, all subsets at {exhaustive} moments, {before} before and \
         {after} after the operation, {went_on} went on, {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    assert!(before > 0 && after > 0 && exhaustive > 0);
}

macro_rules! layouts {
    ($($name:ident: $count:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            histories(concat!("cuts::", stringify!($name)), $layout, $count);
        })*
    };
}

layouts! {
    clusters_of_512: 4, Layout::new(9, 96, Kind::Snapshots);
    clusters_of_512_with_wide_counts: 2,
        Layout::new(9, 150, Kind::Snapshots).with_refcount_bits(64);
    clusters_of_4_kib_with_counts_of_four_bits: 2,
        Layout::new(12, 320, Kind::Snapshots).with_refcount_bits(4);
    version_2: 4, Layout::new(9, 96, Kind::Snapshots).version_2();
    subclusters: 2, Layout::new(14, 600, Kind::Snapshots).extended();
    late_refcounts: 2, Layout::new(9, 96, Kind::Snapshots).lazy();
    sizes_alone: 6, Layout::new(9, 150, Kind::Plain);
    sizes_alone_with_clusters_of_64_kib: 2, Layout::new(16, 700, Kind::Plain);
    sizes_alone_in_version_2: 4, Layout::new(9, 150, Kind::Plain).version_2();
}
