//! The daemon is killed with SIGKILL under load and another one takes its place: no request is
//! lost, none is answered twice, what was answered is on the disk, and the guest sees nothing of
//! it.
//!
//! `KILLS` is the number of kills: 40 with a front-end on the host and 8 with a virtual machine
//! unless it is set. The long forms are `KILLS=1000 cargo nextest run -p integration --test restart
//! host` and `KILLS=50 cargo nextest run -p integration --test restart guest`. The rate of writes
//! to new clusters, with the region and without, is printed by `ROUNDS=5 cargo nextest run -p
//! integration --test restart rate --no-capture`; `VHOST_USER_QCOW2` names the daemon.

use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use integration::client::Request;
use integration::daemon::Daemon;
use integration::disk::Disk;
use integration::frontend::{Base, FrontEnd, Options};
use integration::guest::{Guest, built};
use integration::images;
use integration::model::{Model, SECTOR};
use integration::scratch::{Scratch, number_from_environment, seed};
use integration::workload::Workload;

const MIB: usize = 1 << 20;

/// One run on the host.
struct Run {
    name: &'static str,
    options: Options,
    /// Of the image, as `qemu-img create` takes them, and the size of its clusters.
    image: &'static str,
    cluster: usize,
    /// Of the daemon.
    arguments: &'static [&'static str],
    /// Kills unless `KILLS` says otherwise.
    kills: u64,
}

/// How many chains daemons have taken that their predecessors had taken before.
fn replayed(daemon: &Daemon) -> u64 {
    let log = daemon.log();
    let counts = log.lines().filter_map(|line| {
        let (before, _) = line.split_once(" requests of a predecessor")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    });
    counts.sum()
}

/// Kills the daemon again and again while requests are in flight, and lets the front-end go on.
fn kill_under_load(run: &Run) {
    let (scratch, seed) = (Scratch::new(run.name), seed());
    let kills = number_from_environment("KILLS", run.kills);
    let mut rng = Rng::with_seed(seed);
    let (image, size) = (scratch.file("disk.qcow2"), 64 * MIB);
    images::create(&image, "qcow2", run.image, size);
    let arguments = [&["--format", "qcow2"], run.arguments].concat();
    let mut model = Model::new(seed, size / SECTOR);
    let mut daemon = Daemon::start(&scratch, &image, &arguments);
    let mut disk = FrontEnd::new(run.options).expect("a front-end");
    disk.connect(&scratch.socket()).expect("connect");
    let mut requests = Workload::new(&mut disk, &mut model, &mut rng, run.cluster);
    let mut chance = Rng::with_seed(seed ^ 1);
    let (begun, mut again, mut longest) = (Instant::now(), 0, Duration::ZERO);
    for round in 0..kills {
        let fail = |error: String| -> ! { panic!("round {round}: {error}; SEED={seed}") };
        requests.load(&mut disk, chance.u64(1..400)).unwrap_or_else(|error| fail(error));
        std::thread::sleep(Duration::from_micros(chance.u64(0..1500)));
        again += replayed(&daemon);
        daemon.kill();
        let killed = Instant::now();
        // The guest does not know that nobody is there.
        requests.fill(&mut disk).unwrap_or_else(|error| fail(error));
        daemon = Daemon::start(&scratch, &image, &arguments);
        if chance.u8(..8) == 0 {
            // Killed before it has seen the front-end, or while the two talk to each other.
            if chance.bool() {
                disk.connect(&scratch.socket()).unwrap_or_else(|error| fail(error.to_string()));
                again += replayed(&daemon);
            }
            daemon.kill();
            daemon = Daemon::start(&scratch, &image, &arguments);
        }
        disk.connect(&scratch.socket()).unwrap_or_else(|error| fail(error.to_string()));
        longest = longest.max(killed.elapsed());
    }
    again += replayed(&daemon);
    finish(&mut requests, &mut disk, seed);
    let (submitted, answered) = disk.counts();
    assert_eq!(submitted, answered, "requests and answers; SEED={seed}");
    drop(disk);
    daemon.terminate();
    let verdict = images::check(&image);
    verify(&scratch, &image, &mut model, seed);
    let time = begun.elapsed();
    eprintln!(
        "{}: {kills} kills, {submitted} requests, {again} taken again, {answered} answers",
        run.name
    );
    eprintln!(
        "in {time:.1?}, at most {longest:.1?} from kill to service, {verdict:?}, SEED={seed}"
    );
}

/// Waits for every answer, and for more than there are, and reads the whole disk.
fn finish(requests: &mut Workload<'_>, disk: &mut FrontEnd, seed: u64) {
    requests.drain(disk).unwrap_or_else(|error| panic!("at the end: {error}; SEED={seed}"));
    let more = disk.wait(Duration::from_millis(200)).expect("nothing but answers");
    assert!(more.is_empty(), "{more:?} was not asked for; SEED={seed}");
    let result = requests.verify_all(disk);
    result.unwrap_or_else(|error| panic!("at the end: {error}; SEED={seed}"));
}

fn verify(scratch: &Scratch, image: &Path, model: &mut Model, seed: u64) {
    let raw = scratch.file("converted.raw");
    images::convert_to_raw(image, "qcow2", None, &raw);
    let result = images::verify_raw(&raw, model, false);
    result.unwrap_or_else(|error| panic!("in the file: {error}; SEED={seed}"));
}

const FOUR: Options = Options {
    queues: 4,
    ring_size: 512,
    slots: 256,
    event_idx: true,
    inflight: true,
    base: Base::Used,
    start: 0,
};

#[test]
fn host_four_queues() {
    kill_under_load(&Run {
        name: "restart-four",
        options: FOUR,
        image: "",
        cluster: 64 << 10,
        arguments: &["--threads", "2"],
        kills: 40,
    });
}

#[test]
fn host_available_index_as_base_without_event_idx() {
    let options = Options {
        queues: 2,
        ring_size: 64,
        slots: 48,
        event_idx: false,
        base: Base::Available,
        start: 65_500,
        ..FOUR
    };
    kill_under_load(&Run {
        name: "restart-available",
        options,
        image: "cluster_size=4k",
        cluster: 4 << 10,
        arguments: &["--aio", "threads"],
        kills: 15,
    });
}

#[test]
fn host_direct_io_and_lazy_refcounts() {
    let options = Options { queues: 1, ring_size: 128, slots: 64, ..FOUR };
    kill_under_load(&Run {
        name: "restart-direct",
        options,
        image: "lazy_refcounts=on",
        cluster: 64 << 10,
        arguments: &["--cache", "none"],
        kills: 15,
    });
}

#[test]
fn host_late_writes_of_a_dead_daemon_do_not_land() {
    let (scratch, seed) = (Scratch::new("restart-late"), seed());
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 64 * MIB);
    let arguments = ["--format", "qcow2", "--cache", "none"];
    let mut daemon = Daemon::start(&scratch, &image, &arguments);
    let options = Options { slots: 64, ring_size: 256, ..FOUR };
    let mut disk = FrontEnd::new(options).expect("a front-end");
    let mut rng = Rng::with_seed(seed);
    for round in 0..10_u8 {
        disk.connect(&scratch.socket()).expect("connect");
        while let Some(slot) = disk.free_slot() {
            disk.buffer(slot).fill(round);
            let (offset, length) = ((slot * MIB) as u64, 256 << 10);
            disk.submit(slot % 4, slot, Request::Write { offset, length }, &[]).expect("submit");
        }
        disk.kick().expect("kick");
        std::thread::sleep(Duration::from_micros(rng.u64(0..3000)));
        // The process is gone then; what it had given to the kernel may not be.
        daemon.kill();
        daemon = Daemon::start(&scratch, &image, &arguments);
        disk.connect(&scratch.socket()).expect("connect");
        while disk.in_flight() > 0 {
            let answers = disk.wait(Duration::from_secs(60)).expect("answers");
            assert!(!answers.is_empty() && answers.iter().all(|answer| answer.result == 0));
        }
        // A write of the dead daemon that landed late would bring an earlier round back.
        for slot in 0..64 {
            let (offset, length) = ((slot * MIB) as u64, 256 << 10);
            disk.execute(Request::Read { offset, length }).expect("read");
            assert!(disk.buffer(0).iter().all(|byte| *byte == round), "round {round}, slot {slot}");
        }
    }
    drop(disk);
    daemon.terminate();
    eprintln!("{:?}", images::check(&image));
}

/// Writes 4 KiB to each of so many clusters, in any order and 32 at a time; tells how many in a
/// second.
fn allocating_rate(inflight: bool, count: usize) -> f64 {
    let scratch = Scratch::new("restart-rate");
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", count * (64 << 10));
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let options = Options { queues: 1, slots: 32, inflight, ..FOUR };
    let mut disk = FrontEnd::new(options).expect("a front-end");
    disk.connect(&scratch.socket()).expect("connect");
    let mut clusters: Vec<u64> = (0..count as u64).collect();
    Rng::with_seed(1).shuffle(&mut clusters);
    let begun = Instant::now();
    let mut answered = 0;
    while answered < count {
        while let Some(slot) = disk.free_slot()
            && let Some(cluster) = clusters.pop()
        {
            let request = Request::Write { offset: cluster << 16, length: 4096 };
            disk.submit(0, slot, request, &[]).expect("submit");
        }
        disk.kick().expect("kick");
        let answers = disk.wait(Duration::from_secs(60)).expect("answers");
        assert!(!answers.is_empty() && answers.iter().all(|answer| answer.result == 0));
        answered += answers.len();
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    drop(disk);
    daemon.terminate();
    rate
}

#[test]
fn host_rate_of_allocating_writes() {
    let (rounds, count) = (number_from_environment("ROUNDS", 2), 4000);
    for round in 0..rounds {
        let (with, without) = (allocating_rate(true, count), allocating_rate(false, count));
        eprintln!("round {round}: {with:.0} a second with the region, {without:.0} without");
    }
}

#[test]
fn guest_lives_through_kills() {
    let (scratch, seed) = (Scratch::new("restart-guest"), seed());
    let kills = number_from_environment("KILLS", 8);
    let mut rng = Rng::with_seed(seed);
    let image = scratch.file("disk.qcow2");
    let base = built("root.qcow2").canonicalize().expect("find the base image");
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    let arguments =
        ["create", "-q", "-f", "qcow2", "-o", options.as_str()].map(std::ffi::OsStr::new);
    images::qemu_img(&[&arguments[..], &[image.as_os_str()]].concat());
    let directory = base.parent().expect("a file lies in a directory").display().to_string();
    let arguments = ["--format", "qcow2", "--allow-path", &directory];
    let mut daemon = Daemon::start(&scratch, &image, &arguments);
    let words = format!("disk_test=restart disk_test_seconds={}", 15 + kills * 7 / 2);
    let mut guest = Guest::start_with(&scratch, 2, &words, ",reconnect-ms=100");
    guest.wait_for("GUEST-UP");
    guest.wait_for("GUEST-ROUND");
    let (begun, mut again) = (Instant::now(), 0);
    for kill in 0..kills {
        std::thread::sleep(Duration::from_millis(rng.u64(200..3500)));
        assert!(!guest.has_said("GUEST-DONE"), "the guest has ended before kill {kill}");
        again += replayed(&daemon);
        daemon.kill();
        std::thread::sleep(Duration::from_millis(rng.u64(0..300)));
        daemon = Daemon::start(&scratch, &image, &arguments);
    }
    let rounds = guest.wait_for("GUEST-DONE");
    let errors = guest.end();
    again += replayed(&daemon);
    daemon.terminate();
    let verdict = images::check(&image);
    let time = begun.elapsed();
    eprintln!("{kills} kills under QEMU in {time:.1?}, {again} requests taken again, {rounds}");
    eprintln!("{verdict:?}, {} lines from QEMU, SEED={seed}", errors.lines().count());
}
