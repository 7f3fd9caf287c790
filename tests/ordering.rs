//! Each rule of `src/qcow2/ORDERING.md`, asserted on traces of what the disk was told to do.
//!
//! A trace is replayed, and at each operation the rule is held against what is durable then.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use common::check::map;
use common::images::{IMAGE, Kind, Layout};
use common::qemu::Dir;
use common::replay::{Replay, apply, changed, index, targets};
use common::sectors::{SECTOR, Sectors, bytes_of};
use common::seeds::{Repeat, seeds};
use common::workers::{Mix, Run, open};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::mem::{Effect, Event, MemDisk, Stage};
use vhost_user_qcow2::storage::{Buf, Engine, FileId, Purpose, block_on};

#[path = "ordering/ahead.rs"]
mod ahead;
#[path = "ordering/create.rs"]
mod create;
#[path = "ordering/journal.rs"]
mod journal;
#[path = "ordering/lazy.rs"]
mod lazy;

const FILE: FileId = FileId(0);

/// Runs random requests on images of several layouts and holds each change against `rule`;
/// returns how often `rule` said that it had something to look at.
fn hold(test: &str, mix: Mix, rule: impl Fn(&Replay, &Event) -> usize) {
    let layouts = [
        Layout::new(9, 300, Kind::Plain),
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64),
        Layout::new(9, 300, Kind::Snapshots),
        Layout::new(12, 800, Kind::OverRaw(500)),
        Layout::new(12, 800, Kind::Compressed("zlib")),
    ];
    let mut looks = 0;
    for (number, layout) in (0..).zip(layouts) {
        let mut made = layout.make(1);
        for seed in seeds(12) {
            let _repeat = Repeat::new("ordering", test, seed);
            let disk = made.disk();
            disk.start_trace();
            let engines: Vec<Rc<dyn Engine>> = (0..2)
                .map(|lane| {
                    let engine = disk.engine(lane, seed * 2 + lane as u64);
                    engine.set_hold(3);
                    Rc::new(engine) as Rc<dyn Engine>
                })
                .collect();
            let image = open(engines[0].as_ref(), &disk, false).expect("open");
            let sectors = Sectors::new(&made.tags);
            let mut run = Run::new(image, engines, sectors, (seed + number, mix), (80, 6));
            run.finish();
            run.start_close();
            run.finish();
            let mut replay = Replay::new(&mut made);
            for event in disk.take_trace().into_iter().filter(|event| event.file == FILE) {
                replay.take(event, &mut |replay, event| looks += rule(replay, event));
            }
            assert!(replay.volatile == disk.content(FILE), "the replay is the disk");
        }
    }
    println!("{test}: held {looks} times");
    assert!(looks > 50, "the rule was hardly ever tried: {looks} times");
}

#[test]
fn r1_refcounts_are_durable_before_references() {
    hold("r1_refcounts_are_durable_before_references", Mix::default(), |replay, event| {
        if !matches!(event.why, Purpose::L2Write | Purpose::L1Write) {
            return 0;
        }
        let map = replay.map();
        let new = changed(replay, event);
        for target in new.iter().flat_map(|(_, entry)| targets(replay, *entry)) {
            let count = map.refcounts.get(index(target)).copied().unwrap_or(0);
            assert!(count > 0, "{event:?} refers to cluster {target:#x}, durable refcount 0");
        }
        new.len()
    });
}

#[test]
fn r2_content_is_durable_before_references() {
    // Each guest cluster is written once, so nothing is pending on a new cluster but its first
    // content, which holds the copied bytes around the guest's as well.
    for (number, kind) in (0..).zip([Kind::Plain, Kind::Snapshots, Kind::OverRaw(500)]) {
        let mut made = Layout::new(12, 800, kind).make(1);
        let mut looks = 0;
        for seed in seeds(20) {
            let _repeat = Repeat::new("ordering", "r2_content_is_durable_before_references", seed);
            let disk = made.disk();
            disk.start_trace();
            write_each_cluster_once(&disk, seed + number);
            let mut replay = Replay::new(&mut made);
            for event in disk.take_trace().into_iter().filter(|event| event.file == FILE) {
                replay.take(event, &mut |replay, event| {
                    if event.why != Purpose::L2Write {
                        return;
                    }
                    for (_, entry) in changed(replay, event) {
                        for target in targets(replay, entry) {
                            let early: Vec<_> = replay.pending(target).collect();
                            assert!(early.is_empty(), "linked before its bytes: {early:?}");
                            looks += 1;
                        }
                    }
                });
            }
        }
        assert!(looks > 100, "the rule was hardly ever tried: {looks} times");
    }
}

/// A part of every guest cluster is written, in random order by two workers, with flushes between.
fn write_each_cluster_once(disk: &MemDisk, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let engines = [disk.engine(0, seed), disk.engine(1, seed + 1)];
    let image = open(&engines[0], disk, false).expect("open");
    engines.iter().for_each(|engine| engine.set_hold(3));
    let mut order: Vec<usize> = (0..100).collect();
    random.shuffle(&mut order);
    let mut tasks: TaskSet<Pin<Box<dyn Future<Output = ()> + '_>>> = TaskSet::new(8, || {});
    loop {
        let lane = random.usize(0..2);
        if tasks.has_room() && random.u8(0..4) == 0 {
            let flush = image.flush(&engines[lane]);
            tasks.spawn(Box::pin(async { flush.await.expect("flush") }));
        } else if tasks.has_room()
            && let Some(cluster) = order.pop()
        {
            let sector = cluster * 8 + random.usize(0..4);
            let (image, engine) = (&image, &engines[lane]);
            tasks.spawn(Box::pin(async move {
                write(image, engine, sector, &bytes_of(sector, &[9; 4])).await;
            }));
        }
        tasks.run_ready();
        for engine in &engines {
            engine.reap();
        }
        if order.is_empty() && tasks.is_idle() {
            return;
        }
    }
}

/// Whether every first content of a table cluster is durable.
fn is_initialised(replay: &Replay, why: Purpose, cluster: u64) -> bool {
    // A table that was never filled would lie behind the end of the durable file.
    let inside = replay.durable.len() as u64 >= (cluster + 1) * replay.cluster;
    inside && !replay.pending(cluster).any(|change| change.why == why)
}

#[test]
fn r3_tables_are_durable_before_their_parents() {
    hold("r3_tables_are_durable_before_their_parents", Mix::default(), |replay, event| {
        let why = match event.why {
            Purpose::L1Write => Purpose::L2Init,
            Purpose::ReftableWrite => Purpose::RefblockInit,
            _ => return 0,
        };
        let new = changed(replay, event);
        for target in new.iter().flat_map(|(_, entry)| targets(replay, *entry)) {
            assert!(is_initialised(replay, why, target), "{target:#x} is named by {:?}", event.why);
        }
        new.len()
    });
}

#[test]
fn r4_blocks_are_reachable_before_what_they_count() {
    // That an entry's block is reachable is part of R1, whose refcounts are read through the
    // durable refcount table. Here: no entry of that table may land before that of the block
    // which counts its own block.
    let test = "r4_blocks_are_reachable_before_what_they_count";
    hold(test, Mix::default(), |replay, event| {
        let table = u64::from_be_bytes(replay.durable[48..56].try_into().expect("eight bytes"));
        let inside = event.at >= table && event.at < table + 8 * replay.cluster;
        if event.why != Purpose::ReftableWrite || !inside {
            return 0;
        }
        let mut after = replay.durable.clone();
        apply(&mut after, event);
        let after = map(&after);
        let new = changed(replay, event);
        for target in new.iter().flat_map(|(_, entry)| targets(replay, *entry)) {
            assert!(after.refcounts[index(target)] > 0, "block {target:#x} is not counted");
        }
        new.len()
    });
}

#[test]
fn r5_a_moved_refcount_table_is_complete_before_the_header_names_it() {
    let mut moves = 0;
    let mut made = Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64).make(1);
    let disk = made.disk();
    disk.start_trace();
    let engine = disk.engine(0, 1);
    let image = open(&engine, &disk, false).expect("open");
    for at in (0..3600).step_by(100) {
        let bytes = bytes_of(at, &[7; 100]);
        block_on(&engine, write(&image, &engine, at, &bytes));
        block_on(&engine, image.write_zeroes(&engine, guest(at), 50 * 512, true)).expect("zero");
    }
    block_on(&engine, image.close(&engine)).expect("close");
    let mut replay = Replay::new(&mut made);
    let old = u64::from_be_bytes(replay.durable[48..56].try_into().expect("eight bytes"));
    for event in disk.take_trace() {
        replay.take(event, &mut |replay, event| {
            if event.why != Purpose::HeaderWrite {
                let freed = event.why == Purpose::GuestDiscard
                    && event.at <= old
                    && old < event.at + event.len;
                let now = &replay.durable[48..56];
                assert!(!freed || now != old.to_be_bytes(), "the header still names the old table");
                return;
            }
            moves += 1;
            assert_eq!((event.at, event.len), (48, 12), "one field inside one sector");
            let before = replay.map();
            let mut after = replay.durable.clone();
            apply(&mut after, event);
            let after = map(&after);
            for (cluster, (old, new)) in before.refcounts.iter().zip(&after.refcounts).enumerate() {
                assert!(new >= old, "cluster {cluster:#x} loses its refcount by the move");
            }
            let counted = after.refcounts.iter().zip(&after.references);
            let low = counted.filter(|(count, references)| **count < u64::from(**references));
            assert_eq!(low.count(), 0, "clusters in use are free by the new table");
        });
    }
    assert!(moves > 0, "the table has never moved");
}

#[test]
fn r6_nothing_is_freed_or_reused_before_its_unlinking_is_durable() {
    let mix = Mix { read: 0, write: 8, zero: 4, discard: 5, flush: 3, longest: 60 };
    let test = "r6_nothing_is_freed_or_reused_before_its_unlinking_is_durable";
    hold(test, mix, |replay, event| {
        let clusters = event.at / replay.cluster..=(event.at + event.len - 1) / replay.cluster;
        match (&event.effect, event.why) {
            (_, Purpose::GuestDiscard | Purpose::L2Init | Purpose::RefblockInit) => {
                let map = replay.map();
                for cluster in clusters.clone() {
                    let references = map.references.get(index(cluster)).copied().unwrap_or(0);
                    assert_eq!(references, 0, "cluster {cluster:#x} is in use: {:?}", event.why);
                }
                clusters.count()
            }
            (_, Purpose::RefblockWrite) => {
                let mut after = replay.durable.clone();
                apply(&mut after, event);
                let after = map(&after);
                let low = after.refcounts.iter().zip(&after.references);
                let low = low.filter(|(count, references)| **count < u64::from(**references));
                assert_eq!(low.count(), 0, "a refcount is lowered too early");
                1
            }
            (Effect::Write(bytes), Purpose::GuestWrite) => owners(replay, event.at, bytes),
            _ => 0,
        }
    });
}

/// Each sector that is written says whose it is: its cluster may be another guest cluster's in
/// the durable tables of nobody else.
fn owners(replay: &Replay, at: u64, bytes: &[u8]) -> usize {
    let map = replay.map();
    let mut looks = 0;
    for (step, sector) in bytes.chunks_exact(SECTOR).enumerate() {
        let word = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
        if word == 0 {
            continue;
        }
        let own = (word & 0xffff_ffff) * 512 / replay.cluster;
        let host = (at + step as u64 * 512) / replay.cluster * replay.cluster;
        let owner = map.guest.iter().position(|&place| place == Some(host));
        assert!(
            owner.is_none_or(|owner| owner as u64 == own),
            "guest cluster {own} is written over {owner:?} at {host:#x}"
        );
        looks += 1;
    }
    looks
}

fn guest(sector: usize) -> GuestOffset {
    GuestOffset((sector * SECTOR) as u64)
}

async fn write(image: &Image, engine: &dyn Engine, sector: usize, bytes: &[u8]) {
    image.write(engine, guest(sector), Buf::copy_of(bytes)).await.expect("write");
}

fn poll<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn submitted(trace: &[Event], why: Purpose) -> Vec<&Event> {
    trace.iter().filter(|event| event.stage == Stage::Submitted && event.why == why).collect()
}

/// An image, one cluster of it written and durable, and where that cluster lies.
fn one_cluster() -> (MemDisk, Image, u64) {
    let disk = Layout::new(12, 800, Kind::Empty).make(0).disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("open");
    disk.start_trace();
    block_on(&engine, write(&image, &engine, 0, &bytes_of(0, &[5; 8])));
    block_on(&engine, image.flush(&engine)).expect("flush");
    let at = submitted(&disk.take_trace(), Purpose::GuestWrite)[0].at;
    (disk, image, at)
}

#[test]
fn r7_a_cluster_rests_until_those_who_may_look_at_it_have_ended() {
    for slow_write in [false, true] {
        let (disk, image, at) = one_cluster();
        let (slow, fast) = (disk.engine(1, 0), disk.engine(2, 0));
        let buf = Buf::copy_of(&bytes_of(0, &[6; 8]));
        let mut read = Box::pin(image.read(&slow, guest(0), buf.clone()));
        let mut overwrite = Box::pin(image.write(&slow, guest(0), buf.clone()));
        let pending = if slow_write {
            poll(&mut overwrite).is_pending()
        } else {
            poll(&mut read).is_pending()
        };
        assert!(pending, "its operation has not ended");
        let churn = async || {
            for step in 1..20 {
                write(&image, &fast, step * 8, &bytes_of(step * 8, &[9; 8])).await;
                image.flush(&fast).await.expect("flush");
            }
        };
        block_on(&fast, async {
            image.discard(&fast, guest(0), 4096).await.expect("discard");
            churn().await;
        });
        let touches = |event: &&Event| event.at <= at && at < event.at + event.len;
        let trace = disk.take_trace();
        let changes = trace.iter().filter(|event| event.effect != Effect::None).filter(touches);
        let own = usize::from(slow_write);
        assert_eq!(changes.count(), own, "the cluster was touched under a slow request");
        if slow_write {
            block_on(&slow, overwrite).expect("the write ends");
        } else {
            block_on(&slow, read).expect("the read ends");
            assert!(buf.to_vec() == bytes_of(0, &[5; 8]), "the read saw another's bytes");
        }
        block_on(&fast, churn());
        let trace = disk.take_trace();
        let freed = submitted(&trace, Purpose::GuestDiscard).into_iter().filter(touches).count();
        assert!(freed > 0, "the cluster was never given back");
    }
}

#[test]
fn r7_holds_for_a_table_that_a_write_zeroes_looks_at() {
    // A table of two slices, so that the loads of two requests do not wait for each other; it must
    // be copied although its refcount is one, since its flag says that it is shared.
    let second = 1 << 16;
    let disk = Layout::new(16, second + 4096, Kind::Empty).make(0).disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("open");
    block_on(&engine, write(&image, &engine, 0, &bytes_of(0, &[5; 128])));
    block_on(&engine, image.close(&engine)).expect("close");
    let mut bytes = disk.content(FILE);
    let l1 = index(u64::from_be_bytes(bytes[40..48].try_into().expect("eight bytes")));
    bytes[l1] &= 0x7f;
    let table = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().expect("eight bytes"));
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let (slow, fast) = (disk.engine(1, 0), disk.engine(2, 0));
    let image = open(&fast, &disk, false).expect("open");
    let mut zero = Box::pin(image.write_zeroes(&slow, guest(1), 512, false));
    disk.start_trace();
    assert!(poll(&mut zero).is_pending(), "the table is being loaded");
    block_on(&fast, async {
        for step in 1..20 {
            let sector = second + step * 128;
            write(&image, &fast, sector, &bytes_of(sector, &[9; 128])).await;
            image.flush(&fast).await.expect("flush");
        }
    });
    let touches = |event: &&Event| event.at <= table && table < event.at + event.len;
    let trace = disk.take_trace();
    let changes = trace.iter().filter(|event| event.effect != Effect::None).filter(touches);
    assert_eq!(changes.count(), 0, "the table was touched under a slow request");
    block_on(&slow, zero).expect("the write-zeroes ends");
    block_on(&fast, image.close(&fast)).expect("close");
    let trace = disk.take_trace();
    let freed = submitted(&trace, Purpose::GuestDiscard).into_iter().filter(touches).count();
    assert!(freed > 0, "the table was never given back");
}

#[test]
fn r8_an_entry_changes_only_after_its_cluster_was_written() {
    let (disk, image, _) = one_cluster();
    let (slow, fast) = (disk.engine(1, 0), disk.engine(2, 0));
    let mut pending = Box::pin(image.write(&slow, guest(80), Buf::copy_of(&[1; 512])));
    while submitted(&disk.take_trace(), Purpose::GuestWrite).is_empty() {
        assert!(poll(&mut pending).is_pending(), "the write was not submitted yet");
    }
    block_on(&fast, image.flush(&fast)).expect("flush");
    let trace = disk.take_trace();
    assert!(submitted(&trace, Purpose::L2Write).is_empty(), "an entry without its bytes");
    let buf = Buf::copy_of(&[3; 512]);
    block_on(&fast, image.read(&fast, guest(80), buf.clone())).expect("read");
    assert_eq!(buf.to_vec(), [0; 512], "a reader sees the new cluster too early");
    block_on(&slow, pending).expect("the write ends");
    block_on(&fast, image.flush(&fast)).expect("flush");
    assert!(!submitted(&disk.take_trace(), Purpose::L2Write).is_empty());
}

#[test]
fn r9_shared_clusters_are_never_overwritten() {
    let mut made = Layout::new(9, 300, Kind::Snapshots).make(2);
    let before = map(made.image());
    let disk = made.disk();
    disk.start_trace();
    let engine: Rc<dyn Engine> = Rc::new(disk.engine(0, 0));
    let image = open(engine.as_ref(), &disk, false).expect("open");
    let sectors = Sectors::new(&made.tags);
    let mix = Mix { discard: 0, ..Mix::default() };
    let mut run = Run::new(image, vec![engine], sectors, (0, mix), (500, 4));
    run.finish();
    let trace = disk.take_trace();
    let writes = |event: &Event| !matches!(event.effect, Effect::None | Effect::Length);
    let shared = |cluster: u64| before.refcounts.get(index(cluster)).is_some_and(|&it| it > 1);
    assert!((0..before.refcounts.len() as u64).any(shared), "nothing was shared");
    for event in trace.iter().filter(|event| writes(event) && event.len > 0) {
        let refblock = event.why == Purpose::RefblockWrite;
        let mut clusters = event.at / 512..=(event.at + event.len - 1) / 512;
        assert!(refblock || !clusters.any(shared), "{event:?} lands in a shared cluster");
    }
}

#[test]
fn r10_the_image_says_durably_what_becomes_stale_before_the_first_change() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "1M"]);
    dir.img(&["bitmap", "--add", IMAGE, "changes"]);
    let disk = MemDisk::new();
    let mut bytes = dir.read(IMAGE);
    assert_eq!(bytes[95] & 1, 1, "qemu-img has set the bit of bitmaps");
    // A bit that nobody knows yet.
    bytes[90] |= 4;
    disk.add(IMAGE, bytes);
    disk.start_trace();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("open");
    let read = Buf::zeroed(512);
    block_on(&engine, image.read(&engine, guest(0), read)).expect("read");
    assert!(disk.take_trace().iter().all(|event| event.effect == Effect::None), "only reads");
    block_on(&engine, write(&image, &engine, 0, &[1; 512]));
    let trace = disk.take_trace();
    let mut changes = trace.iter().filter(|event| event.effect != Effect::None);
    let mut next = || changes.next().map(|event| (event.stage, event.why)).expect("an event");
    assert_eq!(next(), (Stage::Submitted, Purpose::HeaderWrite));
    assert_eq!(next(), (Stage::Finished, Purpose::HeaderWrite));
    assert_eq!(next(), (Stage::Submitted, Purpose::SyncHeader));
    assert_eq!(next(), (Stage::Finished, Purpose::SyncHeader));
    assert_eq!(next(), (Stage::Submitted, Purpose::DirectoryWrite));
    assert_eq!(next(), (Stage::Finished, Purpose::DirectoryWrite));
    assert_eq!(next(), (Stage::Submitted, Purpose::SyncDirectory));
    assert_eq!(next(), (Stage::Finished, Purpose::SyncDirectory));
    let header = submitted(&trace, Purpose::HeaderWrite)[0];
    assert_eq!((header.at, header.len), (72, 24), "the feature bits alone are written");
    let durable = disk.crash_exactly(0).content(FILE);
    assert_eq!(durable[88..96], [0, 0, 0, 0, 0, 0, 0, 1], "cleared durably, but that of bitmaps");
    let directory = submitted(&trace, Purpose::DirectoryWrite)[0];
    let flags = index(directory.at + 12);
    assert_eq!(durable[flags..flags + 4], [0, 0, 0, 3], "enabled, and durably in use");
}

#[test]
fn r11_a_flush_syncs_what_was_answered_before_it() {
    for kind in [Kind::Plain, Kind::DataFile { raw: false }] {
        let made = Layout::new(12, 800, kind).make(1);
        let disk = made.disk();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, false).expect("open");
        disk.start_trace();
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..100 {
            let mut wrote = false;
            for _ in 0..random.usize(0..3) {
                let at = random.usize(0..792);
                block_on(&engine, write(&image, &engine, at, &bytes_of(at, &[round; 8])));
                wrote = true;
            }
            let before = disk.take_trace();
            block_on(&engine, image.flush(&engine)).expect("flush");
            let trace = disk.take_trace();
            let data = submitted(&before, Purpose::GuestWrite).iter().map(|event| event.file).max();
            let synced = submitted(&trace, Purpose::SyncData).iter().any(|e| Some(e.file) == data);
            assert_eq!(wrote, synced, "{kind:?}, round {round}: {trace:?}");
            assert!(disk.crash_exactly(0).files() == disk.files(), "{kind:?}: all is durable");
        }
    }
}

#[test]
fn r12_after_a_failed_sync_nothing_is_acknowledged() {
    let purposes =
        [Purpose::SyncData, Purpose::SyncTables, Purpose::L2Write, Purpose::RefblockWrite];
    for purpose in purposes {
        let disk = Layout::new(12, 800, Kind::Empty).make(0).disk();
        let faults = Faults::new();
        let engine = Fault::new(disk.engine(0, 0), faults.clone());
        let image = open(&engine, &disk, false).expect("open");
        faults.add(Rule { purpose: Some(purpose), ..Rule::fail(1, 5) });
        block_on(&engine, write(&image, &engine, 0, &[1; 512]));
        let flush = block_on(&engine, image.flush(&engine));
        assert_eq!(faults.fired(), 1, "{purpose:?}");
        flush.expect_err("the flush that fails");
        for _ in 0..3 {
            let buf = Buf::copy_of(&[2; 512]);
            let write = block_on(&engine, image.write(&engine, guest(0), buf));
            write.expect_err("a write after the failure");
            block_on(&engine, image.flush(&engine)).expect_err("a flush after the failure");
            let zero = block_on(&engine, image.write_zeroes(&engine, guest(0), 4096, true));
            zero.expect_err("a write-zeroes after the failure");
        }
        block_on(&engine, image.close(&engine)).expect_err("the close says so as well");
    }
}

#[test]
fn r12_holds_for_the_autoclear_bits() {
    for purpose in [Purpose::HeaderWrite, Purpose::SyncHeader] {
        let mut made = Layout::new(12, 800, Kind::Plain).make(0);
        made.image()[88] = 4;
        let disk = made.disk();
        let faults = Faults::new();
        let engine = Fault::new(disk.engine(0, 0), faults.clone());
        let image = open(&engine, &disk, false).expect("open");
        faults.add(Rule { purpose: Some(purpose), ..Rule::fail(1, 5) });
        for _ in 0..3 {
            let buf = Buf::copy_of(&[2; 512]);
            let write = block_on(&engine, image.write(&engine, guest(0), buf));
            write.expect_err("the write that fails, and all after it");
        }
        assert_eq!(faults.fired(), 1, "{purpose:?}");
    }
}

#[test]
fn a_flush_costs_no_sync_when_clean_one_for_overwrites_two_for_new_clusters() {
    let (disk, image, _) = one_cluster();
    let engine = disk.engine(0, 0);
    let syncs = |sector: Option<usize>| {
        if let Some(sector) = sector {
            block_on(&engine, write(&image, &engine, sector, &[3; 512]));
        }
        block_on(&engine, image.flush(&engine)).expect("flush");
        let trace = disk.take_trace();
        let ended = trace.iter().filter(|e| e.stage == Stage::Finished && e.effect == Effect::Sync);
        ended.count()
    };
    assert_eq!(syncs(None), 0, "clean");
    assert_eq!(syncs(Some(3)), 1, "an overwrite");
    assert_eq!(syncs(Some(80)), 2, "a new cluster");
    assert_eq!(syncs(None), 0, "clean again");
}
