//! The dirty log as a worker keeps it, under guests that make no sense.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::worker::dirty::{DirtyLog, Logging};
use vhost_user_qcow2::worker::queue::RingSetup;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};

use super::bench::{BORDER, Bench, DATA, HEADER, Options, RINGS, STATUS, TABLE, bench};
use super::driver::{Driver, IN, header};
use super::rings::{left, scribble, setup};

const PAGE: usize = 4096;
/// Bytes of guest memory that have a bit in the log: all of it but what lies far up.
const LOGGED: usize = 2 * BORDER as usize;

/// A log in a file of its own.
struct Log {
    file: File,
}

impl Log {
    fn new() -> Self {
        let file = tempfile::tempfile().expect("a file");
        file.set_len((LOGGED / PAGE / 8) as u64).expect("its length");
        Self { file }
    }

    fn logging(&self) -> Arc<Logging> {
        let file = self.file.try_clone().expect("a copy");
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), LOGGED / PAGE / 8);
        let log = Arc::new(DirtyLog::new(mapping.expect("a mapping"), 0));
        Arc::new(Logging { log, used: Vec::new() })
    }

    /// For each page whether it is marked.
    fn marks(&self) -> Vec<bool> {
        let mut bytes = [0; LOGGED / PAGE / 8];
        self.file.read_exact_at(&mut bytes, 0).expect("read the log");
        bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 != 0)).collect()
    }
}

fn copy(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; LOGGED];
    memory.read_slice(&mut bytes, GuestAddress(0)).expect("guest memory");
    bytes
}

fn read<F: Future<Output = ()>>(bench: &mut Bench<F>) {
    bench.driver.write(HEADER, &header(IN, 3));
    bench.carry(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
}

#[test]
fn a_worker_has_a_log_only_while_it_is_told_to() {
    let mut bench = bench(Options::default());
    let log = Log::new();
    for logs in [false, true, false] {
        bench.worker.set_logging(logs.then(|| log.logging()));
        let is_logged = bench.worker.ring(0).expect("the ring").is_logged();
        assert_eq!((bench.worker.is_logging(), is_logged), (logs, logs));
        let before = log.marks();
        read(&mut bench);
        assert!(bench.worker.park(), "nothing to do");
        bench.worker.unpark();
        assert_eq!(log.marks() != before, logs, "as it is told");
    }
    let marked = log.marks().into_iter().filter(|mark| *mark).count();
    assert_eq!(marked, 3, "data, status byte, and the used ring");
}

#[test]
fn what_a_predecessor_put_on_the_used_ring_and_did_not_mark_is_marked() {
    const ENTRIES: u16 = 1024;
    let mut bench = bench(Options::default());
    let driver = Driver::new(&bench.memory, RINGS + 0x4_0000, ENTRIES);
    let (state, used) = (driver.state(false), driver.used_ring());
    let log = Log::new();
    bench.worker.set_logging(Some(log.logging()));
    for (inflight, pages) in [(None, 2), (Some(left(0, ENTRIES)), 3)] {
        bench.worker.start(1, RingSetup { inflight, ..setup(state) }).expect("it is served");
        bench.worker.turn();
        let first = usize::try_from(used).expect("low memory") / PAGE;
        let marked = (first..first + 3).filter(|page| log.marks()[*page]).count();
        assert_eq!(marked, pages, "pages of the used ring");
        bench.worker.stop(1);
        bench.worker.turn();
        drop(bench.worker.take_stopped().expect("nothing is under way"));
    }
}

#[test]
fn whatever_a_guest_puts_in_its_ring_what_changes_is_marked() {
    let test = "whatever_a_guest_puts_in_its_ring_what_changes_is_marked";
    let mut all_changes = 0;
    for seed in seeds(10) {
        let _repeat = Repeat::new("requests", test, seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let event_idx = random.bool();
        let mut bench = bench(Options { seed, event_idx, ..Options::default() });
        bench.engine.inner().set_hold(random.u8(0..4));
        let mut log = Log::new();
        bench.worker.set_logging(Some(log.logging()));
        let mut changes = 0;
        for _ in 0..15 {
            scribble(&mut random, &mut bench.driver);
            let before = copy(&bench.memory);
            // In the middle of anything, as chains under way are marked in the next log.
            if random.bool() {
                let new = Log::new();
                bench.worker.set_logging(Some(new.logging()));
                log = new;
            }
            for _ in 0..random.u8(1..4) {
                bench.worker.turn();
            }
            if random.u8(0..4) == 0 && bench.worker.park() {
                bench.worker.unpark();
            }
            // Data is written before its request is done with, and marked when it is.
            let after = copy(&bench.memory);
            bench.run();
            for (page, mark) in log.marks().into_iter().enumerate() {
                let range = page * PAGE..(page + 1) * PAGE;
                let same = before[range.clone()] == after[range];
                changes += usize::from(!same);
                assert!(same || mark, "page {page:#x} has changed");
            }
        }
        all_changes += changes;
    }
    assert!(all_changes > 0, "nothing was ever done");
}

#[test]
fn a_chain_through_a_table_is_logged_by_its_parts() {
    let mut bench = bench(Options::default());
    let log = Log::new();
    bench.worker.set_logging(Some(log.logging()));
    bench.driver.write(HEADER, &header(IN, 3));
    let data = [(BORDER - 256, 512, true), (DATA + 8192, 1024, true), (STATUS, 1, true)];
    bench.driver.send_indirect(TABLE, &[&[(HEADER, 16, false)][..], &data].concat());
    bench.run();
    assert_eq!(bench.driver.used().len(), 1);
    let used = bench.driver.used_ring();
    assert_eq!(used / PAGE as u64, (RINGS + 0x2_0000) / PAGE as u64);
    let mut wanted = vec![false; LOGGED / PAGE];
    for at in [BORDER - 1, BORDER, DATA + 8192, STATUS, used] {
        wanted[at as usize / PAGE] = true;
    }
    assert!(log.marks() == wanted, "pages that are written, and no other");
}

#[test]
fn an_entry_in_the_middle_of_a_large_used_ring_is_marked() {
    // Its pages: flags, index and the first entries; the middle; the wish behind the last entry.
    let mut bench = bench(Options { size: 1024, start: 600, ..Options::default() });
    let log = Log::new();
    bench.worker.set_logging(Some(log.logging()));
    let middle = bench.driver.used_ring() as usize / PAGE + 1;
    assert!(!log.marks()[middle]);
    read(&mut bench);
    assert!(log.marks()[middle]);
}
