//! `convert ... -`: what is written from front to back is the same disk, plain and compressed.

use std::fs;

use integration::images;
use integration::scratch::Scratch;
use serde_json::Value;

use crate::corpus::{create, qemu_io};
use crate::{assert_same, assert_sound, done, make_raw, ours, refused, theirs, told};

/// Layouts of streams.
const LAYOUTS: [&str; 10] = [
    "",
    "compression_type=zstd",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M,compression_type=zstd",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=4k",
    "refcount_bits=64,cluster_size=512",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10",
];

/// Runs our program, and keeps what it writes to a pipe in a file; returns that file's length.
fn stream(scratch: &Scratch, words: &[&str], target: &str) -> usize {
    let words = [&["convert"][..], words, &["-"]].concat();
    let output = ours(scratch.directory(), &words);
    let shown = std::process::Output { stdout: Vec::new(), ..output.clone() };
    assert!(output.status.success(), "{}", told(&words, &shown));
    fs::write(scratch.file(target), &output.stdout).expect("a file");
    output.stdout.len()
}

#[test]
fn a_stream_is_the_same_disk_in_every_layout() {
    let scratch = Scratch::new("convert-stream");
    let directory = scratch.directory();
    // The disk ends inside a cluster, and has runs of all kinds.
    make_raw(&scratch.file("disk.raw"), (9 << 20) + 1536, 7);
    for options in LAYOUTS {
        let mut lengths = Vec::new();
        for flags in [&[][..], &["-c"], &["-c", "-m", "3", "-S", "0"]] {
            let layout: &[&str] = if options.is_empty() { &[] } else { &["-o", options] };
            let raw = ["-f", "raw", "-O", "qcow2"];
            let words = [&raw[..], layout, flags, &["disk.raw"]].concat();
            lengths.push(stream(&scratch, &words, "out.qcow2"));
            assert_sound(directory, "out.qcow2");
            assert_same(directory, ("disk.raw", "raw"), ("out.qcow2", "qcow2"));
            done(directory, &["check", "-q", "out.qcow2"]);
            done(directory, &["convert", "-O", "raw", "out.qcow2", "back.raw"]);
            assert_same(directory, ("disk.raw", "raw"), ("back.raw", "raw"));
            // Others write to it.
            qemu_io(&scratch.file("out.qcow2"), &["write -P 1 100k 3M", "discard 5M 1M"]);
            assert_sound(directory, "out.qcow2");
        }
        eprintln!("{options}: {lengths:?} bytes");
        // Noise does not shrink, text and zeros do, unless each cluster fills one of the file.
        let smaller = lengths[1] * 10 < lengths[0] * 9;
        assert!(smaller || options == "refcount_bits=1", "{options}: {lengths:?}");
    }
}

#[test]
fn a_compressed_stream_is_as_small_as_a_compressed_file() {
    let scratch = Scratch::new("convert-stream-small");
    let directory = scratch.directory();
    let text = b"all work and no play makes a stream compressible ".repeat(200_000);
    fs::write(scratch.file("disk.raw"), &text[..9 << 20]).expect("a raw image");
    for options in ["cluster_size=64k", "compression_type=zstd"] {
        let words = ["-c", "-f", "raw", "-O", "qcow2", "-o", options, "disk.raw"];
        let streamed = stream(&scratch, &words, "out.qcow2");
        let words = [&["convert"][..], &words, &["file.qcow2"]].concat();
        done(directory, &words);
        let file = fs::metadata(scratch.file("file.qcow2")).expect("it").len();
        assert!(streamed as u64 <= file + (128 << 10), "{options}: {streamed}, a file {file}");
        let output = ours(directory, &["map", "--output=json", "out.qcow2"]);
        let map: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let runs = map.as_array().expect("a list");
        assert!(runs.iter().all(|run| run["compressed"] == true), "{map}");
    }
}

#[test]
fn a_stream_over_a_backing_file_hides_what_is_zeros() {
    let scratch = Scratch::new("convert-stream-backing");
    let directory = scratch.directory();
    create(&scratch.file("base.qcow2"), "qcow2", "", 8 << 20);
    qemu_io(&scratch.file("base.qcow2"), &["write -P 1 0 8M"]);
    let options = "backing_file=base.qcow2,backing_fmt=qcow2";
    create(&scratch.file("overlay.qcow2"), "qcow2", options, 8 << 20);
    let writes = ["write -P 2 100k 5k", "write -z 1M 1M", "write -P 0 2M 300k", "write -P 3 5M 1M"];
    qemu_io(&scratch.file("overlay.qcow2"), &writes);
    for flags in [&[][..], &["-c"], &["-c", "-o", "extended_l2=on"], &["-c", "-S", "0"]] {
        let kept = ["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"];
        let words = [&kept[..], flags, &["overlay.qcow2"]].concat();
        stream(&scratch, &words, "copy.qcow2");
        assert_sound(directory, "copy.qcow2");
        assert_same(directory, ("overlay.qcow2", "qcow2"), ("copy.qcow2", "qcow2"));
        let copy = images::allocated_bytes(&scratch.file("copy.qcow2"));
        assert!(copy < 3 << 20, "{flags:?}: {copy} bytes");
    }
    theirs(directory, &["rebase", "-u", "-b", "", "overlay.qcow2"]);
    refused(directory, &["convert", "-c", "-O", "raw", "overlay.qcow2", "-"]);
    let data = ["-o", "data_file=x.data"];
    let words = [&["convert", "-c", "-O", "qcow2"][..], &data, &["overlay.qcow2", "-"]].concat();
    refused(directory, &words);
}
