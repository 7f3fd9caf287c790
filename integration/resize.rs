//! A guest under QEMU whose disk grows while it runs: it sees the new size without a reboot, also
//! when the daemon was away meanwhile, and uses the new end.

use integration::control::Operator;
use integration::daemon::Daemon;
use integration::guest::{Guest, built};
use integration::images;
use integration::scratch::Scratch;
use serde_json::json;

const GIB: u64 = 1 << 30;
const SECTOR: u64 = 512;

fn assert_size(guest: &mut Guest, bytes: u64) {
    assert_eq!(guest.wait_for("GUEST-SIZE"), (bytes / SECTOR).to_string(), "sectors");
}

#[test]
fn a_guest_sees_each_new_size_without_a_reboot() {
    let scratch = Scratch::new("resize");
    let image = scratch.file("disk.qcow2");
    images::convert_from_raw(&built("root.raw"), &image, "", false);
    let control = scratch.control();
    let arguments = ["--format", "qcow2", "--control", control.to_str().expect("a plain name")];
    let daemon = Daemon::start(&scratch, &image, &arguments);
    let words = "disk_test=grow disk_test_changes=3";
    let mut guest = Guest::start_with(&scratch, 2, words, ",reconnect-ms=200");
    assert_size(&mut guest, GIB);
    let mut operator = Operator::connect(&scratch);
    let info = operator.call("info", json!({})).expect("information");
    assert_eq!(info["front-ends"][0]["hears-of-resizes"], json!(true), "{info}");
    let resized = operator.call("resize", json!({ "size": "3G" })).expect("a size");
    assert_eq!(resized, json!({ "virtual-size": 3 * GIB, "was": GIB }));
    assert_size(&mut guest, 3 * GIB);

    // The disk grows while no daemon is there. QEMU connects again and does not ask for the size.
    daemon.kill();
    // This waits until the kernel has let go of the image. Clusters may be lost by the kill.
    let _leaks = images::check(&image);
    let path = image.to_str().expect("a plain name");
    images::qemu_img(&["resize", "-q", "-f", "qcow2", path, "5G"]);
    let mut daemon = Daemon::start(&scratch, &image, &arguments);
    assert_size(&mut guest, 5 * GIB);

    // The new connection is told of changes as the first one was.
    let mut operator = Operator::connect(&scratch);
    operator.call("resize", json!({ "size": 6 * GIB })).expect("a size");
    assert_size(&mut guest, 6 * GIB);
    guest.wait_for("GUEST-GREW");
    // QEMU has complained of the daemon that was killed, as it should.
    drop(guest);
    let stats = operator.call("stats", json!({})).expect("statistics");
    assert_eq!(stats["total"]["errors"], json!(0), "{stats}");
    daemon.assert_alive();
    daemon.terminate();
    // Not what was lost by the kill, but nothing worse.
    let _leaks = images::check(&image);
    assert_eq!(images::info(&image)["virtual-size"], json!(6 * GIB));
}
