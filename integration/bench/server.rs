//! The two servers as child processes, and what `/proc` tells of them.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use integration::daemon::is_listening;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long starting and stopping may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The programs that are measured.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) ours: PathBuf,
    /// Another build of the daemon, which takes the place of qemu-storage-daemon.
    pub(crate) against: Option<PathBuf>,
}

impl Programs {
    /// The ways in which the other side can be run.
    pub(crate) fn modes(&self) -> &'static [Mode] {
        match self.against {
            Some(_) => &[Mode::Build],
            None => &[Mode::IoUring, Mode::Threads, Mode::Native],
        }
    }

    /// What is run on one side.
    fn command(
        &self,
        side: Side,
        (socket, disk): (&Path, &Disk),
        direct: bool,
        queues: usize,
    ) -> Command {
        match (side, &self.against) {
            (Side::Ours, _) => ours(&self.ours, socket, disk, direct),
            (Side::Theirs(_), Some(build)) => ours(build, socket, disk, direct),
            (Side::Theirs(mode), None) => theirs(mode, socket, disk, direct, queues),
        }
    }
}

/// How qemu-storage-daemon reads and writes files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    IoUring,
    Threads,
    /// Linux AIO, which QEMU allows with `cache.direct=on` only: it goes around the page cache even
    /// where the others do not.
    Native,
    /// Another build of the daemon is run instead.
    Build,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
            Self::Native => "native",
            Self::Build => "other build",
        }
    }
}

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Theirs(Mode),
}

impl Side {
    /// A word for file names: each side has its own copy of an image that is written to.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Theirs(_) => "theirs",
        }
    }
}

/// An image file.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
    /// The files of the layers below.
    pub(crate) backing: Vec<PathBuf>,
}

impl Disk {
    pub(crate) fn qcow2(path: PathBuf) -> Self {
        Self { path, format: "qcow2", backing: Vec::new() }
    }

    pub(crate) fn raw(path: PathBuf) -> Self {
        Self { path, format: "raw", backing: Vec::new() }
    }
}

/// Memory of a server's own, in MiB: heap and stacks, and mapped files.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) anonymous: f64,
    pub(crate) file: f64,
}

/// A running server; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    directory: TempDir,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub(crate) fn start(
        programs: &Programs,
        side: Side,
        disk: &Disk,
        direct: bool,
        queues: usize,
    ) -> Result<Self> {
        let mut server = Self::spawn(programs, side, disk, direct, queues)?;
        let deadline = Instant::now() + PATIENCE;
        while !is_listening(&server.socket()) {
            if server.child.try_wait()?.is_some() || Instant::now() > deadline {
                return Err(Error::other(format!("no server: {}", server.log())));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(server)
    }

    /// Starts a server and waits for nothing.
    pub(crate) fn spawn(
        programs: &Programs,
        side: Side,
        disk: &Disk,
        direct: bool,
        queues: usize,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("vub-bench-").tempdir()?;
        let socket = directory.path().join("socket");
        let mut command = programs.command(side, (&socket, disk), direct, queues);
        let log = File::create(directory.path().join("log"))?;
        let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().map_err(|error| {
            Error::new(error.kind(), format!("cannot start {:?}: {error}", command.get_program()))
        })?;
        Ok(Self { child, directory })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the server has said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Processor time used so far, summed over the threads that are there now, which include those
    /// that the kernel runs for io_uring.
    pub(crate) fn processor_time(&self) -> Result<Duration> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // A thread may end between the two looks.
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
            sum += text.split(' ').next().and_then(|first| first.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(sum))
    }

    /// What the server holds in memory, without what it shares with the guest.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
            number.unwrap_or(f64::NAN) / 1024.0
        };
        Ok(Memory { anonymous: field("RssAnon:"), file: field("RssFile:") })
    }

    /// Ends the server as an operator does.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::Term)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err(Error::other("a server does not end"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail harmlessly when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon as its users run it, with nothing but what the row demands.
fn ours(program: &Path, socket: &Path, disk: &Disk, direct: bool) -> Command {
    let mut command = Command::new(program);
    command.arg("--socket").arg(socket).arg("--image").arg(&disk.path);
    command.args(["--format", disk.format]);
    if direct {
        command.args(["--cache", "none"]);
    }
    command
}

fn theirs(mode: Mode, socket: &Path, disk: &Disk, direct: bool, queues: usize) -> Command {
    let direct = if direct || mode == Mode::Native { "on" } else { "off" };
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=file,filename={},aio={},cache.direct={direct},discard=unmap",
        disk.path.display(),
        mode.name()
    ));
    let format = disk.format;
    command.arg("--blockdev");
    command.arg(format!("driver={format},node-name=disk,file=file,discard=unmap"));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,addr.type=unix,addr.path={},node-name=disk,writable=on,\
         num-queues={queues}",
        socket.display()
    ));
    command
}
