//! What verbs tell of how far they are, and what signals make of them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use integration::daemon::program;
use integration::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::corpus::{create, qemu_io};
use crate::{Pair, assert_sound, told};

/// A chain of two: base.qcow2, and top.qcow2, a third of which is its own, and a third zeros.
fn chain(scratch: &Scratch, mebibytes: usize) {
    let third = mebibytes / 3;
    create(&scratch.file("base.qcow2"), "qcow2", "", mebibytes << 20);
    qemu_io(&scratch.file("base.qcow2"), &[&format!("write -P 1 0 {mebibytes}M")]);
    let options = "backing_file=base.qcow2,backing_fmt=qcow2";
    create(&scratch.file("top.qcow2"), "qcow2", options, mebibytes << 20);
    let writes = [format!("write -P 2 0 {third}M"), format!("write -z {third}M {third}M")];
    qemu_io(&scratch.file("top.qcow2"), &[&writes[0], &writes[1]]);
}

/// Verbs that take long, each with how much there is to do on disks of 6 MiB; none where that is
/// bytes of tables.
const VERBS: [(&[&str], Option<u64>); 10] = [
    (&["compare", "-F", "qcow2", "top.qcow2", "copy.qcow2"], Some(6 << 20)),
    (&["check", "top.qcow2"], None),
    (&["check", "-r", "all", "--output=json", "top.qcow2"], None),
    (&["dd", "bs=1M", "count=4", "if=top.qcow2", "of=part.raw"], Some(4 << 20)),
    (&["create", "-o", "preallocation=full", "new.qcow2", "5M"], Some(5 << 20)),
    (&["create", "-f", "raw", "-o", "preallocation=full", "new.raw", "3M"], Some(3 << 20)),
    (&["resize", "-f", "raw", "--preallocation=full", "new.raw", "+1M"], Some(1 << 20)),
    (&["amend", "-o", "compat=0.10", "top.qcow2"], Some(6 << 20)),
    (&["commit", "top.qcow2"], Some(6 << 20)),
    (&["rebase", "-b", "", "top.qcow2"], Some(6 << 20)),
];

#[test]
fn every_long_verb_tells_how_far_it_is_as_asked() {
    let scratch = Scratch::new("tool-progress");
    let pair = Pair(scratch.directory());
    for (words, total) in VERBS {
        let run = |more: &str| {
            for entry in fs::read_dir(scratch.directory()).expect("a directory") {
                let _ = fs::remove_file(entry.expect("an entry").path());
            }
            chain(&scratch, 6);
            fs::copy(scratch.file("top.qcow2"), scratch.file("copy.qcow2")).expect("a copy");
            create(&scratch.file("new.raw"), "raw", "", 1 << 20);
            let words: Vec<&str> =
                words.iter().copied().chain((!more.is_empty()).then_some(more)).collect();
            let output = pair.ours(&words);
            assert!(output.status.success(), "{}", told(&words, &output));
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"))
        };
        // There is no terminal: nobody looks at a bar.
        let [plain, silence] = run("");
        assert_eq!(silence, "", "{words:?}");
        assert_eq!(run("--progress=none"), [plain.clone(), silence], "{words:?}");
        let [output, error] = run("-p");
        let said = if words.contains(&"--output=json") { &error } else { &output };
        assert!(said.contains("    (100.00/100%)\r\n"), "{words:?} {output:?} {error:?}");
        let [output, error] = run("--progress=json");
        assert_eq!(output, plain, "{words:?}");
        let lines = error.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let lines: Vec<Value> = lines.collect();
        assert!(lines.len() >= 2, "{words:?}: {error}");
        let last = lines.last().expect("a line");
        assert_eq!(last["percent"], 100.0, "{words:?}: {error}");
        assert_eq!(last["verb"], words[0]);
        if let Some(total) = total {
            let bytes = [&last["done-bytes"], &last["total-bytes"]];
            assert_eq!(bytes.map(Value::as_u64), [Some(total); 2], "{words:?}: {error}");
        }
    }
}

/// Begins a verb, and sends it a signal as soon as it says that it does something; returns how it
/// ended and what it said.
fn interrupt(scratch: &Scratch, words: &[&str], signal: Signal) -> (Option<i32>, String) {
    let mut child = Command::new(program())
        .args(words)
        .arg("--progress=json")
        .current_dir(scratch.directory())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start our program");
    let mut said = BufReader::new(child.stderr.take().expect("it was asked for"));
    let mut text = String::new();
    said.read_line(&mut text).expect("a line");
    kill_process(Pid::from_child(&child), signal).expect("send a signal");
    while said.read_line(&mut text).expect("a line") > 0 {}
    (child.wait().expect("it ends").code(), text)
}

#[test]
fn an_interrupted_change_can_be_made_again() {
    let scratch = Scratch::new("tool-interrupted");
    let pair = Pair(scratch.directory());
    chain(&scratch, 150);
    let keep = ["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"];
    assert!(pair.theirs(&keep).status.success());
    let assert_same = |name: &str| {
        let words = ["compare", "-f", "qcow2", "-F", "raw", name, "before.raw"];
        let output = pair.theirs(&words);
        assert!(output.status.success(), "{}", told(&words, &output));
    };
    for (words, signal, status) in [
        (&["dd", "-O", "qcow2", "bs=1M", "if=top.qcow2", "of=new.qcow2"][..], Signal::Int, 130),
        (&["commit", "-q", "top.qcow2"], Signal::Term, 143),
        (&["rebase", "-b", "", "top.qcow2"], Signal::Int, 130),
        (&["amend", "-o", "compat=0.10", "top.qcow2"], Signal::Int, 130),
    ] {
        if words[0] == "rebase" {
            // The commit has emptied the image.
            chain(&scratch, 150);
        }
        let (code, said) = interrupt(&scratch, words, signal);
        assert_eq!(code, Some(status), "{words:?}: {said}");
        assert_sound(&pair, "top.qcow2");
        assert_sound(&pair, "base.qcow2");
        assert_same("top.qcow2");
        assert!(!scratch.file("new.qcow2").exists(), "{words:?} has left something");
        assert!(words[0] == "dd" || said.contains("the same command goes on"), "{said}");
        pair.done(words);
        let result = if words[0] == "dd" { "new.qcow2" } else { "top.qcow2" };
        assert_sound(&pair, result);
        assert_same(result);
        let _ = fs::remove_file(scratch.file("new.qcow2"));
    }
}
