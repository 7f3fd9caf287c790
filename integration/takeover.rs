//! One daemon takes the disk over from another under load: no request is lost, none is answered
//! twice, no lock is let go, and guests wait for a moment. Successors that fail or are killed leave
//! the guest with a daemon that serves it.
//!
//! `TAKEOVERS` is the number of takeovers, 8 with a front-end on the host and 4 with a virtual
//! machine unless it is set; `SUCCESSOR_KILLS` that of successors that are killed, 8. The long
//! forms are `TAKEOVERS=200 cargo nextest run -p integration --test takeover loaded`,
//! `SUCCESSOR_KILLS=300 cargo nextest run -p integration --test takeover killed` and `TAKEOVERS=40
//! cargo nextest run -p integration --test takeover guest`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use integration::client::Client;
use integration::daemon::{Daemon, is_listening};
use integration::disk::Disk;
use integration::frontend::{Base, FrontEnd, Options as FrontEndOptions};
use integration::guest::{Guest, built};
use integration::images;
use integration::model::Model;
use integration::scratch::{Scratch, number_from_environment, seed};
use integration::workload::{DEPTH, Workload};
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::{FileSource, OpenMode};
use vhost_user_qcow2::vhost::successors::{HELLO, TAKE};

const MIB: usize = 1 << 20;
const CLUSTER: usize = 65536;
const QUEUES: usize = 3;
/// Taking over may not take longer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What guests may wait for half of the time on a machine where others work too. Alone it is a
/// tenth of that.
const GENEROUS: Duration = Duration::from_secs(1);

/// A scratch directory, and an overlay over a base in it.
fn disk(name: &str) -> (Scratch, PathBuf) {
    let scratch = Scratch::new(name);
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 64 * MIB);
    (scratch, image)
}

/// The same command line every time.
fn spawn(scratch: &Scratch, image: &Path, more: &[&str]) -> Daemon {
    let takeover = scratch.takeover_socket();
    let takeover = takeover.to_str().expect("plain text");
    let mut arguments = vec!["--format", "qcow2", "--threads", "2", "--takeover", takeover];
    arguments.extend(more);
    Daemon::spawn(scratch, image, &arguments)
}

fn start(scratch: &Scratch, image: &Path) -> Daemon {
    let mut daemon = spawn(scratch, image, &[]);
    wait_until_it_listens(scratch, &mut daemon);
    daemon
}

fn wait_until_it_listens(scratch: &Scratch, daemon: &mut Daemon) {
    let deadline = Instant::now() + PATIENCE;
    while !(is_listening(&scratch.takeover_socket()) && is_listening(&scratch.socket())) {
        daemon.assert_alive();
        assert!(Instant::now() < deadline, "the daemon does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Load until `until` says that it is enough; gives the longest time without an answer.
fn load(
    workload: &mut Workload<'_>,
    client: &mut impl Disk,
    mut until: impl FnMut() -> bool,
) -> Duration {
    let (mut longest, deadline) = (Duration::ZERO, Instant::now() + PATIENCE);
    while !until() {
        let start = Instant::now();
        workload.load(client, 1).expect("every answer is right");
        longest = longest.max(start.elapsed());
        assert!(start < deadline, "it takes too long");
    }
    longest
}

/// The same until there were answers so many times, often to many requests at once.
fn load_some(workload: &mut Workload<'_>, client: &mut impl Disk, count: u64) -> Duration {
    let mut left = count;
    load(workload, client, || {
        left -= 1;
        left == 0
    })
}

/// Puts another daemon in the place of `daemon`, and does something else again and again meanwhile.
/// On a machine that is very busy one may come too late; then the next one tries.
fn succeed(
    (scratch, image): (&Scratch, &Path),
    more: &[&str],
    daemon: &mut Daemon,
    mut meanwhile: impl FnMut(),
) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut next = spawn(scratch, image, more);
        while daemon.ended().is_none() && next.ended().is_none() {
            meanwhile();
        }
        if next.ended().is_none() {
            let mut last = std::mem::replace(daemon, next);
            let status = last.wait();
            assert!(status.success(), "the old daemon ended with {status}: {}", last.log());
            return;
        }
        let log = next.log();
        assert!(log.contains("has not waited") && Instant::now() < deadline, "{log}");
        eprintln!("one came too late");
    }
}

/// Milliseconds for which guests have waited, as the daemon tells them.
fn told_wait(daemon: &Daemon) -> f64 {
    let log = daemon.log();
    let (_, rest) = log.rsplit_once("guests have waited for ").expect("it tells how long");
    let (number, _) = rest.split_once(" ms").expect("in milliseconds");
    number.parse().expect("a number")
}

/// Four queues with 64 requests in each, and a region where they are noted.
const FOUR: FrontEndOptions = FrontEndOptions {
    queues: 4,
    ring_size: 512,
    slots: 256,
    event_idx: true,
    inflight: true,
    base: Base::Used,
    start: 0,
};

/// Waits for every answer, and for more than there are, and reads the whole disk.
fn finish(workload: &mut Workload<'_>, disk: &mut FrontEnd) {
    workload.drain(disk).expect("all is answered");
    let more = disk.wait(Duration::from_millis(200)).expect("nothing but answers");
    assert!(more.is_empty(), "{more:?} was not asked for");
    workload.verify_all(disk).expect("the disk holds what was written");
    let (submitted, answered) = disk.counts();
    assert_eq!(submitted, answered, "requests and answers");
}

/// Tries to get the image's locks all the time, as another program would; counts its trials.
struct Intruder {
    over: Arc<AtomicBool>,
    trials: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Intruder {
    fn start(image: &Path) -> Self {
        let (over, trials) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (end, count, image) = (Arc::clone(&over), Arc::clone(&trials), image.to_owned());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let mode = OpenMode { read_only: false, backing: false };
                let opened = Files::new(Options::default()).open(&image, mode);
                opened.expect_err("the image is locked all the time");
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { over, trials, thread }
    }

    fn finish(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the locks were held");
        self.trials.load(Ordering::Relaxed)
    }
}

#[test]
fn a_loaded_disk_goes_from_daemon_to_daemon() {
    let (scratch, image) = disk("takeover");
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(seed, 64 * MIB / 512);
    let mut daemon = start(&scratch, &image);
    let mut disk = FrontEnd::new(FOUR).expect("a front-end");
    disk.connect(&scratch.socket()).expect("connect");
    let mut workload = Workload::new(&mut disk, &mut model, &mut rng, CLUSTER);
    let intruder = Intruder::start(&image);
    let (mut stalls, mut told) = (Vec::new(), Vec::new());
    let mut usual = load_some(&mut workload, &mut disk, 50);
    for _ in 0..number_from_environment("TAKEOVERS", 8) {
        let mut stall = Duration::ZERO;
        succeed((&scratch, &image), &[], &mut daemon, || {
            stall = stall.max(load_some(&mut workload, &mut disk, 1));
        });
        stalls.push(stall.max(load_some(&mut workload, &mut disk, 30)));
        daemon.assert_alive();
        told.push(told_wait(&daemon));
        usual = usual.max(load_some(&mut workload, &mut disk, 30));
    }
    finish(&mut workload, &mut disk);
    let trials = intruder.finish();
    stalls.sort_unstable();
    told.sort_unstable_by(f64::total_cmp);
    let (middle, last) = (stalls.len() / 2, stalls.len() - 1);
    let (median, most) = (stalls[middle], stalls[last]);
    let (submitted, answered) = disk.counts();
    eprintln!("{} takeovers, {submitted} requests, {answered} answers, SEED={seed}", stalls.len());
    eprintln!("without an answer: median {median:.1?}, longest {most:.1?}; else {usual:.1?}");
    eprintln!("the daemons say: median {:.1} ms, longest {:.1} ms", told[middle], told[last]);
    eprintln!("{trials} trials to get the locks");
    assert!(median < GENEROUS, "{stalls:?}");
    assert!(trials > 0);
    drop(disk);
    assert!(scratch.socket().exists() && scratch.takeover_socket().exists());
    daemon.terminate();
    assert!(!scratch.takeover_socket().exists());
    images::assert_clean(&image);
}

/// What a daemon logs when somebody wants the disk, and how that ends.
const WANTED: &str = "wants the disk";
const GIVEN: &str = "it has the disk";
const KEPT: &str = "the disk is served as before";

/// How often the daemon has logged something.
fn count(daemon: &Daemon, what: &str) -> usize {
    daemon.log().matches(what).count()
}

/// Waits until the daemon has decided about whoever wanted the disk last, which is gone; tells
/// whether that one had it.
fn has_given(daemon: &Daemon) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The end is looked for first: it is logged last.
        let (given, kept) = (count(daemon, GIVEN), count(daemon, KEPT));
        if count(daemon, WANTED) == given + kept {
            return given > 0;
        }
        assert!(Instant::now() < deadline, "the daemon does not decide");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn successors_that_are_killed_leave_a_daemon_that_serves() {
    let (scratch, image) = disk("killed");
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut chance = fastrand::Rng::with_seed(seed ^ 1);
    let mut model = Model::new(seed, 64 * MIB / 512);
    let mut daemon = start(&scratch, &image);
    let mut disk = FrontEnd::new(FOUR).expect("a front-end");
    disk.connect(&scratch.socket()).expect("connect");
    let mut workload = Workload::new(&mut disk, &mut model, &mut rng, CLUSTER);
    workload.load(&mut disk, 300).expect("every answer is right");
    // How long a takeover takes here, from the new daemon's start to the old one's end.
    let begun = Instant::now();
    succeed((&scratch, &image), &[], &mut daemon, || {
        load_some(&mut workload, &mut disk, 1);
    });
    let usual = begun.elapsed();
    let (mut kept, mut given, mut halted) = (0, 0, 0);
    for round in 0..number_from_environment("SUCCESSOR_KILLS", 8) {
        let mut next = spawn(&scratch, &image, &[]);
        if chance.bool() {
            let end = Instant::now() + usual.mul_f64(chance.f64() * 1.1);
            load(&mut workload, &mut disk, || Instant::now() >= end);
        } else {
            // While the guest waits for it.
            while count(&daemon, WANTED) == count(&daemon, KEPT) && daemon.ended().is_none() {
                assert_eq!(next.ended(), None, "{}", next.log());
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(chance.u64(0..50_000)));
        }
        drop(next);
        if has_given(&daemon) {
            // It was killed while the disk was its own; what starts daemons starts another one.
            given += 1;
            halted += count(&daemon, KEPT);
            assert!(daemon.wait().success(), "round {round}: {}", daemon.log());
            daemon = start(&scratch, &image);
            disk.connect(&scratch.socket()).expect("connect again");
        } else {
            kept += 1;
        }
        workload.load(&mut disk, 300).expect("every answer is right");
        daemon.assert_alive();
    }
    halted += count(&daemon, KEPT);
    finish(&mut workload, &mut disk);
    let (submitted, answered) = disk.counts();
    eprintln!(
        "{kept} killed before the disk was theirs, {given} later; a takeover took {usual:.1?}"
    );
    eprintln!("rings were halted in vain {halted} times");
    eprintln!("{submitted} requests, {answered} answers, SEED={seed}");
    drop(disk);
    daemon.terminate();
    eprintln!("{:?}", images::check(&image));
}

#[test]
fn a_guest_lives_through_takeovers() {
    let (scratch, seed) = (Scratch::new("takeover-guest"), seed());
    let takeovers = number_from_environment("TAKEOVERS", 4);
    let mut rng = fastrand::Rng::with_seed(seed);
    let image = scratch.file("disk.qcow2");
    let base = built("root.qcow2").canonicalize().expect("find the base image");
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    let arguments =
        ["create", "-q", "-f", "qcow2", "-o", options.as_str()].map(std::ffi::OsStr::new);
    images::qemu_img(&[&arguments[..], &[image.as_os_str()]].concat());
    let directory = base.parent().expect("a file lies in a directory").display().to_string();
    let more = ["--allow-path", directory.as_str()];
    let mut daemon = spawn(&scratch, &image, &more);
    wait_until_it_listens(&scratch, &mut daemon);
    let words = format!("disk_test=restart disk_test_seconds={}", 15 + takeovers * 7 / 2);
    // QEMU does not connect again: the connection itself must live.
    let mut guest = Guest::start(&scratch, 2, &words);
    guest.wait_for("GUEST-UP");
    guest.wait_for("GUEST-ROUND");
    let mut told = Vec::new();
    for takeover in 0..takeovers {
        std::thread::sleep(Duration::from_millis(rng.u64(200..3000)));
        assert!(!guest.has_said("GUEST-DONE"), "the guest has ended before {takeover}");
        let pause = || std::thread::sleep(Duration::from_millis(5));
        succeed((&scratch, &image), &more, &mut daemon, pause);
        std::thread::sleep(Duration::from_millis(200));
        daemon.assert_alive();
        told.push(told_wait(&daemon));
    }
    let rounds = guest.wait_for("GUEST-DONE");
    guest.wait_for_end();
    daemon.terminate();
    images::assert_clean(&image);
    eprintln!("{takeovers} takeovers under QEMU, {rounds}, milliseconds: {told:?}, SEED={seed}");
}

/// What a successor may do that never gets to serve.
type Failure = fn(&mut UnixStream);

fn hello(stream: &mut UnixStream) -> serde_json::Value {
    stream.write_all(&HELLO).expect("say hello");
    read_text(stream)
}

fn read_text(stream: &mut UnixStream) -> serde_json::Value {
    let mut length = [0; 8];
    stream.read_exact(&mut length).expect("a length");
    let mut text = vec![0; u64::from_le_bytes(length) as usize];
    stream.read_exact(&mut text).expect("a text");
    serde_json::from_slice(&text).expect("JSON")
}

fn take(stream: &mut UnixStream) {
    let greeting = hello(stream);
    assert_eq!(greeting["block_size"], 512, "{greeting}");
    stream.write_all(&[TAKE]).expect("ask for the disk");
}

/// Reads what the daemon tells, and throws the descriptors away.
fn receive(stream: &mut UnixStream) {
    take(stream);
    let state = read_text(stream);
    let count = state["descriptors"].as_u64().expect("a number of descriptors");
    assert!(count > 10, "{state}");
    for _ in 0..count {
        stream.read_exact(&mut [0]).expect("a descriptor");
    }
}

/// What each of them does, and whether guests may have to wait for two seconds.
const FAILURES: [(&str, bool, Failure); 10] = [
    ("it says nothing", false, |_| {}),
    ("it says half of it", false, |stream| stream.write_all(&HELLO[..7]).expect("write")),
    ("it says something else", false, |stream| stream.write_all(&[0x55; 40]).expect("write")),
    ("it goes at once", false, |stream| drop(hello(stream))),
    ("it does not want the disk for long", false, |stream| {
        hello(stream);
        std::thread::sleep(Duration::from_secs(3));
    }),
    ("it goes when it has asked for the disk", false, take),
    ("it goes while it is told", false, |stream| {
        take(stream);
        stream.read_exact(&mut [0; 100]).expect("the beginning");
    }),
    ("it goes when it knows everything", false, receive),
    ("it says that it is not ready", false, |stream| {
        receive(stream);
        stream.write_all(b"X").expect("write");
    }),
    ("it waits for too long", true, |stream| {
        receive(stream);
        // The daemon gives it up.
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
    }),
];

#[test]
fn a_successor_that_fails_leaves_the_disk_where_it_was() {
    let (scratch, image) = disk("failing");
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(seed, 64 * MIB / 512);
    let mut daemon = start(&scratch, &image);
    let mut client = Client::connect(&scratch.socket(), QUEUES, DEPTH).expect("connect");
    let mut workload = Workload::new(&mut client, &mut model, &mut rng, CLUSTER);
    let intruder = Intruder::start(&image);
    for (what, slow, fail) in FAILURES {
        let path = scratch.takeover_socket();
        let thread = std::thread::spawn(move || {
            let mut stream = UnixStream::connect(path).expect("connect to the daemon");
            fail(&mut stream);
        });
        let stall = load(&mut workload, &mut client, || thread.is_finished());
        thread.join().expect("it does what it should");
        println!("{what}: {stall:?}");
        let limit = if slow { 2_000 } else { 0 } + 1_500;
        assert!(stall < Duration::from_millis(limit), "{what}: {stall:?}");
        load_some(&mut workload, &mut client, 50);
        daemon.assert_alive();
    }
    // Daemons that cannot serve what is there, and some that are killed on their way.
    let other = scratch.file("other.qcow2");
    images::create(&other, "qcow2", "", 64 * MIB);
    for (image, more, why) in [
        (&image, &["--num-queues", "2"][..], "--num-queues is 64"),
        (&image, &["--queue-size", "128"], "--queue-size is 1024"),
        (&image, &["--block-size", "4096"], "--block-size is 512"),
        (&image, &["--serial", "another"], "--serial is \"disk.qcow2\""),
        (&image, &["--read-only"], "--read-only is false"),
        (&other, &["--serial", "disk.qcow2"], "serves another image"),
        (&other, &[], "--serial is"),
    ] {
        let mut next = spawn(&scratch, image, more);
        let stall = load(&mut workload, &mut client, || next.ended().is_some());
        assert_eq!(next.wait().code(), Some(1), "{}", next.log());
        assert!(next.log().contains(why), "{more:?}: {}", next.log());
        println!("{more:?}: {stall:?}");
        daemon.assert_alive();
    }
    // The last one succeeds.
    let next = spawn(&scratch, &image, &[]);
    let mut last = std::mem::replace(&mut daemon, next);
    load(&mut workload, &mut client, || last.ended().is_some());
    assert!(last.wait().success());
    workload.drain(&mut client).expect("all is answered");
    workload.verify_all(&mut client).expect("the disk holds what was written");
    println!("{} trials to get the locks", intruder.finish());
    drop(client);
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn half_a_message_and_a_handshake_survive() {
    let (scratch, image) = disk("half");
    let mut daemon = start(&scratch, &image);
    let mut front_end = UnixStream::connect(scratch.socket()).expect("connect");
    let header = |request: u32, size: u32| [request, 1, size].map(u32::to_ne_bytes).concat();
    let word = |stream: &mut UnixStream, daemon: &mut Daemon, request: u32| {
        // The daemon changes in the middle of the message.
        stream.write_all(&header(request, 0)[..5]).expect("write");
        std::thread::sleep(Duration::from_millis(20));
        let next = spawn(&scratch, &image, &[]);
        assert!(std::mem::replace(daemon, next).wait().success());
        stream.write_all(&header(request, 0)[5..]).expect("write");
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).expect("an answer");
        u64::from_ne_bytes(reply[12..].try_into().expect("eight bytes"))
    };
    let features = word(&mut front_end, &mut daemon, 1);
    let protocol = word(&mut front_end, &mut daemon, 15);
    assert!(features & 1 << 30 != 0 && protocol & 0x209 == 0x209, "{features:#x} {protocol:#x}");
    let mut tell = |request: u32, value: u64| {
        let message = [header(request, 8), value.to_ne_bytes().to_vec()].concat();
        front_end.write_all(&message).expect("write");
    };
    tell(16, protocol);
    tell(2, features);
    // What was negotiated with one daemon counts with the next: GET_CONFIG needs it.
    assert_eq!(word(&mut front_end, &mut daemon, 17), 64, "the number of queues");
    let config = [header(24, 12 + 8), [0u32, 8, 0].map(u32::to_ne_bytes).concat(), vec![0; 8]];
    front_end.write_all(&config.concat()).expect("write");
    let mut reply = [0; 12 + 12 + 8];
    front_end.read_exact(&mut reply).expect("an answer");
    assert_eq!(reply[24..], (64 * MIB as u64 / 512).to_le_bytes());
    drop(front_end);
    daemon.terminate();
}

#[test]
fn without_a_daemon_at_the_socket_the_disk_is_simply_served() {
    let (scratch, image) = disk("first");
    // One that was killed leaves its sockets behind.
    start(&scratch, &image).kill();
    let daemon = start(&scratch, &image);
    drop(Client::connect(&scratch.socket(), 1, DEPTH).expect("connect"));
    daemon.terminate();
    assert!(!scratch.takeover_socket().exists());
}
