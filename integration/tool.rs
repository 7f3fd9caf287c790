//! The image tool against `qemu-img`: on a corpus of images made by that program, `info`, `check`,
//! `map`, `measure` and `compare` say the same, key for key; what `create`, `resize` and `snapshot`
//! make, that program takes for sound and reads the same from.
//!
//! [`DIFFERENCES`] lists where the two may disagree, and why.

#[path = "tool/bits.rs"]
mod bits;
#[path = "tool/corpus.rs"]
mod corpus;
#[path = "tool/damage.rs"]
mod damage;
#[path = "tool/edits.rs"]
mod edits;
#[path = "tool/progress.rs"]
mod progress;
#[path = "tool/readme.rs"]
mod readme;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use corpus::{Picture, create, qemu_io};
use damage::DAMAGES;
use integration::daemon::program;
use integration::images;
use integration::scratch::Scratch;
use serde_json::Value;

/// Where the answers may differ: the verb, the beginning of the image's name, the key, and why. An
/// entry that no image needs fails the test.
const DIFFERENCES: [(&str, &str, &str, &str); 0] = [];

/// Where the answers to `check -r` may differ: the beginning of the damage's name, the key, and
/// why. An entry that is not needed fails the test.
const REPAIRS: [(&str, &str, &str); 2] = [
    (
        "a cluster that counts as free",
        "image-end-offset",
        "that program makes all refcounts anew, behind the end; here the one is raised in place",
    ),
    (
        "",
        "corruptions-fixed",
        "a flag may be wrong only because a refcount is: that program counts what it changed, \
         here what is no longer wrong",
    ),
];

/// The two programs, each in the same directory.
struct Pair<'a>(&'a Path);

impl Pair<'_> {
    fn run<Word: AsRef<OsStr>>(&self, program: &OsStr, words: &[Word]) -> Output {
        let mut command = Command::new(program);
        command.args(words).current_dir(self.0).env_remove("RUST_LOG");
        command.output().unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"))
    }

    fn ours<Word: AsRef<OsStr>>(&self, words: &[Word]) -> Output {
        self.run(program().as_os_str(), words)
    }

    fn theirs<Word: AsRef<OsStr>>(&self, words: &[Word]) -> Output {
        self.run("qemu-img".as_ref(), words)
    }

    /// Our answer, which must be a success.
    fn done<Word: AsRef<OsStr>>(&self, words: &[Word]) -> String {
        let output = self.ours(words);
        assert!(output.status.success(), "{}", told(words, &output));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Compares the answers and exit codes; complains of what is different.
    fn agree(&self, words: &[&str], name: &str, used: &mut [bool]) -> Option<String> {
        let (ours, theirs) = (self.ours(words), self.theirs(words));
        if ours.status.code() != theirs.status.code() {
            return Some(format!("{}\nbut {}", told(words, &ours), told(words, &theirs)));
        }
        let parse = |output: &Output| serde_json::from_slice::<Value>(&output.stdout);
        let (Ok(mut one), Ok(mut other)) = (parse(&ours), parse(&theirs)) else {
            let same = ours.stdout == theirs.stdout;
            return (!same).then(|| format!("{} / {}", told(words, &ours), told(words, &theirs)));
        };
        for (entry, (verb, image, key, _)) in DIFFERENCES.iter().enumerate() {
            if words[0] == *verb && name.starts_with(image) {
                let removed = (remove(&mut one, key), remove(&mut other, key));
                used[entry] |= removed.0 != removed.1;
            }
        }
        (one != other).then(|| format!("{words:?}:\nours   {one}\ntheirs {other}"))
    }
}

/// Takes a key out of an answer, wherever it is.
fn remove(value: &mut Value, key: &str) -> Vec<Value> {
    match value {
        Value::Array(all) => all.iter_mut().flat_map(|one| remove(one, key)).collect(),
        Value::Object(all) => {
            let mut found: Vec<Value> = all.remove(key).into_iter().collect();
            found.extend(all.values_mut().flat_map(|one| remove(one, key)));
            found
        }
        _ => Vec::new(),
    }
}

fn told<Word: AsRef<OsStr>>(words: &[Word], output: &Output) -> String {
    let words: Vec<_> = words.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    format!("{} ({}): {said}", words.join(" "), output.status)
}

#[test]
fn what_is_told_of_images_is_what_qemu_img_tells() {
    let scratch = Scratch::new("tool-corpus");
    let corpus = corpus::make(scratch.directory());
    assert!(corpus.len() >= 60, "{} images", corpus.len());
    let pair = Pair(scratch.directory());
    let mut used = DIFFERENCES.map(|_| false);
    let mut complaints = Vec::new();
    let mut questions = 0;
    let mut ask = |words: &[&str], name: &str| {
        questions += 1;
        complaints.extend(pair.agree(words, name, &mut used));
    };
    for Picture { name, format } in &corpus {
        let output = "--output=json";
        ask(&["info", output, "-f", format, name], name);
        ask(&["info", output, "--backing-chain", "-f", format, name], name);
        ask(&["check", output, "-f", format, name], name);
        ask(&["map", output, "-f", format, name], name);
        ask(&["measure", output, "-O", "raw", "-f", format, name], name);
        ask(&["measure", output, "-O", "qcow2", "-f", format, name], name);
        let layout = "cluster_size=4k,refcount_bits=64";
        ask(&["measure", output, "-O", "qcow2", "-o", layout, "-f", format, name], name);
    }
    for two in corpus.windows(2) {
        let [first, second] = two else { unreachable!("two by two") };
        for strict in [&[][..], &["-s"]] {
            let files = ["-f", first.format, "-F", second.format, &first.name, &second.name];
            let words: Vec<&str> =
                ["compare"].iter().chain(strict).chain(&files).copied().collect();
            ask(&words, &first.name);
        }
    }
    for size in ["0", "512", "1G", "10T"] {
        ask(&["measure", "--output=json", "-O", "qcow2", "--size", size], size);
        let words = ["measure", "--output=json", "-O", "qcow2", "-o", "extended_l2=on"];
        ask(&[&words[..], &["--size", size]].concat(), size);
    }
    eprintln!("{questions} questions about {} images", corpus.len());
    let count = complaints.len();
    assert!(complaints.is_empty(), "{count} differences:\n{}", complaints.join("\n\n"));
    for (used, (verb, image, key, _)) in used.iter().zip(DIFFERENCES) {
        assert!(used, "{verb} of {image}: nothing differs in {key}");
    }
}

#[test]
fn damage_is_told_and_repaired_as_by_qemu_img() {
    let scratch = Scratch::new("tool-damage");
    let whole = scratch.file("whole.qcow2");
    create(&whole, "qcow2", "", 8 << 20);
    qemu_io(&whole, &["write -P 1 0 1M", "write -z 2M 128k"]);
    let whole = fs::read(whole).expect("an image");
    let mut used = [false; REPAIRS.len()];
    for (what, spoil) in DAMAGES {
        let mut bytes = whole.clone();
        spoil(&mut bytes);
        for repair in [None, Some("leaks"), Some("all")] {
            let ask = |ours: bool| {
                fs::write(scratch.file("damaged.qcow2"), &bytes).expect("an image");
                let mut words = vec!["check", "--output=json", "-f", "qcow2", "damaged.qcow2"];
                words.extend(repair.iter().flat_map(|mode| ["-r", mode]));
                let pair = Pair(scratch.directory());
                let output = if ours { pair.ours(&words) } else { pair.theirs(&words) };
                let answer = serde_json::from_slice::<Value>(&output.stdout).ok();
                let left = pair.theirs(&["check", "-f", "qcow2", "damaged.qcow2"]).status.code();
                (output.status.code(), left, answer)
            };
            let (mut ours, mut theirs) = (ask(true), ask(false));
            if repair == Some("leaks") && ours.0 != theirs.0 {
                // Asked for leaks only, that program gives up when a refcount is too low, and mends
                // flags; here corruptions are told and left as they are.
                assert_eq!((ours.0, ours.1), (Some(2), Some(2)), "{what}");
                continue;
            }
            for (entry, (damage, key, _)) in REPAIRS.iter().enumerate() {
                if repair.is_some() && what.starts_with(damage) {
                    let both = [&mut ours.2, &mut theirs.2];
                    let found = both.map(|answer| answer.as_mut().map(|it| remove(it, key)));
                    used[entry] |= found[0] != found[1];
                }
            }
            assert_eq!(ours, theirs, "{what}, repair {repair:?}");
        }
    }
    assert_eq!(used, [true; REPAIRS.len()], "nothing differs in one of {REPAIRS:?}");
}

/// Keys of `info` that say where things are in the file, not what the image is.
const PLACES: [&str; 2] = ["actual-size", "children"];

/// Asserts that qemu-img finds nothing wrong with an image of ours.
fn assert_sound(pair: &Pair<'_>, name: &str) {
    let output = pair.theirs(&["check", "-f", "qcow2", name]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&[name], &output));
}

/// What qemu-img says an image is.
fn described(pair: &Pair<'_>, name: &str, format: &str) -> Value {
    let words = ["info", "--output=json", "-f", format, name];
    let output = pair.theirs(&words);
    assert!(output.status.success(), "{}", told(&words, &output));
    let mut value = serde_json::from_slice(&output.stdout).expect("JSON");
    PLACES.iter().for_each(|key| drop(remove(&mut value, key)));
    value
}

/// The runs of a map, joined where they differ only in their place: each run's end and flags.
fn joined(map: &Value) -> Vec<(u64, [Value; 5])> {
    let mut runs: Vec<(u64, [Value; 5])> = Vec::new();
    for run in map.as_array().expect("a list") {
        let number = |key: &str| run[key].as_u64().expect("a number");
        let flags = ["depth", "present", "zero", "data", "compressed"].map(|key| run[key].clone());
        let end = number("start") + number("length");
        match runs.last_mut() {
            Some(last) if last.1 == flags => last.0 = end,
            _ => runs.push((end, flags)),
        }
    }
    runs
}

#[test]
fn what_create_makes_is_what_qemu_img_makes() {
    let (ours, theirs) = (Scratch::new("tool-create-ours"), Scratch::new("tool-create-theirs"));
    let layouts = [
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
        "compat=0.10",
        "lazy_refcounts=on",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,preallocation=full",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=4k",
        "preallocation=full",
        "preallocation=metadata,refcount_bits=2,cluster_size=4k",
        "extended_l2=on,preallocation=metadata,backing_file=base.qcow2,backing_fmt=qcow2",
        "backing_file=base.qcow2,backing_fmt=qcow2",
        "backing_file=base.qcow2,backing_fmt=qcow2,cluster_size=512,compat=0.10",
    ];
    for scratch in [&ours, &theirs] {
        let base = scratch.file("base.qcow2");
        create(&base, "qcow2", "", 5 << 20);
        qemu_io(&base, &["write -P 1 300k 1M"]);
    }
    for options in layouts {
        let words = ["create", "-f", "qcow2", "-o", options, "disk.qcow2", "9M"];
        Pair(ours.directory()).done(&words);
        let output = Pair(theirs.directory()).theirs(&words);
        assert!(output.status.success(), "{}", told(&words, &output));
        let both = [&ours, &theirs].map(|scratch| {
            let (pair, disk) = (Pair(scratch.directory()), scratch.file("disk.qcow2"));
            assert_sound(&pair, "disk.qcow2");
            let empty = described(&pair, "disk.qcow2", "qcow2");
            let mut map: Value =
                serde_json::from_str(&pair.done(&["map", "--output=json", "disk.qcow2"]))
                    .expect("JSON");
            remove(&mut map, "offset");
            let map = joined(&map);
            qemu_io(&disk, &["write -P 2 1M 100k", "write -z 2M 1M", "write -P 3 9000k 1k"]);
            assert_sound(&pair, "disk.qcow2");
            (empty, map, described(&pair, "disk.qcow2", "qcow2"))
        });
        assert_eq!(both[0], both[1], "{options}");
        let other = theirs.file("disk.qcow2");
        let compared = ["compare".as_ref(), "disk.qcow2".as_ref(), other.as_os_str()];
        let output = Pair(ours.directory()).theirs(&compared);
        assert!(output.status.success(), "{options}: {}", told(&compared, &output));
    }
    for mode in ["off", "falloc", "full"] {
        let options = format!("preallocation={mode}");
        let words = ["create", "-f", "raw", "-o", &options, "disk.raw", "3M"];
        Pair(ours.directory()).done(&words);
        Pair(theirs.directory()).theirs(&words);
        let both = [&ours, &theirs].map(|scratch| {
            let bytes = images::allocated_bytes(&scratch.file("disk.raw"));
            (described(&Pair(scratch.directory()), "disk.raw", "raw"), bytes >= 3 << 20)
        });
        assert_eq!(both[0], both[1], "raw, {options}");
    }
}

#[test]
fn what_cannot_be_created_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new("tool-create-refused");
    let pair = Pair(scratch.directory());
    create(&scratch.file("base.qcow2"), "qcow2", "", 1 << 20);
    for words in [
        &["-o", "compat=0.10,refcount_bits=1", "disk.qcow2", "1M"][..],
        &["-o", "compat=0.10,lazy_refcounts=on", "disk.qcow2", "1M"],
        &["-o", "extended_l2=on,cluster_size=8k", "disk.qcow2", "1M"],
        &["-o", "cluster_size=4M", "disk.qcow2", "1M"],
        &["-o", "data_file_raw=on", "disk.qcow2", "1M"],
        &["-o", "nonsense=1", "disk.qcow2", "1M"],
        &["-o", "cluster_size=512", "disk.qcow2", "1P"],
        &["-b", "base.qcow2", "disk.qcow2"],
        &["-b", "missing.qcow2", "-F", "qcow2", "disk.qcow2", "1M"],
        &["-b", "base.qcow2", "-F", "qcow2", "-o", "preallocation=full", "disk.qcow2"],
        &["disk.qcow2"],
    ] {
        let words: Vec<&str> = ["create"].iter().chain(words).copied().collect();
        let (ours, theirs) = (pair.ours(&words), pair.theirs(&words));
        assert_eq!(ours.status.code(), Some(1), "{}", told(&words, &ours));
        assert_eq!(theirs.status.code(), Some(1), "{}", told(&words, &theirs));
        let lines = String::from_utf8_lossy(&ours.stderr).lines().count();
        assert_eq!(lines, 1, "{}", told(&words, &ours));
        // That program may have begun.
        let _ = fs::remove_file(scratch.file("disk.qcow2"));
        let output = pair.ours(&words);
        assert!(!scratch.file("disk.qcow2").exists(), "{}", told(&words, &output));
    }
}

#[test]
fn what_resize_makes_is_what_qemu_img_makes() {
    let (ours, theirs) = (Scratch::new("tool-resize-ours"), Scratch::new("tool-resize-theirs"));
    let steps = [
        &["20M"][..],
        &["+1M"],
        &["--shrink", "5M"],
        &["+512"],
        &["--shrink", "-3M"],
        &["64M"],
        &["1M"],
        &["--shrink", "1M"],
    ];
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "compat=0.10"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "data_file=data.raw"),
    ] {
        let file = format!("disk.{format}");
        for scratch in [&ours, &theirs] {
            create(&scratch.file(&file), format, options, 9 << 20);
            qemu_io(&scratch.file(&file), &["write -P 1 1M 100k", "write -P 2 9000k 1k"]);
        }
        for step in steps {
            let words =
                [&["resize", "-f", format][..], step_words(step), &[&file], step_size(step)];
            let words = words.concat();
            let (one, other) =
                (Pair(ours.directory()).ours(&words), Pair(theirs.directory()).theirs(&words));
            let codes = (one.status.code(), other.status.code());
            assert_eq!(
                codes.0,
                codes.1,
                "{options}: {} {}",
                told(&words, &one),
                told(&words, &other)
            );
            let both = [&ours, &theirs].map(|scratch| {
                if format == "qcow2" {
                    assert_sound(&Pair(scratch.directory()), &file);
                }
                described(&Pair(scratch.directory()), &file, format)
            });
            assert_eq!(both[0], both[1], "{format} {options} {step:?}");
            let other = theirs.file(&file);
            let compared = [
                OsStr::new("compare"),
                "-f".as_ref(),
                format.as_ref(),
                "-F".as_ref(),
                format.as_ref(),
                file.as_ref(),
                other.as_os_str(),
            ];
            let output = Pair(ours.directory()).theirs(&compared);
            assert!(output.status.success(), "{options}: {}", told(&compared, &output));
        }
    }
    let words = ["resize", "-f", "raw", "--preallocation=falloc", "disk.raw", "12M"];
    Pair(ours.directory()).done(&words);
    assert!(images::allocated_bytes(&ours.file("disk.raw")) >= 3 << 20);
}

fn step_words<'a>(step: &'a [&'a str]) -> &'a [&'a str] {
    &step[..step.len() - 1]
}

fn step_size<'a>(step: &'a [&'a str]) -> &'a [&'a str] {
    &step[step.len() - 1..]
}

#[test]
fn snapshots_are_taken_applied_and_deleted_as_by_qemu_img() {
    let scratch = Scratch::new("tool-snapshot");
    let pair = Pair(scratch.directory());
    for options in ["", "compat=0.10", "extended_l2=on,cluster_size=16k", "cluster_size=512"] {
        let disk = scratch.file("disk.qcow2");
        create(&disk, "qcow2", options, 8 << 20);
        qemu_io(&disk, &["write -P 1 0 1M"]);
        pair.done(&["snapshot", "-c", "one", "disk.qcow2"]);
        qemu_io(&disk, &["write -P 2 500k 1M"]);
        pair.done(&["snapshot", "-c", "two", "disk.qcow2"]);
        qemu_io(&disk, &["write -P 3 0 4M"]);
        assert_sound(&pair, "disk.qcow2");
        let words = ["snapshot", "--output=json", "-l", "disk.qcow2"];
        let list: Value = serde_json::from_str(&pair.done(&words)).expect("JSON");
        assert_eq!(list, described(&pair, "disk.qcow2", "qcow2")["snapshots"]);
        assert_eq!((&list[0]["name"], &list[1]["name"]), (&"one".into(), &"two".into()));
        pair.done(&["snapshot", "-a", "one", "disk.qcow2"]);
        assert_sound(&pair, "disk.qcow2");
        qemu_io(&disk, &["read -P 1 0 1M", "read -P 0 1M 3M"]);
        pair.done(&["snapshot", "-a", "2", "disk.qcow2"]);
        qemu_io(&disk, &["read -P 1 0 500k", "read -P 2 500k 1M"]);
        pair.done(&["snapshot", "-d", "one", "disk.qcow2"]);
        pair.done(&["snapshot", "-d", "two", "disk.qcow2"]);
        assert_sound(&pair, "disk.qcow2");
        assert_eq!(pair.done(&["snapshot", "-l", "disk.qcow2"]), "");
        let output = pair.ours(&["snapshot", "-d", "two", "disk.qcow2"]);
        assert_eq!(output.status.code(), Some(1), "{options}: {}", told(&["-d"], &output));
    }
}

#[test]
fn images_in_use_and_references_elsewhere_are_refused() {
    let (scratch, elsewhere) = (Scratch::new("tool-gate"), Scratch::new("tool-elsewhere"));
    let pair = Pair(scratch.directory());
    let base = elsewhere.file("base.qcow2");
    create(&base, "qcow2", "", 1 << 20);
    let base = base.to_str().expect("UTF-8");
    let create = ["create", "-b", base, "-F", "qcow2", "disk.qcow2"];
    let output = pair.ours(&create);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("--allow-path"), "{error}");
    let allow = elsewhere.directory().to_str().expect("UTF-8");
    pair.done(&[&create[..], &["--allow-path", allow]].concat());
    for verb in ["map", "compare"] {
        let mut words = vec![verb, "disk.qcow2"];
        words.extend((verb == "compare").then_some("disk.qcow2"));
        assert!(!pair.ours(&words).status.success(), "{verb}");
        pair.done(&[&words[..], &["--allow-path", allow]].concat());
    }
    // Nothing but the image itself is opened by these.
    pair.done(&["info", "disk.qcow2"]);
    pair.done(&["check", "disk.qcow2"]);
    let before = fs::read(scratch.file("disk.qcow2")).expect("the image");
    for words in [
        &["check", "-r", "all", "disk.qcow2"][..],
        &["resize", "disk.qcow2", "2M", "--allow-path", allow],
        &["snapshot", "-c", "x", "disk.qcow2", "--allow-path", allow],
        &["create", "disk.qcow2", "1M"],
    ] {
        let output = pair.ours(&[words, &["--read-only"]].concat());
        assert_eq!(output.status.code(), Some(1), "{}", told(words, &output));
    }
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(scratch.file("disk.qcow2"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("start qemu-io");
    let mut prompt = [0];
    std::io::Read::read_exact(holder.stdout.as_mut().expect("a pipe"), &mut prompt).expect("ready");
    for words in [&["info", "disk.qcow2"][..], &["create", "disk.qcow2", "1M"]] {
        let output = pair.ours(words);
        assert_eq!(output.status.code(), Some(1), "{}", told(words, &output));
    }
    pair.done(&["info", "-U", "disk.qcow2"]);
    drop(holder.stdin.take());
    holder.wait().expect("its end");
    let after = fs::read(scratch.file("disk.qcow2")).expect("the image");
    assert!(before == after, "a refusal has changed the image");
}

#[test]
fn a_wrong_command_line_never_looks_like_an_answer() {
    let scratch = Scratch::new("tool-usage");
    let pair = Pair(scratch.directory());
    for (words, status) in [
        (&["check", "--nonsense", "disk.qcow2"][..], 1),
        (&["check"], 1),
        (&["info"], 1),
        (&["compare", "disk.qcow2"], 2),
        (&["compare", "missing.qcow2", "missing.qcow2"], 2),
        (&["nonsense"], 2),
        (&["--socket", "only"], 2),
        (&["help"], 0),
        (&["check", "--help"], 0),
    ] {
        let output = pair.ours(words);
        assert_eq!(output.status.code(), Some(status), "{}", told(words, &output));
    }
}

#[test]
fn every_verb_has_a_manual_page_with_examples_and_shells_complete_it() {
    let scratch = Scratch::new("tool-manual");
    let pair = Pair(scratch.directory());
    fs::create_dir(scratch.file("man")).expect("a directory");
    pair.done(&["man", "man"]);
    let script = pair.done(&["completions", "bash"]);
    let verbs =
        "info check map measure compare create resize snapshot commit rebase amend bitmap dd";
    for verb in verbs.split(' ') {
        let page = scratch.file("man").join(format!("vhost-user-qcow2-{verb}.1"));
        let page = fs::read_to_string(page).expect("a page");
        assert!(page.contains("Examples:"), "{page}");
        assert!(script.contains(verb), "{verb}");
    }
}
