//! Damage: what is found, what is refused, and what a repair brings back.

use common::images::IMAGE;
use common::memory::{Counting, peak};
use common::qemu::{Dir, Verdict};
use common::workers::options;
use vhost_user_qcow2::error::Kind;
use vhost_user_qcow2::image::OpenOptions;
use vhost_user_qcow2::qcow2::check::{Repair, Report, check};
use vhost_user_qcow2::storage::{FileId, block_on};

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{KIB, MIB, Stage, index};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const INCOMPATIBLE: u64 = 72;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

fn read_only() -> OpenOptions {
    OpenOptions { read_only: true, ..options(false) }
}

/// Our check of the image, with or without a repair.
fn checked(stage: &mut Stage, repair: Repair) -> Report {
    let disk = stage.host();
    let engine = disk.engine(0, 0);
    // The image is the first file of a simulated host.
    let report = block_on(&engine, check(&engine, IMAGE, FileId(0), repair));
    stage.put_back(&disk);
    report.unwrap_or_else(|error| panic!("checking: {error}"))
}

/// Our check finds something wrong as QEMU's does, our repair leaves nothing, and QEMU agrees.
fn repaired(stage: &mut Stage) -> Report {
    let found = checked(stage, Repair::None);
    assert!(!found.is_consistent(), "{found:?}");
    assert_eq!(stage.dir.check(IMAGE).0, Verdict::Corrupt, "QEMU finds nothing");
    let report = checked(stage, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    let (verdict, printed) = stage.dir.check(IMAGE);
    assert_eq!(verdict, Verdict::Clean, "{printed}");
    report
}

fn l2(stage: &Stage) -> u64 {
    stage.word(stage.word(40)) & OFFSET_MASK
}

#[test]
fn late_refcounts_and_the_dirty_bit() {
    for qemu_repairs in [true, false] {
        let mut stage = Stage::new("compat=1.1,lazy_refcounts=on", 4 * MIB);
        stage.ours(&[Write(0, 64 * KIB, 1)]);
        assert_eq!(stage.word(INCOMPATIBLE), 0, "a clean close leaves it clean");
        stage.judge();
        // Nobody closes it: the refcounts are behind, and the bit says so.
        let session = stage.open().expect("opening");
        session.act(Write(MIB, 512 * KIB, 2)).expect("writing");
        session.flush().expect("flush");
        let disk = session.disk.clone().expect("a simulated host");
        stage.put_back(&disk);
        drop(session);
        stage.expect(&[Write(MIB, 512 * KIB, 2)]);
        assert_eq!(stage.word(INCOMPATIBLE) & DIRTY, DIRTY);
        assert!(!stage.report().corruptions.is_empty(), "the refcounts are not behind");
        // Read, by both, it is what it should be, and stays dirty.
        stage.judge_content();
        assert_eq!(stage.word(INCOMPATIBLE) & DIRTY, DIRTY);
        // Whoever opens it for writing repairs it first.
        if qemu_repairs {
            stage.theirs(&[Write(3 * MIB, 512, 3)]);
        } else {
            stage.ours(&[Write(3 * MIB, 512, 3)]);
        }
        assert_eq!(stage.word(INCOMPATIBLE), 0);
        stage.judge();
        assert!(stage.report().is_clean(), "{:?}", stage.report());
    }
    // What QEMU left behind when it was killed.
    let mut stage = Stage::new("compat=1.1,lazy_refcounts=on", 4 * MIB);
    let _ = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -q -P 5 0 300k", "-c", "flush", "-c", "sigraise 9"])
        .arg(IMAGE)
        .current_dir(stage.dir.path())
        .output()
        .expect("qemu-io");
    stage.expect(&[Write(0, 300 * KIB, 5)]);
    assert_eq!(stage.word(INCOMPATIBLE) & DIRTY, DIRTY, "QEMU has closed it");
    stage.judge_content();
    stage.ours(&[Write(200 * KIB, 512, 6)]);
    stage.judge();
}

#[test]
fn entries_that_lead_onto_tables_stop_all_writers() {
    for target in ["header", "refcount table", "refcount block", "L1 table", "L2 table"] {
        let mut stage = Stage::new("compat=1.1", MIB);
        stage.ours(&[Write(0, MIB, 1)]);
        let place = match target {
            "header" => continue,
            "refcount table" => stage.word(48),
            "refcount block" => stage.word(stage.word(48)),
            "L1 table" => stage.word(40),
            _ => l2(&stage),
        };
        let slot = l2(&stage) + 3 * 8;
        let original = stage.word(slot);
        stage.poke(slot, &(1_u64 << 63 | place).to_be_bytes());
        let before = stage.dir.read(IMAGE);
        let session = stage.open().expect("opening");
        let error = session.act(Write(192 * KIB, 512, 9)).expect_err("a write over a table");
        assert!(matches!(error.kind(), Kind::Corrupt(_)), "{target}: {error}");
        session.act(Write(0, 512, 9)).expect_err("no more writes");
        assert!(session.read(512 * KIB, 512).is_ok(), "{target}: what is fine can be read");
        let disk = session.disk.clone().expect("a simulated host");
        drop(session);
        stage.put_back(&disk);
        let now = stage.dir.read(IMAGE);
        assert!(before[index(place)..][..512] == now[index(place)..][..512], "{target} changed");
        assert_eq!(stage.word(INCOMPATIBLE) & CORRUPT, CORRUPT, "{target}: it is not marked");
        // Nobody opens it for writing; for reading, everybody.
        stage.refusal();
        assert!(stage.open_with(&read_only()).is_ok(), "{target}");
        let write = stage.qemu_does("write -q 0 512");
        assert!(!write, "{target}: QEMU writes to it");
        // The repair takes the entry away, or moves the table; one cluster of the guest's is
        // lost, no other.
        let report = repaired(&mut stage);
        assert!(report.losses >= 1 || target == "refcount block", "{target}: {report:?}");
        assert_eq!(stage.word(INCOMPATIBLE), 0);
        assert!(stage.word(slot) != original, "the entry came back by itself");
        let lost = stage.session(|session| session.read(192 * KIB, 64 * KIB)).expect("reading");
        stage.bytes[index(192 * KIB)..index(256 * KIB)].copy_from_slice(&lost);
        stage.judge();
        stage.ours(&[Write(192 * KIB, 64 * KIB, 2)]);
        stage.judge();
    }
}

#[test]
fn clusters_that_are_used_and_not_counted() {
    for width in [1, 16, 64] {
        let options = format!("refcount_bits={width}");
        let mut stage = Stage::new(&options, MIB);
        stage.ours(&[Write(0, 700 * KIB, 1)]);
        // The counts of eight clusters in the middle of the data are gone.
        let block = stage.word(stage.word(48));
        let bytes = index(width);
        stage.poke(block + width, &vec![0; bytes]);
        repaired(&mut stage);
        stage.judge();
        stage.ours(&[Write(600 * KIB, 300 * KIB, 2), Discard(0, 128 * KIB)]);
        stage.judge();
    }
}

#[test]
fn refcount_structures_that_cannot_be_used_are_built_anew() {
    type Damage = fn(&Stage);
    let damages: [(&str, Damage); 5] = [
        ("a block that is nowhere", |stage| {
            stage.poke(stage.word(48), &(1_u64 << 40).to_be_bytes());
        }),
        ("an unaligned block", |stage| {
            let block = stage.word(stage.word(48));
            stage.poke(stage.word(48), &(block | 0x200).to_be_bytes());
        }),
        ("no blocks", |stage| stage.poke(stage.word(48), &[0; 512])),
        ("a block on the L1 table", |stage| {
            stage.poke(stage.word(48), &stage.word(40).to_be_bytes());
        }),
        ("blocks of garbage", |stage| {
            let block = stage.word(stage.word(48));
            stage.poke(block, &[0xa5; 4096]);
        }),
    ];
    for (name, damage) in damages {
        let mut stage = Stage::new("cluster_size=4k", 2 * MIB);
        stage.ours(&[Write(0, 1500 * KIB, 1), Unmap(MIB, 64 * KIB), Discard(0, 8 * KIB)]);
        damage(&stage);
        println!("{name}");
        // The guest's data does not depend on them.
        stage.judge_content();
        repaired(&mut stage);
        stage.judge();
        stage.ours(&[Write(0, 100 * KIB, 2), Write(1600 * KIB, 100 * KIB, 3)]);
        stage.judge();
    }
}

#[test]
fn a_refcount_table_that_is_nowhere() {
    for (name, field, value) in
        [("beyond the end", 48, 1_u64 << 40), ("unaligned", 48, 0x10100), ("on the header", 48, 0)]
    {
        let mut stage = Stage::new("compat=1.1", MIB);
        stage.ours(&[Write(0, 300 * KIB, 1)]);
        stage.poke(field, &value.to_be_bytes());
        stage.refusal();
        let disk = stage.host();
        let engine = disk.engine(0, 0);
        let ours = block_on(&engine, check(&engine, IMAGE, FileId(0), Repair::All));
        // QEMU repairs only the first of these.
        let report = ours.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.is_clean(), "{name}: {report:?}");
        stage.put_back(&disk);
        stage.judge();
    }
}

#[test]
fn entries_far_beyond_the_end_of_the_file_cost_no_memory() {
    let mut stage = Stage::new("compat=1.1", MIB);
    stage.ours(&[Write(0, 300 * KIB, 1)]);
    // Data, and an L2 table, at places that no file reaches.
    stage.poke(l2(&stage) + 8, &(1_u64 << 63 | 1 << 55).to_be_bytes());
    stage.poke(l2(&stage) + 16, &(1_u64 << 63 | 1 << 45).to_be_bytes());
    let (found, taken) = peak(|| checked(&mut stage, Repair::None));
    assert!(found.corruptions >= 2, "{found:?}");
    assert!(taken < 64 << 20, "{taken} bytes");
    assert_eq!(stage.dir.check(IMAGE).0, Verdict::Corrupt);
    repaired(&mut stage);
    stage.bytes[index(64 * KIB)..index(192 * KIB)].fill(0);
    stage.judge();
    stage.ours(&[Write(64 * KIB, 128 * KIB, 2)]);
    stage.judge();
}

#[test]
fn headers_that_qemu_refuses_and_so_do_we() {
    // Where, and what is written there.
    let fields: [(&str, u64, &[u8]); 19] = [
        ("magic", 0, &[0]),
        ("version", 4, &[0, 0, 0, 4]),
        ("backing name too long", 8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0]),
        ("backing name far away", 8, &[0xff; 12]),
        ("clusters of 128 bytes", 20, &[0, 0, 0, 7]),
        ("clusters of 4 MiB", 20, &[0, 0, 0, 22]),
        ("a huge disk", 24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]),
        ("unknown encryption", 32, &[0, 0, 0, 9]),
        ("a short L1 table", 36, &[0; 4]),
        ("a huge L1 table", 36, &[0x7f, 0xff, 0xff, 0xff]),
        ("an unaligned L1 table", 40, &[0, 0, 0, 0, 0, 3, 0, 1]),
        ("an L1 table far away", 40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        ("an unaligned refcount table", 48, &[0, 0, 0, 0, 0, 1, 0, 1]),
        ("a huge refcount table", 56, &[0x7f, 0xff, 0xff, 0xff]),
        ("too many snapshots", 60, &[0, 2, 0, 0]),
        ("unaligned snapshots", 60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 3]),
        ("refcounts of 128 bits", 96, &[0, 0, 0, 7]),
        ("a header longer than its cluster", 100, &[0x7f, 0xff, 0xff, 0xf8]),
        ("an extension without end", 112, &[1, 2, 3, 4, 0x7f, 0xff, 0xff, 0xff]),
    ];
    let stage = Stage::new("compat=1.1", MIB);
    let header = stage.dir.read(IMAGE);
    for (name, at, bytes) in fields {
        stage.poke(at, bytes);
        let error = stage.refusal();
        println!("{name}: {error}");
        let said = stage.qemu_does("write -q 0 512");
        assert!(!said, "{name}: QEMU takes it");
        assert!(
            stage.dir.read(IMAGE)[104..] == {
                let mut expected = header.clone();
                expected[index(at)..index(at) + bytes.len()].copy_from_slice(bytes);
                expected
            }[104..],
            "{name}: somebody wrote"
        );
        stage.dir.write(IMAGE, &header);
    }
    let mut stage = Stage::of({
        let dir = Dir::new();
        dir.write(IMAGE, &header);
        dir
    });
    stage.ours(&[Write(0, 512, 1)]);
    stage.judge();
}
