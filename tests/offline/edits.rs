//! Commits, rebases, other headers and other bitmaps: power cuts at every moment of each. The disk
//! holds what it held, the header is the old one or the new one, and nothing is corrupt.

use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use common::check::{check, check_interrupted};
use common::images::{IMAGE, Kind, Layout};
use common::sectors::tags_of;
use common::seeds::{Repeat, seeds};
use common::workers::{open, options, read_all, write_some};
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::image::Format;
use vhost_user_qcow2::image::amend::{BitmapAction, amend, amend_refcounts, edit_bitmap};
use vhost_user_qcow2::image::commit::{Commit, commit};
use vhost_user_qcow2::image::rebase::{NewBacking, rebase, rebase_unsafe};
use vhost_user_qcow2::qcow2::Amend;
use vhost_user_qcow2::qcow2::header::parse;
use vhost_user_qcow2::storage::mem::{Effect, MemDisk, Stage};
use vhost_user_qcow2::storage::{Engine, Purpose, Storage, block_on};

use crate::cuts::copy;

/// All subsets are tried of at most so many sectors.
const EXHAUSTIVE: usize = 8;
/// A file that an image can be rebased onto, and one whose name fills most of a sector.
pub(crate) const OTHER: &str = "other.raw";

pub(crate) fn long_name() -> String {
    format!("{}other.raw", "a".repeat(300))
}

/// One operation.
#[derive(Debug, Clone)]
pub(crate) enum Edit {
    Commit(Option<&'static str>),
    Keep,
    Rebase(Option<&'static str>),
    /// Only the name; the file is empty, or holds what was there before.
    Name(Option<String>),
    Amend(Amend),
    Refcounts(u32),
    Bitmap(&'static str, Vec<BitmapAction>),
}

impl Edit {
    async fn run(&self, st: &dyn Storage, disk: &MemDisk, tiny: bool) -> Result<()> {
        let (path, options) = (Path::new(IMAGE), options(tiny));
        let ignore = &mut |_: u64, _: u64| true;
        let raw = |name: Option<String>| NewBacking { name, format: Some(Format::Raw) };
        match self {
            Self::Commit(base) => {
                let how = Commit { base: base.map(Path::new), keep: false };
                commit(st, disk, path, &options, how, ignore).await.map(drop)
            }
            Self::Keep => {
                let how = Commit { base: None, keep: true };
                commit(st, disk, path, &options, how, ignore).await.map(drop)
            }
            Self::Rebase(name) => {
                let new = raw(name.map(str::to_owned));
                rebase(st, disk, path, &options, &new, ignore).await.map(drop)
            }
            Self::Name(name) => rebase_unsafe(st, disk, path, &options, &raw(name.clone())).await,
            Self::Amend(what) => amend(st, disk, path, &options, what, ignore).await.map(drop),
            Self::Refcounts(order) => {
                amend_refcounts(st, disk, path, &options, *order, &|_, _| {}).await
            }
            Self::Bitmap(name, actions) => {
                edit_bitmap(st, disk, path, &options, (name, actions), None).await
            }
        }
    }
}

pub(crate) fn run(disk: &MemDisk, what: &Edit) {
    let engine = disk.engine(0, 0);
    let done = block_on(&engine, what.run(&engine, disk, false));
    done.unwrap_or_else(|error| panic!("{what:?}: {error}"));
}

/// What can be seen of an image: the disk, and what the header says that an operation changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    disk: Vec<u8>,
    header: String,
}

fn word(bytes: &[u8], at: usize, len: usize) -> usize {
    let field = bytes.get(at..at + len).unwrap_or(&[]);
    field.iter().fold(0, |value, &byte| value << 8 | usize::from(byte))
}

/// The bitmaps, from the directory's bytes on: flags, names, and the bytes of bits.
fn bitmaps(image: &[u8], extensions: &[Vec<u8>]) -> Vec<(usize, Vec<u8>, Vec<u8>)> {
    let cluster = 1_usize << word(image, 20, 4);
    let Some(extension) = extensions.first() else { return Vec::new() };
    let mut at = word(extension, 16, 8);
    let mut found = Vec::new();
    for _ in 0..word(extension, 0, 4) {
        let start = at + 24 + word(image, at + 20, 4);
        let name = image[start..start + word(image, at + 18, 2)].to_vec();
        let mut bits = Vec::new();
        for entry in 0..word(image, at + 8, 4) {
            let place = word(image, word(image, at, 8) + entry * 8, 8);
            match place {
                0 => bits.extend(vec![0; cluster]),
                1 => bits.extend(vec![255; cluster]),
                place => {
                    bits.extend(&image[place..(place + cluster).min(image.len())]);
                    bits.resize((entry + 1) * cluster, 0);
                }
            }
        }
        found.push((word(image, at + 12, 4), name, bits));
        at = (start + word(image, at + 18, 2)).next_multiple_of(8);
    }
    found
}

/// What the header of an image says that operations change.
pub(crate) fn said(bytes: &[u8]) -> String {
    let cluster = 1_usize << word(bytes, 20, 4);
    let mut first = bytes[..cluster.min(bytes.len())].to_vec();
    first.resize(cluster, 0);
    let header = parse(IMAGE, &first).expect("a header");
    let valid = header.autoclear & 1 == 1;
    let bitmaps = if valid { bitmaps(bytes, &header.bitmaps) } else { Vec::new() };
    format!(
        "version {}, refcounts {}, lazy {}, over {:?} ({:?}), bitmaps {bitmaps:?}",
        header.version,
        header.geometry.refcount_order,
        header.compatible,
        header.backing,
        header.backing_format
    )
}

fn header(disk: &MemDisk) -> String {
    disk.look(IMAGE, said).expect("the image")
}

fn state(disk: &MemDisk) -> State {
    let header = header(disk);
    let engine = disk.engine(0, 0);
    let image = open(&engine, disk, false).expect("opening");
    State { disk: read_all(&engine, &image).expect("reading"), header }
}

/// Every image of the simulated host is without corruptions; `clean` ones have no leaks either.
fn assert_sound(disk: &MemDisk, clean: bool) {
    for (name, bytes) in disk.files() {
        if name.extension().is_some_and(|ending| ending == "qcow2") {
            let report = if clean { check(&bytes) } else { check_interrupted(&bytes) };
            assert!(report.corruptions.is_empty(), "{}: {:?}", name.display(), report.corruptions);
            assert!(!clean || report.is_clean(), "{}: leaks", name.display());
        }
    }
}

#[derive(Default)]
struct Cuts {
    points: u64,
    exhaustive: u64,
    after: u64,
}

impl Cuts {
    fn examine(&mut self, crashed: &MemDisk, states: [&State; 2], seed: u64) {
        self.points += 1;
        assert_sound(crashed, false);
        let now = state(crashed);
        assert!(now.disk == states[0].disk, "the disk has changed");
        let is_new = now.header == states[1].header;
        assert!(is_new || now.header == states[0].header, "a header between: {}", now.header);
        self.after += u64::from(is_new);
        if seed.is_multiple_of(8) {
            write_on(crashed, seed);
        }
    }
}

/// The image is used on.
fn write_on(disk: &MemDisk, seed: u64) {
    let engine = disk.engine(0, seed);
    let image = open(&engine, disk, seed.is_multiple_of(16)).expect("opening");
    let bytes = read_all(&engine, &image).expect("reading");
    let mut tags = tags_of(0, &bytes).expect("sectors of one version each");
    let mut random = fastrand::Rng::with_seed(seed);
    write_some(&engine, &image, &mut tags, &mut random).expect("writing");
    block_on(&engine, image.close(&engine)).expect("closing");
    let bytes = read_all(&engine, &image).expect("reading again");
    assert!(tags_of(0, &bytes).as_ref() == Some(&tags), "what was written reads back");
    assert_sound(disk, false);
}

/// Carries an operation out and cuts the power at each moment between.
fn cut(cuts: &mut Cuts, disk: &MemDisk, what: &Edit, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let before = state(disk);
    let whole = copy(disk);
    run(&whole, what);
    let after = state(&whole);
    assert!(after.disk == before.disk, "{what:?} has changed the disk");
    assert_sound(&whole, true);
    let engine = disk.engine(0, seed);
    engine.set_hold(random.u8(0..4));
    let mut running = pin!(what.run(&engine, disk, random.bool()));
    loop {
        let done = running.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let unsynced = disk.unsynced_sectors();
        if unsynced <= EXHAUSTIVE && random.usize(0..1 << unsynced) <= 12 {
            cuts.exhaustive += 1;
            for kept in 0..1 << unsynced {
                let draw = random.u64(..);
                cuts.examine(&disk.crash_exactly(kept), [&before, &after], draw);
            }
        } else if random.u8(0..6) == 0 {
            let draw = random.u64(..);
            cuts.examine(&disk.crash(draw), [&before, &after], draw);
        }
        if let Poll::Ready(result) = done {
            result.unwrap_or_else(|error| panic!("{what:?}: {error}"));
            break;
        }
        engine.wait().expect("a simulated wait");
    }
    assert_sound(disk, true);
    assert_eq!(header(disk), after.header, "the same operation has the same result");
}

/// Carries operations out on an image, each with power cuts and writes behind it.
fn histories(test: &str, layout: Layout, edits: &[Edit]) {
    let begun = Instant::now();
    let made = layout.make(5);
    let mut cuts = Cuts::default();
    for seed in seeds(2) {
        let _repeat = Repeat::new("offline", test, seed);
        let disk = made.disk();
        let mut other = vec![0; layout.sectors * 512 - 700];
        other.iter_mut().step_by(97).for_each(|byte| *byte = 3);
        disk.add(OTHER, other);
        disk.add(long_name(), Vec::new());
        // So that an overlay has something of its own.
        write_on(&disk, seed);
        for (number, what) in (0..).zip(edits) {
            cut(&mut cuts, &disk, what, seed * 64 + number);
            write_on(&disk, seed * 64 + number);
        }
    }
    let Cuts { points, exhaustive, after } = cuts;
    let seconds = begun.elapsed().as_secs_f64();
    println!("{test}: {points} power cuts, all subsets at {exhaustive} moments, {seconds:.1} s");
    assert!(points > 20 && exhaustive > 10 && after > 0, "{points} {exhaustive} {after}");
}

fn chains() -> [Edit; 4] {
    [Edit::Keep, Edit::Commit(None), Edit::Rebase(Some(OTHER)), Edit::Rebase(None)]
}

pub(crate) fn headers() -> Vec<Edit> {
    let lazy = |on| Edit::Amend(Amend { lazy_refcounts: Some(on), ..Amend::default() });
    let add = || vec![BitmapAction::Add(Some(512)), BitmapAction::Enable];
    vec![
        Edit::Bitmap("one", add()),
        lazy(true),
        Edit::Bitmap("two", vec![BitmapAction::Add(None), BitmapAction::Merge("one".to_owned())]),
        lazy(false),
        Edit::Bitmap("one", vec![BitmapAction::Disable]),
        Edit::Bitmap("two", vec![BitmapAction::Clear]),
        Edit::Bitmap("one", vec![BitmapAction::Remove]),
        Edit::Bitmap("two", vec![BitmapAction::Remove]),
    ]
}

#[test]
fn commits_and_rebases_over_raw() {
    let layout = Layout::new(9, 120, Kind::OverRaw(70));
    histories("edits::commits_and_rebases_over_raw", layout, &chains());
}

#[test]
fn commits_and_rebases_in_a_chain() {
    let layout = Layout::new(12, 200, Kind::Chain);
    let edits = [Edit::Rebase(Some("base.raw")), Edit::Commit(None), Edit::Rebase(None)];
    histories("edits::commits_and_rebases_in_a_chain", layout, &edits);
    let edits = [Edit::Commit(None), Edit::Keep, Edit::Rebase(Some(OTHER))];
    histories("edits::commits_and_rebases_in_a_chain", layout, &edits);
}

#[test]
fn commits_and_rebases_with_subclusters() {
    let layout = Layout::new(14, 300, Kind::OverRaw(200)).extended();
    histories("edits::commits_and_rebases_with_subclusters", layout, &chains());
}

#[test]
fn commits_and_rebases_in_version_2() {
    let layout = Layout::new(9, 96, Kind::OverRaw(60)).version_2();
    histories("edits::commits_and_rebases_in_version_2", layout, &chains());
}

#[test]
fn commits_over_compressed_clusters() {
    let layout = Layout::new(12, 150, Kind::OverCompressed("zlib"));
    histories("edits::commits_over_compressed_clusters", layout, &[Edit::Commit(None)]);
}

#[test]
fn bitmaps_and_late_refcounts() {
    let test = "edits::bitmaps_and_late_refcounts";
    histories(test, Layout::new(9, 150, Kind::Plain), &headers());
    histories(test, Layout::new(12, 150, Kind::Snapshots), &headers());
}

#[test]
fn versions() {
    let version = |version| Edit::Amend(Amend { version: Some(version), ..Amend::default() });
    let up_and_down = [version(3), version(2), version(3)];
    let layout = Layout::new(9, 150, Kind::Plain).version_2();
    histories("edits::versions", layout, &up_and_down);
    let layout = Layout::new(12, 150, Kind::OverRaw(90)).version_2();
    histories("edits::versions", layout, &up_and_down);
    let layout = Layout::new(9, 96, Kind::Snapshots).version_2();
    let lazy = Edit::Amend(Amend { lazy_refcounts: Some(true), ..Amend::default() });
    histories("edits::versions", layout, &[version(3), lazy]);
}

#[test]
fn widths_of_refcounts() {
    let all = |orders: &[u32]| orders.iter().copied().map(Edit::Refcounts).collect::<Vec<_>>();
    let test = "edits::widths_of_refcounts";
    histories(test, Layout::new(9, 300, Kind::Plain), &all(&[6, 0, 3, 5, 1, 4]));
    histories(test, Layout::new(12, 200, Kind::Snapshots), &all(&[3, 6, 2]));
    histories(test, Layout::new(12, 150, Kind::OverRaw(90)), &all(&[2, 5]));
    histories(test, Layout::new(9, 150, Kind::Plain).lazy(), &all(&[6, 1]));
}

/// Names that fit into the first sector, and names that do not.
pub(crate) fn names() -> Vec<Edit> {
    let name = |name: &str| Edit::Name(Some(name.to_owned()));
    vec![
        name(OTHER),
        name(&long_name()),
        Edit::Name(None),
        name(&format!("./././././{}", long_name())),
        name(OTHER),
    ]
}

#[test]
fn names_of_all_lengths() {
    // Everything is allocated, so that it does not matter what lies below.
    for bits in [10, 12, 16] {
        let layout = Layout::new(bits, 150, Kind::Preallocated("full"));
        histories("edits::names_of_all_lengths", layout, &names());
    }
}

/// Runs an operation and returns what was written and synced: file's name, purpose, effect, whether
/// it had ended.
fn trace(layout: Layout, what: &Edit) -> Vec<(String, Purpose, Effect, Stage)> {
    let disk = layout.make(5).disk();
    disk.add(OTHER, vec![7; layout.sectors * 512]);
    let names: Vec<String> =
        disk.files().into_iter().map(|(name, _)| name.display().to_string()).collect();
    write_on(&disk, 1);
    disk.start_trace();
    run(&disk, what);
    let events = disk.take_trace().into_iter().filter(|event| event.effect != Effect::None);
    let name = |number: u32| names[usize::try_from(number).expect("few files")].clone();
    events.map(|event| (name(event.file.0), event.why, event.effect, event.stage)).collect()
}

#[test]
fn r22_what_is_committed_is_durable_before_the_overlay_is_emptied() {
    for kind in [Kind::OverRaw(70), Kind::OverCompressed("zlib")] {
        let trace = trace(Layout::new(9, 120, kind), &Edit::Commit(None));
        let first =
            trace.iter().position(|(name, _, effect, _)| name == IMAGE && *effect != Effect::Sync);
        let (before, after) = trace.split_at(first.expect("it is emptied"));
        let base = |one: &&(String, Purpose, Effect, Stage)| one.0 != IMAGE;
        let last = before.iter().rfind(base).expect("something was committed");
        assert_eq!((&last.2, last.3), (&Effect::Sync, Stage::Finished), "{last:?}");
        assert_eq!(after.iter().find(base), None, "the backing file is written to later");
    }
}

#[test]
fn r23_what_a_rebase_copies_is_durable_before_the_name_changes() {
    let trace = trace(Layout::new(9, 120, Kind::OverRaw(70)), &Edit::Rebase(Some(OTHER)));
    assert!(trace.iter().all(|(name, ..)| name == IMAGE), "only the image is written to");
    let data = |one: &(String, Purpose, Effect, Stage)| one.1 == Purpose::GuestWrite;
    let header = |one: &(String, Purpose, Effect, Stage)| one.1 == Purpose::HeaderWrite;
    let copied = trace.iter().rposition(data).expect("something differs");
    let named = trace.iter().rposition(header).expect("the name changes");
    let between = &trace[copied..named];
    for why in [Purpose::SyncData, Purpose::SyncTables] {
        let synced = between.iter().any(|one| one.1 == why && one.3 == Stage::Finished);
        assert!(synced, "the name changes before {why:?}");
    }
}
