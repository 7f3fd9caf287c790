//! Locks that QEMU understands, on every file of a chain: held, respected, and gone with their
//! holder.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use integration::client::{Client, Request};
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

const SIZE: usize = 64 << 20;
/// Bytes that tell of a use: of reading what others see, of writing, of changing the length; and of
/// what is not granted to others.
const READS: u64 = 100;
const WRITES: u64 = 101;
const RESIZES: u64 = 103;
const DENIES_WRITES: u64 = 201;
const DENIES_RESIZES: u64 = 203;
const WRITER: [u64; 5] = [READS, WRITES, RESIZES, DENIES_WRITES, DENIES_RESIZES];
const READER: [u64; 3] = [READS, DENIES_WRITES, DENIES_RESIZES];

/// The bytes that anybody has locked for sharing in a file, from the kernel's own list.
fn locked(path: &Path) -> BTreeSet<u64> {
    let metadata = path.metadata().expect("look at a file");
    let table = fs::read_to_string("/proc/locks").expect("read the table of locks");
    let mut bytes = BTreeSet::new();
    for line in table.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // 1: OFDLCK ADVISORY READ -1 fe:00:2097 100 101
        let [_, "OFDLCK", _, kind, _, file, first, last] = words[..] else { continue };
        let inode = file.rsplit(':').next().expect("device and inode");
        if inode == metadata.ino().to_string() && same_device(file, metadata.dev()) {
            assert_eq!(kind, "READ", "{line}");
            let number = |word: &str| word.parse::<u64>().expect("a number");
            bytes.extend(number(first)..=number(last));
        }
    }
    bytes
}

fn same_device(file: &str, device: u64) -> bool {
    let mut parts = file.split(':').map(|part| u64::from_str_radix(part, 16).expect("hexadecimal"));
    let (major, minor) = (parts.next().expect("major"), parts.next().expect("minor"));
    (u64::from(rustix::fs::major(device)), u64::from(rustix::fs::minor(device))) == (major, minor)
}

/// An overlay with an external data file, over a qcow2 file, over a raw one.
struct Chain {
    scratch: Scratch,
    overlay: PathBuf,
    data: PathBuf,
    base: PathBuf,
    bottom: PathBuf,
}

impl Chain {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let file = |name| scratch.file(name);
        let (overlay, data) = (file("overlay.qcow2"), file("data.raw"));
        let (base, bottom) = (file("base.qcow2"), file("bottom.raw"));
        images::create(&bottom, "raw", "", SIZE);
        images::create_overlay(&base, "bottom.raw", "raw", SIZE);
        // QEMU looks for a data file from where it was started, not from where the image lies.
        let data_file = data.display();
        let options = format!("backing_file=base.qcow2,backing_fmt=qcow2,data_file={data_file}");
        images::create(&overlay, "qcow2", &options, SIZE);
        Self { scratch, overlay, data, base, bottom }
    }

    fn files(&self) -> [&Path; 4] {
        [&self.overlay, &self.data, &self.base, &self.bottom]
    }

    fn locks(&self) -> [BTreeSet<u64>; 4] {
        self.files().map(locked)
    }

    fn serve(&self, arguments: &[&str]) -> Daemon {
        let arguments = [&["--format", "qcow2"], arguments].concat();
        Daemon::start(&self.scratch, &self.overlay, &arguments)
    }
}

/// Runs a program of QEMU's; returns whether it succeeded and what it said.
fn run<Argument: AsRef<OsStr>>(program: &str, arguments: &[Argument]) -> (bool, String) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} ({error}): run .ci/setup first"));
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    (output.status.success(), said)
}

fn qemu_io(path: &Path, format: &str, how: &[&str], command: &str) -> (bool, String) {
    let path = path.to_str().expect("plain text");
    let arguments = [&["-f", format], how, &["-c", command, path]].concat();
    let (succeeded, said) = run("qemu-io", &arguments);
    (succeeded && !said.contains("failed"), said)
}

fn assert_locked_out((succeeded, said): (bool, String)) {
    assert!(!succeeded, "it should have been refused: {said}");
    assert!(said.contains("lock") && said.contains("another process"), "{said}");
}

/// A program of QEMU's that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(mut command: Command, watched: &Path) -> Self {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let holder = Self(child.expect("start it: run .ci/setup first"));
        let deadline = Instant::now() + Duration::from_secs(30);
        while locked(watched).is_empty() {
            assert!(Instant::now() < deadline, "it does not open the image");
            std::thread::sleep(Duration::from_millis(20));
        }
        // It takes its locks one after the other.
        std::thread::sleep(Duration::from_millis(500));
        holder
    }

    /// `qemu-io`, waiting for commands.
    fn qemu_io(path: &Path, format: &str, how: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).args(how).arg(path);
        Self::new(command, path)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a daemon that must be refused; returns what it said.
fn refused(image: &Path, arguments: &[&str]) -> String {
    let scratch = Scratch::new("locks-refused");
    let arguments = [&["--format", "qcow2"], arguments].concat();
    let mut daemon = Daemon::spawn(&scratch, image, &arguments);
    assert!(!daemon.wait().success(), "two use {} at once", image.display());
    assert!(!scratch.socket().exists(), "a daemon that was refused has left a socket");
    daemon.log()
}

/// Fails unless a refusal names the file, the holder's process and its command.
fn assert_names(said: &str, file: &Path, process: u32, command: &str) {
    // The kernel keeps fifteen bytes of a command's name.
    let command = &command[..command.len().min(15)];
    let holder = format!("process {process} ({command})");
    let file = file.file_name().expect("a name").to_str().expect("plain text");
    assert!(said.contains(&holder) && said.contains(file), "{holder} is not named in: {said}");
}

fn work(scratch: &Scratch) {
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
    client.buffer(0).fill(0x33);
    client.execute(Request::Write { offset: 0, length: 65536 }).expect("write");
    client.execute(Request::Flush).expect("flush");
}

#[test]
fn every_file_is_locked_byte_for_byte_as_qemu_does_it() {
    let chain = Chain::new("locks-bytes");
    let open = |how: &[&str]| {
        let holder = Holder::qemu_io(&chain.overlay, "qcow2", how);
        let locks = chain.locks();
        drop(holder);
        locks
    };
    let theirs = (open(&[]), open(&["-r"]));
    let daemon = chain.serve(&[]);
    // Nothing depends on whether somebody is connected, or has written.
    let quiet = chain.locks();
    work(&chain.scratch);
    let ours = chain.locks();
    assert_eq!(quiet, ours);
    daemon.terminate();
    assert!(chain.locks().iter().all(BTreeSet::is_empty), "locks are left behind");
    let daemon = chain.serve(&["--read-only"]);
    let ours = (ours, chain.locks());
    daemon.terminate();
    let set = |bytes: &[u64]| bytes.iter().copied().collect::<BTreeSet<u64>>();
    for (file, locks) in chain.files().iter().zip(&ours.0) {
        let is_written = *file == chain.overlay || *file == chain.data;
        let expected = if is_written { set(&WRITER) } else { set(&READER) };
        assert_eq!(*locks, expected, "{}", file.display());
    }
    assert!(ours.1.iter().all(|locks| *locks == set(&READER)), "{:?}", ours.1);
    eprintln!("QEMU locks {theirs:?}");
    // Whatever QEMU uses or denies, we tell of as well: we may be stricter, never laxer.
    for (file, (theirs, ours)) in chain.files().iter().zip(theirs.0.iter().zip(&ours.0)) {
        assert!(theirs.is_subset(ours), "{}: {theirs:?}, {ours:?}", file.display());
    }
    for (theirs, ours) in theirs.1.iter().zip(&ours.1) {
        assert!(theirs.is_subset(ours), "{theirs:?}, {ours:?}");
    }
}

#[test]
fn qemu_is_kept_from_what_we_write() {
    let chain = Chain::new("locks-qemu");
    let daemon = chain.serve(&[]);
    let overlay = chain.overlay.to_str().expect("plain text");
    assert_locked_out(run("qemu-img", &["snapshot", "-c", "one", overlay]));
    assert_locked_out(run("qemu-img", &["info", overlay]));
    assert_locked_out(run("qemu-img", &["check", overlay]));
    assert_locked_out(run("qemu-img", &["resize", overlay, "128M"]));
    assert_locked_out(qemu_io(&chain.overlay, "qcow2", &[], "write 0 64k"));
    assert_locked_out(qemu_io(&chain.overlay, "qcow2", &["-r"], "read 0 64k"));
    assert_locked_out(qemu_io(&chain.data, "raw", &[], "write 0 64k"));
    let (succeeded, said) = run("qemu-img", &["info", "-U", overlay]);
    assert!(succeeded, "who asks not to be protected is not: {said}");
    // The layers below may be read by anybody, and written by nobody.
    for (file, format) in [(&chain.base, "qcow2"), (&chain.bottom, "raw")] {
        let name = file.to_str().expect("plain text");
        let (succeeded, said) = run("qemu-img", &["info", name]);
        assert!(succeeded, "{said}");
        let (succeeded, said) = qemu_io(file, format, &["-r"], "read 0 64k");
        assert!(succeeded, "{said}");
        assert_locked_out(qemu_io(file, format, &[], "write 0 64k"));
        assert_locked_out(run("qemu-img", &["resize", "-f", format, name, "128M"]));
    }
    assert_locked_out(run("qemu-img", &["commit", overlay]));
    daemon.terminate();
    let (succeeded, said) = qemu_io(&chain.overlay, "qcow2", &[], "write 0 64k");
    assert!(succeeded, "the locks went with the daemon: {said}");
}

#[test]
fn we_keep_away_from_what_qemu_uses_and_say_who_does() {
    let chain = Chain::new("locks-theirs");
    let holder = Holder::qemu_io(&chain.overlay, "qcow2", &[]);
    for how in [&[][..], &["--read-only"]] {
        assert_names(&refused(&chain.overlay, how), &chain.overlay, holder.0.id(), "qemu-io");
    }
    drop(holder);
    // A reader of QEMU's keeps writers away, and shares with readers.
    let holder = Holder::qemu_io(&chain.overlay, "qcow2", &["-r"]);
    assert_names(&refused(&chain.overlay, &[]), &chain.overlay, holder.0.id(), "qemu-io");
    chain.serve(&["--read-only"]).terminate();
    drop(holder);
    // Somebody writes to a layer below, or to the data file.
    for (file, format) in [(&chain.base, "qcow2"), (&chain.bottom, "raw"), (&chain.data, "raw")] {
        let holder = Holder::qemu_io(file, format, &[]);
        assert_names(&refused(&chain.overlay, &[]), file, holder.0.id(), "qemu-io");
    }
    let mut command = Command::new("qemu-storage-daemon");
    let file = chain.overlay.to_str().expect("plain text");
    command.arg("--blockdev");
    command.arg(format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={file}"));
    let socket = chain.scratch.file("nbd.sock");
    command.arg("--nbd-server");
    command.arg(format!("addr.type=unix,addr.path={}", socket.display()));
    command.args(["--export", "type=nbd,id=export,node-name=disk,writable=on"]);
    let holder = Holder::new(command, &chain.overlay);
    let said = refused(&chain.overlay, &[]);
    assert_names(&said, &chain.overlay, holder.0.id(), "qemu-storage-daemon");
    drop(holder);
    chain.serve(&[]).terminate();
}

#[test]
fn two_of_ours_share_what_they_only_read() {
    let chain = Chain::new("locks-ours");
    let name = "vhost-user-qcow2";
    let writer = chain.serve(&[]);
    for how in [&[][..], &["--read-only"]] {
        assert_names(&refused(&chain.overlay, how), &chain.overlay, writer.id(), name);
    }
    // The base of a running overlay may be served for reading, and not for writing.
    assert_names(&refused(&chain.base, &[]), &chain.base, writer.id(), name);
    let second = Scratch::new("locks-second");
    let reading = ["--format", "qcow2", "--read-only"];
    Daemon::start(&second, &chain.base, &reading).terminate();
    // Another overlay on the same base.
    let other = chain.scratch.file("other.qcow2");
    images::create_overlay(&other, "base.qcow2", "qcow2", SIZE);
    let daemon = Daemon::start(&second, &other, &["--format", "qcow2"]);
    work(&second);
    work(&chain.scratch);
    daemon.terminate();
    writer.terminate();
    let readers = (chain.serve(&["--read-only"]), Daemon::start(&second, &chain.overlay, &reading));
    let said = refused(&chain.overlay, &[]);
    let named = [&readers.0, &readers.1].iter().any(|it| said.contains(&it.id().to_string()));
    assert!(named, "no holder is named: {said}");
    readers.0.terminate();
    readers.1.terminate();
}

#[test]
fn a_killed_daemon_leaves_no_lock() {
    let chain = Chain::new("locks-killed");
    for arguments in [&[][..], &["--aio", "threads"]] {
        let daemon = chain.serve(arguments);
        let mut client = Client::connect(&chain.scratch.socket(), 1, DEPTH).expect("connect");
        while let Some(slot) = client.free_slot() {
            let offset = slot as u64 * (1 << 20);
            client.buffer(slot).fill(0x44);
            client.submit(0, slot, Request::Write { offset, length: 65536 }, &[]).expect("submit");
        }
        client.kick().expect("kick");
        daemon.kill();
        // The next one comes at once; what the kernel has still to finish is waited for.
        chain.serve(arguments).terminate();
        drop(client);
    }
    let (succeeded, said) = qemu_io(&chain.overlay, "qcow2", &[], "write 0 64k");
    assert!(succeeded, "{said}");
}
