//! The daemon under test as a child process.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::scratch::{Scratch, target_directory};

/// How long starting and stopping may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon. Dropping it kills it; if the test is failing, its log is printed as well.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

/// What the daemon holds in memory, in KiB, as `/proc/PID/status` tells it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Heap and stacks.
    pub anonymous_kib: u64,
    /// The program itself and other mapped files.
    pub file_kib: u64,
    /// Memory shared with the guest that the daemon has touched. It belongs to the guest and is
    /// accounted to the daemon only because it has a mapping of it.
    pub shared_kib: u64,
}

impl Daemon {
    /// Starts the daemon on `image` with further arguments and waits until it listens.
    #[must_use]
    pub fn start(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        let mut daemon = Self::spawn(scratch, image, arguments);
        let deadline = Instant::now() + PATIENCE;
        while !is_listening(&daemon.socket) {
            if let Some(status) = daemon.child.try_wait().expect("ask for the daemon's state") {
                panic!("the daemon gave up before it listened: {status}");
            }
            assert!(Instant::now() < deadline, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    /// Starts the daemon without waiting for anything: it may well refuse what it is given.
    #[must_use]
    pub fn spawn(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        let socket = scratch.socket();
        let log = scratch.file(&format!("daemon-{}.log", fastrand::u64(..)));
        let stderr = File::create(&log).expect("make the daemon's log");
        let program = program();
        let child = Command::new(&program)
            .args([OsStr::new("--socket"), socket.as_os_str()])
            .args([OsStr::new("--image"), image.as_os_str()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(stderr.try_clone().expect("share the daemon's log"))
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        Self { child, socket, log }
    }

    /// The daemon's process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the daemon has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends the daemon as an operator does and expects that it tidies up.
    pub fn terminate(mut self) {
        self.signal(Signal::Term);
        let status = self.wait();
        assert!(status.success(), "after SIGTERM the daemon ended with {status}");
        assert!(!self.socket.exists(), "after SIGTERM the socket is still there");
    }

    /// Ends the daemon without giving it any chance to tidy up.
    pub fn kill(mut self) {
        self.child.kill().expect("kill the daemon");
        let status = self.wait();
        assert_eq!(status.code(), None, "the daemon was gone before it was killed: {status}");
    }

    /// Waits until the daemon has ended by itself.
    ///
    /// Takes a mutable reference, so that a caller may still look at the log.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("ask for the daemon's state") {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How the daemon has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("ask for the daemon's state")
    }

    /// Fails the test unless the daemon is still running.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("ask for the daemon's state") {
            panic!("the daemon ended with {status}");
        }
    }

    /// What the daemon holds in memory now.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let text = self.read_proc("status");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_whitespace().next());
            number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {name}"))
        };
        Memory {
            anonymous_kib: field("RssAnon:"),
            file_kib: field("RssFile:"),
            shared_kib: field("RssShmem:"),
        }
    }

    /// Processor time the daemon has used so far, in clock ticks (hundredths of a second).
    #[must_use]
    pub fn processor_ticks(&self) -> u64 {
        let text = self.read_proc("stat");
        // The program's name may contain spaces, so fields are counted from behind it. The first
        // field behind it is the third of the line; user and system time are 14th and 15th.
        let (_, behind_name) = text.rsplit_once(')').expect("a program name in parentheses");
        let fields: Vec<&str> = behind_name.split_whitespace().collect();
        let ticks = |index: usize| fields[index].parse::<u64>().expect("a number of ticks");
        ticks(11) + ticks(12)
    }

    fn read_proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("signal the daemon");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail harmlessly when the daemon has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- log of the daemon ----\n{}---- end of it ----", self.log());
        }
    }
}

/// Whether a process listens on `socket`. Unlike connecting, looking does not disturb it.
#[must_use]
pub fn is_listening(socket: &Path) -> bool {
    /// What `/proc/net/unix` shows as flags of a listening socket.
    const LISTENING: &str = "00010000";
    let is_socket = fs::metadata(socket).is_ok_and(|metadata| metadata.file_type().is_socket());
    let table = fs::read_to_string("/proc/net/unix").expect("read the table of sockets");
    let name = socket.to_str().expect("a socket path in plain text");
    is_socket
        && table.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(3) == Some(&LISTENING) && fields.get(7) == Some(&name)
        })
}

/// The program under test: `VHOST_USER_QCOW2` names it, otherwise it is the release build.
pub fn program() -> PathBuf {
    let program = match std::env::var_os("VHOST_USER_QCOW2") {
        Some(path) => PathBuf::from(path),
        None => target_directory().join("release/vhost-user-qcow2"),
    };
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --release` first, or set VHOST_USER_QCOW2",
        program.display()
    );
    program
}
