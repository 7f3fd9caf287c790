//! The in-flight region: made, brought back, and what a predecessor has left in it.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::MOMENT;
use super::driver::{FLUSH, IN, OUT};
use super::front_end::{FrontEnd, features, request as R};
use super::guest::{DATA, Guest};
use super::server::{Options, Server};

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
/// Bytes of the record of a ring of 64.
const STRIDE: u64 = 1088;

/// A region as the messages describe it.
struct Region {
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl Region {
    fn of(queues: u16) -> Self {
        Self { size: u64::from(queues) * STRIDE, offset: 0, queues, queue_size: 64 }
    }

    fn payload(&self) -> Vec<u8> {
        let mut payload = [self.size, self.offset].map(u64::to_ne_bytes).concat();
        payload.extend([self.queues, self.queue_size].map(u16::to_ne_bytes).concat());
        payload.extend([0; 4]);
        payload
    }
}

impl FrontEnd {
    /// Asks for a region; gives its description and its file.
    pub(crate) fn get_inflight(&mut self, queues: u16) -> (Vec<u8>, File) {
        let wish = Region { size: 0, ..Region::of(queues) };
        self.send(GET_INFLIGHT_FD, 1, &wish.payload(), &[]);
        let mut bytes = [0; 36];
        let (len, file) = self.socket.recv_with_fd(&mut bytes).expect("an answer");
        self.socket.read_exact(&mut bytes[len..]).expect("the rest");
        assert_eq!(bytes[..12], [31_u32, 5, 24].map(u32::to_ne_bytes).concat());
        (bytes[12..].to_vec(), file.expect("a file"))
    }

    pub(crate) fn set_inflight(&mut self, payload: &[u8], file: &File) -> u64 {
        self.acknowledged(SET_INFLIGHT_FD, payload, &[file.as_raw_fd()])
    }
}

/// The header's version, entries, last head and used index of one record, and its marked heads.
fn look(file: &File, queue: u64) -> ([u16; 4], Vec<u16>) {
    let mut bytes = vec![0; STRIDE as usize];
    file.read_exact_at(&mut bytes, queue * STRIDE).expect("the record");
    let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    let marked = |head: &u16| bytes[16 + usize::from(*head) * 16] != 0;
    ([8, 10, 12, 14].map(word), (0..64).filter(marked).collect())
}

/// A record as a predecessor leaves it: a used index, and heads under way with their counters.
fn record(used: u16, marks: &[(u16, u64)]) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(STRIDE).expect("its length");
    let header = [1_u16, 64, 0, used].map(u16::to_ne_bytes).concat();
    file.write_all_at(&header, 8).expect("the header");
    for (head, counter) in marks {
        let at = 16 + u64::from(*head) * 16;
        file.write_all_at(&[1], at).expect("a mark");
        file.write_all_at(&counter.to_ne_bytes(), at + 8).expect("a counter");
    }
    file
}

/// A front-end that has done everything but describe its rings.
fn ready(server: &Server, guest: &Guest) -> FrontEnd {
    let mut front_end = server.connect();
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    front_end.add_memory(guest);
    front_end
}

#[test]
fn the_first_flush_syncs_what_a_predecessor_may_have_written() {
    let server = Server::start(Options { qcow2: true, ..Options::default() });
    // Without a region nobody can tell that there was one.
    let (_front_end, mut guest) = server.attached(1);
    for syncs in [1, 0] {
        let before = server.syncs();
        guest.send(0, FLUSH, 0, &[]);
        guest.kick(0);
        assert_eq!(guest.poll(0), [0]);
        assert_eq!(server.syncs() - before, syncs);
    }
    server.end();
}

#[test]
fn a_fresh_region_takes_the_rings_index() {
    let server = Server::start(Options::default());
    let mut guest = Guest::new(2);
    guest.start_at(0, 65_535);
    let mut front_end = server.connect();
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    // It comes before memory and rings.
    let (payload, file) = front_end.get_inflight(2);
    assert_eq!(payload[8..20], Region::of(2).payload()[8..20]);
    let size = u64::from_ne_bytes(payload[..8].try_into().expect("eight bytes"));
    assert_eq!(size, file.metadata().expect("its length").len());
    assert!(size > Region::of(2).size, "there is room behind the records");
    file.set_len(0).expect_err("it cannot be cut off");
    file.set_len(1 << 20).expect_err("nor made longer");
    assert_eq!(front_end.set_inflight(&payload, &file), 0);
    assert_eq!(look(&file, 0), ([0; 4], vec![]), "nothing is done before a ring starts");
    front_end.add_memory(&guest);
    front_end.set_up(&guest, 0);
    assert_eq!(look(&file, 0), ([1, 64, 0, 65_535], vec![]));
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 0);
    assert_eq!(look(&file, 0), ([1, 64, 0, 0], vec![]));
    assert_eq!(look(&file, 1), ([0; 4], vec![]), "the other one has never run");
    server.end();
}

#[test]
fn what_is_under_way_is_marked_until_it_is_answered() {
    let server = Server::start(Options::default());
    let mut guest = Guest::new(1);
    let mut front_end = ready(&server, &guest);
    let (payload, file) = front_end.get_inflight(1);
    assert_eq!(front_end.set_inflight(&payload, &file), 0);
    front_end.set_up(&guest, 0);
    server.hold(true);
    guest.send(0, OUT, 4, &[(DATA, 4096, false)]);
    guest.send(0, OUT, 20, &[(DATA, 4096, false)]);
    guest.kick(0);
    server.wait_until_held();
    assert_eq!(look(&file, 0), ([1, 64, 0, 0], vec![0, 3]));
    // Another region, while requests are under way: they are finished first, in the old one.
    let (payload, other) = front_end.get_inflight(1);
    front_end.send(SET_INFLIGHT_FD, 9, &payload, &[other.as_raw_fd()]);
    front_end.assert_silent(MOMENT);
    server.hold(false);
    assert_eq!(front_end.reply(SET_INFLIGHT_FD), 0_u64.to_ne_bytes());
    assert_eq!(guest.rings[0].used().len(), 2);
    assert_eq!(look(&file, 0).1, [0u16; 0]);
    assert_eq!(look(&other, 0), ([1, 64, 0, 2], vec![]));
    guest.assert_reads(0);
    assert_eq!(look(&file, 0).0[3], 2, "the old one is not touched any more");
    server.end();
}

#[test]
fn cloud_hypervisors_reconnect_loses_nothing() {
    let server = Server::start(Options::default());
    let mut guest = Guest::new(1);
    guest.start_at(0, 7);
    // Three requests wait; the predecessor had taken the second before the first.
    for sector in [5, 6, 7] {
        let target = DATA + sector * 512;
        guest.send(0, IN, sector, &[(target, 512, true)]);
    }
    let file = record(7, &[(0, 10), (3, 9)]);
    let mut front_end = server.connect();
    front_end.negotiate();
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    assert_eq!(front_end.memory_table(&guest), 0);
    assert_eq!(front_end.acknowledged_state(R::SET_VRING_NUM, 0, 64), 0);
    assert_eq!(front_end.set_inflight(&Region::of(1).payload(), &file), 0);
    front_end.addresses(&guest, 0);
    // The available index, behind which lies nothing.
    assert_eq!(front_end.acknowledged_state(R::SET_VRING_BASE, 0, 10), 0);
    front_end.call(&guest, 0);
    front_end.kick(&guest, 0);
    assert_eq!(front_end.acknowledged_state(R::SET_VRING_ENABLE, 0, 1), 0);
    let mut statuses = guest.wait(0);
    while statuses.len() < 3 {
        statuses.extend(guest.wait(0));
    }
    assert_eq!(statuses, [0, 0, 0], "each was answered once");
    for sector in [5, 6, 7] {
        assert_eq!(guest.rings[0].read(DATA + sector * 512, 1), [sector as u8]);
    }
    guest.assert_reads(0);
    assert_eq!(front_end.base(0), 11);
    assert_eq!(look(&file, 0).1, [0u16; 0]);
    server.end();
}

#[test]
fn a_stop_finishes_what_a_predecessor_had_taken() {
    let server = Server::start(Options::default());
    let mut guest = Guest::new(1);
    guest.send(0, IN, 5, &[(DATA, 512, true)]);
    let file = record(0, &[(0, 0)]);
    let mut front_end = ready(&server, &guest);
    assert_eq!(front_end.set_inflight(&Region::of(1).payload(), &file), 0);
    front_end.set_up(&guest, 0);
    assert_eq!(front_end.base(0), 1);
    assert_eq!(guest.rings[0].used().len(), 1);
    assert_eq!(look(&file, 0).1, [0u16; 0]);
    server.end();
}

#[test]
fn a_region_that_contradicts_its_ring_is_refused_and_the_disk_can_be_reset() {
    for (used, marks, version) in
        [(0, &[][..], 9_u16), (0, &[(2, 0), (3, 0)], 1), (65_000, &[], 1), (1, &[], 1)]
    {
        let server = Server::start(Options::default());
        let mut guest = Guest::new(1);
        guest.send(0, IN, 5, &[(DATA, 512, true)]);
        let file = record(used, marks);
        file.write_all_at(&version.to_ne_bytes(), 8).expect("the version");
        let mut front_end = ready(&server, &guest);
        assert_eq!(front_end.set_inflight(&Region::of(1).payload(), &file), 0);
        front_end.error(&guest, 0);
        front_end.state(R::SET_VRING_NUM, 0, 64);
        front_end.state(R::SET_VRING_BASE, 0, 0);
        front_end.addresses(&guest, 0);
        front_end.call(&guest, 0);
        front_end.kick(&guest, 0);
        assert_ne!(front_end.acknowledged_state(R::SET_VRING_ENABLE, 0, 1), 0);
        guest.wait_for_error(0);
        assert!(guest.rings[0].used().is_empty());
        // The reset forgets the region.
        assert_eq!(front_end.acknowledged(R::RESET_DEVICE, &[], &[]), 0);
        guest.restart(0);
        front_end.set_up(&guest, 0);
        guest.assert_reads(0);
        server.end();
    }
}

#[test]
fn a_region_that_is_too_small_or_too_much_is_refused() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4096).expect("its length");
    let wrong = [
        Region { queues: 4, ..Region::of(3) },
        Region { queue_size: 128, ..Region::of(1) },
        Region { size: 1 << 40, queues: 4, ..Region::of(4) },
        Region { offset: 4096, ..Region::of(1) },
        Region { offset: 64, ..Region::of(1) },
        Region { offset: u64::MAX - 4095, ..Region::of(1) },
        Region { size: u64::MAX, queues: 65, ..Region::of(1) },
        Region { size: u64::MAX, queue_size: 2048, ..Region::of(1) },
        Region { queues: 0, ..Region::of(1) },
        Region { queue_size: 0, ..Region::of(1) },
    ];
    for (number, region) in wrong.iter().enumerate() {
        assert_ne!(front_end.set_inflight(&region.payload(), &file), 0, "case {number}");
        guest.assert_reads(0);
    }
    let null = File::open("/dev/null").expect("open");
    assert_ne!(front_end.set_inflight(&Region::of(1).payload(), &null), 0);
    assert_ne!(front_end.acknowledged(SET_INFLIGHT_FD, &Region::of(1).payload(), &[]), 0);
    assert_eq!(front_end.set_inflight(&Region::of(3).payload(), &file), 0);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn the_end_of_a_connection_leaves_a_region_in_order() {
    let server = Server::start(Options::default());
    let mut guest = Guest::new(1);
    let mut front_end = ready(&server, &guest);
    let (payload, file) = front_end.get_inflight(1);
    assert_eq!(front_end.set_inflight(&payload, &file), 0);
    front_end.set_up(&guest, 0);
    guest.assert_reads(0);
    drop(front_end);
    // Nobody kicks for this one.
    guest.send(0, IN, 5, &[(DATA, 512, true)]);
    let mut front_end = ready(&server, &guest);
    assert_eq!(front_end.set_inflight(&payload, &file), 0);
    front_end.set_up(&guest, 0);
    assert_eq!(guest.wait(0), [0]);
    assert_eq!(front_end.base(0), 2);
    assert_eq!(look(&file, 0).1, [0u16; 0]);
    server.end();
}
