//! How files are told of, to people and to programs.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::image::Output;
use crate::inside::filesystem::{Kind, Node};

/// What is printed.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Form {
    /// What is printed
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    /// Short for --output=json
    #[arg(long)]
    json: bool,
}

impl Form {
    pub(super) fn is_json(self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// Bytes as text that does nothing to a terminal: what is no character, or controls something, is
/// written as a number.
pub(super) fn safe(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for letter in chunk.valid().chars() {
            match letter {
                '\n' => text.push_str("\\n"),
                letter if letter.is_control() => {
                    text.push_str(&format!("\\x{:02x}", u32::from(letter)));
                }
                letter => text.push(letter),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// A point in time as in RFC 3339, to the second.
pub(super) fn time(time: Option<SystemTime>) -> String {
    // The crate has no years before 1970, nor five digits of them.
    const LAST: u64 = 253_402_300_799;
    let Some(time) = time else { return "-".to_owned() };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) if since.as_secs() <= LAST => humantime::format_rfc3339_seconds(time).to_string(),
        Ok(since) => format!("@{}", since.as_secs()),
        Err(before) => format!("@-{}", before.duration().as_secs()),
    }
}

/// Permissions as `ls -l` shows them.
pub(super) fn mode(node: &Node) -> String {
    let mut text = String::from(node.kind.letter());
    for (shift, special, (set, also_executable)) in
        [(6, 0o4000, ('S', 's')), (3, 0o2000, ('S', 's')), (0, 0o1000, ('T', 't'))]
    {
        let bits = node.mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (bits & 1 != 0, node.mode & special != 0) {
            (false, false) => '-',
            (true, false) => 'x',
            (false, true) => set,
            (true, true) => also_executable,
        });
    }
    text
}

/// What is known of a file, for programs.
pub(super) fn json_of(name: &[u8], node: &Node, target: Option<&[u8]>) -> Value {
    let moment = |moment: Option<SystemTime>| moment.map(|moment| time(Some(moment)));
    let mut value = json!({
        "name": String::from_utf8_lossy(name),
        "type": node.kind.name(),
        "size": node.size,
        "mode": format!("{:04o}", node.mode),
        "uid": node.uid,
        "gid": node.gid,
        "modified": moment(node.modified),
        "accessed": moment(node.accessed),
        "created": moment(node.created),
    });
    if let (Kind::Symlink, Some(target)) = (node.kind, target) {
        value["target"] = String::from_utf8_lossy(target).into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn names_do_nothing_to_a_terminal() {
        assert_eq!(safe(b"plain \\x2d \xc3\xa4"), "plain \\x2d ä");
        assert_eq!(safe(b"a\nb\x1b[2J\xff\xc2\x9b"), "a\\nb\\x1b[2J\\xff\\x9b");
    }

    #[test]
    fn times_are_told_whatever_they_are() {
        let after = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(time(after(1_700_000_000)), "2023-11-14T22:13:20Z");
        assert_eq!(time(after(u64::from(u32::MAX) * 4000)), "@17179869180000");
        assert_eq!(time(Some(UNIX_EPOCH - Duration::from_secs(5))), "@-5");
        assert_eq!(time(None), "-");
    }

    #[test]
    fn modes_are_those_of_ls() {
        let shown = |kind, bits| {
            let times = (None, None, None);
            let (modified, accessed, created) = times;
            mode(&Node { kind, size: 0, mode: bits, uid: 0, gid: 0, modified, accessed, created })
        };
        assert_eq!(shown(Kind::File, 0o4755), "-rwsr-xr-x");
        assert_eq!(shown(Kind::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(shown(Kind::Symlink, 0o6644), "lrwSr-Sr--");
        assert_eq!(shown(Kind::Fifo, 0), "p---------");
    }
}
