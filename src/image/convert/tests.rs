use std::path::{Path, PathBuf};

use super::*;
use crate::bytes::GuestOffset;
use crate::image::make::{NewImage, make};
use crate::image::{Format, OpenOptions};
use crate::qcow2::bitmap::{BitmapEdit, read_bitmaps};
use crate::qcow2::check::{Repair, check};
use crate::qcow2::create::CreateOptions;
use crate::storage::fault::{Fate, Fault, Faults, Rule};
use crate::storage::files::{Files, Options as FileOptions};
use crate::storage::host::{self, Aio};
use crate::storage::threads::Threads;
use crate::storage::{Buf, FileSource, OpenMode, Purpose};
use crate::sync::Arc;

const SIZE: usize = 5 << 20;

struct Place {
    directory: tempfile::TempDir,
    files: Arc<Files>,
    engine: Box<dyn Engine>,
}

impl Place {
    fn new() -> Self {
        let files = Files::new(FileOptions { lock: false, ..FileOptions::default() });
        let engine = host::engine(Aio::Auto, &files, 0).expect("an engine");
        Self { directory: tempfile::tempdir().expect("a directory"), files, engine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, path: &Path, format: Format, read_only: bool) -> Image {
        let options = OpenOptions { format: Some(format), read_only, ..OpenOptions::default() };
        let image = Image::open(&*self.engine, &*self.files, path, &options);
        block_on(&*self.engine, image).expect("open")
    }

    fn make(&self, name: &str, layout: &CreateOptions) -> Image {
        let path = self.path(name);
        let _ = std::fs::remove_file(&path);
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(layout.size),
            layout: layout.clone(),
            replace: true,
            trust_backing: true,
        };
        let options = OpenOptions::default();
        let made = make(&*self.engine, &*self.files, &path, &new, &options);
        block_on(&*self.engine, made).expect("make");
        self.open(&path, Format::Qcow2, false)
    }

    fn bytes(&self, image: &Image) -> Vec<u8> {
        let buf = Buf::zeroed(usize::try_from(image.size()).expect("small"));
        block_on(&*self.engine, image.read(&*self.engine, GuestOffset(0), buf.clone()))
            .expect("read");
        buf.to_vec()
    }

    fn assert_sound(&self, name: &str) {
        let mode = OpenMode { read_only: true, backing: false };
        let file = self.files.open(&self.path(name), mode).expect("open");
        let report = check(&*self.engine, name, file.id, Repair::None);
        let report = block_on(&*self.engine, report).expect("a check");
        assert!(report.is_clean(), "{report:?}");
    }
}

/// A disk with runs of noise, of one byte, and of zeros.
fn disk(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut disk = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let len = random.usize(1..200 << 10).min(SIZE - at);
        let kind = random.u8(..4);
        for byte in &mut disk[at..at + len] {
            *byte = if kind == 0 { random.u8(..) } else { kind / 2 };
        }
        at += len;
    }
    disk
}

#[test]
fn a_copy_is_the_same_whatever_is_under_way_at_once() {
    let (place, disk) = (Place::new(), disk(1));
    std::fs::write(place.path("disk"), &disk).expect("a disk");
    for (number, (threads, parallel)) in [(1, 1), (1, 7), (3, 3), (2, 32)].into_iter().enumerate() {
        for (out_of_order, compress) in [(false, false), (true, false), (false, true), (true, true)]
        {
            for cluster_bits in [9, 16, 21] {
                let extended_l2 = cluster_bits > 9 && number % 2 == 0;
                let size = (2 * SIZE) as u64;
                let layout =
                    CreateOptions { cluster_bits, extended_l2, ..CreateOptions::new(size) };
                let target = place.make("copy", &layout);
                let sources: Vec<Image> =
                    (0..2).map(|_| place.open(&place.path("disk"), Format::Raw, true)).collect();
                let options = Options {
                    parallel,
                    threads,
                    out_of_order,
                    compress,
                    target_is_zero: true,
                    ..Options::default()
                };
                let make = |lane| host::engine(Aio::Auto, &place.files, lane);
                let mut told = 0;
                let outcome =
                    convert(&sources, &target, &options, &*place.engine, &make, &mut |at| {
                        assert!(told <= at && at <= size, "{told} {at}");
                        told = at;
                        true
                    });
                assert_eq!(outcome.expect("a copy"), Outcome::Complete);
                assert!(place.bytes(&target) == [&disk[..], &disk].concat(), "{options:?}");
                drop(target);
                place.assert_sound("copy");
            }
        }
    }
}

#[test]
fn a_failure_of_any_thread_ends_the_copy_and_leaves_a_sound_target() {
    let (place, disk) = (Place::new(), disk(2));
    std::fs::write(place.path("disk"), &disk).expect("a disk");
    for purpose in [Purpose::GuestRead, Purpose::GuestWrite, Purpose::CompressedWrite] {
        for compress in [false, true] {
            let target = place.make("copy", &CreateOptions::new(SIZE as u64));
            let sources = [place.open(&place.path("disk"), Format::Raw, true)];
            let make = |lane| {
                let faults = Faults::new();
                if lane == 2 {
                    let fate = Fate::Fail(5);
                    faults.add(Rule { purpose: Some(purpose), nth: 1, sticky: false, fate });
                }
                let engine = Threads::new(&place.files, lane);
                let engine = engine.map_err(|error| Error::io("threads", error))?;
                Ok(Box::new(Fault::new(engine, faults)) as Box<dyn Engine>)
            };
            let options = Options {
                parallel: 4,
                threads: 2,
                compress,
                target_is_zero: true,
                ..Options::default()
            };
            let done = convert(&sources, &target, &options, &*place.engine, &make, &mut |_| true);
            if let Ok(outcome) = done {
                // The other thread was faster.
                assert_eq!(outcome, Outcome::Complete);
                assert!(place.bytes(&target) == disk, "{purpose:?}");
            }
            drop(target);
            place.assert_sound("copy");
        }
    }
}

#[test]
fn who_says_no_is_listened_to() {
    let (place, disk) = (Place::new(), disk(3));
    std::fs::write(place.path("disk"), disk.repeat(8)).expect("a disk");
    let target = place.make("copy", &CreateOptions::new(8 * SIZE as u64));
    let sources = [place.open(&place.path("disk"), Format::Raw, true)];
    let make = |lane| host::engine(Aio::Auto, &place.files, lane);
    let options = Options { compress: true, target_is_zero: true, ..Options::default() };
    let outcome = convert(&sources, &target, &options, &*place.engine, &make, &mut |_| false);
    assert_eq!(outcome.expect("no failure"), Outcome::Stopped);
    drop(target);
    place.assert_sound("copy");
}

#[test]
fn a_bitmap_that_cannot_be_copied_is_found_out_before_anything_is() {
    let place = Place::new();
    let mut source = place.make("source", &CreateOptions::new(SIZE as u64));
    let names = ["sound", "coarse", "strange", "longer"];
    let add = |name: &&str| BitmapEdit::Add { name: (*name).to_owned(), granularity: None };
    let edits = names.iter().map(add).collect();
    let st = &*place.engine;
    let edited = source.top_qcow2().expect("qcow2").edit_bitmaps(st, edits);
    block_on(st, edited).expect("bitmaps");
    drop(source);
    let path = place.path("source");
    let mut bytes = std::fs::read(&path).expect("the image");
    let entry = |name: &str, bytes: &[u8]| {
        let found = bytes.windows(name.len()).position(|window| window == name.as_bytes());
        found.expect("a bitmap") - 24
    };
    let at = entry("coarse", &bytes);
    bytes[at + 17] = 40;
    let at = entry("strange", &bytes);
    bytes[at + 24] = 0xff;
    let at = entry("longer", &bytes);
    bytes[at + 11] += 1;
    std::fs::write(&path, bytes).expect("the image");
    let source = place.open(&path, Format::Qcow2, true);
    let found = block_on(st, source_bitmaps(st, &source)).expect("a directory");
    assert_eq!(found.broken.len(), 3, "{found:?}");
    let mut target = place.make("copy", &CreateOptions::new(SIZE as u64));
    let fit = check_bitmaps(st, &source, &found.usable, &target);
    block_on(st, fit).expect("they fit");
    let mut goes_on = || true;
    let copied = copy_bitmaps(st, &source, &found.usable, &mut target, &mut goes_on);
    assert_eq!(block_on(st, copied).expect("the rest is copied"), Outcome::Complete);
    let top = target.top_qcow2().expect("qcow2");
    let own = block_on(st, read_bitmaps(st, top.file(), top.header())).expect("a directory");
    assert_eq!(own.iter().map(|own| &*own.name).collect::<Vec<_>>(), ["sound"]);
    for (version, size) in [(2, SIZE as u64), (3, 2 * SIZE as u64)] {
        check_fit(&source, "copy", version, size).expect_err("it would not fit");
    }
}
