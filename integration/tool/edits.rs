//! `commit`, `rebase`, `amend`, `bitmap` and `dd` against `qemu-img`: what one makes of an image,
//! the other reads the same, takes for sound, and makes itself.

use std::fs;
use std::path::Path;

use integration::scratch::Scratch;
use serde_json::Value;

use crate::bits::set_bits;
use crate::corpus::{create, qemu_io};
use crate::{Pair, assert_sound, described, remove, told};

/// Layouts of overlays: options of `create`, and what their bases have.
const LAYOUTS: [(&str, &str); 8] = [
    ("", ""),
    ("cluster_size=512", "cluster_size=4k"),
    ("cluster_size=2M", ""),
    ("compat=0.10", "compat=0.10"),
    ("extended_l2=on", "cluster_size=512"),
    ("extended_l2=on,cluster_size=16k", "extended_l2=on"),
    ("data_file=top.data", "data_file=base.data"),
    ("lazy_refcounts=on,refcount_bits=1", "compression_type=zstd"),
];

/// Bytes of the overlays' disks.
const SIZE: usize = 9 << 20;

/// Asserts that two disks hold the same bytes, and that nothing is said about their lengths.
fn assert_same(pair: &Pair<'_>, files: [&str; 2], formats: [&str; 2]) {
    let words = ["compare", "-f", formats[0], "-F", formats[1], files[0], files[1]];
    let output = pair.theirs(&words);
    assert!(output.status.success(), "{}", told(&words, &output));
}

/// The disk of an image as a raw file, made by `qemu-img`.
fn keep(pair: &Pair<'_>, image: &str, raw: &str) {
    let words = ["convert", "-f", "qcow2", "-O", "raw", image, raw];
    let output = pair.theirs(&words);
    assert!(output.status.success(), "{}", told(&words, &output));
}

fn both(options: &str, more: &str) -> String {
    [options, more].into_iter().filter(|one| !one.is_empty()).collect::<Vec<_>>().join(",")
}

/// A chain of three: base.qcow2 of `lengths[0]` bytes, middle.qcow2, top.qcow2, all written to.
fn chain(directory: &Path, (top, base): (&str, &str), lengths: [usize; 3]) {
    let path = |name: &str| directory.join(name);
    create(&path("base.qcow2"), "qcow2", base, lengths[0]);
    qemu_io(&path("base.qcow2"), &["write -P 1 0 1M", "write -P 2 3M 1M"]);
    let below = |name: &str| format!("backing_file={name},backing_fmt=qcow2");
    create(&path("middle.qcow2"), "qcow2", &below("base.qcow2"), lengths[1]);
    qemu_io(&path("middle.qcow2"), &["write -P 3 512k 100k", "write -z 3200k 200k"]);
    create(&path("top.qcow2"), "qcow2", &both(top, &below("middle.qcow2")), lengths[2]);
    let last = format!("write -P 5 {} 512", lengths[2] - 512);
    let compressed = if top.contains("data_file") || top.contains("lazy") {
        "write -P 6 1536k 64k"
    } else {
        "write -c -P 6 2M 2M"
    };
    let zeros = if top.contains("0.10") { "write -P 0 768k 64k" } else { "write -z 768k 64k" };
    qemu_io(&path("top.qcow2"), &["write -P 4 700k 40k", zeros, compressed, &last]);
}

#[test]
fn what_is_committed_is_what_the_overlay_held() {
    for layout in LAYOUTS {
        let lengths = [[6 << 20, SIZE, SIZE], [SIZE, SIZE, SIZE], [SIZE, 5 << 20, SIZE]];
        for (lengths, arguments) in
            lengths.into_iter().zip([&[][..], &["-d"], &["-b", "base.qcow2"]])
        {
            let scratch = Scratch::new("tool-commit");
            let pair = Pair(scratch.directory());
            chain(scratch.directory(), layout, lengths);
            keep(&pair, "top.qcow2", "before.raw");
            let words = [&["commit", "-q"][..], arguments, &["top.qcow2"]].concat();
            assert_eq!(pair.done(&words), "", "{words:?}");
            let target = if arguments.contains(&"-b") { "base.qcow2" } else { "middle.qcow2" };
            assert_sound(&pair, target);
            assert_same(&pair, [target, "before.raw"], ["qcow2", "raw"]);
            assert_sound(&pair, "top.qcow2");
            let map = pair.done(&["map", "--output=json", "top.qcow2"]);
            let map: Value = serde_json::from_str(&map).expect("JSON");
            let own = map
                .as_array()
                .expect("a list")
                .iter()
                .filter(|run| run["depth"] == 0 && run["present"] == true);
            assert_eq!(own.count() == 0, arguments.is_empty(), "{layout:?} {arguments:?}: {map}");
            if arguments != ["-b", "base.qcow2"] {
                assert_same(&pair, ["top.qcow2", "before.raw"], ["qcow2", "raw"]);
                qemu_io(&scratch.file("top.qcow2"), &["write -P 9 1M 100k"]);
                assert_sound(&pair, "top.qcow2");
            }
        }
    }
}

#[test]
fn a_commit_goes_into_raw_files_and_past_snapshots() {
    let scratch = Scratch::new("tool-commit-raw");
    let pair = Pair(scratch.directory());
    create(&scratch.file("base.raw"), "raw", "", 1 << 20);
    let options = "backing_file=base.raw,backing_fmt=raw";
    create(&scratch.file("top.qcow2"), "qcow2", options, 3 << 20);
    qemu_io(&scratch.file("top.qcow2"), &["write -P 1 100k 2M"]);
    pair.done(&["snapshot", "-c", "one", "top.qcow2"]);
    pair.done(&["bitmap", "--add", "top.qcow2", "b"]);
    qemu_io(&scratch.file("top.qcow2"), &["write -P 2 1M 100k"]);
    keep(&pair, "top.qcow2", "before.raw");
    let said = pair.done(&["commit", "-p", "top.qcow2"]);
    assert!(said.starts_with("    (0.00/100%)\r"), "{said:?}");
    assert!(said.ends_with("    (100.00/100%)\r\nImage committed.\n"), "{said:?}");
    let bytes = [fs::read(scratch.file("base.raw")), fs::read(scratch.file("before.raw"))];
    let [base, before] = bytes.map(|bytes| bytes.expect("a raw image"));
    assert!(base == before, "what was committed differs");
    assert_sound(&pair, "top.qcow2");
    // A snapshot that is applied would make the bitmap wrong.
    pair.done(&["bitmap", "--remove", "top.qcow2", "b"]);
    pair.done(&["snapshot", "-a", "one", "top.qcow2"]);
    qemu_io(&scratch.file("top.qcow2"), &["read -P 1 1M 1M"]);
    let output = pair.ours(&["commit", "-f", "raw", "base.raw"]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&["commit"], &output));
    for refused in [&["-b", "top.qcow2"][..], &["-b", "missing.raw"], &["--read-only"]] {
        let words = [&["commit"][..], refused, &["top.qcow2"]].concat();
        let output = pair.ours(&words);
        assert_eq!(output.status.code(), Some(1), "{}", told(&words, &output));
    }
}

#[test]
fn a_rebased_disk_holds_what_it_held() {
    for (number, layout) in LAYOUTS.into_iter().enumerate() {
        let targets = [
            (Some(("other.qcow2", "qcow2")), SIZE),
            (Some(("base.qcow2", "qcow2")), SIZE),
            (None, 0),
            (Some(("short.raw", "raw")), 2 << 20),
        ];
        // Two for each layout, every pair of neighbours somewhere.
        for (new, length) in [targets[number % 4], targets[(number + 1) % 4]] {
            let scratch = Scratch::new("tool-rebase");
            let pair = Pair(scratch.directory());
            chain(scratch.directory(), layout, [6 << 20, 8 << 20, SIZE]);
            keep(&pair, "top.qcow2", "before.raw");
            let (name, format) = new.unwrap_or(("", ""));
            if matches!(name, "other.qcow2" | "short.raw") {
                create(&scratch.file(name), format, "", length);
                qemu_io(&scratch.file(name), &["write -P 1 0 900k", "write -P 7 1500k 300k"]);
            }
            let mut words = vec!["rebase", "-b", name];
            words.extend(new.iter().flat_map(|(_, format)| ["-F", format]));
            words.push("top.qcow2");
            assert_eq!(pair.done(&words), "");
            assert_sound(&pair, "top.qcow2");
            assert_same(&pair, ["top.qcow2", "before.raw"], ["qcow2", "raw"]);
            let info = described(&pair, "top.qcow2", "qcow2");
            assert_eq!(info["backing-filename"].as_str(), new.map(|(name, _)| name));
            assert_eq!(info["backing-filename-format"].as_str(), new.map(|(_, format)| format));
            if name == "other.qcow2" {
                // Everything that matters of the old chain is in the image.
                fs::remove_file(scratch.file("middle.qcow2")).expect("the old backing file");
                assert_same(&pair, ["top.qcow2", "before.raw"], ["qcow2", "raw"]);
            }
        }
    }
}

#[test]
fn an_image_without_a_backing_file_can_be_rebased_onto_one() {
    for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=512"] {
        let scratch = Scratch::new("tool-rebase-onto");
        let pair = Pair(scratch.directory());
        create(&scratch.file("top.qcow2"), "qcow2", options, 4 << 20);
        qemu_io(&scratch.file("top.qcow2"), &["write -P 1 1M 100k"]);
        keep(&pair, "top.qcow2", "before.raw");
        create(&scratch.file("base.qcow2"), "qcow2", "", 5 << 20);
        qemu_io(&scratch.file("base.qcow2"), &["write -P 2 0 5M"]);
        pair.done(&["rebase", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        assert_sound(&pair, "top.qcow2");
        assert_same(&pair, ["top.qcow2", "before.raw"], ["qcow2", "raw"]);
    }
}

#[test]
fn an_unsafe_rebase_changes_the_name_and_nothing_else() {
    let (ours, theirs) = (Scratch::new("tool-rebase-u"), Scratch::new("tool-rebase-u-theirs"));
    let long = format!("{}base.qcow2", "./".repeat(300));
    for (options, _) in LAYOUTS {
        for scratch in [&ours, &theirs] {
            create(&scratch.file("base.qcow2"), "qcow2", "", SIZE);
            let backed = both(options, "backing_file=base.qcow2,backing_fmt=qcow2");
            create(&scratch.file("top.qcow2"), "qcow2", &backed, SIZE);
        }
        for name in ["gone.qcow2", "a/much/longer/name/than/before.qcow2", &long, "", "base.qcow2"]
        {
            if options.contains("=512") && name.len() > 100 {
                continue;
            }
            let mut words = vec!["rebase", "-u", "-b", name, "top.qcow2"];
            if !name.is_empty() {
                words.extend(["-F", "qcow2"]);
            }
            Pair(ours.directory()).done(&words);
            let output = Pair(theirs.directory()).theirs(&words);
            assert!(output.status.success(), "{}", told(&words, &output));
            let infos = [&ours, &theirs].map(|scratch| {
                let pair = Pair(scratch.directory());
                let words = ["check", "-f", "qcow2", "top.qcow2"];
                let output = if name.contains("gone") || name.contains("longer") {
                    pair.ours(&words)
                } else {
                    pair.theirs(&words)
                };
                assert!(output.status.success(), "{}", told(&words, &output));
                let mut info = described(&pair, "top.qcow2", "qcow2");
                remove(&mut info, "full-backing-filename");
                info
            });
            assert_eq!(infos[0], infos[1], "{options} {name}");
        }
    }
    let words = ["rebase", "-u", "-b", "base.qcow2", "top.qcow2"];
    let output = Pair(ours.directory()).ours(&words);
    assert_eq!(output.status.code(), Some(1), "{}", told(&words, &output));
}

#[test]
fn what_is_amended_is_what_qemu_img_amends() {
    let (ours, theirs) = (Scratch::new("tool-amend"), Scratch::new("tool-amend-theirs"));
    for (made, backed, changes) in [
        ("compat=0.10", true, &["compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off"][..]),
        ("", true, &["compat=0.10", "compat=v3", "compat=0.10,lazy_refcounts=off"]),
        ("lazy_refcounts=on", false, &["compat=0.10", "compat=1.1,lazy_refcounts=on"]),
        ("cluster_size=512", false, &["compat=0.10", "size=12M", "compat=1.1"]),
        ("extended_l2=on", true, &["lazy_refcounts=on", "compat=0.10", "cluster_size=64k"]),
        ("refcount_bits=64", false, &["compat=0.10", "compat=0.10,refcount_bits=64", "nonsense=1"]),
        (
            "cluster_size=512",
            false,
            &["refcount_bits=64", "refcount_bits=1", "refcount_bits=3", "refcount_bits=2"],
        ),
        (
            "refcount_bits=8",
            true,
            &["refcount_bits=32", "compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=4"],
        ),
        (
            "compat=0.10",
            false,
            &["refcount_bits=16", "refcount_bits=8", "refcount_bits=8,compat=v3"],
        ),
        // That program makes version 2 of it, which forgets how clusters are compressed; here that
        // is refused.
        ("compression_type=zstd", false, &["compression_type=zlib", "lazy_refcounts=on"]),
        ("data_file=some.data", false, &["compat=0.10", "data_file_raw=on", "lazy_refcounts=on"]),
    ] {
        let base = "backing_file=base.qcow2,backing_fmt=qcow2";
        for scratch in [&ours, &theirs] {
            create(&scratch.file("base.qcow2"), "qcow2", "", SIZE);
            qemu_io(&scratch.file("base.qcow2"), &["write -P 1 0 9M"]);
            let options = if backed { both(made, base) } else { made.to_owned() };
            create(&scratch.file("disk.qcow2"), "qcow2", &options, SIZE);
            let zeros = if made == "compat=0.10" { "write -P 0 3M 2M" } else { "write -z 3M 2M" };
            qemu_io(&scratch.file("disk.qcow2"), &["write -P 2 1M 100k", zeros]);
        }
        for change in changes {
            let words = ["amend", "-o", change, "disk.qcow2"];
            let one = Pair(ours.directory()).ours(&words);
            let other = Pair(theirs.directory()).theirs(&words);
            let codes = (one.status.code(), other.status.code());
            assert_eq!(codes.0, codes.1, "{made}: {}{}", told(&words, &one), told(&words, &other));
            let infos = [&ours, &theirs].map(|scratch| {
                let pair = Pair(scratch.directory());
                assert_sound(&pair, "disk.qcow2");
                described(&pair, "disk.qcow2", "qcow2")
            });
            assert_eq!(infos[0], infos[1], "{made} {change}");
            let other = theirs.file("disk.qcow2");
            let other = other.to_str().expect("UTF-8");
            assert_same(&Pair(ours.directory()), ["disk.qcow2", other], ["qcow2", "qcow2"]);
        }
    }
}

#[test]
fn a_version_2_image_with_snapshots_is_upgraded_and_keeps_them() {
    let scratch = Scratch::new("tool-amend-snapshots");
    let pair = Pair(scratch.directory());
    let disk = scratch.file("disk.qcow2");
    create(&disk, "qcow2", "compat=0.10", 2 << 20);
    qemu_io(&disk, &["write -P 1 0 1M"]);
    pair.theirs(&["snapshot", "-c", "one", "disk.qcow2"]);
    qemu_io(&disk, &["write -P 2 0 1M"]);
    pair.done(&["amend", "-o", "compat=1.1", "disk.qcow2"]);
    assert_sound(&pair, "disk.qcow2");
    let output = pair.ours(&["amend", "-o", "compat=0.10", "disk.qcow2"]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&["amend"], &output));
    pair.theirs(&["snapshot", "-a", "one", "disk.qcow2"]);
    qemu_io(&disk, &["read -P 1 0 1M"]);
}

#[test]
fn a_data_file_that_was_moved_is_found_again() {
    let scratch = Scratch::new("tool-amend-data");
    let pair = Pair(scratch.directory());
    create(&scratch.file("disk.qcow2"), "qcow2", "data_file=some.data", 2 << 20);
    qemu_io(&scratch.file("disk.qcow2"), &["write -P 1 0 1M"]);
    fs::rename(scratch.file("some.data"), scratch.file("moved.data")).expect("the data file");
    assert!(!pair.ours(&["map", "disk.qcow2"]).status.success());
    pair.done(&["amend", "-o", "data_file=moved.data", "disk.qcow2"]);
    pair.done(&["map", "disk.qcow2"]);
    qemu_io(&scratch.file("disk.qcow2"), &["read -P 1 0 1M"]);
}

/// What qemu-img says of the bitmaps of an image.
fn bitmaps(pair: &Pair<'_>, image: &str) -> Value {
    described(pair, image, "qcow2")["format-specific"]["data"]["bitmaps"].clone()
}

/// The bits of a bitmap of an image.
fn dirty(scratch: &Scratch, bitmap: &str) -> Vec<(u64, u64)> {
    set_bits(&fs::read(scratch.file("disk.qcow2")).expect("an image"), bitmap)
}

#[test]
fn bitmaps_are_changed_as_by_qemu_img() {
    let (ours, theirs) = (Scratch::new("tool-bitmap"), Scratch::new("tool-bitmap-theirs"));
    for (options, size) in
        [("cluster_size=512", SIZE), ("extended_l2=on", SIZE), ("cluster_size=2M", 64 << 20)]
    {
        for scratch in [&ours, &theirs] {
            create(&scratch.file("disk.qcow2"), "qcow2", options, size);
            create(&scratch.file("other.qcow2"), "qcow2", "", size);
            let pair = Pair(scratch.directory());
            pair.theirs(&["bitmap", "--add", "other.qcow2", "far"]);
            qemu_io(&scratch.file("other.qcow2"), &["write -P 1 7M 300k"]);
        }
        for (words, write) in [
            (&["--add", "disk.qcow2", "one"][..], "write -P 1 0 1M"),
            (&["--add", "-g", "512", "disk.qcow2", "fine"], "write -P 2 3M 512"),
            (&["--add", "-g", "1M", "--disable", "disk.qcow2", "still"], "write -P 3 5M 1k"),
            (&["--add", "disk.qcow2", "one"], ""),
            (&["--add", "-g", "100", "disk.qcow2", "odd"], ""),
            (&["--merge", "fine", "disk.qcow2", "still"], ""),
            (&["--merge", "one", "--merge", "fine", "disk.qcow2", "still"], "write -P 4 8M 5k"),
            (&["--clear", "disk.qcow2", "one"], "write -P 5 2M 1k"),
            (&["--disable", "disk.qcow2", "fine"], "write -P 6 1M 1M"),
            (&["--enable", "disk.qcow2", "still"], "write -P 7 6M 1k"),
            (&["-b", "other.qcow2", "-F", "qcow2", "--merge", "far", "disk.qcow2", "fine"], ""),
            (&["--merge", "missing", "disk.qcow2", "fine"], ""),
            (&["--remove", "disk.qcow2", "missing"], ""),
            (&["--add", "--enable", "--merge", "still", "disk.qcow2", "all"], "write -P 8 0 1k"),
            (&["--remove", "disk.qcow2", "fine"], "write -P 9 4M 1k"),
            (&["--remove", "disk.qcow2", "one"], ""),
            (&["--remove", "disk.qcow2", "still"], ""),
            (&["--remove", "disk.qcow2", "all"], "write -P 10 0 1k"),
        ] {
            let words = [&["bitmap"][..], words].concat();
            let one = Pair(ours.directory()).ours(&words);
            let other = Pair(theirs.directory()).theirs(&words);
            let codes = (one.status.code(), other.status.code());
            assert_eq!(codes.0, codes.1, "{}{}", told(&words, &one), told(&words, &other));
            for scratch in [&ours, &theirs] {
                if !write.is_empty() {
                    qemu_io(&scratch.file("disk.qcow2"), &[write]);
                }
            }
            let lists = [&ours, &theirs].map(|scratch| {
                let pair = Pair(scratch.directory());
                assert_sound(&pair, "disk.qcow2");
                bitmaps(&pair, "disk.qcow2")
            });
            assert_eq!(lists[0], lists[1], "{options} {words:?}");
            let names = lists[0].as_array().cloned().unwrap_or_default();
            for name in names.iter().filter_map(|bitmap| bitmap["name"].as_str()) {
                let both = [&ours, &theirs].map(|scratch| dirty(scratch, name));
                assert_eq!(both[0], both[1], "{options} {words:?}: {name}");
            }
        }
    }
}

#[test]
fn what_dd_copies_is_what_qemu_img_copies() {
    let scratch = Scratch::new("tool-dd");
    let pair = Pair(scratch.directory());
    create(&scratch.file("disk.qcow2"), "qcow2", "", SIZE);
    qemu_io(&scratch.file("disk.qcow2"), &["write -P 1 1M 100k", "write -P 2 5M 2M"]);
    for operands in [
        &["bs=1M"][..],
        &["bs=1M", "count=3"],
        &["bs=1M", "count=6", "skip=2"],
        &["bs=100000", "skip=7"],
        &["bs=1M", "skip=20"],
        &["count=5"],
        &["bs=64k", "count=1000", "skip=16"],
        &["-O", "qcow2", "bs=1M", "skip=1", "count=7"],
        &["-f", "qcow2", "-O", "qcow2", "bs=4k"],
    ] {
        let format = if operands.contains(&"-O") { "qcow2" } else { "raw" };
        for (ours, to) in [(true, "of=ours"), (false, "of=theirs")] {
            let words = [&["dd"][..], operands, &["if=disk.qcow2", to]].concat();
            let output = if ours { pair.ours(&words) } else { pair.theirs(&words) };
            assert!(output.status.success(), "{}", told(&words, &output));
        }
        assert_same(&pair, ["ours", "theirs"], [format; 2]);
        let sizes =
            ["ours", "theirs"].map(|name| described(&pair, name, format)["virtual-size"].clone());
        assert_eq!(sizes[0], sizes[1], "{operands:?}");
        let lengths =
            ["ours", "theirs"].map(|name| scratch.file(name).metadata().expect("it").len());
        assert!(format == "qcow2" || lengths[0] == lengths[1], "{operands:?}: {lengths:?}");
        if format == "qcow2" {
            assert_sound(&pair, "ours");
        }
    }
    for refused in [
        &["if=disk.qcow2"][..],
        &["of=x"],
        &["if=missing", "of=x"],
        &["if=disk.qcow2", "of=x", "bs=0"],
    ] {
        let words = [&["dd"][..], refused].concat();
        let output = pair.ours(&words);
        assert_eq!(output.status.code(), Some(1), "{}", told(&words, &output));
        assert!(!scratch.file("x").exists());
    }
}
