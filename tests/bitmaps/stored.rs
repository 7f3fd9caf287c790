//! Bitmaps as they are stored in an image: made by `qemu-img`, read by a small reader of the
//! test's own and by QEMU, which must agree.

use std::io::Write;
use std::process::{Command, Stdio};

use common::images::{IMAGE, Made};
use common::qemu::Dir;

/// Flags of a directory entry.
pub(crate) const IN_USE: u32 = 1;
pub(crate) const AUTO: u32 = 2;

/// A bitmap to be made.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) name: &'static str,
    /// Bytes of the disk for each bit.
    pub(crate) granularity: u64,
    pub(crate) enabled: bool,
}

/// A bitmap as the image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) flags: u32,
    pub(crate) granularity: u64,
    /// Where its entry lies in the file.
    pub(crate) entry: usize,
    pub(crate) table: usize,
    pub(crate) bits: Vec<bool>,
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"))).expect("fits")
}

fn half(bytes: &[u8], at: usize) -> usize {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four")) as usize
}

/// Where the bitmaps extension's bytes lie in the file.
pub(crate) fn extension(bytes: &[u8]) -> Option<usize> {
    let mut at = half(bytes, 100);
    while half(bytes, at) != 0 {
        if half(bytes, at) == 0x2385_2875 {
            return Some(at + 8);
        }
        at += 8 + half(bytes, at + 4).next_multiple_of(8);
    }
    None
}

/// Whether the image says that its bitmaps are valid.
pub(crate) fn is_valid(bytes: &[u8]) -> bool {
    bytes[95] & 1 == 1
}

/// The flags of all bitmaps, without a look at their bits.
pub(crate) fn flags(bytes: &[u8]) -> Vec<u32> {
    let extension = extension(bytes).expect("an image with bitmaps");
    let mut at = word(bytes, extension + 16);
    let mut next = || {
        let flags = u32::try_from(half(bytes, at + 12)).expect("half a word");
        let name_len = usize::from(bytes[at + 18]) << 8 | usize::from(bytes[at + 19]);
        at += (24 + half(bytes, at + 20) + name_len).next_multiple_of(8);
        flags
    };
    (0..half(bytes, extension)).map(|_| next()).collect()
}

/// All bitmaps of an image that has some.
pub(crate) fn read(bytes: &[u8]) -> Vec<Stored> {
    let extension = extension(bytes).expect("an image with bitmaps");
    let (count, mut at) = (half(bytes, extension), word(bytes, extension + 16));
    let (size, cluster) = (word(bytes, 24), 1 << half(bytes, 20));
    let mut found = Vec::new();
    for _ in 0..count {
        let granularity = 1 << bytes[at + 17];
        let bits = size.div_ceil(granularity);
        let table = word(bytes, at);
        let mut data = Vec::new();
        for index in 0..half(bytes, at + 8) {
            match word(bytes, table + index * 8) {
                0 => data.resize(data.len() + cluster, 0),
                1 => data.resize(data.len() + cluster, 0xff),
                place => {
                    data.extend_from_slice(&bytes[place..(place + cluster).min(bytes.len())]);
                    data.resize(data.len().next_multiple_of(cluster), 0);
                }
            }
        }
        let bit = |number: usize| data[number / 8] >> (number % 8) & 1 == 1;
        assert!(!(bits..data.len() * 8).any(bit), "bits behind the end of the disk");
        let extra = half(bytes, at + 20);
        let name_len = usize::from(bytes[at + 18]) << 8 | usize::from(bytes[at + 19]);
        let name = &bytes[at + 24 + extra..][..name_len];
        found.push(Stored {
            name: String::from_utf8(name.to_vec()).expect("made with such names"),
            flags: u32::try_from(half(bytes, at + 12)).expect("half a word"),
            granularity: granularity as u64,
            entry: at,
            table,
            bits: (0..bits).map(bit).collect(),
        });
        at += (24 + extra + name_len).next_multiple_of(8);
    }
    found
}

/// Adds bitmaps to an image that was made, and then has `qemu-io` run commands on it.
pub(crate) fn add(made: &mut Made, bitmaps: &[Wanted], commands: &[&str]) {
    let dir = Dir::new();
    made.files.iter().for_each(|(name, content)| dir.write(name, content));
    for Wanted { name, granularity, enabled } in bitmaps {
        let granularity = granularity.to_string();
        let state = if *enabled { "--enable" } else { "--disable" };
        dir.img(&["bitmap", "--add", "-g", &granularity, state, IMAGE, name]);
    }
    let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
    if !commands.is_empty() {
        dir.io(IMAGE, &commands);
    }
    for (name, content) in &mut made.files {
        *content = dir.read(name);
    }
}

/// What QEMU says of each bitmap: its name, whether it is inconsistent, and how many bytes of the
/// disk are dirty.
pub(crate) fn seen_by_qemu(dir: &Dir) -> Vec<(String, bool, u64)> {
    let image = format!(
        "driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={}",
        dir.path().join(IMAGE).display()
    );
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=stdio", "--monitor", "stdio", "--blockdev", &image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .current_dir(dir.path())
        .spawn()
        .expect("qemu-storage-daemon is needed: install qemu-system-common");
    let commands = ["qmp_capabilities", "query-named-block-nodes", "quit"];
    let commands = commands.map(|command| format!("{{\"execute\":\"{command}\"}}")).concat();
    let mut input = daemon.stdin.take().expect("piped");
    input.write_all(commands.as_bytes()).expect("the daemon listens");
    let output = daemon.wait_with_output().expect("the daemon ends");
    drop(input);
    let answer = String::from_utf8(output.stdout).expect("text");
    let list = answer.split_once("\"dirty-bitmaps\": [").expect("it has bitmaps").1;
    let list = list.split_once(']').expect("a list").0;
    let one = |text: &str| {
        let after = |key: &str| text.split_once(&format!("\"{key}\": ")).map(|(_, rest)| rest);
        let name = after("name").and_then(|rest| rest.split('"').nth(1)).expect("a name");
        let count = after("count").and_then(|rest| rest.split(['}', ',']).next());
        let inconsistent = after("inconsistent").is_some_and(|rest| rest.starts_with("true"));
        (name.to_owned(), inconsistent, count.expect("a count").trim().parse().expect("a number"))
    };
    let mut found: Vec<_> = list.split_inclusive('}').map(one).collect();
    found.sort();
    found
}
