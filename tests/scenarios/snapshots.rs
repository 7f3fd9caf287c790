//! Internal snapshots: taken, gone back to and deleted by both in turns.

use std::path::Path;

use common::images::IMAGE;
use common::qemu::Verdict;
use common::workers::options;
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::image::{apply_snapshot, create_snapshot, delete_snapshot, snapshots};
use vhost_user_qcow2::qcow2::snapshot::{NewSnapshot, Snapshot};
use vhost_user_qcow2::storage::block_on;

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{KIB, MIB, Stage, index};

/// What is done with a snapshot.
#[derive(Debug, Clone, Copy)]
enum Verb {
    Create,
    Apply,
    Delete,
}

impl Stage {
    /// We do something with the snapshot of a name.
    fn snapshot(&mut self, verb: Verb, name: &str) -> Result<()> {
        let disk = self.host();
        let engine = disk.engine(0, 0);
        let (path, options) = (Path::new(IMAGE), options(self.tiny));
        let new = NewSnapshot {
            name: name.to_owned(),
            date_seconds: 1_700_000_000,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            icount: None,
        };
        block_on(&engine, async {
            match verb {
                Verb::Create => {
                    create_snapshot(&engine, &disk, path, &options, &new).await.map(|_| ())
                }
                Verb::Apply => apply_snapshot(&engine, &disk, path, &options, name).await,
                Verb::Delete => delete_snapshot(&engine, &disk, path, &options, name).await,
            }
        })?;
        self.put_back(&disk);
        Ok(())
    }

    fn listed(&self) -> Result<Vec<Snapshot>> {
        let disk = self.host();
        let engine = disk.engine(0, 0);
        let options = options(false);
        block_on(&engine, snapshots(&engine, &disk, Path::new(IMAGE), &options))
    }

    /// Both do it in turns.
    fn turn(&mut self, ours: bool, verb: Verb, name: &str) {
        if ours {
            self.snapshot(verb, name).unwrap_or_else(|error| panic!("{verb:?} {name}: {error}"));
            return;
        }
        let flag = match verb {
            Verb::Create => "-c",
            Verb::Apply => "-a",
            Verb::Delete => "-d",
        };
        self.img(&["snapshot", flag, name, IMAGE]);
    }

    /// A snapshot holds these bytes.
    fn judge_snapshot(&self, name: &str, held: &[u8]) {
        let bytes = self.dir.snapshot_bytes(IMAGE, &format!("snapshot.name={name}"));
        // QEMU shows a snapshot in the size that the disk has now.
        assert!(bytes.len() >= held.len(), "the snapshot {name} is cut off");
        assert!(bytes[..held.len()] == *held, "the snapshot {name} holds other bytes");
    }
}

fn byte(step: usize) -> u8 {
    u8::try_from(step + 1).expect("small")
}

#[test]
fn ten_snapshots_one_after_the_other() {
    let mut stage = Stage::new("compat=1.1", MIB);
    let mut held = Vec::new();
    for step in 0..10 {
        let at = step as u64 * 90 * KIB;
        stage.ours(&[Write(at, 100 * KIB, byte(step)), Write(0, 512, byte(step + 20))]);
        let name = format!("test-{step}");
        stage.turn(step % 3 != 2, Verb::Create, &name);
        held.push((name, stage.bytes.clone()));
        stage.judge();
    }
    for (name, bytes) in &held {
        stage.judge_snapshot(name, bytes);
    }
    // The table is longer than a sector by now; taken away from the middle, and from both ends.
    for (turn, number) in [4, 0, 8, 5].into_iter().enumerate() {
        let (name, _) = held.remove(number.min(held.len() - 1));
        stage.turn(turn % 2 == 0, Verb::Delete, &name);
        stage.judge();
    }
    for (name, bytes) in &held {
        stage.judge_snapshot(name, bytes);
    }
    let names: Vec<String> =
        stage.listed().expect("a list").into_iter().map(|one| one.name).collect();
    let expected: Vec<&String> = held.iter().map(|(name, _)| name).collect();
    assert!(names.iter().eq(expected), "{names:?}");
}

#[test]
fn snapshots_while_the_refcount_table_grows() {
    // A refcount block counts 64 clusters of 512 bytes: an L1 table, a table of snapshots and every
    // copied cluster push the table on.
    let mut stage = Stage::new("cluster_size=512,refcount_bits=64", 6 * MIB).tiny();
    stage.ours(&[Write(0, 1800 * KIB, 1)]);
    let before = stage.half_word(56);
    let mut held = Vec::new();
    for step in 0..4 {
        let name = format!("step {step}");
        stage.turn(step % 2 == 0, Verb::Create, &name);
        held.push((name, stage.bytes.clone()));
        let at = step as u64 * 300 * KIB;
        stage.ours(&[Write(at, 500 * KIB, byte(step + 1)), Discard(at + 600 * KIB, 64 * KIB)]);
        stage.judge();
    }
    assert!(stage.half_word(56) > before, "the refcount table has not grown");
    for (turn, (name, bytes)) in held.clone().into_iter().enumerate() {
        stage.judge_snapshot(&name, &bytes);
        stage.turn(turn % 2 == 0, Verb::Apply, &name);
        stage.bytes.clone_from(&bytes);
        stage.judge();
        stage.ours(&[Write(5 * MIB, 200 * KIB, byte(turn + 40))]);
        stage.judge();
    }
    for (turn, (name, _)) in held.into_iter().enumerate() {
        stage.turn(turn % 2 == 1, Verb::Delete, &name);
        stage.judge();
    }
    assert!(stage.report().is_clean(), "{:?}", stage.report());
}

#[test]
fn a_snapshot_is_gone_back_to_again_and_again() {
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on"] {
        let mut stage = Stage::new(options, 2 * MIB);
        stage.ours(&[Write(64 * KIB, MIB, 1)]);
        stage.turn(true, Verb::Create, "start");
        let start = stage.bytes.clone();
        for step in 0..4 {
            stage.ours(&[
                Write(step * 200 * KIB + 512, 300 * KIB, byte(index(step) + 9)),
                Unmap(step * 100 * KIB, 128 * KIB),
            ]);
            stage.judge();
            stage.turn(step % 2 == 0, Verb::Apply, "start");
            stage.bytes.clone_from(&start);
            stage.judge();
        }
        stage.ours(&[Write(0, 2 * MIB, 77)]);
        stage.turn(true, Verb::Delete, "start");
        stage.judge();
        assert!(stage.report().is_clean(), "{options}: {:?}", stage.report());
    }
}

#[test]
fn snapshots_of_another_size_than_the_disk_has_now() {
    let mut stage = Stage::new("cluster_size=1k", MIB);
    stage.ours(&[Write(0, MIB, 1)]);
    stage.turn(true, Verb::Create, "small");
    let small = stage.bytes.clone();
    // The L1 table of the disk is longer than the snapshot's from here on.
    stage.img(&["resize", "-q", "-f", "qcow2", IMAGE, "16M"]);
    stage.bytes.resize(index(16 * MIB), 0);
    stage.ours(&[Write(12 * MIB, 4 * MIB, 2), Write(0, KIB, 3)]);
    stage.judge();
    stage.turn(true, Verb::Create, "large");
    let large = stage.bytes.clone();
    for (turn, (name, bytes)) in
        [("small", &small), ("large", &large), ("small", &small), ("large", &large)]
            .into_iter()
            .enumerate()
    {
        stage.turn(turn % 3 != 1, Verb::Apply, name);
        stage.bytes.clone_from(bytes);
        assert_eq!(stage.word(24), bytes.len() as u64);
        stage.judge();
    }
    stage.judge_snapshot("small", &small);
    stage.judge_snapshot("large", &large);
}

#[test]
fn the_state_of_a_machine_behind_the_disk() {
    for at in ["0", "1T"] {
        let mut stage = Stage::new("compat=1.1", 64 * MIB);
        stage.ours(&[Write(0, 64 * KIB, 1)]);
        // The state lies behind the disk's end in the same tables.
        stage.dir.io(IMAGE, &[format!("write -q -b -P 17 {at} 4k")]);
        stage.judge();
        stage.ours(&[
            Write(32 * KIB, 64 * KIB, 2),
            Discard(MIB, MIB),
            Write(64 * MIB - KIB, KIB, 3),
        ]);
        stage.judge();
        let found = stage.dir.io(IMAGE, &[format!("read -b -P 17 {at} 4k")]);
        assert!(!found.contains("verification"), "{at}: {found}");
        stage.turn(true, Verb::Create, "one");
        stage.ours(&[Write(0, MIB, 4)]);
        stage.judge();
        stage.turn(true, Verb::Apply, "one");
        let read = [Write(0, MIB, 0), Write(0, 32 * KIB, 1), Write(32 * KIB, 64 * KIB, 2)];
        stage.expect(&read);
        stage.judge();
        stage.turn(true, Verb::Delete, "one");
        stage.judge();
    }
}

#[test]
fn the_size_of_an_l1_table_is_taken_from_the_snapshot_itself() {
    let mut stage = Stage::new("cluster_size=512", 2 * MIB);
    stage.ours(&[Write(0, 2 * MIB, 1)]);
    stage.turn(true, Verb::Create, "one");
    let held = stage.bytes.clone();
    // The disk is cut to one cluster by hand; the snapshot goes on having all of them.
    stage.poke(24, &512_u64.to_be_bytes());
    stage.poke(36, &1_u32.to_be_bytes());
    let listed = stage.listed().expect("a list");
    assert_eq!(listed[0].l1_entries, 64);
    assert_eq!(listed[0].disk_size, Some(2 * MIB));
    stage.snapshot(Verb::Apply, "one").expect("going back");
    stage.bytes = held;
    stage.judge_content();
}

/// Puts so many bytes of extra data into the first entry of a table of one snapshot.
fn with_extra_data(stage: &Stage, extra: &[u8]) {
    let at = stage.word(64);
    let old = stage.dir.read(IMAGE)[index(at)..].to_vec();
    let length = index(stage.half_word(at + 36));
    let names = 40 + length;
    let id = usize::from(u16::from_be_bytes([old[12], old[13]]));
    let name = usize::from(u16::from_be_bytes([old[14], old[15]]));
    let mut entry = old[..36].to_vec();
    entry.extend(u32::try_from(extra.len()).expect("small").to_be_bytes());
    entry.extend(extra);
    entry.extend(&old[names..names + id + name]);
    entry.resize(entry.len().next_multiple_of(8), 0);
    stage.poke(at, &entry);
}

#[test]
fn entries_with_less_or_more_extra_data_than_we_know() {
    for length in [0, 8, 16, 24, 32, 1024] {
        let mut stage = Stage::new("cluster_size=4k", MIB);
        stage.ours(&[Write(0, 300 * KIB, 1)]);
        stage.turn(true, Verb::Create, "one");
        let held = stage.bytes.clone();
        let mut extra = vec![0xee_u8; length];
        for (field, value) in [(0, 0_u64), (8, MIB), (16, u64::MAX)] {
            if field + 8 <= length {
                extra[field..field + 8].copy_from_slice(&value.to_be_bytes());
            }
        }
        with_extra_data(&stage, &extra);
        let listed = stage.listed().unwrap_or_else(|error| panic!("{length} bytes: {error}"));
        assert_eq!(listed[0].name, "one");
        assert_eq!(listed[0].disk_size, (length >= 16).then_some(MIB));
        stage.ours(&[Write(100 * KIB, 100 * KIB, 2)]);
        stage.judge_snapshot("one", &held);
        // The table is written anew, and what we do not know goes along.
        stage.turn(true, Verb::Create, "two");
        let table = index(stage.word(64));
        let image = stage.dir.read(IMAGE);
        let kept = usize::try_from(stage.half_word(table as u64 + 36)).expect("small");
        assert!(kept >= length, "{length} bytes of extra data became {kept}");
        assert!(image[table + 40..][..length] == extra, "{length} bytes: others now");
        if length >= 16 {
            stage.judge();
        }
        stage.turn(true, Verb::Apply, "one");
        stage.bytes = held;
        stage.judge_content();
        stage.turn(true, Verb::Delete, "one");
        stage.turn(true, Verb::Delete, "two");
        stage.judge();
    }
}

#[test]
fn tables_of_snapshots_that_cannot_be() {
    let stage = {
        let mut stage = Stage::new("cluster_size=4k", MIB);
        stage.ours(&[Write(0, 300 * KIB, 1)]);
        stage.turn(true, Verb::Create, "one");
        stage
    };
    let whole = stage.dir.read(IMAGE);
    let table = stage.word(64);
    // What, where, and the bytes there.
    let damages: [(&str, u64, &[u8]); 4] = [
        ("more extra data than anybody has", table + 36, &[0, 1, 0, 0]),
        ("a huge amount of it", table + 36, &[0x7f, 0xff, 0xff, 0xff]),
        ("more snapshots than there may be", 60, &[0, 1, 0, 1]),
        ("a table far away", 64, &[0x7f, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (name, at, bytes) in damages {
        stage.poke(at, bytes);
        let ours = stage.listed();
        assert!(ours.is_err(), "{name}: {ours:?}");
        assert_eq!(stage.dir.check(IMAGE).0, Verdict::Corrupt, "{name}: QEMU takes it");
        stage.refusal();
        stage.dir.write(IMAGE, &whole);
    }
    // A snapshot whose L1 table lies nowhere: the disk is fine, going back is not.
    for (name, value) in [("unaligned", 0x1001_u64), ("far away", 1 << 50)] {
        let mut stage = Stage::of(stage.copy());
        stage.poke(table, &value.to_be_bytes());
        stage.snapshot(Verb::Apply, "one").expect_err(name);
        let now = stage.dir.read(IMAGE);
        assert!(now[..4096] == whole_with(&whole, table, value)[..4096], "{name}: a new header");
    }
}

fn whole_with(whole: &[u8], at: u64, value: u64) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    bytes[index(at)..][..8].copy_from_slice(&value.to_be_bytes());
    bytes
}
