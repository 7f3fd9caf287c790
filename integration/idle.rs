//! A daemon with a front-end attached that asks for nothing uses next to nothing.

use std::time::Duration;

use integration::client::{Client, Request};
use integration::daemon::Daemon;
use integration::guest::{Guest, built};
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

/// What the daemon may hold for itself.
const MEMORY_KIB: u64 = 20 << 10;

/// Watches the daemon for some seconds in which nothing is asked of it.
fn assert_idle(daemon: &mut Daemon) {
    // What was begun before, such as giving buffers back, may come to its end.
    std::thread::sleep(Duration::from_secs(1));
    let before = daemon.processor_ticks();
    std::thread::sleep(Duration::from_secs(5));
    let ticks = daemon.processor_ticks() - before;
    let memory = daemon.memory();
    eprintln!("in 5 s of idleness: {ticks} ticks of processor time, {memory:?}");
    daemon.assert_alive();
    assert!(ticks <= 1, "{ticks} ticks of processor time in 5 s of idleness");
    // Memory shared with the guest is left out: those pages are the guest's, which would have them
    // without the daemon as well, and how many the daemon has touched is up to the guest.
    let own_kib = memory.anonymous_kib + memory.file_kib;
    assert!(own_kib < MEMORY_KIB, "{own_kib} KiB of memory of its own: {memory:?}");
}

#[test]
fn with_a_client_after_work() {
    let scratch = Scratch::new("idle-client");
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 1 << 30);
    let mut daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = Client::connect(&scratch.socket(), 4, DEPTH).expect("connect to the daemon");
    for index in 0..64 {
        let offset = index << 24;
        client.execute(Request::Write { offset, length: 4096 }).expect("write");
        client.execute(Request::Read { offset, length: 4096 }).expect("read");
    }
    client.execute(Request::Flush).expect("flush");
    assert_idle(&mut daemon);
    client.execute(Request::Read { offset: 0, length: 4096 }).expect("read after idleness");
    drop(client);
    daemon.terminate();
}

#[test]
fn without_a_client() {
    let scratch = Scratch::new("idle-alone");
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 1 << 30);
    let mut daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    // The first front-end comes and goes: the daemon goes back to waiting.
    drop(Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon"));
    assert_idle(&mut daemon);
    daemon.terminate();
}

#[test]
fn with_a_guest() {
    let scratch = Scratch::new("idle-guest");
    let image = scratch.file("disk.qcow2");
    images::convert_from_raw(&built("root.raw"), &image, "", false);
    let mut daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut guest = Guest::start(&scratch, 2, "disk_test=idle");
    guest.wait_for("GUEST-IDLE");
    assert_idle(&mut daemon);
    // The guest is cut off as by a power failure, which is nothing to the daemon.
    drop(guest);
    daemon.terminate();
    images::assert_clean(&image);
}
