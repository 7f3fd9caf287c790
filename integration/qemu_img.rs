//! Images that the daemon makes are images that `qemu-img` accepts.

use integration::client::{Client, Request};
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

/// Has the daemon make an image of the size that `text` stands for, and looks at it from outside.
fn make(text: &str, bytes: u64) {
    let scratch = Scratch::new("create");
    let image = scratch.file("disk.qcow2");
    let daemon = Daemon::start(&scratch, &image, &["--create", text]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let capacity = u64::from(client.config().expect("read the configuration").capacity);
    assert_eq!(capacity * 512, bytes);
    let last = Request::Write { offset: bytes - 4096, length: 4096 };
    client.buffer(0)[..4096].fill(0x77);
    client.execute(last).expect("write the last block");
    drop(client);
    daemon.terminate();
    images::assert_clean(&image);
    let info = images::info(&image);
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["virtual-size"], bytes);
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
    assert_eq!(info["format-specific"]["data"]["corrupt"], false);
    assert_eq!(info["dirty-flag"], false);
    let actual = info["actual-size"].as_u64().expect("a size");
    assert!(actual < 2 << 20, "an image with one cluster written takes {actual} bytes");
}

#[test]
fn created_10_gib() {
    make("10G", 10 << 30);
}

#[test]
fn created_1_mib() {
    make("1M", 1 << 20);
}

#[test]
fn created_2_tib() {
    make("2T", 2 << 40);
}

#[test]
fn an_image_that_exists_is_served_as_it_is() {
    let scratch = Scratch::new("create-existing");
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "cluster_size=4k", 8 << 20);
    let daemon = Daemon::start(&scratch, &image, &["--create", "1G"]);
    let client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let capacity = u64::from(client.config().expect("read the configuration").capacity);
    assert_eq!(capacity * 512, 8 << 20, "the existing image keeps its size");
    drop(client);
    daemon.terminate();
    images::assert_clean(&image);
    assert_eq!(images::info(&image)["cluster-size"], 4096);
}

#[test]
fn clusters_given_up_return_their_space() {
    let scratch = Scratch::new("discard-space");
    let image = scratch.file("disk.qcow2");
    let daemon = Daemon::start(&scratch, &image, &["--create", "64M"]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let piece = 256 << 10;
    client.buffer(0).fill(0x99);
    for offset in (0..32_u64 << 20).step_by(piece) {
        client.execute(Request::Write { offset, length: piece }).expect("write");
    }
    client.execute(Request::Flush).expect("flush");
    let full = images::allocated_bytes(&image);
    for offset in (0..32_u64 << 20).step_by(4 << 20) {
        client.execute(Request::Discard { offset, length: 4 << 20 }).expect("discard");
    }
    client.execute(Request::Flush).expect("flush");
    drop(client);
    daemon.terminate();
    let empty = images::allocated_bytes(&image);
    eprintln!("the image took {full} bytes before the discard and {empty} after it");
    assert!(full >= 32 << 20 && empty < 4 << 20, "{full} bytes became {empty}");
    images::assert_clean(&image);
}
