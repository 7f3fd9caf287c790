//! `convert --bitmaps`: the same bitmaps as in what `qemu-img convert --bitmaps` makes.

use std::fs;
use std::path::Path;

use integration::images;
use integration::scratch::Scratch;
use serde_json::Value;

use crate::bits::{entry, set_bits};
use crate::corpus::{create, qemu_io};
use crate::{assert_same, assert_sound, done, ours, refused, theirs, told};

/// What qemu-img says of the bitmaps of an image.
fn listed(path: &Path) -> Value {
    images::info(path)["format-specific"]["data"]["bitmaps"].clone()
}

/// Makes source.qcow2 with bitmaps of all kinds.
fn make(scratch: &Scratch, options: &str, size: usize) {
    let (directory, source) = (scratch.directory(), scratch.file("source.qcow2"));
    let _ = fs::remove_file(&source);
    create(&source, "qcow2", options, size);
    let bitmap = |words: &[&str]| theirs(directory, &[&["bitmap"][..], words].concat());
    bitmap(&["--add", "source.qcow2", "whole"]);
    qemu_io(&source, &["write -P 1 0 3M", "write -P 2 7M 1k"]);
    bitmap(&["--add", "-g", "512", "source.qcow2", "fine"]);
    qemu_io(&source, &["write -P 3 1M 5k", "write -P 4 8M 512"]);
    bitmap(&["--add", "-g", "1M", "source.qcow2", "coarse, \"quoted\" and süß"]);
    bitmap(&["--disable", "source.qcow2", "fine"]);
    qemu_io(&source, &["write -P 5 4M 100k"]);
    bitmap(&["--add", "--disable", "source.qcow2", "empty"]);
}

/// Marks a bitmap as in use, as if the program that had the image open had died.
fn spoil(scratch: &Scratch, name: &str) {
    let path = scratch.file("source.qcow2");
    let mut bytes = fs::read(&path).expect("the image");
    let flags = entry(&bytes, name) + 15;
    bytes[flags] |= 1;
    fs::write(&path, bytes).expect("the image");
}

/// Asserts that two images have the same bitmaps.
fn assert_equal(scratch: &Scratch, names: [&str; 2]) {
    let paths = names.map(|name| scratch.file(name));
    let lists = [listed(&paths[0]), listed(&paths[1])];
    assert_eq!(lists[0], lists[1], "{names:?}");
    let bytes = [fs::read(&paths[0]), fs::read(&paths[1])].map(|it| it.expect("an image"));
    for bitmap in lists[0].as_array().expect("bitmaps") {
        let name = bitmap["name"].as_str().expect("a name");
        assert_eq!(set_bits(&bytes[0], name), set_bits(&bytes[1], name), "{name}");
    }
}

#[test]
fn bitmaps_are_copied_as_by_qemu_img() {
    let scratch = Scratch::new("convert-bitmaps");
    let directory = scratch.directory();
    for (options, flags) in [
        ("", &[][..]),
        ("cluster_size=4k", &["-c", "-o", "cluster_size=512"]),
        ("extended_l2=on", &["-W", "-o", "cluster_size=2M"]),
        ("cluster_size=2M", &["-o", "data_file=target.data,lazy_refcounts=on"]),
    ] {
        make(&scratch, options, 9 << 20);
        let words = [&["convert", "--bitmaps", "-O", "qcow2"][..], flags, &["source.qcow2"]];
        let words = words.concat();
        theirs(directory, &[&words[..], &["theirs.qcow2"]].concat());
        let before = fs::read(scratch.file("source.qcow2")).expect("it");
        let _ = fs::remove_file(scratch.file("target.data"));
        done(directory, &[&words[..], &["ours.qcow2"]].concat());
        assert!(fs::read(scratch.file("source.qcow2")).expect("it") == before);
        assert_sound(directory, "ours.qcow2");
        assert_same(directory, ("source.qcow2", "qcow2"), ("ours.qcow2", "qcow2"));
        assert_eq!(listed(&scratch.file("ours.qcow2")).as_array().map(Vec::len), Some(4));
        assert_equal(&scratch, ["source.qcow2", "ours.qcow2"]);
        assert_equal(&scratch, ["theirs.qcow2", "ours.qcow2"]);
        // That program keeps them true, and takes bits from them.
        qemu_io(&scratch.file("ours.qcow2"), &["write -P 6 5M 1k"]);
        assert_sound(directory, "ours.qcow2");
        let fine = set_bits(&fs::read(scratch.file("ours.qcow2")).expect("it"), "whole");
        let from = ["-b", "ours.qcow2", "-F", "qcow2"];
        let merge = ["--add", "--merge", "whole", "source.qcow2", "merged"];
        theirs(directory, &[&["bitmap", "-g", "64k"][..], &from, &merge].concat());
        let merged = set_bits(&fs::read(scratch.file("source.qcow2")).expect("it"), "merged");
        let own = listed(&scratch.file("ours.qcow2"))[0]["granularity"].as_u64();
        assert!(own != Some(65536) || fine == merged, "{fine:?} {merged:?}");
        assert!(!merged.is_empty());
    }
}

#[test]
fn broken_bitmaps_are_named_and_left_out_only_when_told_to() {
    let scratch = Scratch::new("convert-broken-bitmaps");
    let directory = scratch.directory();
    make(&scratch, "", 9 << 20);
    spoil(&scratch, "fine");
    let words = ["convert", "--bitmaps", "-O", "qcow2", "source.qcow2", "ours.qcow2"];
    let said = refused(directory, &words);
    assert!(said.contains("\"fine\"") && said.contains("--skip-broken-bitmaps"), "{said}");
    assert!(!scratch.file("ours.qcow2").exists());
    let words = [&words[..5], &["--skip-broken-bitmaps"]].concat();
    theirs(directory, &[&words[..], &["theirs.qcow2"]].concat());
    let words = [&words[..], &["ours.qcow2"]].concat();
    let output = ours(directory, &words);
    assert!(output.status.success(), "{}", told(&words, &output));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("\"fine\"") && said.lines().count() == 1, "{said}");
    assert_sound(directory, "ours.qcow2");
    assert_equal(&scratch, ["theirs.qcow2", "ours.qcow2"]);
    assert_eq!(listed(&scratch.file("ours.qcow2")).as_array().map(Vec::len), Some(3));
}

#[test]
fn bitmaps_are_refused_where_there_can_be_none() {
    let scratch = Scratch::new("convert-no-bitmaps");
    let directory = scratch.directory();
    make(&scratch, "", 9 << 20);
    theirs(directory, &["snapshot", "-c", "one", "source.qcow2"]);
    create(&scratch.file("disk.raw"), "raw", "", 9 << 20);
    let convert = |words: &[&str]| {
        let words = [&["convert", "--bitmaps"][..], words].concat();
        let said = refused(directory, &words);
        assert!(!scratch.file("new").exists(), "{words:?}");
        said
    };
    let qcow2 = ["-O", "qcow2"];
    for (words, why) in [
        (&["-O", "raw", "source.qcow2", "new"][..], "a raw image has no bitmaps"),
        (&["-f", "raw", "-O", "qcow2", "disk.raw", "new"], "a raw image has no bitmaps"),
        (&["-O", "qcow2", "source.qcow2", "-"], "a stream has no bitmaps"),
        (&["-O", "qcow2", "source.qcow2", "source.qcow2", "new"], "from one image"),
        (&["-O", "qcow2", "-l", "one", "source.qcow2", "new"], "not of a snapshot"),
        (&["-O", "qcow2", "-o", "compat=0.10", "source.qcow2", "new"], "version 2"),
    ] {
        let said = convert(words);
        assert!(said.contains(why), "{words:?}: {said}");
    }
    create(&scratch.file("large.qcow2"), "qcow2", "", 10 << 20);
    let said = convert(&[&["-n"][..], &qcow2, &["source.qcow2", "large.qcow2"]].concat());
    assert!(said.contains("do not fit"), "{said}");
    create(&scratch.file("other.qcow2"), "qcow2", "", 9 << 20);
    theirs(directory, &["bitmap", "--add", "other.qcow2", "own"]);
    let words = ["-n", "-O", "qcow2", "source.qcow2", "other.qcow2"];
    done(directory, &[&["convert", "--bitmaps"][..], &words].concat());
    assert_sound(directory, "other.qcow2");
    assert_eq!(listed(&scratch.file("other.qcow2")).as_array().map(Vec::len), Some(5));
    let said = convert(&words);
    assert!(said.contains("\"whole\" already"), "{said}");
    // Only together.
    let words = ["convert", "--skip-broken-bitmaps", "-O", "qcow2", "source.qcow2", "new"];
    assert_eq!(ours(directory, &words).status.code(), Some(1));
}

#[test]
fn bitmaps_that_do_not_fit_into_memory_together_are_copied_too() {
    let scratch = Scratch::new("convert-large-bitmaps");
    let directory = scratch.directory();
    let source = scratch.file("source.qcow2");
    create(&source, "qcow2", "", 48 << 30);
    for name in ["one", "two", "three", "four"] {
        theirs(directory, &["bitmap", "--add", "-g", "512", "source.qcow2", name]);
        qemu_io(&source, &["write -P 1 40G 1k", "write -P 2 1G 512"]);
    }
    done(directory, &["convert", "--bitmaps", "-O", "qcow2", "source.qcow2", "ours.qcow2"]);
    assert_sound(directory, "ours.qcow2");
    assert_equal(&scratch, ["source.qcow2", "ours.qcow2"]);
}
