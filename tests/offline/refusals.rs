//! What is refused: with a reason, and with not one byte changed.

use std::path::Path;

use common::images::{IMAGE, Kind, Layout};
use common::qemu::Dir;
use common::workers::open;
use vhost_user_qcow2::image::create as create_image;
use vhost_user_qcow2::qcow2::create::CreateOptions;
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::disk::{Act, act, contents, list, report};

fn refused(disk: &MemDisk, what: &Act, reason: &str) {
    let before = disk.files();
    let error = act(disk, what).expect_err("a refusal").to_string();
    assert!(error.contains(reason), "{what:?}: {error}");
    assert!(disk.files() == before, "{what:?} has changed something");
}

fn create(name: &str) -> Act {
    Act::Create(name.to_owned())
}

#[test]
fn counts_without_room_for_another_snapshot() {
    let disk = Layout::new(12, 320, Kind::Plain).with_refcount_bits(1).make(1).disk();
    refused(&disk, &create("one"), "refcounts of 1 bits hold no more than 1");
    let disk = Layout::new(12, 320, Kind::Plain).with_refcount_bits(2).make(1).disk();
    act(&disk, &create("one")).expect("room for two");
    act(&disk, &create("two")).expect("room for three");
    refused(&disk, &create("three"), "refcounts of 2 bits hold no more than 3");
    refused(&disk, &Act::Apply("one".to_owned()), "hold no more than 3");
    act(&disk, &Act::Delete("one".to_owned())).expect("deleting");
    act(&disk, &create("three")).expect("there is room again");
    assert!(report(&disk).is_clean());
}

#[test]
fn compressed_clusters_that_share_one_cluster_run_out_of_room_together() {
    // Sectors of one version compress to almost nothing, so many share a cluster.
    for bits in [4, 8] {
        let layout = Layout::new(12, 800, Kind::Compressed("zlib")).with_refcount_bits(bits);
        let disk = layout.make(1).disk();
        let mut taken = 0;
        loop {
            let before = disk.files();
            match act(&disk, &create(&format!("number {taken}"))) {
                Ok(()) => taken += 1,
                Err(error) => {
                    assert!(error.to_string().contains("hold no more than"), "{error}");
                    assert!(disk.files() == before, "a refusal has changed something");
                    break;
                }
            }
            assert!(taken < 256, "counts of {bits} bits cannot have room for so many");
        }
        assert!(report(&disk).is_clean());
        println!("counts of {bits} bits had room for {taken} snapshots");
    }
}

#[test]
fn names_and_snapshots_that_do_not_exist() {
    let disk = Layout::new(9, 300, Kind::Snapshots).make(1).disk();
    refused(&disk, &create("one"), "already");
    refused(&disk, &create(""), "1 to 255 bytes");
    refused(&disk, &create(&"x".repeat(256)), "1 to 255 bytes");
    refused(&disk, &Act::Apply("three".to_owned()), "none called");
    refused(&disk, &Act::Delete("three".to_owned()), "none called");
    act(&disk, &create("3")).expect("a name that is the next id");
    // An id goes before a name: this one has id 3 as well.
    act(&disk, &Act::Delete("3".to_owned())).expect("deleting by id");
    act(&disk, &Act::Delete("2".to_owned())).expect("deleting by id");
    let names: Vec<String> = list(&disk).into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["one"]);
}

#[test]
fn data_files_have_no_snapshots() {
    for raw in [false, true] {
        let disk = Layout::new(12, 320, Kind::DataFile { raw }).make(1).disk();
        refused(&disk, &create("one"), "external data file");
        assert!(list(&disk).is_empty());
    }
}

#[test]
fn sizes_that_cannot_be() {
    let disk = Layout::new(9, 300, Kind::Snapshots).version_2().make(1).disk();
    refused(&disk, &Act::Resize(500), "version 2 image that has snapshots");
    let disk = Layout::new(9, 300, Kind::OverRaw(700)).version_2().make(1).disk();
    refused(&disk, &Act::Resize(500), "would show through");
    let disk = Layout::new(9, 300, Kind::Plain).make(1).disk();
    // 2^22 L1 entries of 64 clusters of 512 bytes.
    refused(&disk, &Act::Resize((1 << 28) + 1), "too large for clusters of 512 bytes");
}

#[test]
fn an_image_with_bitmaps_keeps_them_true() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "1M"]);
    dir.io(IMAGE, &["write -P 3 64k 64k".to_owned()]);
    dir.img(&["bitmap", "--add", IMAGE, "changes"]);
    let disk = MemDisk::new();
    disk.add(IMAGE, dir.read(IMAGE));
    refused(&disk, &Act::Resize(4096), "bitmaps");
    act(&disk, &create("one")).expect("a snapshot changes no bytes of the disk");
    refused(&disk, &Act::Apply("one".to_owned()), "bitmaps");
    let dir = Dir::of(&disk);
    let info = dir.img(&["info", IMAGE]);
    assert!(info.contains("name: changes") && !info.contains("in-use"), "{info}");
    act(&disk, &Act::Delete("one".to_owned())).expect("deleting");
    let dir = Dir::of(&disk);
    let (verdict, printed) = dir.check(IMAGE);
    assert_eq!(verdict, common::qemu::Verdict::Clean, "{printed}");
    assert!(report(&disk).is_clean());
}

#[test]
fn a_snapshot_that_leads_to_a_bitmap_is_not_deleted() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "1M"]);
    dir.io(IMAGE, &["write -P 3 64k 64k".to_owned()]);
    dir.img(&["bitmap", "--add", IMAGE, "changes"]);
    dir.img(&["snapshot", "-c", "one", IMAGE]);
    dir.io(IMAGE, &["write -P 4 64k 64k".to_owned()]);
    let mut bytes = dir.read(IMAGE);
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 8].try_into().expect("eight bytes");
        u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00
    };
    let at = |word: u64| usize::try_from(word).expect("a small file");
    let kind = 0x2385_2875_u32.to_be_bytes();
    let extension = bytes.windows(4).position(|bytes| bytes == kind).expect("bitmaps");
    let directory = word(&bytes, extension + 24);
    let l1 = at(word(&bytes, at(word(&bytes, 64))));
    let entry = at(word(&bytes, l1)) + 8;
    bytes[entry..entry + 8].copy_from_slice(&directory.to_be_bytes());
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    refused(&disk, &Act::Delete("one".to_owned()), "overwrite metadata");
}

#[test]
fn an_image_with_broken_bitmaps_has_snapshots_and_says_so() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "1M"]);
    dir.img(&["bitmap", "--add", IMAGE, "changes"]);
    let mut bytes = dir.read(IMAGE);
    let kind = 0x2385_2875_u32.to_be_bytes();
    let extension = bytes.windows(4).position(|bytes| bytes == kind).expect("bitmaps");
    // More bitmaps than the directory has entries.
    bytes[extension + 11] = 5;
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    act(&disk, &create("one")).expect("the disk is sound");
    let autoclear = disk.look(IMAGE, |bytes| bytes[95] & 1).expect("the image");
    assert_eq!(autoclear, 0, "bitmaps that contradict themselves are called valid");
    act(&disk, &Act::Delete("one".to_owned())).expect("deleting");
    assert!(report(&disk).corruptions.is_empty(), "{:?}", report(&disk));
}

#[test]
fn a_disk_of_no_bytes_has_snapshots_and_grows() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", IMAGE, "0"]);
    let disk = MemDisk::new();
    disk.add(IMAGE, dir.read(IMAGE));
    act(&disk, &create("empty")).expect("a snapshot of nothing");
    act(&disk, &Act::Resize(1000)).expect("growing");
    act(&disk, &create("larger")).expect("a snapshot of more");
    act(&disk, &Act::Apply("empty".to_owned())).expect("going back");
    let found = contents(&disk.content_of(IMAGE).expect("the image"));
    assert_eq!(found.disk.len(), 0);
    act(&disk, &Act::Delete("empty".to_owned())).expect("deleting");
    assert!(report(&disk).is_clean(), "{:?}", report(&disk));
    let (verdict, printed) = Dir::of(&disk).check(IMAGE);
    assert_eq!(verdict, common::qemu::Verdict::Clean, "{printed}");
}

#[test]
fn an_external_data_file_grows_and_shrinks_with_its_image() {
    for raw in [false, true] {
        let made = Layout::new(12, 320, Kind::DataFile { raw }).make(1);
        let disk = made.disk();
        let mut tags = made.tags;
        for sectors in [500, 203, 800] {
            act(&disk, &Act::Resize(sectors)).expect("resizing");
            tags.resize(sectors, 0);
            let expected = common::sectors::bytes_of(0, &tags);
            let dir = Dir::of(&disk);
            assert!(dir.guest_bytes(IMAGE) == expected, "{sectors} sectors, raw: {raw}");
            let data = dir.read("guest.data");
            assert!(!raw || data == expected, "the raw file differs, {sectors} sectors");
            let (verdict, printed) = dir.check(IMAGE);
            assert_eq!(verdict, common::qemu::Verdict::Clean, "{printed}");
        }
    }
}

#[test]
fn a_snapshot_that_leads_to_metadata_is_not_deleted() {
    let mut made = Layout::new(9, 300, Kind::Snapshots).make(1);
    let bytes = made.image();
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 8].try_into().expect("eight bytes");
        usize::try_from(u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00).expect("a small file")
    };
    let (entry, blocks) = (word(bytes, 64), word(bytes, 48));
    let table = word(bytes, word(bytes, entry));
    assert!(table != 0 && table != word(bytes, word(bytes, 40)), "a table of the snapshot alone");
    for target in [0x200_u64, blocks as u64] {
        let mut made = made.clone();
        let entry = (target / 512 * 512).to_be_bytes();
        made.image()[table..table + 8].copy_from_slice(&entry);
        let disk = made.disk();
        refused(&disk, &Act::Delete("one".to_owned()), "metadata");
        refused(&disk, &Act::Apply("one".to_owned()), "metadata");
    }
}

#[test]
fn a_size_that_no_header_may_state_is_refused() {
    // With clusters of 2 MiB the L1 table of such a disk would be just small enough.
    let disk = Layout::new(21, 4096, Kind::Empty).make(1).disk();
    refused(&disk, &Act::Resize(1 << 52), "too large");
}

#[test]
fn a_new_image_of_a_size_no_header_may_state_is_not_made() {
    let make = |size| {
        let disk = MemDisk::new();
        let engine = disk.engine(0, 0);
        let layout = CreateOptions { cluster_bits: 21, ..CreateOptions::new(size) };
        let made = create_image(&engine, &disk, Path::new(IMAGE), &layout);
        block_on(&engine, made).map(|()| disk)
    };
    let error = make(1 << 61).map(|_| ()).expect_err("too large").to_string();
    assert!(error.contains("too large"), "{error}");
    // What is made can be opened.
    let disk = make((1 << 61) - 512).expect("the largest disk there is");
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("opening");
    assert_eq!(image.size(), (1 << 61) - 512);
}

#[test]
fn a_file_is_not_cut_by_refcounts_that_call_its_tables_free() {
    let mut made = Layout::new(12, 16_384, Kind::Empty).make(1);
    let image = made.image();
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"));
    let table = usize::try_from(word(48)).expect("small");
    image[table..table + 8].fill(0);
    let before = image.clone();
    let disk = made.disk();
    act(&disk, &Act::Resize(8192)).expect("a smaller disk");
    let same = disk.look(IMAGE, |now| now.len() == before.len() && now[..4] == before[..4]);
    assert!(same.expect("the image"), "the file was cut");
    assert_eq!(disk.look(IMAGE, |now| now[24..32] == (8192_u64 * 512).to_be_bytes()), Some(true));
}
