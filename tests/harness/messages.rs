//! A front-end that says anything, over a real socket to a session with workers.
//!
//! What must hold: once the front-end has gone the connection ends, all its descriptors are closed,
//! and the front-end that comes next is served. One process serves all inputs, as one daemon serves
//! one front-end after the other.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::raw::Raw;
use vhost_user_qcow2::storage::FileId;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::vhost;
use vhost_user_qcow2::vhost::export::Export;
use vhost_user_qcow2::vhost::listen::Listener;
use vhost_user_qcow2::worker::pool::{EngineSource, Pool};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::front_end::{Guest, Menu, REGIONS, USER, region};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const MOST_STEPS: usize = 48;
const QUEUES: u16 = 4;
const DISK: u64 = 64 << 10;

pub(crate) const NEED_REPLY: u32 = 8;
pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;

/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE,
/// CONFIGURE_MEM_SLOTS and DEVICE_STATE.
pub(crate) const PROTOCOL: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 19;
/// FLUSH, INDIRECT, PROTOCOL_FEATURES and VERSION_1.
pub(crate) const FEATURES: u64 = 1 << 9 | 1 << 28 | 1 << 30 | 1 << 32;

/// What became of an input, so that a test can tell that it does not only make refusals.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Messages that were sent.
    pub sent: u32,
    /// Bytes of answers.
    pub answered: usize,
    /// Requests of the guest that were done.
    pub served: u32,
}

/// Runs one input, in a service that is started with the first.
///
/// # Panics
/// When something that must hold does not.
pub fn run(input: &[u8]) -> Outcome {
    static SERVICE: OnceLock<Mutex<Service>> = OnceLock::new();
    let service = SERVICE.get_or_init(|| Mutex::new(Service::start()));
    service.lock().expect("no input has failed").run(input)
}

/// A session with its workers, in threads of this process.
pub struct Service {
    directory: tempfile::TempDir,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    pub(crate) guest: Guest,
    /// What the next front-end has to do with it: nothing.
    pub(crate) hostile: Guest,
    pub(crate) menu: Menu,
    /// Descriptors of the process while a front-end that has said nothing else is connected.
    descriptors: usize,
    /// Its threads at that time.
    threads: usize,
}

impl Service {
    /// Starts it, and serves one front-end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = Listener::bind(&directory.path().join("socket")).expect("listen");
        let (stop, stopped) = UnixStream::pair().expect("a pair");
        let thread = thread::spawn(move || serve(&listener, &stopped));
        let (guest, hostile, menu) = (Guest::new(), Guest::new(), Menu::new());
        let mut service = Self {
            directory,
            stop: Some(stop),
            thread: Some(thread),
            guest,
            hostile,
            menu,
            descriptors: 0,
            threads: 0,
        };
        // Both workers are started, and what they keep open is theirs.
        service.serve_next();
        service.descriptors = {
            let mut front_end = service.connect();
            front_end.ask(GET_FEATURES, &[]);
            thread::sleep(Duration::from_millis(50));
            count("fd")
        };
        service.threads = count("task");
        service
    }

    pub(crate) fn connect(&self) -> FrontEnd {
        let socket = UnixStream::connect(self.directory.path().join("socket")).expect("connect");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        socket.set_write_timeout(Some(PATIENCE)).expect("a time-out");
        FrontEnd { socket, sent: 0, answered: 0 }
    }

    /// Runs one input.
    ///
    /// # Panics
    /// When something that must hold does not.
    pub fn run(&mut self, input: &[u8]) -> Outcome {
        self.guest.reset();
        let mut front_end = self.connect();
        // The end of the input is the end of the choices.
        let _ = self.say_all(&mut front_end, &mut Unstructured::new(input));
        front_end.hang_up();
        let (sent, answered) = (front_end.sent, front_end.answered);
        drop(front_end);
        let served = self.guest.used();
        self.assert_all_closed();
        self.serve_next();
        Outcome { sent, answered, served }
    }

    fn say_all(&self, front_end: &mut FrontEnd, input: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..MOST_STEPS {
            if input.is_empty() || !self.say(front_end, input)? {
                break;
            }
        }
        Ok(())
    }

    /// Says one thing; returns whether the back-end still listens.
    fn say(&self, front_end: &mut FrontEnd, input: &mut Unstructured<'_>) -> Result<bool> {
        let queue = |choice: u8| u32::from(choice % 5);
        Ok(match input.arbitrary::<u8>()? {
            0..0x10 => Self::negotiate(front_end),
            0x10..0x20 => Self::add_memory(&self.guest, front_end, 1),
            choice @ 0x20..0x40 => Self::set_up(&self.guest, front_end, queue(choice), 1),
            choice @ 0x40..0x50 => {
                self.guest.kick(usize::from(choice % 2));
                true
            }
            choice @ 0x50..0x60 => {
                let bytes = input.bytes(usize::from(choice & 0xf).min(input.len()))?.to_vec();
                front_end.put(&bytes, &[])
            }
            0x60..0x68 => front_end.drain(),
            _ => self.message(front_end, input)?,
        })
    }

    /// A message whose payload has the form that its request asks for, or another.
    fn message(&self, front_end: &mut FrontEnd, input: &mut Unstructured<'_>) -> Result<bool> {
        let request = match input.arbitrary::<u8>()? {
            choice @ 0..0xf0 => u32::from(choice % 48),
            _ => input.arbitrary()?,
        };
        let form: u8 = input.arbitrary()?;
        let flags = match form & 0x30 {
            0 | 0x10 => 1,
            0x20 => 1 | NEED_REPLY,
            _ if form & 0xc0 == 0xc0 => u32::from(input.arbitrary::<u8>()?),
            _ => 1 | NEED_REPLY,
        };
        // Usually the one that belongs to the request.
        let like = if form & 7 == 7 { u32::from(input.arbitrary::<u8>()? % 48) } else { request };
        let payload = self.payload(like, input)?;
        let mut files = Vec::new();
        let count = match form & 8 {
            0 => usize::from(usual_files(request, &payload)),
            _ => usize::from(input.arbitrary::<u8>()? % 34),
        };
        for _ in 0..count {
            files.push(self.file(request, input)?);
        }
        Ok(front_end.send(request, flags, &payload, &files))
    }

    fn payload(&self, request: u32, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let small = |input: &mut Unstructured<'_>| -> Result<u32> {
            Ok(match input.arbitrary::<u8>()? {
                choice @ 0..0xe0 => u32::from(choice % 32),
                0xe0..0xf0 => 1 << (input.arbitrary::<u8>()? % 32),
                _ => input.arbitrary()?,
            })
        };
        Ok(match request {
            SET_FEATURES => (FEATURES ^ bit(input)?).to_ne_bytes().to_vec(),
            SET_PROTOCOL_FEATURES => (PROTOCOL ^ bit(input)?).to_ne_bytes().to_vec(),
            SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
                [small(input)? % 8, small(input)?].map(u32::to_ne_bytes).concat()
            }
            SET_VRING_ADDR => {
                let mut bytes =
                    [small(input)? % 8, small(input)? & 1].map(u32::to_ne_bytes).concat();
                for part in 0..4 {
                    bytes.extend(address(part, input)?.to_ne_bytes());
                }
                bytes
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                let index = u64::from(small(input)?);
                (((index & 0x1f) % 6) | ((index & 0x20) << 3)).to_ne_bytes().to_vec()
            }
            GET_CONFIG | SET_CONFIG => {
                let len = small(input)?;
                let mut bytes =
                    [small(input)?.wrapping_add(30), len, 0].map(u32::to_ne_bytes).concat();
                bytes.extend(std::iter::repeat_n(1, len.min(300) as usize));
                bytes
            }
            SET_MEM_TABLE => {
                let count = u32::from(input.arbitrary::<u8>()? % 10);
                let mut bytes = [count, 0].map(u32::to_ne_bytes).concat();
                for number in 0..count {
                    bytes.extend(spoiled_region(number as usize, input)?);
                }
                bytes
            }
            ADD_MEM_REG | REM_MEM_REG => {
                let number = usize::from(input.arbitrary::<u8>()?);
                [0u64.to_ne_bytes().to_vec(), spoiled_region(number, input)?].concat()
            }
            _ => {
                let len = usize::from(input.arbitrary::<u8>()? % 64).min(input.len());
                input.bytes(len)?.to_vec()
            }
        })
    }

    /// A descriptor for a request: the one that belongs to it, or another.
    fn file(&self, request: u32, input: &mut Unstructured<'_>) -> Result<RawFd> {
        let choice = input.arbitrary::<u8>()?;
        Ok(match (choice, request) {
            (0..0xc0, SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG) => self.guest.file.as_raw_fd(),
            (0..0xc0, SET_VRING_KICK) => self.guest.kick_end(usize::from(choice) % 2),
            (0..0xc0, SET_VRING_CALL) => self.guest.call_end(usize::from(choice) % 2),
            (0..0xc0, _) => self.guest.error_end(),
            _ => self.menu.pick(choice),
        })
    }

    fn negotiate(front_end: &mut FrontEnd) -> bool {
        front_end.send(GET_FEATURES, 1, &[], &[])
            && front_end.send(SET_PROTOCOL_FEATURES, 1, &PROTOCOL.to_ne_bytes(), &[])
            && front_end.send(SET_FEATURES, 1, &FEATURES.to_ne_bytes(), &[])
    }

    fn add_memory(guest: &Guest, front_end: &mut FrontEnd, flags: u32) -> bool {
        let mut payload = [REGIONS.len() as u32, 0].map(u32::to_ne_bytes).concat();
        REGIONS.iter().for_each(|part| payload.extend(region(*part)));
        let files = REGIONS.map(|_| guest.file.as_raw_fd());
        front_end.send(SET_MEM_TABLE, flags, &payload, &files)
    }

    /// Describes a ring in full and enables it.
    fn set_up(guest: &Guest, front_end: &mut FrontEnd, queue: u32, flags: u32) -> bool {
        let state = |value: u32| [queue, value].map(u32::to_ne_bytes).concat();
        let index = u64::from(queue).to_ne_bytes();
        let place = queue as usize % 2;
        let mut addresses = state(0);
        for address in guest.addresses(place).into_iter().chain([0]) {
            addresses.extend(address.to_ne_bytes());
        }
        front_end.send(SET_VRING_NUM, 1, &state(u32::from(Guest::SIZE)), &[])
            && front_end.send(SET_VRING_BASE, 1, &state(0), &[])
            && front_end.send(SET_VRING_ADDR, 1, &addresses, &[])
            && front_end.send(SET_VRING_CALL, 1, &index, &[guest.call_end(place)])
            && front_end.send(SET_VRING_KICK, 1, &index, &[guest.kick_end(place)])
            && front_end.send(SET_VRING_ENABLE, flags, &state(1), &[])
    }

    /// What the front-end before has passed is closed, and nothing else has gone.
    pub(crate) fn assert_all_closed(&self) {
        let mut front_end = self.connect();
        front_end.ask(GET_FEATURES, &[]);
        // A worker closes what it had after it has said that it has stopped.
        let start = Instant::now();
        while count("fd") != self.descriptors {
            let (now, before) = (count("fd"), self.descriptors);
            assert!(start.elapsed() < PATIENCE, "{now} descriptors are open, {before} were");
            thread::sleep(Duration::from_micros(100));
        }
        assert_eq!(count("task"), self.threads, "threads");
    }

    /// Serves a front-end that does everything right.
    fn serve_next(&mut self) {
        let mut front_end = self.attach();
        self.assert_served();
        front_end.hang_up();
    }

    /// Connects a front-end that does everything right.
    pub(crate) fn attach(&mut self) -> FrontEnd {
        self.guest.reset();
        let mut front_end = self.connect();
        assert!(Self::negotiate(&mut front_end));
        assert!(Self::add_memory(&self.guest, &mut front_end, 9));
        for queue in 0..2 {
            assert!(Self::set_up(&self.guest, &mut front_end, queue, 1));
        }
        front_end
    }

    /// Its guest is served.
    fn assert_served(&mut self) {
        (0..2).for_each(|queue| self.guest.kick(queue));
        self.guest.wait_for(2 * Guest::REQUESTS, PATIENCE);
        self.guest.assert_done();
    }

    /// The same, and what was written is read.
    pub(crate) fn assert_keeps(&mut self, byte: u8) {
        if self.guest.used() < 2 * Guest::REQUESTS {
            self.assert_served();
        }
        self.guest.assert_keeps(byte, PATIENCE);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_none_or(|end| end.is_ok()), "the service failed");
    }
}

fn serve(listener: &Listener, stopped: &UnixStream) {
    let image = Arc::new(Image::from_raw(Raw::new(FileId(0), DISK), false));
    let settings = Settings { queues: QUEUES, queue_size: 256, ..Settings::default() };
    // Each worker has a disk of its own, since a simulated one belongs to one thread.
    let engines: EngineSource = Arc::new(|lane| {
        let disk = MemDisk::new();
        disk.add(Path::new("disk"), vec![0x77; DISK as usize]);
        Ok(Box::new(disk.engine(lane, 0)))
    });
    let pool = Pool::new(Arc::new(Device::new(image, settings)), engines, 2);
    let export = Arc::new(Export::new(pool));
    vhost::serve(listener, &export, stopped).expect("the service");
}

/// How many descriptors (`fd`) or threads (`task`) this process has.
fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).expect("proc is mounted").count()
}

fn bit(input: &mut Unstructured<'_>) -> Result<u64> {
    let choice = input.arbitrary::<u8>()?;
    Ok(if choice < 0x80 { 0 } else { 1 << (choice % 64) })
}

/// How many descriptors usually come with a message.
fn usual_files(request: u32, payload: &[u8]) -> u8 {
    match request {
        SET_MEM_TABLE => payload.first().copied().unwrap_or_default().min(33),
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
            u8::from(payload.get(1).is_none_or(|high| high & 1 == 0))
        }
        ADD_MEM_REG => 1,
        _ => 0,
    }
}

/// An address of a part of a ring: descriptors, used ring, available ring, log.
fn address(part: u64, input: &mut Unstructured<'_>) -> Result<u64> {
    let choice = u64::from(input.arbitrary::<u8>()?);
    let usual = USER + [0, 0x2_0000, 0x1_0000, 0][part as usize];
    Ok(match choice {
        0..0x80 => usual + choice / 64 * 0x3_0000,
        0x80..0xc0 => usual + (choice & 0x3f) * 8,
        0xc0..0xe0 => USER + REGIONS[0].1 - (choice & 0x1f) * 16,
        0xe0..0xf0 => choice & 0xf,
        _ => input.arbitrary()?,
    })
}

/// One of the guest's regions, with perhaps one number changed.
fn spoiled_region(number: usize, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut bytes = region(REGIONS[number % REGIONS.len()]);
    let choice = usize::from(input.arbitrary::<u8>()?);
    if choice & 0x80 != 0 {
        let at = choice % 4 * 8;
        let value = match choice & 0x60 {
            0 => u64::MAX - u64::from(input.arbitrary::<u8>()?),
            0x20 => u64::from(input.arbitrary::<u8>()?) * 0x800,
            0x40 => 1 << (input.arbitrary::<u8>()? % 64),
            _ => input.arbitrary()?,
        };
        bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }
    Ok(bytes)
}

/// One connection.
pub(crate) struct FrontEnd {
    pub(crate) socket: UnixStream,
    pub(crate) sent: u32,
    pub(crate) answered: usize,
}

impl FrontEnd {
    /// Sends a message; returns whether somebody listens.
    fn send(&mut self, request: u32, flags: u32, payload: &[u8], files: &[RawFd]) -> bool {
        let mut message = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        self.sent += 1;
        self.put(&message, files)
    }

    pub(crate) fn put(&mut self, bytes: &[u8], files: &[RawFd]) -> bool {
        match files {
            _ if bytes.is_empty() => true,
            [] => self.socket.write_all(bytes).is_ok(),
            _ => self.socket.send_with_fds(&[bytes], files).is_ok_and(|sent| sent == bytes.len()),
        }
    }

    /// Asks a question that has an answer, and waits for it.
    fn ask(&mut self, request: u32, payload: &[u8]) {
        assert!(self.send(request, 1, payload, &[]), "nobody listens");
        let mut answer = [0; 20];
        self.socket.read_exact(&mut answer).expect("an answer");
    }

    /// Reads what has been answered, so that the back-end can go on answering.
    pub(crate) fn drain(&mut self) -> bool {
        self.socket.set_nonblocking(true).expect("a socket");
        let mut bytes = [0; 4096];
        let read = self.socket.read(&mut bytes);
        self.socket.set_nonblocking(false).expect("a socket");
        match read {
            Ok(0) => false,
            Ok(len) => {
                self.answered += len;
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Says that nothing more will come, and reads the answers until the back-end hangs up too.
    pub(crate) fn hang_up(&mut self) {
        // It may have hung up before.
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut bytes = [0; 4096];
        loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => return,
                Ok(len) => self.answered += len,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                // The fuzzer has a timer.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("the connection does not end: {error}"),
            }
        }
    }
}

/// Opens a file for reading.
pub(crate) fn open(path: &str) -> File {
    File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}
