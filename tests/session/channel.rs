//! Resizing a disk that guests use, and telling their front-ends of it.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::driver::{IN, OUT};
use super::front_end::{FrontEnd, PROTOCOL, features, request as R};
use super::guest::{DATA, Guest};
use super::server::{Options, PATIENCE, Server};

/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);
/// BACKEND_CONFIG_CHANGE_MSG, version 1 and no NEED_REPLY, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];
const LARGER: u64 = 2 * Server::DISK;

/// Passes one end of a socket pair; gives the other.
fn open_channel(front_end: &mut FrontEnd) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let passed = front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]);
    assert_eq!(passed, 0);
    ours
}

/// Reads the one message that there must be.
fn assert_told(channel: &mut UnixStream) {
    let mut bytes = [0; 12];
    channel.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    channel.read_exact(&mut bytes).expect("a message");
    assert_eq!(bytes[..], CONFIG_CHANGE.map(u32::to_ne_bytes).concat());
    assert_untold(channel);
}

fn assert_untold(channel: &mut UnixStream) {
    channel.set_read_timeout(Some(MOMENT)).expect("a time-out");
    let error = channel.read(&mut [0]).expect_err("it is told of something");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
}

fn capacity(front_end: &mut FrontEnd) -> u64 {
    let bytes = front_end.config(0, 57, 0);
    512 * u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// Writes to a sector and reads it back; gives the two statuses.
fn use_sector(guest: &mut Guest, sector: u64) -> [u8; 2] {
    guest.rings[0].write(DATA, &[0x77; 512]);
    guest.send(0, OUT, sector, &[(DATA, 512, false)]);
    guest.kick(0);
    let written = guest.wait(0);
    guest.rings[0].write(DATA, &[0; 512]);
    guest.send(0, IN, sector, &[(DATA, 512, true)]);
    guest.kick(0);
    let read = guest.wait(0);
    if read == [0] {
        assert_eq!(guest.rings[0].read(DATA, 512), [0x77; 512]);
    }
    [written[0], read[0]]
}

/// Stops all rings and starts them again, as a reset or a pause does.
fn restart(front_end: &mut FrontEnd, guest: &Guest, queues: u32) {
    (0..queues).for_each(|queue| front_end.state(R::SET_VRING_ENABLE, queue, 0));
    for queue in 0..queues {
        front_end.base(queue);
        front_end.set_up(guest, queue);
    }
}

#[test]
fn a_running_guest_is_told_and_finds_the_new_end() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    let mut channel = open_channel(&mut front_end);
    assert_told(&mut channel);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    let last = LARGER / 512 - 1;
    assert_eq!(use_sector(&mut guest, last), [1, 1], "beyond the end");
    server.resize(LARGER);
    assert_told(&mut channel);
    assert_eq!(capacity(&mut front_end), LARGER);
    assert_eq!(use_sector(&mut guest, last), [0, 0]);
    guest.assert_reads(1);
    // It knows, so nothing is repeated.
    restart(&mut front_end, &guest, 2);
    assert_untold(&mut channel);
    guest.assert_reads(0);
    // Smaller again: what lies behind the end is refused.
    server.resize(Server::DISK);
    assert_told(&mut channel);
    assert_eq!(use_sector(&mut guest, last), [1, 1]);
    assert_eq!(server.end().len() as u64, Server::DISK);
}

#[test]
fn requests_under_way_do_not_fail_when_the_disk_is_resized() {
    let server = Server::start(Options::default());
    let (_front_end, mut guest) = server.attached(2);
    server.hold(true);
    for queue in 0..2 {
        guest.send(queue, OUT, 8, &[(DATA, 512, false)]);
        guest.send(queue, IN, 16, &[(DATA + 512, 512, true)]);
        guest.kick(queue);
    }
    server.wait_until_held();
    server.ask_for_size(LARGER);
    std::thread::sleep(MOMENT);
    assert!(guest.rings[0].used().is_empty(), "the disk is held up");
    server.hold(false);
    server.wait_for_size(true);
    for queue in 0..2 {
        let mut statuses = Vec::new();
        while statuses.len() < 2 {
            statuses.extend(guest.poll(queue));
        }
        assert_eq!(statuses, [0, 0]);
        guest.assert_reads(queue);
    }
    server.end();
}

#[test]
fn a_resize_that_is_refused_leaves_the_guest_its_disk() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    let mut channel = open_channel(&mut front_end);
    server.ask_for_size(LARGER + 1);
    server.wait_for_size(false);
    assert_untold(&mut channel);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn a_start_is_told_of_what_happened_while_nobody_listened() {
    let server = Server::start(Options::default());
    let (mut front_end, guest) = server.attached(1);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    server.resize(LARGER);
    // The channel comes last with some front-ends, when the rings run already.
    let mut channel = open_channel(&mut front_end);
    assert_told(&mut channel);
    // Whoever ignores it, as while the device stops, hears of it at each start.
    for _ in 0..2 {
        restart(&mut front_end, &guest, 1);
        assert_told(&mut channel);
    }
    assert_eq!(capacity(&mut front_end), LARGER);
    restart(&mut front_end, &guest, 1);
    assert_untold(&mut channel);
    server.end();
}

#[test]
fn a_front_end_that_comes_back_without_asking_is_told_once() {
    let server = Server::start(Options::default());
    let (mut front_end, guest) = (server.connect(), Guest::new(2));
    front_end.negotiate();
    let mut channel = open_channel(&mut front_end);
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    front_end.add_memory(&guest);
    assert_untold(&mut channel);
    front_end.set_up(&guest, 0);
    assert_told(&mut channel);
    front_end.set_up(&guest, 1);
    restart(&mut front_end, &guest, 2);
    assert_untold(&mut channel);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    restart(&mut front_end, &guest, 2);
    assert_untold(&mut channel);
    // A part without the capacity says nothing about what it believes.
    server.resize(LARGER);
    assert_told(&mut channel);
    front_end.config(8, 40, 0);
    restart(&mut front_end, &guest, 2);
    assert_told(&mut channel);
    server.end();
}

#[test]
fn a_channel_that_was_not_agreed_on_is_refused() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    front_end.ask_u64(R::GET_FEATURES);
    front_end.tell(R::SET_PROTOCOL_FEATURES, &(PROTOCOL & !(1 << 5)).to_ne_bytes());
    let (_ours, theirs) = UnixStream::pair().expect("a pair");
    let fd = theirs.as_raw_fd();
    assert_ne!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[fd]), 0);
    front_end.tell(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes());
    assert_ne!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[]), 0, "no descriptor");
    assert_eq!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[fd]), 0);
    // Without NEED_REPLY there is no answer, and a payload means nothing.
    front_end.send(R::SET_BACKEND_REQ_FD, 1, &[], &[fd]);
    front_end.send(R::SET_BACKEND_REQ_FD, 1, &[0; 8], &[fd]);
    front_end.assert_silent(MOMENT);
    assert_eq!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[fd, fd]), 0);
    assert_eq!(capacity(&mut front_end), Server::DISK);
    server.end();
}

#[test]
fn a_channel_that_is_full_closed_or_none_at_all_holds_nobody_up() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let mut size = Server::DISK;
    let mut grow = |guest: &mut Guest| {
        size += 512;
        server.resize(size);
        guest.assert_reads(0);
    };
    // Full, and in blocking mode: the front-end has the descriptor too.
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("not to wait");
    while theirs.write(&[0; 4096]).is_ok() {}
    while theirs.write(&[0]).is_ok() {}
    theirs.set_nonblocking(false).expect("to wait");
    let fd = theirs.as_raw_fd();
    assert_eq!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[fd]), 0);
    (0..3).for_each(|_| grow(&mut guest));
    drop(ours);
    (0..2).for_each(|_| grow(&mut guest));
    // Closed from the beginning, and no socket.
    drop(open_channel(&mut front_end));
    (0..2).for_each(|_| grow(&mut guest));
    let file = guest.file.as_raw_fd();
    assert_eq!(front_end.acknowledged(R::SET_BACKEND_REQ_FD, &[], &[file]), 0);
    (0..2).for_each(|_| grow(&mut guest));
    // A good one works after all these.
    let mut channel = open_channel(&mut front_end);
    assert_told(&mut channel);
    assert_eq!(capacity(&mut front_end), size);
    server.end();
}
