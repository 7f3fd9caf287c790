//! Directories with all that is in them: made, described and compared.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;

/// What a file is, as far as it must be the same after it was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Described {
    /// The word that `ls --json` has for it.
    pub(crate) kind: &'static str,
    pub(crate) mode: u32,
    pub(crate) modified: i64,
    pub(crate) size: u64,
    /// A digest of its bytes, or where it leads.
    content: Vec<u8>,
}

impl Described {
    pub(crate) fn is_special(&self) -> bool {
        !matches!(self.kind, "file" | "directory" | "symlink")
    }

    /// Where a symbolic link leads.
    pub(crate) fn target(&self) -> String {
        String::from_utf8_lossy(&self.content).into_owned()
    }
}

/// FNV-1a: nobody makes these files so that their digests are the same.
fn digest(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).expect("open");
    let (mut piece, mut sum) = (vec![0; 1 << 20], 0xcbf2_9ce4_8422_2325_u64);
    loop {
        let count = file.read(&mut piece).expect("read");
        if count == 0 {
            return sum.to_le_bytes().to_vec();
        }
        for byte in &piece[..count] {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// All files below a directory by their paths in it; the directory itself is the empty path.
pub(crate) fn describe(root: &Path) -> BTreeMap<Vec<u8>, Described> {
    let mut found = BTreeMap::new();
    let mut ahead = vec![Vec::new()];
    while let Some(inner) = ahead.pop() {
        let path = root.join(OsStr::from_bytes(&inner));
        let metadata = path.symlink_metadata().expect("look at a file");
        let kind = metadata.file_type();
        let (kind, size, content) = if kind.is_dir() {
            for entry in fs::read_dir(&path).expect("read a directory") {
                let name = entry.expect("an entry").file_name();
                let joint: &[u8] = if inner.is_empty() { b"" } else { b"/" };
                ahead.push([&inner, joint, name.as_bytes()].concat());
            }
            ("directory", 0, Vec::new())
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec();
            ("symlink", metadata.len(), target)
        } else if kind.is_file() {
            ("file", metadata.len(), digest(&path))
        } else if kind.is_char_device() {
            ("character device", 0, Vec::new())
        } else if kind.is_block_device() {
            ("block device", 0, Vec::new())
        } else if kind.is_fifo() {
            ("fifo", 0, Vec::new())
        } else {
            ("socket", 0, Vec::new())
        };
        let (mode, modified) = (metadata.mode() & 0o7777, metadata.mtime());
        found.insert(inner, Described { kind, mode, modified, size, content });
    }
    found
}

/// What is different between two trees, the copy being the second one: special files are left out,
/// bits above the permissions are not kept, and with `times` off neither are modes and times.
pub(crate) fn differences(original: &Path, copy: &Path, times: bool) -> Vec<String> {
    let (one, other) = (describe(original), describe(copy));
    let mut wrong = Vec::new();
    for (path, described) in &one {
        let name = String::from_utf8_lossy(path);
        // mke2fs makes this one.
        if described.is_special() || name.starts_with("lost+found") {
            continue;
        }
        let mut expected = described.clone();
        expected.mode &= 0o777;
        match other.get(path) {
            None => wrong.push(format!("{name} is missing")),
            Some(found) => {
                if !times || path.is_empty() {
                    (expected.mode, expected.modified) = (found.mode, found.modified);
                }
                if *found != expected {
                    wrong.push(format!("{name} is {found:?}, and should be {expected:?}"));
                }
            }
        }
    }
    let new = other.keys().filter(|path| !one.contains_key(*path));
    wrong.extend(
        new.map(|path| String::from_utf8_lossy(path).into_owned())
            .filter(|name| name != "lost+found")
            .map(|name| format!("{name} is new")),
    );
    wrong
}

/// A tree with what file systems store in different ways.
pub(crate) fn make(root: &Path, unix: bool) {
    let write = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("make a directory");
        fs::write(path, bytes).expect("write a file");
    };
    let bytes: Vec<u8> = (0..400_000_u32).map(|at| (at / 3) as u8 ^ (at >> 9) as u8).collect();
    write("empty", b"");
    write("short", b"a short file\n");
    write("long", &bytes);
    write("a name that is much longer than eleven characters.text", &bytes[..5000]);
    write("Grüße/日本語.txt", "text".as_bytes());
    write("one/two/three/four/five/six", b"deep");
    // More entries than fit one block: a tree of hashes in ext3 and ext4, a chain of clusters in a
    // FAT.
    for number in 0..400 {
        write(&format!("many/entry with the number {number}"), &bytes[..number % 7]);
    }
    if !unix {
        return;
    }
    // Holes between more pieces than an inode has room for. See `remove_holes`.
    let holes = File::create(root.join("holes")).expect("make a file");
    for piece in 0..200 {
        holes.write_all_at(&bytes[..4096], piece * 16_384).expect("write");
    }
    holes.set_len(8 << 20).expect("resize");
    (&File::create(root.join("end-hole")).expect("make a file")).write_all(b"x").expect("write");
    File::options()
        .write(true)
        .open(root.join("end-hole"))
        .expect("open")
        .set_len(1 << 20)
        .expect("resize");
    fs::write(root.join(OsStr::from_bytes(b"not \xff text")), b"bytes").expect("write");
    symlink("short", root.join("link")).expect("link");
    symlink("/one/two/../../short", root.join("absolute")).expect("link");
    symlink("one/two", root.join("to-directory")).expect("link");
    symlink("x".repeat(200), root.join("far")).expect("link");
    symlink("loop", root.join("loop")).expect("link");
    symlink("../../../../short", root.join("one/above")).expect("link");
}

/// Takes away the files with holes behind their first blocks: where blocks are listed one by one,
/// as ext2 and ext3 do it, the crate takes a missing list for damage.
pub(crate) fn remove_holes(root: &Path) {
    for name in ["holes", "end-hole"] {
        fs::remove_file(root.join(name)).expect("remove a file");
    }
}
