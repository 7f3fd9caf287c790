//! What a reader has to know of the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::server::Programs;

/// Names and values.
pub(crate) fn facts(programs: &Programs) -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let processor = first_field("/proc/cpuinfo", "model name");
    let memory = first_field("/proc/meminfo", "MemTotal");
    let theirs = programs.against.as_deref().unwrap_or(Path::new("qemu-storage-daemon"));
    vec![
        ("date", said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        ("processor", format!("{processor}, {cores} cores")),
        ("memory", memory),
        ("kernel", said("uname", &["-sr"])),
        ("ours", said(&programs.ours, &["--version"])),
        ("theirs", said(theirs, &["--version"])),
    ]
}

/// The first line that a program prints.
fn said(program: impl AsRef<std::ffi::OsStr>, words: &[&str]) -> String {
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
