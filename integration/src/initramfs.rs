//! An initramfs whose first program is one of ours: the kernel unpacks one archive after the other,
//! and the last file of a name counts.

use std::fs;
use std::path::Path;

use crate::guest::built;

/// Writes the guest's initramfs to `path` with `script` as its first program.
///
/// # Panics
///
/// Panics when it cannot be written.
pub fn with_init(path: &Path, script: &str) {
    let mut bytes = fs::read(built("initramfs")).expect("read the initramfs");
    add_file(&mut bytes, "init", 0o100_755, script.as_bytes());
    add_file(&mut bytes, "TRAILER!!!", 0, &[]);
    fs::write(path, bytes).expect("write an initramfs");
}

/// Appends an entry in the format "newc": a header of hexadecimal numbers, the name and the
/// content, each padded to four bytes.
fn add_file(archive: &mut Vec<u8>, name: &str, mode: usize, content: &[u8]) {
    pad(archive);
    // Inode, mode, owner, group, links, time, length, devices, length of the name, check sum.
    let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    pad(archive);
    archive.extend(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
