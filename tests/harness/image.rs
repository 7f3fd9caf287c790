//! A spoiled image, perhaps checked and repaired, then used as a guest would: open, read, write,
//! discard, write zeroes, flush, close or lose power, open again.
//!
//! What must hold for every image: nothing panics or waits for ever, an operation is a bounded
//! number of operations on the file, memory is bounded; a guest's data never goes over metadata
//! (see [`Watch`]), what was written is what is read, the header says what it said before, an image
//! that was sound still is one, and what could be opened can be opened again.

use std::fmt::Debug;
use std::path::Path;
use std::task::Poll;

use arbitrary::{Result, Unstructured};
use common::memory::peak;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::{Error, Kind};
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::qcow2::CacheSizes;
use vhost_user_qcow2::storage::fault::{Fate, Faults, Rule};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, Engine};

use crate::places::{Head, Place, number, places};
use crate::watch::{ROOM, SECRET, Watch, drive};
use crate::{Seed, repair, seeds};

/// The image's name on the simulated host.
const IMAGE: &str = "/images/disk.qcow2";
/// Most bytes of memory that an image may make us take, the simulated disk's copies included.
/// Counted where the process has the counting allocator of `common`.
pub const MOST_MEMORY: u64 = 32 << 20;
/// Most operations on files that one request of at most [`MOST_SECTORS`] may take.
const MOST_OPERATIONS: u64 = 8192;
/// Most operations on files that opening a chain may take.
const MOST_OPENING: u64 = 2048;
const MOST_SECTORS: u64 = 96;
const MOST_PATCHES: usize = 12;
const MOST_STEPS: usize = 64;
const SECTOR: u64 = 512;
/// Marks in the header: the image was not closed, and it contradicts itself.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;

/// What became of an input, so that a test can tell that it does not only make refusals.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// How often the image could be opened.
    pub opened: u32,
    /// How many requests were done.
    pub succeeded: u32,
}

/// Runs one input.
///
/// # Panics
/// When something that must hold does not.
pub fn run(input: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    let ((), used) = peak(|| {
        // The end of the input is the end of the choices.
        let _ = try_run(&mut Unstructured::new(input), &mut outcome);
    });
    assert!(used < MOST_MEMORY, "{used} bytes of memory");
    outcome
}

fn try_run(input: &mut Unstructured<'_>, outcome: &mut Outcome) -> Result<()> {
    let seed = &seeds()[usize::from(input.arbitrary::<u8>()?) % seeds().len()];
    let choices: u8 = input.arbitrary()?;
    let faults = Faults::new();
    if choices & 2 != 0 {
        faults.add(rule(input)?);
    }
    let mut bytes = seed.bytes.clone();
    let places = places(&bytes);
    for _ in 0..usize::from(input.arbitrary::<u8>()?) % (MOST_PATCHES + 1) {
        patch(&mut bytes, &places, input)?;
    }
    let disk = host(bytes);
    let engine = disk.engine(0, u64::from(choices));
    if choices & 4 != 0 {
        engine.set_hold(2);
    }
    let mut caches = CacheSizes::default();
    if choices & 8 != 0 {
        caches = CacheSizes { l2_bytes: 1024, refcount_bytes: 1024 };
    }
    let (read_only, compress) = (choices & 1 != 0, choices & 64 != 0);
    let options = OpenOptions { read_only, compress, caches, ..OpenOptions::default() };
    let engine = Watch::new(&disk, IMAGE, engine, faults.clone());
    let durable = choices & 32 == 0 || repair::run(&disk, IMAGE, &engine, input)?;
    let cut = (durable && choices & 16 != 0).then_some(u64::from(choices));
    Session { disk, engine, faults, options, written: 0 }.run(input, outcome, cut)
}

/// The simulated host: the image, and what it may refer to.
fn host(bytes: Vec<u8>) -> MemDisk {
    let disk = MemDisk::new();
    disk.add(IMAGE, bytes);
    let secret = disk.add("/etc/passwd", b"root::0:0".to_vec());
    assert_eq!(secret, SECRET);
    disk.add("/images/base.raw", (0..48 << 10).map(|at| (at / 512) as u8 | 1).collect());
    disk.add("/images/base.qcow2", Seed::of("zlib").bytes.clone());
    disk.add("/images/guest.data", vec![0x5a; 80 << 10]);
    disk
}

fn rule(input: &mut Unstructured<'_>) -> Result<Rule> {
    let choice: u8 = input.arbitrary()?;
    let errno = if choice & 1 == 0 { 5 } else { 28 };
    let fate = match choice >> 1 & 3 {
        0 | 1 => Fate::Fail(errno),
        2 => Fate::Short { bytes: u64::from(choice >> 3) * 64, errno },
        _ => Fate::Delay(u32::from(choice >> 3)),
    };
    let nth = u64::from(input.arbitrary::<u8>()?) + 1;
    Ok(Rule { purpose: None, nth, sticky: choice & 0x80 != 0, fate })
}

/// Numbers that parsers stumble over.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    3,
    0x1ff,
    0x200,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 56,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX,
];

/// Names that an image might give.
const NAMES: [&str; 8] = [
    "disk.qcow2",
    "base.raw",
    "base.qcow2",
    "guest.data",
    "../etc/passwd",
    "/etc/passwd",
    "json:{\"driver\":\"file\"}",
    "",
];

/// Changes one thing in an image.
fn patch(bytes: &mut Vec<u8>, places: &[Place], input: &mut Unstructured<'_>) -> Result<()> {
    let place = usize::from(input.arbitrary::<u8>()?);
    let Some(place) = places.get(place) else { return patch_whole(bytes, input) };
    let index: u16 =
        if place.count > 256 { input.arbitrary()? } else { u16::from(input.arbitrary::<u8>()?) };
    let at = place.at + u64::from(index) % place.count * place.width;
    let old = number(bytes, at, place.width).unwrap_or_default();
    let cluster = Head::read(bytes).map_or(512, |head| head.cluster);
    let value = match input.arbitrary::<u8>()? % 6 {
        // A reference to a cluster, with flags where entries have them.
        0 => {
            let number = u64::from(input.arbitrary::<u8>()?);
            let flags = u64::from(input.arbitrary::<u8>()?);
            (number * cluster) | ((flags >> 6) << 62) | (flags & 0x3f)
        }
        1 => EDGES[usize::from(input.arbitrary::<u8>()?) % EDGES.len()],
        2 => input.bytes(place.width as usize)?.iter().fold(0, |sum, b| sum << 8 | u64::from(*b)),
        3 => old ^ 1 << (input.arbitrary::<u8>()? % 64),
        4 => old.wrapping_add(cluster.wrapping_mul(input.arbitrary::<i8>()? as u64)),
        _ => old.wrapping_add(input.arbitrary::<i8>()? as u64),
    };
    put(bytes, at, &value.to_be_bytes()[8 - place.width as usize..]);
    Ok(())
}

/// Changes that are not one number's.
fn patch_whole(bytes: &mut Vec<u8>, input: &mut Unstructured<'_>) -> Result<()> {
    let block = |input: &mut Unstructured<'_>| Ok(u64::from(input.arbitrary::<u8>()?) * 512);
    match input.arbitrary::<u8>()? % 4 {
        0 => bytes.truncate(usize::from(input.arbitrary::<u16>()?)),
        1 => bytes.resize(bytes.len() + usize::from(input.arbitrary::<u16>()?), 0),
        2 => {
            let (from, to) = (block(input)? as usize, block(input)?);
            let copy = bytes.get(from..from + 512).map(<[u8]>::to_vec);
            put(bytes, to, &copy.unwrap_or_default());
        }
        _ => {
            let name = NAMES[usize::from(input.arbitrary::<u8>()?) % NAMES.len()];
            put(bytes, 8, &448u64.to_be_bytes());
            put(bytes, 16, &(name.len() as u32).to_be_bytes());
            put(bytes, 448, name.as_bytes());
        }
    }
    Ok(())
}

/// Overwrites bytes that are there.
fn put(bytes: &mut [u8], at: u64, new: &[u8]) {
    let end = at as usize + new.len();
    if let Some(target) = bytes.get_mut(at as usize..end) {
        target.copy_from_slice(new);
    }
}

/// Whether two entries of a disk's own tables, in an image without contradictions, refer to the
/// same bytes. Refcounts allow that; but whoever drops one of the references cannot know where the
/// other is, which lacks its COPIED flag from then on. Nobody makes such images on purpose.
fn is_doubled(bytes: &[u8]) -> bool {
    let mut places: Vec<u64> = common::check::map(bytes).guest.into_iter().flatten().collect();
    places.sort_unstable();
    places.windows(2).any(|two| two[0] == two[1])
}

/// A request of the guest.
#[derive(Debug, Clone, Copy)]
enum Request {
    Read,
    Write(u8),
    Zero { unmap: bool },
    Discard,
    Flush,
}

/// A simulated host with an image that is opened, used and closed.
struct Session {
    disk: MemDisk,
    engine: Watch,
    faults: Faults,
    options: OpenOptions,
    /// The byte that was written last.
    written: u8,
}

impl Session {
    /// Uses the image as the input says, and closes it, or cuts the power with that seed.
    fn run(
        &mut self,
        input: &mut Unstructured<'_>,
        outcome: &mut Outcome,
        cut: Option<u64>,
    ) -> Result<()> {
        let Ok(mut image) = self.open() else { return Ok(()) };
        outcome.opened += 1;
        let before = self.content();
        let sound = common::check::check(&before).corruptions.is_empty() && !is_doubled(&before);
        for _ in 0..MOST_STEPS {
            if input.is_empty() {
                break;
            }
            let kind = input.arbitrary::<u8>()?;
            if kind == 0xff {
                self.close(image, &before, sound);
                let Some(again) = self.reopen(sound) else { return Ok(()) };
                image = again;
                outcome.opened += 1;
                continue;
            }
            let count = if kind & 0x80 == 0 { 1 } else { usize::from(kind >> 5 & 3) + 2 };
            let mut requests = Vec::with_capacity(count);
            for _ in 0..count {
                requests.push(self.request(&image, input)?);
            }
            outcome.succeeded += self.carry(&image, &requests);
        }
        match cut {
            None => self.close(image, &before, sound),
            Some(seed) => {
                drop(image);
                self.cut_power(seed, sound);
            }
        }
        Ok(())
    }

    /// What a power cut leaves of a sound image is one too, although clusters may have leaked.
    fn cut_power(&self, seed: u64, sound: bool) {
        let disk = self.disk.crash(seed);
        let (faults, options) = (Faults::new(), self.options.clone());
        let engine = Watch::new(&disk, IMAGE, disk.engine(0, 0), faults.clone());
        let after = Self { disk, engine, faults, options, written: 0 };
        let (opened, bytes) = (after.open(), after.content());
        // Refcounts of an image that is marked dirty may be behind.
        if sound && !is_marked(&bytes, DIRTY) {
            let report = common::check::check(&bytes);
            assert!(report.corruptions.is_empty(), "it was sound before the cut: {report:?}");
            after.close(opened.expect("it was sound before the cut"), &bytes, true);
        }
    }

    fn content(&self) -> Vec<u8> {
        self.disk.content_of(IMAGE).expect("the image")
    }

    fn drive<T>(&self, future: impl Future<Output = T>) -> T {
        drive(&self.engine, future)
    }

    fn open(&self) -> std::result::Result<Image, Error> {
        let path = Path::new(IMAGE);
        let image = self.drive(Image::open(&self.engine, &self.disk, path, &self.options));
        let operations = self.engine.take_operations();
        assert!(operations < MOST_OPENING, "{operations} operations to open an image");
        image
    }

    /// What was closed is an image, and can be opened unless a contradiction was found meanwhile.
    fn reopen(&self, sound: bool) -> Option<Image> {
        // A fault that has waited for its turn must not meet this.
        self.faults.clear();
        match self.open() {
            Ok(image) => Some(image),
            Err(_) if !sound && is_marked(&self.content(), CORRUPT) => None,
            Err(error) => panic!("it was open before: {error}"),
        }
    }

    fn close(&self, image: Image, before: &[u8], sound: bool) {
        let closed = self.drive(image.close(&self.engine));
        acceptable(&closed);
        drop(image);
        while self.engine.is_busy() {
            self.engine.wait().expect("a simulated disk");
        }
        let after = self.content();
        let same = |range: std::ops::Range<usize>| before.get(range.clone()) == after.get(range);
        // The refcount table may have grown, and feature bits may have changed.
        let header = same(0..48) && same(60..72) && same(80..88) && same(96..512);
        assert!(header, "the header has changed");
        // Refcounts of an image that could not be closed, and says so, may be behind.
        if sound && !is_marked(&after, DIRTY) {
            let report = common::check::check(&after);
            assert!(report.corruptions.is_empty(), "it was sound before: {report:?}");
        }
        check(&self.disk);
    }

    fn request(
        &mut self,
        image: &Image,
        input: &mut Unstructured<'_>,
    ) -> Result<(Request, u64, u64)> {
        let kind: u8 = input.arbitrary()?;
        let at = u64::from(input.arbitrary::<u8>()?);
        let len = u64::from(kind >> 4).pow(2).clamp(1, MOST_SECTORS) * SECTOR;
        let request = match kind % 8 {
            0 | 1 => Request::Read,
            2..=4 => {
                self.written = self.written.wrapping_add(1);
                Request::Write(self.written)
            }
            5 => Request::Zero { unmap: kind & 8 != 0 },
            6 => Request::Discard,
            _ => Request::Flush,
        };
        // The end of the disk is as near as its beginning.
        let at = match at {
            0xf0.. => image.size().saturating_sub((0xff - at + 1) * SECTOR),
            _ => at * SECTOR,
        };
        Ok((request, at, len))
    }

    /// Carries requests out at the same time; returns how many succeeded.
    fn carry(&self, image: &Image, requests: &[(Request, u64, u64)]) -> u32 {
        let mut running: Vec<_> =
            requests.iter().map(|request| Box::pin(self.carry_one(image, *request))).collect();
        let mut succeeded = 0;
        self.drive(std::future::poll_fn(|context| {
            running.retain_mut(|task| match task.as_mut().poll(context) {
                Poll::Ready(done) => {
                    succeeded += u32::from(done);
                    false
                }
                Poll::Pending => true,
            });
            if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        }));
        drop(running);
        let operations = self.engine.take_operations();
        assert!(operations < MOST_OPERATIONS, "{operations} operations for {requests:?}");
        if let [(request, at, len)] = requests
            && succeeded == 1
        {
            self.verify(image, *request, *at, *len);
        }
        succeeded
    }

    async fn carry_one(&self, image: &Image, (request, at, len): (Request, u64, u64)) -> bool {
        let (engine, at) = (&self.engine, GuestOffset(at));
        let buf = Buf::zeroed(len as usize);
        let done = match request {
            Request::Read => image.read(engine, at, buf).await,
            Request::Write(byte) => {
                buf.copy_from(0, &vec![byte; len as usize]);
                image.write(engine, at, buf).await
            }
            Request::Zero { unmap } => image.write_zeroes(engine, at, len, unmap).await,
            Request::Discard => image.discard(engine, at, len).await,
            Request::Flush => image.flush(engine).await,
        };
        acceptable(&done);
        done.is_ok()
    }

    /// What was written alone, into one cluster, is read: two clusters may be one in the file, but
    /// one is itself.
    fn verify(&self, image: &Image, request: Request, at: u64, len: u64) {
        let expected = match request {
            Request::Write(byte) => byte,
            Request::Zero { .. } => 0,
            _ => return,
        };
        let cluster = image.discard_granularity();
        if at / cluster != (at + len - 1) / cluster {
            return;
        }
        let buf = Buf::zeroed(len as usize);
        buf.copy_from(0, &vec![!expected; len as usize]);
        let read = self.drive(image.read(&self.engine, GuestOffset(at), buf.clone()));
        self.engine.take_operations();
        if read.is_ok() {
            let same = buf.to_vec() == vec![expected; len as usize];
            assert!(same, "{request:?} of {len} bytes at {at:#x} is not what is read");
        }
    }
}

/// Whether the header has one of its incompatible feature bits.
fn is_marked(bytes: &[u8], bit: u64) -> bool {
    let field = |at, width| number(bytes, at, width).unwrap_or_default();
    field(4, 4) == 3 && field(72, 8) & bit != 0
}

/// Errors are sentences of one line, and never this program's own fault.
fn acceptable<T: Debug>(result: &std::result::Result<T, Error>) {
    if let Err(error) = result {
        let sentence = error.to_string();
        assert!(!sentence.is_empty() && !sentence.contains('\n'), "{sentence:?}");
        assert!(matches!(
            error.kind(),
            Kind::Io(_) | Kind::Corrupt(_) | Kind::Unsupported(_) | Kind::Refused(_)
        ));
    }
}

/// Nothing has made the file longer than the host has room for.
fn check(disk: &MemDisk) {
    let len = disk.look(IMAGE, <[u8]>::len).expect("the image");
    assert!(len as u64 <= ROOM, "{len} bytes");
}
