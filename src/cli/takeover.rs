//! Taking a disk over from a running daemon, and giving it to the next.
//!
//! The successor connects, says hello and is told what guests see of the disk. One that would show
//! them the same makes its threads ready and says that it wants the disk. The daemon then drains
//! its rings, closes the image, and sends what the successor needs: the sockets, the image's files
//! with their locks, and every front-end's connection. The successor opens the image, prepares
//! everything and says that it is ready: with that word the disk is its own. Whatever goes wrong
//! before, the daemon goes on with its image, to which nobody has written; guests see a disk that
//! took its time.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::blk::Device;
use crate::blk::rates::RateLimits;
use crate::cli::doors::{Doors, Heritage};
use crate::error::{Error, Result};
use crate::storage::files::Files;
use crate::sync::Arc;
use crate::vhost::export::Export;
use crate::vhost::handover::{Connections, Descriptors, Place, Received, SessionState};
use crate::vhost::listen::{Identity, Listener};
use crate::vhost::successors::{HELLO, TAKE};

/// The version of everything that is said after hello. Another one is needed only where a field
/// that is new cannot be left out: unknown ones are ignored, and missing ones are as they were
/// before there was such a field.
const PROTOCOL: u32 = 1;
/// How long the successor waits for the daemon to drain its rings.
const DRAINED: Duration = Duration::from_secs(120);
/// How long the daemon waits for the successor to open the image, and guests with it.
const READY: Duration = Duration::from_secs(2);
/// Most bytes that a daemon has to tell at once.
const MOST_BYTES: u64 = 64 << 20;
/// Most descriptors that come with them.
const MOST_DESCRIPTORS: usize = 1 << 16;
/// Says the successor when it can serve. From the moment on at which this is in the socket, the
/// disk is the successor's.
const IS_READY: u8 = b'R';

/// What a successor must know before a ring is stopped for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Greeting {
    protocol: u32,
    /// Of the program.
    version: String,
    process: u32,
    block_size: u32,
    queues: u16,
    queue_size: u16,
    serial: Vec<u8>,
    /// Bytes of the disk.
    size: u64,
    /// The virtio features that are offered.
    features: u64,
    read_only: bool,
    /// Worker threads that run.
    workers: usize,
}

impl Greeting {
    fn of(device: &Device, workers: usize) -> Self {
        let settings = device.settings();
        Self {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            block_size: settings.block_size,
            queues: settings.queues,
            queue_size: settings.queue_size,
            serial: settings.serial.to_vec(),
            size: device.image().size(),
            features: device.features(),
            read_only: device.image().is_read_only(),
            workers,
        }
    }

    /// Refuses to show guests anything else. What depends on the image is looked at if it is there.
    fn check(&self, ours: &Self, with_image: bool) -> Result<()> {
        let text = |serial: &[u8]| {
            let text = String::from_utf8_lossy(serial);
            format!("{:?}", text.trim_end_matches('\0'))
        };
        let mut pairs = vec![
            ("--block-size", self.block_size.to_string(), ours.block_size.to_string()),
            ("--num-queues", self.queues.to_string(), ours.queues.to_string()),
            ("--queue-size", self.queue_size.to_string(), ours.queue_size.to_string()),
            ("--serial", text(&self.serial), text(&ours.serial)),
            ("--read-only", self.read_only.to_string(), ours.read_only.to_string()),
        ];
        if with_image {
            pairs.push(("the disk's size", self.size.to_string(), ours.size.to_string()));
            let missing = self.features & !ours.features;
            pairs.push(("the set of missing features", "0x0".into(), format!("{missing:#x}")));
        }
        match pairs.iter().find(|(_, theirs, ours)| theirs != ours) {
            None => Ok(()),
            Some((name, theirs, ours)) => {
                let why = format!(
                    "guests would see another disk: {name} is {theirs} for the running daemon and \
                     {ours} here; start with its options"
                );
                Err(Error::refused("takeover", why))
            }
        }
    }
}

/// A socket that the daemon listens at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SocketState {
    descriptor: Place,
    /// The file that was made for it.
    file: Option<(OsString, Identity)>,
}

impl SocketState {
    fn of(listener: &Listener, descriptors: &mut Descriptors) -> Self {
        let file = listener.file().map(|(path, identity)| (path.into_os_string(), identity));
        Self { descriptor: descriptors.add(listener), file }
    }

    fn restore(&self, received: &mut Received) -> Result<Listener> {
        let descriptor = OwnedFd::from(received.need(self.descriptor)?);
        let file = self.file.clone().map(|(path, identity)| (PathBuf::from(path), identity));
        Listener::succeed(descriptor, file).map_err(failed("a socket"))
    }
}

/// What the daemon tells its successor.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    listener: Option<SocketState>,
    successors: Option<SocketState>,
    control: Option<SocketState>,
    pidfile: Option<OsString>,
    files: Vec<Place>,
    /// The rates in force, as the command line has them.
    rates: String,
    /// Whether the device has a write cache, as the last guest has left it.
    write_back: Option<bool>,
    /// Microseconds that guests have waited so far.
    waited: u64,
    sessions: Vec<SessionState>,
    /// How many descriptors there are.
    descriptors: usize,
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(format!("takeover: {what}"), error)
}

/// A text with its length before it.
fn frame(value: &impl Serialize) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(value).map_err(|error| failed("the state")(error.into()))?;
    let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
    Ok([&length.to_le_bytes()[..], &text].concat())
}

fn unframe<T: DeserializeOwned>(stream: &mut impl Read) -> std::io::Result<T> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MOST_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut text = Vec::new();
    stream.take(length).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// What a daemon with so many worker threads tells whoever says hello.
///
/// # Errors
/// When it cannot be put into words.
pub(super) fn greeting(export: &Export, workers: usize) -> std::io::Result<Vec<u8>> {
    frame(&Greeting::of(&export.device(), workers)).map_err(std::io::Error::other)
}

/// The process at the other end.
pub(super) fn process(stream: &UnixStream) -> Option<u32> {
    let credentials = getsockopt(stream, sockopt::PeerCredentials).ok()?;
    u32::try_from(credentials.pid()).ok()
}

/// A daemon that would give us its disk.
#[derive(Debug)]
pub(super) struct Predecessor {
    stream: UnixStream,
    path: PathBuf,
    greeting: Greeting,
}

/// Says hello to the daemon that listens at `path`; `None` when nobody does.
///
/// # Errors
/// When somebody answers who is no daemon, or one of a version that is not known here.
pub(super) fn ask(path: &Path) -> Result<Option<Predecessor>> {
    let name = || path.display().to_string();
    let mut stream = match UnixStream::connect(path) {
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            return Ok(None);
        }
        stream => stream.map_err(|error| Error::io(name(), error))?,
    };
    let asked = |stream: &mut UnixStream| -> std::io::Result<Greeting> {
        stream.set_read_timeout(Some(DRAINED))?;
        stream.write_all(&HELLO)?;
        unframe(stream)
    };
    let greeting = asked(&mut stream).map_err(|error| {
        let why = format!(
            "who listens there does not answer as a daemon does, or gives its disk to somebody \
             else now: {error}"
        );
        Error::refused(name(), why)
    })?;
    if greeting.protocol != PROTOCOL {
        let why = format!(
            "the daemon there is version {} and hands over in another way ({}, here it is \
             {PROTOCOL}); end it and start this one",
            greeting.version, greeting.protocol
        );
        return Err(Error::refused(name(), why));
    }
    Ok(Some(Predecessor { stream, path: path.to_owned(), greeting }))
}

impl Predecessor {
    /// Worker threads that run there.
    pub(super) fn workers(&self) -> usize {
        self.greeting.workers
    }

    /// Refuses to take over if guests would see another disk than that of `device`, which has no
    /// image yet. Nothing has been stopped so far.
    ///
    /// # Errors
    /// Names what would be different.
    pub(super) fn check(&self, device: &Device, read_only: bool) -> Result<()> {
        let ours = Greeting { read_only, ..Greeting::of(device, 0) };
        self.greeting.check(&ours, false)
    }

    /// Has the daemon stop and tell what it has. Guests wait from now on.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn take(mut self) -> Result<Inheritance> {
        let taken = |stream: &mut UnixStream| -> std::io::Result<_> {
            stream.write_all(&[TAKE])?;
            let state: State = unframe(stream)?;
            let since = Instant::now();
            let received = receive(stream, state.descriptors)?;
            Ok((state, received, since))
        };
        let (state, files, since) = taken(&mut self.stream).map_err(|error| {
            let why =
                format!("the daemon there does not give its disk; its log says why ({error})");
            Error::refused(self.path.display().to_string(), why)
        })?;
        let (sessions, descriptors) = (state.sessions.len(), files.len());
        tracing::info!("process {} gives its disk:", self.greeting.process);
        tracing::info!("{sessions} front-ends and {descriptors} descriptors");
        let received = Received::new(files);
        let Self { stream, greeting, .. } = self;
        Ok(Inheritance { stream, greeting, state, received, since })
    }
}

/// Receives descriptors, each with a byte of its own.
fn receive(stream: &UnixStream, count: usize) -> std::io::Result<Vec<File>> {
    if count > MOST_DESCRIPTORS {
        return Err(ErrorKind::InvalidData.into());
    }
    let next = |_| {
        let (bytes, file) = stream
            .recv_with_fd(&mut [0])
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        file.filter(|_| bytes == 1).ok_or_else(|| ErrorKind::UnexpectedEof.into())
    };
    (0..count).map(next).collect()
}

/// A disk that a daemon is about to give us.
#[derive(Debug)]
pub(super) struct Inheritance {
    stream: UnixStream,
    greeting: Greeting,
    state: State,
    received: Received,
    /// When the state came.
    since: Instant,
}

impl Inheritance {
    /// The files of the image at `path`, open and locked.
    ///
    /// # Errors
    /// When the daemon serves another image, or descriptors are missing.
    pub(super) fn files(&mut self, path: &Path) -> Result<Vec<File>> {
        let received = self.state.files.iter().map(|place| self.received.need(*place));
        let files: Vec<File> = received.collect::<Result<_>>()?;
        let ours = std::fs::metadata(path);
        let ours = ours.map_err(|error| Error::io(path.display().to_string(), error))?;
        let is_same = |file: &File| {
            let identity = |of: &Metadata| (of.dev(), of.ino());
            file.metadata().is_ok_and(|theirs| identity(&theirs) == identity(&ours))
        };
        if !files.iter().any(is_same) {
            let why = "the daemon at --takeover serves another image; give each its own socket";
            return Err(Error::refused(path.display().to_string(), why));
        }
        Ok(files)
    }

    /// Refuses to go on if guests would see another disk than that of `device`.
    ///
    /// # Errors
    /// Names what would be different.
    pub(super) fn check(&self, device: &Device) -> Result<()> {
        self.greeting.check(&Greeting::of(device, 0), true)
    }

    /// The rates that were in force.
    pub(super) fn rates(&self) -> RateLimits {
        // A text that makes no sense here is from another version, and the command line has the
        // last word anyway.
        self.state.rates.parse().unwrap_or_default()
    }

    /// The sockets and the file for the process's number; none of the files is ours yet.
    ///
    /// # Errors
    /// When descriptors are missing.
    pub(super) fn heritage(&mut self) -> Result<Heritage> {
        let received = &mut self.received;
        let mut restore = |state: &Option<SocketState>| {
            state.as_ref().map(|state| state.restore(received)).transpose()
        };
        Ok(Heritage {
            listener: restore(&self.state.listener)?,
            successors: restore(&self.state.successors)?,
            control: restore(&self.state.control)?,
            pidfile: self.state.pidfile.clone().map(PathBuf::from),
        })
    }

    /// The front-ends, none of which is served yet.
    ///
    /// # Errors
    /// When one of them cannot be served here as it was.
    pub(super) fn connections(&mut self, export: &Arc<Export>) -> Result<Connections> {
        let waited = Duration::from_micros(self.state.waited);
        let waited = waited.saturating_add(self.since.elapsed());
        Connections::restore(&self.state.sessions, &mut self.received, export, waited)
    }

    /// Whether the device had a write cache, if the daemon knows.
    pub(super) fn write_back(&self) -> Option<bool> {
        self.state.write_back
    }

    /// Says that everything is ready: the disk is ours then. Until this has returned nothing may be
    /// written.
    ///
    /// # Errors
    /// When the daemon has not waited for us: it serves the disk itself.
    pub(super) fn confirm(mut self) -> Result<()> {
        let said = self.stream.write_all(&[IS_READY]);
        said.map_err(failed("the daemon has not waited, and serves the disk itself"))?;
        tracing::info!("process {} has let go", self.greeting.process);
        Ok(())
    }
}

/// What is left of the time that guests may be kept waiting.
struct Patience(Instant);

impl Patience {
    /// Lets no call on `stream` take longer than what is left.
    fn apply(&self, stream: &UnixStream) -> std::io::Result<()> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))
    }
}

/// Gives everything to the successor at the other end of `stream`, and lets go. The rings are
/// drained and the image is closed.
///
/// # Errors
/// When the successor cannot serve, or is not ready after two seconds; then everything is as
/// before.
pub(super) fn hand_over(
    mut stream: UnixStream,
    doors: &Doors<'_>,
    files: &Files,
    device: &Device,
    connections: &Connections,
) -> Result<()> {
    let (rates, write_back) = (device.limiter().get(), device.is_write_back());
    let open = files.descriptors().map_err(failed("copying descriptors"))?;
    let mut descriptors = Descriptors::default();
    let pidfile = doors.announced.pidfile().map(|path| path.as_os_str().to_owned());
    let mut state = State {
        listener: doors.listener().map(|listener| SocketState::of(listener, &mut descriptors)),
        successors: doors.successors.as_ref().map(|at| SocketState::of(at, &mut descriptors)),
        control: doors
            .control
            .as_ref()
            .map(|socket| SocketState::of(socket.listener(), &mut descriptors)),
        pidfile,
        files: open.iter().map(|file| descriptors.add(file)).collect(),
        rates: rates.to_string(),
        write_back: Some(write_back),
        waited: u64::try_from(connections.waited().as_micros()).unwrap_or(u64::MAX),
        sessions: connections.save(&mut descriptors),
        descriptors: 0,
    };
    state.descriptors = descriptors.list().len();
    let text = frame(&state)?;
    let patience = Patience(Instant::now() + READY);
    let mut give = || -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        patience.apply(&stream)?;
        stream.write_all(&text)?;
        for descriptor in descriptors.list() {
            patience.apply(&stream)?;
            let sent = stream.send_with_fd(&[0u8][..], *descriptor);
            sent.map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        }
        hear(&mut stream, &patience)
    };
    give().map_err(failed("the successor has failed"))
}

/// Waits until the successor has said that it is ready. It has or it has not: its word gets into
/// the socket before that is closed for it, or it finds it closed and knows that it came too late.
fn hear(stream: &mut UnixStream, patience: &Patience) -> std::io::Result<()> {
    let mut answer = [0];
    let heard = patience.apply(stream).and_then(|()| stream.read_exact(&mut answer));
    if let Err(error) = heard {
        stream.shutdown(Shutdown::Read)?;
        stream.set_nonblocking(true)?;
        stream.read_exact(&mut answer).map_err(|_| error)?;
    }
    if answer == [IS_READY] {
        return Ok(());
    }
    Err(std::io::Error::other("it said something that nobody understands"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::Settings;

    fn greeting(settings: Settings) -> Greeting {
        Greeting::of(&Device::of_no_bytes(settings), 3)
    }

    #[test]
    fn another_disk_is_refused_by_the_name_of_what_differs() {
        let theirs = greeting(Settings::default());
        theirs.check(&greeting(Settings::default()), true).expect("the same disk");
        let differs = |change: fn(&mut Greeting), with_image: bool| {
            let mut ours = greeting(Settings::default());
            change(&mut ours);
            theirs.check(&ours, with_image).err().map(|error| error.to_string())
        };
        for (name, change) in [
            ("--block-size is 512", (|ours| ours.block_size = 4096) as fn(&mut Greeting)),
            ("--num-queues is 64", |ours| ours.queues = 65),
            ("--queue-size is 1024", |ours| ours.queue_size = 128),
            ("--serial is \"vhost-user-qcow2\"", |ours| ours.serial = b"x\0".to_vec()),
            ("--read-only is true", |ours| ours.read_only = false),
        ] {
            let why = differs(change, false).unwrap_or_default();
            assert!(why.contains(name), "{name}: {why}");
        }
        assert_eq!(differs(|ours| ours.size = 512, false), None);
        assert!(differs(|ours| ours.size = 512, true).is_some_and(|why| why.contains("size is 0")));
        assert!(
            differs(|ours| ours.features = 0, true).is_some_and(|why| why.contains("features"))
        );
        // More than there was shows nothing else to a guest that runs.
        assert_eq!(differs(|ours| ours.features |= 1 << 50, true), None);
    }

    #[test]
    fn texts_of_other_versions_are_understood() {
        let text = frame(&greeting(Settings::default())).expect("a text");
        let back: Greeting = unframe(&mut &text[..]).expect("the same");
        assert_eq!(back, greeting(Settings::default()));
        let mut value: serde_json::Value = unframe(&mut &text[..]).expect("JSON");
        value["something new"] = serde_json::json!([1, { "a": 2 }]);
        value.as_object_mut().expect("an object").remove("workers");
        let text = frame(&value).expect("a text");
        let back: Greeting = unframe(&mut &text[..]).expect("nearly the same");
        assert_eq!((back.workers, back.queues), (0, 64));
        let state: State = serde_json::from_str("{\"new\": 1}").expect("an empty state");
        assert_eq!(state, State::default());
        let endless = u64::MAX.to_le_bytes();
        unframe::<Greeting>(&mut &endless[..]).expect_err("too long");
        unframe::<Greeting>(&mut &[9, 0, 0, 0, 0, 0, 0, 0, b'{'][..]).expect_err("cut off");
    }
}
