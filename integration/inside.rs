//! Looking inside disks: a Debian root as in a cloud image, partition tables of other tools, every
//! kind of file system that can be read, and images made to mislead.
//!
//! `SEEDS=2000` spoils that many file systems of each kind.

#[path = "inside/spoiled.rs"]
mod spoiled;
#[path = "inside/tools.rs"]
mod tools;
#[path = "inside/trees.rs"]
mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use integration::scratch::{Scratch, target_directory};
use serde_json::Value;
use tools::{blank, done, json, ours, put, system};

const MIB: u64 = 1 << 20;

/// A path as a word of a command line.
fn word(path: &Path) -> &str {
    path.to_str().expect("our paths are text")
}

/// Makes an image of a disk with an EFI partition and a root as in a cloud image.
fn cloud_image(scratch: &Scratch, root: &Path, boot: &Path) -> String {
    let (esp, ext4) = (scratch.file("esp.img"), scratch.file("root.ext4"));
    blank(&esp, 64 * MIB);
    system("mkfs.vfat", &["-F", "32", "-n", "EFI", word(&esp)]);
    let mut words = vec!["-i", word(&esp), "-s", "-m"];
    let names: Vec<_> =
        fs::read_dir(boot).expect("read").map(|one| one.expect("one").path()).collect();
    words.extend(names.iter().map(|path| word(path)));
    words.push("::");
    system("mcopy", &words);
    system("mke2fs", &["-q", "-t", "ext4", "-L", "root", "-d", word(root), word(&ext4), "1G"]);
    let (raw, qcow2) = (scratch.file("disk.raw"), scratch.file("disk.qcow2"));
    blank(&raw, 1200 * MIB);
    let boot = "size=64M,type=uefi,name=boot";
    let root = "type=root-x86-64,name=root,size=1G";
    let create = ["partitions", "-f", "raw", "--create", "gpt", "--add", boot, "--add", root];
    done(&[&create[..], &[word(&raw)]].concat());
    put(&esp, &raw, MIB);
    put(&ext4, &raw, 65 * MIB);
    let said = system("sgdisk", &["--verify", word(&raw)]);
    assert!(said.contains("No problems found"), "{said}");
    agree_with_sfdisk(&raw);
    system("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", word(&raw), word(&qcow2)]);
    word(&qcow2).to_owned()
}

#[test]
fn a_debian_root_is_listed_and_copied_as_it_was() {
    let guest = target_directory().join("guest");
    let stored = guest.join("root.raw");
    assert!(stored.exists(), "{} is missing: run .ci/setup first", stored.display());
    let scratch = Scratch::new("inside-debian");
    let (root, boot) = (scratch.file("root"), scratch.file("boot"));
    fs::create_dir_all(&root).expect("make a directory");
    system("debugfs", &["-R", &format!("rdump / {}", word(&root)), word(&stored)]);
    assert!(root.join("etc/debian_version").exists(), "the root was not taken apart");
    fs::create_dir_all(boot.join("EFI/a long name of a directory")).expect("make a directory");
    fs::copy(guest.join("vmlinuz"), boot.join("EFI/vmlinuz of the guest")).expect("copy");
    fs::copy(guest.join("initramfs"), boot.join("EFI/a long name of a directory/initramfs"))
        .expect("copy");
    let image = cloud_image(&scratch, &root, &boot);

    let place = format!("{image}:root");
    let mut original = trees::describe(&root);
    original.retain(|path, _| !path.starts_with(b"lost+found") && !path.is_empty());
    let listed = json(&["ls", "-lR", "--json", &place, "/"]);
    let listed: BTreeMap<_, _> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| (one["path"].as_str().expect("a path")[1..].to_owned(), one))
        .filter(|(path, _)| path != "lost+found")
        .collect();
    assert_eq!(listed.len(), original.len(), "entries");
    assert!(listed.len() > 5000, "{} entries are no Debian root", listed.len());
    for (path, described) in &original {
        let path = String::from_utf8_lossy(path).into_owned();
        let one = listed.get(&path).unwrap_or_else(|| panic!("{path} is not listed"));
        assert_eq!(one["type"], described.kind, "{path}");
        assert_eq!(one["mode"], format!("{:04o}", described.mode), "{path}");
        if described.kind == "file" {
            assert_eq!(one["size"], described.size, "{path}");
        }
        if described.kind == "symlink" {
            assert_eq!(one["target"], described.target(), "{path}");
        }
    }

    let copy = scratch.file("copy");
    done(&["cp-out", "-R", &place, "/", word(&copy)]);
    let wrong = trees::differences(&root, &copy, true);
    assert!(wrong.is_empty(), "{}", wrong[..wrong.len().min(20)].join("\n"));
    let copy = scratch.file("copy-of-boot");
    done(&["cp-out", "-R", &format!("{image}:1"), "/", word(&copy)]);
    let wrong = trees::differences(&boot, &copy, false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let release = fs::read_to_string(root.join("usr/lib/os-release")).expect("read");
    assert_eq!(done(&["cat", &place, "/etc/os-release"]), release);
}

/// The table as sfdisk tells it and as we do: all keys of the former are the same.
fn agree_with_sfdisk(raw: &Path) {
    let theirs = system("sfdisk", &["--json", word(raw)]);
    let theirs: Value = serde_json::from_str(&theirs).expect("JSON");
    let ours = json(&["partitions", "-f", "raw", "--json", word(raw)]);
    let (theirs, ours) = (&theirs["partitiontable"], &ours["partitiontable"]);
    for (key, value) in theirs.as_object().expect("an object") {
        if key != "partitions" {
            assert_eq!(&ours[key], value, "{key}");
        }
    }
    // Newer versions of sfdisk leave out what an empty table has none of.
    let none = Vec::new();
    let list = |table: &Value| table["partitions"].as_array().unwrap_or(&none).clone();
    let (theirs, ours) = (list(theirs), list(ours));
    let by_node = |all: &[Value]| -> BTreeMap<String, Value> {
        all.iter().map(|one| (one["node"].to_string(), one.clone())).collect()
    };
    let (theirs, ours) = (by_node(&theirs), by_node(&ours));
    assert!(ours.keys().eq(theirs.keys()), "{ours:?}\n{theirs:?}");
    for (node, one) in theirs {
        for (key, value) in one.as_object().expect("an object") {
            if key != "attrs" {
                assert_eq!(&ours[&node][key], value, "{node}: {key}");
            }
        }
    }
}

#[test]
fn tables_of_other_tools_are_read() {
    let scratch = Scratch::new("inside-tables");
    let raw = scratch.file("disk.raw");
    let feed = |script: &str| {
        blank(&raw, 0);
        blank(&raw, 256 * MIB);
        let input = scratch.file("script");
        fs::write(&input, script).expect("write");
        let line = format!("sfdisk -q {} <{}", word(&raw), word(&input));
        system("sh", &["-c", &line]);
        agree_with_sfdisk(&raw);
    };
    feed("label: gpt\nsize=32M,type=U,name=\"EFI\"\nsize=64M,type=S\ntype=L,name=\"Grüße 日本\"\n");
    feed("label: dos\nsize=32M,type=c,bootable\nsize=64M,type=82\ntype=83\n");
    feed(
        "label: dos\nsize=8M\nsize=8M\nsize=200M,type=f\nsize=8M\nsize=9M,type=82\nsize=10M\n\
         size=11M,type=7\nsize=12M\n",
    );
    blank(&raw, 256 * MIB);
    system(
        "sgdisk",
        &["-Z", "-a", "1", "-n", "3:40:1000", "-n", "128:2048:0", "-A", "3:set:2", word(&raw)],
    );
    agree_with_sfdisk(&raw);
    // Without its start, a table is read from its end.
    let file = fs::OpenOptions::new().write(true).open(&raw).expect("open");
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 512], 512).expect("write");
    let told = done(&["partitions", "-f", "raw", word(&raw)]);
    assert!(told.contains("copy at its end"), "{told}");
}

#[test]
fn tables_that_are_made_please_other_tools() {
    let scratch = Scratch::new("inside-made");
    let (raw, qcow2) = (scratch.file("disk.raw"), scratch.file("disk.qcow2"));
    let make = |words: &[&str]| {
        drop(fs::remove_file(&qcow2));
        done(&["create", "-q", word(&qcow2), "300M"]);
        let mut all = vec!["partitions", word(&qcow2), "--create"];
        all.extend(words);
        done(&all);
        system("qemu-img", &["check", "-q", word(&qcow2)]);
        system("qemu-img", &["convert", "-O", "raw", word(&qcow2), word(&raw)]);
        agree_with_sfdisk(&raw);
        // It complains when something is wrong.
        let said = system("sfdisk", &["--verify", word(&raw)]);
        assert!(!said.to_lowercase().contains("overlap"), "{said}");
    };
    make(&["gpt"]);
    make(&["gpt", "--add", "size=16M,type=esp,name=boot,bootable", "--add", "start=40M,type=swap"]);
    assert!(system("sgdisk", &["-v", word(&raw)]).contains("No problems found"));
    let guids = json(&["partitions", "--json", word(&qcow2)]);
    let parts = &guids["partitiontable"]["partitions"];
    assert_ne!(parts[0]["uuid"], parts[1]["uuid"]);
    make(&["mbr", "--add", "size=16M,type=c,bootable", "--add", "type=82"]);
    let ten = ["--add", "size=10M"].repeat(10);
    make(&[&["mbr"], &ten[..]].concat());
    let count = |path: &Path| {
        let told = json(&["partitions", "--json", word(path)]);
        told["partitiontable"]["partitions"].as_array().map(Vec::len)
    };
    assert_eq!(count(&qcow2), Some(11), "the extended partition and ten others");
    // What is there is not replaced by mistake, and a new MBR hides an older GPT.
    let refused = ours(&["partitions", "--create", "gpt", word(&qcow2)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force"));
    done(&["partitions", "--create", "gpt", "--force", "--add", "type=linux", word(&qcow2)]);
    done(&["partitions", "--create", "mbr", "--force", "--add", "type=83", word(&qcow2)]);
    let table = json(&["partitions", "--json", word(&qcow2)]);
    assert_eq!(table["partitiontable"]["label"], "dos");
}

#[test]
fn every_kind_of_file_system_is_read() {
    let scratch = Scratch::new("inside-kinds");
    let (unix, plain) = (scratch.file("unix"), scratch.file("plain"));
    trees::make(&unix, true);
    trees::make(&plain, false);
    let image = scratch.file("image");
    let check = |tree: &Path, kind: &str, times: bool| {
        let copy = scratch.file("copy");
        let words = ["cp-out", "-R", "-f", "raw", word(&image), "/", word(&copy)];
        done(&words);
        let wrong = trees::differences(tree, &copy, times);
        assert!(wrong.is_empty(), "{kind}: {}", wrong[..wrong.len().min(20)].join("\n"));
        fs::remove_dir_all(&copy).expect("remove the copy");
        let told = json(&["stat", "--json", "-f", "raw", word(&image), "/short"]);
        assert_eq!(told[0]["filesystem"], kind);
        fs::remove_file(&image).expect("remove the image");
    };
    for (kind, block, more) in [
        ("ext4", "1024", ""),
        ("ext4", "2048", "^metadata_csum"),
        ("ext4", "4096", ""),
        ("ext2", "1024", ""),
        ("ext2", "4096", "^dir_index"),
        ("ext3", "1024", ""),
        ("ext3", "4096", ""),
        ("ext4", "4096", "^extent,^64bit"),
    ] {
        if kind == "ext2" && block == "1024" {
            trees::remove_holes(&unix);
        }
        let mut words = vec!["-q", "-t", kind, "-b", block, "-d", word(&unix)];
        if !more.is_empty() {
            words.extend(["-O", more]);
        }
        words.extend([word(&image), "64M"]);
        system("mke2fs", &words);
        check(&unix, kind, true);
    }
    for (bits, size, cluster) in [("12", 8, "8"), ("16", 32, "2"), ("32", 64, "1")] {
        blank(&image, size * MIB);
        system("mkfs.vfat", &["-F", bits, "-s", cluster, word(&image)]);
        let names: Vec<_> =
            fs::read_dir(&plain).expect("read").map(|one| one.expect("one").path()).collect();
        let mut words = vec!["-i", word(&image), "-s"];
        words.extend(names.iter().map(|path| word(path)));
        words.push("::");
        system("mcopy", &words);
        check(&plain, "vfat", false);
    }
}

#[test]
fn paths_lead_where_they_should() {
    let scratch = Scratch::new("inside-paths");
    let (tree, image) = (scratch.file("tree"), scratch.file("image"));
    trees::make(&tree, true);
    system("mke2fs", &["-q", "-t", "ext4", "-d", word(&tree), word(&image), "64M"]);
    let cat = |path: &str| done(&["cat", "-f", "raw", word(&image), path]);
    for path in
        ["short", "/link", "/absolute", "to-directory/../../short", "//one/./above", "/../short"]
    {
        assert_eq!(cat(path), "a short file\n", "{path}");
    }
    let refused = |words: &[&str]| {
        let output = ours(&[words, &["-f", "raw"]].concat());
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let name = word(&image);
    assert!(refused(&["cat", name, "/loop"]).contains("symbolic links"));
    assert!(refused(&["cat", name, "/far"]).contains("no such file"));
    assert!(refused(&["cat", name, "/one"]).contains("directory"));
    assert!(refused(&["cat", name, "/short/x"]).contains("not a directory"));
    assert!(refused(&["cp-out", name, "/one", word(&scratch.file("x"))]).contains("-R"));
    assert!(refused(&["ls", "-R", "--max-entries", "100", name]).contains("--max-entries"));
    assert!(refused(&["cat", name, "/long", "--max-bytes", "4096"]).contains("--max-bytes"));
    assert!(refused(&["ls", &format!("{name}:1")]).contains("no partitions"));
    let listed = done(&["ls", "-f", "raw", name]);
    assert!(listed.contains("not \\xff text\n"), "{listed}");
    let link = json(&["stat", "-f", "raw", "--json", name, "/link"]);
    assert_eq!((&link[0]["type"], &link[0]["target"]), (&"symlink".into(), &"short".into()));
}
