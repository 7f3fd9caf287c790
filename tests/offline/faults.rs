//! Each operation of the host under each offline operation fails once: the offline operation has
//! happened or has not, nothing is lost, and what is wrong is no more than a leak.

use common::check::check_interrupted;
use common::images::{IMAGE, Kind, Layout};
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::fault::{Fate, Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::cuts::{copy, go_on, look};
use crate::disk::{Act, act};

/// The `nth` operation of the host fails; says whether there was one.
fn fail(disk: &MemDisk, what: &Act, nth: u64, fate: Fate) -> bool {
    let before = look(disk);
    let whole = copy(disk);
    act(&whole, what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
    let after = look(&whole);
    let failed = copy(disk);
    let faults = Faults::new();
    faults.add(Rule { fate, ..Rule::fail(nth, 5) });
    let engine = Fault::new(failed.engine(0, nth), faults.clone());
    let result = block_on(&engine, what.run(&engine, &failed, nth.is_multiple_of(2)));
    for (number, disk) in [failed.crash(nth), failed].into_iter().enumerate() {
        let report = disk.look(IMAGE, check_interrupted).expect("the image");
        assert!(report.corruptions.is_empty(), "operation {nth}: {:?}", report.corruptions);
        let now = look(&disk);
        let happened = now == after;
        assert!(happened || now == before, "operation {nth}: a state between");
        assert!(happened || result.is_err(), "operation {nth}: it says that all is well");
        if nth.is_multiple_of(5) {
            go_on(&disk, &now, nth * 2 + number as u64);
        }
    }
    faults.fired() > 0
}

fn each(test: &str, layout: Layout, acts: &[Act]) {
    let made = layout.make(4);
    for seed in seeds(1) {
        let _repeat = Repeat::new("offline", test, seed);
        let mut count = 0;
        let disk = made.disk();
        for what in acts {
            let mut nth = 1;
            while fail(&disk, what, nth, Fate::Fail(5)) {
                fail(&disk, what, nth, Fate::Short { bytes: 512, errno: 28 });
                nth += 1;
                count += 2;
            }
            act(&disk, what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
        }
        println!("{test}: {count} failures");
        assert!(count > 100);
    }
}

fn named(name: &str) -> String {
    name.to_owned()
}

#[test]
fn snapshots() {
    let layout = Layout::new(9, 96, Kind::Snapshots);
    let acts = [
        Act::Create(named("new")),
        Act::Apply(named("one")),
        Act::Delete(named("two")),
        Act::Delete(named("one")),
    ];
    each("faults::snapshots", layout, &acts);
}

#[test]
fn sizes() {
    let layout = Layout::new(9, 96, Kind::Snapshots);
    let acts = [Act::Resize(500), Act::Apply(named("one")), Act::Resize(37)];
    each("faults::sizes", layout, &acts);
}
