//! What a reader has to know of the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Names and values.
pub(crate) fn facts(program: &Path) -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let processor = first_field("/proc/cpuinfo", "model name");
    let memory = first_field("/proc/meminfo", "MemTotal");
    vec![
        ("date", said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        ("processor", format!("{processor}, {cores} cores")),
        ("memory", memory),
        ("kernel", said("uname", &["-sr"])),
        ("ours", said(program.to_str().unwrap_or_default(), &["--version"])),
        ("theirs", said("qemu-storage-daemon", &["--version"])),
    ]
}

/// The first line that a program prints.
fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.ok().and_then(|text| Some(text.lines().next()?.to_owned())).unwrap_or("unknown".to_owned())
}

/// The value of a `name: value` line.
fn first_field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    value.unwrap_or("unknown".to_owned())
}
