//! What a header says beside the geometry: extensions, feature bits, refcount widths.

use common::images::IMAGE;
use common::qemu::{Dir, Verdict};
use common::workers::options;
use vhost_user_qcow2::error::Kind;
use vhost_user_qcow2::image::OpenOptions;

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{BACKED, KIB, MIB, Stage, base, index};

const INCOMPATIBLE: u64 = 72;
const COMPATIBLE: u64 = 80;
const AUTOCLEAR: u64 = 88;

/// Puts an extension that nobody knows before those that are there.
fn with_unknown_extension(stage: &Stage) {
    let header = stage.dir.read(IMAGE);
    let length = if stage.half_word(4) == 2 { 72 } else { index(stage.half_word(100)) };
    let name = index(stage.word(8));
    let end = if name == 0 { 4096 - 24 } else { name - 24 };
    let mut area = 0x7a7a_1234_u32.to_be_bytes().to_vec();
    area.extend(11_u32.to_be_bytes());
    area.extend(b"eleven here\0\0\0\0\0");
    area.extend(&header[length..end]);
    // The end mark of the old extensions lies well before the end of what was moved.
    stage.poke(length as u64, &area[..area.len().min(end + 24 - length)]);
}

#[test]
fn unknown_extensions_survive_our_writes_and_qemu_finds_them() {
    for options in ["compat=0.10", "compat=1.1"] {
        for backed in [false, true] {
            let dir = if backed { base(MIB, &[Write(0, MIB, 5)]) } else { Dir::new() };
            let name = if backed { format!(",{BACKED}") } else { String::new() };
            let options = format!("{options}{name}");
            let mut stage = Stage::windowed(dir, &options, MIB, 0..MIB);
            if backed {
                // The name lies right behind the extensions: make room.
                let (at, len) = (stage.word(8), index(stage.half_word(16)));
                let text = stage.dir.read(IMAGE)[index(at)..index(at) + len].to_vec();
                stage.poke(2048, &text);
                stage.poke(8, &2048_u64.to_be_bytes());
            }
            with_unknown_extension(&stage);
            let before = stage.dir.read(IMAGE)[..65_536].to_vec();
            stage.ours(&[Write(KIB, 100 * KIB, 1), Discard(0, 64 * KIB), Unmap(MIB / 2, 64 * KIB)]);
            stage.judge();
            assert!(stage.dir.read(IMAGE)[..65_536] == before, "{options}: the header changed");
            // QEMU writes the header anew and keeps the extension; so do we what it wrote.
            if backed {
                stage.img(&[
                    "rebase",
                    "-u",
                    "-f",
                    "qcow2",
                    "-b",
                    "base.qcow2",
                    "-F",
                    "qcow2",
                    IMAGE,
                ]);
            } else {
                stage.img(&["amend", "-f", "qcow2", "-o", "compat=1.1", IMAGE]);
            }
            let header = stage.dir.read(IMAGE)[..65_536].to_vec();
            assert!(header.windows(11).any(|part| part == b"eleven here"), "{options}");
            stage.ours(&[Write(200 * KIB, 512, 2)]);
            stage.judge();
            assert!(stage.dir.read(IMAGE)[..65_536] == header, "{options}: the header changed");
        }
    }
}

#[test]
fn unknown_incompatible_bits_are_refused_by_the_names_that_the_header_gives_them() {
    let stage = Stage::new("compat=1.1", MIB);
    // The table of names that qemu-img writes; its last entry becomes the name of bit 63.
    let header = stage.dir.read(IMAGE);
    let length = index(stage.half_word(100));
    let table = (length..4096)
        .step_by(8)
        .find(|&at| header[at..at + 4] == 0x6803_f857_u32.to_be_bytes())
        .expect("a table of feature names");
    let bytes = u32::from_be_bytes(header[table + 4..table + 8].try_into().expect("four bytes"));
    let last = table + 8 + index(u64::from(bytes)) - 48;
    let mut entry = vec![0, 63];
    entry.extend(b"time travel");
    entry.resize(48, 0);
    stage.poke(last as u64, &entry);
    stage.poke(INCOMPATIBLE, &(1_u64 << 63).to_be_bytes());
    let error = stage.refusal();
    assert!(matches!(error.kind(), Kind::Unsupported(_)), "{error}");
    assert!(error.to_string().contains("time travel"), "{error}");
    let read_only = OpenOptions { read_only: true, ..options(false) };
    assert!(stage.open_with(&read_only).is_err(), "what is unknown cannot be read either");
    assert_eq!(stage.dir.check(IMAGE).0, Verdict::Corrupt, "QEMU refuses it too");
    // A bit without a name is told by its number.
    stage.poke(INCOMPATIBLE, &(1_u64 << 42).to_be_bytes());
    let error = stage.refusal();
    assert!(error.to_string().contains("42"), "{error}");
}

#[test]
fn unknown_compatible_bits_stay_and_unknown_autoclear_bits_go_with_the_first_change() {
    let mut stage = Stage::new("compat=1.1", MIB);
    let (compatible, autoclear) = (1_u64 << 42, 1_u64 << 63 | 1 << 41);
    stage.poke(COMPATIBLE, &compatible.to_be_bytes());
    stage.poke(AUTOCLEAR, &autoclear.to_be_bytes());
    stage.judge_content();
    assert_eq!(stage.word(AUTOCLEAR), autoclear, "a reader has cleared them");
    // Opened for writing and closed, as by a machine that waits for another to hand the disk over.
    stage.session(|session| {
        session.read(0, 4096).expect("reading");
        session.flush().expect("flush");
    });
    assert_eq!(stage.word(AUTOCLEAR), autoclear, "who writes nothing clears nothing");
    stage.ours(&[Write(0, 512, 1)]);
    assert_eq!((stage.word(COMPATIBLE), stage.word(AUTOCLEAR)), (compatible, 0));
    stage.judge();
    stage.poke(AUTOCLEAR, &autoclear.to_be_bytes());
    stage.ours(&[Discard(0, 64 * KIB)]);
    assert_eq!((stage.word(COMPATIBLE), stage.word(AUTOCLEAR)), (compatible, 0));
    stage.judge();
}

#[test]
fn autoclear_bits_go_when_a_disk_that_was_handed_over_is_written_to() {
    // Two have the image open for a while, as in a migration; only the second writes.
    let mut stage = Stage::new("compat=1.1", MIB);
    stage.poke(AUTOCLEAR, &(1_u64 << 63).to_be_bytes());
    let disk = stage.host();
    let engine = disk.engine(0, 0);
    let open = || common::workers::open(&engine, &disk, false).expect("opening");
    let source = open();
    let target = open();
    let close = |image: vhost_user_qcow2::image::Image| {
        vhost_user_qcow2::storage::block_on(&engine, image.close(&engine)).expect("close");
    };
    close(source);
    stage.put_back(&disk);
    assert_eq!(stage.word(AUTOCLEAR), 1 << 63);
    let write = Write(0, 4096, 3);
    vhost_user_qcow2::storage::block_on(&engine, write.run(&engine, &target)).expect("writing");
    close(target);
    stage.expect(&[write]);
    stage.put_back(&disk);
    assert_eq!(stage.word(AUTOCLEAR), 0);
    stage.judge();
}

#[test]
fn refcounts_of_every_width() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for cluster in [512, 4096] {
            let options = format!("refcount_bits={bits},cluster_size={cluster}");
            let mut stage = Stage::new(&options, 2 * MIB);
            let order = stage.half_word(96);
            assert_eq!(1_u64 << order, bits, "what qemu-img made");
            // Enough clusters for several refcount blocks of every width over a byte.
            stage.ours(&[
                Write(0, 700 * KIB, 1),
                Write(MIB + 512, 256 * KIB, 2),
                Discard(100 * KIB, 300 * KIB),
                Unmap(MIB + 64 * KIB, 64 * KIB),
            ]);
            stage.judge();
            stage.theirs(&[Write(120 * KIB, 200 * KIB, 3), Discard(0, 64 * KIB)]);
            stage.ours(&[Write(90 * KIB, 400 * KIB, 4)]);
            stage.judge();
            assert!(stage.report().is_clean(), "{:?}", stage.report());
            assert_eq!(stage.half_word(96), order);
        }
    }
    // Version 2 has 16 bits and no field for another number.
    let mut stage = Stage::new("compat=0.10", MIB);
    stage.ours(&[Write(0, 300 * KIB, 1)]);
    stage.judge();
}

#[test]
fn shared_clusters_of_every_width_that_can_share() {
    for bits in [2, 4, 8, 16, 32, 64] {
        let options = format!("refcount_bits={bits},cluster_size=4k");
        let mut stage = Stage::new(&options, MIB);
        stage.ours(&[Write(0, 600 * KIB, 1)]);
        stage.img(&["snapshot", "-c", "one", IMAGE]);
        let held = stage.bytes.clone();
        stage.ours(&[Write(100 * KIB, 64 * KIB, 2), Discard(200 * KIB, 64 * KIB)]);
        stage.judge();
        assert!(stage.dir.snapshot_bytes(IMAGE, "one") == held, "{bits} bits");
        stage.img(&["snapshot", "-d", "one", IMAGE]);
        stage.ours(&[Write(0, 512, 3)]);
        stage.judge();
    }
}

#[test]
fn what_qemu_img_amends_between_our_writes() {
    let mut stage = Stage::new("compat=1.1", 2 * MIB);
    let amend = |stage: &Stage, what: &str| {
        stage.img(&["amend", "-f", "qcow2", "-o", what, IMAGE]);
    };
    stage.ours(&[Write(0, MIB, 1), Unmap(256 * KIB, 256 * KIB)]);
    // Without zero clusters and with them, with another width, with late refcounts and back.
    for (step, what) in [
        "compat=0.10",
        "compat=1.1",
        "refcount_bits=64",
        "refcount_bits=16,lazy_refcounts=on",
        "lazy_refcounts=off",
        "compat=0.10",
    ]
    .into_iter()
    .enumerate()
    {
        amend(&stage, what);
        stage.judge();
        let at = step as u64 * 150 * KIB;
        stage.ours(&[
            Write(at + 512, 70 * KIB, u8::try_from(step + 10).expect("small")),
            Unmap(at + 64 * KIB, 64 * KIB),
            Discard(MIB, 128 * KIB),
        ]);
        stage.judge();
    }
    // What late refcounts leave behind when nobody closes the image is told by the dirty bit.
    amend(&stage, "compat=1.1,lazy_refcounts=on");
    let session = stage.open().expect("opening");
    session.act(Write(0, 64 * KIB, 99)).expect("writing");
    session.flush().expect("flush");
    let disk = session.disk.clone().expect("a simulated host");
    stage.put_back(&disk);
    assert_eq!(stage.word(INCOMPATIBLE) & 1, 1, "the image is not marked dirty");
    drop(session);
    // Amending repairs it first.
    stage.expect(&[Write(0, 64 * KIB, 99)]);
    amend(&stage, "compat=0.10");
    stage.judge();
}

#[test]
fn the_compression_type_and_its_bit_tell_the_same() {
    let types: [(&str, u64, u8); 2] = [("zlib", 0, 0), ("zstd", 1 << 3, 1)];
    for (name, bit, number) in types {
        let mut stage = Stage::new(&format!("compression_type={name}"), MIB);
        assert_eq!((stage.word(INCOMPATIBLE), stage.word(104) >> 56), (bit, u64::from(number)));
        stage.dir.io(IMAGE, &["write -q -c -P 9 0 64k".to_owned()]);
        stage.expect(&[Write(0, 64 * KIB, 9)]);
        stage.ours(&[Write(512, 512, 1), Write(64 * KIB, 512, 2)]);
        stage.judge();
        let header = stage.dir.read(IMAGE);
        for (field, value) in
            [(INCOMPATIBLE + 7, 8 - u8::try_from(bit).expect("a bit")), (104, 1 - number), (104, 2)]
        {
            stage.poke(field, &[value]);
            assert!(matches!(stage.refusal().kind(), Kind::Corrupt(_)), "{name} {field} {value}");
            assert_eq!(stage.dir.check(IMAGE).0, Verdict::Corrupt, "QEMU takes it");
            stage.dir.write(IMAGE, &header);
        }
    }
    // A header from before the field was there means zlib.
    let mut stage = Stage::new("compat=1.1", MIB);
    stage.dir.io(IMAGE, &["write -q -c -P 9 0 64k".to_owned()]);
    stage.expect(&[Write(0, 64 * KIB, 9)]);
    stage.poke(100, &104_u32.to_be_bytes());
    stage.poke(104, &[0; 8]);
    stage.ours(&[Write(512, 512, 1)]);
    stage.judge();
}
