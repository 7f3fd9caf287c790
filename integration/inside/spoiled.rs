//! File systems that were spoiled, by chance and on purpose.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use integration::scratch::{Scratch, number_from_environment};
use vhost_user_qcow2::image::blocking::{Disk, LayerPaths};
use vhost_user_qcow2::image::{Format, OpenOptions};
use vhost_user_qcow2::inside::copy::{Options, copy_out};
use vhost_user_qcow2::inside::filesystem::Filesystem;
use vhost_user_qcow2::inside::source::Source;
use vhost_user_qcow2::inside::table::read_table;
use vhost_user_qcow2::inside::{Limits, Watch};

use crate::tools::{blank, ours, system};
use crate::word;

const MIB: u64 = 1 << 20;

fn open(path: &Path) -> Rc<Disk> {
    let options =
        OpenOptions { format: Some(Format::Raw), read_only: true, ..OpenOptions::default() };
    Rc::new(Disk::open(path, &options).expect("a raw image opens"))
}

/// Reads all there is, however spoiled; returns how many files were copied.
fn read_all(image: &Path, target: &Path) -> u64 {
    let limits = Limits {
        entries: 5000,
        directory: 2000,
        depth: 16,
        bytes: 64 * MIB,
        time: Duration::from_secs(20),
    };
    let disk = open(image);
    drop(read_table(&disk));
    let watch = Rc::new(Watch::new(limits));
    let source = Source::new(&disk, 0, disk.size(), &watch).expect("all of it");
    let Ok(filesystem) = Filesystem::open(source, &watch) else { return 0 };
    let options = Options { recursive: true, replace: false };
    let copied = copy_out(&filesystem, b"/", target, options, &mut |_| {});
    copied.map_or(0, |copied| copied.files)
}

/// A small file system of a kind, without checksums: those would find what is spoiled at once.
fn small(scratch: &Scratch, kind: &str) -> Vec<u8> {
    let (tree, image) = (scratch.file("tree"), scratch.file("pattern"));
    for directory in 0..4 {
        let path = tree.join(format!("directory {directory}/inner"));
        fs::create_dir_all(&path).expect("make a directory");
        for file in 0..12_usize {
            let bytes = vec![file as u8; file * 700];
            fs::write(path.join(format!("a file with the number {file}")), bytes).expect("write");
        }
    }
    if kind.starts_with("ext") {
        symlink("x".repeat(100), tree.join("link")).expect("link");
        let features = ["-O", "^metadata_csum,^resize_inode"];
        let words = ["-q", "-t", kind, "-b", "1024", "-d", word(&tree)];
        system("mke2fs", &[&words[..], &features, &[word(&image), "4M"]].concat());
    } else {
        blank(&image, if kind == "16" { 16 } else { 40 } * MIB);
        system("mkfs.vfat", &["-F", kind, "-s", "1", word(&image)]);
        let names: Vec<_> =
            fs::read_dir(&tree).expect("read").map(|one| one.expect("one").path()).collect();
        let mut words = vec!["-i", word(&image), "-s"];
        words.extend(names.iter().map(|path| word(path)));
        words.push("::");
        system("mcopy", &words);
    }
    fs::remove_dir_all(&tree).expect("remove the tree");
    fs::read(&image).expect("read")
}

/// Spoils a few bytes, most of them where something is: bytes of zeros are rarely looked at.
fn spoil(bytes: &mut [u8], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..24) {
        let reach = *random.choice(&[2048, 65_536, bytes.len()]).expect("three");
        let mut at = random.usize(..reach.min(bytes.len()));
        for _ in 0..64 {
            if bytes[at] != 0 {
                break;
            }
            at = random.usize(..reach.min(bytes.len()));
        }
        bytes[at] = match random.u8(..4) {
            0 => 0,
            1 => 0xff,
            2 => bytes[at] ^ 1 << random.u8(..8),
            _ => random.u8(..),
        };
    }
}

fn spoiled(kind: &str) {
    let scratch = Scratch::new(&format!("inside-spoiled-{kind}"));
    let pattern = small(&scratch, kind);
    let (image, target) = (scratch.file("image"), scratch.file("copy"));
    fs::write(&image, &pattern).expect("write");
    assert_eq!(read_all(&image, &target), 48, "the files of a sound one");
    fs::remove_dir_all(&target).expect("remove");
    let (mut some, mut longest) = (0, Duration::ZERO);
    let first = number_from_environment("SEED", 0);
    for seed in first..first + number_from_environment("SEEDS", 40) {
        eprintln!("seed {seed}");
        let mut bytes = pattern.clone();
        spoil(&mut bytes, &mut fastrand::Rng::with_seed(seed));
        fs::write(&image, &bytes).expect("write");
        let began = Instant::now();
        some += u64::from(read_all(&image, &target) > 0);
        longest = longest.max(began.elapsed());
        assert!(longest < Duration::from_secs(60), "seed {seed} took {longest:?}");
        drop(fs::remove_dir_all(&target));
    }
    eprintln!("{kind}: {some} still had files, the longest took {longest:?}");
}

#[test]
fn spoiled_ext4_ends() {
    spoiled("ext4");
}

#[test]
fn spoiled_ext2_ends() {
    spoiled("ext2");
}

#[test]
fn spoiled_fat16_ends() {
    spoiled("16");
}

#[test]
fn spoiled_fat32_ends() {
    spoiled("32");
}

/// Replaces every occurrence of some bytes.
fn replace(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(path).expect("read");
    let places: Vec<_> = bytes
        .windows(from.len())
        .enumerate()
        .filter(|(_, part)| *part == from)
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "{:?} is not there", String::from_utf8_lossy(from));
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    fs::write(path, bytes).expect("write");
}

#[test]
fn names_do_not_lead_outside_of_the_target() {
    let scratch = Scratch::new("inside-names");
    let (tree, image) = (scratch.file("tree"), scratch.file("image"));
    let (outside, target): (PathBuf, PathBuf) = (scratch.file("outside"), scratch.file("in/side"));
    for path in [&tree, &outside, &target, &tree.join("twin-BBBB")] {
        fs::create_dir_all(path).expect("make a directory");
    }
    fs::write(tree.join("twin-BBBB/prey"), b"evil").expect("write");
    symlink(&outside, tree.join("twin-AAAA")).expect("link");
    fs::write(tree.join("well"), b"well").expect("write");
    let words = ["-q", "-t", "ext4", "-O", "^metadata_csum,^dir_index", "-d", word(&tree)];
    system("mke2fs", &[&words[..], &[word(&image), "4M"]].concat());
    // A directory with the name of a link that leads outside.
    replace(&image, b"twin-BBBB", b"twin-AAAA");
    let output = ours(&["cp-out", "-R", "-f", "raw", word(&image), "/", word(&target)]);
    assert_eq!(output.status.code(), Some(1), "something was left out");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("second entry"), "{said}");
    assert_eq!(fs::read(target.join("well")).expect("it was copied"), b"well");
    assert_eq!(fs::read_dir(&outside).expect("read").count(), 0, "written through a link");

    // A link that an earlier copy has made is not gone through either.
    let again = scratch.file("again");
    fs::create_dir_all(&again).expect("make a directory");
    symlink(&outside, again.join("twin-BBBB")).expect("link");
    replace(&image, b"twin-AAAA", b"twin-BBBB");
    let output = ours(&["cp-out", "-R", "-f", "raw", word(&image), "/", word(&again)]);
    assert_eq!(output.status.code(), Some(1), "refused");
    assert_eq!(fs::read_dir(&outside).expect("read").count(), 0, "written through a link");
}

#[test]
fn a_name_with_a_way_up_is_left_out() {
    let scratch = Scratch::new("inside-up");
    let (image, target) = (scratch.file("image"), scratch.file("in/side"));
    let (well, evil) = (scratch.file("WELL.TXT"), scratch.file("UPUPEVIL.TXT"));
    fs::create_dir_all(&target).expect("make a directory");
    blank(&image, 16 * MIB);
    system("mkfs.vfat", &["-F", "16", "-s", "1", word(&image)]);
    for file in [&well, &evil] {
        fs::write(file, b"bytes").expect("write");
        system("mcopy", &["-i", word(&image), word(file), "::"]);
    }
    replace(&image, b"UPUPEVILTXT", b"../../E TXT");
    let output = ours(&["cp-out", "-R", "-f", "raw", word(&image), "/", word(&target)]);
    assert_eq!(output.status.code(), Some(1), "something was left out");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("lead elsewhere"), "{said}");
    assert_eq!(fs::read(target.join("WELL.TXT")).expect("it was copied"), b"bytes");
    let names = |path: &Path| fs::read_dir(path).expect("read").count();
    assert_eq!((names(&target), names(&scratch.file("in"))), (1, 1));
    assert_eq!(names(scratch.directory()), 4, "written beside the target");
}

#[test]
fn a_chain_is_opened_by_its_files_whatever_the_header_says() {
    let scratch = Scratch::new("inside-explicit");
    let (base, overlay) = (scratch.file("base.raw"), scratch.file("overlay.qcow2"));
    fs::write(&base, vec![0x5a; 1 << 20]).expect("write");
    let nowhere = ["-u", "-b", "/nowhere/at/all", "-F", "raw"];
    let create = [&["create", "-q", "-f", "qcow2"], &nowhere[..], &[word(&overlay), "1M"]];
    system("qemu-img", &create.concat());
    let layer = |path: &Path, format| LayerPaths { path: path.into(), format, data_file: None };
    let layers = [layer(&overlay, Format::Qcow2), layer(&base, Format::Raw)];
    let disk = Disk::open_explicit(&layers, &OpenOptions::default()).expect("it opens");
    disk.write_at(512, b"new").expect("write");
    let mut bytes = [0; 5];
    disk.read_at(511, &mut bytes).expect("read");
    assert_eq!(&bytes, b"Znew\x5a");
    disk.close().expect("close");
    assert_eq!(fs::read(&base).expect("read"), vec![0x5a; 1 << 20], "the base was written to");
    system("qemu-img", &["rebase", "-u", "-b", word(&base), "-F", "raw", word(&overlay)]);
    system("qemu-img", &["check", "-q", word(&overlay)]);
    for wrong in [
        &layers[..1],
        &[][..],
        &[layers[0].clone(), layers[0].clone()],
        &[layers[1].clone(), layers[1].clone()],
    ] {
        assert!(Disk::open_explicit(wrong, &OpenOptions::default()).is_err(), "{wrong:?}");
    }
}
