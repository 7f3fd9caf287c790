//! The checker against `qemu-img check`: the same verdict on images that were damaged at random.

use super::*;
use crate::images::{IMAGE, Kind, Layout};
use crate::qemu::{Dir, Verdict};
use crate::seeds::{Repeat, seeds};

const LAYOUTS: [Layout; 8] = [
    Layout::new(9, 300, Kind::Plain),
    Layout::new(12, 800, Kind::Plain).with_refcount_bits(1),
    Layout::new(12, 800, Kind::Snapshots),
    Layout::new(9, 300, Kind::Snapshots).with_refcount_bits(64),
    Layout::new(12, 800, Kind::Compressed("zlib")),
    Layout::new(16, 2000, Kind::OverRaw(500)),
    Layout::new(12, 800, Kind::Snapshots).version_2(),
    Layout::new(12, 800, Kind::Preallocated("metadata")),
];

fn verdict(report: &Report) -> Verdict {
    match (report.corruptions.is_empty(), report.leaks) {
        (false, _) => Verdict::Corrupt,
        (true, 0) => Verdict::Clean,
        (true, _) => Verdict::Leaks,
    }
}

/// The places of all entries that are not zero in the tables of an image.
fn entries(walk: &Walk<'_>) -> Vec<u64> {
    let bytes = walk.bytes;
    let (l1, count) = (be64(bytes, 40), be32(bytes, 36).expect("a header"));
    let mut places = Vec::new();
    for place in (0..count).map(|index| l1 + index * 8) {
        let table = be64(bytes, place) & OFFSET_MASK;
        if table != 0 {
            places.push(place);
            let slots = (0..walk.cluster_size() / 8).map(|slot| table + slot * 8);
            places.extend(slots.filter(|&slot| be64(bytes, slot) != 0));
        }
    }
    places
}

/// Changes one thing; says what.
fn damage(bytes: &mut [u8], random: &mut fastrand::Rng) -> String {
    let walk = Walk::new(bytes).expect("an image");
    let places = entries(&walk);
    if places.is_empty() {
        return "nothing is left".to_owned();
    }
    let cluster = random.u64(0..walk.references.len() as u64);
    let per_block = walk.cluster_bits + 3 - walk.order;
    let bit = (cluster & ((1 << per_block) - 1)) << walk.order;
    let block = be64(bytes, walk.reftable.0 + (cluster >> per_block) * 8) & OFFSET_MASK;
    let place = random.choice(&places).copied().expect("an entry");
    let other = be64(bytes, random.choice(&places).copied().expect("an entry"));
    let (order, size) = (walk.order, walk.cluster_size());
    let entry = be64(bytes, place);
    let new = match random.u8(0..9) {
        0..=2 => {
            let at = usize::try_from(block + bit / 8).expect("small");
            let last = if order < 3 { at } else { at + (1 << (order - 3)) - 1 };
            let step = if order < 3 { 1 << (bit % 8) } else { 1 };
            let up = random.bool();
            bytes[last] = if up { bytes[last].wrapping_add(step) } else { bytes[last] ^ step };
            return format!("the refcount of cluster {cluster:#x}");
        }
        3 => entry ^ COPIED,
        4 => other,
        5 => entry.wrapping_add(size),
        6 => 0,
        7 => entry ^ 1 << random.u8(..64),
        _ => entry.wrapping_add(size << 20),
    };
    let at = usize::try_from(place).expect("small");
    bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
    format!("the entry at {place:#x} from {entry:#x} to {new:#x}")
}

#[test]
fn the_verdict_on_damaged_images_is_that_of_qemu_img() {
    let mut verdicts = [0; 3];
    for (number, layout) in (0..).zip(LAYOUTS) {
        let mut made = layout.make(number);
        let dir = Dir::new();
        for (name, content) in &made.files {
            dir.write(name, content);
        }
        for seed in seeds(50) {
            let test = "the_verdict_on_damaged_images_is_that_of_qemu_img";
            let _repeat = Repeat::of("-p common", test, seed);
            let mut random = fastrand::Rng::with_seed(seed * 8 + number);
            let mut bytes = made.image().clone();
            let what: Vec<_> = (0..seed.min(2)).map(|_| damage(&mut bytes, &mut random)).collect();
            dir.write(IMAGE, &bytes);
            let report = check(&bytes);
            let (theirs, printed) = dir.check(IMAGE);
            let ours = verdict(&report);
            assert_eq!(ours, theirs, "{layout:?}, changed {what:?}: {report:?}, {printed}");
            verdicts[ours as usize] += 1;
        }
    }
    println!("clean, leaks, corrupt: {verdicts:?}");
}

#[test]
fn a_word_that_the_end_of_the_file_cuts_in_two_is_half_there() {
    assert_eq!(be64(&[1, 2, 3, 4], 0), 0x0102_0304_0000_0000);
    assert_eq!((be64(&[1, 2, 3, 4], 3), be64(&[1, 2, 3, 4], 4)), (4 << 56, 0));
}
