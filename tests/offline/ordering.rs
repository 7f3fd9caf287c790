//! The rules of `src/qcow2/ORDERING.md` on snapshots and sizes, held against traces: each change is
//! seen as it is submitted, beside what is surely durable then.

use common::check::{check_interrupted, map};
use common::images::{IMAGE, Kind, Layout};
use common::replay::{Replay, apply, changed, index, targets};
use common::sectors::SECTOR;
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::storage::mem::{Effect, Event, Stage};
use vhost_user_qcow2::storage::{Engine, FileId, Purpose, block_on};

use crate::disk::{Act, Contents, contents};

const COPIED: u64 = 1 << 63;
const SECTORS: usize = 150;

fn acts() -> [Act; 9] {
    let named = |name: &str| name.to_owned();
    [
        Act::Create(named("new")),
        Act::Resize(SECTORS * 3),
        Act::Create(named("large")),
        Act::Apply(named("one")),
        Act::Delete(named("one")),
        Act::Resize(SECTORS / 2),
        Act::Delete(named("two")),
        Act::Apply(named("new")),
        Act::Delete(named("new")),
    ]
}

/// Runs each operation on several layouts and shows each change of each trace to `rule`, which says
/// how often it had something to look at.
fn hold(test: &str, mut rule: impl FnMut(&Act, &Replay, &Event) -> usize) {
    let layouts = [
        Layout::new(9, SECTORS, Kind::Snapshots),
        Layout::new(9, SECTORS, Kind::Snapshots).with_refcount_bits(64),
        Layout::new(12, SECTORS, Kind::Snapshots).with_refcount_bits(4),
        Layout::new(9, SECTORS, Kind::Snapshots).lazy(),
    ];
    let mut looks = 0;
    for layout in layouts {
        let mut made = layout.make(2);
        for seed in seeds(3) {
            let _repeat = Repeat::new("offline", test, seed);
            let disk = made.disk();
            let engine = disk.engine(0, seed);
            engine.set_hold(3);
            disk.start_trace();
            let mut replay = Replay::new(&mut made);
            for act in acts() {
                let done = block_on(&engine, act.run(&engine, &disk, seed == 1));
                done.unwrap_or_else(|error| panic!("{act:?}: {error}"));
                for event in disk.take_trace() {
                    assert_eq!(event.file, FileId(0));
                    replay.take(event, &mut |replay, event| looks += rule(&act, replay, event));
                }
            }
            assert!(!engine.is_busy());
            assert!(Some(&replay.volatile) == disk.content_of(IMAGE).as_ref(), "all was replayed");
            assert!(replay.durable == replay.volatile, "all is durable at the end");
        }
    }
    println!("{test}: held {looks} times");
    assert!(looks > 50, "the rule was hardly ever tried: {looks} times");
}

/// The header's fields that a change of the header writes: place and length.
fn field(event: &Event) -> Option<(u64, u64)> {
    (event.why == Purpose::HeaderWrite).then_some((event.at, event.len))
}

/// The durable image before and after a change.
fn around(replay: &Replay, event: &Event) -> (Vec<u8>, Vec<u8>) {
    let mut after = replay.durable.clone();
    apply(&mut after, event);
    (replay.durable.clone(), after)
}

/// The change of the header brings the image from one whole state to another.
fn switch(replay: &Replay, event: &Event) -> (Contents, Contents) {
    let (before, after) = around(replay, event);
    let report = check_interrupted(&after);
    assert!(report.corruptions.is_empty(), "{event:?}: {:?}", report.corruptions);
    (contents(&before), contents(&after))
}

#[test]
fn r15_a_snapshot_is_complete_before_the_header_names_it() {
    let test = "ordering::r15_a_snapshot_is_complete_before_the_header_names_it";
    hold(test, |act, replay, event| {
        let (Act::Create(name), Some((60, 12))) = (act, field(event)) else { return 0 };
        let (before, after) = switch(replay, event);
        let mut expected = before.clone();
        expected.snapshots.push((name.clone(), before.disk));
        assert!(after == expected, "{name:?} is not what the disk is");
        // All clusters of the new snapshot are counted for it, and none of them says COPIED.
        let (_, bytes) = around(replay, event);
        let map = map(&bytes);
        let low = map.refcounts.iter().zip(&map.references);
        assert_eq!(low.filter(|(count, users)| **count < u64::from(**users)).count(), 0);
        map.references.iter().filter(|users| **users > 1).count()
    });
}

#[test]
fn r16_nothing_is_released_before_the_header_has_let_it_go() {
    let test = "ordering::r16_nothing_is_released_before_the_header_has_let_it_go";
    hold(test, |_, replay, event| {
        let (_, after) = around(replay, event);
        match event.why {
            Purpose::RefblockWrite | Purpose::ReftableWrite => {
                let map = map(&after);
                let counts = map.refcounts.iter().zip(&map.references);
                let low = counts.filter(|(count, users)| **count < u64::from(**users)).count();
                assert_eq!(low, 0, "a refcount is lowered too early: {:?}", event.why);
                1
            }
            Purpose::GuestDiscard | Purpose::L1Init | Purpose::SnapshotWrite | Purpose::L2Init => {
                let clusters =
                    event.at / replay.cluster..=(event.at + event.len - 1) / replay.cluster;
                let map = replay.map();
                for cluster in clusters {
                    let users = map.references.get(index(cluster)).copied().unwrap_or(0);
                    assert_eq!(users, 0, "{:?} hits cluster {cluster:#x}", event.why);
                }
                1
            }
            _ => 0,
        }
    });
}

#[test]
fn r16_copied_is_set_only_where_the_durable_refcount_is_one() {
    let test = "ordering::r16_copied_is_set_only_where_the_durable_refcount_is_one";
    hold(test, |_, replay, event| {
        if !matches!(event.why, Purpose::L2Write | Purpose::L1Write) {
            return 0;
        }
        let map = replay.map();
        let set = changed(replay, event).into_iter().filter(|(_, entry)| entry & COPIED != 0);
        let mut looks = 0;
        for target in set.flat_map(|(_, entry)| targets(replay, entry)) {
            assert_eq!(map.refcounts.get(index(target)), Some(&1), "COPIED on {target:#x}");
            looks += 1;
        }
        looks
    });
}

#[test]
fn r17_the_disk_goes_back_by_one_write_of_the_header() {
    let mut writes = Vec::new();
    let test = "ordering::r17_the_disk_goes_back_by_one_write_of_the_header";
    hold(test, |act, replay, event| {
        let Act::Apply(name) = act else { return 0 };
        let Some((at, len)) = field(event).filter(|&(at, _)| at != 72) else { return 0 };
        assert_eq!((at, len), (24, 24), "size and L1 table together");
        writes.push(name.clone());
        let (before, after) = switch(replay, event);
        let held = before.snapshots.iter().find(|(one, _)| one == name).expect("it exists");
        assert!(after.disk == held.1, "the disk is not what {name:?} holds");
        assert!(after.snapshots == before.snapshots, "a snapshot has changed");
        after.disk.len() / SECTOR
    });
    assert_eq!(writes.len() as u64, 2 * 4 * (seeds(3).end - seeds(3).start), "once each");
}

#[test]
fn r18_a_disk_grows_after_its_tables_and_shrinks_before_them() {
    let mut shrinking = None;
    let test = "ordering::r18_a_disk_grows_after_its_tables_and_shrinks_before_them";
    hold(test, |act, replay, event| {
        let Act::Resize(sectors) = act else { return 0 };
        let size = sectors * SECTOR;
        match field(event) {
            Some((24, 8)) => {
                let (before, after) = switch(replay, event);
                let mut expected = before.clone();
                expected.disk.resize(size, 0);
                assert!(after == expected, "the disk is not what it was, cut or filled");
                shrinking = Some(size < before.disk.len());
                size / SECTOR
            }
            Some((36, 12)) => {
                let (before, after) = switch(replay, event);
                assert!(after == before, "the L1 table's move changes nothing");
                size / SECTOR
            }
            _ => {
                let now = contents(&replay.durable).disk.len();
                let drops = matches!(event.why, Purpose::L2Write | Purpose::L1Write);
                assert!(!(drops && now > size), "{:?} while the disk is larger", event.why);
                usize::from(drops)
            }
        }
    });
    assert_eq!(shrinking, Some(true));
}

#[test]
fn fields_of_the_header_are_written_alone_and_synced_before_anything_else() {
    let mut waiting: Option<Event> = None;
    let test = "ordering::fields_of_the_header_are_written_alone_and_synced_before_anything_else";
    let mut fields = Vec::new();
    hold(test, |_, replay, event| {
        if let Some(header) = waiting.take() {
            let at = header.at..header.at + header.len;
            let Effect::Write(bytes) = &header.effect else { panic!("a write") };
            assert!(replay.durable_at(at.start, header.len) == *bytes, "{event:?} came too early");
        }
        assert!(
            event.at > 0 || event.effect == Effect::Length,
            "the header's start is not written"
        );
        let Some((at, len)) = field(event) else { return 0 };
        assert_eq!(event.stage, Stage::Submitted);
        assert!(at + len <= 512);
        fields.push((at, len));
        waiting = Some(event.clone());
        1
    });
    fields.sort_unstable();
    fields.dedup();
    let moved = [(24, 8), (24, 24), (36, 12), (60, 12)];
    assert!(moved.iter().all(|field| fields.contains(field)), "{fields:?}");
}
