//! What cloud-hypervisor says when it pauses, saves and restores a guest, in its order.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::driver::OUT;
use super::front_end::{FrontEnd, PROTOCOL, features, request as R};
use super::guest::{DATA, Guest};
use super::server::{Options, Server};

/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);
const QUEUES: u32 = 3;
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// The answer to SET_DEVICE_STATE_FD that comes without a descriptor.
const TAKEN: u64 = 0x100;

/// Begins a transfer; gives the answer.
fn transfer(front_end: &mut FrontEnd, direction: u32, end: impl Into<OwnedFd>) -> u64 {
    let payload = [direction, 0].map(u32::to_ne_bytes).concat();
    let end: OwnedFd = end.into();
    front_end.acknowledged(R::SET_DEVICE_STATE_FD, &payload, &[end.as_raw_fd()])
}

fn check(front_end: &mut FrontEnd) -> u64 {
    front_end.acknowledged(R::CHECK_DEVICE_STATE, &[], &[])
}

/// Sets the device up as at its activation, with each ring where it stands in `bases`.
fn activate(front_end: &mut FrontEnd, guest: &Guest, bases: &[u32]) {
    assert_eq!(front_end.acknowledged(R::SET_FEATURES, &features().to_ne_bytes(), &[]), 0);
    assert_eq!(front_end.memory_table(guest), 0);
    for queue in 0..QUEUES {
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_NUM, queue, 64), 0);
    }
    for (queue, base) in (0..).zip(bases) {
        front_end.addresses(guest, queue);
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_BASE, queue, *base), 0);
        front_end.call(guest, queue);
        front_end.kick(guest, queue);
    }
    enable(front_end, 1);
}

fn enable(front_end: &mut FrontEnd, value: u32) {
    for queue in 0..QUEUES {
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, value), 0);
    }
}

/// Reads a state until its end.
fn read_state(mut end: UnixStream) -> Vec<u8> {
    let mut state = Vec::new();
    end.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out");
    std::io::Read::read_to_end(&mut end, &mut state).expect("the daemon closes its end");
    state
}

fn save(front_end: &mut FrontEnd) -> (Vec<u32>, Vec<u8>) {
    let bases = (0..QUEUES).map(|queue| front_end.base(queue)).collect();
    let (own, other) = UnixStream::pair().expect("a pair");
    assert_eq!(transfer(front_end, SAVE, other), TAKEN);
    let state = read_state(own);
    assert_eq!(check(front_end), 0);
    (bases, state)
}

/// The first messages of a front-end that restores a guest: it knows the features already.
fn restored(server: &Server, state: &[u8]) -> FrontEnd {
    let mut front_end = server.connect();
    front_end.tell(R::SET_OWNER, &[]);
    front_end.ask_u64(R::GET_FEATURES);
    assert_eq!(front_end.acknowledged(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes(), &[]), 0);
    let (mut own, other) = UnixStream::pair().expect("a pair");
    assert_eq!(transfer(&mut front_end, LOAD, other), TAKEN);
    own.write_all(state).expect("write");
    drop(own);
    front_end
}

#[test]
fn a_guest_is_paused_saved_and_resumed_on_the_same_connection() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let mut guest = Guest::new(QUEUES as usize);
    front_end.tell(R::SET_OWNER, &[]);
    front_end.ask_u64(R::GET_FEATURES);
    front_end.ask_u64(R::GET_PROTOCOL_FEATURES);
    assert_eq!(front_end.acknowledged(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes(), &[]), 0);
    activate(&mut front_end, &guest, &[0; QUEUES as usize]);
    for round in 0..3 {
        (0..3).for_each(|queue| guest.assert_reads(queue));
        enable(&mut front_end, 0);
        if round != 1 {
            // Saved, and set up again without a new owner.
            let (bases, state) = save(&mut front_end);
            assert!(state.is_empty());
            assert_eq!(
                bases,
                [guest.rings[0].seen, guest.rings[1].seen, guest.rings[2].seen].map(u32::from)
            );
            // Requests that the guest made while nobody took them.
            guest.send(0, OUT, 4, &[(DATA, 512, false)]);
            activate(&mut front_end, &guest, &bases);
            assert_eq!(guest.poll(0), [0]);
        } else {
            enable(&mut front_end, 1);
        }
    }
    server.end();
}

#[test]
fn a_paused_guests_memory_is_left_alone() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    server.hold(true);
    guest.send(0, 0, 4, &[(DATA, 4096, true)]);
    guest.kick(0);
    server.wait_until_held();
    front_end.send(R::SET_VRING_ENABLE, 9, &[0; 8], &[]);
    front_end.assert_silent(MOMENT);
    server.hold(false);
    front_end.any_reply();
    guest.send(0, 0, 4, &[(DATA, 4096, true)]);
    guest.kick(0);
    let mut memory = vec![0; 10 << 20];
    let read = |memory: &mut Vec<u8>| {
        std::os::unix::fs::FileExt::read_exact_at(&guest.file, memory, 0).expect("read");
    };
    read(&mut memory);
    std::thread::sleep(MOMENT);
    let mut later = vec![0; 10 << 20];
    read(&mut later);
    assert!(memory == later, "memory changes while the guest is paused");
    front_end.state(R::SET_VRING_ENABLE, 0, 1);
    while guest.rings[0].seen != 2 {
        guest.poll(0);
    }
    server.end();
}

#[test]
fn a_guest_is_restored_before_features_and_memory_are_known() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(QUEUES as usize);
    (0..3).for_each(|queue| guest.assert_reads(queue));
    enable(&mut front_end, 0);
    let (bases, state) = save(&mut front_end);
    drop(front_end);
    let mut front_end = restored(&server, &state);
    assert_eq!(check(&mut front_end), 0);
    activate(&mut front_end, &guest, &bases);
    (0..3).for_each(|queue| guest.assert_reads(queue));
    server.end();
}

#[test]
fn a_state_that_is_not_this_devices_is_refused() {
    let server = Server::start(Options::default());
    let mut front_end = restored(&server, b"something");
    assert_ne!(check(&mut front_end), 0);
    assert_eq!(check(&mut front_end), 0, "it is told once");
    // A file does as well as a channel.
    let empty = tempfile::tempfile().expect("a file");
    assert_eq!(transfer(&mut front_end, LOAD, empty), TAKEN);
    assert_eq!(check(&mut front_end), 0);
    assert_eq!(transfer(&mut front_end, LOAD, File::open("/dev/zero").expect("open")), TAKEN);
    assert_ne!(check(&mut front_end), 0);
    server.end();
}

#[test]
fn a_state_that_never_ends_keeps_nobody_waiting() {
    let server = Server::start(Options::default());
    let mut front_end = restored(&server, &[]);
    let (own, other) = UnixStream::pair().expect("a pair");
    assert_eq!(transfer(&mut front_end, LOAD, other), TAKEN);
    let start = Instant::now();
    assert_ne!(check(&mut front_end), 0);
    assert!(start.elapsed() < Duration::from_secs(5), "the front-end is kept waiting");
    drop(own);
    assert_eq!(transfer(&mut front_end, LOAD, File::open("/dev/null").expect("open")), TAKEN);
    assert_eq!(check(&mut front_end), 0);
    server.end();
}

#[test]
fn a_state_is_not_transferred_while_a_ring_is_served() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    for direction in [SAVE, LOAD] {
        let (own, other) = UnixStream::pair().expect("a pair");
        let answer = transfer(&mut front_end, direction, other);
        assert_ne!(answer & 0xff, 0);
        assert!(read_state(own).is_empty());
    }
    guest.assert_reads(0);
    server.end();
}
