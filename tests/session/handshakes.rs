//! The messages of QEMU and cloud-hypervisor in their order, and others' in none.

use std::os::fd::AsRawFd;

use super::driver::{IN, event, was_signalled};
use super::front_end::{FrontEnd, PROTOCOL, VIRTIO, features, request as R};
use super::guest::{DATA, Guest};
use super::server::{Options, Server};

#[test]
fn qemus_handshake() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let mut guest = Guest::new(2);
    // On connecting.
    assert_eq!(front_end.ask_u64(R::GET_FEATURES) & VIRTIO, VIRTIO);
    assert_eq!(front_end.ask_u64(R::GET_PROTOCOL_FEATURES), PROTOCOL);
    front_end.tell(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes());
    assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 64);
    assert_eq!(front_end.ask_u64(R::GET_MAX_MEM_SLOTS), 509);
    front_end.tell(R::SET_OWNER, &[]);
    front_end.ask_u64(R::GET_FEATURES);
    for queue in 0..2 {
        front_end.call(&guest, queue);
        front_end.error(&guest, queue);
    }
    let config = front_end.config(0, 57, 0);
    assert_eq!(config[..8], (Server::DISK / 512).to_le_bytes());
    // The firmware uses one queue, knows little, and configures nothing else.
    for round in 0..3 {
        front_end.tell(R::RESET_DEVICE, &[]);
        let few = 0x1_4000_0046 & !2;
        front_end.tell(R::SET_FEATURES, &u64::to_ne_bytes(few));
        front_end.call(&guest, 0);
        front_end.call(&guest, 1);
        front_end.tell(R::SET_FEATURES, &u64::to_ne_bytes(few));
        if round == 0 {
            front_end.add_memory(&guest);
        }
        guest.restart(0);
        front_end.state(R::SET_VRING_NUM, 0, 64);
        front_end.state(R::SET_VRING_BASE, 0, 0);
        front_end.addresses(&guest, 0);
        front_end.kick(&guest, 0);
        for queue in 0..2 {
            assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, 1), 0);
        }
        guest.assert_reads(0);
        guest.assert_reads(0);
        for queue in 0..2 {
            front_end.state(R::SET_VRING_ENABLE, queue, 0);
        }
        assert_eq!(front_end.base(0), 2);
    }
    drive_two_queues(&mut front_end, &mut guest);
    server.end();
}

/// What QEMU says when the kernel follows the firmware, and at each stop and cont.
fn drive_two_queues(front_end: &mut FrontEnd, guest: &mut Guest) {
    // The kernel knows everything; stop and cont go on where it was.
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    for queue in 0..2 {
        guest.restart(queue);
    }
    for _ in 0..3 {
        for queue in 0..2 {
            front_end.state(R::SET_VRING_NUM, queue, 64);
            front_end.state(R::SET_VRING_BASE, queue, u32::from(guest.rings[queue as usize].seen));
            front_end.addresses(guest, queue);
            front_end.call(guest, queue);
            front_end.kick(guest, queue);
        }
        for queue in 0..2 {
            assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, 1), 0);
        }
        guest.assert_reads(0);
        guest.assert_reads(1);
        for queue in 0..2 {
            front_end.state(R::SET_VRING_ENABLE, queue, 0);
        }
        for queue in 0..2 {
            assert_eq!(front_end.base(queue), u32::from(guest.rings[queue as usize].seen));
        }
    }
}

#[test]
fn cloud_hypervisors_handshake() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let mut guest = Guest::new(3);
    front_end.tell(R::SET_OWNER, &[]);
    front_end.ask_u64(R::GET_FEATURES);
    front_end.ask_u64(R::GET_PROTOCOL_FEATURES);
    front_end.tell(R::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes());
    assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 64);
    assert_eq!(front_end.config(0, 60, 1).len(), 60);
    // From the same connection the device is set up, paused and set up again; a reset in between.
    for round in 0..3 {
        assert_eq!(front_end.acknowledged(R::SET_FEATURES, &features().to_ne_bytes(), &[]), 0);
        assert_eq!(front_end.memory_table(&guest), 0);
        for queue in 0..3 {
            assert_eq!(front_end.acknowledged_state(R::SET_VRING_NUM, queue, 64), 0);
        }
        for queue in 0..3 {
            let base = u32::from(guest.rings[queue as usize].available);
            front_end.addresses(&guest, queue);
            assert_eq!(front_end.acknowledged_state(R::SET_VRING_BASE, queue, base), 0);
            front_end.call(&guest, queue);
            front_end.kick(&guest, queue);
        }
        for queue in 0..3 {
            assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, 1), 0);
        }
        (0..3).for_each(|queue| guest.assert_reads(queue));
        // Pause and resume.
        for enabled in [0, 1, 0] {
            for queue in 0..3 {
                assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, enabled), 0);
            }
            if enabled == 1 {
                (0..3).for_each(|queue| guest.assert_reads(queue));
            }
        }
        if round != 1 {
            for queue in 0..3 {
                assert_eq!(front_end.base(queue), u32::from(guest.rings[queue as usize].seen));
            }
        }
    }
    server.end();
}

#[test]
fn messages_may_come_in_any_order_and_more_than_once() {
    let server = Server::start(Options::default());
    for seed in 0..150 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut front_end = server.connect();
        let mut guest = Guest::new(1);
        front_end.negotiate();
        let start = random.u16(..);
        guest.start_at(0, start);
        // A request is there before anything is known of the ring, and nobody kicks for it later.
        guest.send(0, IN, 5, &[(DATA, 512, true)]);
        let mut steps: Vec<u8> = (0..7).collect();
        steps.extend((0..random.usize(0..6)).map(|_| random.u8(0..7)));
        random.shuffle(&mut steps);
        let mut has_memory = false;
        if random.bool() {
            front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
        } else {
            // The features may stop a ring that ran without them, and a base that is told to a
            // stopped ring counts, even if it is told for the second time.
            let first = steps.iter().position(|step| *step == 3).expect("a base");
            let mut place = 0..;
            steps.retain(|step| place.next() <= Some(first) || *step != 3);
        }
        for step in steps {
            match step {
                0 => front_end.tell(R::SET_FEATURES, &features().to_ne_bytes()),
                1 if has_memory => assert_eq!(front_end.memory_table(&guest), 0, "seed {seed}"),
                1 => {
                    front_end.add_memory(&guest);
                    has_memory = true;
                }
                2 => front_end.state(R::SET_VRING_NUM, 0, 64),
                3 => front_end.state(R::SET_VRING_BASE, 0, u32::from(start)),
                4 => front_end.addresses(&guest, 0),
                5 => front_end.kick(&guest, 0),
                _ => front_end.state(R::SET_VRING_ENABLE, 0, 1),
            }
            if random.u8(0..8) == 0 {
                front_end.call(&guest, 0);
            }
        }
        // Enabling needs the feature, so it may have been refused when it came first.
        let enabled = front_end.acknowledged_state(R::SET_VRING_ENABLE, 0, 1);
        assert_eq!(enabled, 0, "seed {seed}");
        front_end.call(&guest, 0);
        assert_eq!(guest.wait(0), [0], "seed {seed}");
        guest.assert_reads(0);
        assert_eq!(front_end.base(0), u32::from(start.wrapping_add(2)), "seed {seed}");
    }
    server.end();
}

#[test]
fn repeating_what_is_known_does_not_disturb_a_ring() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    for _ in 0..5 {
        guest.assert_reads(0);
        front_end.tell(R::SET_OWNER, &[]);
        assert_eq!(front_end.acknowledged(R::SET_FEATURES, &features().to_ne_bytes(), &[]), 0);
        front_end.addresses(&guest, 0);
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_NUM, 0, 64), 0);
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_BASE, 0, 0), 0);
        front_end.kick(&guest, 0);
        front_end.error(&guest, 0);
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, 0, 1), 0);
        assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 64);
    }
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 6);
    server.end();
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let mut guest = Guest::new(1);
    front_end.tell(R::SET_FEATURES, &(features() & !(1 << 30)).to_ne_bytes());
    front_end.send_memory_table(&guest, 1);
    front_end.state(R::SET_VRING_NUM, 0, 64);
    front_end.state(R::SET_VRING_BASE, 0, 0);
    front_end.addresses(&guest, 0);
    front_end.call(&guest, 0);
    front_end.kick(&guest, 0);
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 1);
    server.end();
}

#[test]
fn rings_without_descriptors_are_polled_from_both_sides() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        assert_eq!(front_end.acknowledged(request, &0x100u64.to_ne_bytes(), &[]), 0);
    }
    was_signalled(&guest.called[0]);
    for _ in 0..3 {
        guest.send(0, IN, 0, &[(DATA, 512, true)]);
        assert_eq!(guest.poll(0), [0]);
    }
    assert!(!was_signalled(&guest.called[0]), "nobody is told");
    server.end();
}

#[test]
fn a_new_call_descriptor_is_signalled_at_once() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    guest.assert_reads(0);
    for queue in [0u8, 1, 2] {
        let (seen, passed) = event();
        let payload = u64::from(queue).to_ne_bytes();
        let call = [passed.as_raw_fd()];
        assert_eq!(front_end.acknowledged(R::SET_VRING_CALL, &payload, &call), 0);
        assert!(was_signalled(&seen), "queue {queue}: running, idle, or never set up");
        if queue == 0 {
            guest.called[0] = seen;
            guest.assert_reads(0);
        }
    }
    server.end();
}

#[test]
fn the_base_of_a_ring_that_never_ran_is_answered() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    front_end.negotiate();
    assert_eq!(front_end.base(7), 0);
    front_end.state(R::SET_VRING_BASE, 7, 1234);
    assert_eq!(front_end.base(7), 1234);
    assert_eq!(front_end.base(7), 1234);
    server.end();
}
