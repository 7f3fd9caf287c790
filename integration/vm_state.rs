//! The state of a machine that QEMU keeps in an image survives our writes to its disk.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use integration::client::{Client, Request};
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::Scratch;
use integration::workload::DEPTH;

/// Starts a machine that does not run, gives its monitor `commands` and returns what it said.
fn monitor(image: &Path, commands: &str) -> String {
    let drive = format!("if=none,id=disk,format=qcow2,file={}", image.display());
    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-machine", "q35", "-m", "64M", "-nodefaults", "-display", "none"])
        .args(["-S", "-drive", &drive, "-device", "virtio-blk-pci,drive=disk"])
        .args(["-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start qemu-system-x86_64, which .ci/setup installs");
    let mut input = machine.stdin.take().expect("a pipe");
    input.write_all(commands.as_bytes()).expect("the monitor reads");
    drop(input);
    let output = machine.wait_with_output().expect("QEMU ends");
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "QEMU failed: {printed}");
    assert!(!printed.contains("Error"), "the monitor complains: {printed}");
    printed
}

#[test]
fn a_saved_machine_can_be_loaded_after_we_wrote_to_its_disk() {
    let scratch = Scratch::new("vm-state");
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "cluster_size=4k", 64 << 20);
    let serve = |byte: u8| {
        let daemon = Daemon::start(&scratch, &image, &[]);
        let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
        client.buffer(0).fill(byte);
        for offset in (0..8_u64 << 20).step_by(256 << 10) {
            client.execute(Request::Write { offset, length: 256 << 10 }).expect("write");
        }
        client.execute(Request::Discard { offset: 4 << 20, length: 1 << 20 }).expect("discard");
        drop(client);
        daemon.terminate();
        images::assert_clean(&image);
    };
    let content = |name: &str, snapshot: Option<&str>| {
        let raw = scratch.file(name);
        images::convert_to_raw(&image, "qcow2", snapshot, &raw);
        std::fs::read(raw).expect("the raw copy")
    };
    serve(0x11);
    monitor(&image, "savevm one\nquit\n");
    let saved = images::info(&image)["snapshots"][0].clone();
    assert!(saved["vm-state-size"].as_u64() > Some(100_000), "no machine was saved: {saved}");
    let old = content("before.raw", None);
    serve(0x22);
    assert!(content("after.raw", None) != old, "the disk has changed");
    assert_eq!(images::info(&image)["snapshots"][0], saved, "the snapshot's entry");
    assert!(content("one.raw", Some("one")) == old, "the snapshot's disk");
    monitor(&image, "loadvm one\nquit\n");
    assert!(content("loaded.raw", None) == old, "the disk that the machine was loaded with");
    images::assert_clean(&image);
}
