//! What lies behind the end of a disk, above all the state of virtual machines in snapshots; and an
//! image that stays open over many operations.

use std::path::Path;

use common::images::{IMAGE, Kind, Layout, Made};
use common::sectors::{SECTOR, Tag, bytes_of};
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::qcow2::open::{Parts, read_header};
use vhost_user_qcow2::qcow2::snapshot::NewSnapshot;
use vhost_user_qcow2::qcow2::{CacheSizes, NewSize, Qcow2};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{FileSource, OpenMode, Storage, block_on};

use crate::disk::{Act, Contents, act, contents, list, report};

const SECTORS: usize = 128;

/// The first snapshot's entry in the bytes of an image.
fn first_entry(bytes: &[u8]) -> usize {
    let at = u64::from_be_bytes(bytes[64..72].try_into().expect("eight bytes"));
    usize::try_from(at).expect("a small file")
}

fn patched(disk: &MemDisk, patch: impl FnOnce(&mut Vec<u8>)) -> MemDisk {
    let mut bytes = disk.content_of(IMAGE).expect("the image");
    patch(&mut bytes);
    let patched = MemDisk::new();
    patched.add(IMAGE, bytes);
    patched
}

/// A disk whose second half, and that of its snapshot, is made what lies behind the end: the state
/// of a virtual machine.
fn with_state() -> (MemDisk, Vec<Tag>) {
    let made = Layout::new(9, 2 * SECTORS, Kind::Plain).make(6);
    let disk = made.disk();
    act(&disk, &Act::Create("machine".to_owned())).expect("a snapshot");
    let size = (SECTORS * SECTOR) as u64;
    let disk = patched(&disk, |bytes| {
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        let entry = first_entry(bytes);
        bytes[entry + 40..entry + 48].copy_from_slice(&size.to_be_bytes());
        bytes[entry + 48..entry + 56].copy_from_slice(&size.to_be_bytes());
    });
    (disk, made.tags)
}

/// The snapshot's disk and the state behind it.
fn state(disk: &MemDisk) -> Vec<u8> {
    let disk = patched(disk, |bytes| {
        let entry = first_entry(bytes);
        let whole = (2 * SECTORS * SECTOR) as u64;
        bytes[entry + 48..entry + 56].copy_from_slice(&whole.to_be_bytes());
    });
    disk.look(IMAGE, contents).expect("the image").snapshots[0].1.clone()
}

#[test]
fn the_state_of_a_machine_stays_with_its_snapshot() {
    let (disk, tags) = with_state();
    let whole = bytes_of(0, &tags);
    assert_eq!(list(&disk)[0].vm_state_size, (SECTORS * SECTOR) as u64);
    let entry = list(&disk)[0].clone();
    for what in [
        Act::Create("other".to_owned()),
        Act::Apply("machine".to_owned()),
        Act::Resize(3 * SECTORS),
        Act::Apply("other".to_owned()),
        Act::Delete("other".to_owned()),
        Act::Resize(SECTORS / 2),
        Act::Apply("machine".to_owned()),
    ] {
        act(&disk, &what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
        assert!(state(&disk) == whole, "{what:?} has changed the state");
        assert_eq!(list(&disk)[0], entry, "{what:?} has changed the entry");
        assert!(report(&disk).is_clean(), "{what:?}: {:?}", report(&disk));
    }
    let disk_now = disk.look(IMAGE, contents).expect("the image").disk;
    assert!(disk_now == whole[..SECTORS * SECTOR], "the disk is the snapshot's");
    act(&disk, &Act::Delete("machine".to_owned())).expect("deleting");
    assert!(report(&disk).is_clean(), "the state is freed with its snapshot");
}

#[test]
fn what_lies_behind_the_end_never_becomes_a_part_of_the_disk() {
    let (disk, tags) = with_state();
    // The disk still maps what is behind its end, as after qemu-img has applied the snapshot.
    act(&disk, &Act::Resize(2 * SECTORS)).expect("growing");
    let mut expected = tags[..SECTORS].to_vec();
    expected.resize(2 * SECTORS, 0);
    let found = disk.look(IMAGE, contents).expect("the image").disk;
    assert!(found == bytes_of(0, &expected), "the state shows in the disk");
    assert!(report(&disk).is_clean());
}

/// One operation on an image that is open already.
async fn run(image: &mut Qcow2, engine: &dyn Storage, what: &Act) {
    let new = |name: &str| NewSnapshot { name: name.to_owned(), ..NewSnapshot::default() };
    let size = |sectors: usize| (sectors * SECTOR) as u64;
    let done = match what {
        Act::Create(name) => image.create_snapshot(engine, &new(name)).await.map(|_| ()),
        Act::Apply(name) => image.apply_snapshot(engine, name).await,
        Act::Delete(name) => image.delete_snapshot(engine, name).await,
        Act::Resize(sectors) => {
            let new = NewSize { size: size(*sectors), shrink: true, backing_length: None };
            image.resize(engine, new).await
        }
    };
    done.unwrap_or_else(|error| panic!("{what:?}: {error}"));
}

fn open(disk: &MemDisk, tiny: bool) -> Qcow2 {
    let engine = disk.engine(0, 0);
    let mode = OpenMode { read_only: false, backing: false };
    let file = disk.open(Path::new(IMAGE), mode).expect("opening");
    let caches = CacheSizes { l2_bytes: 0, refcount_bytes: 0 };
    let caches = if tiny { caches } else { CacheSizes::default() };
    let parts = Parts { data: None, backed: false, read_only: false, caches };
    block_on(&engine, async {
        let header = read_header(&engine, IMAGE, file).await.expect("the header");
        Qcow2::open(&engine, IMAGE, file, header, parts).await.expect("opening")
    })
}

fn one_history(made: &Made, seed: u64) {
    let disk = made.disk();
    let engine = disk.engine(0, 0);
    let mut image = open(&disk, seed.is_multiple_of(2));
    let mut random = fastrand::Rng::with_seed(seed);
    let mut now = disk.look(IMAGE, contents).expect("the image");
    for number in 0..40 {
        let pick = random.usize(0..now.snapshots.len().max(1));
        let held = now.snapshots.get(pick).cloned();
        let what = match (random.u8(0..6), held) {
            (0 | 1, _) | (_, None) => Act::Create(format!("number {number}")),
            (2, Some((name, _))) => Act::Delete(name),
            (3, Some((name, _))) => Act::Apply(name),
            // Whole clusters: the rest of the last one is the image layer's to clear.
            _ => Act::Resize(random.usize(1..made.layout.sectors / 4) * 8),
        };
        block_on(&engine, run(&mut image, &engine, &what));
        expect(&mut now, &what);
        let found = disk.look(IMAGE, contents).expect("the image");
        assert!(found == now, "{what:?}: other bytes");
        assert!(report(&disk).is_clean(), "{what:?}: {:?}", report(&disk));
    }
}

fn expect(now: &mut Contents, what: &Act) {
    let place = |now: &Contents, name: &String| {
        now.snapshots.iter().position(|(one, _)| one == name).expect("it exists")
    };
    match what {
        Act::Create(name) => now.snapshots.push((name.clone(), now.disk.clone())),
        Act::Apply(name) => now.disk = now.snapshots[place(now, name)].1.clone(),
        Act::Delete(name) => drop(now.snapshots.remove(place(now, name))),
        Act::Resize(sectors) => now.disk.resize(sectors * SECTOR, 0),
    }
}

#[test]
fn an_image_that_stays_open_is_as_good_as_one_opened_anew() {
    let test = "state::an_image_that_stays_open_is_as_good_as_one_opened_anew";
    for layout in [
        Layout::new(9, 304, Kind::Snapshots),
        Layout::new(12, 800, Kind::Snapshots).with_refcount_bits(64),
        Layout::new(9, 304, Kind::Snapshots).lazy(),
    ] {
        let made = layout.make(8);
        for seed in seeds(8) {
            let _repeat = Repeat::new("offline", test, seed);
            one_history(&made, seed);
        }
    }
}
