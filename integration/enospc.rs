//! A host without space: the guest is told, or it waits until there is some.
//!
//! The host's disk is a small file system in memory, which only root may mount: by others, and
//! where mounting is forbidden, these tests are skipped with a loud word.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use integration::bulk::{self, Content};
use integration::client::{Client, MAX_REQUEST, Request};
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

const MIB: u64 = 1 << 20;
/// The disk, which fits onto the host with little to spare...
const DISK: u64 = 64 * MIB;
/// ...unless something else lies there as well.
const HOST: u64 = 80 * MIB;
const BALLAST: u64 = 40 * MIB;
/// What the daemon logs when something begins to wait, and when the wait is over.
const FULL: &str = "the host has no space left";
const AGAIN: &str = "there is space again";

/// A small file system; it goes with this.
struct Small(PathBuf);

impl Small {
    fn mount(scratch: &Scratch) -> Option<Self> {
        let path = scratch.file("small");
        fs::create_dir(&path).expect("make a directory");
        let size = format!("size={HOST}");
        let mount = |program: &str, first: &[&str]| {
            let arguments = ["-t", "tmpfs", "-o", &size, "tmpfs"];
            let output = Command::new(program).args(first).args(arguments).arg(&path).output();
            output.is_ok_and(|output| output.status.success())
        };
        if mount("mount", &[]) || mount("sudo", &["-n", "mount"]) {
            return Some(Self(path));
        }
        eprintln!("SKIPPED: a file system of {HOST} bytes cannot be mounted here");
        None
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Takes space away; removing the file gives it back.
    fn fill(&self) -> PathBuf {
        let path = self.file("ballast");
        let mut file = File::create_new(&path).expect("make a file");
        for _ in 0..BALLAST / MIB {
            file.write_all(&[1; MIB as usize]).expect("take space away");
        }
        path
    }
}

impl Small {
    /// Takes all space away, to the last byte.
    fn fill_up(&self) -> PathBuf {
        let path = self.file("ballast");
        let mut file = File::create_new(&path).expect("make a file");
        while file.write_all(&[1; 4096]).is_ok() {}
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let lazily = |program: &str, first: &[&str]| {
            let status = Command::new(program).args(first).arg("-l").arg(&self.0).status();
            status.is_ok_and(|status| status.success())
        };
        let _ = lazily("umount", &[]) || lazily("sudo", &["-n", "umount"]);
    }
}

/// Queues writes until all slots but one are in use; returns where the next one would begin.
fn submit_writes(client: &mut Client, mut next: u64, content: Content) -> u64 {
    while next < DISK
        && client.in_flight() + 1 < DEPTH
        && let Some(slot) = client.free_slot()
    {
        content.fill(next, client.buffer(slot));
        let request = Request::Write { offset: next, length: MAX_REQUEST };
        client.submit(slot % client.queue_count(), slot, request, &[]).expect("submit");
        next += MAX_REQUEST as u64;
    }
    client.kick().expect("kick");
    next
}

/// Writes until nothing is answered any more; returns where the next write would begin.
fn write_until_stuck(client: &mut Client, content: Content) -> u64 {
    let mut next = 0;
    loop {
        next = submit_writes(client, next, content);
        let answers = client.wait(Duration::from_secs(3)).expect("wait");
        for answer in &answers {
            assert_eq!(answer.result, 0, "a write has failed");
        }
        if answers.is_empty() {
            assert!(client.in_flight() > 0, "the host was not too small");
            return next;
        }
    }
}

fn count(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}

fn connect(scratch: &Scratch) -> Client {
    Client::connect(&scratch.socket(), 2, DEPTH).expect("connect to the daemon")
}

fn make(small: &Small, format: &str, options: &str) -> PathBuf {
    let image = small.file("disk.img");
    images::create(&image, format, options, usize::try_from(DISK).expect("a size"));
    image
}

/// Fills the host, waits, gives it space, and looks at everything.
fn stall(name: &str, format: &str, options: &str, arguments: &[&str]) {
    let scratch = Scratch::new(name);
    let Some(small) = Small::mount(&scratch) else { return };
    let image = make(&small, format, options);
    let ballast = small.fill();
    let arguments = [&["--format", format, "--on-enospc", "stall"], arguments].concat();
    let mut daemon = Daemon::start(&scratch, &image, &arguments);
    let mut client = connect(&scratch);
    let content = Content::Numbered(5);
    let next = write_until_stuck(&mut client, content);
    assert_eq!((count(&daemon, FULL), count(&daemon, AGAIN)), (1, 0), "{}", daemon.log());
    let named = format!("{}: {FULL}", image.display());
    assert!(daemon.log().contains(&named), "the file is not named: {}", daemon.log());
    let ticks = daemon.processor_ticks();
    let nothing = client.wait(Duration::from_secs(3)).expect("wait");
    assert!(nothing.is_empty(), "something was answered without space");
    let ticks = daemon.processor_ticks() - ticks;
    assert!(ticks < 30, "waiting for 3 s took {ticks} ticks of processor time");
    daemon.assert_alive();
    // Space comes back, and everything goes on by itself.
    fs::remove_file(ballast).expect("give space back");
    let begun = Instant::now();
    while client.in_flight() > 0 {
        let answers = client.wait(Duration::from_secs(20)).expect("wait");
        assert!(!answers.is_empty(), "nothing goes on although there is space");
        assert!(answers.iter().all(|answer| answer.result == 0), "{answers:?}");
    }
    eprintln!("{name}: all has gone on {:?} after the space came back", begun.elapsed());
    bulk::write(&mut client, next..DISK, content).expect("write the rest");
    client.execute(Request::Flush).expect("flush");
    assert_eq!((count(&daemon, FULL), count(&daemon, AGAIN)), (1, 1), "{}", daemon.log());
    bulk::verify(&mut client, 0..DISK, content).expect("verify");
    // Nothing ticks when nothing waits.
    std::thread::sleep(Duration::from_secs(1));
    let ticks = daemon.processor_ticks();
    std::thread::sleep(Duration::from_secs(3));
    let ticks = daemon.processor_ticks() - ticks;
    assert!(ticks <= 1, "3 s of idleness took {ticks} ticks of processor time");
    drop(client);
    daemon.terminate();
    if format == "qcow2" {
        images::assert_clean(&image);
    }
}

#[test]
fn stalled_qcow2_goes_on() {
    stall("enospc-qcow2", "qcow2", "", &[]);
}

#[test]
fn stalled_small_clusters_go_on() {
    stall("enospc-small", "qcow2", "cluster_size=1k", &["--aio", "threads"]);
}

#[test]
fn stalled_raw_goes_on() {
    stall("enospc-raw", "raw", "", &[]);
}

#[test]
fn stalled_raw_with_threads_goes_on() {
    stall("enospc-threads", "raw", "", &["--aio", "threads"]);
}

/// While writes wait, reads are answered, and what a raw disk gives up is used at once.
#[test]
fn a_stalled_disk_is_read_and_helps_itself() {
    let scratch = Scratch::new("enospc-discard");
    let Some(small) = Small::mount(&scratch) else { return };
    let image = make(&small, "raw", "");
    let _ballast = small.fill();
    let daemon = Daemon::start(&scratch, &image, &["--format", "raw", "--on-enospc", "stall"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
    let content = Content::Numbered(6);
    write_until_stuck(&mut client, content);
    assert_eq!(count(&daemon, FULL), 1, "{}", daemon.log());
    let slot = client.free_slot().expect("a slot");
    client.submit(0, slot, Request::Read { offset: 0, length: MAX_REQUEST }, &[]).expect("submit");
    client.kick().expect("kick");
    let answers = client.wait(Duration::from_secs(20)).expect("wait");
    assert!(answers.len() == 1 && answers[0].slot == slot && answers[0].result == 0);
    let discard = Request::Discard { offset: 0, length: 16 * MIB };
    client.submit(0, slot, discard, &[]).expect("submit");
    client.kick().expect("kick");
    while client.in_flight() > 0 {
        let answers = client.wait(Duration::from_secs(20)).expect("wait");
        assert!(!answers.is_empty() && answers.iter().all(|answer| answer.result == 0));
    }
    bulk::verify(&mut client, 16 * MIB..32 * MIB, content).expect("verify");
    drop(client);
    daemon.terminate();
}

/// Told to end while requests wait, the daemon answers them with errors and ends in good order.
#[test]
fn told_to_end_while_stalled() {
    let scratch = Scratch::new("enospc-end");
    let Some(small) = Small::mount(&scratch) else { return };
    let image = make(&small, "qcow2", "");
    let ballast = small.fill();
    let arguments = ["--format", "qcow2", "--on-enospc", "stall"];
    let daemon = Daemon::start(&scratch, &image, &arguments);
    let mut client = connect(&scratch);
    let content = Content::Numbered(8);
    bulk::write(&mut client, 0..8 * MIB, content).expect("write");
    client.execute(Request::Flush).expect("flush");
    write_until_stuck(&mut client, content);
    let waiting = client.in_flight();
    let begun = Instant::now();
    daemon.terminate();
    let took = begun.elapsed();
    eprintln!("it took {took:?} to end with {waiting} requests waiting");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let answers = client.answers();
    assert_eq!(answers.len(), waiting, "all were answered");
    assert!(answers.iter().any(|answer| answer.result != 0), "{answers:?}");
    drop(client);
    images::assert_clean(&image);
    // What was flushed is there, and with space the disk is as good as new.
    fs::remove_file(ballast).expect("give space back");
    go_on(&scratch, &image, 8 * MIB, content);
}

/// A front-end that goes while its requests wait does not keep the daemon from ending.
#[test]
fn told_to_end_while_stalled_and_alone() {
    let scratch = Scratch::new("enospc-alone");
    let Some(small) = Small::mount(&scratch) else { return };
    let image = make(&small, "qcow2", "");
    let ballast = small.fill();
    let arguments = ["--format", "qcow2", "--on-enospc", "stall"];
    let daemon = Daemon::start(&scratch, &image, &arguments);
    let mut client = connect(&scratch);
    write_until_stuck(&mut client, Content::Numbered(1));
    drop(client);
    std::thread::sleep(Duration::from_secs(2));
    let begun = Instant::now();
    daemon.terminate();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    images::assert_clean(&image);
    fs::remove_file(ballast).expect("give space back");
    go_on(&scratch, &image, 0, Content::Zeros);
}

/// log2 of the bytes between places whose entries are in different pages of one L2 table.
const APART_BITS: u32 = 26;

/// Whoever copies an image may leave zeros out, those in its tables too: making such a table
/// durable needs space, although it was there already.
fn flush_on_a_full_host(name: &str, policy: &str) -> Option<(Scratch, Small, Daemon, Client)> {
    let scratch = Scratch::new(name);
    let small = Small::mount(&scratch)?;
    let (original, image) = (scratch.file("original.img"), small.file("disk.img"));
    images::create(&original, "qcow2", "", 1 << 40);
    let mut fill = Command::new("qemu-io");
    fill.args(["-f", "qcow2", "-c", "write 0 64k"]).arg(&original).stdout(Stdio::null());
    assert!(fill.status().expect("start qemu-io").success());
    let copied = Command::new("cp").arg("--sparse=always").args([&original, &image]).status();
    assert!(copied.expect("start cp").success());
    let arguments = ["--format", "qcow2", "--on-enospc", policy];
    let daemon = Daemon::start(&scratch, &image, &arguments);
    let mut client = connect(&scratch);
    let content = Content::Numbered(1);
    bulk::write(&mut client, 0..MIB, content).expect("write");
    client.execute(Request::Flush).expect("flush");
    // Entries in other pages of the L2 table, which was there and is a hole but for the first.
    for part in 1..4 {
        let at = part << APART_BITS;
        bulk::write(&mut client, at..at + MIB, content).expect("write");
    }
    small.fill_up();
    Some((scratch, small, daemon, client))
}

#[test]
fn a_stalled_flush_goes_on() {
    let Some((_scratch, small, daemon, mut client)) = flush_on_a_full_host("enospc-flush", "stall")
    else {
        return;
    };
    client.submit(0, 0, Request::Flush, &[]).expect("submit");
    client.kick().expect("kick");
    let answers = client.wait(Duration::from_secs(3)).expect("wait");
    assert!(answers.is_empty(), "the flush needed no space: {answers:?}");
    assert_eq!(count(&daemon, FULL), 1, "{}", daemon.log());
    fs::remove_file(small.file("ballast")).expect("give space back");
    let answers = client.wait(Duration::from_secs(20)).expect("wait");
    assert!(answers.len() == 1 && answers[0].result == 0, "{answers:?}");
    for part in 0..4 {
        let at = part << APART_BITS;
        bulk::write(&mut client, at..at + MIB, Content::Numbered(part)).expect("write");
    }
    client.execute(Request::Flush).expect("flush");
    drop(client);
    daemon.terminate();
    images::assert_clean(&small.file("disk.img"));
}

/// Told of it, the guest gets no more promises from this daemon, and loses none that it had.
#[test]
fn a_reported_flush_fails_and_what_was_flushed_stays() {
    let Some((scratch, small, daemon, mut client)) =
        flush_on_a_full_host("enospc-failed-flush", "report")
    else {
        return;
    };
    client.execute(Request::Flush).expect_err("a flush without space");
    fs::remove_file(small.file("ballast")).expect("give space back");
    client.execute(Request::Flush).expect_err("what is durable is not known any more");
    drop(client);
    daemon.kill();
    let image = small.file("disk.img");
    eprintln!("afterwards the image is found to have: {:?}", images::check(&image));
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = connect(&scratch);
    bulk::verify(&mut client, 0..MIB, Content::Numbered(1)).expect("what was flushed");
    let at = 3 << APART_BITS;
    bulk::write(&mut client, at..at + MIB, Content::Numbered(2)).expect("write");
    client.execute(Request::Flush).expect("flush");
    drop(client);
    daemon.terminate();
    let _ = images::check(&image);
}

/// Serves the image and writes all of it, after a look at its first bytes.
fn go_on(scratch: &Scratch, image: &Path, known: u64, content: Content) {
    let daemon = Daemon::start(scratch, image, &["--format", "qcow2"]);
    let mut client = connect(scratch);
    bulk::verify(&mut client, 0..known, content).expect("verify");
    bulk::write(&mut client, 0..DISK, Content::Numbered(2)).expect("write");
    client.execute(Request::Flush).expect("flush");
    bulk::verify(&mut client, 0..DISK, Content::Numbered(2)).expect("verify");
    drop(client);
    daemon.terminate();
    images::assert_clean(image);
}

/// By default the guest gets an error, and nothing else is the worse for it.
#[test]
fn reported_errors_end_with_the_lack_of_space() {
    for (options, arguments) in [("", &[][..]), ("cluster_size=1k", &["--on-enospc", "report"])] {
        let scratch = Scratch::new("enospc-report");
        let Some(small) = Small::mount(&scratch) else { return };
        let image = make(&small, "qcow2", options);
        let ballast = small.fill();
        let arguments = [&["--format", "qcow2"], arguments].concat();
        let daemon = Daemon::start(&scratch, &image, &arguments);
        let mut client = connect(&scratch);
        let (old, new) = (Content::Numbered(3), Content::Numbered(4));
        bulk::write(&mut client, 0..8 * MIB, old).expect("write");
        let mut failures = 0;
        for offset in (8 * MIB..DISK).step_by(MAX_REQUEST) {
            new.fill(offset, client.buffer(0));
            let write = client.execute(Request::Write { offset, length: MAX_REQUEST });
            failures += u32::from(write.is_err());
        }
        assert!(failures > 0, "the host was not too small");
        client.execute(Request::Flush).expect("a flush in spite of it");
        bulk::verify(&mut client, 0..8 * MIB, old).expect("verify");
        assert_eq!(count(&daemon, AGAIN), 0, "nothing has waited");
        fs::remove_file(ballast).expect("give space back");
        bulk::write(&mut client, 0..DISK, new).expect("write again");
        client.execute(Request::Flush).expect("flush");
        bulk::verify(&mut client, 0..DISK, new).expect("verify");
        drop(client);
        daemon.terminate();
        images::assert_clean(&image);
    }
}
