//! The programs that make what is looked into, and the one that looks.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output};

use integration::daemon::program;
use serde_json::Value;

/// Runs a program of the system, which must succeed.
pub(crate) fn system<Word: AsRef<OsStr>>(name: &str, words: &[Word]) -> String {
    let mut command = Command::new(name);
    // mke2fs and its kind lie where only root looks.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    command.args(words).env("PATH", path).env("MTOOLS_SKIP_CHECK", "1").env("TZ", "UTC");
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}{complaint}");
    said
}

/// What our program answers.
pub(crate) fn ours<Word: AsRef<OsStr>>(words: &[Word]) -> Output {
    Command::new(program()).args(words).env_remove("RUST_LOG").output().expect("start it")
}

/// The same when it must succeed.
pub(crate) fn done<Word: AsRef<OsStr>>(words: &[Word]) -> String {
    let output = ours(words);
    let complaint = String::from_utf8_lossy(&output.stderr);
    let words: Vec<_> = words.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    assert!(output.status.success(), "{}: {}: {complaint}", words.join(" "), output.status);
    String::from_utf8(output.stdout).expect("text")
}

/// The same when it answers in JSON.
pub(crate) fn json<Word: AsRef<OsStr>>(words: &[Word]) -> Value {
    serde_json::from_str(&done(words)).expect("JSON")
}

/// An empty file of so many bytes.
pub(crate) fn blank(path: &Path, size: u64) {
    File::create(path).and_then(|file| file.set_len(size)).expect("make a file");
}

/// Puts the bytes of one file into another from `at` on.
pub(crate) fn put(from: &Path, to: &Path, at: u64) {
    let mut from = File::open(from).expect("open");
    let mut to = OpenOptions::new().write(true).open(to).expect("open");
    to.seek(SeekFrom::Start(at)).expect("seek");
    let mut piece = vec![0; 1 << 20];
    loop {
        let count = from.read(&mut piece).expect("read");
        if count == 0 {
            return;
        }
        if piece[..count].iter().all(|byte| *byte == 0) {
            to.seek(SeekFrom::Current(count as i64)).expect("seek");
        } else {
            to.write_all(&piece[..count]).expect("write");
        }
    }
}
