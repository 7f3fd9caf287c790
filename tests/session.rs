//! A front-end made by hand: the messages of QEMU and cloud-hypervisor, in their order and in none.
//!
//! The daemon's session and workers run in threads of the test, over a real socket and a real file.

#[path = "session/channel.rs"]
mod channel;
#[path = "common/driver.rs"]
mod driver;
#[path = "session/front_end.rs"]
mod front_end;
#[path = "session/guest.rs"]
mod guest;
#[path = "session/handshakes.rs"]
mod handshakes;
#[path = "session/inflight.rs"]
mod inflight;
#[path = "session/logging.rs"]
mod logging;
#[path = "session/patience.rs"]
mod patience;
#[path = "session/pitfalls.rs"]
mod pitfalls;
#[path = "session/server.rs"]
mod server;
#[path = "session/snapshots.rs"]
mod snapshots;
#[path = "session/turns.rs"]
mod turns;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Duration;

use driver::{FLUSH, IN, OUT};
use front_end::{PROTOCOL, USER, features, request as R};
use guest::{DATA, Guest};
use server::{Options, Server};

/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);

#[test]
fn a_running_rings_base_cannot_be_turned_back() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    assert_ne!(front_end.acknowledged_state(R::SET_VRING_BASE, 0, 5), 0);
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 2);
    server.end();
}

#[test]
fn the_configuration_space_is_there_before_anything_else() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    front_end.tell(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes());
    let whole = front_end.config(0, 256, 0);
    for (offset, size) in [(0, 57), (0, 60), (0, 200), (1, 3), (13, 57), (255, 1), (32, 1)] {
        let part = front_end.config(offset, size, 0);
        assert_eq!(part, whole[offset as usize..(offset + size) as usize]);
    }
    for (offset, size) in [(0, 257), (200, 57), (256, 1), (4000, 90)] {
        assert!(front_end.config(offset, size, 0).is_empty(), "an empty answer is a refusal");
    }
    server.end();
}

#[test]
fn the_write_cache_can_be_switched_by_both_front_ends() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    front_end.negotiate();
    for (flags, value) in [(0, 0), (1, 1), (1, 0), (0, 1)] {
        assert_eq!(front_end.set_config(32, flags, &[value]), 0);
        assert_eq!(front_end.config(32, 1, 0), [value]);
    }
    for (offset, flags, bytes) in
        [(0, 0, &[1][..]), (32, 0, &[2]), (32, 0, &[1, 1]), (32, 8, &[1]), (300, 0, &[1])]
    {
        assert_ne!(front_end.set_config(offset, flags, bytes), 0, "{offset} {flags} {bytes:?}");
    }
    assert_eq!(front_end.set_config(32, 0, &[0]), 0);
    assert_eq!(front_end.acknowledged(R::RESET_DEVICE, &[], &[]), 0);
    assert_eq!(front_end.config(32, 1, 0), [1], "a reset brings the cache back");
    server.end();
}

#[test]
fn an_error_is_answered_and_the_disk_goes_on() {
    let server = Server::start(Options { queues: 4, ..Options::default() });
    let (mut front_end, mut guest) = server.attached(1);
    let file = guest.file.as_raw_fd();
    let one = 1u64.to_ne_bytes();
    let state = |index: u32, value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
    let region = |guest: u64, size: u64, user: u64| {
        [0, guest, size, user, 0].into_iter().flat_map(u64::to_ne_bytes).collect::<Vec<u8>>()
    };
    let addresses = |index: u32, flags: u32, ring: [u64; 3]| {
        let mut bytes = state(index, flags);
        bytes.extend(ring.into_iter().chain([0]).flat_map(u64::to_ne_bytes));
        bytes
    };
    for (what, request, payload, descriptors) in [
        ("an unknown request", 45, vec![0; 8], &[][..]),
        ("an unknown request with descriptors", 1000, vec![0; 100], &[file, file]),
        ("features that were not offered", R::SET_FEATURES, u64::MAX.to_ne_bytes().to_vec(), &[]),
        ("a payload that is too short", R::SET_FEATURES, vec![0; 7], &[]),
        ("no payload", R::SET_VRING_NUM, vec![], &[]),
        ("a payload that is too long", R::SET_OWNER, vec![0; 9], &[]),
        (
            "a descriptor where none belongs",
            R::SET_FEATURES,
            features().to_ne_bytes().to_vec(),
            &[file],
        ),
        ("a queue that is not there", R::SET_VRING_NUM, state(4, 64), &[]),
        ("a queue far away", R::SET_VRING_ENABLE, state(u32::MAX, 1), &[]),
        ("a size of zero", R::SET_VRING_NUM, state(1, 0), &[]),
        ("a size that is no power of two", R::SET_VRING_NUM, state(1, 100), &[]),
        ("a size over the maximum", R::SET_VRING_NUM, state(1, 2048), &[]),
        ("a base over 16 bits", R::SET_VRING_BASE, state(1, 65536), &[]),
        ("enabling by two", R::SET_VRING_ENABLE, state(1, 2), &[]),
        ("unaligned addresses", R::SET_VRING_ADDR, addresses(1, 0, [8, 0, 0]), &[]),
        ("unknown flags of addresses", R::SET_VRING_ADDR, addresses(1, 2, [0; 3]), &[]),
        ("a kick descriptor that is missing", R::SET_VRING_KICK, one.to_vec(), &[]),
        ("two kick descriptors", R::SET_VRING_KICK, one.to_vec(), &[file, file]),
        ("a region that overlaps", R::ADD_MEM_REG, region(4096, 4096, 0), &[file]),
        ("a region beyond its file", R::ADD_MEM_REG, region(1 << 30, 1 << 30, 0), &[file]),
        ("a region without a file", R::ADD_MEM_REG, region(1 << 30, 4096, 0), &[]),
        ("an empty region", R::ADD_MEM_REG, region(1 << 30, 0, 0), &[file]),
        ("a region that is not there", R::REM_MEM_REG, region(1 << 30, 4096, 0), &[]),
        ("an empty memory table", R::SET_MEM_TABLE, vec![0; 8], &[]),
        (
            "a memory table without files",
            R::SET_MEM_TABLE,
            [&state(1, 0)[..], &[1; 32]].concat(),
            &[],
        ),
        ("a back-end channel without a descriptor", R::SET_BACKEND_REQ_FD, vec![], &[]),
    ] {
        let answer = front_end.acknowledged(request, &payload, descriptors);
        assert_ne!(answer, 0, "{what}");
        // Without a wish for an answer there is none, and the next message is understood. Only who
        // passes descriptors where none belong and does not wait is not understood any more.
        if request != R::SET_FEATURES || descriptors.is_empty() {
            front_end.send(request, 1, &payload, descriptors);
        }
        assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 4, "{what}");
        guest.assert_reads(0);
    }
    server.end();
}

#[test]
fn what_is_no_vhost_user_ends_the_connection_and_not_the_service() {
    let server = Server::start(Options::default());
    for garbage in [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![0xff; 64],
        vec![0; 12],
        [&1u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &u32::MAX.to_ne_bytes()].concat(),
        // A question that needs an answer but was not negotiated.
        [&17u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &0u32.to_ne_bytes()].concat(),
    ] {
        let mut front_end = server.connect();
        front_end.socket.write_all(&garbage).expect("write");
        front_end.assert_closed();
    }
    // Half a message, and nobody there any more.
    for len in [1, 11, 12, 19] {
        let message = [1u32, 9, 8, 0, 0].map(u32::to_ne_bytes).concat();
        let mut front_end = server.connect();
        front_end.socket.write_all(&message[..len]).expect("write");
    }
    let (_front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let message = [15u32, 1, 0].map(u32::to_ne_bytes).concat();
    for byte in message {
        front_end.socket.write_all(&[byte]).expect("write");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(front_end.reply(15), PROTOCOL.to_ne_bytes());
    server.end();
}

#[test]
fn a_broken_ring_is_reported_and_the_connection_stays() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    guest.assert_reads(0);
    let ring = &guest.rings[0];
    ring.store(ring.available_ring() + 2, ring.available.wrapping_add(500));
    guest.kick(0);
    guest.wait_for_error(0);
    guest.assert_reads(1);
    assert_eq!(front_end.base(0), 1, "it can be stopped");
    // A reset repairs it.
    guest.restart(0);
    front_end.set_up(&guest, 0);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn a_ring_whose_addresses_make_no_sense_is_reported() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    front_end.error(&guest, 0);
    assert_eq!(front_end.base(0), 0);
    // The descriptors are there, but the ring runs out of memory.
    let edge = USER + Guest::MEMORY - 64;
    let addresses = [edge, USER, USER];
    front_end.raw_addresses(0, addresses);
    let kick = [guest.kicks[0].as_raw_fd()];
    assert_ne!(front_end.acknowledged(R::SET_VRING_KICK, &0u64.to_ne_bytes(), &kick), 0);
    guest.wait_for_error(0);
    guest.restart(0);
    front_end.set_up(&guest, 0);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn every_way_to_stop_waits_for_what_was_taken() {
    for way in 0..7 {
        let server = Server::start(Options::default());
        let (mut front_end, mut guest) = server.attached(2);
        guest.assert_reads(0);
        server.hold(true);
        guest.send(0, OUT, 4, &[(DATA, 4096, false)]);
        guest.kick(0);
        server.wait_until_held();
        let need_reply = 9;
        match way {
            0 => front_end.send(R::GET_VRING_BASE, 1, &[0; 8], &[]),
            1 => front_end.send(R::SET_VRING_ENABLE, need_reply, &[0; 8], &[]),
            2 => front_end.send(R::RESET_DEVICE, need_reply, &[], &[]),
            3 => front_end.send(R::RESET_OWNER, need_reply, &[], &[]),
            4 => front_end.send_memory_table(&guest, need_reply),
            5 => front_end.send_removal(&guest, 1, need_reply),
            _ => drop(std::mem::replace(&mut front_end, server.connect())),
        }
        if way == 6 {
            front_end.send(R::GET_FEATURES, 1, &[], &[]);
        }
        front_end.assert_silent(MOMENT);
        assert!(guest.rings[0].used().is_empty(), "way {way}");
        server.hold(false);
        front_end.any_reply();
        // What was taken is in the used ring by the time of the answer.
        assert_eq!(guest.rings[0].used().len(), 1, "way {way}");
        server.end();
    }
}

#[test]
fn memory_is_added_while_requests_are_under_way() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    server.hold(true);
    guest.send(0, IN, 0, &[(DATA, 512, true)]);
    guest.kick(0);
    server.wait_until_held();
    // Hot-added memory: the answer does not wait for the disk.
    front_end.add_region(&guest, 2);
    let added = Guest::HOTPLUG + 0x1000;
    guest.send(0, IN, 9, &[(added, 512, true)]);
    guest.kick(0);
    server.hold(false);
    let mut statuses = guest.wait(0);
    while statuses.len() < 2 {
        statuses.extend(guest.wait(0));
    }
    assert_eq!(statuses, [0, 0]);
    assert_eq!(guest.rings[0].read(added, 1), [9]);
    server.end();
}

#[test]
fn a_ring_waits_while_its_memory_is_replaced() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    for _ in 0..3 {
        guest.assert_reads(0);
        front_end.send_removal(&guest, 0, 9);
        assert_eq!(front_end.reply(R::REM_MEM_REG), 0u64.to_ne_bytes());
        guest.send(0, IN, 0, &[(DATA, 512, true)]);
        guest.kick(0);
        std::thread::sleep(MOMENT / 4);
        assert!(guest.rings[0].used().is_empty(), "its memory is not there");
        front_end.add_region(&guest, 0);
        assert_eq!(guest.wait(0), [0]);
    }
    server.end();
}

#[test]
fn one_front_end_after_the_other_and_one_that_is_answered_meanwhile() {
    let server = Server::start(Options::default());
    for round in 0..10 {
        let (front_end, mut guest) = server.attached(1 + round % 3);
        guest.assert_reads(0);
        let mut waiting = server.connect();
        waiting.ask_u64(R::GET_FEATURES);
        guest.assert_reads(0);
        drop(front_end);
        waiting.ask_u64(R::GET_FEATURES);
    }
    server.end();
}

#[test]
fn a_reconnected_front_end_goes_on_where_the_ring_is() {
    let server = Server::start(Options::default());
    let (front_end, mut guest) = server.attached(1);
    for _ in 0..5 {
        guest.assert_reads(0);
    }
    drop(front_end);
    let mut front_end = server.connect();
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    front_end.add_memory(&guest);
    // Requests that came in the meantime, for which nobody will kick.
    guest.send(0, FLUSH, 0, &[]);
    front_end.set_up(&guest, 0);
    assert_eq!(guest.wait(0), [0]);
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 7);
    server.end();
}

#[test]
fn queues_share_threads() {
    for threads in [1, 2, 5] {
        let server = Server::start(Options { threads, ..Options::default() });
        let (mut front_end, mut guest) = server.attached(6);
        for round in 0..20 {
            for queue in 0..6 {
                let sector = [(DATA + queue as u64 * 4096, 512, false)];
                guest.rings[queue].write(sector[0].0, &[round; 512]);
                guest.send(queue, OUT, queue as u64, &sector);
            }
            (0..6).for_each(|queue| guest.kick(queue));
            (0..6).for_each(|queue| assert_eq!(guest.wait(queue), [0]));
        }
        assert!(server.disk()[..6 * 512].iter().all(|byte| *byte == 19));
        for queue in 0..6 {
            assert_eq!(front_end.base(queue), 20);
        }
        server.end();
    }
}

#[test]
fn write_through_without_flush_reaches_every_queue() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let mut guest = Guest::new(1);
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &(features() & !(1 << 9)).to_ne_bytes());
    front_end.add_memory(&guest);
    front_end.set_up(&guest, 0);
    guest.send(0, OUT, 0, &[(DATA, 512, false)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    assert_eq!(server.syncs(), 1);
    // The driver that comes next knows FLUSH.
    assert_eq!(front_end.acknowledged(R::SET_FEATURES, &features().to_ne_bytes(), &[]), 0);
    guest.send(0, OUT, 0, &[(DATA, 512, false)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    assert_eq!(server.syncs(), 1);
    server.end();
}

#[test]
fn ending_drains_while_a_front_end_is_attached() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    server.hold(true);
    guest.rings[0].write(DATA, &[0x77; 512]);
    guest.send(0, OUT, 4, &[(DATA, 512, false)]);
    guest.kick(0);
    server.wait_until_held();
    server.hold(false);
    let disk = server.end();
    assert!(disk[4 * 512..5 * 512].iter().all(|byte| *byte == 0x77));
    assert_eq!(guest.rings[0].used().len(), 1);
    front_end.assert_closed();
}

#[test]
fn random_messages_never_end_the_service() {
    let server = Server::start(Options { queues: 4, ..Options::default() });
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut front_end = server.connect();
        let guest = Guest::new(4);
        front_end.negotiate();
        front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
        front_end.add_memory(&guest);
        for _ in 0..80 {
            front_end.say_anything(&mut random, &guest);
        }
    }
    let (_front_end, mut guest) = server.attached(4);
    (0..4).for_each(|queue| guest.assert_reads(queue));
    server.end();
}
