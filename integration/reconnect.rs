//! The socket: who may have it, who serves it next, and what is left of it.

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use integration::client::{Client, Request};
use integration::daemon::{Daemon, is_listening};
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

const MIB: usize = 1 << 20;

/// A scratch directory and an empty image in it.
fn disk(name: &str) -> (Scratch, std::path::PathBuf) {
    let scratch = Scratch::new(name);
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 16 * MIB);
    (scratch, image)
}

fn write(client: &mut Client, offset: u64, byte: u8) {
    client.buffer(0)[..4096].fill(byte);
    client.execute(Request::Write { offset, length: 4096 }).expect("write");
}

fn assert_holds(client: &mut Client, offset: u64, byte: u8) {
    client.buffer(0)[..4096].fill(!byte);
    client.execute(Request::Read { offset, length: 4096 }).expect("read");
    assert!(client.buffer(0)[..4096].iter().all(|found| *found == byte), "the data at {offset}");
}

#[test]
fn one_front_end_after_the_other_is_served() {
    let (scratch, image) = disk("reconnect");
    let mut daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    for round in 1..=10 {
        let queues = usize::from(round % 4) + 1;
        let mut client =
            Client::connect(&scratch.socket(), queues, DEPTH).expect("connect to the daemon");
        write(&mut client, u64::from(round) << 16, round);
        // Nothing is flushed: a disconnect loses nothing that was answered.
        for earlier in 1..=round {
            assert_holds(&mut client, u64::from(earlier) << 16, earlier);
        }
    }
    daemon.assert_alive();
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn a_front_end_that_vanishes_with_requests_in_flight_is_forgotten() {
    let (scratch, image) = disk("vanish");
    let mut daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    for round in 0..20 {
        let mut client =
            Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
        while let Some(slot) = client.free_slot() {
            let offset = ((round * DEPTH + slot) as u64 % 256) << 16;
            client.buffer(slot)[..65536].fill(0x5a);
            client.submit(0, slot, Request::Write { offset, length: 65536 }, &[]).expect("submit");
        }
        client.kick().expect("kick");
        // The client and its memory go away while the daemon works on the requests.
    }
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    write(&mut client, 0, 7);
    assert_holds(&mut client, 0, 7);
    drop(client);
    daemon.assert_alive();
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn a_second_daemon_on_a_live_socket_is_refused() {
    let (scratch, image) = disk("second");
    let other = scratch.file("other.qcow2");
    images::create(&other, "qcow2", "", 16 * MIB);
    let first = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut second = Daemon::spawn(&scratch, &other, &["--format", "qcow2"]);
    let status = second.wait();
    assert_eq!(status.code(), Some(1), "the second daemon ended with {status}");
    let socket = scratch.socket();
    let log = second.log();
    assert!(log.contains(socket.to_str().expect("plain text")), "the log names the socket: {log}");
    // The first one has lost neither its socket nor its service.
    let mut client = Client::connect(&socket, 1, DEPTH).expect("connect to the first daemon");
    write(&mut client, 0, 3);
    assert_holds(&mut client, 0, 3);
    drop(client);
    first.terminate();
}

#[test]
fn a_second_daemon_is_refused_while_a_front_end_is_attached() {
    let (scratch, image) = disk("second-attached");
    let other = scratch.file("other.qcow2");
    images::create(&other, "qcow2", "", 16 * MIB);
    let first = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
    write(&mut client, 0, 3);
    let mut second = Daemon::spawn(&scratch, &other, &["--format", "qcow2"]);
    let status = second.wait();
    assert_eq!(status.code(), Some(1), "the second daemon ended with {status}");
    assert_holds(&mut client, 0, 3);
    drop(client);
    first.terminate();
}

#[test]
fn a_stale_socket_is_taken_over() {
    let (scratch, image) = disk("stale");
    // A listener that is dropped leaves its socket file behind.
    drop(UnixListener::bind(scratch.socket()).expect("make a socket"));
    assert!(scratch.socket().exists() && !is_listening(&scratch.socket()));
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    write(&mut client, 0, 9);
    drop(client);
    daemon.terminate();
}

#[test]
fn a_regular_file_in_the_place_of_the_socket_is_left_alone() {
    let (scratch, image) = disk("file");
    fs::write(scratch.socket(), "precious").expect("make a file");
    let mut daemon = Daemon::spawn(&scratch, &image, &["--format", "qcow2"]);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(1), "the daemon ended with {status}");
    let left = fs::read_to_string(scratch.socket()).expect("read the file");
    assert_eq!(left, "precious");
}

#[test]
fn termination_makes_answered_writes_durable_and_removes_the_socket() {
    let (scratch, image) = disk("terminate");
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    write(&mut client, 65536, 0x42);
    // The front-end is still attached, and nothing was flushed.
    daemon.terminate();
    drop(client);
    images::assert_clean(&image);
    let raw = scratch.file("converted.raw");
    images::convert_to_raw(&image, "qcow2", None, &raw);
    let bytes = fs::read(raw).expect("read the converted image");
    assert!(bytes[65536..65536 + 4096].iter().all(|byte| *byte == 0x42), "the data is there");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let (scratch, image) = disk("read-only");
    let before = fs::read(&image).expect("read the image");
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2", "--read-only"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let features = client.features();
    assert!(features.contains(virtio_driver::VirtioBlkFeatureFlags::RO), "{features:?}");
    client.execute(Request::Write { offset: 0, length: 4096 }).expect_err("a write is refused");
    assert_holds(&mut client, 0, 0);
    drop(client);
    daemon.terminate();
    assert!(fs::read(&image).expect("read the image") == before, "the image has not changed");
}

#[test]
fn requests_beyond_the_end_are_refused_and_the_queue_goes_on() {
    let (scratch, image) = disk("beyond");
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let end = (16 * MIB) as u64;
    let far = u64::MAX / 512 * 512 - 512;
    for offset in [end, end - 2048, far] {
        for request in [
            Request::Read { offset, length: 4096 },
            Request::Write { offset, length: 4096 },
            Request::Discard { offset, length: 4096 },
            Request::WriteZeroes { offset, length: 4096, unmap: true },
        ] {
            client.execute(request).expect_err("a request beyond the end is refused");
        }
    }
    write(&mut client, end - 4096, 1);
    assert_holds(&mut client, end - 4096, 1);
    // Waiting once more shows that no request was answered twice.
    assert!(client.wait(Duration::from_millis(50)).expect("wait").is_empty());
    drop(client);
    daemon.terminate();
    images::assert_clean(&image);
}
