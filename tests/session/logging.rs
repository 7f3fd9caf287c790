//! The dirty log: whatever the daemon writes to guest memory is marked, in this log or a later one.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::seeds::{Repeat, seeds};

use super::driver::{FLUSH, IN, OUT};
use super::front_end::{FrontEnd, LOG_ALL, features, request as R};
use super::guest::{DATA, Guest, HIGH, REGIONS};
use super::server::{Options, Server};

const PAGE: u64 = 4096;
/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);
/// Requests of the type that asks for the serial number.
const GET_ID: u32 = 8;

/// A log that covers the guest's highest address; nearly all of it is a hole in its file.
struct Log {
    file: File,
}

impl Log {
    const BYTES: u64 = (HIGH + Guest::MEMORY) / PAGE / 8;
    /// Where it begins in its file.
    const OFFSET: u64 = 4096;

    fn new() -> Self {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(Self::OFFSET + Self::BYTES).expect("its length");
        Self { file }
    }

    /// Sends it to the daemon; it is in use afterwards.
    fn send(&self, front_end: &mut FrontEnd) {
        self.send_part(front_end, Self::BYTES);
    }

    fn send_part(&self, front_end: &mut FrontEnd, bytes: u64) {
        let payload = [bytes, Self::OFFSET].map(u64::to_ne_bytes).concat();
        front_end.send(R::SET_LOG_BASE, 1, &payload, &[self.file.as_raw_fd()]);
        front_end.reply(R::SET_LOG_BASE);
    }

    /// The marked pages of the guest's memory.
    fn pages(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for (at, len, _) in REGIONS {
            let first = at / PAGE / 8;
            let mut bytes = vec![0; (len / PAGE / 8) as usize];
            self.file.read_exact_at(&mut bytes, Self::OFFSET + first).expect("read the log");
            let bits =
                (first * 8..).zip(bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit)));
            pages.extend(bits.filter(|(_, bit)| bit & 1 != 0).map(|(page, _)| page));
        }
        pages
    }
}

/// What the guest's memory holds.
fn memory(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; guest.file.metadata().expect("its length").len() as usize];
    guest.file.read_exact_at(&mut bytes, 0).expect("read guest memory");
    bytes
}

/// The pages by guest address that differ.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let page = |number: u64, offset: u64| {
        let at = (offset + number * PAGE) as usize;
        before[at..at + PAGE as usize] != after[at..at + PAGE as usize]
    };
    let regions = REGIONS.iter().flat_map(|(at, len, offset)| {
        let numbers = (0..len / PAGE).filter(move |number| page(*number, *offset));
        numbers.map(move |number| at / PAGE + number)
    });
    regions.collect()
}

/// The pages of a range.
fn pages(at: u64, len: u64) -> impl Iterator<Item = u64> {
    at / PAGE..=(at + len - 1) / PAGE
}

fn set_features(front_end: &mut FrontEnd, features: u64) {
    assert_eq!(front_end.acknowledged(R::SET_FEATURES, &features.to_ne_bytes(), &[]), 0);
}

/// The addresses of a ring, with the flag by which its used ring is logged, as QEMU sends them.
fn log_ring(front_end: &mut FrontEnd, guest: &Guest, queue: u32, is_logged: bool) {
    let at = guest.rings[queue as usize].used_ring();
    front_end.logged_addresses(guest, queue, is_logged.then_some(at));
}

#[test]
fn whatever_changes_while_logs_are_swapped_is_marked() {
    let test = "whatever_changes_while_logs_are_swapped_is_marked";
    for seed in seeds(8) {
        let _repeat = Repeat::new("session", test, seed);
        Rounds::new(seed).run();
    }
}

/// Random requests of one guest, with a log for each part of each round.
struct Rounds {
    random: fastrand::Rng,
    server: Server,
    front_end: FrontEnd,
    guest: Guest,
    /// Requests that were made available and not seen in a used ring, by queue.
    open: Vec<usize>,
    /// Pages that the device may write.
    allowed: BTreeSet<u64>,
    has_hotplug: bool,
}

impl Rounds {
    const QUEUES: usize = 3;

    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let server = Server::start(Options { threads: random.usize(1..4), ..Options::default() });
        let (mut front_end, guest) = (server.connect(), Guest::new(Self::QUEUES));
        front_end.negotiate();
        front_end.add_memory(&guest);
        let event_idx = if random.bool() { 1 << 29 } else { 0 };
        set_features(&mut front_end, features() | event_idx | LOG_ALL);
        let open = vec![0; Self::QUEUES];
        let (allowed, has_hotplug) = (BTreeSet::new(), false);
        Self { random, server, front_end, guest, open, allowed, has_hotplug }
    }

    fn run(mut self) {
        Log::new().send(&mut self.front_end);
        for queue in 0..Self::QUEUES as u32 {
            self.front_end.set_up(&self.guest, queue);
            if self.random.bool() {
                log_ring(&mut self.front_end, &self.guest, queue, true);
            }
        }
        for _ in 0..4 {
            self.round();
        }
        self.server.end();
    }

    /// Requests that are prepared while the rings stand still, and served while logs change.
    fn round(&mut self) {
        self.enable(0);
        self.fill();
        let mut memories = vec![memory(&self.guest)];
        let mut logs = vec![Log::new()];
        logs[0].send(&mut self.front_end);
        self.server.hold(self.random.bool());
        self.enable(1);
        for _ in 0..self.random.usize(0..4) {
            if self.random.bool() {
                std::thread::sleep(Duration::from_micros(self.random.u64(0..400)));
            }
            let log = Log::new();
            log.send(&mut self.front_end);
            let old = logs.last().expect("a log").pages();
            memories.push(memory(&self.guest));
            self.server.hold(self.random.bool());
            std::thread::sleep(Duration::from_micros(self.random.u64(0..400)));
            assert_eq!(logs.last().expect("a log").pages(), old, "it was replaced before");
            logs.push(log);
        }
        self.server.hold(false);
        self.finish();
        self.enable(0);
        memories.push(memory(&self.guest));
        let marked: Vec<BTreeSet<u64>> = logs.iter().map(Log::pages).collect();
        for part in 0..logs.len() {
            let known: BTreeSet<u64> = marked[part..].iter().flatten().copied().collect();
            let changed = changed(&memories[part], &memories[part + 1]);
            let forgotten: Vec<_> = changed.difference(&known).collect();
            assert!(forgotten.is_empty(), "part {part} of {}: {forgotten:x?}", logs.len());
        }
        let all: BTreeSet<u64> = marked.into_iter().flatten().collect();
        let wrong: Vec<_> = all.difference(&self.allowed).collect();
        assert!(wrong.is_empty(), "nothing can have been written there: {wrong:x?}");
        self.enable(1);
    }

    fn enable(&mut self, value: u32) {
        for queue in 0..Self::QUEUES as u32 {
            let done = self.front_end.acknowledged_state(R::SET_VRING_ENABLE, queue, value);
            assert_eq!(done, 0);
        }
    }

    /// Makes requests available whose answers change what lies in memory.
    fn fill(&mut self) {
        if !self.has_hotplug && self.random.u8(0..4) == 0 {
            self.front_end.add_region(&self.guest, 2);
            self.has_hotplug = true;
        }
        self.allowed.clear();
        for queue in 0..Self::QUEUES {
            let used = self.guest.rings[queue].used_ring();
            self.allowed.extend(pages(used, 6 + 64 * 8));
            // At most four descriptors each.
            for _ in 0..self.random.usize(0..16) {
                self.request(queue);
            }
        }
    }

    fn request(&mut self, queue: usize) {
        let sectors = self.random.u64(1..24);
        let kind = self.random.choice([IN, IN, OUT, FLUSH, GET_ID]).expect("a kind");
        let base = match self.random.u8(0..3) {
            0 => 0x1_0000,
            1 if self.has_hotplug => Guest::HOTPLUG,
            _ => DATA + 0x1_0000,
        };
        let at = base + self.random.u64(0..0x6_0000);
        let len = match kind {
            FLUSH => 0,
            GET_ID => 20,
            _ => sectors * 512,
        };
        let mut noise = vec![0; len as usize];
        self.random.fill(&mut noise);
        self.guest.rings[queue].write(at, &noise);
        // The data in one piece or in two.
        let cut = self.random.u64(0..=len);
        let writable = kind != OUT;
        let parts = [(at, cut as u32, writable), (at + cut, (len - cut) as u32, writable)];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 != 0).collect();
        for (at, len, _) in parts.iter().filter(|part| part.2) {
            self.allowed.extend(pages(*at, u64::from(*len)));
        }
        let sector = self.random.u64(0..Server::DISK / 512 - 24);
        let status = self.guest.send(queue, kind, sector, &parts);
        self.allowed.extend(pages(status, 1));
        self.open[queue] += 1;
    }

    /// Waits until everything is answered, without writing anything.
    fn finish(&mut self) {
        for queue in 0..Self::QUEUES {
            while self.open[queue] > 0 {
                let statuses = self.guest.poll(queue);
                assert!(statuses.iter().all(|status| *status == 0), "{statuses:?}");
                self.open[queue] -= statuses.len();
            }
        }
    }
}

#[test]
fn nothing_is_logged_unless_the_feature_is_taken() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(2);
    let log = Log::new();
    log.send(&mut front_end);
    guest.assert_reads(0);
    log_ring(&mut front_end, &guest, 0, true);
    guest.assert_reads(0);
    assert!(log.pages().is_empty(), "the file alone means nothing, nor does the ring's flag");
    set_features(&mut front_end, features() | LOG_ALL);
    guest.assert_reads(0);
    guest.assert_reads(1);
    for queue in [0, 1] {
        let read = (DATA + 0x1_0000 + queue as u64 * 512) / PAGE;
        let used = guest.rings[queue].used_ring() / PAGE;
        assert!(log.pages().contains(&read) && log.pages().contains(&used), "queue {queue}");
    }
    // A migration that is cancelled: the log is never taken back.
    set_features(&mut front_end, features());
    log_ring(&mut front_end, &guest, 0, false);
    let before = log.pages();
    guest.send(0, IN, 3, &[(DATA + 0x3_0000, 4096, true)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    assert_eq!(log.pages(), before);
    // And another one.
    set_features(&mut front_end, features() | LOG_ALL);
    guest.send(0, IN, 3, &[(DATA + 0x3_0000, 4096, true)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    assert!(log.pages().contains(&((DATA + 0x3_0000) / PAGE)));
    assert_eq!(front_end.base(0), 5, "the ring was never stopped for good");
    server.end();
}

#[test]
fn logging_begins_when_what_is_under_way_is_done() {
    for with_file_first in [true, false] {
        let server = Server::start(Options::default());
        let (mut front_end, mut guest) = server.attached(1);
        let log = Log::new();
        let take = (features() | LOG_ALL).to_ne_bytes();
        match with_file_first {
            true => log.send(&mut front_end),
            false => assert_eq!(front_end.acknowledged(R::SET_FEATURES, &take, &[]), 0),
        }
        server.hold(true);
        guest.send(0, IN, 3, &[(DATA, 4096, true)]);
        guest.kick(0);
        server.wait_until_held();
        let file = [log.file.as_raw_fd()];
        let whole = [Log::BYTES, Log::OFFSET].map(u64::to_ne_bytes).concat();
        match with_file_first {
            true => front_end.send(R::SET_FEATURES, 9, &take, &[]),
            false => front_end.send(R::SET_LOG_BASE, 9, &whole, &file),
        }
        front_end.assert_silent(MOMENT);
        server.hold(false);
        front_end.any_reply();
        assert_eq!(guest.rings[0].used().len(), 1, "it was answered before");
        guest.send(0, IN, 3, &[(DATA, 4096, true)]);
        guest.kick(0);
        assert_eq!(guest.poll(0), [0]);
        assert!(log.pages().contains(&(DATA / PAGE)));
        server.end();
    }
}

#[test]
fn a_log_is_swapped_while_a_request_is_under_way_without_waiting_for_it() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let logs = [Log::new(), Log::new()];
    logs[0].send(&mut front_end);
    set_features(&mut front_end, features() | LOG_ALL);
    let before = logs[0].pages();
    server.hold(true);
    guest.send(0, IN, 3, &[(DATA, 4096, true)]);
    guest.kick(0);
    server.wait_until_held();
    logs[1].send(&mut front_end);
    log_ring(&mut front_end, &guest, 0, true);
    server.hold(false);
    assert_eq!(guest.wait(0), [0]);
    assert!(logs[1].pages().contains(&(DATA / PAGE)), "what was taken before is marked in the new");
    assert!(!logs[0].pages().contains(&(DATA / PAGE)));
    assert!(before.is_subset(&logs[0].pages()));
    server.end();
}

#[test]
fn a_used_ring_is_logged_where_the_front_end_says() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let log = Log::new();
    log.send(&mut front_end);
    set_features(&mut front_end, features() | LOG_ALL);
    let elsewhere = 77 * PAGE;
    front_end.logged_addresses(&guest, 0, Some(elsewhere));
    assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 64);
    guest.assert_reads(0);
    assert!(log.pages().contains(&77));
    server.end();
}

#[test]
fn a_log_that_is_shorter_than_the_memory_is_never_overrun() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let log = Log::new();
    // One byte: the guest's lowest eight pages.
    log.send_part(&mut front_end, 1);
    set_features(&mut front_end, features() | LOG_ALL);
    guest.assert_reads(0);
    guest.send(0, IN, 3, &[(7 * PAGE, 4096, true), (DATA, 4096, true), (8 * PAGE, 512, true)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), [0]);
    assert_eq!(log.pages().into_iter().collect::<Vec<_>>(), [7]);
    server.end();
}

#[test]
fn a_log_that_cannot_be_written_is_not_taken_for_one() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let log = Log::new();
    log.send_part(&mut front_end, Log::BYTES + 1);
    let take = (features() | LOG_ALL).to_ne_bytes();
    assert_ne!(front_end.acknowledged(R::SET_FEATURES, &take, &[]), 0, "there is no log");
    guest.assert_reads(0);
    log.send(&mut front_end);
    set_features(&mut front_end, features() | LOG_ALL);
    guest.assert_reads(0);
    // With the log in use there is only one way to say that the next one cannot be used.
    let payload = [u64::MAX, 1].map(u64::to_ne_bytes).concat();
    front_end.send(R::SET_LOG_BASE, 1, &payload, &[log.file.as_raw_fd()]);
    front_end.assert_closed();
    let (_front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn a_log_descriptor_is_accepted() {
    let server = Server::start(Options::default());
    let (mut front_end, mut guest) = server.attached(1);
    let (_, event) = super::driver::event();
    let fd = [event.as_raw_fd()];
    assert_eq!(front_end.acknowledged(R::SET_LOG_FD, &[], &fd), 0);
    front_end.send(R::SET_LOG_FD, 1, &[], &fd);
    assert_eq!(front_end.ask_u64(R::GET_QUEUE_NUM), 64);
    guest.assert_reads(0);
    server.end();
}
