//! `convert` against `qemu-img`: every image of the corpus becomes raw and qcow2 of some other
//! layout, plain and compressed, and that program finds nothing wrong with what was made and reads
//! the same from it; the options do what that program's do.

#[path = "tool/bitmaps.rs"]
mod bitmaps;
#[path = "tool/bits.rs"]
mod bits;
#[path = "tool/corpus.rs"]
mod corpus;
#[path = "tool/streams.rs"]
mod streams;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use corpus::{Picture, create, qemu_io};
use integration::daemon::program;
use integration::images;
use integration::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// What targets are made with: `-o`, and whether they are compressed.
const TARGETS: [(&str, bool); 16] = [
    ("", false),
    ("", true),
    ("compression_type=zstd", true),
    ("cluster_size=512", false),
    ("cluster_size=4k", true),
    ("cluster_size=2M", false),
    ("cluster_size=2M,compression_type=zstd", true),
    ("compat=0.10", false),
    ("compat=0.10,cluster_size=4k", true),
    ("extended_l2=on", false),
    ("extended_l2=on,cluster_size=16k", true),
    ("refcount_bits=1", true),
    ("refcount_bits=2,cluster_size=512", true),
    ("data_file=target.data", false),
    ("data_file=target.data,data_file_raw=on", false),
    ("preallocation=metadata,lazy_refcounts=on", true),
];

fn command(directory: &Path, program: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(words).current_dir(directory).env_remove("RUST_LOG");
    command
}

fn told(words: &[&str], output: &Output) -> String {
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    format!("{} ({}): {said}", words.join(" "), output.status)
}

/// Runs our program; returns what it said.
fn ours(directory: &Path, words: &[&str]) -> Output {
    command(directory, &program(), words).output().expect("start our program")
}

/// Runs our program, which must succeed.
fn done(directory: &Path, words: &[&str]) {
    let output = ours(directory, words);
    assert!(output.status.success(), "{}", told(words, &output));
}

/// Our program must refuse this, with status 1, one line, and nothing at `target`.
fn refused(directory: &Path, words: &[&str]) -> String {
    let output = ours(directory, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{}", told(words, &output));
    assert_eq!(said.lines().count(), 1, "{}", told(words, &output));
    said
}

/// Runs `qemu-img`, which must succeed.
fn theirs(directory: &Path, words: &[&str]) {
    let output = command(directory, Path::new("qemu-img"), words).output().expect("qemu-img");
    assert!(output.status.success(), "{}", told(words, &output));
}

fn assert_same(directory: &Path, (name, format): (&str, &str), (other, kind): (&str, &str)) {
    theirs(directory, &["compare", "-f", format, "-F", kind, name, other]);
}

fn assert_sound(directory: &Path, name: &str) {
    theirs(directory, &["check", "-q", "-f", "qcow2", name]);
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn every_image_of_the_corpus_becomes_raw_and_qcow2() {
    let scratch = Scratch::new("convert-corpus");
    let directory = scratch.directory();
    let corpus = corpus::make(directory);
    for (number, Picture { name, format }) in corpus.iter().enumerate() {
        done(directory, &["convert", "-f", format, "-O", "raw", name, "target.raw"]);
        assert_same(directory, (name, format), ("target.raw", "raw"));
        for step in [0, 5] {
            let (options, compress) = TARGETS[(number + step) % TARGETS.len()];
            let flags = if compress { "-cW" } else { "-W" };
            let flag = if number % 2 == 0 { flags } else { flags.trim_end_matches('W') };
            let mut words = vec!["convert", "-f", format, "-O", "qcow2"];
            words.extend((flag != "-").then_some(flag));
            if !options.is_empty() {
                words.extend(["-o", options]);
            }
            words.extend([name.as_str(), "target.qcow2"]);
            done(directory, &words);
            eprintln!("{}", words.join(" "));
            assert_sound(directory, "target.qcow2");
            assert_same(directory, (name, format), ("target.qcow2", "qcow2"));
            // And back through our own reader.
            done(directory, &["convert", "-f", "qcow2", "target.qcow2", "back.raw"]);
            assert_same(directory, ("target.raw", "raw"), ("back.raw", "raw"));
        }
    }
}

/// A raw disk with noise, text, zeros and holes.
fn make_raw(path: &Path, bytes: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut disk = vec![0_u8; bytes];
    let mut at = 0;
    while at < bytes {
        let len = random.usize(1..300 << 10).min(bytes - at);
        let run = &mut disk[at..at + len];
        match random.u8(..4) {
            0 => run.iter_mut().for_each(|byte| *byte = random.u8(..)),
            1 => run.iter_mut().zip(b"some text ".iter().cycle()).for_each(|(at, of)| *at = *of),
            _ => {}
        }
        at += len;
    }
    fs::write(path, disk).expect("a raw image");
}

#[test]
fn options_may_come_anywhere() {
    let scratch = Scratch::new("convert-options");
    let directory = scratch.directory();
    make_raw(&scratch.file("disk.raw"), 1 << 20, 8);
    done(directory, &["convert", "-f", "raw", "disk.raw", "-O", "qcow2", "copy.qcow2", "-c"]);
    assert_same(directory, ("disk.raw", "raw"), ("copy.qcow2", "qcow2"));
    for words in [&["convert", "-f", "raw", "disk.raw"][..], &["convert", "disk.raw", "-O", "raw"]]
    {
        assert!(refused(directory, words).contains("two images"));
    }
}

#[test]
fn zeros_that_are_found_take_no_space() {
    let scratch = Scratch::new("convert-sparse");
    let directory = scratch.directory();
    let mut disk = vec![0_u8; 16 << 20];
    disk[5 << 20..6 << 20].fill(1);
    fs::write(scratch.file("disk.raw"), disk).expect("a raw image");
    let space = |name: &str| images::allocated_bytes(&scratch.file(name)) >> 20;
    for (format, least) in [("raw", 16), ("qcow2", 16)] {
        let copy = format!("copy.{format}");
        let words = ["convert", "-f", "raw", "-O", format, "disk.raw", copy.as_str()];
        done(directory, &words);
        assert!(space(&copy) <= 2, "{copy} has {} MiB", space(&copy));
        done(directory, &[&words[..], &["-S", "0"]].concat());
        assert!(space(&copy) >= least, "{copy} has {} MiB", space(&copy));
        assert_same(directory, ("disk.raw", "raw"), (&copy, format));
    }
    assert_sound(directory, "copy.qcow2");
}

#[test]
fn an_existing_target_is_written_in_place() {
    let scratch = Scratch::new("convert-existing");
    let directory = scratch.directory();
    make_raw(&scratch.file("disk.raw"), 6 << 20, 1);
    for (format, options) in
        [("raw", ""), ("qcow2", ""), ("qcow2", "extended_l2=on"), ("qcow2", "compat=0.10")]
    {
        let target = format!("target.{format}");
        let path = scratch.file(&target);
        for compress in [&[][..], &["-c"]] {
            let _ = fs::remove_file(&path);
            create(&path, format, options, 6 << 20);
            qemu_io(&path, &["write -P 7 0 6M"]);
            let node = fs::metadata(&path).expect("it").ino();
            let words = ["convert", "-n", "-f", "raw", "-O", format, "disk.raw", target.as_str()];
            if format == "raw" && !compress.is_empty() {
                refused(directory, &[&words[..], compress].concat());
                continue;
            }
            done(directory, &[&words[..], compress].concat());
            assert_eq!(fs::metadata(&path).expect("it").ino(), node);
            assert_same(directory, ("disk.raw", "raw"), (&target, format));
            if format == "qcow2" {
                assert_sound(directory, &target);
            }
        }
    }
    create(&scratch.file("small.qcow2"), "qcow2", "", 1 << 20);
    let words = ["convert", "-n", "-f", "raw", "-O", "qcow2", "disk.raw", "small.qcow2"];
    assert!(refused(directory, &words).contains("less than"));
    let words = ["convert", "-n", "-f", "raw", "-O", "qcow2", "disk.raw", "missing.qcow2"];
    refused(directory, &words);
    create(&scratch.file("fresh.qcow2"), "qcow2", "", 8 << 20);
    let words = ["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2", "disk.raw"];
    done(directory, &[&words[..], &["fresh.qcow2"]].concat());
    assert_sound(directory, "fresh.qcow2");
    theirs(directory, &["compare", "-f", "raw", "-F", "qcow2", "disk.raw", "fresh.qcow2"]);
}

#[test]
fn a_backing_file_is_kept_or_flattened() {
    let scratch = Scratch::new("convert-backing");
    let directory = scratch.directory();
    for (number, (options, size)) in
        [("", 8 << 20), ("extended_l2=on", 8 << 20), ("", 12 << 20), ("compat=0.10", 4 << 20)]
            .into_iter()
            .enumerate()
    {
        let (base, overlay) = (scratch.file("base.qcow2"), scratch.file("overlay.qcow2"));
        create(&base, "qcow2", "", 8 << 20);
        qemu_io(&base, &["write -P 1 0 8M"]);
        let mut layout = "backing_file=base.qcow2,backing_fmt=qcow2".to_owned();
        if !options.is_empty() {
            layout.push_str(&format!(",{options}"));
        }
        create(&overlay, "qcow2", &layout, size);
        qemu_io(&overlay, &["write -P 2 100k 5k", "write -z 1M 1M", "write -P 0 2M 300k"]);
        for flags in [&["-W"][..], &["-c"], &["-o", options]] {
            let flags = if flags[1..] == [""] { &[] } else { flags };
            let kept = ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"];
            let words = [&kept[..], flags, &["overlay.qcow2", "copy.qcow2"]].concat();
            done(directory, &words);
            assert_sound(directory, "copy.qcow2");
            assert_same(directory, ("overlay.qcow2", "qcow2"), ("copy.qcow2", "qcow2"));
            let (copy, source) = (
                images::allocated_bytes(&scratch.file("copy.qcow2")),
                images::allocated_bytes(&overlay),
            );
            assert!(copy <= source + (1 << 20), "{number}: {copy} bytes, the source has {source}");
            let info = images::info(&scratch.file("copy.qcow2"));
            assert_eq!(info["backing-filename"], "base.qcow2");
            let words = [&["convert", "-O", "qcow2"][..], flags, &["overlay.qcow2", "flat.qcow2"]];
            done(directory, &words.concat());
            assert_sound(directory, "flat.qcow2");
            assert_same(directory, ("overlay.qcow2", "qcow2"), ("flat.qcow2", "qcow2"));
            assert_eq!(images::info(&scratch.file("flat.qcow2"))["backing-filename"], Value::Null);
        }
    }
    // An image without a backing file hides all of the one that its copy gets.
    create(&scratch.file("alone.qcow2"), "qcow2", "", 8 << 20);
    qemu_io(&scratch.file("alone.qcow2"), &["write -P 3 1M 1M"]);
    let words = ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "alone.qcow2"];
    done(directory, &[&words[..], &["copy.qcow2"]].concat());
    assert_same(directory, ("alone.qcow2", "qcow2"), ("copy.qcow2", "qcow2"));
}

#[test]
fn a_snapshot_and_several_disks_are_copied() {
    let scratch = Scratch::new("convert-snapshot");
    let directory = scratch.directory();
    let disk = scratch.file("disk.qcow2");
    create(&disk, "qcow2", "", 8 << 20);
    qemu_io(&disk, &["write -P 1 0 3M"]);
    theirs(directory, &["snapshot", "-c", "one", "disk.qcow2"]);
    theirs(directory, &["resize", "-q", "disk.qcow2", "20M"]);
    qemu_io(&disk, &["write -P 2 1M 100k", "write -P 3 18M 1M"]);
    theirs(directory, &["snapshot", "-c", "two", "disk.qcow2"]);
    qemu_io(&disk, &["write -z 0 2M"]);
    let before = fs::read(&disk).expect("the image");
    for (key, name) in [("one", "one"), ("2", "two"), ("snapshot.name=two", "two")] {
        let list = ["convert", "-l", name, "-O", "raw", "disk.qcow2", "expected.raw"];
        theirs(directory, &list);
        done(directory, &["convert", "-l", key, "-O", "raw", "disk.qcow2", "then.raw"]);
        let read = |name: &str| fs::read(scratch.file(name)).expect("a disk");
        // That program takes the size the disk has now.
        let (ours, mut theirs) = (read("then.raw"), read("expected.raw"));
        theirs.resize(ours.len(), 0);
        assert!(ours == theirs, "{key}");
        assert_eq!(ours.len(), if name == "one" { 8 << 20 } else { 20 << 20 });
    }
    refused(directory, &["convert", "-l", "three", "disk.qcow2", "no.raw"]);
    assert!(fs::read(&disk).expect("the image") == before, "the source has changed");
    make_raw(&scratch.file("first.raw"), 1_000_448, 2);
    make_raw(&scratch.file("second.raw"), 3 << 20, 3);
    let read = |name: &str| fs::read(scratch.file(name)).expect("a disk");
    let both = [read("first.raw"), read("second.raw"), read("first.raw")].concat();
    fs::write(scratch.file("both.raw"), both).expect("a raw image");
    for flags in [&["-W"][..], &["-c", "-o", "cluster_size=2M"], &["-S", "0"]] {
        let words = ["first.raw", "second.raw", "first.raw", "joined.qcow2"];
        done(directory, &[&["convert", "-f", "raw", "-O", "qcow2"][..], flags, &words].concat());
        assert_sound(directory, "joined.qcow2");
        assert_same(directory, ("both.raw", "raw"), ("joined.qcow2", "qcow2"));
    }
}

#[test]
fn what_fails_leaves_what_was_there() {
    let scratch = Scratch::new("convert-fails");
    let directory = scratch.directory();
    make_raw(&scratch.file("disk.raw"), 1 << 20, 4);
    fs::write(scratch.file("old.qcow2"), "old").expect("a file");
    let broken = scratch.file("broken.qcow2");
    create(&broken, "qcow2", "", 8 << 20);
    qemu_io(&broken, &["write -P 1 0 8M"]);
    // The L2 entry of the last cluster leads nowhere.
    let mut bytes = fs::read(&broken).expect("the image");
    let word = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    let l1 = usize::try_from(word(&bytes, 40)).expect("an offset");
    let l2 = usize::try_from(word(&bytes, l1) & 0x00ff_ffff_ffff_fe00).expect("an offset");
    bytes[l2 + 127 * 8..l2 + 128 * 8].copy_from_slice(&0x80ff_ffff_ffff_0000_u64.to_be_bytes());
    fs::write(&broken, bytes).expect("the image");
    let before = names(directory);
    for words in [
        &["-f", "raw", "-O", "qcow2", "missing.raw"][..],
        &["-f", "qcow2", "-O", "qcow2", "disk.raw"],
        &["-f", "qcow2", "-O", "qcow2", "broken.qcow2"],
        &["-f", "raw", "-O", "qcow2", "-o", "cluster_size=3k", "disk.raw"],
        &["-f", "raw", "-O", "raw", "-c", "disk.raw"],
        &["-f", "raw", "-O", "qcow2", "-B", "missing.qcow2", "-F", "qcow2", "disk.raw"],
        &["-f", "raw", "-O", "qcow2", "-c", "-o", "data_file=x.data", "disk.raw"],
        &["-f", "raw", "-O", "qcow2", "-B", "a", "-F", "raw", "disk.raw", "disk.raw"],
    ] {
        for target in ["old.qcow2", "new.qcow2"] {
            refused(directory, &[&["convert"][..], words, &[target]].concat());
            assert_eq!(names(directory), before, "{words:?}");
        }
    }
    assert_eq!(fs::read(scratch.file("old.qcow2")).expect("it"), b"old");
    let same = ["convert", "-f", "raw", "-O", "raw", "disk.raw", "disk.raw"];
    refused(directory, &same);
    refused(directory, &["convert", "-f", "raw", "-O", "raw", "disk.raw", "."]);
    refused(directory, &["convert", "-f", "raw", "-O", "raw", "disk.raw", "/dev/null"]);
    // Somebody has the target open.
    create(&scratch.file("used.qcow2"), "qcow2", "", 1 << 20);
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2", "used.qcow2"])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("start qemu-io");
    std::thread::sleep(Duration::from_millis(500));
    for flags in [&[][..], &["-U"], &["-n", "-U"]] {
        let words = [&["convert", "-f", "raw", "-O", "qcow2"][..], flags];
        refused(directory, &[&words.concat()[..], &["disk.raw", "used.qcow2"]].concat());
    }
    drop(user.stdin.take());
    user.wait().expect("qemu-io ends");
    done(directory, &["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "used.qcow2"]);
    assert_same(directory, ("disk.raw", "raw"), ("used.qcow2", "qcow2"));
}

#[test]
fn a_signal_leaves_nothing_unless_told_to() {
    let scratch = Scratch::new("convert-signal");
    let directory = scratch.directory();
    make_raw(&scratch.file("disk.raw"), 192 << 20, 5);
    let before = names(directory);
    let interrupt = |words: &[&str], signal: Signal, after: u64| {
        let mut child = command(directory, &program(), words)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start our program");
        std::thread::sleep(Duration::from_millis(after));
        let id = Pid::from_child(&child);
        kill_process(id, signal).expect("send a signal");
        child.wait().expect("it ends").code()
    };
    // Compressing takes long enough for a signal to come in between.
    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "copy.qcow2"];
    assert_eq!(interrupt(&words, Signal::Int, 150), Some(130));
    assert_eq!(names(directory), before);
    assert_eq!(interrupt(&words, Signal::Term, 250), Some(143));
    assert_eq!(names(directory), before);
    let kept: PathBuf = scratch.file("copy.qcow2");
    let words = [&words[..], &["--keep-partial"]].concat();
    assert_eq!(interrupt(&words, Signal::Int, 250), Some(130));
    assert_sound(directory, "copy.qcow2");
    assert!(kept.exists());
    // In place, what is written stays, and the image is sound.
    fs::remove_file(&kept).expect("it is there");
    create(&kept, "qcow2", "", 192 << 20);
    let words = ["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "copy.qcow2"];
    assert_eq!(interrupt(&words, Signal::Term, 250), Some(143));
    assert_sound(directory, "copy.qcow2");
}

#[test]
fn progress_is_told_as_asked() {
    let scratch = Scratch::new("convert-progress");
    let directory = scratch.directory();
    make_raw(&scratch.file("disk.raw"), 4 << 20, 6);
    let words = ["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "copy.qcow2"];
    let run = |more: &[&str]| {
        let output = ours(directory, &[&words[..], more].concat());
        assert!(output.status.success(), "{}", told(more, &output));
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"))
    };
    assert_eq!(run(&[]), ["", ""]);
    assert_eq!(run(&["--progress=none"]), ["", ""]);
    let [output, error] = run(&["-p"]);
    assert!(output.ends_with("    (100.00/100%)\r\n") && error.is_empty(), "{output:?} {error:?}");
    let [output, error] = run(&["--progress=json"]);
    assert_eq!(output, "");
    let lines = error.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let lines: Vec<Value> = lines.collect();
    assert!(lines.len() >= 2, "{error}");
    let last = lines.last().expect("a line");
    assert_eq!((&last["percent"], &last["done-bytes"]), (&100.0.into(), &(4 << 20).into()));
    assert_eq!((&last["verb"], &last["total-bytes"]), (&"convert".into(), &(4 << 20).into()));
}
