//! Subclusters: every kind of request on every state of a cluster, and the states that QEMU and we
//! leave.

use common::images::IMAGE;
use common::qemu::Dir;
use common::seeds::{Repeat, seeds};

use crate::stage::Act::{Discard, Unmap, Write, Zero};
use crate::stage::{Act, BACKED, KIB, MIB, Stage, base};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const CLUSTER: u64 = 64 * KIB;
const PIECE: u64 = 2 * KIB;

fn stage(backed: bool, size: u64) -> Stage {
    let dir = if backed { base(size, &[Write(0, size, 50)]) } else { Dir::new() };
    let name = if backed { format!(",{BACKED}") } else { String::new() };
    Stage::windowed(dir, &format!("extended_l2=on{name}"), size, 0..size)
}

/// Whether a cluster has a place, and which of its subclusters are allocated and are zeros.
fn state(stage: &Stage, cluster: u64) -> (bool, u32, u32) {
    let l2 = stage.word(stage.word(40)) & OFFSET_MASK;
    if l2 == 0 {
        return (false, 0, 0);
    }
    let at = l2 + cluster * 16;
    let bitmap = stage.word(at + 8);
    let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).expect("half a word");
    (stage.word(at) & OFFSET_MASK != 0, half(bitmap), half(bitmap >> 32))
}

/// The first states of a cluster: how it came to be.
fn starts() -> Vec<(&'static str, Vec<Act>)> {
    vec![
        ("nothing", vec![]),
        ("data", vec![Write(0, CLUSTER, 1)]),
        ("some data", vec![Write(4 * PIECE, 3 * PIECE, 1), Write(20 * PIECE, PIECE, 2)]),
        ("zeros", vec![Unmap(0, CLUSTER)]),
        ("zeros with a place", vec![Write(0, CLUSTER, 1), Zero(0, CLUSTER)]),
        ("some zeros", vec![Zero(2 * PIECE, 5 * PIECE)]),
        ("both", vec![Write(3 * PIECE, 9 * PIECE, 1), Zero(7 * PIECE, 8 * PIECE)]),
    ]
}

/// What is then asked of it.
fn requests() -> Vec<Act> {
    vec![
        Write(0, 512, 9),
        Write(5 * PIECE, PIECE, 9),
        Write(5 * PIECE - 512, 1024, 9),
        Write(6 * PIECE + 512, 10 * PIECE, 9),
        Write(0, CLUSTER, 9),
        Write(30 * PIECE, 5 * PIECE, 9),
        Zero(0, CLUSTER),
        Zero(5 * PIECE, 2 * PIECE),
        Zero(5 * PIECE + 512, 4 * PIECE),
        Unmap(0, CLUSTER),
        Unmap(8 * PIECE, 16 * PIECE),
        Unmap(30 * PIECE, 6 * PIECE),
        Discard(0, CLUSTER),
        Discard(16 * PIECE, 16 * PIECE),
        Discard(16 * PIECE, CLUSTER),
    ]
}

/// An act at another place.
fn moved(act: Act, by: u64) -> Act {
    match act {
        Write(at, len, byte) => Write(at + by, len, byte),
        Zero(at, len) => Zero(at + by, len),
        Unmap(at, len) => Unmap(at + by, len),
        Discard(at, len) => Discard(at + by, len),
    }
}

#[test]
fn every_request_on_every_state() {
    for backed in [false, true] {
        // Each case has two clusters, and a third that nobody touches.
        let (mut prepare, mut act, mut cases) = (Vec::new(), Vec::new(), Vec::new());
        for (name, start) in starts() {
            for request in requests() {
                let by = cases.len() as u64 * 3 * CLUSTER;
                prepare.extend(start.iter().map(|&step| moved(step, by)));
                act.push(moved(request, by));
                cases.push((name, request));
            }
        }
        let size = cases.len() as u64 * 3 * CLUSTER;
        let mut ours = stage(backed, size);
        ours.theirs(&prepare);
        let mut theirs = Stage::around(ours.copy(), 0..size);
        ours.ours(&act);
        ours.judge();
        theirs.theirs(&act);
        theirs.judge();
        for ((name, request), number) in cases.into_iter().zip(0..) {
            let both = |stage: &Stage| [0, 1].map(|next| state(stage, number * 3 + next));
            let (we, they) = (both(&ours), both(&theirs));
            let context = format!("{name}, backed {backed}, {request:?}: {we:x?}, QEMU {they:x?}");
            for (we, they) in we.into_iter().zip(they) {
                // The same subclusters hold data. Zeros may be said in another way: where nothing
                // lies below, no entry is as good, and QEMU keeps a place that we give up.
                assert!(we.1 == they.1 && (they.0 || !we.0), "{context}");
            }
        }
    }
}

#[test]
fn a_write_over_two_clusters_allocates_what_it_touches() {
    for backed in [false, true] {
        let mut stage = stage(backed, MIB);
        stage.ours(&[Write(CLUSTER - PIECE - 512, 2 * PIECE, 1)]);
        assert_eq!(state(&stage, 0), (true, 0b11 << 30, 0));
        assert_eq!(state(&stage, 1), (true, 0b1, 0));
        stage.judge();
        // Next to what is there, and over it.
        stage.ours(&[
            Write(CLUSTER + 3 * PIECE, PIECE, 2),
            Write(CLUSTER - 4 * PIECE, 3 * PIECE, 3),
        ]);
        assert_eq!(state(&stage, 0), (true, 0b1111 << 28, 0));
        assert_eq!(state(&stage, 1), (true, 0b1001, 0));
        stage.judge();
    }
}

#[test]
fn compressed_clusters_have_no_subclusters_until_they_are_written_to() {
    let mut stage = stage(true, MIB);
    let commands = ["write -q -c -P 7 0 128k".to_owned()];
    stage.dir.io(IMAGE, &commands);
    stage.expect(&[Write(0, 2 * CLUSTER, 7)]);
    stage.judge();
    stage.ours(&[Write(5 * PIECE, 512, 1)]);
    let (placed, allocated, zeros) = state(&stage, 0);
    assert!(placed && allocated == u32::MAX && zeros == 0, "{allocated:x} {zeros:x}");
    stage.ours(&[Zero(CLUSTER + 4 * PIECE, 4 * PIECE)]);
    stage.judge();
    stage.ours(&[Discard(CLUSTER, CLUSTER)]);
    stage.judge();
}

#[test]
fn shared_clusters_are_copied_with_the_subclusters_that_they_have() {
    let mut stage = stage(true, MIB);
    stage.theirs(&[
        Write(2 * PIECE, 4 * PIECE, 1),
        Zero(10 * PIECE, 4 * PIECE),
        Write(CLUSTER, CLUSTER, 2),
    ]);
    stage.img(&["snapshot", "-c", "one", IMAGE]);
    let held = stage.bytes.clone();
    stage.ours(&[Write(3 * PIECE, 512, 3), Zero(CLUSTER, PIECE), Write(11 * PIECE, PIECE, 4)]);
    stage.judge();
    assert!(stage.dir.snapshot_bytes(IMAGE, "one") == held, "the snapshot has changed");
    stage.img(&["snapshot", "-a", "one", IMAGE]);
    stage.bytes = held;
    stage.judge();
}

#[test]
fn random_requests_in_turns() {
    for seed in seeds(6) {
        let _repeat = Repeat::new("scenarios", "random_requests_in_turns", seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let cluster = [16 * KIB, 64 * KIB, 128 * KIB][random.usize(0..3)];
        let dir = base(MIB - 3 * KIB, &[Write(0, 400 * KIB, 50), Write(600 * KIB, 200 * KIB, 51)]);
        let options = format!("extended_l2=on,cluster_size={cluster},{BACKED}");
        let mut stage = Stage::windowed(dir, &options, MIB, 0..MIB);
        for turn in 0..4 {
            let acts: Vec<Act> = (0..12)
                .map(|_| {
                    let len = 512 * random.u64(1..=200);
                    let at = 512 * random.u64(0..=(MIB - len) / 512);
                    match random.u8(0..6) {
                        0 => Zero(at, len),
                        1 => Unmap(at, len),
                        _ => Write(at, len, random.u8(1..)),
                    }
                })
                .collect();
            if turn % 2 == 0 {
                stage.ours(&acts)
            } else {
                stage.theirs(&acts)
            }
            stage.judge();
        }
    }
}
