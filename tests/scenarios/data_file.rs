//! Guest data in a file of its own.

use common::images::IMAGE;
use common::qemu::{Dir, Verdict};

use crate::stage::Act::{Discard, Unmap, Write, Zero};
use crate::stage::{KIB, MIB, Stage, base, index};

const DATA: &str = "guest.data";

fn stage(more: &str, size: u64) -> Stage {
    Stage::new(&format!("data_file={DATA}{more}"), size)
}

#[test]
fn data_goes_to_its_own_file_at_the_guests_offset() {
    for raw in ["", ",data_file_raw=on"] {
        let mut stage = stage(raw, MIB);
        stage.ours(&[Write(3 * KIB, 5 * KIB, 1), Write(640 * KIB, 64 * KIB, 2)]);
        stage.judge();
        let data = stage.dir.read(DATA);
        for (at, len) in [(3 * KIB, 5 * KIB), (640 * KIB, 64 * KIB)] {
            let range = index(at)..index(at + len);
            assert!(data[range.clone()] == stage.bytes[range], "{raw}: not where the guest has it");
        }
        assert!(stage.file_length() < 512 * KIB, "guest data in the image");
        // Zeros and discards, by both, over what was written and what was not.
        stage.ours(&[Zero(640 * KIB, 32 * KIB), Unmap(0, 64 * KIB), Discard(640 * KIB, 64 * KIB)]);
        stage.judge();
        stage.theirs(&[Write(0, 100 * KIB, 3), Zero(64 * KIB, 64 * KIB), Discard(0, 64 * KIB)]);
        stage.ours(&[Write(66 * KIB, KIB, 4), Write(10 * KIB, KIB, 5)]);
        stage.judge();
        if !raw.is_empty() {
            let data = stage.dir.read(DATA);
            assert!(data[..index(MIB)] == stage.bytes, "the file by itself is no raw image");
        }
    }
}

#[test]
fn the_data_file_is_a_raw_image_at_every_moment_when_it_says_so() {
    let mut stage = stage(",data_file_raw=on", MIB);
    for (step, act) in [
        Write(0, 200 * KIB, 1),
        Zero(64 * KIB, 64 * KIB),
        Write(70 * KIB, 512, 2),
        Unmap(0, 64 * KIB),
        Discard(128 * KIB, 64 * KIB),
        Zero(900 * KIB + 512, 3 * KIB),
    ]
    .into_iter()
    .enumerate()
    {
        if step % 2 == 0 {
            stage.ours(&[act])
        } else {
            stage.theirs(&[act])
        }
        stage.judge();
        assert!(stage.dir.read(DATA)[..index(MIB)] == stage.bytes, "{act:?}");
    }
}

#[test]
fn a_data_file_that_is_missing_or_was_cut_off() {
    let mut stage = stage("", MIB);
    stage.ours(&[Write(0, MIB, 1)]);
    let data = stage.dir.read(DATA);
    std::fs::remove_file(stage.dir.path().join(DATA)).expect("removing the data file");
    let error = stage.refusal();
    assert!(error.to_string().contains(DATA), "{error}");
    // What lies behind the end of a file that is too short is not invented, nor does it crash us.
    stage.dir.write(DATA, &data[..index(512 * KIB)]);
    let session = stage.open().expect("opening");
    assert!(session.read(0, 512 * KIB).expect("what is there") == data[..index(512 * KIB)]);
    match session.read(768 * KIB, 512) {
        Ok(bytes) => assert!(bytes.iter().all(|&byte| byte == 0), "bytes from nowhere"),
        Err(error) => println!("behind the end: {error}"),
    }
    drop(session);
    stage.dir.write(DATA, &data);
    stage.judge();
}

#[test]
fn an_image_without_the_name_of_its_data_file() {
    let stage = stage("", MIB);
    // The extension with the name becomes one that nobody knows.
    let header = stage.dir.read(IMAGE);
    let at = (index(stage.half_word(100))..4096)
        .step_by(8)
        .find(|&at| header[at..at + 4] == 0x4441_5441_u32.to_be_bytes())
        .expect("the name of the data file");
    stage.poke(at as u64, &0x7a7a_7a7a_u32.to_be_bytes());
    stage.refusal();
    // And the name without the bit that says that it is used.
    stage.poke(at as u64, &0x4441_5441_u32.to_be_bytes());
    stage.poke(72, &0_u64.to_be_bytes());
    let session = stage.open();
    let qemu = stage.dir.check(IMAGE).0 == Verdict::Clean;
    assert_eq!(session.is_ok(), qemu, "QEMU takes it: {qemu}");
}

#[test]
fn a_data_file_over_a_backing_file() {
    let dir = base(MIB, &[Write(0, MIB, 50)]);
    let options = format!("data_file={DATA},{}", crate::stage::BACKED);
    let mut stage = Stage::windowed(dir, &options, MIB, 0..MIB);
    stage.ours(&[
        Write(512, 512, 1),
        Write(100 * KIB, 100 * KIB, 2),
        Unmap(256 * KIB, 64 * KIB),
        Discard(512 * KIB, 128 * KIB),
        Zero(700 * KIB + 512, KIB),
    ]);
    stage.judge();
    stage.theirs(&[Write(600 * KIB, 512, 3), Discard(64 * KIB, 64 * KIB)]);
    stage.ours(&[Write(130 * KIB, KIB, 4), Write(260 * KIB, KIB, 5)]);
    stage.judge();
}

#[test]
fn what_convert_puts_into_a_data_file() {
    let dir = Dir::new();
    let content: Vec<u8> =
        (0..index(MIB)).map(|at| u8::try_from(at / 4096 % 256).expect("a byte")).collect();
    dir.write("content.raw", &content);
    for raw in ["off", "on"] {
        let options = format!("data_file={DATA},data_file_raw={raw}");
        dir.img(&["create", "-q", "-f", "qcow2", "-o", &options, IMAGE, "1M"]);
        dir.img(&["convert", "-n", "-f", "raw", "-O", "qcow2", "content.raw", IMAGE]);
        let copy = Dir::new();
        copy.write(IMAGE, &dir.read(IMAGE));
        copy.write(DATA, &dir.read(DATA));
        let mut stage = Stage::of(copy);
        assert!(stage.bytes == content);
        stage.ours(&[Write(KIB, KIB, 200), Discard(512 * KIB, 64 * KIB)]);
        stage.judge();
    }
}

#[test]
fn subclusters_in_a_data_file() {
    for raw in ["", ",data_file_raw=on"] {
        let mut stage = stage(&format!(",extended_l2=on{raw}"), MIB);
        stage.ours(&[Write(3 * KIB, 5 * KIB, 1), Zero(4 * KIB, 2 * KIB), Write(900 * KIB, KIB, 2)]);
        stage.judge();
        stage.theirs(&[Write(4 * KIB, 512, 3), Discard(896 * KIB, 64 * KIB)]);
        stage.ours(&[Unmap(0, 32 * KIB), Write(8 * KIB, 512, 4)]);
        stage.judge();
        if !raw.is_empty() {
            assert!(stage.dir.read(DATA)[..index(MIB)] == stage.bytes, "no raw image");
        }
    }
}
