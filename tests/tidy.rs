//! Taste is a test: layering, lengths, the list of files that may hold unsafe code, banned words.
//!
//! Sources are read as text. Comments and strings are blanked first where only code counts.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

const MOST_LINES: usize = 600;
const MOST_FUNCTION_LINES: usize = 70;
const MOST_COLUMNS: usize = 100;

/// Modules from the top down; a module imports only from those below its own line.
const LAYERS: [&[&str]; 9] = [
    &["main"],
    &["cli"],
    &["vhost"],
    &["worker"],
    &["blk", "inside"],
    &["image"],
    &["qcow2", "raw"],
    &["storage"],
    &["bytes", "sync", "error", "exec", "flush_gate"],
];

/// Crates that only some places may name: files or directories below `src`.
const CONFINED: [(&[&str], &[&str]); 3] = [
    (
        &["vm_memory", "virtio_queue", "virtio_bindings", "vhost", "vhost_user_backend"],
        &["vhost/", "worker/", "blk/", "storage/buf.rs"],
    ),
    (&["io_uring", "libc"], &["storage/", "worker/"]),
    (&["gptman", "ext4_view", "fatfs"], &["inside/"]),
];

/// The files that may hold unsafe code; each says so in its first line.
const UNSAFE: [&str; 11] = [
    "src/storage/buf.rs",
    "src/storage/prompt.rs",
    "src/storage/sys.rs",
    "src/storage/threads.rs",
    "src/storage/uring.rs",
    "src/vhost/memory.rs",
    "src/worker/poller.rs",
    "integration/bench/bare.rs",
    "integration/bench/client.rs",
    "integration/src/client.rs",
    "tests/common/memory.rs",
];

/// A source file.
struct Source {
    /// Its path in the repository.
    path: String,
    text: String,
    /// The text with comments, strings and characters blanked; lines and columns stay.
    code: String,
}

impl Source {
    /// Its path below `src`, if it lies there.
    fn in_src(&self) -> Option<&str> {
        self.path.strip_prefix("src/")
    }

    /// The module it belongs to: the first name below `src`.
    fn module(&self) -> Option<&str> {
        let name = self.in_src()?.split('/').next()?;
        Some(name.strip_suffix(".rs").unwrap_or(name))
    }

    fn line_of(&self, offset: usize) -> usize {
        self.code[..offset].matches('\n').count() + 1
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn collect(dir: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory of the repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for dir in ["src", "tests", "integration"] {
        collect(&root().join(dir), ".rs", &mut paths);
    }
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file");
        let path = path.strip_prefix(root()).expect("inside").to_string_lossy().into_owned();
        Source { path, code: blanked(&text), text }
    };
    paths.into_iter().map(read).collect()
}

/// The text with everything but code turned into spaces.
fn blanked(text: &str) -> String {
    let mut code = text.as_bytes().to_vec();
    let mut at = 0;
    while at < code.len() {
        let end = at + not_code(&text.as_bytes()[at..]);
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// How many bytes from here on are a comment, a string or a character.
fn not_code(rest: &[u8]) -> usize {
    let until = |start: usize, end: &[u8]| {
        let found = rest[start..].windows(end.len()).position(|part| part == end);
        found.map_or(rest.len(), |found| start + found + end.len())
    };
    match rest {
        [b'/', b'/', ..] => until(0, b"\n"),
        [b'/', b'*', ..] => until(2, b"*/"),
        [b'r', b'"', ..] => until(2, b"\""),
        [b'r', b'#', b'"', ..] => until(3, b"\"#"),
        [b'"', ..] => {
            let mut at = 1;
            while at < rest.len() && rest[at] != b'"' {
                at += if rest[at] == b'\\' { 2 } else { 1 };
            }
            (at + 1).min(rest.len())
        }
        [b'\'', b'\\', ..] => until(3, b"'"),
        [b'\'', _, b'\'', ..] => 3,
        _ => 0,
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Where a word stands in code.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = at.checked_sub(1).is_some_and(|before| is_word(bytes[before]));
        let after = bytes.get(at + word.len()).is_some_and(|&after| is_word(after));
        !before && !after
    })
}

/// The word from `at` on.
fn word_at(code: &str, at: usize) -> &str {
    let rest = &code[at..];
    let end = rest.bytes().position(|byte| !is_word(byte)).unwrap_or(rest.len());
    &rest[..end]
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn modules_import_only_from_below() {
    let layer = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut complaints = Vec::new();
    for source in sources() {
        let Some(module) = source.module().filter(|&module| module != "lib") else { continue };
        let Some(own) = layer(module) else {
            complaints.push(format!("{}: the module {module} has no layer", source.path));
            continue;
        };
        for prefix in ["crate", "vhost_user_qcow2"] {
            for at in words(&source.code, prefix) {
                let Some(rest) = source.code[at + prefix.len()..].strip_prefix("::") else {
                    continue;
                };
                let other = word_at(rest, 0);
                let below = other == module || layer(other).is_some_and(|other| other > own);
                // One layer may hold modules that know nothing of each other.
                let lowest = own == LAYERS.len() - 1 && layer(other) == Some(own);
                if !below && !lowest {
                    let line = source.line_of(at);
                    complaints.push(format!("{}:{line}: {module} imports {other:?}", source.path));
                }
            }
        }
        // Tasks know nothing of disks: beside std they use the atomics, which are the crate's so
        // that a model checker can replace them.
        let of_crate = |at: usize| !source.code[at..].starts_with("crate::sync::");
        if module == "exec" && words(&source.code, "crate").any(of_crate) {
            complaints.push(format!("{}: exec uses std and crate::sync only", source.path));
        }
    }
    complain(&complaints);
}

#[test]
fn crates_are_named_only_where_they_belong() {
    let mut complaints = Vec::new();
    for source in sources() {
        let Some(path) = source.in_src() else { continue };
        for (crates, places) in CONFINED {
            if places.iter().any(|place| path.starts_with(place)) {
                continue;
            }
            for name in crates {
                for at in words(&source.code, name) {
                    // `crate::vhost` is our module, `vhost::` the crate.
                    let own = source.code[..at].ends_with("::");
                    if !own && source.code[at + name.len()..].starts_with("::") {
                        let line = source.line_of(at);
                        complaints.push(format!("{}:{line}: names the crate {name}", source.path));
                    }
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn nothing_is_imported_by_glob() {
    let mut complaints = Vec::new();
    for source in sources() {
        for (number, line) in (1..).zip(source.code.lines()) {
            let line = line.trim();
            // `::*` may also be a product of paths; imports begin with a word.
            let import = line.starts_with("use ") || line.starts_with("pub");
            let in_tests = source.text.contains("#[cfg(test)]") || !source.path.starts_with("src/");
            let in_tests = in_tests || source.path.ends_with("tests.rs");
            if import && line.contains("::*") && !(in_tests && line == "use super::*;") {
                complaints.push(format!("{}:{number}: {line}", source.path));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn files_functions_and_lines_are_short() {
    let mut complaints = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > MOST_LINES {
            complaints.push(format!("{}: {lines} lines", source.path));
        }
        for (number, line) in (1..).zip(source.text.lines()) {
            let columns = line.chars().count();
            // What cannot be broken: a word longer than a line, such as an address.
            let long_word = line.split_whitespace().any(|word| word.len() > MOST_COLUMNS - 20);
            if columns > MOST_COLUMNS && !long_word {
                complaints.push(format!("{}:{number}: {columns} columns", source.path));
            }
        }
        for range in functions(&source.code) {
            let first = source.line_of(range.start);
            let count = source.line_of(range.end) - first + 1;
            if count > MOST_FUNCTION_LINES {
                complaints.push(format!("{}:{first}: a function of {count} lines", source.path));
            }
        }
    }
    complain(&complaints);
}

/// From `fn` to the closing brace of every function that has a body.
fn functions(code: &str) -> Vec<Range<usize>> {
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    for start in words(code, "fn") {
        let named = bytes.get(start + 3).is_some_and(|&byte| is_word(byte));
        let (mut depth, mut at) = (0, start);
        // The body begins at the first brace outside of parameters and array types.
        while named && at < bytes.len() {
            match bytes[at] {
                b'(' | b'[' => depth += 1,
                b')' | b']' => depth -= 1,
                b'{' | b';' if depth == 0 => break,
                _ => {}
            }
            at += 1;
        }
        if !named || bytes.get(at) != Some(&b'{') {
            continue;
        }
        let mut braces = 0;
        for (step, byte) in bytes[at..].iter().enumerate() {
            braces += i32::from(*byte == b'{') - i32::from(*byte == b'}');
            if braces == 0 {
                found.push(start..at + step);
                break;
            }
        }
    }
    found
}

#[test]
fn unsafe_code_lies_only_in_files_that_say_so() {
    let mut complaints = Vec::new();
    for source in sources() {
        let holds = words(&source.code, "unsafe").next().is_some();
        let says = source.text.starts_with("#![expect(unsafe_code");
        let listed = UNSAFE.contains(&source.path.as_str());
        if holds != says || holds != listed {
            complaints.push(format!(
                "{}: holds unsafe code: {holds}, says so in line one: {says}, is listed: {listed}",
                source.path
            ));
        }
    }
    complain(&complaints);
}

#[test]
fn banned_words_do_not_occur() {
    // Put together here, so that this file does not hold them.
    let in_code =
        [["todo", "!"], ["unimplemented", "!"], ["dbg", "!"], ["#[", "allow("], ["#![", "allow("]];
    let anywhere = [["TO", "DO"], ["FIX", "ME"], ["XX", "X:"]];
    let mut complaints = Vec::new();
    for source in sources() {
        for (number, (line, code)) in (1..).zip(source.text.lines().zip(source.code.lines())) {
            let banned = in_code.iter().find(|word| code.contains(&word.concat()));
            let word =
                banned.or_else(|| anywhere.iter().find(|word| line.contains(&word.concat())));
            if let Some(word) = word {
                complaints.push(format!("{}:{number}: {}", source.path, word.concat()));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn every_dependency_says_what_it_is_for() {
    let mut manifests = Vec::new();
    collect(&root().join("tests"), "Cargo.toml", &mut manifests);
    collect(&root().join("integration"), "Cargo.toml", &mut manifests);
    manifests.push(root().join("Cargo.toml"));
    assert!(manifests.len() >= 3, "{manifests:?}");
    let (mut complaints, mut seen) = (Vec::new(), 0);
    for manifest in manifests {
        let text = fs::read_to_string(&manifest).expect("a manifest");
        let mut inside = false;
        for line in text.lines() {
            if line.starts_with('[') {
                inside = line.ends_with("dependencies]");
            } else if inside && line.contains('=') {
                seen += 1;
                if !line.contains(" # ") {
                    complaints.push(format!("{}: {line}", manifest.display()));
                }
            }
        }
    }
    assert!(seen > 10, "only {seen} dependencies were found");
    complain(&complaints);
}

#[test]
fn the_top_level_is_what_it_should_be() {
    let expected = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE-APACHE",
        "LICENSE-BSD-3-Clause",
        "README.md",
        "integration",
        "rust-toolchain.toml",
        "src",
        "tests",
    ];
    let entries = fs::read_dir(root()).expect("the repository");
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let names: BTreeSet<String> = entries
        .map(|entry| name(entry.expect("an entry")))
        .filter(|name| !name.starts_with('.') && name != "target")
        .collect();
    assert!(names.iter().eq(expected), "{names:?}");
}

#[test]
fn the_reader_of_sources_reads() {
    let text =
        "fn a(x: [u8; 4]) { \"} // {\"; 'x'; '\\''; }\n// fn b() {\nfn c<'a>() -> &'a u8 {\n}\n";
    let code = blanked(text);
    assert_eq!(code.len(), text.len());
    let found: Vec<_> = functions(&code).into_iter().map(|range| &text[range.start..]).collect();
    assert_eq!(found.len(), 2);
    assert!(found[0].starts_with("fn a") && found[1].starts_with("fn c"));
    assert_eq!(functions(&code)[0].end, text.find('\n').expect("a line") - 1);
    assert_eq!(words("crate::x crates my_crate crate", "crate").count(), 2);
    assert!(sources().len() > 40, "the sources were not found");
}
