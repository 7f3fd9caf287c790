//! The same requests to twin images, one served by this project and one by `qemu-io`: afterwards
//! the guest reads the same from both, both are clean, and `qemu-img map` tells the same of both as
//! far as the format leaves no choice.
//!
//! Every combination of version, cluster size, refcount width and kind that `qemu-img create` takes
//! has its turn. `SEQUENCES` sets how many sequences each runs, `SEED` where they begin.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use fastrand::Rng;
use integration::scratch::{Scratch, number_from_environment, seed};
use serde_json::Value;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::image::{Format, Image, OpenOptions};
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::host::{Aio, engine};
use vhost_user_qcow2::storage::{Buf, Storage, block_on};

const SECTOR: u64 = 512;
const IMAGE: &str = "disk.qcow2";
/// Requests between two openings of the image, and how often it is opened.
const REQUESTS: usize = 24;
const ROUNDS: usize = 2;

/// What an image is built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Extended,
    Lazy,
    DataFile,
    DataFileRaw,
    OverRaw,
    OverQcow2,
    Zlib,
    Zstd,
}

/// One combination of options.
#[derive(Clone, Copy, Debug)]
struct Combination {
    kind: Kind,
    compat: &'static str,
    cluster: u64,
    refcount_bits: u32,
}

impl Combination {
    fn all(kind: Kind) -> Vec<Self> {
        let mut all = Vec::new();
        for compat in ["0.10", "1.1"] {
            for cluster in [512, 4 << 10, 64 << 10, 2 << 20] {
                for refcount_bits in [1, 16, 64] {
                    all.push(Self { kind, compat, cluster, refcount_bits });
                }
            }
        }
        all
    }

    /// The disk's size: some clusters and a piece of one.
    fn size(&self) -> u64 {
        (self.cluster * 8).max(1 << 20) + 7 * SECTOR
    }

    fn options(&self) -> String {
        let Self { kind, compat, cluster, refcount_bits } = self;
        let more = match kind {
            Kind::Plain | Kind::Zlib => "",
            Kind::Extended => ",extended_l2=on",
            Kind::Lazy => ",lazy_refcounts=on",
            Kind::DataFile => ",data_file=disk.data",
            Kind::DataFileRaw => ",data_file=disk.data,data_file_raw=on",
            Kind::OverRaw => ",backing_file=base.raw,backing_fmt=raw",
            Kind::OverQcow2 => ",backing_file=base.qcow2,backing_fmt=qcow2",
            Kind::Zstd => ",compression_type=zstd",
        };
        format!("compat={compat},cluster_size={cluster},refcount_bits={refcount_bits}{more}")
    }

    /// Makes the image in `dir` with content drawn from `random`; returns the guest's bytes, or
    /// `None` when `qemu-img` refuses the combination.
    fn make(&self, dir: &Path, random: &mut Rng) -> Option<Vec<u8>> {
        let size = usize::try_from(self.size()).expect("a small disk");
        let below = match self.kind {
            Kind::OverRaw | Kind::OverQcow2 => size - size / 5 / 512 * 512,
            Kind::Zlib | Kind::Zstd => size,
            _ => 0,
        };
        let mut bytes = content(below, random);
        fs::write(dir.join("base.raw"), &bytes).expect("write the content");
        let options = self.options();
        let made = match self.kind {
            Kind::Zlib | Kind::Zstd => {
                let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
                run("qemu-img", dir, &[&convert[..], &["base.raw", IMAGE]].concat())
            }
            _ => {
                if self.kind == Kind::OverQcow2 {
                    let convert = ["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"];
                    run("qemu-img", dir, &convert).expect("convert the content");
                }
                let create = ["create", "-q", "-f", "qcow2", "-o", &options, IMAGE];
                run("qemu-img", dir, &[&create[..], &[&size.to_string()]].concat())
            }
        };
        made.ok()?;
        bytes.resize(size, 0);
        Some(bytes)
    }
}

/// Runs of one byte each, some of them zeros.
fn content(size: usize, random: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let run = random.usize(1..=size.div_ceil(12)).next_multiple_of(512);
        let byte = if random.u8(0..3) == 0 { 0 } else { random.u8(1..) };
        bytes.resize((bytes.len() + run).min(size), byte);
    }
    bytes
}

/// Runs a program in a directory; what it printed, as an error when it failed.
fn run(program: &str, dir: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("cannot start {program} ({error})"));
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    if output.status.success() { Ok(said) } else { Err(format!("{arguments:?}: {said}")) }
}

/// The disk as we serve it.
struct Model {
    bytes: Vec<u8>,
    /// What a sector held before it was discarded, if it was since it was last written. Every
    /// sector is all one byte.
    discarded: Vec<Option<u8>>,
}

impl Model {
    fn new(bytes: Vec<u8>) -> Self {
        Self { discarded: vec![None; bytes.len() / 512], bytes }
    }

    fn range(at: u64, len: u64) -> Range<usize> {
        let index = |offset| usize::try_from(offset).expect("a small disk");
        index(at)..index(at + len)
    }

    fn set(&mut self, at: u64, len: u64, byte: u8) {
        self.bytes[Self::range(at, len)].fill(byte);
        self.discarded[Self::range(at / SECTOR, len / SECTOR)].fill(None);
    }

    /// A discard has left these bytes.
    fn discard(&mut self, at: u64, now: &[u8]) {
        let first = Self::range(at / SECTOR, 0).start;
        for (sector, now) in (first..).zip(now.chunks_exact(512)) {
            let old = &mut self.bytes[sector * 512..(sector + 1) * 512];
            assert!(now == old || is_zero(now), "a discard may leave old bytes or zeros");
            self.discarded[sector].get_or_insert(old[0]);
            old.copy_from_slice(now);
        }
    }

    /// Whether another server of the same requests may have these bytes in a sector.
    fn allows(&self, sector: usize, bytes: &[u8]) -> bool {
        let own = &self.bytes[sector * 512..(sector + 1) * 512];
        let old = |byte| is_zero(bytes) || bytes.iter().all(|&now| now == byte);
        bytes == own || self.discarded[sector].is_some_and(old)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// A request.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Flush,
}

impl Step {
    fn draw(combination: &Combination, rules: Rules, random: &mut Rng) -> Self {
        let (size, cluster) = (combination.size(), combination.cluster);
        let kind = random.u8(0..12);
        let erases = (5..10).contains(&kind);
        let unit = if random.bool() || rules.whole && erases { cluster } else { SECTOR };
        let at = random.u64(0..size) / unit * unit;
        let most = (cluster * 5 / 2).max(16 * SECTOR);
        let len = random.u64(1..=most).next_multiple_of(unit).min(size - at);
        match kind {
            0..=4 => Self::Write { at, len, byte: random.u8(1..) },
            5..=6 => Self::Zero { at, len, unmap: false },
            7 => Self::Zero { at, len, unmap: true },
            8..=9 => Self::Discard { at, len },
            10 => Self::Read { at, len },
            _ => Self::Flush,
        }
    }

    /// As `qemu-io` wants it.
    fn command(&self) -> String {
        match self {
            Self::Write { at, len, byte } => format!("write -q -P {byte} {at} {len}"),
            Self::Zero { at, len, unmap: false } => format!("write -q -z {at} {len}"),
            Self::Zero { at, len, unmap: true } => format!("write -q -z -u {at} {len}"),
            Self::Discard { at, len } => format!("discard -q {at} {len}"),
            Self::Read { at, len } => format!("read -q {at} {len}"),
            Self::Flush => "flush".to_owned(),
        }
    }

    /// Done by us; `model` holds the guest's bytes before and after.
    async fn apply(&self, st: &dyn Storage, image: &Image, model: &mut Model) {
        match *self {
            Self::Write { at, len, byte } => {
                model.set(at, len, byte);
                let buf = Buf::copy_of(&model.bytes[Model::range(at, len)]);
                image.write(st, GuestOffset(at), buf).await.expect("write");
            }
            Self::Zero { at, len, unmap } => {
                model.set(at, len, 0);
                image.write_zeroes(st, GuestOffset(at), len, unmap).await.expect("write zeroes");
            }
            Self::Discard { at, len } => {
                image.discard(st, GuestOffset(at), len).await.expect("discard");
                model.discard(at, &read(st, image, at, len).await);
            }
            Self::Read { at, len } => {
                let same = read(st, image, at, len).await == model.bytes[Model::range(at, len)];
                assert!(same, "{self:?} reads other bytes");
            }
            Self::Flush => image.flush(st).await.expect("flush"),
        }
    }
}

async fn read(st: &dyn Storage, image: &Image, at: u64, len: u64) -> Vec<u8> {
    let buf = Buf::zeroed(usize::try_from(len).expect("a small request"));
    image.read(st, GuestOffset(at), buf.clone()).await.expect("read");
    buf.to_vec()
}

/// Opens the image, does the steps, closes it.
fn by_us(path: &Path, steps: &[Step], model: &mut Model) {
    let files =
        Files::new(Options { direct: false, sync: false, lock: true, ..Options::default() });
    let engine = engine(Aio::Threads, &files, 0).expect("an engine");
    let st = engine.as_ref();
    let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    block_on(st, async {
        let image = Image::open(st, files.as_ref(), path, &options).await.expect("open");
        for step in steps {
            step.apply(st, &image, model).await;
        }
        image.close(st).await.expect("close");
        let all = read(st, &image, 0, model.bytes.len() as u64).await;
        assert!(all == model.bytes, "the whole disk reads other bytes");
    });
}

fn by_qemu(dir: &Path, steps: &[Step]) {
    let commands: Vec<String> = steps.iter().map(Step::command).collect();
    let mut arguments = vec!["-d", "unmap", "-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(IMAGE);
    let said = run("qemu-io", dir, &arguments).expect("qemu-io");
    assert!(!said.contains("failed") && !said.contains("rror"), "qemu-io: {said}");
}

/// What `qemu-img map` says of a sector: the layer it comes from, and whether that has bytes for it
/// in its file. (A hole in that file is the host's affair.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    depth: u64,
    data: bool,
    zero: bool,
}

/// The place of every sector.
fn map(dir: &Path) -> Vec<Place> {
    let text = run("qemu-img", dir, &["map", "-f", "qcow2", "--output=json", IMAGE]);
    let runs: Value = serde_json::from_str(&text.expect("map")).expect("qemu-img prints JSON");
    let mut places = Vec::new();
    for run in runs.as_array().expect("a list") {
        let number = |name: &str| run[name].as_u64().expect("a number");
        let flag = |name: &str| run[name].as_bool().expect("a flag");
        let data = flag("data");
        let place = Place { depth: number("depth"), data, zero: flag("zero") && !data };
        assert_eq!(number("start"), places.len() as u64 * SECTOR, "the runs are not in order");
        let sectors = usize::try_from(number("length") / SECTOR).expect("a small disk");
        places.resize(places.len() + sectors, place);
    }
    places
}

/// What the requests of a sequence are like, and so how far the twins must agree. Where they need
/// not:
/// - A sector that was discarded holds what it held or zeros. Over a backing file we leave clusters
///   alone that only the backing file has, and `qemu-io` makes zeros of them.
/// - Where a request to zero covers a part of a cluster, `qemu-io` looks whether the rest reads as
///   zeros and then drops all of it; we write zeros.
/// - Version 2 has no entry that reads as zeros, and each has its own ways to do without.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Requests to zero or discard are whole clusters.
    whole: bool,
    /// What was discarded lies where the other has it too: there is no backing file.
    alone: bool,
    /// So do zeros.
    zeros: bool,
}

impl Rules {
    fn draw(combination: &Combination, random: &mut Rng) -> Self {
        let whole = random.bool();
        let alone = !matches!(combination.kind, Kind::OverRaw | Kind::OverQcow2);
        Self { whole, alone, zeros: whole && combination.compat != "0.10" }
    }

    /// Whether a sector may have another place in the twin.
    fn allows(&self, discarded: bool, bytes: &[u8]) -> bool {
        discarded && !self.alone || is_zero(bytes) && !self.zeros
    }
}

/// Makes twins, gives both the same requests, and compares them.
fn sequence(combination: &Combination, dir: &Path, seed: u64) -> bool {
    let mut random = Rng::with_seed(seed);
    let (ours, theirs) = (dir.join("ours"), dir.join("theirs"));
    fs::create_dir_all(&ours).expect("make a directory");
    fs::create_dir_all(&theirs).expect("make a directory");
    let rules = Rules::draw(combination, &mut random);
    let Some(bytes) = combination.make(&ours, &mut random) else { return false };
    let mut model = Model::new(bytes);
    for entry in fs::read_dir(&ours).expect("list the files") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, theirs.join(path.file_name().expect("a name"))).expect("copy a file");
    }
    for _ in 0..ROUNDS {
        let steps: Vec<_> =
            (0..REQUESTS).map(|_| Step::draw(combination, rules, &mut random)).collect();
        by_us(&ours.join(IMAGE), &steps, &mut model);
        by_qemu(&theirs, &steps);
        compare(rules, &ours, &theirs, &model);
        if combination.kind == Kind::DataFileRaw {
            let data = fs::read(ours.join("disk.data")).expect("read the data file");
            assert!(data.starts_with(&model.bytes), "the data file is not the disk");
        }
    }
    true
}

fn compare(rules: Rules, ours: &Path, theirs: &Path, model: &Model) {
    for (whose, dir) in [("ours", ours), ("theirs", theirs)] {
        // References to other files are followed from the directory that a program runs in.
        let checked = run("qemu-img", dir, &["check", "-f", "qcow2", IMAGE]);
        checked.unwrap_or_else(|said| panic!("{whose} is not clean: {said}"));
        let convert = ["convert", "-f", "qcow2", "-O", "raw", IMAGE, "guest.raw"];
        run("qemu-img", dir, &convert).expect("convert");
        let bytes = fs::read(dir.join("guest.raw")).expect("read the converted image");
        assert_eq!(bytes.len(), model.bytes.len(), "the length of {whose}");
        let mut sectors = bytes.chunks_exact(512).enumerate();
        if let Some((sector, now)) = sectors.find(|(sector, now)| !model.allows(*sector, now)) {
            let wanted = model.bytes[sector * 512];
            panic!("{whose} holds {:#x} in sector {sector} instead of {wanted:#x}", now[0]);
        }
    }
    let (ours, theirs) = (map(ours), map(theirs));
    assert_eq!((ours.len(), theirs.len()), (model.discarded.len(), model.discarded.len()));
    let agree = |sector: usize| {
        let bytes = &model.bytes[sector * 512..(sector + 1) * 512];
        ours[sector] == theirs[sector] || rules.allows(model.discarded[sector].is_some(), bytes)
    };
    let wrong: Vec<usize> = (0..ours.len()).filter(|&sector| !agree(sector)).collect();
    if let Some(&sector) = wrong.first() {
        let (ours, theirs, byte) = (ours[sector], theirs[sector], model.bytes[sector * 512]);
        let count = wrong.len();
        panic!("sector {sector} ({byte:#x}): ours {ours:?}, theirs {theirs:?}; {count} in all");
    }
}

/// Runs sequences on every combination of one kind.
fn differential(name: &str, kind: Kind) {
    let (seed, sequences) = (seed(), number_from_environment("SEQUENCES", 1));
    let (mut ran, mut refused) = (0, 0);
    for (index, combination) in (0..).zip(Combination::all(kind)) {
        for number in 0..sequences {
            let scratch = Scratch::new(&format!("differential-{name}"));
            let own = seed.wrapping_add(number).wrapping_mul(64).wrapping_add(index);
            eprintln!("{combination:?}, sequence {number}");
            if !sequence(&combination, scratch.directory(), own) {
                refused += 1;
                break;
            }
            ran += 1;
        }
    }
    println!("{name}: {ran} sequences agree; qemu-img refuses {refused} combinations");
    assert!(ran > 0, "qemu-img refuses every combination");
}

macro_rules! kinds {
    ($($name:ident: $kind:expr;)*) => {
        $(#[test]
        fn $name() {
            differential(stringify!($name), $kind);
        })*
    };
}

kinds! {
    plain: Kind::Plain;
    extended_l2: Kind::Extended;
    lazy_refcounts: Kind::Lazy;
    data_file: Kind::DataFile;
    raw_data_file: Kind::DataFileRaw;
    over_raw: Kind::OverRaw;
    over_qcow2: Kind::OverQcow2;
    zlib: Kind::Zlib;
    zstd: Kind::Zstd;
}
