//! The daemon is killed in the middle of a write load, again and again on the same image: it must
//! never be corrupt, and what a flush has covered must be there.

use std::path::Path;
use std::time::Duration;

use fastrand::Rng;
use integration::client::Client;
use integration::daemon::Daemon;
use integration::images;
use integration::model::{Mismatch, Model, SECTOR};
use integration::scratch::{Scratch, number_from_environment, seed};
use integration::workload::{DEPTH, Workload};

const MIB: usize = 1 << 20;

/// Kills the daemon `KILLS` times while it serves `image`, whose content the model knows.
fn kill_often(
    scratch: &Scratch,
    image: &Path,
    model: &mut Model,
    seed: u64,
    cluster: usize,
    arguments: &[&str],
) {
    let kills = number_from_environment("KILLS", 30);
    let mut rng = Rng::with_seed(seed);
    let arguments = [&["--format", "qcow2"], arguments].concat();
    for round in 0..kills {
        // The socket of the killed predecessor is still there and must be taken over.
        let daemon = Daemon::start(scratch, image, &arguments);
        let mut client =
            Client::connect(&scratch.socket(), 2, DEPTH).expect("connect to the daemon");
        let answers = rng.u64(1..1500);
        let pause = Duration::from_micros(rng.u64(0..2000));
        let mut workload = Workload::new(&mut client, model, &mut rng, cluster);
        workload
            .load(&mut client, answers)
            .unwrap_or_else(|error| panic!("round {round}: {error}; SEED={seed}"));
        // Requests are in flight now; where the daemon is with them is up to chance.
        std::thread::sleep(pause);
        daemon.kill();
        drop(client);
        let history = workload.into_history();
        // Leaked clusters are allowed here, corruption is not.
        eprintln!("round {round}: killed after {answers} answers: {:?}", images::check(image));
        verify(scratch, image, model, true).unwrap_or_else(|error| {
            let history = history.of(error.sector());
            panic!("round {round}: {error}; {}; SEED={seed}\n{history}", model.origin(&error));
        });
    }
    // What the last kill has left is good enough to go on with.
    let daemon = Daemon::start(scratch, image, &arguments);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect to the daemon");
    let mut workload = Workload::new(&mut client, model, &mut rng, cluster);
    let result = workload.verify_all(&mut client);
    result.unwrap_or_else(|error| panic!("after the last kill: {error}; SEED={seed}"));
    drop(client);
    daemon.terminate();
    let result = verify(scratch, image, model, false);
    result.unwrap_or_else(|error| panic!("at the end: {error}; SEED={seed}"));
}

fn verify(
    scratch: &Scratch,
    image: &Path,
    model: &mut Model,
    after_crash: bool,
) -> Result<(), Mismatch> {
    let raw = scratch.file("converted.raw");
    images::convert_to_raw(image, "qcow2", None, &raw);
    images::verify_raw(&raw, model, after_crash)
}

/// Kills the daemon while it serves an image without a backing file.
fn kill_plain(name: &str, size: usize, options: &str, cluster: usize, arguments: &[&str]) {
    let (scratch, seed) = (Scratch::new(name), seed());
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", options, size);
    let mut model = Model::new(seed, size / SECTOR);
    kill_often(&scratch, &image, &mut model, seed, cluster, arguments);
}

#[test]
fn plain_image() {
    kill_plain("kill-plain", 64 * MIB, "", 64 << 10, &[]);
}

#[test]
fn small_clusters() {
    kill_plain("kill-small", 16 * MIB, "cluster_size=512", 512, &[]);
}

#[test]
fn direct_io_with_threads() {
    let arguments = ["--cache", "none", "--aio", "threads"];
    kill_plain("kill-direct", 32 * MIB, "cluster_size=4k", 4 << 10, &arguments);
}

#[test]
fn subclusters() {
    kill_plain("kill-subclusters", 64 * MIB, "extended_l2=on", 64 << 10, &[]);
}

#[test]
fn write_through() {
    kill_plain("kill-through", 32 * MIB, "", 64 << 10, &["--cache", "writethrough"]);
}

#[test]
fn overlay_on_a_compressed_base() {
    let (scratch, seed) = (Scratch::new("kill-overlay"), seed());
    let (size, cluster) = (64 * MIB, 64 << 10);
    let mut model = Model::new(seed, size / SECTOR);
    let raw = scratch.file("base.raw");
    images::write_raw(&raw, &mut model, size / SECTOR, &[0..40_000, 60_000..100_007]);
    images::convert_from_raw(&raw, &scratch.file("base.qcow2"), "compression_type=zstd", true);
    let image = scratch.file("disk.qcow2");
    images::create_overlay(&image, "base.qcow2", "qcow2", size);
    kill_often(&scratch, &image, &mut model, seed, cluster, &[]);
}
