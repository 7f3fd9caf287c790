//! What every engine of the host must do, run over each of them.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::bounce::{BlockLocks, Bounce};
use super::files::{Files, Options};
use super::mem::MemDisk;
use super::threads::Threads;
use super::uring::{self, Uring};
use super::{
    Buf, Engine, FileId, FileSource, Lane, Limits, Op, OpenMode, Pending, Purpose, Storage,
    block_on, sys,
};
use crate::bytes::HostOffset;
use crate::sync::Arc;

const WRITABLE: OpenMode = OpenMode { read_only: false, backing: false };

/// A directory on the file system of the build, which is seldom one in memory.
fn directory() -> tempfile::TempDir {
    let program = std::env::current_exe().expect("the test's own path");
    tempfile::tempdir_in(program.parent().expect("a directory")).expect("a directory")
}

/// Forces an alignment upon an engine and insists on it.
struct Strict<E> {
    inner: E,
    block: u32,
}

impl<E: Engine> Storage for Strict<E> {
    fn limits(&self, file: FileId) -> Limits {
        let grows = self.inner.limits(file).grows;
        Limits { request_alignment: self.block, memory_alignment: self.block, grows }
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        self.inner.length(file)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        if let Op::Read { at, buf } | Op::Write { at, buf } = &op {
            let block = u64::from(self.block);
            assert!((at.0 | buf.len() as u64).is_multiple_of(block), "{op:?}");
            assert!(buf.is_aligned(self.block as usize), "{op:?}");
        }
        self.inner.submit(file, why, op)
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl<E: Engine> Engine for Strict<E> {
    fn reap(&self) -> usize {
        self.inner.reap()
    }

    fn submit_all(&self) -> io::Result<()> {
        self.inner.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy()
    }

    fn pollable(&self) -> RawFd {
        self.inner.pollable()
    }

    fn wait(&self) -> io::Result<()> {
        self.inner.wait()
    }
}

/// Bytes of the host's space that a file takes.
fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().expect("the test's file").blocks() * 512
}

struct Setup {
    name: &'static str,
    engine: Box<dyn Engine>,
    file: FileId,
    path: PathBuf,
    /// What a write that ends inside a block may lengthen the file to a multiple of.
    pads_to: usize,
    _directory: tempfile::TempDir,
}

impl Setup {
    fn run(&self, op: Op) -> io::Result<()> {
        block_on(&*self.engine, self.engine.submit(self.file, Purpose::L2Write, op))
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let op = Op::Write { at: HostOffset(at), buf: Buf::copy_of(bytes) };
        self.run(op).unwrap_or_else(|error| panic!("{}: write: {error}", self.name));
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        // What was in the memory before must not show.
        let buf = Buf::copy_of(&vec![0xee; len]);
        let op = Op::Read { at: HostOffset(at), buf: buf.clone() };
        self.run(op).unwrap_or_else(|error| panic!("{}: read: {error}", self.name));
        buf.to_vec()
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("the test's file")
    }
}

fn make(name: &'static str, direct: bool, content: &[u8]) -> Option<Setup> {
    let uring = name.contains("uring");
    if uring && let Err(error) = uring::available() {
        eprintln!("SKIPPED {name}: io_uring cannot be used: {error}");
        return None;
    }
    let directory = directory();
    let path = directory.path().join("disk");
    std::fs::write(&path, content).expect("the test's file");
    let files = Files::new(Options { direct, ..Options::default() });
    let file = match files.open(&path, WRITABLE) {
        Ok(opened) => opened.id,
        Err(error) if direct => {
            eprintln!("SKIPPED {name}: {error}");
            return None;
        }
        Err(error) => panic!("{name}: {error}"),
    };
    let locks = BlockLocks::new();
    let (engine, pads_to): (Box<dyn Engine>, usize) = match (uring, direct, name) {
        (true, false, _) => (Box::new(Uring::new(&files, 0).expect("a ring")), 1),
        (false, false, "strict threads") => {
            let inner = Strict { inner: Threads::new(&files, 0).expect("threads"), block: 4096 };
            (Box::new(Bounce::new(inner, locks).expect("bounce")), 1)
        }
        (false, false, _) => (Box::new(Threads::new(&files, 0).expect("threads")), 1),
        (true, true, _) => {
            let inner = Uring::new(&files, 0).expect("a ring");
            (Box::new(Bounce::new(inner, locks).expect("bounce")), 512)
        }
        (false, true, _) => {
            let inner = Threads::new(&files, 0).expect("threads");
            (Box::new(Bounce::new(inner, locks).expect("bounce")), 512)
        }
    };
    let pads_to = if engine.limits(file).request_alignment > 512 { 1 } else { pads_to };
    Some(Setup { name, engine, file, path, pads_to, _directory: directory })
}

fn each(content: &[u8], test: impl Fn(&Setup)) {
    let names = [
        ("threads", false),
        ("uring", false),
        ("direct threads", true),
        ("direct uring", true),
        ("strict threads", false),
    ];
    for (name, direct) in names {
        if let Some(setup) = make(name, direct, content) {
            test(&setup);
        }
    }
}

/// The obvious file.
struct Model(Vec<u8>);

impl Model {
    fn reach(&mut self, end: usize) {
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.reach(at + bytes.len());
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).map(|byte| self.0.get(byte).copied().unwrap_or(0)).collect()
    }
}

/// A buffer in several pieces, here and there misaligned.
fn scattered(random: &mut fastrand::Rng, bytes: &[u8]) -> Buf {
    if random.bool() {
        return Buf::copy_of(bytes);
    }
    let mut parts = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let len = random.usize(1..=rest.len());
        let len = if random.bool() { len } else { len.next_multiple_of(512).min(rest.len()) };
        let shift = if random.bool() { 0 } else { random.usize(1..100) };
        let part = Buf::zeroed(len + shift).slice(shift, len);
        part.copy_from(0, &rest[..len]);
        parts.push(part);
        rest = &rest[len..];
    }
    Buf::concat(parts)
}

const ZONE: usize = 40_000;
const ZONES: usize = 8;

/// One random operation inside a zone, with what must hold after it.
fn one_operation(
    setup: &Setup,
    random: &mut fastrand::Rng,
    model: &mut Model,
    zone: usize,
) -> (Pending, Option<(Buf, Vec<u8>)>) {
    let unit = *random.choice(&[1, 512, 4096]).expect("not empty");
    let start = random.usize(0..ZONE / 2).next_multiple_of(unit);
    let len = random.usize(1..ZONE / 2 - unit).next_multiple_of(unit).min(ZONE - start);
    let start = zone * ZONE + start;
    let at = HostOffset(start as u64);
    let (op, expected) = match random.u8(0..10) {
        0..4 => {
            let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(len).collect();
            model.write(start, &bytes);
            (Op::Write { at, buf: scattered(random, &bytes) }, None)
        }
        4..8 => {
            let buf = scattered(random, &vec![0xee; len]);
            (Op::Read { at, buf: buf.clone() }, Some((buf, model.read(start, len))))
        }
        _ => {
            model.write(start, &vec![0; len]);
            (Op::Zero { at, len: len as u64, unmap: random.bool() }, None)
        }
    };
    (setup.engine.submit(setup.file, Purpose::L2Write, op), expected)
}

fn resize(setup: &Setup, random: &mut fastrand::Rng, model: &mut Model) {
    let len = random.usize(0..ZONE * ZONES);
    setup.run(Op::Resize { len: len as u64 }).expect("resize");
    model.0.resize(len, 0);
    assert_eq!(setup.engine.length(setup.file).expect("length"), len as u64);
}

fn discard(setup: &Setup, random: &mut fastrand::Rng, model: &mut Model) {
    let start = random.usize(0..ZONE * ZONES);
    let len = random.usize(1..ZONE);
    setup.run(Op::Discard { at: HostOffset(start as u64), len: len as u64 }).expect("discard");
    let end = (start + len).min(model.0.len());
    for (byte, (now, before)) in setup.content().iter().zip(&mut model.0).enumerate() {
        let inside = (start..end).contains(&byte);
        assert!(now == before || (inside && *now == 0), "byte {byte} after a discard");
        *before = *now;
    }
}

fn compare(setup: &Setup, model: &Model, seed: u64, round: usize) {
    let content = setup.content();
    let most = model.0.len().next_multiple_of(setup.pads_to);
    let context = format!("{}, seed {seed}, round {round}", setup.name);
    assert!((model.0.len()..=most).contains(&content.len()), "{context}: length");
    let padding = &content[model.0.len()..];
    assert!(padding.iter().all(|&byte| byte == 0), "{context}: padding");
    let differs = content.iter().zip(&model.0).position(|(left, right)| left != right);
    assert_eq!(differs, None, "{context}: first byte that differs");
}

#[test]
fn random_operations_leave_what_the_model_says() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    each(&[9; 10_001], |setup| {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut model = Model(vec![9; 10_001]);
        for round in 0..150 {
            // Operations at the same time touch different bytes, but the same blocks.
            let mut under_way = Vec::new();
            for zone in 0..ZONES {
                under_way.push(one_operation(setup, &mut random, &mut model, zone));
            }
            for (answer, expected) in under_way {
                let context = format!("{}, seed {seed}, round {round}", setup.name);
                block_on(&*setup.engine, answer)
                    .unwrap_or_else(|error| panic!("{context}: {error}"));
                if let Some((buf, bytes)) = expected {
                    assert!(buf.to_vec() == bytes, "{context}: read");
                }
            }
            match random.u8(0..16) {
                0 => resize(setup, &mut random, &mut model),
                1 => discard(setup, &mut random, &mut model),
                2 => setup.run(Op::Sync).expect("sync"),
                _ => {}
            }
            compare(setup, &model, seed, round);
            // Padding of small blocks is part of the file from here on.
            let length = setup.engine.length(setup.file).expect("length");
            model.reach(usize::try_from(length).expect("a small file"));
        }
    });
}

#[test]
fn more_segments_than_one_call_takes() {
    each(&[], |setup| {
        let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(3000 * 24).collect();
        let parts = || bytes.chunks(24).map(Buf::copy_of);
        setup.run(Op::Write { at: HostOffset(5), buf: Buf::concat(parts()) }).expect("write");
        let buf = Buf::concat(std::iter::repeat_with(|| Buf::zeroed(24)).take(3000));
        setup.run(Op::Read { at: HostOffset(5), buf: buf.clone() }).expect("read");
        assert!(buf.to_vec() == bytes, "{}", setup.name);
    });
}

#[test]
fn reads_past_the_end_give_zeros() {
    each(&[5; 1000], |setup| {
        assert_eq!(setup.read(900, 300), [vec![5; 100], vec![0; 200]].concat(), "{}", setup.name);
        assert_eq!(setup.read(0, 8192), [vec![5; 1000], vec![0; 7192]].concat(), "{}", setup.name);
        assert_eq!(setup.read(1 << 40, 512), [0; 512], "{}", setup.name);
        assert_eq!(setup.content().len(), 1000, "{}: a read changed the length", setup.name);
    });
}

#[test]
fn zeros_and_only_zeros_make_a_file_longer() {
    each(&[5; 4096], |setup| {
        let name = setup.name;
        for (at, len, unmap) in [(8192, 8192, true), (20480, 4096, false)] {
            setup.run(Op::Zero { at: HostOffset(at), len, unmap }).expect("zero");
            assert_eq!(setup.content().len() as u64, at + len, "{name}");
        }
        setup.run(Op::Zero { at: HostOffset(1024), len: 1024, unmap: true }).expect("zero");
        assert_eq!(setup.content().len(), 24576, "{name}: zeros inside change no length");
        setup.run(Op::Discard { at: HostOffset(0), len: 1 << 30 }).expect("discard");
        assert_eq!(setup.content().len(), 24576, "{name}: a discard changes no length");
        setup.run(Op::Resize { len: 512 }).expect("resize");
        setup.run(Op::Zero { at: HostOffset(4096), len: 4096, unmap: true }).expect("zero");
        assert_eq!(setup.content().len(), 8192, "{name}: longer again after a cut");
        let beyond = Op::Zero { at: HostOffset(u64::MAX - 4095), len: 8192, unmap: false };
        setup.run(beyond).expect_err("beyond every file");
    });
}

#[test]
fn an_engine_that_goes_waits_for_what_is_under_way() {
    each(&[5; 1 << 20], |setup| {
        for _ in 0..20 {
            let buf = Buf::copy_of(&vec![6; 1 << 20]);
            let write = Op::Write { at: HostOffset(0), buf };
            drop(setup.engine.submit(setup.file, Purpose::GuestWrite, write));
            let read = Op::Read { at: HostOffset(0), buf: Buf::zeroed(1 << 20) };
            drop(setup.engine.submit(setup.file, Purpose::GuestRead, read));
        }
        setup.engine.submit_all().expect("submit");
    });
    // Without a call that hands them over, too.
    for name in ["threads", "uring"] {
        let Some(setup) = make(name, false, &[5; 4096]) else { continue };
        let write = Op::Write { at: HostOffset(0), buf: Buf::copy_of(&[6; 4096]) };
        drop(setup.engine.submit(setup.file, Purpose::GuestWrite, write));
        let (path, engine) = (setup.path.clone(), setup.engine);
        drop(engine);
        assert_eq!(std::fs::read(path).expect("the file"), [6; 4096], "{name}");
    }
}

#[test]
fn an_operation_goes_on_when_nobody_waits_for_it() {
    each(&[5; 8192], |setup| {
        let write = Op::Write { at: HostOffset(100), buf: Buf::copy_of(&[6; 5000]) };
        drop(setup.engine.submit(setup.file, Purpose::GuestWrite, write));
        while setup.engine.is_busy() {
            setup.engine.wait().expect("wait");
        }
        assert_eq!(setup.content()[100..5100], [6; 5000], "{}", setup.name);
        setup.write(0, &[7]);
        assert_eq!(setup.read(0, 101), [vec![7], vec![5; 99], vec![6]].concat());
    });
}

#[test]
fn the_descriptor_tells_of_every_kind_of_answer() {
    each(&[5; 8192], |setup| {
        let buf = || Buf::copy_of(&[1; 4096]);
        let operations = [
            Op::Read { at: HostOffset(0), buf: buf() },
            Op::Write { at: HostOffset(1), buf: buf() },
            Op::Zero { at: HostOffset(0), len: 4096, unmap: true },
            Op::Zero { at: HostOffset(7), len: 4096, unmap: false },
            Op::Discard { at: HostOffset(0), len: 4096 },
            Op::Resize { len: 12288 },
            Op::Sync,
        ];
        for op in operations {
            let mut answer = pin!(setup.engine.submit(setup.file, Purpose::L2Write, op));
            let mut context = Context::from_waker(Waker::noop());
            loop {
                setup.engine.submit_all().expect("submit");
                if let Poll::Ready(result) = answer.as_mut().poll(&mut context) {
                    result.expect("an operation");
                    break;
                }
                sys::wait_readable(&[setup.engine.pollable()]).expect("poll");
                setup.engine.reap();
            }
            assert!(!setup.engine.is_busy(), "{}", setup.name);
        }
    });
}

#[test]
fn who_would_sleep_until_a_sync_is_over_makes_it() {
    let Some(setup) = make("uring", false, &[5; 8192]) else { return };
    let engine = &*setup.engine;
    let submit = |op| engine.submit(setup.file, Purpose::SyncData, op);
    let mut context = Context::from_waker(Waker::noop());
    let mut sync = pin!(submit(Op::Sync));
    assert!(engine.is_busy() && sync.as_mut().poll(&mut context).is_pending(), "not at once");
    engine.submit_and_rest().expect("submit");
    assert!(!engine.is_busy());
    assert!(matches!(sync.poll(&mut context), Poll::Ready(Ok(()))));
    // Somebody waits for something else, too.
    let discard = submit(Op::Discard { at: HostOffset(0), len: 4096 });
    let sync = submit(Op::Sync);
    engine.submit_and_rest().expect("submit");
    assert!(engine.is_busy());
    block_on(engine, discard).expect("discard");
    block_on(engine, sync).expect("sync");
}

#[test]
fn space_that_is_asked_for_changes_neither_bytes_nor_length() {
    each(&[5; 8192], |setup| {
        let before = allocated(&setup.path);
        setup.run(Op::Reserve { at: HostOffset(8192), len: 1 << 20 }).expect("a wish");
        assert_eq!(setup.content(), [5; 8192], "{}", setup.name);
        let asked = allocated(&setup.path);
        assert!(asked >= before + (1 << 20), "{}: {before} bytes, then {asked}", setup.name);
        setup.run(Op::Resize { len: 8192 }).expect("resize");
        assert!(allocated(&setup.path) <= before, "{}: it stays", setup.name);
    });
}

#[test]
fn far_more_operations_than_a_ring_holds() {
    each(&[0; 4096], |setup| {
        let mut answers = Vec::new();
        for number in 0..5000_u64 {
            let buf = Buf::copy_of(&number.to_be_bytes());
            let op = Op::Write { at: HostOffset(number * 8), buf };
            answers.push(setup.engine.submit(setup.file, Purpose::L2Write, op));
        }
        for answer in answers {
            block_on(&*setup.engine, answer).expect("write");
        }
        let content = setup.content();
        for (number, bytes) in content.chunks(8).take(5000).enumerate() {
            assert_eq!(bytes, (number as u64).to_be_bytes(), "{}", setup.name);
        }
    });
}

#[test]
fn an_engine_sees_files_that_were_opened_after_it_was_made() {
    let directory = directory();
    let files = Files::new(Options::default());
    let threads = Threads::new(&files, 0).expect("threads");
    let uring = uring::available().is_ok().then(|| Uring::new(&files, 0).expect("a ring"));
    for number in 0..70 {
        let path = directory.path().join(number.to_string());
        let file = files.create(&path).expect("a new file").id;
        for engine in [Some(&threads as &dyn Engine), uring.as_ref().map(|ring| ring as _)] {
            let Some(engine) = engine else { continue };
            let buf = Buf::copy_of(&[number; 10]);
            let op = Op::Write { at: HostOffset(0), buf };
            block_on(engine, engine.submit(file, Purpose::GuestWrite, op)).expect("write");
            assert_eq!(std::fs::read(&path).expect("the file"), [number; 10]);
            std::fs::write(&path, []).expect("the file");
        }
    }
}

#[test]
fn errors_keep_their_number() {
    each(&[0; 4096], |setup| {
        let at = HostOffset(u64::MAX >> 1 & !4095);
        let op = Op::Write { at, buf: Buf::zeroed(4096) };
        let error = setup.run(op).expect_err("beyond every file");
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG), "{}", setup.name);
    });
}

fn partial_writes<E: Engine>(
    engines: &[Bounce<Strict<E>>],
    file: FileId,
    seed: u64,
    mut step: impl FnMut(&[Bounce<Strict<E>>]),
) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = vec![0; 32768];
    let mut cells: Vec<usize> = (0..model.len() / 128).collect();
    random.shuffle(&mut cells);
    let open = Cell::new(cells.len());
    let mut answers = Vec::new();
    for (number, cell) in cells.into_iter().enumerate() {
        let bytes = [random.u8(1..); 128];
        model[cell * 128..][..128].copy_from_slice(&bytes);
        let at = HostOffset(cell as u64 * 128);
        let op = Op::Write { at, buf: Buf::copy_of(&bytes) };
        let engine = &engines[number % engines.len()];
        answers.push(Box::pin(engine.submit(file, Purpose::GuestWrite, op)));
    }
    while open.get() > 0 {
        step(engines);
        answers.retain_mut(|answer| {
            let mut context = Context::from_waker(Waker::noop());
            let ready = answer.as_mut().poll(&mut context).map(|result| result.expect("write"));
            open.set(open.get() - usize::from(ready.is_ready()));
            ready.is_pending()
        });
    }
    model
}

#[test]
fn parts_of_one_block_written_by_several_workers_all_arrive() {
    for seed in 0..100 {
        let disk = MemDisk::new();
        let file = disk.add("disk", Vec::new());
        let locks = BlockLocks::new();
        let engines: Vec<_> = (0..3)
            .map(|lane| {
                let inner = disk.engine(lane, seed + lane as u64);
                inner.set_hold(3);
                Bounce::new(Strict { inner, block: 4096 }, Arc::clone(&locks)).expect("bounce")
            })
            .collect();
        let model = partial_writes(&engines, file, seed, |engines| {
            for engine in engines {
                engine.submit_all().expect("submit");
                engine.reap();
            }
        });
        assert!(disk.content(file) == model, "seed {seed}");
    }
}

fn write_lane(path: &Path, files: &Arc<Files>, lane: usize) {
    let locks = Arc::clone(&files.locks);
    let inner = Strict { inner: Threads::new(files, lane).expect("threads"), block: 4096 };
    let engine = Bounce::new(inner, locks).expect("bounce");
    for round in 0..100_u64 {
        let answers: Vec<_> = (0..16)
            .map(|block| {
                let buf = Buf::copy_of(&[round as u8 + 1; 512]);
                let at = HostOffset(block * 4096 + lane as u64 * 512);
                engine.submit(FileId(0), Purpose::GuestWrite, Op::Write { at, buf })
            })
            .collect();
        for answer in answers {
            block_on(&engine, answer).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

#[test]
fn workers_on_their_own_threads_wake_each_other() {
    let directory = directory();
    let path = directory.path().join("disk");
    let files = Files::new(Options::default());
    files.create(&path).expect("a new file");
    std::thread::scope(|scope| {
        for lane in 0..8 {
            let (files, path) = (&files, &path);
            scope.spawn(move || write_lane(path, files, lane));
        }
    });
    assert_eq!(std::fs::read(&path).expect("the file"), [100; 65536]);
}
