//! The check and the repair of images, held against `qemu-img check` and against power cuts.
//!
//! Images of many layouts are made once, and copies are damaged by seeded changes of refcounts,
//! entries and flags. What is found must be what `qemu-img check` finds; what is repaired must be
//! clean for it, and show the guest the same bytes wherever no entry was damaged.

#[path = "check/bounds.rs"]
mod bounds;
#[path = "check/damage.rs"]
mod damage;
#[path = "check/layouts.rs"]
mod layouts;
#[path = "check/losses.rs"]
mod losses;
#[path = "check/marks.rs"]
mod marks;
#[path = "check/power.rs"]
mod power;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::check::check as oracle;
use common::images::IMAGE;
use common::qemu::Dir;
use common::seeds::{Repeat, seeds};
use damage::Damage;
use layouts::{Base, bases, bases_of};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::exec;
use vhost_user_qcow2::image::{Format, Image, OpenOptions};
use vhost_user_qcow2::qcow2::check::{MEMORY, Repair, Report, check, check_within};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, Engine, FileId, block_on};

/// The image is the first file of every simulated host.
const FILE: FileId = FileId(0);

fn run(disk: &MemDisk, repair: Repair) -> Report {
    let engine = disk.engine(0, 1);
    let report = block_on(&engine, check(&engine, IMAGE, FILE, repair));
    report.unwrap_or_else(|error| panic!("checking: {error}"))
}

fn open_for_reading(disk: &MemDisk) -> Image {
    let engine = disk.engine(0, 1);
    let options =
        OpenOptions { format: Some(Format::Qcow2), read_only: true, ..OpenOptions::default() };
    let image = block_on(&engine, Image::open(&engine, disk, Path::new(IMAGE), &options));
    image.unwrap_or_else(|error| panic!("opening: {error}"))
}

/// All bytes of the guest's disk.
fn guest_bytes(disk: &MemDisk) -> Vec<u8> {
    let engine = disk.engine(0, 1);
    let image = open_for_reading(disk);
    let buf = Buf::zeroed(usize::try_from(image.size()).expect("a small disk"));
    let read = block_on(&engine, image.read(&engine, GuestOffset(0), buf.clone()));
    read.unwrap_or_else(|error| panic!("reading: {error}"));
    buf.to_vec()
}

impl Base {
    /// All bytes of the guest's disk.
    fn content(&self) -> Vec<u8> {
        guest_bytes(&self.disk(self.image().to_vec()))
    }

    fn is_version_2(&self) -> bool {
        self.image()[7] == 2
    }
}

/// What `qemu-img check` counts.
#[derive(Debug)]
struct Counts {
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
}

/// A number of the JSON that `qemu-img check` prints; zeros are left out there.
fn number(json: &str, key: &str) -> u64 {
    let Some((_, rest)) = json.split_once(&format!("\"{key}\": ")) else { return 0 };
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

fn qemu_check(dir: &Dir) -> (Counts, String) {
    let arguments = ["check", "--output=json", "-f", "qcow2", IMAGE];
    let run = Command::new("qemu-img").args(arguments).current_dir(dir.path()).output();
    let run = run.expect("qemu-img is installed");
    let json = String::from_utf8_lossy(&run.stdout).into_owned();
    let json = json + &String::from_utf8_lossy(&run.stderr);
    let counts = Counts {
        corruptions: number(&json, "corruptions"),
        leaks: number(&json, "leaks"),
        check_errors: number(&json, "check-errors"),
    };
    (counts, json)
}

fn class(corruptions: u64, leaks: u64) -> &'static str {
    match (corruptions, leaks) {
        (0, 0) => "clean",
        (0, _) => "leaks",
        _ => "corrupt",
    }
}

/// Asserts that the guest's bytes are as before, but for the ranges in `touched`.
fn same_content(disk: &MemDisk, before: &[u8], touched: &[(u64, u64)], context: &str) {
    // Another host: on this one the file would be closed for writes from here on.
    let copy = MemDisk::new();
    for (name, bytes) in disk.files() {
        copy.add(name, bytes);
    }
    let engine = copy.engine(0, 1);
    let image = open_for_reading(&copy);
    let chunk = 512_usize;
    let spared = |at: u64| touched.iter().any(|(first, end)| (*first..*end).contains(&at));
    let mut at = 0;
    while at < before.len() {
        // A run of sectors that nothing was done to.
        let run = before[at..].chunks(chunk).enumerate();
        let run = run.take_while(|(step, _)| !spared((at + step * chunk) as u64)).count() * chunk;
        let run = run.min(before.len() - at);
        if run > 0 {
            let buf = Buf::zeroed(run);
            let read = image.read(&engine, GuestOffset(at as u64), buf.clone());
            let read = block_on(&engine, read);
            read.unwrap_or_else(|error| panic!("{context}: reading {run} at {at:#x}: {error}"));
            let bytes = buf.to_vec();
            if bytes != before[at..at + run] {
                let differs = |(new, old): (&u8, &u8)| new != old;
                let place = bytes.iter().zip(&before[at..]).position(differs).expect("differs");
                panic!("{context}: the guest's byte at {:#x} has changed", at + place);
            }
        }
        at += run.max(chunk);
    }
}

/// One damaged image, checked and repaired.
fn damaged(base: &Base, before: &[u8], dir: &Dir, seed: u64) -> &'static str {
    let mut damage = Damage::new(base.image().to_vec(), seed);
    let many = if seed.is_multiple_of(3) { 4 } else { 1 };
    (0..many).for_each(|_| damage.once());
    let context = format!("{}: {:?}", base.name, damage.story);
    dir.write(IMAGE, &damage.bytes);
    let (theirs, json) = qemu_check(dir);
    let disk = base.disk(damage.bytes.clone());
    let ours = run(&disk, Repair::None);
    assert!(disk.content(FILE) == damage.bytes, "{context}: a check changed the image");
    let their_class = class(theirs.corruptions + theirs.check_errors, theirs.leaks);
    let our_class = class(ours.corruptions + ours.check_errors, ours.leaks);
    let context = format!("{context}\n{ours:#?}\n{json}");
    if damage.exact {
        let counts = (ours.corruptions, ours.leaks, ours.check_errors);
        assert_eq!(counts, (theirs.corruptions, theirs.leaks, theirs.check_errors), "{context}");
    } else {
        // What they find, we find.
        assert!(our_class == their_class || our_class == "corrupt", "{context}");
    }
    repaired(base, before, dir, &damage, &ours, &context);
    if seed.is_multiple_of(4) {
        without_leaks(base, dir, &damage, &ours, &context);
    }
    our_class
}

/// Repairs everything.
fn repaired(base: &Base, before: &[u8], dir: &Dir, damage: &Damage, found: &Report, context: &str) {
    let disk = base.disk(damage.bytes.clone());
    let report = run(&disk, Repair::All);
    let context = format!("{context}\nrepaired: {report:#?}");
    dir.write(IMAGE, &disk.content(FILE));
    let (theirs, json) = qemu_check(dir);
    let left = theirs.corruptions + theirs.leaks + theirs.check_errors;
    if report.is_clean() {
        assert_eq!(left, 0, "{context}\n{json}");
        assert_eq!(report.corruptions_fixed, found.corruptions, "{context}");
        assert_eq!(report.leaks_fixed, found.leaks, "{context}");
        let flags = disk.look(IMAGE, |bytes| bytes[79]).expect("the image");
        assert!(base.is_version_2() || flags & 3 == 0, "{context}: the marks are still there");
    } else {
        // Where refcounts are too narrow to say how many entries share a cluster, neither repairs.
        assert!(json.contains("overflow"), "{context}\n{json}");
    }
    assert!(report.losses == 0 || !damage.touched.is_empty(), "{context}");
    same_content(&disk, before, &damage.touched, &context);
}

/// Repairs leaks only.
fn without_leaks(base: &Base, dir: &Dir, damage: &Damage, found: &Report, context: &str) {
    let disk = base.disk(damage.bytes.clone());
    let report = run(&disk, Repair::Leaks);
    let context = format!("{context}\nwithout leaks: {report:#?}");
    dir.write(IMAGE, &disk.content(FILE));
    let (theirs, json) = qemu_check(dir);
    if report.findings.iter().any(|finding| finding.contains("leaks are not repaired")) {
        assert!(disk.content(FILE) == damage.bytes, "{context}");
        return;
    }
    assert_eq!((report.leaks, theirs.leaks), (0, 0), "{context}\n{json}");
    assert_eq!(report.leaks_fixed, found.leaks, "{context}");
    assert!(theirs.corruptions <= found.corruptions, "{context}\n{json}");
}

/// What is said of an image that nothing is wrong with is what `qemu-img check` says.
fn healthy(base: &Base, dir: &Dir) {
    let (theirs, json) = qemu_check(dir);
    let ours = run(&base.disk(base.image().to_vec()), Repair::None);
    assert!(ours.is_clean(), "{}: {ours:?} {json}", base.name);
    assert_eq!((theirs.corruptions, theirs.leaks), (0, 0), "{}: {json}", base.name);
    for (key, value) in [
        ("image-end-offset", ours.image_end_offset),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
    ] {
        assert_eq!(number(&json, key), value, "{}: {key}", base.name);
    }
}

#[test]
fn damage_is_found_as_qemu_finds_it_and_repaired_so_that_it_finds_nothing() {
    let test = "damage_is_found_as_qemu_finds_it_and_repaired_so_that_it_finds_nothing";
    let began = Instant::now();
    let bases = bases();
    let work = |first: u64| {
        let mut classes = BTreeMap::new();
        let mut dirs = BTreeMap::new();
        for seed in seeds(500).filter(|seed| seed % 2 == first) {
            let _repeat = Repeat::new("check", test, seed);
            let number = usize::try_from(seed).expect("small") % bases.len();
            let base = &bases[number];
            let (dir, content) = dirs.entry(number).or_insert_with(|| {
                let dir = Dir::of(&base.disk(base.image().to_vec()));
                healthy(base, &dir);
                (dir, base.content())
            });
            *classes.entry(damaged(base, content, dir, seed)).or_insert(0) += 1;
        }
        classes
    };
    let classes = std::thread::scope(|scope| {
        let halves = [0, 1].map(|first| scope.spawn(move || work(first)));
        halves.map(|half| half.join().expect("a half has failed"))
    });
    println!("{} layouts, {classes:?} in {:?}", bases.len(), began.elapsed());
}
