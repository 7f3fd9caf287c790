//! How many instructions a request takes that finds everything in memory.
//!
//! Time on a shared machine is noise; instructions are not. `hit-path` is run under callgrind for
//! two numbers of requests, and the difference divided by the difference is what one request costs
//! in user space, from the ring and back to it. `bench/instructions.json` has what it cost last;
//! a change of more than 5 % fails this test, for better or worse. When it is meant to be:
//!
//!     UPDATE_INSTRUCTIONS=1 cargo nextest run -p integration --test instructions
//!
//! writes the new numbers, which belong into the commit that changed them. The release profile as
//! it stands in Cargo.toml counts: other optimisations make other numbers. To see where they go:
//!
//!     valgrind --tool=callgrind --collect-atstart=no '--toggle-collect=*take_turns*' \
//!         --callgrind-out-file=/tmp/hit-path.out target/release/hit-path read 4096
//!     callgrind_annotate /tmp/hit-path.out

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use integration::scratch::{Scratch, target_directory};

const TOLERANCE: f64 = 0.05;
const FEW: u64 = 1024;
const MANY: u64 = 5 * FEW;

fn known() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/instructions.json")
}

/// Instructions of all turns of the worker in a run of so many requests.
fn instructions(scratch: &Scratch, kind: &str, requests: u64) -> u64 {
    let program = target_directory().join("release/hit-path");
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --release -p integration --bin hit-path` first",
        program.display()
    );
    let out = scratch.file(&format!("{kind}-{requests}.out"));
    let status = Command::new("valgrind")
        .args(["-q", "--tool=callgrind", "--collect-atstart=no"])
        .arg("--toggle-collect=*take_turns*")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args([kind, &requests.to_string()])
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("cannot start valgrind ({error}): run .ci/setup first"));
    assert!(status.success(), "hit-path ended with {status}");
    let text = fs::read_to_string(&out).expect("read what callgrind counted");
    let summary = text.lines().find_map(|line| line.strip_prefix("summary: "));
    summary.and_then(|number| number.trim().parse().ok()).expect("a summary of callgrind's")
}

fn per_request(kind: &str) -> f64 {
    let scratch = Scratch::new("instructions");
    let [few, many] = [FEW, MANY].map(|requests| instructions(&scratch, kind, requests));
    assert!(few > 0, "nothing was counted: take_turns is not a function of its own any more");
    (many - few) as f64 / (MANY - FEW) as f64
}

#[test]
fn a_cached_request_takes_as_many_instructions_as_before() {
    let measured = ["read", "write"].map(|kind| (kind, per_request(kind)));
    for (kind, count) in measured {
        eprintln!("{kind}: {count:.0} instructions");
    }
    if std::env::var_os("UPDATE_INSTRUCTIONS").is_some() {
        let entries =
            measured.map(|(kind, count)| (kind.to_owned(), (count.round() as u64).into()));
        let table: serde_json::Map<_, serde_json::Value> = entries.into_iter().collect();
        let text = serde_json::to_string_pretty(&table).expect("two numbers");
        fs::write(known(), text + "\n").expect("write the numbers");
        return;
    }
    let text = fs::read_to_string(known()).expect("read the numbers");
    let table: serde_json::Value = serde_json::from_str(&text).expect("numbers in JSON");
    for (kind, count) in measured {
        let before = table[kind].as_f64().unwrap_or_else(|| panic!("no number for {kind}"));
        let change = count / before - 1.0;
        assert!(
            change.abs() <= TOLERANCE,
            "a {kind} takes {count:.0} instructions instead of {before} ({:+.1} %); if this is \
             meant to be, run this test with UPDATE_INSTRUCTIONS=1 and commit the file",
            change * 100.0
        );
    }
}
