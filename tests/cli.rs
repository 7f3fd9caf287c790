//! The built program: what it refuses and how, whose socket it takes, and how it ends.

#[path = "cli/control.rs"]
mod control;
#[path = "cli/sockets.rs"]
mod sockets;

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// A directory to work in.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        fs::write(self.path(name), content).expect("a file");
        self.path(name)
    }

    /// An empty raw image.
    fn raw(&self, name: &str) -> PathBuf {
        self.file(name, &vec![0; 1 << 20])
    }

    fn command(&self, image: &Path, arguments: &[&str]) -> Command {
        let mut command = program();
        command.arg("--socket").arg(self.path("socket")).arg("--image").arg(image);
        command.args(arguments).current_dir(self.0.path());
        command
    }

    /// Expects a refusal: one line that names `subject` and says `why`, status 1, no trace.
    fn assert_refused(&self, image: &Path, arguments: &[&str], subject: &str, why: &str) {
        let before = self.listing();
        let output = run(self.command(image, arguments));
        let error = String::from_utf8(output.stderr).expect("plain text");
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(subject) && error.contains(why), "{subject}, {why}: {error}");
        assert_eq!(output.stdout, b"", "nothing is served");
        assert_eq!(self.listing(), before, "nothing was written, and no socket is left");
    }

    /// What is in the directory, with sizes.
    fn listing(&self) -> Vec<(PathBuf, u64)> {
        let entries = fs::read_dir(self.0.path()).expect("the directory");
        let entry = |entry: fs::DirEntry| {
            (entry.path(), entry.metadata().map_or(0, |metadata| metadata.len()))
        };
        let mut list: Vec<_> = entries.map(|found| entry(found.expect("an entry"))).collect();
        list.sort();
        list
    }

    fn start(&self, image: &Path, arguments: &[&str]) -> Daemon {
        self.launch(self.command(image, arguments))
    }

    fn launch(&self, mut command: Command) -> Daemon {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut daemon = Daemon(command.spawn().expect("the program"));
        let start = Instant::now();
        // The arguments to attach to it are printed once it listens.
        while UnixStream::connect(self.path("socket")).is_err() {
            if let Some(status) = daemon.0.try_wait().expect("its state") {
                panic!("it ended with {status}: {}", daemon.rest());
            }
            assert!(start.elapsed() < PATIENCE, "it does not listen");
            thread::sleep(Duration::from_millis(2));
        }
        daemon
    }
}

/// A running daemon.
struct Daemon(Child);

impl Daemon {
    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().expect("kill");
        assert!(status.success());
    }

    fn wait(&mut self) -> i32 {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("its state") {
                return status.code().expect("an exit status");
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Everything that it has printed, after its end.
    fn rest(&mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().expect("a pipe").read_to_string(&mut text).expect("plain text");
        self.0.stderr.take().expect("a pipe").read_to_string(&mut text).expect("plain text");
        text
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-qcow2"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(mut command: Command) -> Output {
    command.output().expect("the program")
}

/// The first bytes of a qcow2 header: magic and version.
fn header(version: u32) -> Vec<u8> {
    [&b"QFI\xfb"[..], &version.to_be_bytes()].concat()
}

#[test]
fn every_image_that_cannot_be_served_is_refused_in_one_line() {
    let bench = Bench::new();
    let refused = |name: &str, content: Option<&[u8]>, arguments: &[&str], why: &str| {
        let image = match content {
            Some(content) => bench.file(name, content),
            None => bench.path(name),
        };
        bench.assert_refused(&image, arguments, name, why);
    };
    let mut version_4 = header(4);
    version_4.resize(65536, 0);
    refused("missing.qcow2", None, &[], "No such file");
    bench.assert_refused(&bench.path("no/disk.qcow2"), &[], "no", "No such file");
    refused("plain.raw", Some(&[0; 65536]), &[], "--format raw");
    refused("empty", Some(&[]), &[], "0 bytes");
    refused("other.vmdk", Some(b"KDMV and so on"), &[], "--format raw");
    refused("not.qcow2", Some(&[7; 65536]), &["--format", "qcow2"], "");
    refused("short.qcow2", Some(&header(3)), &[], "header");
    refused("new.qcow2", Some(&version_4), &[], "version");
    fs::create_dir(bench.path("a-directory")).expect("a directory");
    refused("a-directory", None, &[], "");
    refused("a-directory", None, &["--format", "raw"], "");
    bench.assert_refused(Path::new("/dev/null"), &["--format", "raw"], "/dev/null", "");
}

#[test]
fn an_image_is_not_made_where_it_cannot_be_served() {
    let bench = Bench::new();
    let image = bench.path("new.img");
    bench.assert_refused(&image, &["--create", "1M", "--format", "raw"], "new.img", "--format raw");
    let image = bench.path("no/new.qcow2");
    bench.assert_refused(&image, &["--create", "1M"], "new.qcow2", "No such file");
    let image = bench.path("new.qcow2");
    let live = UnixListener::bind(bench.path("socket")).expect("somebody else's socket");
    bench.assert_refused(&image, &["--create", "1M"], "socket", "answers");
    drop(live);
}

#[test]
fn sockets_that_cannot_be_made_are_refused_in_one_line() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let refused = |socket: &Path, why: &str| {
        let mut command = program();
        command.arg("--socket-path").arg(socket).arg("--blk-file").arg(&image).args(["-f", "raw"]);
        let output = run(command);
        let error = String::from_utf8(output.stderr).expect("plain text");
        assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
        let name = socket.display().to_string();
        assert!(error.contains(&name) && error.contains(why), "{error}");
    };
    refused(&bench.path("no/socket"), "No such file");
    refused(&bench.path(&"x".repeat(200)), "");
    refused(bench.0.path(), "no socket");
    refused(&bench.file("text", b"precious"), "no socket");
    assert_eq!(fs::read(bench.path("text")).expect("the file"), b"precious");
    std::os::unix::fs::symlink(bench.path("nowhere"), bench.path("link")).expect("a link");
    refused(&bench.path("link"), "no socket");
}

#[test]
fn wrong_arguments_are_explained() {
    for (arguments, why) in [
        (&[][..], "--image"),
        (&["--socket", "s"], "--image"),
        (&["--image", "i"], "--socket"),
        (&["--socket", "s", "--fd", "3", "--image", "i"], "--fd"),
        (&["--fd", "3", "--image", "i", "--socket-mode", "0660"], "--socket"),
        (&["--socket", "s", "--image", "i", "--socket-mode", "rw"], "octal"),
        (&["--socket", "s", "--image", "i", "--socket-group", "no such"], "no such"),
        (&["--socket", "s", "--image", "i", "--cpus", "all"], "0-3,7"),
        (&["--socket", "s", "--image", "i", "--queue-size", "100"], "power of two"),
        (&["--socket", "s", "--image", "i", "--serial", "123456789012345678901"], "20"),
        (&["--socket", "s", "--image", "i", "--create", "much"], "size"),
        (&["--socket", "s", "--image", "i", "--sokcet", "s"], "--socket"),
    ] {
        let mut command = program();
        command.args(arguments);
        let output = run(command);
        let error = String::from_utf8(output.stderr).expect("plain text");
        assert!(!output.status.success() && error.contains(why), "{arguments:?}: {error}");
    }
}

#[test]
fn help_has_an_example_and_every_option() {
    let mut command = program();
    command.arg("--help");
    let output = run(command);
    let help = String::from_utf8(output.stdout).expect("plain text");
    assert!(output.status.success());
    for word in [
        "--socket <PATH>",
        "--socket-path",
        "--image <PATH>",
        "--blk-file",
        "--format",
        "-f",
        "--read-only",
        "-r",
        "--create <SIZE>",
        "--num-queues",
        "--queue-size",
        "--threads",
        "--cache",
        "writethrough",
        "--aio",
        "io_uring",
        "--serial",
        "--block-size",
        "--allow-path",
        "--backing-format",
        "--compress",
        "--discard",
        "--detect-zeroes",
        "--on-enospc",
        "--log-level",
        "--fd <N>",
        "--socket-mode <MODE>",
        "--socket-group <GROUP>",
        "--exit-on-disconnect",
        "--pidfile <PATH>",
        "--cpus <LIST>",
        "--print-capabilities",
        "--print-file <FILE>",
        "Examples:",
        "--create 10G",
    ] {
        assert!(help.contains(word), "{word} is missing in:\n{help}");
    }
}

#[test]
fn capabilities_are_printed_as_qemu_wants_them() {
    let mut command = program();
    command.arg("--print-capabilities");
    let output = run(command);
    assert!(output.status.success() && output.stderr.is_empty());
    assert_eq!(output.stdout, b"{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n");
}

#[test]
fn a_signal_ends_the_daemon_and_removes_its_socket() {
    for signal in ["TERM", "INT"] {
        for attached in [false, true] {
            let bench = Bench::new();
            let image = bench.raw("disk.raw");
            let mut daemon = bench.start(&image, &["--format", "raw"]);
            let front_end = attached.then(|| UnixStream::connect(bench.path("socket")));
            daemon.signal(signal);
            assert_eq!(daemon.wait(), 0, "{signal}");
            assert!(!bench.path("socket").exists(), "{signal}");
            let said = daemon.rest();
            let socket = fs::canonicalize(bench.0.path()).expect("a path").join("socket");
            for line in [
                format!(
                    "-chardev socket,id=disk,path={} -device vhost-user-blk-pci",
                    socket.display()
                ),
                format!("--disk vhost_user=on,socket={} ", socket.display()),
                "-object memory-backend-memfd,".to_owned(),
            ] {
                assert!(said.contains(&line), "{line} is missing in:\n{said}");
            }
            drop(front_end);
        }
    }
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let bench = Bench::new();
    let (first, second) = (bench.raw("first.raw"), bench.raw("second.raw"));
    let mut daemon = bench.start(&first, &["--format", "raw"]);
    bench.assert_refused(&second, &["--format", "raw"], "socket", "answers");
    // While a front-end is attached, too.
    let front_end = UnixStream::connect(bench.path("socket")).expect("connect");
    bench.assert_refused(&second, &["--format", "raw"], "socket", "answers");
    drop(front_end);
    UnixStream::connect(bench.path("socket")).expect("the first still answers");
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_taken_over() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    for _ in 0..3 {
        let mut daemon = bench.start(&image, &["--format", "raw", "--aio", "threads"]);
        daemon.signal("KILL");
        daemon.0.wait().expect("its end");
        let left = fs::symlink_metadata(bench.path("socket")).expect("the old socket");
        assert!(left.file_type().is_socket());
    }
    let mut daemon = bench.start(&image, &["--format", "raw"]);
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    assert!(!bench.path("socket").exists());
}

#[test]
fn an_image_is_made_once_and_then_served_as_it_is() {
    let bench = Bench::new();
    let image = bench.path("disk.qcow2");
    let mut sizes = Vec::new();
    for size in ["1M", "64G"] {
        let mut daemon = bench.start(&image, &["--create", size]);
        daemon.signal("TERM");
        assert_eq!(daemon.wait(), 0, "{}", daemon.rest());
        let header = fs::read(&image).expect("the image");
        sizes.push(u64::from_be_bytes(header[24..32].try_into().expect("eight bytes")));
    }
    assert_eq!(sizes, [1 << 20, 1 << 20]);
}

#[test]
fn the_log_level_is_obeyed() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    for (arguments, environment, has_info) in [
        (&[][..], None, true),
        (&["--log-level", "error"], None, false),
        (&["--log-level", "error"], Some("info"), true),
        (&[], Some("error"), false),
    ] {
        let mut command = bench.command(&image, &["--format", "raw"]);
        command.args(arguments).envs(environment.map(|level| ("RUST_LOG", level)));
        let mut daemon = bench.launch(command);
        daemon.signal("TERM");
        assert_eq!(daemon.wait(), 0);
        let said = daemon.rest();
        assert_eq!(said.contains("INFO"), has_info, "{arguments:?} {environment:?}: {said}");
    }
}
