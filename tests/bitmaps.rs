//! Persistent dirty bitmaps: after a clean close QEMU finds in them what was written; at any other
//! moment they say themselves that they are not to be trusted.

#[path = "bitmaps/cuts.rs"]
mod cuts;
#[path = "bitmaps/exceptions.rs"]
mod exceptions;
#[path = "bitmaps/stored.rs"]
mod stored;

use std::pin::Pin;
use std::time::Instant;

use common::check::check;
use common::images::{IMAGE, Kind, Layout, Made};
use common::qemu::{Dir, Verdict};
use common::sectors::SECTOR;
use common::seeds::{Repeat, seeds};
use common::workers::open;
use stored::{AUTO, IN_USE, Stored, Wanted, add, is_valid, read, seen_by_qemu};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, Engine, block_on};

type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// What bitmaps must say: the bits of each, and how to set them.
#[derive(Clone)]
struct Model(Vec<Stored>);

impl Model {
    /// As the image has them.
    fn of(bytes: &[u8]) -> Self {
        Self(read(bytes))
    }

    /// Marks a range in the enabled bitmaps.
    fn mark(&mut self, at: u64, len: u64) {
        for bitmap in self.0.iter_mut().filter(|bitmap| bitmap.flags == AUTO) {
            for (bit, start) in bitmap.bits.iter_mut().zip((0..).map(|n| n * bitmap.granularity)) {
                *bit |= at < start + bitmap.granularity && start < at + len;
            }
        }
    }

    /// Compares with what the image has after a clean close.
    fn hold(&self, found: &[Stored]) {
        assert_eq!(found.len(), self.0.len());
        for (want, have) in self.0.iter().zip(found) {
            assert_eq!((&want.name, want.flags), (&have.name, have.flags));
            let differ = |&number: &usize| want.bits[number] != have.bits[number];
            let first = (0..want.bits.len()).find(differ);
            assert_eq!(first, None, "bitmap {}: this bit is not what it must be", want.name);
        }
    }

    /// How many bytes each bitmap has marked, in whole granules, sorted by name.
    fn counts(&self) -> Vec<(String, bool, u64)> {
        let set = |bitmap: &Stored| bitmap.bits.iter().filter(|bit| **bit).count() as u64;
        let one = |bitmap: &Stored| (bitmap.name.clone(), false, set(bitmap) * bitmap.granularity);
        let mut counts: Vec<_> = self.0.iter().map(one).collect();
        counts.sort();
        counts
    }
}

/// Whole sectors of a disk.
fn draw(random: &mut fastrand::Rng, sectors: usize) -> (u64, u64) {
    let longest = random.choice([1, 8, 40, 400]).expect("not empty");
    let at = random.usize(0..sectors);
    let len = random.usize(1..=longest).min(sectors - at);
    ((at * SECTOR) as u64, (len * SECTOR) as u64)
}

/// A discard, a write-zeroes or, most often, a write.
async fn change(
    image: &Image,
    engine: &dyn Engine,
    (at, len): (u64, u64),
    (kind, byte): (u8, u8),
) -> Result<()> {
    let at = GuestOffset(at);
    match kind {
        0 => image.discard(engine, at, len).await,
        1 | 2 => image.write_zeroes(engine, at, len, kind == 1).await,
        _ => {
            let bytes = vec![byte; usize::try_from(len).expect("small")];
            image.write(engine, at, Buf::copy_of(&bytes)).await
        }
    }
}

/// One random request that changes the disk; the model knows of it before it begins.
fn request<'a>(
    image: &'a Image,
    engine: &'a dyn Engine,
    model: &mut Model,
    random: &mut fastrand::Rng,
) -> Task<'a> {
    let (at, len) = draw(random, usize::try_from(image.size()).expect("small") / SECTOR);
    model.mark(at, len);
    let what = (random.u8(0..8), random.u8(1..));
    Box::pin(async move {
        change(image, engine, (at, len), what).await.expect("a change of the disk");
    })
}

/// Random requests, several under way on two workers; `look` sees the disk between operations.
fn write_at_random(
    image: &Image,
    disk: &MemDisk,
    model: &mut Model,
    (seed, requests): (u64, usize),
    look: &mut dyn FnMut(&Model),
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let engines = [disk.engine(0, seed), disk.engine(1, seed + 1)];
    engines.iter().for_each(|engine| engine.set_hold(random.u8(0..4)));
    let mut tasks: Vec<TaskSet<Task<'_>>> =
        engines.iter().map(|_| TaskSet::new(4, || {})).collect();
    let mut left = requests;
    while left > 0 || tasks.iter().any(|tasks| !tasks.is_idle()) {
        let lane = random.usize(0..2);
        let engine = &engines[lane];
        if left > 0 && tasks[lane].has_room() {
            left -= 1;
            if random.u8(0..6) == 0 {
                let flush = async { image.flush(engine).await.expect("a flush") };
                tasks[lane].spawn(Box::pin(flush));
            } else {
                tasks[lane].spawn(request(image, engine, model, &mut random));
            }
        }
        tasks[lane].run_ready();
        engine.reap();
        look(model);
    }
}

fn close(image: &Image, disk: &MemDisk) {
    let engine = disk.engine(0, 0);
    block_on(&engine, image.close(&engine)).expect("closing");
}

fn image_bytes(disk: &MemDisk) -> Vec<u8> {
    disk.content_of(IMAGE).expect("the image")
}

/// The bitmaps that most tests use: fine, coarse, of the usual granularity, and a disabled one.
const SEVERAL: [Wanted; 4] = [
    Wanted { name: "fine", granularity: 512, enabled: true },
    Wanted { name: "usual", granularity: 65536, enabled: true },
    Wanted { name: "disabled", granularity: 4096, enabled: false },
    Wanted { name: "coarse", granularity: 1 << 21, enabled: true },
];

/// Commands of `qemu-io` that set some bits before our writes.
const SOME: [&str; 3] = ["write -q 0 1k", "write -q -z 20k 3k", "discard -q 8k 4k"];

fn made(layout: Layout, bitmaps: &[Wanted]) -> Made {
    let mut made = layout.make(1);
    add(&mut made, bitmaps, &SOME);
    made
}

/// Three sessions of random requests, each of which QEMU must find in the bitmaps.
fn agree(test: &str, layout: Layout) {
    let begun = Instant::now();
    let made = made(layout, &SEVERAL);
    let mut dirty = 0;
    for seed in seeds(4) {
        let _repeat = Repeat::new("bitmaps", test, seed);
        let disk = made.disk();
        let mut model = Model::of(&image_bytes(&disk));
        for session in 0..3 {
            let engine = disk.engine(0, seed);
            let image = open(&engine, &disk, seed % 2 == 0).expect("opening");
            let requests = if session == 2 { 150 } else { 12 };
            write_at_random(&image, &disk, &mut model, (seed * 3 + session, requests), &mut |_| ());
            assert!(read(&image_bytes(&disk)).iter().all(|bitmap| {
                bitmap.flags == if bitmap.name == "disabled" { 0 } else { AUTO | IN_USE }
            }));
            close(&image, &disk);
            let bytes = image_bytes(&disk);
            assert!(is_valid(&bytes));
            model.hold(&read(&bytes));
            let report = check(&bytes);
            assert!(report.is_clean(), "session {session}: {report:?}");
            dirty += model.counts()[2].2;
        }
        qemu_agrees(&disk, &model);
    }
    println!("{test}: {dirty} bytes marked, {:.1} s", begun.elapsed().as_secs_f64());
}

/// QEMU checks the image, counts each bitmap's bits, and reads each into a bitmap of its own.
fn qemu_agrees(disk: &MemDisk, model: &Model) {
    let dir = Dir::of(disk);
    let (verdict, said) = dir.check(IMAGE);
    assert_eq!(verdict, Verdict::Clean, "{said}");
    assert_eq!(seen_by_qemu(&dir), model.counts());
    for bitmap in &model.0 {
        let (copy, granularity) = (format!("{}-copy", bitmap.name), bitmap.granularity.to_string());
        dir.img(&["bitmap", "--add", "--disable", "-g", &granularity, IMAGE, &copy]);
        dir.img(&["bitmap", "--merge", &bitmap.name, IMAGE, &copy]);
    }
    let stored = read(&dir.read(IMAGE));
    for bitmap in &model.0 {
        let copy = stored.iter().find(|other| other.name == format!("{}-copy", bitmap.name));
        let copy = &copy.expect("it was added").bits;
        assert!(copy == &bitmap.bits, "QEMU reads other bits in {}", bitmap.name);
    }
}

macro_rules! layouts {
    ($($name:ident: $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            agree(stringify!($name), $layout);
        })*
    };
}

layouts! {
    clusters_of_512: Layout::new(9, 6000, Kind::Plain);
    clusters_of_4_kib: Layout::new(12, 8001, Kind::Plain);
    clusters_of_64_kib: Layout::new(16, 20_000, Kind::Plain);
    an_empty_image: Layout::new(12, 8000, Kind::Empty);
    counts_of_one_bit: Layout::new(12, 8000, Kind::Plain).with_refcount_bits(1);
    over_raw: Layout::new(12, 8000, Kind::OverRaw(5000));
    compressed: Layout::new(16, 8000, Kind::Compressed("zstd"));
    snapshots: Layout::new(9, 6000, Kind::Snapshots);
    data_file: Layout::new(12, 8000, Kind::DataFile { raw: false });
    extended: Layout::new(14, 8000, Kind::Plain).extended();
    lazy: Layout::new(12, 8000, Kind::Plain).lazy();
    extended_lazy_snapshots: Layout::new(16, 20_000, Kind::Snapshots).extended().lazy();
    raw_data_file: Layout::new(12, 8000, Kind::DataFile { raw: true });
}

#[test]
fn bitmaps_of_many_clusters_are_stored_whole() {
    // 16 MiB in granules of 512 bytes: 8 clusters of 512 bytes for the bits; the table has more
    // than one cluster in a second image.
    for (sectors, seed) in [(32 << 10, 1), (320 << 10, 2)] {
        let fine = [SEVERAL[0]];
        let made = made(Layout::new(9, sectors, Kind::Empty), &fine);
        let disk = made.disk();
        let mut model = Model::of(&image_bytes(&disk));
        for round in 0..3 {
            let engine = disk.engine(0, seed);
            let image = open(&engine, &disk, false).expect("opening");
            let mut random = fastrand::Rng::with_seed(seed + round);
            for _ in 0..40 {
                let at = random.u64(0..image.size() / 512) * 512;
                let len = (random.u64(1..=4000) * 512).min(image.size() - at);
                model.mark(at, len);
                let zeroed = image.write_zeroes(&engine, GuestOffset(at), len, true);
                block_on(&engine, zeroed).expect("write-zeroes");
            }
            close(&image, &disk);
            model.hold(&read(&image_bytes(&disk)));
            assert!(check(&image_bytes(&disk)).is_clean());
        }
        let bytes = image_bytes(&disk);
        let table = read(&bytes)[0].table;
        let entries = bytes[table..].chunks_exact(8).take(sectors / 4096);
        let ones = entries.filter(|entry| **entry == 1_u64.to_be_bytes()).count();
        assert!(ones > 0, "clusters of ones take no room");
        qemu_agrees(&disk, &model);
    }
}

#[test]
fn a_session_that_writes_nothing_changes_nothing() {
    let made = made(Layout::new(12, 8000, Kind::Plain), &SEVERAL);
    let disk = made.disk();
    let before = image_bytes(&disk);
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("opening");
    block_on(&engine, image.read(&engine, GuestOffset(0), Buf::zeroed(65536))).expect("reading");
    block_on(&engine, image.flush(&engine)).expect("flushing");
    close(&image, &disk);
    assert!(image_bytes(&disk) == before);
}

#[test]
fn bits_that_did_not_change_are_not_written_again() {
    let made = made(Layout::new(12, 8000, Kind::Plain), &SEVERAL[..2]);
    let disk = made.disk();
    let tables = |disk: &MemDisk| -> Vec<usize> {
        read(&image_bytes(disk)).iter().map(|bitmap| bitmap.table).collect()
    };
    let before = tables(&disk);
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, false).expect("opening");
    let write = |at: u64| {
        let buf = Buf::copy_of(&[7; 512]);
        block_on(&engine, image.write(&engine, GuestOffset(at), buf)).expect("writing");
    };
    write(512);
    close(&image, &disk);
    assert_eq!(tables(&disk), before, "marked before");
    // The image may be used on after all.
    write(1 << 20);
    assert!(read(&image_bytes(&disk)).iter().all(|bitmap| bitmap.flags == AUTO | IN_USE));
    close(&image, &disk);
    let after = tables(&disk);
    assert!(after[0] != before[0] && after[1] != before[1]);
    let stored = read(&image_bytes(&disk));
    assert!(stored[0].bits[2048] && stored[1].bits[16] && !stored[0].bits[2049]);
    assert!(check(&image_bytes(&disk)).is_clean());
}
