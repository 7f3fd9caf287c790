//! What back-ends are known to get wrong, and the tests that say that this one does not.
//!
//! The numbers are those of a list that was made by reading front-ends and other back-ends; the
//! words are here because the list is not.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::driver::{Driver, IN, OUT, UNTOUCHED, header, was_signalled};
use super::front_end::{FrontEnd, USER, features, request as R};
use super::guest::{DATA, Guest, HIGH};
use super::server::{Options, Server, eventually};

/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);
/// The descriptor is a table of descriptors.
const INDIRECT: u16 = 4;

/// Number, what goes wrong elsewhere, and the tests by name.
const PITFALLS: [(&str, &str, &[&str]); 27] = [
    (
        "P1",
        "QEMU asks for a queue for each processor and does not start on fewer",
        &["the_defaults_let_a_guest_with_many_processors_start", "qemus_handshake"],
    ),
    (
        "P2",
        "GET_CONFIG with sizes other than that of the own structure",
        &["the_configuration_space_is_there_before_anything_else"],
    ),
    (
        "P3",
        "an order of messages is taken for granted, or that each comes once",
        &[
            "messages_may_come_in_any_order_and_more_than_once",
            "repeating_what_is_known_does_not_disturb_a_ring",
            "enabling_what_was_never_described_is_no_error",
        ],
    ),
    (
        "P4",
        "without PROTOCOL_FEATURES rings are enabled from the start",
        &["without_protocol_features_rings_are_enabled_from_the_start"],
    ),
    (
        "P5",
        "a kick that a predecessor has consumed is waited for",
        &["a_reconnected_front_end_goes_on_where_the_ring_is"],
    ),
    (
        "P6",
        "a descriptor that is announced as missing is missed",
        &["rings_without_descriptors_are_polled_from_both_sides"],
    ),
    (
        "P7",
        "GET_VRING_BASE does not drain, or leaves the ring's descriptors open",
        &[
            "every_way_to_stop_waits_for_what_was_taken",
            "asking_for_the_base_closes_the_rings_descriptors",
        ],
    ),
    (
        "P8",
        "other ways to stop a ring do not drain it",
        &["every_way_to_stop_waits_for_what_was_taken"],
    ),
    (
        "P9",
        "a fresh in-flight region knows nothing of the used ring",
        &[
            "a_fresh_region_takes_the_rings_index",
            "a_fresh_record_takes_the_rings_index_and_clears_nothing_wrongly",
        ],
    ),
    (
        "P10",
        "the in-flight region comes before memory and addresses",
        &["a_fresh_region_takes_the_rings_index", "cloud_hypervisors_reconnect_loses_nothing"],
    ),
    ("P11", "the in-flight region's layout", &["what_is_under_way_is_marked_until_it_is_answered"]),
    ("P12", "packed rings are recovered wrongly; they are not offered", &["the_offer_is_exact"]),
    ("P13", "SIZE_MAX is offered", &["the_offer_is_exact"]),
    (
        "P14",
        "a chain is longer than seg_max says or one call of the kernel takes",
        &["a_chain_longer_than_the_kernels_limit_is_served"],
    ),
    ("P15", "old drivers want blocks of 512 bytes", &["the_offer_is_exact"]),
    (
        "P16",
        "firmware has buffers at odd addresses",
        &["buffers_at_odd_addresses_are_served_around_the_page_cache"],
    ),
    (
        "P17",
        "header or status lie in several descriptors, or share one with data",
        &["every_layout_of_header_data_and_status_is_one_request"],
    ),
    (
        "P18",
        "the status byte is the last one that can be written, wherever that is",
        &["every_layout_of_header_data_and_status_is_one_request"],
    ),
    (
        "P19",
        "a malformed chain never comes back, or takes the connection along",
        &[
            "every_malformed_chain_comes_back_and_the_next_request_is_served",
            "a_broken_ring_is_reported_and_the_connection_stays",
        ],
    ),
    (
        "P20",
        "guest memory changes while it is looked at",
        &["a_request_that_changes_after_it_was_taken_is_what_it_was"],
    ),
    (
        "P21",
        "GET_CONFIG needs SET_FEATURES",
        &["the_configuration_space_is_there_before_anything_else"],
    ),
    (
        "P22",
        "a file that is no stale socket is removed",
        &["a_live_socket_and_a_file_are_left_alone_and_a_stale_socket_is_replaced"],
    ),
    (
        "P23",
        "GET_VRING_BASE of a ring that never ran is an error",
        &["the_base_of_a_ring_that_never_ran_is_answered"],
    ),
    (
        "P24",
        "draining needs the ring enabled, which it is not any more",
        &["a_ring_that_was_disabled_tells_its_base"],
    ),
    (
        "P25",
        "memory goes while requests that lie in it are under way",
        &[
            "requests_keep_the_memory_they_began_with",
            "memory_is_added_while_requests_are_under_way",
            "a_ring_waits_while_its_memory_is_replaced",
        ],
    ),
    ("P26", "indices wrap at 65536", &["indices_wrap_around", "rings_of_every_size_wrap_around"]),
    ("P27", "one error ends the connection", &["an_error_is_answered_and_the_disk_goes_on"]),
];

fn collect(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).expect("a directory of the repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, text);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            text.push_str(&fs::read_to_string(&path).expect("a source file"));
        }
    }
}

#[test]
fn every_test_of_a_pitfall_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    ["src", "tests", "integration"].iter().for_each(|part| collect(&root.join(part), &mut text));
    // What is not offered cannot be got wrong.
    let has_inflight = root.join("src/vhost/inflight.rs").exists();
    for (number, what, tests) in PITFALLS {
        if ["P9", "P10", "P11"].contains(&number) && !has_inflight {
            continue;
        }
        println!("{number}: {what}: {tests:?}");
        for test in tests {
            assert!(text.contains(&format!("fn {test}()")), "{number}: there is no test {test}");
        }
    }
}

/// A front-end that has done everything but describe its rings.
fn prepared(server: &Server, features: u64, queues: usize) -> (FrontEnd, Guest) {
    let (mut front_end, guest) = (server.connect(), Guest::new(queues));
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &features.to_ne_bytes());
    front_end.add_memory(&guest);
    (front_end, guest)
}

#[test]
fn enabling_what_was_never_described_is_no_error() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = prepared(&server, features(), 2);
    // QEMU enables all queues, of which the firmware has set up one.
    for queue in 0..64 {
        assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, 1), 0);
    }
    front_end.set_up(&guest, 1);
    guest.assert_reads(1);
    // A ring that was enabled before is served as soon as it is described.
    front_end.state(R::SET_VRING_NUM, 0, 64);
    front_end.state(R::SET_VRING_BASE, 0, 0);
    front_end.call(&guest, 0);
    front_end.kick(&guest, 0);
    front_end.addresses(&guest, 0);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn asking_for_the_base_closes_the_rings_descriptors() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    // A pipe tells its other end when nobody has it open any more, which an eventfd does not.
    let (mut kick, kicked) = std::io::pipe().expect("a pipe");
    let (mut called, call) = std::io::pipe().expect("a pipe");
    let (kicked, call): (OwnedFd, OwnedFd) = (kicked.into(), call.into());
    let queue = 0u64.to_ne_bytes();
    let fd = [call.as_raw_fd()];
    assert_eq!(front_end.acknowledged(R::SET_VRING_CALL, &queue, &fd), 0);
    // Its writing end serves as well here: that it never becomes readable does not matter.
    let fd = [kicked.as_raw_fd()];
    assert_eq!(front_end.acknowledged(R::SET_VRING_KICK, &queue, &fd), 0);
    drop((call, kicked));
    assert_eq!(front_end.base(0), 1);
    let mut rest = Vec::new();
    called.read_to_end(&mut rest).expect("the end");
    kick.read_to_end(&mut rest).expect("the end");
    assert_eq!(rest.len() % 8, 0, "the guest was told, and no more");
    server.end();
}

#[test]
fn the_offer_is_exact() {
    let server = Server::start(Options::default());
    let mut front_end = server.connect();
    let offered = front_end.ask_u64(R::GET_FEATURES);
    // Neither SIZE_MAX (1), whose mere presence upsets drivers, nor packed rings (34), nor anything
    // else that nobody has thought of. Logging (26) is the front-end's affair, not the driver's.
    assert_eq!(offered & !(1 << 26), 0x1_7000_7e44, "{offered:#x}");
    front_end.negotiate();
    let config = front_end.config(0, 60, 0);
    assert_eq!(config[8..12], [0; 4], "size_max");
    assert_eq!(config[20..24], 512u32.to_le_bytes(), "blk_size");
    assert_eq!(config[34..36], 64u16.to_le_bytes(), "num_queues");
    server.end();
}

#[test]
fn a_ring_that_was_disabled_tells_its_base() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    guest.assert_reads(0);
    server.hold(true);
    guest.send(0, OUT, 4, &[(DATA, 512, false)]);
    guest.kick(0);
    server.wait_until_held();
    // Both messages are there before the first is answered.
    front_end.state(R::SET_VRING_ENABLE, 0, 0);
    front_end.state(R::GET_VRING_BASE, 0, 0);
    front_end.assert_silent(MOMENT);
    server.hold(false);
    assert_eq!(front_end.reply(R::GET_VRING_BASE)[4..], 2u32.to_ne_bytes());
    assert_eq!(guest.rings[0].used().len(), 1);
    // Enabling alone does not bring a stopped ring back; a new kick descriptor does.
    front_end.state(R::SET_VRING_ENABLE, 0, 1);
    guest.send(0, IN, 0, &[(DATA, 512, true)]);
    guest.kick(0);
    std::thread::sleep(MOMENT);
    assert!(guest.rings[0].used().is_empty());
    front_end.set_up(&guest, 0);
    assert_eq!(guest.poll(0), [0]);
    guest.assert_reads(1);
    server.end();
}

/// Makes one read available through a table of its own, which fits into a ring of any size, and
/// waits for it.
fn read_indirectly(guest: &mut Guest, wants: Option<u16>) {
    let (at, table) = (DATA + 0x2_0000, DATA + 0x1_0000);
    let ring = &mut guest.rings[0];
    ring.write(at, &header(IN, 7));
    ring.write(at + 16, &[UNTOUCHED]);
    ring.write(at + 512, &[UNTOUCHED; 512]);
    let pieces = [(at, 16, false), (at + 512, 512, true), (at + 16, 1, true)];
    ring.put_chain(table, u16::MAX, 0, &pieces);
    let head = ring.next;
    ring.put(ring.table, head, table, 48, INDIRECT, 0);
    ring.next = (head + 1) % ring.size;
    if let Some(index) = wants {
        ring.store(ring.available_ring() + 4 + u64::from(ring.size) * 2, index);
    }
    ring.offer(head);
    guest.kick(0);
    eventually("an interrupt", || was_signalled(&guest.called[0]));
    let ring = &mut guest.rings[0];
    eventually("an answer", || ring.used() == [(head, 513)]);
    assert_eq!(ring.read(at + 16, 1), [0]);
    assert!(ring.read(at + 512, 512).iter().all(|byte| *byte == 7));
}

#[test]
fn rings_of_every_size_wrap_around() {
    let server = Server::start(Options::default());
    for event_idx in [false, true] {
        for size in [2u16, 4, 8, 64, 256, 1024] {
            let bits = if event_idx { features() | 1 << 29 } else { features() };
            let (mut front_end, mut guest) = prepared(&server, bits, 1);
            let start = 0u16.wrapping_sub(3);
            guest.rings[0] = Driver::at(&guest.rings[0].memory.clone(), HIGH, size, start);
            front_end.state(R::SET_VRING_NUM, 0, size.into());
            front_end.state(R::SET_VRING_BASE, 0, start.into());
            front_end.addresses(&guest, 0);
            front_end.call(&guest, 0);
            front_end.kick(&guest, 0);
            front_end.state(R::SET_VRING_ENABLE, 0, 1);
            // The ring's start is told of too; what counts is what comes after it.
            front_end.ask_u64(R::GET_QUEUE_NUM);
            was_signalled(&guest.called[0]);
            for _ in 0..8 {
                let wants = event_idx.then_some(guest.rings[0].available);
                read_indirectly(&mut guest, wants);
            }
            assert_eq!(front_end.base(0), 5, "size {size}, EVENT_IDX {event_idx}");
        }
    }
    server.end();
}

#[test]
fn memory_is_added_while_every_queue_runs() {
    let server = Server::start(Options { threads: 3, ..Options::default() });
    let (mut front_end, mut guest) = server.attached(6);
    for round in 0..20 {
        for queue in 0..6 {
            guest.send(queue, IN, 9, &[(DATA, 512, true)]);
        }
        (0..6).for_each(|queue| guest.kick(queue));
        front_end.add_region(&guest, 2);
        for queue in 0..6 {
            assert_eq!(guest.poll(queue), [0], "round {round}");
            let added = Guest::HOTPLUG + queue as u64 * 512;
            guest.send(queue, IN, 9, &[(added, 512, true)]);
            guest.kick(queue);
            assert_eq!(guest.poll(queue), [0], "round {round}");
            assert_eq!(guest.rings[queue].read(added, 1), [9]);
        }
        front_end.send_removal(&guest, 2, 9);
        assert_eq!(front_end.reply(R::REM_MEM_REG), 0u64.to_ne_bytes());
    }
    server.end();
}

#[test]
fn a_call_descriptor_that_changes_under_load_loses_no_interrupt() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    for _ in 0..200 {
        guest.send(0, IN, 3, &[(DATA, 512, true)]);
        guest.kick(0);
        let (seen, passed) = super::driver::event();
        let fd = [passed.as_raw_fd()];
        assert_eq!(front_end.acknowledged(R::SET_VRING_CALL, &0u64.to_ne_bytes(), &fd), 0);
        // Whoever was told before must look, and so must whoever is told from now on.
        guest.called[0] = seen;
        assert_eq!(guest.wait(0), [0]);
    }
    server.end();
}

#[test]
fn the_highest_queue_is_served_alone_and_addresses_may_be_anywhere() {
    let server = Server::start(Options { threads: 2, ..Options::default() });
    let (mut front_end, mut guest) = prepared(&server, features(), 1);
    let ring = &guest.rings[0];
    let at = [ring.table, ring.used_ring(), ring.available_ring()].map(|at| at - HIGH + USER);
    for queue in [63u32, 62] {
        front_end.state(R::SET_VRING_ENABLE, queue, 1);
        front_end.raw_addresses(queue, at);
        let payload = u64::from(queue).to_ne_bytes();
        for (request, fd) in [
            (R::SET_VRING_CALL, guest.calls[0].as_raw_fd()),
            (R::SET_VRING_KICK, guest.kicked[0].as_raw_fd()),
        ] {
            front_end.send(request, 1, &payload, &[fd]);
        }
        front_end.state(R::SET_VRING_BASE, queue, u32::from(guest.rings[0].seen));
        front_end.state(R::SET_VRING_NUM, queue, 64);
        guest.assert_reads(0);
        assert_eq!(front_end.base(queue), u32::from(guest.rings[0].seen));
    }
    server.end();
}

#[test]
fn buffers_at_odd_addresses_are_served_around_the_page_cache() {
    let server = Server::start(Options { direct: true, ..Options::default() });
    let (_front_end, mut guest) = server.attached(1);
    // Odd addresses, pieces that are no sectors, and a request that begins within a block.
    for (sector, pieces) in [
        (3u64, &[(1u64, 512u32)][..]),
        (5, &[(7, 100), (901, 412)]),
        (9, &[(4095, 1), (8191, 1023), (513, 512)]),
    ] {
        let data: Vec<_> = pieces.iter().map(|(at, len)| (DATA + at, *len, true)).collect();
        guest.send(0, IN, sector, &data);
        guest.kick(0);
        assert_eq!(guest.wait(0), [0]);
        let mut seen = Vec::new();
        for (at, len, _) in &data {
            seen.extend(guest.rings[0].read(*at, *len as usize));
        }
        for (index, part) in seen.chunks(512).enumerate() {
            assert!(part.iter().all(|byte| u64::from(*byte) == sector + index as u64));
        }
    }
    guest.rings[0].write(DATA + 13, &[0xa5; 512]);
    guest.send(0, OUT, 11, &[(DATA + 13, 300, false), (DATA + 313, 212, false)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    let disk = server.end();
    assert!(disk[11 * 512..12 * 512].iter().all(|byte| *byte == 0xa5));
    assert_eq!((disk[11 * 512 - 1], disk[12 * 512]), (10, 12), "the neighbours are as they were");
}

#[test]
fn descriptors_that_are_no_eventfds_hurt_nobody() {
    let server = Server::start(Options::default());
    let null = File::open("/dev/null").expect("open");
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        let (mut front_end, guest) = server.attached(1);
        front_end.send(request, 9, &0u64.to_ne_bytes(), &[null.as_raw_fd()]);
        front_end.reply(request);
        drop((front_end, guest));
        let (_front_end, mut guest) = server.attached(1);
        guest.assert_reads(0);
    }
    server.end();
}
