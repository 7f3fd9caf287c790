//! A front-end made by hand: it puts messages on the socket byte for byte.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::guest::{Guest, HIGH, REGIONS};
use super::server::PATIENCE;

/// Requests by number.
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_DEVICE_STATE_FD: u32 = 42;
    pub(crate) const CHECK_DEVICE_STATE: u32 = 43;
}

use request as R;

/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE,
/// CONFIGURE_MEM_SLOTS and DEVICE_STATE.
pub(crate) const PROTOCOL: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 19;
/// What the device must offer: SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD,
/// WRITE_ZEROES, LOG_ALL, INDIRECT, EVENT_IDX, PROTOCOL_FEATURES and VERSION_1.
pub(crate) const VIRTIO: u64 = 0x1_7000_7e44 | LOG_ALL;
/// The bit that turns the dirty log on.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// What a driver takes here: all but EVENT_IDX, so that each request is told of; nothing is logged.
pub(crate) fn features() -> u64 {
    VIRTIO & !(1 << 29 | LOG_ALL)
}

/// Where the guest's memory is in the front-end's address space.
pub(crate) const USER: u64 = 0x7fff_0000_0000;
/// One connection.
pub(crate) struct FrontEnd {
    pub(crate) socket: UnixStream,
}

impl FrontEnd {
    pub(crate) fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        let sent = self.socket.send_with_fds(&[&message[..]], fds).expect("send");
        assert_eq!(sent, message.len());
    }

    /// A message that wants no answer.
    pub(crate) fn tell(&mut self, request: u32, payload: &[u8]) {
        self.send(request, 1, payload, &[]);
    }

    /// A message whose success is told; 0 is success.
    pub(crate) fn acknowledged(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> u64 {
        self.send(request, 9, payload, fds);
        u64::from_ne_bytes(self.reply(request).try_into().expect("eight bytes"))
    }

    /// Reads a whole reply; gives its request and payload.
    fn any(&mut self) -> (u32, Vec<u8>) {
        let mut bytes = [0; 12];
        self.socket.read_exact(&mut bytes).expect("a reply");
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("a word"));
        assert_eq!(word(4), 5, "version 1, a reply, and no other flag");
        let mut payload = vec![0; word(8) as usize];
        self.socket.read_exact(&mut payload).expect("a payload");
        (word(0), payload)
    }

    pub(crate) fn reply(&mut self, request: u32) -> Vec<u8> {
        let (answered, payload) = self.any();
        assert_eq!(answered, request);
        payload
    }

    pub(crate) fn any_reply(&mut self) {
        self.any();
    }

    pub(crate) fn ask_u64(&mut self, request: u32) -> u64 {
        self.send(request, 1, &[], &[]);
        u64::from_ne_bytes(self.reply(request).try_into().expect("eight bytes"))
    }

    /// That no reply comes for a while.
    pub(crate) fn assert_silent(&mut self, time: Duration) {
        self.socket.set_read_timeout(Some(time)).expect("a time-out");
        let error = self.socket.read(&mut [0]).expect_err("nothing to read");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        self.socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    }

    /// That the daemon has closed the connection.
    pub(crate) fn assert_closed(&mut self) {
        match self.socket.read(&mut [0; 100]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("the connection is not closed: {other:?}"),
        }
    }

    /// What every front-end begins with.
    pub(crate) fn negotiate(&mut self) {
        self.ask_u64(R::GET_FEATURES);
        self.tell(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes());
        self.tell(R::SET_OWNER, &[]);
    }

    /// `len` bytes of the configuration space; empty when they are refused.
    pub(crate) fn config(&mut self, offset: u32, len: u32, flags: u32) -> Vec<u8> {
        let mut payload = [offset, len, flags].map(u32::to_ne_bytes).concat();
        payload.resize(12 + len as usize, 0);
        self.send(R::GET_CONFIG, 1, &payload, &[]);
        let mut reply = self.reply(R::GET_CONFIG);
        // A refusal is empty, with or without the three words before the bytes.
        reply.drain(..12.min(reply.len()));
        reply
    }

    pub(crate) fn set_config(&mut self, offset: u32, flags: u32, bytes: &[u8]) -> u64 {
        let mut payload = [offset, bytes.len() as u32, flags].map(u32::to_ne_bytes).concat();
        payload.extend(bytes);
        self.acknowledged(R::SET_CONFIG, &payload, &[])
    }

    /// A message of a ring and a number.
    pub(crate) fn state(&mut self, request: u32, queue: u32, value: u32) {
        self.tell(request, &[queue, value].map(u32::to_ne_bytes).concat());
    }

    pub(crate) fn acknowledged_state(&mut self, request: u32, queue: u32, value: u32) -> u64 {
        self.acknowledged(request, &[queue, value].map(u32::to_ne_bytes).concat(), &[])
    }

    /// Stops a ring; gives where it stands.
    pub(crate) fn base(&mut self, queue: u32) -> u32 {
        self.state(R::GET_VRING_BASE, queue, 0);
        let reply = self.reply(R::GET_VRING_BASE);
        assert_eq!(reply[..4], queue.to_ne_bytes());
        u32::from_ne_bytes(reply[4..].try_into().expect("a word"))
    }

    pub(crate) fn addresses(&mut self, guest: &Guest, queue: u32) {
        self.logged_addresses(guest, queue, None);
    }

    /// The same with the guest address at which the used ring is logged.
    pub(crate) fn logged_addresses(&mut self, guest: &Guest, queue: u32, log: Option<u64>) {
        let ring = &guest.rings[queue as usize];
        let at = [ring.table, ring.used_ring(), ring.available_ring()];
        self.send_addresses(queue, at.map(|at| at - HIGH + USER), log);
    }

    /// Descriptors, used ring and available ring, in the order of the message.
    pub(crate) fn raw_addresses(&mut self, queue: u32, at: [u64; 3]) {
        self.send_addresses(queue, at, None);
    }

    fn send_addresses(&mut self, queue: u32, at: [u64; 3], log: Option<u64>) {
        let mut payload = [queue, u32::from(log.is_some())].map(u32::to_ne_bytes).concat();
        payload.extend(at.into_iter().chain(log.or(Some(0))).flat_map(u64::to_ne_bytes));
        self.tell(R::SET_VRING_ADDR, &payload);
    }

    pub(crate) fn kick(&mut self, guest: &Guest, queue: u32) {
        let fd = guest.kicked[queue as usize].as_raw_fd();
        self.send(R::SET_VRING_KICK, 1, &u64::from(queue).to_ne_bytes(), &[fd]);
    }

    pub(crate) fn call(&mut self, guest: &Guest, queue: u32) {
        let fd = guest.calls[queue as usize].as_raw_fd();
        self.send(R::SET_VRING_CALL, 1, &u64::from(queue).to_ne_bytes(), &[fd]);
    }

    pub(crate) fn error(&mut self, guest: &Guest, queue: u32) {
        let fd = guest.errors[queue as usize].1.as_raw_fd();
        self.send(R::SET_VRING_ERR, 1, &u64::from(queue).to_ne_bytes(), &[fd]);
    }

    /// Describes a ring in full and enables it; it goes on where the guest has seen it.
    pub(crate) fn set_up(&mut self, guest: &Guest, queue: u32) {
        let base = u32::from(guest.rings[queue as usize].seen);
        self.state(R::SET_VRING_NUM, queue, 64);
        self.state(R::SET_VRING_BASE, queue, base);
        self.addresses(guest, queue);
        self.call(guest, queue);
        self.error(guest, queue);
        self.kick(guest, queue);
        assert_eq!(self.acknowledged_state(R::SET_VRING_ENABLE, queue, 1), 0);
    }

    /// Guest address, length, front-end's address and offset of a region, as on the wire.
    fn region(number: usize) -> Vec<u8> {
        let (at, size, offset) = REGIONS[number];
        [at, size, USER + offset, offset].into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    pub(crate) fn add_region(&mut self, guest: &Guest, number: usize) {
        let payload = [&[0; 8][..], &Self::region(number)].concat();
        let fd = guest.file.as_raw_fd();
        assert_eq!(self.acknowledged(R::ADD_MEM_REG, &payload, &[fd]), 0);
    }

    /// Adds the memory that the guest starts with.
    pub(crate) fn add_memory(&mut self, guest: &Guest) {
        self.add_region(guest, 0);
        self.add_region(guest, 1);
    }

    pub(crate) fn send_removal(&mut self, guest: &Guest, number: usize, flags: u32) {
        let payload = [&[0; 8][..], &Self::region(number)].concat();
        // Some front-ends pass the file here too.
        self.send(R::REM_MEM_REG, flags, &payload, &[guest.file.as_raw_fd()]);
    }

    pub(crate) fn send_memory_table(&mut self, guest: &Guest, flags: u32) {
        let mut payload = [2u32, 0].map(u32::to_ne_bytes).concat();
        payload.extend(Self::region(0));
        payload.extend(Self::region(1));
        let fd = guest.file.as_raw_fd();
        self.send(R::SET_MEM_TABLE, flags, &payload, &[fd, fd]);
    }

    pub(crate) fn memory_table(&mut self, guest: &Guest) -> u64 {
        self.send_memory_table(guest, 9);
        u64::from_ne_bytes(self.reply(R::SET_MEM_TABLE).try_into().expect("eight bytes"))
    }

    /// Some message about rings or memory, with numbers that may be wrong.
    pub(crate) fn say_anything(&mut self, random: &mut fastrand::Rng, guest: &Guest) {
        let queue = random.u32(0..5);
        let known = queue.min(3);
        let value = random.choice([0, 1, 2, 64, 100, 65535, 70000]).expect("a number");
        match random.u8(0..14) {
            0 => self.state(R::SET_VRING_NUM, queue, value),
            1 => self.state(R::SET_VRING_BASE, queue, value),
            2 => self.state(R::SET_VRING_ENABLE, queue, value.min(2)),
            3 => self.addresses(guest, known),
            4 => self.kick(guest, known),
            5 => self.call(guest, known),
            6 => self.error(guest, known),
            7 => drop(self.base(known)),
            8 => drop(self.memory_table(guest)),
            9 => self.send_removal(guest, random.usize(0..3), 1),
            10 => self.tell(R::SET_FEATURES, &(features() ^ (1 << 29)).to_ne_bytes()),
            11 => self.tell(R::RESET_DEVICE, &[]),
            12 => self.raw_addresses(queue, [USER, USER + u64::from(value) * 16, USER]),
            _ => drop(self.config(value, 8, 0)),
        }
    }
}
