//! Resizing a disk that stays in use: whoever holds the image alone for a moment may do it, and
//! guests go on with the same image afterwards.

use common::check::check_interrupted;
use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::{SECTOR, bytes_of};
use common::seeds::{Repeat, seeds};
use common::workers::{open, read_all, write_some};
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};
use vhost_user_qcow2::storage::{Engine, block_on};

use crate::disk::report;

fn resize(
    engine: &dyn Engine,
    image: &mut Image,
    sectors: usize,
) -> vhost_user_qcow2::error::Result<()> {
    block_on(engine, image.resize(engine, (sectors * SECTOR) as u64, true))
}

fn history(made: &Made, seed: u64) {
    let disk = made.disk();
    let engine = disk.engine(0, seed);
    let mut image = open(&engine, &disk, seed.is_multiple_of(2)).expect("opening");
    let (mut tags, mut random) = (made.tags.clone(), fastrand::Rng::with_seed(seed));
    for _ in 0..25 {
        write_some(&engine, &image, &mut tags, &mut random).expect("a guest's requests");
        let sectors = random.usize(1..made.layout.sectors * 2);
        resize(&engine, &mut image, sectors).unwrap_or_else(|error| panic!("{sectors}: {error}"));
        tags.resize(sectors, 0);
        assert_eq!(image.size(), (sectors * SECTOR) as u64);
        let bytes = read_all(&engine, &image).expect("reading");
        assert!(bytes == bytes_of(0, &tags), "other bytes after a resize to {sectors}");
    }
    write_some(&engine, &image, &mut tags, &mut random).expect("a guest's requests");
    block_on(&engine, image.close(&engine)).expect("closing");
    assert!(report(&disk).is_clean(), "{:?}", report(&disk));
    let image = open(&engine, &disk, false).expect("opening again");
    assert!(read_all(&engine, &image).expect("reading") == bytes_of(0, &tags));
}

#[test]
fn guests_go_on_with_an_image_that_was_resized() {
    for layout in [
        Layout::new(9, 304, Kind::Snapshots),
        Layout::new(9, 304, Kind::Plain).lazy(),
        Layout::new(12, 800, Kind::Compressed("zlib")),
        Layout::new(12, 800, Kind::OverRaw(1100)),
        Layout::new(14, 1500, Kind::Snapshots).extended(),
        Layout::new(12, 800, Kind::DataFile { raw: true }),
        Layout::new(12, 800, Kind::DataFile { raw: false }),
        Layout::new(9, 300, Kind::Plain).version_2(),
    ] {
        let made = layout.make(11);
        for seed in seeds(6) {
            let test = "live::guests_go_on_with_an_image_that_was_resized";
            let _repeat = Repeat::new("offline", test, seed);
            history(&made, seed);
        }
    }
}

/// The `nth` operation of the host under a resize fails; says whether there was one.
fn fail(made: &Made, sectors: usize, nth: u64) -> bool {
    let disk = made.disk();
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, nth), faults.clone());
    let mut image = open(&engine, &disk, nth.is_multiple_of(2)).expect("opening");
    let (mut tags, mut random) = (made.tags.clone(), fastrand::Rng::with_seed(nth));
    write_some(&engine, &image, &mut tags, &mut random).expect("a guest's requests");
    faults.add(Rule::fail(faults.count() + nth, 5));
    let result = resize(&engine, &mut image, sectors);
    let happened = image.size() == (sectors * SECTOR) as u64;
    let grows = sectors > tags.len();
    assert!(
        happened || image.size() == (tags.len() * SECTOR) as u64,
        "operation {nth}: a third size"
    );
    assert!(happened || result.is_err(), "operation {nth}: it says that all is well");
    faults.clear();
    if happened {
        tags.resize(sectors, 0);
    }
    let bytes = read_all(&engine, &image).expect("reads go on");
    // What lies in the last cluster behind a smaller disk's end is cleared last.
    assert!(bytes == bytes_of(0, &tags), "operation {nth}: other bytes");
    // An image whose state on the medium is not known takes no more writes.
    let goes_on = write_some(&engine, &image, &mut tags, &mut random).is_ok();
    // One that has grown has done all that was asked for, unless it fails for good.
    let failed = grows && happened && result.is_err();
    assert!(!failed || !goes_on, "operation {nth}: it has failed and happened: {result:?}");
    if goes_on {
        let bytes = read_all(&engine, &image).expect("reads go on");
        assert!(bytes == bytes_of(0, &tags), "operation {nth}: other bytes later");
        let _ = block_on(&engine, image.close(&engine));
    }
    drop(image);
    let report = disk.look(IMAGE, check_interrupted).expect("the image");
    assert!(report.corruptions.is_empty(), "operation {nth}: {:?}", report.corruptions);
    faults.fired() > 0
}

#[test]
fn a_resize_that_fails_leaves_a_disk_that_can_be_used() {
    let mut count = 0;
    for layout in [Layout::new(9, 96, Kind::Snapshots), Layout::new(9, 96, Kind::Plain).lazy()] {
        let made = layout.make(4);
        for sectors in [700, 37] {
            let mut nth = 1;
            while fail(&made, sectors, nth) {
                nth += 1;
            }
            count += nth;
        }
    }
    assert!(count > 40, "only {count} operations failed");
}
