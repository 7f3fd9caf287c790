//! What a header may make us open: names of backing and data files.

use super::*;
use common::qemu::Dir;
use std::path::PathBuf;
use vhost_user_qcow2::image::Format;
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::threads::Threads;

/// A small image that names a backing file of a format.
fn overlay(backing: &str, format: Option<&str>) -> Vec<u8> {
    let mut victim = Victim::plain();
    let mut at = 112;
    victim.put(112, &[0; 400]);
    if let Some(format) = format {
        let len = u32::try_from(format.len()).expect("short");
        victim.put32(112, 0xe279_2aca).put32(116, len).put(120, format.as_bytes());
        at = 120 + u64::from(len).next_multiple_of(8);
    }
    victim.put64(at, 0);
    let len = u32::try_from(backing.len()).expect("short");
    victim.put64(8, 1024).put32(16, len).put(1024, backing.as_bytes());
    victim.bytes
}

fn open_on(disk: &MemDisk, name: &str, options: &OpenOptions) -> Result<Image> {
    let engine = disk.engine(0, 0);
    block_on(&engine, Image::open(&engine, disk, Path::new(name), options))
}

/// Why the image at `/guests/a/disk.qcow2` with that backing file is refused.
fn refusal(backing: &str, format: Option<&str>) -> Error {
    let disk = MemDisk::new();
    disk.add("/guests/a/disk.qcow2", overlay(backing, format));
    disk.add("/guests/b/secret", vec![0; 4096]);
    disk.add("/etc/shadow", vec![0; 4096]);
    let opened = open_on(&disk, "/guests/a/disk.qcow2", &OpenOptions::default());
    opened.expect_err("a reference that must be refused")
}

#[test]
fn only_plain_names_are_opened() {
    let names = [
        r#"json:{"driver":"file","filename":"/etc/shadow"}"#,
        "nbd://localhost/export",
        "nbd:unix:/run/socket",
        "http://example.org/disk",
        "https://example.org/disk",
        "fat:/etc",
        "file:/etc/shadow",
        "host_device:/dev/sda",
    ];
    for name in names {
        let error = refusal(name, Some("raw"));
        assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{name}: {error}");
        assert_says(&error, &["plain file names"]);
    }
}

#[test]
fn names_that_lead_out_of_the_directory_are_refused_with_the_flag() {
    for name in
        ["/etc/shadow", "../b/secret", "../../etc/shadow", "x/../../b/secret", "./../b/secret"]
    {
        let error = refusal(name, Some("raw"));
        assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{name}: {error}");
        assert_says(&error, &["--allow-path"]);
    }
}

#[test]
fn an_allowed_directory_and_no_other_may_be_referred_to() {
    let disk = MemDisk::new();
    disk.add("/guests/a/disk.qcow2", overlay("../b/secret", Some("raw")));
    disk.add("/guests/b/secret", vec![0; 4096]);
    disk.add("/guests/bb/other", vec![0; 4096]);
    let allow = |path: &str| OpenOptions {
        allow_paths: vec![PathBuf::from(path)],
        ..OpenOptions::default()
    };
    open_on(&disk, "/guests/a/disk.qcow2", &allow("/guests/b")).expect("allowed");
    // A directory whose name only begins alike.
    let error = open_on(&disk, "/guests/a/disk.qcow2", &allow("/guests/bb"));
    error.expect_err("another directory");
}

#[test]
fn a_format_is_never_guessed() {
    let error = refusal("base", None);
    assert_says(&error, &["--backing-format"]);
    let error = refusal("base", Some("vmdk"));
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
    assert_says(&error, &["vmdk"]);
    let disk = MemDisk::new();
    disk.add("a/disk.qcow2", overlay("base", None));
    // The base is a qcow2 image that names another one: as raw it is only bytes.
    disk.add("a/base", overlay("/etc/shadow", Some("raw")));
    let options = OpenOptions { backing_format: Some(Format::Raw), ..OpenOptions::default() };
    let image = open_on(&disk, "a/disk.qcow2", &options).expect("as told");
    assert_eq!(image.depth(), 2);
}

#[test]
fn a_missing_file_is_named() {
    let error = refusal("nothing-here", Some("raw"));
    assert_says(&error, &["nothing-here"]);
}

#[test]
fn chains_without_end_are_refused() {
    for length in [64, 65, 100] {
        let disk = MemDisk::new();
        for layer in 0..length - 1 {
            let name = if layer == 0 { "disk.qcow2".to_owned() } else { format!("{layer}") };
            disk.add(name, overlay(&format!("{}", layer + 1), Some("qcow2")));
        }
        disk.add(format!("{}", length - 1), Victim::plain().bytes);
        let opened = open_on(&disk, "disk.qcow2", &OpenOptions::default());
        if length <= 64 {
            assert_eq!(opened.expect("as deep as allowed").depth(), length);
        } else {
            let sentence = opened.expect_err("too deep").to_string();
            assert!(sentence.contains("64"), "{sentence}");
        }
    }
}

#[test]
fn cycles_are_refused() {
    for length in [1, 2, 5] {
        let disk = MemDisk::new();
        for layer in 0..length {
            let name =
                |layer: usize| if layer == 0 { "disk.qcow2".into() } else { layer.to_string() };
            disk.add(name(layer), overlay(&name((layer + 1) % length), Some("qcow2")));
        }
        let error = open_on(&disk, "disk.qcow2", &OpenOptions::default()).expect_err("a cycle");
        assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{error}");
        assert_says(&error, &["own backing chain"]);
    }
}

#[test]
fn a_data_file_is_no_other_file_of_the_chain_and_lies_in_the_directory() {
    let made = Layout::new(12, 800, Kind::DataFile { raw: false }).make(1);
    let (image, name) = (made.files[0].1.clone(), b"guest.data");
    let place = image.windows(name.len()).position(|part| part == name).expect("the name");
    for (other, word) in
        [("disk.qcow2", "chain"), ("/etc/pass", "--allow-path"), ("nbd:/x.sock", "plain")]
    {
        let mut bytes = image.clone();
        bytes[place..place + 10].fill(b'_');
        bytes[place..place + other.len()].copy_from_slice(other.as_bytes());
        // The extension's length, before the name.
        bytes[place - 1] = u8::try_from(other.len()).expect("short");
        let disk = MemDisk::new();
        disk.add("/a/disk.qcow2", bytes);
        disk.add("/etc/pass", Vec::new());
        let error = open_on(&disk, "/a/disk.qcow2", &OpenOptions::default());
        assert_says(&error.expect_err("a data file that is none"), &[word]);
    }
    let mut bytes = image;
    bytes[place - 8..place - 4].copy_from_slice(&7_u32.to_be_bytes());
    let disk = MemDisk::new();
    disk.add("/a/disk.qcow2", bytes);
    let error = open_on(&disk, "/a/disk.qcow2", &OpenOptions::default());
    assert_says(&error.expect_err("no name"), &["data file", "not recorded"]);
}

#[test]
fn links_and_special_files_of_the_host_lead_nowhere() {
    let (dir, outside) = (Dir::new(), Dir::new());
    outside.write("secret", &[0; 4096]);
    let open = |backing: &str| {
        dir.write("disk.qcow2", &overlay(backing, Some("raw")));
        let files = Files::new(Options::default());
        let engine = Threads::new(&files, 0).expect("an engine");
        let path = dir.path().join("disk.qcow2");
        let options = OpenOptions::default();
        let image = Image::open(&engine, files.as_ref(), &path, &options);
        block_on(&engine, image).map(|image| image.depth())
    };
    let link = |target: &Path, name: &str| {
        std::os::unix::fs::symlink(target, dir.path().join(name)).expect("a link");
    };
    link(&outside.path().join("secret"), "link");
    assert_says(&open("link").expect_err("a link out of the directory"), &["--allow-path"]);
    link(outside.path(), "subdirectory");
    assert_says(&open("subdirectory/secret").expect_err("by a directory"), &["--allow-path"]);
    link(&dir.path().join("loop"), "loop");
    open("loop").expect_err("a link to itself");
    link(&dir.path().join("disk.qcow2"), "again");
    open("again").expect_err("the image itself");
    std::fs::hard_link(dir.path().join("disk.qcow2"), dir.path().join("hard")).expect("a link");
    open("hard").expect_err("the image itself");
    for special in ["/dev/null", "/dev/zero", "/proc/self/mem", "/"] {
        open(special).expect_err(special);
    }
    std::fs::create_dir(dir.path().join("directory")).expect("a directory");
    open("directory").expect_err("a directory");
    dir.write("base", &[0; 4096]);
    link(&dir.path().join("base"), "inside");
    assert_eq!(open("inside").expect("a link inside the directory"), 2);
}
