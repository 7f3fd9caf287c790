//! Bitmaps that cannot be kept, images that lie about them, and disks that fail.

use common::memory::{Counting, peak};
use vhost_user_qcow2::image::OpenOptions;
use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::fault::{Fault, Faults, Rule};

use super::stored::flags;
use super::*;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Clusters of 4 KiB, and bitmaps.
fn plain() -> Made {
    made(Layout::new(12, 8000, Kind::Plain), &SEVERAL)
}

fn put(made: &mut Made, at: usize, field: &[u8]) {
    made.image()[at..at + field.len()].copy_from_slice(field);
}

/// Writes a sector, and says what the image is after that and after a close.
fn write_and_close(made: &Made) -> (Vec<u8>, Vec<u8>) {
    let disk = made.disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("opening");
    let write = image.write(&engine, GuestOffset(3 << 20), Buf::copy_of(&[9; 512]));
    block_on(&engine, write).expect("writing");
    let during = image_bytes(&disk);
    close(&image, &disk);
    (during, image_bytes(&disk))
}

#[test]
fn an_image_that_does_not_vouch_for_its_bitmaps_is_left_alone() {
    let mut made = plain();
    made.image()[95] &= !1;
    let before = read(made.image());
    let (_, after) = write_and_close(&made);
    assert!(!is_valid(&after));
    assert_eq!(read(&after), before);
}

#[test]
fn a_read_only_open_changes_nothing_and_trusts_nothing() {
    let mut made = plain();
    let extension = stored::extension(made.image()).expect("bitmaps");
    put(&mut made, extension + 16, &[0xff; 8]);
    let disk = made.disk();
    let before = image_bytes(&disk);
    let engine = disk.engine(0, 0);
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let opened = Image::open(&engine, &disk, std::path::Path::new(IMAGE), &options);
    let image = block_on(&engine, opened).expect("opening");
    block_on(&engine, image.read(&engine, GuestOffset(0), Buf::zeroed(512))).expect("reading");
    close(&image, &disk);
    assert!(image_bytes(&disk) == before);
}

#[test]
fn bitmaps_of_unknown_kinds_and_inconsistent_ones_become_or_stay_inconsistent() {
    // Where in the entry, what, and the flags afterwards.
    let cases: [(usize, &[u8], u32); 5] = [
        (12, &[0, 0, 0, 3], 3),
        (12, &[0, 0, 0, 2 | 8], 3 | 8),
        (12, &[0x80, 0, 0, 0], 1 << 31),
        (12, &[0, 0, 0, 2, 7], 3),
        (11, &[2], 3),
    ];
    for (at, field, flags) in cases {
        let mut made = plain();
        let (entry, old) = {
            let stored = read(made.image());
            (stored[1].entry, stored[1].clone())
        };
        put(&mut made, entry + at, field);
        let (during, after) = write_and_close(&made);
        for bytes in [during, after] {
            assert!(is_valid(&bytes));
            assert!(check(&bytes).corruptions.is_empty());
            let word = u32::from_be_bytes(bytes[entry + 12..entry + 16].try_into().expect("four"));
            assert_eq!(word, flags, "{field:?} at {at}");
            assert_eq!(bytes[entry..entry + 8], (old.table as u64).to_be_bytes(), "its table");
        }
        let (_, after) = write_and_close(&made);
        let fine = &read(&after)[0];
        assert!(fine.flags == AUTO && fine.bits[6144], "another bitmap is kept");
    }
}

#[test]
fn a_directory_that_contradicts_itself_makes_bitmaps_invalid() {
    let made = plain();
    let bytes = made.clone().image().clone();
    let extension = stored::extension(&bytes).expect("bitmaps");
    let (stored, end) = (read(&bytes), bytes.len() as u64);
    let l1 = &bytes[40..48];
    let directory: [u8; 8] = bytes[extension + 16..extension + 24].try_into().expect("eight");
    let far = (end + (1 << 40)).next_multiple_of(4096).to_be_bytes();
    let (first, table) = (stored[0].entry, stored[0].table);
    let cases: [(&str, usize, &[u8]); 14] = [
        ("no bitmaps", extension, &[0; 4]),
        ("more bitmaps than entries", extension + 3, &[5]),
        ("fewer bitmaps than entries", extension + 3, &[3]),
        ("reserved bytes", extension + 4, &[1]),
        ("a huge directory", extension + 8, &[0, 0, 0, 0, 5, 0, 0, 0]),
        ("a directory over the L1 table", extension + 16, l1),
        ("a directory behind the end", extension + 16, &far),
        ("a table over the L1 table", first, l1),
        ("a table over the directory", first, &directory),
        ("a table behind the end", first, &far),
        ("a table that is not aligned", first + 6, &[2]),
        ("a huge table", first + 8, &[0xff; 4]),
        ("a cluster over the L1 table", table, l1),
        ("a cluster with reserved bits", table + 7, &[6]),
    ];
    for (what, at, field) in cases {
        let mut made = made.clone();
        put(&mut made, at, field);
        let ((during, after), bytes) = peak(|| write_and_close(&made));
        assert!(!is_valid(&during), "{what}");
        assert!(!is_valid(&after), "{what}");
        assert!(check(&after).corruptions.is_empty(), "{what}");
        assert!(bytes < 64 << 20, "{what}: {bytes} bytes of memory");
    }
}

#[test]
fn a_bitmap_that_needs_too_much_memory_is_given_up_and_others_are_kept() {
    // 512 GiB: 128 MiB of bits in granules of 512 bytes, 1 MiB in granules of 64 KiB.
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "512G"]);
    let layout = Layout::new(16, 1 << 30, Kind::Empty);
    let files = dir.files();
    let mut made = Made { layout, files, tags: Vec::new(), snapshots: Vec::new() };
    let huge = Wanted { name: "huge", granularity: 512, enabled: true };
    add(&mut made, &[huge, SEVERAL[1]], &[]);
    let ((during, after), memory) = peak(|| write_and_close(&made));
    assert_eq!(flags(&during), [AUTO | IN_USE, AUTO | IN_USE]);
    assert_eq!(flags(&after), [AUTO | IN_USE, AUTO]);
    assert!(memory < 64 << 20, "{memory} bytes of memory");
    assert!(is_valid(&after) && check(&after).is_clean());
    dir.write(IMAGE, &after);
    let seen = seen_by_qemu(&dir);
    assert_eq!(seen, [("huge".to_owned(), true, 0), ("usual".to_owned(), false, 65536)]);
}

#[test]
fn a_guest_cannot_reach_a_bitmap_through_a_crafted_table() {
    let made = plain();
    let bytes = made.clone().image().clone();
    let stored = read(&bytes);
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let offset = |word: u64| usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("small");
    let directory = word(stored::extension(&bytes).expect("bitmaps") + 16);
    let cluster = word(stored[0].table);
    let l2 = offset(word(offset(word(40))));
    for target in [directory, stored[2].table as u64, cluster] {
        assert_ne!(target, 0);
        let mut made = made.clone();
        // The guest's cluster 5.
        put(&mut made, l2 + 40, &(target | 1 << 63).to_be_bytes());
        let disk = made.disk();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, false).expect("opening");
        let write = image.write(&engine, GuestOffset(5 << 12), Buf::copy_of(&[9; 512]));
        let error = block_on(&engine, write).expect_err("it lies on a bitmap").to_string();
        assert!(error.contains("overwrite metadata"), "{error}");
    }
}

/// Runs a session whose operations may fail; what is left must be sound, and no bitmap stale.
fn fail(made: &Made, rule: Rule, seed: u64) -> (bool, Vec<Stored>) {
    let disk = made.disk();
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, seed), faults.clone());
    let mut model = Model::of(&image_bytes(&disk));
    let image = open(&engine, &disk, false).expect("opening");
    faults.add(rule);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut failed = false;
    for _ in 0..8 {
        let (at, len) = draw(&mut random, 8000);
        let bytes = vec![1; usize::try_from(len).expect("small")];
        let write = image.write(&engine, GuestOffset(at), Buf::copy_of(&bytes));
        failed |= block_on(&engine, write).is_err();
        model.mark(at, len);
    }
    failed |= block_on(&engine, image.close(&engine)).is_err();
    drop((image, engine));
    let bytes = image_bytes(&disk);
    let report = check(&bytes);
    assert!(report.corruptions.is_empty(), "{rule:?}: {report:?}");
    assert!(failed || report.is_clean(), "{rule:?}: {report:?}");
    assert!(is_valid(&bytes), "{rule:?}");
    let stored = read(&bytes);
    let untouched = failed && bytes == made.clone().image().as_slice();
    for (want, have) in model.0.iter().zip(&stored) {
        let kept = have.flags & IN_USE != 0 || have.bits == want.bits;
        assert!(kept || untouched || failed, "{rule:?}: {} is stale", have.name);
        if failed && have.flags == AUTO && have.bits != want.bits {
            // Only when nothing was written at all: the mark itself could not be made.
            let guest = |bytes: &[u8]| common::check::map(bytes).guest;
            assert_eq!(guest(&bytes), guest(made.clone().image()), "{rule:?}: {}", have.name);
        }
    }
    (failed, stored)
}

#[test]
fn no_failed_operation_leaves_a_stale_bitmap() {
    let made = plain();
    let (mut failures, mut count) = (0, 0);
    for nth in 1.. {
        let faults = Rule { sticky: nth % 2 == 0, ..Rule::fail(nth, 5) };
        let (failed, stored) = fail(&made, faults, 3);
        count += 1;
        failures += u32::from(failed);
        if nth > 40 && !failed && stored.iter().all(|bitmap| bitmap.flags & IN_USE == 0) {
            break;
        }
        assert!(nth < 2000, "the session has an end");
    }
    println!("no_failed_operation_leaves_a_stale_bitmap: {count} sessions, {failures} failed");
    assert!(failures > 20);
}

#[test]
fn without_room_for_bitmaps_the_disk_is_fine_and_they_stay_marked() {
    let made = plain();
    for nth in 1..=4 {
        let rule = Rule { purpose: Some(Purpose::BitmapWrite), ..Rule::fail(nth, 28) };
        let (failed, stored) = fail(&made, rule, 5);
        assert!(!failed, "the guest's bytes are safe");
        let marked = stored.iter().filter(|bitmap| bitmap.flags & IN_USE != 0).count();
        assert_eq!(marked, 1, "write {nth} fails");
    }
}

#[test]
fn a_bitmap_that_could_not_be_loaded_once_is_not_trusted_after_a_second_session() {
    let made = plain();
    let disk = made.disk();
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, 1), faults.clone());
    let image = open(&engine, &disk, false).expect("opening");
    let session = |at: u64| {
        let write = image.write(&engine, GuestOffset(at), Buf::copy_of(&[9; 512]));
        block_on(&engine, write).expect("writing");
        block_on(&engine, image.close(&engine)).expect("closing");
        flags(&image_bytes(&disk))
    };
    let purpose = Some(Purpose::BitmapLoad);
    let nth = faults.count_of(Purpose::BitmapLoad) + 1;
    faults.add(Rule { purpose, sticky: true, ..Rule::fail(nth, 5) });
    let marked = session(3 << 20);
    let count = marked.iter().filter(|flags| **flags == AUTO | IN_USE).count();
    assert!(count > 0, "{marked:?}");
    // What could not be read before can be read now, and misses the first write.
    faults.clear();
    assert_eq!(session(1 << 20), marked);
}

#[test]
fn a_close_with_many_bitmaps_does_not_search_the_file_for_each_of_them() {
    // A slice of refcounts is for 64 clusters here, and the cache holds 64 slices.
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let wanted = names.map(|name| Wanted { name, granularity: 512, enabled: true });
    let made = made(Layout::new(9, 20_000, Kind::Plain).with_refcount_bits(64), &wanted);
    let disk = made.disk();
    let slices = image_bytes(&disk).len() as u64 / (64 * 512);
    assert!(slices > 128, "the cache holds all: {slices}");
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, 1), faults.clone());
    let image = open(&engine, &disk, true).expect("opening");
    let write = image.write(&engine, GuestOffset(3 << 20), Buf::copy_of(&[9; 512]));
    block_on(&engine, write).expect("writing");
    let before = faults.count_of(Purpose::RefblockLoad);
    block_on(&engine, image.close(&engine)).expect("closing");
    let loads = faults.count_of(Purpose::RefblockLoad) - before;
    println!("{loads} loads of {slices} slices");
    assert!(loads < 3 * slices, "{loads} loads of {slices} slices");
    assert!(check(&image_bytes(&disk)).is_clean());
}

#[test]
fn damaged_directories_and_tables_do_no_harm() {
    let made = plain();
    let bytes = made.clone().image().clone();
    let extension = stored::extension(&bytes).expect("bitmaps");
    let stored = read(&bytes);
    let directory = stored[0].entry;
    let mut places = vec![extension..extension + 24, directory..directory + 130];
    places.extend(stored.iter().map(|bitmap| bitmap.table..bitmap.table + 8));
    for seed in seeds(400) {
        let _repeat = Repeat::new("bitmaps", "damaged_directories_and_tables_do_no_harm", seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut made = made.clone();
        for _ in 0..random.usize(1..4) {
            let place = random.choice(places.iter()).expect("several").clone();
            let at = random.usize(place).min(made.image().len() - 1);
            made.image()[at] = if random.bool() { random.u8(..) } else { 1 << random.u8(0..8) };
        }
        let disk = made.disk();
        let engine = disk.engine(0, seed);
        let image = open(&engine, &disk, false).expect("the disk itself is sound");
        let mut failed = None;
        for _ in 0..10 {
            let what = (random.u8(0..8), 1);
            let range = draw(&mut random, 8000);
            let done = block_on(&engine, change(&image, &engine, range, what));
            failed = failed.or(done.err());
        }
        failed = failed.or(block_on(&engine, image.close(&engine)).err());
        let before = check(made.image());
        if before.corruptions.is_empty() {
            assert!(failed.is_none(), "{failed:?}");
            let after = check(&image_bytes(&disk));
            assert!(after.corruptions.is_empty(), "{after:?}");
        }
    }
}
