//! The image tool's verbs that write are killed at random moments: what they read is as it was, and
//! what they were making is not there, or is whole; what they change in place may have leaks, which
//! a repair removes, holds the old bytes or the new ones, and is never corrupt. A snapshot that was
//! begun may leave COPIED flags that a repair sets right. A commit changes two files: the overlay
//! over its backing file reads the same whatever was done, and the commit can be done again.
//!
//! `KILLS=500` makes it long; a verb that is new only needs a line in [`VERBS`].

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fastrand::Rng;
use integration::daemon::program;
use integration::scratch::{Scratch, number_from_environment, seed};

/// Bytes of the disks.
const SIZE: usize = 4 << 20;

/// What a verb may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    /// The target is not there, or is whole: sound, with the bytes of this file.
    NothingOr(&'static str),
    /// The target is what it was before, or is whole as above.
    OldOr(&'static str),
    /// The target is sound but for leaks, and holds what one of these files does, as far as both
    /// reach.
    Either(&'static [&'static str]),
    /// The target is sound but for leaks.
    Sound,
}

/// A verb: its words, what is there before (a copy of which file becomes the target), and what it
/// may leave. The target is called `target.qcow2` or `target.raw`.
struct Verb {
    words: &'static str,
    before: Option<&'static str>,
    leaves: Leaves,
}

const fn verb(words: &'static str, before: Option<&'static str>, leaves: Leaves) -> Verb {
    Verb { words, before, leaves }
}

const VERBS: [Verb; 31] = [
    verb(
        "create -q -o preallocation=metadata,cluster_size=512 target.qcow2 4M",
        None,
        Leaves::NothingOr("zeros.raw"),
    ),
    verb(
        "create -q -o preallocation=full,cluster_size=4k target.qcow2 4M",
        Some("disk.qcow2"),
        Leaves::OldOr("zeros.raw"),
    ),
    verb("create -q -f raw target.raw 4M", None, Leaves::NothingOr("zeros.raw")),
    verb(
        "convert -f raw -O qcow2 -o cluster_size=512 disk.raw target.qcow2",
        None,
        Leaves::NothingOr("disk.raw"),
    ),
    verb(
        "convert -W -f raw -O qcow2 -o extended_l2=on,lazy_refcounts=on disk.raw target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::OldOr("disk.raw"),
    ),
    verb("convert -f qcow2 -O raw disk.qcow2 target.raw", None, Leaves::NothingOr("disk.raw")),
    verb(
        "convert -c -f raw -O qcow2 -o cluster_size=4k disk.raw target.qcow2",
        None,
        Leaves::NothingOr("disk.raw"),
    ),
    verb(
        "convert -cW -O qcow2 -o compression_type=zstd disk.qcow2 target.qcow2",
        None,
        Leaves::NothingOr("disk.raw"),
    ),
    verb(
        "convert -O qcow2 -B disk.qcow2 -F qcow2 overlay.qcow2 target.qcow2",
        None,
        Leaves::NothingOr("overlay.raw"),
    ),
    verb("convert -n -f raw -O qcow2 disk.raw target.qcow2", Some("overlay.qcow2"), Leaves::Sound),
    verb(
        "convert -n -c -f raw -O qcow2 disk.raw target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Sound,
    ),
    verb("resize -q target.qcow2 400M", Some("disk.qcow2"), Leaves::Either(&["disk.raw"])),
    verb("resize -q --shrink target.qcow2 1M", Some("disk.qcow2"), Leaves::Either(&["disk.raw"])),
    verb(
        "snapshot -c three target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Either(&["snapshots.raw"]),
    ),
    verb(
        "snapshot -a one target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Either(&["snapshots.raw", "disk.raw"]),
    ),
    verb(
        "snapshot -d one target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Either(&["snapshots.raw"]),
    ),
    verb("check -q -r leaks target.qcow2", Some("leaks.qcow2"), Leaves::Either(&["disk.raw"])),
    verb("check -q -r all target.qcow2", Some("leaks.qcow2"), Leaves::Either(&["disk.raw"])),
    verb(
        "check -q -r all target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Either(&["snapshots.raw"]),
    ),
    verb(
        "rebase -F qcow2 -b snapshots.qcow2 target.qcow2",
        Some("overlay.qcow2"),
        Leaves::Either(&["overlay.raw"]),
    ),
    verb("amend -o compat=0.10 target.qcow2", Some("disk.qcow2"), Leaves::Either(&["disk.raw"])),
    verb("amend -o size=64M target.qcow2", Some("disk.qcow2"), Leaves::Either(&["disk.raw"])),
    verb(
        "amend -o refcount_bits=64 target.qcow2",
        Some("disk.qcow2"),
        Leaves::Either(&["disk.raw"]),
    ),
    verb(
        "amend -o refcount_bits=8 target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::Either(&["snapshots.raw"]),
    ),
    verb("bitmap --add -g 64k target.qcow2 one", Some("disk.qcow2"), Leaves::Either(&["disk.raw"])),
    verb("commit -q target.qcow2", Some("above.qcow2"), Leaves::Either(&["overlay.raw"])),
    verb("commit -q -d target.qcow2", Some("above.qcow2"), Leaves::Either(&["overlay.raw"])),
    verb("commit -q target.qcow2", Some("above-raw.qcow2"), Leaves::Either(&["above-raw.raw"])),
    verb(
        "dd -f qcow2 -O qcow2 bs=64k if=overlay.qcow2 of=target.qcow2",
        None,
        Leaves::NothingOr("overlay.raw"),
    ),
    verb(
        "dd -f qcow2 -O qcow2 if=disk.qcow2 of=target.qcow2",
        Some("snapshots.qcow2"),
        Leaves::OldOr("disk.raw"),
    ),
    verb("dd -f qcow2 if=disk.qcow2 of=target.raw", None, Leaves::NothingOr("disk.raw")),
];

/// Files that are there before any verb begins, and that none may change.
const SOURCES: [&str; 12] = [
    "disk.raw",
    "disk.qcow2",
    "overlay.raw",
    "overlay.qcow2",
    "snapshots.raw",
    "snapshots.qcow2",
    "leaks.qcow2",
    "zeros.raw",
    "above.qcow2",
    "above-raw.qcow2",
    "above-raw.raw",
    "short.raw",
];

/// What a commit writes into, and which source it is before: the backing files of `above.qcow2` and
/// `above-raw.qcow2`. The second one has to grow.
const BELOW: [(&str, &str); 2] = [("below.qcow2", "disk.qcow2"), ("below.raw", "short.raw")];

fn run(directory: &Path, program: &str, words: &[&str]) -> i32 {
    let mut command = Command::new(program);
    let output = command.args(words).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    output.status.code().unwrap_or_else(|| panic!("{program} {words:?}: {}", output.status))
}

fn must(directory: &Path, program: &str, words: &[&str]) {
    assert_eq!(run(directory, program, words), 0, "{program} {words:?}");
}

/// Whether all errors that `qemu-img check` tells are COPIED flags that do not fit the refcounts:
/// that is what R16 leaves of a change of all of them, and a repair is due and loses nothing.
fn is_about_flags(told: &str) -> bool {
    let mut errors = told.lines().filter(|line| line.starts_with("ERROR")).peekable();
    errors.peek().is_some() && errors.all(|line| line.starts_with("ERROR OFLAG_COPIED"))
}

/// Makes the files that verbs work on.
fn prepare(directory: &Path, seed: u64) {
    let mut random = Rng::with_seed(seed);
    let mut disk = vec![0_u8; SIZE];
    for run in disk.chunks_mut(48 << 10).step_by(2) {
        run.iter_mut().for_each(|byte| *byte = random.u8(..4));
    }
    fs::write(directory.join("disk.raw"), &disk).expect("a disk");
    fs::write(directory.join("zeros.raw"), vec![0; SIZE]).expect("a disk");
    let img = |words: &str| {
        must(directory, "qemu-img", &words.split_whitespace().collect::<Vec<_>>());
    };
    let io = |image: &str, commands: &[&str]| {
        let mut words = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| words.extend(["-c", command]));
        words.push(image);
        must(directory, "qemu-io", &words);
    };
    img("convert -f raw -O qcow2 -o cluster_size=4k disk.raw disk.qcow2");
    img("create -q -f qcow2 -b disk.qcow2 -F qcow2 overlay.qcow2");
    io("overlay.qcow2", &["write -P 9 100k 700k", "write -z 2M 1M"]);
    img("convert -f qcow2 -O raw overlay.qcow2 overlay.raw");
    img("convert -f raw -O qcow2 -o cluster_size=1k disk.raw snapshots.qcow2");
    img("snapshot -c one snapshots.qcow2");
    io("snapshots.qcow2", &["write -P 5 0 1M", "discard 2M 1M"]);
    img("snapshot -c two snapshots.qcow2");
    io("snapshots.qcow2", &["write -P 6 500k 1M"]);
    img("convert -f qcow2 -O raw snapshots.qcow2 snapshots.raw");
    fs::write(directory.join("short.raw"), &disk[..SIZE - (1 << 20)]).expect("a disk");
    for (below, before) in BELOW {
        fs::copy(directory.join(before), directory.join(below)).expect("a backing file");
    }
    img("create -q -f qcow2 -b below.qcow2 -F qcow2 above.qcow2");
    io("above.qcow2", &["write -P 9 100k 700k", "write -z 2M 1M"]);
    img("create -q -f qcow2 -b below.raw -F raw -o cluster_size=512 above-raw.qcow2 4M");
    io("above-raw.qcow2", &["write -P 8 0 200k", "write -z 1M 100k", "write -P 7 3500k 100k"]);
    img("convert -f qcow2 -O raw above-raw.qcow2 above-raw.raw");
    leak(directory);
}

/// An image with clusters that are counted and nobody refers to.
fn leak(directory: &Path) {
    const CLUSTER: usize = 4096;
    let mut bytes = fs::read(directory.join("disk.qcow2")).expect("the image");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let block = usize::try_from(word(usize::try_from(word(48)).expect("small"))).expect("small");
    let first = bytes.len().div_ceil(CLUSTER);
    for cluster in first..first + 100 {
        bytes[block + 2 * cluster..block + 2 * cluster + 2].copy_from_slice(&[0, 1]);
    }
    bytes.resize((first + 100) * CLUSTER, 7);
    fs::write(directory.join("leaks.qcow2"), bytes).expect("an image");
    let code = run(directory, "qemu-img", &["check", "-f", "qcow2", "leaks.qcow2"]);
    assert_eq!(code, 3, "the image should have leaks and nothing else");
}

/// One directory with its sources, and what they hold.
struct Place<'a> {
    directory: &'a Path,
    sources: Vec<Vec<u8>>,
}

impl Place<'_> {
    /// The bytes of the disk in an image.
    fn disk(&self, image: &str, format: &str) -> Vec<u8> {
        let words = ["convert", "-f", format, "-O", "raw", image, "read.raw"];
        must(self.directory, "qemu-img", &words);
        fs::read(self.directory.join("read.raw")).expect("a disk")
    }

    /// What `qemu-img` says of an image: its exit status, and what it tells.
    fn check(&self, image: &str) -> (i32, String) {
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2", image]).current_dir(self.directory);
        let output = command.output().expect("qemu-img");
        let told = [output.stdout, output.stderr].concat();
        (output.status.code().expect("it ends"), String::from_utf8_lossy(&told).into_owned())
    }

    fn source(&self, name: &str) -> &[u8] {
        let place = SOURCES.iter().position(|source| *source == name);
        &self.sources[place.expect("a source")]
    }

    /// Begins a verb and kills it after a while, if it has not ended; returns how long it took if
    /// it has.
    fn kill(&self, verb: &Verb, after: Duration) -> Option<Duration> {
        let begun = Instant::now();
        let mut child = Command::new(program())
            .args(verb.words.split_whitespace())
            .current_dir(self.directory)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start our program");
        while begun.elapsed() < after {
            if child.try_wait().expect("ask for it").is_some() {
                break;
            }
            std::thread::sleep(Duration::from_micros(200).min(after));
        }
        let ended = child.try_wait().expect("ask for it");
        child.kill().expect("kill it");
        let status = child.wait().expect("it ends");
        ended.map(|_| {
            assert!(status.success(), "{}: {status}", verb.words);
            begun.elapsed()
        })
    }

    /// Looks at what a killed verb has left; returns that in a word.
    fn judge(&self, verb: &Verb, target: &str, old: Option<&[u8]>) -> Result<&'static str, String> {
        for (name, before) in SOURCES.iter().zip(&self.sources) {
            if fs::read(self.directory.join(name)).map_err(|error| error.to_string())? != *before {
                return Err(format!("{name} has changed"));
            }
        }
        let now = fs::read(self.directory.join(target)).ok();
        match (verb.leaves, now) {
            (Leaves::NothingOr(_), None) => return Ok("absent"),
            (Leaves::OldOr(_), Some(now)) if Some(&now[..]) == old => return Ok("old"),
            (_, None) => return Err(format!("{target} is gone")),
            _ => {}
        }
        let format = if target.ends_with(".raw") { "raw" } else { "qcow2" };
        let mut leaks = format == "qcow2" && self.is_sound_but_for_leaks(verb, target)?;
        self.holds(verb, target, format)?;
        if verb.words.starts_with("commit") {
            leaks |= self.is_sound_but_for_leaks(verb, BELOW[0].0)?;
            self.commit_again(verb, target)?;
        }
        Ok(if leaks { "leaks" } else { "sound" })
    }

    /// Whether an image has leaks, which are repaired then; complains of everything else that is
    /// wrong with it.
    fn is_sound_but_for_leaks(&self, verb: &Verb, image: &str) -> Result<bool, String> {
        let in_place = matches!(verb.leaves, Leaves::Either(_) | Leaves::Sound);
        let (code, told) = self.check(image);
        let flags = verb.words.starts_with("snapshot") && code == 2 && is_about_flags(&told);
        if code == 0 {
            return Ok(false);
        }
        let leaks = code == 3 && in_place;
        if !flags && !leaks {
            return Err(format!("{image} is not sound: {code}, {told}"));
        }
        let repair = if flags { "all" } else { "leaks" };
        self.ours(&["check", "-q", "-r", repair, image]);
        let (code, told) = self.check(image);
        if code != 0 {
            return Err(format!("{image} was repaired and is not sound: {told}"));
        }
        Ok(!flags)
    }

    /// Complains if the target holds something that the verb does not leave.
    fn holds(&self, verb: &Verb, target: &str, format: &str) -> Result<(), String> {
        let disk = self.disk(target, format);
        let same = |name: &str| {
            let other = self.source(name);
            let len = disk.len().min(other.len());
            disk[..len] == other[..len]
        };
        let good = match verb.leaves {
            Leaves::NothingOr(name) | Leaves::OldOr(name) => {
                disk.len() == SIZE && disk == self.source(name)
            }
            Leaves::Either(names) => names.iter().any(|name| same(name)),
            Leaves::Sound => true,
        };
        if good { Ok(()) } else { Err(format!("{target} holds other bytes")) }
    }

    /// Commits once more what may have been committed already: the disk stays what it was, and its
    /// backing file becomes the same.
    fn commit_again(&self, verb: &Verb, target: &str) -> Result<(), String> {
        self.ours(&verb.words.split_whitespace().collect::<Vec<_>>());
        self.holds(verb, target, "qcow2")?;
        let raw = matches!(verb.leaves, Leaves::Either(["above-raw.raw"]));
        let (below, format) = if raw { ("below.raw", "raw") } else { ("below.qcow2", "qcow2") };
        self.holds(verb, below, format)?;
        for image in [target, BELOW[0].0] {
            let (code, told) = self.check(image);
            if code != 0 {
                return Err(format!("{image} is not sound after another commit: {told}"));
            }
        }
        Ok(())
    }

    /// Runs our program, which must succeed.
    fn ours(&self, words: &[&str]) {
        let program = program();
        must(self.directory, program.to_str().expect("its path is text"), words);
    }
}

fn is_target(word: &&str) -> bool {
    word.starts_with("target.")
}

#[test]
fn killed_verbs_leave_nothing_half_done() {
    let (scratch, seed) = (Scratch::new("tool-kills"), seed());
    let kills = usize::try_from(number_from_environment("KILLS", 20)).expect("a number");
    let directory = scratch.directory();
    prepare(directory, seed);
    let read = |name: &&str| fs::read(directory.join(name)).expect("a source");
    let place = Place { directory, sources: SOURCES.iter().map(read).collect() };
    let mut random = Rng::with_seed(seed);
    let mut longest = [Duration::from_millis(30); VERBS.len()];
    let (mut killed, mut rounds) = (0, 0);
    while killed < kills {
        // Each in turn, beginning anywhere.
        let number = (rounds + usize::try_from(seed % 1000).expect("small")) % VERBS.len();
        let verb = &VERBS[number];
        rounds += 1;
        let words = verb.words.split_whitespace();
        let target = words.map(|word| word.trim_start_matches("of=")).find(is_target);
        let target = target.expect("a target");
        let path = directory.join(target);
        let _ = fs::remove_file(&path);
        let old = verb.before.map(|name| place.source(name));
        if let Some(old) = old {
            fs::write(&path, old).expect("a target");
        }
        if verb.words.starts_with("commit") {
            for (below, before) in BELOW {
                fs::write(directory.join(below), place.source(before)).expect("a backing file");
            }
        }
        let after = longest[number].mul_f64(random.f64());
        let ended = place.kill(verb, after);
        if let Some(took) = ended {
            longest[number] = (longest[number] + took) / 2;
        } else {
            killed += 1;
            longest[number] = longest[number].max(after.mul_f64(1.1));
        }
        let left = place.judge(verb, target, old).unwrap_or_else(|complaint| {
            panic!("{} after {after:?}: {complaint}; SEED={seed}", verb.words)
        });
        let how = if ended.is_some() { "ended" } else { "killed" };
        eprintln!("{how} after {after:?}: {left:6} {}", verb.words);
        let strays = fs::read_dir(directory).expect("a directory").filter(|entry| {
            let name = entry.as_ref().expect("an entry").file_name();
            name.to_string_lossy().contains(".part")
        });
        strays.for_each(|stray| drop(fs::remove_file(stray.expect("an entry").path())));
    }
    eprintln!("{killed} kills in {rounds} rounds");
}
