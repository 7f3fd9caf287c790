//! A guest under QEMU that writes and checks all the time is paused, reset, and moved to another
//! QEMU on the same daemon.
//!
//! Long forms: `STOPS=50`, `RESETS=20` and `MIGRATIONS=10`, each for its test.

use std::cell::RefCell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use integration::daemon::Daemon;
use integration::guest::Guest;
use integration::images;
use integration::initramfs;
use integration::qmp::Monitor;
use integration::scratch::{Scratch, number_from_environment, seed};
use serde_json::json;

/// MiB of the guest's memory.
const MEMORY: u64 = 160;
/// Bytes of the disk.
const DISK: usize = 64 << 20;
/// Rounds of each writer that count as going on.
const ROUNDS: u64 = 2;

/// A disk, its daemon, and machines that come and go.
struct Host {
    scratch: Scratch,
    image: PathBuf,
    daemon: Daemon,
}

/// A machine and its monitor.
struct Machine {
    guest: Guest,
    monitor: Monitor,
}

impl Host {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let image = scratch.file("disk.qcow2");
        images::create(&image, "qcow2", "cluster_size=16k", DISK);
        initramfs::with_init(&scratch.file("initramfs"), include_str!("guest/load"));
        let daemon = Daemon::start(&scratch, &image, &[]);
        Self { scratch, image, daemon }
    }

    /// Starts a machine; `incoming` is where its guest comes from, if it comes from another one.
    fn machine(&self, name: &str, incoming: Option<&str>) -> Machine {
        let monitor = self.scratch.socket().with_file_name(format!("{name}.qmp"));
        let words = "console=ttyS0 quiet mitigations=off no_timer_check panic=-1";
        let initramfs = self.scratch.file("initramfs");
        let guest =
            Guest::launch(&self.scratch, name, MEMORY, &initramfs, "", |command: &mut Command| {
                command.args(["-smp", "2", "-append", words]);
                command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
                if let Some(uri) = incoming {
                    command.args(["-incoming", uri]);
                }
            });
        Machine { guest, monitor: Monitor::connect(&monitor) }
    }

    /// Ends the machine and the daemon, and checks the image.
    fn end(mut self, mut machine: Machine) {
        machine.guest.quit(&mut machine.monitor);
        self.daemon.assert_alive();
        self.daemon.terminate();
        images::assert_clean(&self.image);
    }
}

impl Machine {
    /// Waits until the guest has booted and found on the disk what it had written; gives the last
    /// rounds of its writers.
    fn wait_until_checked(&mut self) -> [u64; 2] {
        let rounds = self.guest.wait_for("GUEST-CHECKED");
        let mut rounds = rounds.split(' ').map(|round| round.parse().expect("a round"));
        [(); 2].map(|()| rounds.next().expect("two writers"))
    }

    /// Waits until each writer has done some more rounds; gives the last of each.
    fn wait_for_rounds(&mut self) -> [u64; 2] {
        let mut last = [0; 2];
        let mut count = [0; 2];
        while count.iter().any(|count| *count < ROUNDS) {
            let line = self.guest.wait_for("GUEST-ROUND");
            let (writer, round) = line.split_once(' ').expect("a writer and a round");
            let writer: usize = writer.parse().expect("a writer");
            last[writer] = round.parse().expect("a round");
            count[writer] += 1;
        }
        last
    }

    fn migrate(&mut self, uri: &str, bytes_per_second: u64) {
        let parameters = json!({ "max-bandwidth": bytes_per_second, "downtime-limit": 1000 });
        self.monitor.execute("migrate-set-parameters", &parameters);
        self.monitor.execute("migrate", &json!({ "uri": uri }));
    }
}

/// That the guest has found at least what each writer had written.
fn assert_found(found: [u64; 2], written: [u64; 2]) {
    let kept = (0..2).all(|writer| found[writer] >= written[writer]);
    assert!(kept, "rounds {found:?} were found, {written:?} were written");
}

#[test]
fn a_guest_is_stopped_and_continued_under_load() {
    let mut random = fastrand::Rng::with_seed(seed());
    let host = Host::new("stop-cont");
    let mut machine = host.machine("guest", None);
    machine.wait_until_checked();
    for _ in 0..number_from_environment("STOPS", 5) {
        machine.wait_for_rounds();
        sleep(Duration::from_millis(random.u64(0..500)));
        machine.monitor.run("stop");
        // Nothing is left to be done for a machine that stands still.
        sleep(Duration::from_millis(200));
        let before = host.daemon.processor_ticks();
        sleep(Duration::from_millis(random.u64(100..500)));
        assert!(host.daemon.processor_ticks() - before < 5, "the daemon works for nobody");
        machine.monitor.run("cont");
    }
    machine.wait_for_rounds();
    host.end(machine);
}

/// What QEMU 10.0 says when its processors' threads lose a race with its own reset, which then ends
/// it: an assertion about its memory map, without a back-end's part in it.
const RACE_OF_QEMU: &str = "iotlb_to_section";

#[test]
fn a_guest_is_reset_at_any_moment_and_finds_what_it_has_written() {
    let seed = seed();
    for attempt in 1.. {
        let log = RefCell::new(PathBuf::new());
        let outcome = catch_unwind(AssertUnwindSafe(|| reset_often(seed, &log)));
        let Err(panic) = outcome else { return };
        let said = fs::read_to_string(&*log.borrow()).unwrap_or_default();
        if attempt == 4 || !said.contains(RACE_OF_QEMU) {
            resume_unwind(panic);
        }
        eprintln!("QEMU has ended itself ({RACE_OF_QEMU}): once more");
    }
}

/// Says in `log` where QEMU's own messages go.
fn reset_often(seed: u64, log: &RefCell<PathBuf>) {
    let mut random = fastrand::Rng::with_seed(seed);
    let host = Host::new("reset");
    *log.borrow_mut() = host.scratch.file("guest.qemu.log");
    let mut machine = host.machine("guest", None);
    let mut written = [0; 2];
    for reset in 0..number_from_environment("RESETS", 3) {
        // Under the firmware, while the kernel finds its disk, or later.
        if reset % 3 == 2 {
            sleep(Duration::from_millis(random.u64(0..6000)));
        } else {
            let found = machine.wait_until_checked();
            assert_found(found, written);
            written = machine.wait_for_rounds();
            sleep(Duration::from_millis(random.u64(0..800)));
        }
        machine.monitor.run("system_reset");
        machine.guest.forget_console();
    }
    let found = machine.wait_until_checked();
    assert_found(found, written);
    machine.wait_for_rounds();
    host.end(machine);
}

#[test]
fn a_guest_moves_to_another_machine_under_load() {
    let host = Host::new("migrate");
    let mut source = host.machine("source", None);
    source.wait_until_checked();
    source.wait_for_rounds();
    // One that is given up: the guest goes on where it is, without a log.
    let uri = format!("unix:{}", host.scratch.socket().with_file_name("cancelled").display());
    let mut nowhere = host.machine("nowhere", Some(&uri));
    source.migrate(&uri, 1 << 20);
    source.monitor.wait_for_migration("active");
    source.wait_for_rounds();
    source.monitor.run("migrate_cancel");
    source.monitor.wait_for_migration("cancelled");
    source.wait_for_rounds();
    nowhere.guest.wait_until_gone();
    for number in 0..number_from_environment("MIGRATIONS", 1) {
        let uri = format!("unix:{}", host.scratch.socket().with_file_name("moving").display());
        let mut target = host.machine(&format!("target{number}"), Some(&uri));
        source.migrate(&uri, 200 << 20);
        let migration = source.monitor.wait_for_migration("completed");
        eprintln!("moved: {}", migration["ram"]);
        target.monitor.wait_for_status("running");
        // The source stays connected for a while; it has nothing to say any more.
        let written = target.wait_for_rounds();
        source.guest.quit(&mut source.monitor);
        eprintln!("after moving: rounds {written:?}");
        target.wait_for_rounds();
        source = target;
    }
    // What the disk holds is what the guest, wherever it was, has written.
    let written = source.wait_for_rounds();
    source.monitor.run("system_reset");
    let found = source.wait_until_checked();
    assert_found(found, written);
    host.end(source);
}
