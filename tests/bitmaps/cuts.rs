//! Power cuts at any moment, and the order of writes: no bitmap is ever stale and looks valid.

use common::replay::Replay;
use common::workers::read_all;
use vhost_user_qcow2::image::OpenOptions;
use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::mem::{Effect, Event, Stage};

use super::*;

/// An image before a history of writes, to be compared with what power cuts leave.
struct Before {
    stored: Vec<Stored>,
    guest: Vec<u8>,
}

impl Before {
    fn of(disk: &MemDisk) -> Self {
        let engine = disk.engine(0, 0);
        let image = open(&engine, disk, false).expect("opening");
        let guest = read_all(&engine, &image).expect("reading");
        Self { stored: read(&image_bytes(disk)), guest }
    }

    /// Examines what a power cut has left; returns how many bitmaps are marked as in use.
    fn examine(&self, crashed: &MemDisk, model: &Model) -> usize {
        let bytes = image_bytes(crashed);
        let report = check(&bytes);
        let sound = is_dirty(crashed) || report.corruptions.is_empty();
        assert!(sound, "after the power cut: {:?}", report.corruptions);
        assert!(is_valid(&bytes), "disabled bitmaps would be lost");
        let engine = crashed.engine(0, 0);
        // What is marked dirty is not opened for writing.
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let opened = Image::open(&engine, crashed, std::path::Path::new(IMAGE), &options);
        let image = block_on(&engine, opened).expect("opening after the power cut");
        let guest = read_all(&engine, &image).expect("reading after the power cut");
        let stored = read(&bytes);
        for ((old, new), model) in self.stored.iter().zip(&stored).zip(&model.0) {
            if old.flags & AUTO == 0 || old.flags & IN_USE != 0 {
                assert_eq!(old, new, "it must be left alone");
                continue;
            }
            if new.flags & IN_USE != 0 {
                continue;
            }
            let unit = usize::try_from(new.granularity).expect("small");
            let granules = self.guest.chunks(unit).zip(guest.chunks(unit));
            for (number, (old_bytes, new_bytes)) in granules.enumerate() {
                let differ = old_bytes != new_bytes;
                assert!(!differ || new.bits[number], "{} is stale at {number}", new.name);
            }
            let bits = &new.bits;
            assert!(bits == &old.bits || bits == &model.bits, "{}: neither old nor new", new.name);
        }
        stored.iter().filter(|bitmap| bitmap.flags & IN_USE != 0).count()
    }
}

/// Whether refcounts were written late, and not yet.
fn is_dirty(disk: &MemDisk) -> bool {
    image_bytes(disk)[79] & 1 == 1
}

/// An image that is marked dirty is free of corruption when QEMU has repaired it, and its bitmaps
/// are what they were.
fn repair(crashed: &MemDisk) {
    let dir = Dir::of(crashed);
    dir.img(&["check", "-q", "-r", "all", IMAGE]);
    let (verdict, said) = dir.check(IMAGE);
    // Its repair of refcounts that are too low may leave leaks of its own.
    assert_ne!(verdict, Verdict::Corrupt, "{said}");
    let known = |bitmap: &Stored| (bitmap.name.clone(), bitmap.flags, bitmap.bits.clone());
    let [before, after] = [image_bytes(crashed), dir.read(IMAGE)]
        .map(|bytes| read(&bytes).iter().map(known).collect::<Vec<_>>());
    assert!(before == after, "the bitmaps are what they were");
}

/// Goes on with an image after a power cut: its bitmaps that are in use stay so, the others are
/// kept, nothing leaks further, and QEMU sees it the same way.
fn go_on(crashed: &MemDisk, seed: u64) {
    if is_dirty(crashed) {
        return repair(crashed);
    }
    let before = check(&image_bytes(crashed));
    let mut model = Model::of(&image_bytes(crashed));
    let engine = crashed.engine(0, seed);
    let image = open(&engine, crashed, false).expect("opening");
    write_at_random(&image, crashed, &mut model, (seed, 5), &mut |_| ());
    close(&image, crashed);
    let bytes = image_bytes(crashed);
    let stored = read(&bytes);
    for (want, have) in model.0.iter().zip(&stored) {
        assert_eq!((want.flags, &want.bits), (have.flags, &have.bits), "{}", want.name);
    }
    let after = check(&bytes);
    assert!(after.corruptions.is_empty(), "after going on: {:?}", after.corruptions);
    assert!(after.all_leaks() <= before.all_leaks(), "{before:?}, then {after:?}");
    if seed.is_multiple_of(64) {
        let dir = Dir::of(crashed);
        let (verdict, said) = dir.check(IMAGE);
        assert_ne!(verdict, Verdict::Corrupt, "{said}");
        for (name, inconsistent, _) in seen_by_qemu(&dir) {
            let own = stored.iter().find(|bitmap| bitmap.name == name).expect("it is there");
            assert_eq!(inconsistent, own.flags & IN_USE != 0, "{name}");
            if inconsistent {
                dir.img(&["bitmap", "--remove", IMAGE, &name]);
            }
        }
    }
}

fn cut(test: &str, layout: Layout, count: u64) {
    let begun = Instant::now();
    let made = made(layout, &SEVERAL);
    let (mut points, mut in_use, mut went_on) = (0, 0, 0);
    for seed in seeds(count) {
        let _repeat = Repeat::new("bitmaps", test, seed);
        let disk = made.disk();
        let before = Before::of(&disk);
        let mut model = Model::of(&image_bytes(&disk));
        let mut random = fastrand::Rng::with_seed(seed);
        let mut look = |model: &Model, often: u8| {
            if random.u8(0..often) != 0 {
                return;
            }
            let draw = random.u64(..);
            let crashed = disk.crash(draw);
            points += 1;
            in_use += usize::from(before.examine(&crashed, model) > 0);
            if draw.is_multiple_of(8) {
                went_on += 1;
                go_on(&crashed, draw);
            }
        };
        let engine = disk.engine(0, seed);
        let image = open(&engine, &disk, false).expect("opening");
        write_at_random(&image, &disk, &mut model, (seed, 20), &mut |model| look(model, 12));
        engine.set_hold(3);
        let mut tasks: TaskSet<Task<'_>> = TaskSet::new(1, || {});
        tasks.spawn(Box::pin(async { image.close(&engine).await.expect("closing") }));
        while !tasks.is_idle() {
            tasks.run_ready();
            engine.reap();
            look(&model, 3);
        }
        model.hold(&read(&image_bytes(&disk.crash_exactly(0))));
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{test}: {points} power cuts, {in_use} left marks, {went_on} went on, {seconds:.1} s");
    assert!(in_use > 0 && in_use < points, "each state was met");
}

#[test]
fn power_cuts_with_clusters_of_512() {
    cut("power_cuts_with_clusters_of_512", Layout::new(9, 600, Kind::Plain), 16);
}

#[test]
fn power_cuts_with_clusters_of_4_kib() {
    cut("power_cuts_with_clusters_of_4_kib", Layout::new(12, 2000, Kind::Plain), 16);
}

#[test]
fn power_cuts_with_snapshots() {
    cut("power_cuts_with_snapshots", Layout::new(9, 600, Kind::Snapshots), 12);
}

#[test]
fn power_cuts_with_a_data_file() {
    let layout = Layout::new(12, 2000, Kind::DataFile { raw: false });
    cut("power_cuts_with_a_data_file", layout, 12);
}

#[test]
fn power_cuts_with_late_refcounts() {
    let layout = Layout::new(12, 2000, Kind::Plain).lazy();
    cut("power_cuts_with_late_refcounts", layout, 12);
}

#[test]
fn power_cuts_with_a_directory_of_many_sectors() {
    // Entries of 24 bytes and a name: some have their two fields in different sectors.
    let names: Vec<String> = (0..60).map(|number| format!("bitmap {number:06}")).collect();
    let bitmap =
        |name: &String| Wanted { name: name.clone().leak(), granularity: 65536, enabled: true };
    let wanted: Vec<Wanted> = names.iter().map(bitmap).collect();
    let made = made(Layout::new(12, 400, Kind::Plain), &wanted);
    let straddles = |stored: &Stored| stored.entry % 512 > 496;
    for seed in seeds(1) {
        let _repeat = Repeat::new("bitmaps", "power_cuts_with_a_directory_of_many_sectors", seed);
        let disk = made.disk();
        let before = Before::of(&disk);
        assert!(before.stored.iter().any(straddles), "the test is about those");
        let mut model = Model::of(&image_bytes(&disk));
        let engine = disk.engine(0, seed);
        let image = open(&engine, &disk, false).expect("opening");
        write_at_random(&image, &disk, &mut model, (seed, 8), &mut |_| ());
        engine.set_hold(5);
        let mut tasks: TaskSet<Task<'_>> = TaskSet::new(1, || {});
        tasks.spawn(Box::pin(async { image.close(&engine).await.expect("closing") }));
        let mut turn = 0;
        while !tasks.is_idle() {
            tasks.run_ready();
            engine.reap();
            turn += 1;
            if turn % 3 == 0 {
                before.examine(&disk.crash(seed << 32 | turn), &model);
            }
        }
    }
}

fn changes(event: &Event) -> bool {
    !matches!(event.effect, Effect::None | Effect::Sync)
}

#[test]
fn nothing_is_written_before_the_marks_are_durable() {
    let test = "nothing_is_written_before_the_marks_are_durable";
    let layouts = [
        Layout::new(9, 1200, Kind::Plain),
        Layout::new(12, 2000, Kind::OverRaw(500)),
        Layout::new(12, 2000, Kind::DataFile { raw: false }),
    ];
    let mut looks = 0;
    for layout in layouts {
        let mut made = made(layout, &SEVERAL);
        // A bit that nobody knows yet, to be cleared.
        made.image()[90] |= 4;
        for seed in seeds(10) {
            let _repeat = Repeat::new("bitmaps", test, seed);
            let disk = made.disk();
            disk.start_trace();
            let engine = disk.engine(0, seed);
            let image = open(&engine, &disk, false).expect("opening");
            let mut model = Model::of(&image_bytes(&disk));
            write_at_random(&image, &disk, &mut model, (seed, 20), &mut |_| ());
            close(&image, &disk);
            let mut replay = Replay::new(&mut made);
            for event in disk.take_trace() {
                let first = event.stage == Stage::Submitted && changes(&event);
                if first && !matches!(event.why, Purpose::HeaderWrite | Purpose::DirectoryWrite) {
                    assert_eq!(replay.durable[90] & 4, 0, "{event:?}");
                    let stale = |bitmap: &Stored| bitmap.flags == AUTO;
                    let marked = !read(&replay.durable).iter().any(stale);
                    // The marks go when all else is durable; what is left is to tidy up.
                    let mut pairs = read(&replay.volatile).into_iter().zip(&model.0);
                    let over = matches!(event.why, Purpose::RefblockWrite | Purpose::GuestDiscard)
                        && pairs.all(|(have, want)| have.bits == want.bits);
                    assert!(marked || over, "{event:?}");
                    looks += usize::from(marked);
                }
                if event.file.0 == 0 {
                    replay.take(event, &mut |_, _| ());
                }
            }
        }
    }
    println!("{test}: held {looks} times");
    assert!(looks > 500, "the rule was hardly ever tried: {looks} times");
}

#[test]
fn marks_go_when_tables_and_places_are_durable() {
    let test = "marks_go_when_tables_and_places_are_durable";
    let mut made = made(Layout::new(9, 1200, Kind::Plain), &SEVERAL);
    let mut looks = 0;
    for seed in seeds(20) {
        let _repeat = Repeat::new("bitmaps", test, seed);
        let disk = made.disk();
        let engine = disk.engine(0, seed);
        let image = open(&engine, &disk, false).expect("opening");
        let mut model = Model::of(&image_bytes(&disk));
        disk.start_trace();
        write_at_random(&image, &disk, &mut model, (seed, 20), &mut |_| ());
        close(&image, &disk);
        let mut replay = Replay::new(&mut made);
        for event in disk.take_trace() {
            replay.take(event, &mut |replay, event| {
                if event.why != Purpose::DirectoryWrite {
                    return;
                }
                // Whatever part of this write arrives, no table is read that is not durable, and
                // no mark goes before everything is there.
                let mut after = replay.durable.clone();
                common::replay::apply(&mut after, event);
                assert!(check(&after).corruptions.is_empty());
                for (have, want) in read(&after).iter().zip(&model.0) {
                    if have.flags == AUTO {
                        assert_eq!(have.bits, want.bits, "{}", have.name);
                        assert_eq!(read(&replay.durable)[0].bits, model.0[0].bits);
                        looks += 1;
                    }
                }
            });
        }
    }
    println!("{test}: held {looks} times");
    assert!(looks >= 60, "the rule was hardly ever tried: {looks} times");
}
