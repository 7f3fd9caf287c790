//! The operator's choices about discards and zeros change what the host keeps, and never what the
//! guest reads.

use std::path::Path;

use common::check::check;
use common::images::{IMAGE, Kind, Layout};
use common::sectors::{SECTOR, bytes_of};
use common::seeds::{Repeat, seeds};
use common::workers::{options, read_all};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::image::policy::{DetectZeroes, Discards, Policy};
use vhost_user_qcow2::image::{Format, Image, OpenOptions};
use vhost_user_qcow2::storage::fault::{Fault, Faults};
use vhost_user_qcow2::storage::mem::{Effect, MemDisk, MemEngine};
use vhost_user_qcow2::storage::{Buf, Engine, Op, Purpose, block_on};

const POLICIES: [Policy; 5] = [
    Policy { discards: Discards::Unmap, detect_zeroes: DetectZeroes::Off },
    Policy { discards: Discards::Unmap, detect_zeroes: DetectZeroes::On },
    Policy { discards: Discards::Unmap, detect_zeroes: DetectZeroes::Unmap },
    Policy { discards: Discards::Ignore, detect_zeroes: DetectZeroes::Off },
    Policy { discards: Discards::Ignore, detect_zeroes: DetectZeroes::On },
];

fn open(engine: &dyn Engine, disk: &MemDisk, format: Format, policy: Policy) -> Image {
    let options = OpenOptions { format: Some(format), policy, ..options(true) };
    block_on(engine, Image::open(engine, disk, Path::new(IMAGE), &options)).expect("a good image")
}

/// A guest's disk beside the bytes that it must read.
struct Guest<'a> {
    engine: &'a MemEngine,
    image: Image,
    bytes: Vec<u8>,
    random: fastrand::Rng,
}

impl Guest<'_> {
    /// A range of whole sectors, now and then of whole pieces of 64 KiB.
    fn range(&mut self) -> (usize, usize) {
        let unit = if self.random.bool() { 128 } else { 1 };
        let sectors = self.bytes.len() / SECTOR;
        let at = self.random.usize(0..sectors) / unit * unit;
        let longest = (sectors - at).min(500);
        let count = (self.random.usize(1..=longest) / unit * unit).clamp(1, longest);
        (at * SECTOR, count * SECTOR)
    }

    /// Bytes with runs of zeros of any length, in memory of several pieces.
    fn bytes(&mut self, len: usize) -> Buf {
        let mut bytes = vec![0; len];
        let mut at = 0;
        while at < len {
            let run = self.random.usize(1..=len).min(len - at);
            if self.random.u8(0..3) == 0 {
                bytes[at..at + run].fill(self.random.u8(1..));
            }
            at += run;
        }
        let cut = self.random.usize(0..len);
        Buf::concat([Buf::copy_of(&bytes[..cut]), Buf::copy_of(&bytes[cut..])])
    }

    fn step(&mut self) {
        let (at, len) = self.range();
        let (start, size) = (GuestOffset(at as u64), len as u64);
        let (image, engine) = (&self.image, self.engine);
        match self.random.u8(0..8) {
            0 => block_on(engine, image.flush(engine)).expect("flush"),
            1 => {
                let unmap = self.random.bool();
                let zeroed = image.write_zeroes(engine, start, size, unmap);
                block_on(engine, zeroed).expect("write zeroes");
                self.bytes[at..at + len].fill(0);
            }
            2 => {
                block_on(engine, image.discard(engine, start, size)).expect("discard");
                if image.policy().unmaps() {
                    // Old bytes or zeros: the next read shows which.
                    let buf = Buf::zeroed(len);
                    block_on(engine, image.read(engine, start, buf.clone())).expect("read");
                    self.bytes[at..at + len].copy_from_slice(&buf.to_vec());
                }
            }
            _ => {
                let buf = self.bytes(len);
                let image = &self.image;
                block_on(engine, image.write(engine, start, buf.clone())).expect("write");
                self.bytes[at..at + len].copy_from_slice(&buf.to_vec());
            }
        }
    }
}

fn history(seed: u64, disk: &MemDisk, format: Format, bytes: &mut Vec<u8>, policy: Policy) {
    let engine = disk.engine(0, seed);
    let image = open(&engine, disk, format, policy);
    bytes.resize(usize::try_from(image.size()).expect("a small disk"), 0);
    let random = fastrand::Rng::with_seed(seed);
    let mut guest = Guest { engine: &engine, image, bytes: std::mem::take(bytes), random };
    for _ in 0..60 {
        guest.step();
    }
    let read = read_all(&engine, &guest.image).expect("read");
    let wrong = read.iter().zip(&guest.bytes).position(|(is, should)| is != should);
    assert_eq!(wrong, None, "with {policy:?}");
    block_on(&engine, guest.image.close(&engine)).expect("close");
    *bytes = guest.bytes;
}

#[test]
fn the_guest_reads_what_it_wrote() {
    let layouts = [
        Layout::new(16, 2600, Kind::Plain),
        Layout::new(16, 2600, Kind::OverRaw(2000)).extended(),
        Layout::new(12, 2600, Kind::OverRaw(2000)).lazy(),
        Layout::new(12, 2600, Kind::OverRaw(2000)).version_2(),
        Layout::new(9, 1500, Kind::Snapshots),
        Layout::new(12, 2600, Kind::Compressed("zlib")),
        Layout::new(16, 2600, Kind::DataFile { raw: false }),
        Layout::new(12, 2600, Kind::DataFile { raw: true }),
    ];
    for seed in seeds(1) {
        let _repeat = Repeat::new("policies", "the_guest_reads_what_it_wrote", seed);
        for (layout, policy) in layouts.iter().flat_map(|l| POLICIES.map(|policy| (l, policy))) {
            let made = layout.make(seed);
            let (disk, mut bytes) = (made.disk(), bytes_of(0, &made.tags));
            history(seed, &disk, Format::Qcow2, &mut bytes, policy);
            let report = disk.look(IMAGE, check).expect("the image");
            assert!(report.is_clean(), "{layout:?} with {policy:?}: {report:?}");
            // Another process finds the same.
            history(seed + 1, &disk, Format::Qcow2, &mut bytes, Policy::default());
        }
        for policy in POLICIES {
            let disk = MemDisk::new();
            disk.add(IMAGE, vec![3; 1_000_000]);
            let mut bytes = vec![3; 1_000_000];
            history(seed, &disk, Format::Raw, &mut bytes, policy);
        }
    }
}

/// What reaches the host when 256 KiB of zeros are written over data, and then over nothing.
fn written(policy: Policy) -> [(u64, u64); 2] {
    let disk = MemDisk::new();
    disk.add(IMAGE, Layout::new(16, 4096, Kind::Empty).make(0).image().clone());
    let faults = Faults::new();
    let engine = Fault::new(disk.engine(0, 0), faults.clone());
    let image = open(&engine, &disk, Format::Qcow2, policy);
    let write = |at: u64, byte: u8| {
        let buf = Buf::copy_of(&vec![byte; 256 << 10]);
        block_on(&engine, image.write(&engine, GuestOffset(at), buf)).expect("write");
    };
    write(0, 1);
    block_on(&engine, image.flush(&engine)).expect("flush");
    [0, 1 << 20].map(|at| {
        let counts =
            || (faults.count_of(Purpose::GuestWrite), faults.count_of(Purpose::GuestDiscard));
        let before = counts();
        write(at, 0);
        // What is freed rests until the flush after the one that unlinks it.
        (0..2).for_each(|_| block_on(&engine, image.flush(&engine)).expect("flush"));
        let after = counts();
        (after.0 - before.0, after.1 - before.1)
    })
}

#[test]
fn zeros_are_written_kept_or_given_back_as_was_chosen() {
    let [off, on, unmap, ignored, ignored_on] = POLICIES.map(written);
    assert!(off == [(1, 0); 2] && ignored == [(1, 0); 2], "without detection: {off:?} {ignored:?}");
    assert!(on == [(0, 0); 2] && ignored_on == [(0, 0); 2], "kept: {on:?} {ignored_on:?}");
    assert_eq!(unmap, [(0, 1), (0, 0)], "given back");
}

#[test]
fn an_ignored_discard_changes_nothing_but_must_lie_on_the_disk() {
    for format in [Format::Raw, Format::Qcow2] {
        let disk = MemDisk::new();
        disk.add(IMAGE, Layout::new(16, 4096, Kind::Plain).make(0).image().clone());
        let engine = disk.engine(0, 0);
        let discards = Discards::Ignore;
        let image = open(&engine, &disk, format, Policy { discards, ..Policy::default() });
        disk.start_trace();
        let whole = image.discard(&engine, GuestOffset(0), image.size());
        block_on(&engine, whole).expect("accepted");
        let beyond = image.discard(&engine, GuestOffset(image.size()), 512);
        block_on(&engine, beyond).expect_err("beyond the end");
        assert!(disk.take_trace().is_empty(), "something was done");
        // Write-zeroes keeps its clusters, and a raw file its space.
        let zeroes = image.write_zeroes(&engine, GuestOffset(0), 128 << 10, true);
        block_on(&engine, zeroes).expect("zeros");
        block_on(&engine, image.flush(&engine)).expect("flush");
        let discarded = |event: &vhost_user_qcow2::storage::mem::Event| {
            event.why == Purpose::GuestDiscard && event.effect == Effect::Zeros
        };
        assert!(!disk.take_trace().iter().any(discarded));
    }
}

#[test]
fn a_discard_of_the_whole_disk_lets_reads_through() {
    use std::pin::pin;
    use std::task::{Context, Waker};

    let disk = MemDisk::new();
    // A table of 512 bytes has the entries of 32 KiB, all of which are in memory after the write.
    disk.add(IMAGE, Layout::new(9, 2048, Kind::Empty).make(0).image().clone());
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, Format::Qcow2, Policy::default());
    let size = image.size();
    let full = Buf::copy_of(&vec![7; usize::try_from(size).expect("a small disk")]);
    block_on(&engine, image.write(&engine, GuestOffset(0), full)).expect("write");
    let mut context = Context::from_waker(Waker::noop());
    let mut discard = pin!(image.discard(&engine, GuestOffset(0), size));
    let mut let_through = 0;
    while discard.as_mut().poll(&mut context).is_pending() {
        assert!(!engine.is_busy(), "the tables are in memory");
        let last = Buf::zeroed(512);
        let read = image.read(&engine, GuestOffset(size - 512), last.clone());
        block_on(&engine, read).expect("read");
        let_through += u64::from(last.to_vec() == [7; 512]);
    }
    assert_eq!(let_through, size / (32 << 10) - 1);
}

/// What a raw file is asked to do for zeros.
#[test]
fn zeros_in_a_raw_file_keep_its_space_unless_told_otherwise() {
    use std::cell::RefCell;
    use std::rc::Rc;
    use vhost_user_qcow2::storage::{FileId, Lane, Limits, Pending, Storage};

    struct Spy(MemEngine, Rc<RefCell<Vec<Op>>>);
    impl Storage for Spy {
        fn limits(&self, file: FileId) -> Limits {
            self.0.limits(file)
        }
        fn length(&self, file: FileId) -> std::io::Result<u64> {
            self.0.length(file)
        }
        fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
            self.1.borrow_mut().push(op.clone());
            self.0.submit(file, why, op)
        }
        fn lane(&self) -> Lane {
            self.0.lane()
        }
    }

    for policy in POLICIES {
        let disk = MemDisk::new();
        disk.add(IMAGE, vec![9; 1 << 20]);
        let (driver, seen) = (disk.engine(0, 0), Rc::default());
        let image = open(&driver, &disk, Format::Raw, policy);
        let spy = Spy(driver, Rc::clone(&seen));
        let written = image.write(&spy, GuestOffset(0), Buf::zeroed(128 << 10));
        block_on(&spy.0, written).expect("write");
        let ops = seen.take();
        let unmaps = match ops.as_slice() {
            [Op::Write { .. }] => None,
            [Op::Zero { unmap, len: 0x2_0000, .. }] => Some(*unmap),
            other => panic!("{policy:?}: {other:?}"),
        };
        let expected = match policy.detect_zeroes {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(false),
            DetectZeroes::Unmap => Some(true),
        };
        assert_eq!(unmaps, expected, "{policy:?}");
        let zeroed = image.write_zeroes(&spy, GuestOffset(0), 4096, true);
        block_on(&spy.0, zeroed).expect("write zeroes");
        let ops = seen.take();
        let given_back = matches!(ops.as_slice(), [Op::Zero { unmap: true, .. }]);
        assert_eq!(given_back, policy.unmaps(), "{policy:?}");
    }
}
