//! What a guest gives up, the host gets back: measured as the blocks that files take on the disk.

use std::path::{Path, PathBuf};

use integration::bulk::{self, Content};
use integration::client::{Client, Request};
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::{Scratch, number_from_environment};
use integration::workload::DEPTH;

const MIB: u64 = 1 << 20;
/// The most bytes that a growing file has in store.
const AHEAD: u64 = 5 * MIB;

/// How much a test writes: `SPACE_MIB` MiB, or as many as the test says.
fn size(mib: u64) -> u64 {
    number_from_environment("SPACE_MIB", mib) * MIB
}

/// How a test gives space up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Discard,
    WriteZeroes,
}

struct Disk {
    scratch: Scratch,
    image: PathBuf,
    /// The files whose space counts.
    files: Vec<PathBuf>,
    format: &'static str,
    size: u64,
}

impl Disk {
    fn new(name: &str, format: &'static str, options: &str, size: u64) -> Self {
        let scratch = Scratch::new(name);
        let image = scratch.file("disk.img");
        let mut files = vec![image.clone()];
        let mut options = options.to_owned();
        if options.contains("data_file") {
            files.push(scratch.file("data.raw"));
            options = options.replace("DATA", files[1].to_str().expect("plain text"));
        }
        images::create(&image, format, &options, usize::try_from(size).expect("a size"));
        Self { scratch, image, files, format, size }
    }

    fn serve(&self, arguments: &[&str]) -> (Daemon, Client) {
        let directory = self.scratch.directory().to_str().expect("plain text");
        let own = ["--format", self.format, "--allow-path", directory];
        let daemon = Daemon::start(&self.scratch, &self.image, &[&own, arguments].concat());
        let client = Client::connect(&self.scratch.socket(), 2, DEPTH).expect("connect");
        (daemon, client)
    }

    fn taken(&self) -> u64 {
        self.files.iter().map(|file| images::allocated_bytes(file)).sum()
    }

    fn length(&self) -> u64 {
        self.files.iter().map(|file| file.metadata().expect("a file").len()).sum()
    }

    fn finish(&self, daemon: Daemon, client: Client) {
        drop(client);
        daemon.terminate();
        if self.format == "qcow2" {
            images::assert_clean(&self.image);
        }
    }
}

fn flush(client: &mut Client) {
    client.execute(Request::Flush).expect("flush");
}

/// Writes the whole disk and gives it up, twice.
fn come_and_go(disk: &Disk, way: Way) {
    let (daemon, mut client) = disk.serve(&[]);
    let (size, before) = (disk.size, disk.taken());
    let mut longest = 0;
    for pass in 1..=2 {
        let content = Content::Numbered(pass);
        bulk::write(&mut client, 0..size, content).expect("write");
        if pass == 1 {
            // In the second pass the host has no reason to have written it all.
            flush(&mut client);
        }
        bulk::verify(&mut client, 0..size, content).expect("verify");
        let full = disk.taken();
        match way {
            Way::Discard => bulk::discard(&mut client, 0..size).expect("discard"),
            Way::WriteZeroes => {
                bulk::write_zeroes(&mut client, 0..size, true).expect("write zeroes");
            }
        }
        // One flush gives a bounded number of runs back; the next goes on with the rest.
        flush(&mut client);
        let first = disk.taken();
        flush(&mut client);
        let (after, length) = (disk.taken(), disk.length());
        eprintln!(
            "pass {pass}: {before} bytes, {full} when full, {first} after a flush, then {after}"
        );
        assert!(full >= size, "a full disk takes {full} bytes");
        assert!(after <= before + size / 100, "{before} bytes have become {after}");
        assert!(pass == 1 || length <= longest + size / 100, "{longest} has grown to {length}");
        longest = length;
        bulk::verify(&mut client, 0..size, Content::Zeros).expect("verify");
        assert!(disk.taken() <= after, "reading takes no space");
    }
    disk.finish(daemon, client);
    assert!(disk.taken() <= before + size / 100, "the end of the daemon takes space");
}

macro_rules! disks {
    ($($name:ident: $mib:literal, $format:literal, $options:literal, $way:ident;)*) => {
        $(#[test]
        fn $name() {
            let disk = Disk::new(stringify!($name), $format, $options, size($mib));
            come_and_go(&disk, Way::$way);
        })*
    };
}

disks! {
    discard_qcow2: 1024, "qcow2", "cluster_size=64k", Discard;
    discard_extended_l2: 256, "qcow2", "extended_l2=on,lazy_refcounts=on", Discard;
    discard_small_clusters: 256, "qcow2", "cluster_size=4k", Discard;
    discard_data_file: 256, "qcow2", "data_file=DATA", Discard;
    discard_raw_data_file: 256, "qcow2", "data_file=DATA,data_file_raw=on", Discard;
    discard_raw: 256, "raw", "", Discard;
    write_zeroes_qcow2: 256, "qcow2", "cluster_size=64k", WriteZeroes;
    write_zeroes_extended_l2: 256, "qcow2", "extended_l2=on", WriteZeroes;
    write_zeroes_small_clusters: 256, "qcow2", "cluster_size=4k", WriteZeroes;
    write_zeroes_data_file: 256, "qcow2", "data_file=DATA", WriteZeroes;
    write_zeroes_raw_data_file: 256, "qcow2", "data_file=DATA,data_file_raw=on", WriteZeroes;
    write_zeroes_raw: 256, "raw", "", WriteZeroes;
}

/// A disk that is in use, as guests have one: what comes and goes beside it leaves the file within
/// a hundredth of what it took before. What stays are an L2 table for each 512 MiB and refcounts.
#[test]
fn what_comes_and_goes_leaves_a_disk_in_use_at_its_first_size() {
    let (used, gone) = (64 * MIB, size(1024));
    let disk = Disk::new("space-used", "qcow2", "cluster_size=64k", used + gone);
    let (daemon, mut client) = disk.serve(&[]);
    bulk::write(&mut client, 0..used, Content::Numbered(1)).expect("write what stays");
    flush(&mut client);
    let before = disk.taken();
    bulk::write(&mut client, used..used + gone, Content::Numbered(2)).expect("write what goes");
    flush(&mut client);
    let full = disk.taken();
    bulk::discard(&mut client, used..used + gone).expect("discard");
    flush(&mut client);
    flush(&mut client);
    let after = disk.taken();
    eprintln!("{before} bytes, {full} with {gone} more, {after} without them");
    // The host was asked for a little more than what stays, as long as the file grows.
    assert!(full + AHEAD >= before + gone, "{gone} bytes take {full} - {before}");
    assert!(after <= before + before / 100, "{before} bytes have become {after}");
    bulk::verify(&mut client, 0..used, Content::Numbered(1)).expect("what stays");
    bulk::verify(&mut client, used..used + gone, Content::Zeros).expect("what went");
    disk.finish(daemon, client);
}

/// Zeros over data: `--detect-zeroes unmap` gives the space back, without it they are data.
#[test]
fn written_zeros_give_space_back_if_asked_to() {
    let size = size(256);
    for (format, options) in [("qcow2", "cluster_size=64k"), ("raw", "")] {
        for (arguments, small) in [
            (&["--detect-zeroes", "unmap"][..], true),
            (&["--detect-zeroes", "on"], false),
            (&["--detect-zeroes", "on", "--discard", "ignore"], false),
            (&[], false),
        ] {
            let disk = Disk::new("space-zeros", format, options, 2 * size);
            let (daemon, mut client) = disk.serve(arguments);
            let before = disk.taken();
            let numbered = Content::Numbered(1);
            bulk::write(&mut client, 0..size, numbered).expect("write data");
            flush(&mut client);
            bulk::write(&mut client, 0..size, Content::Zeros).expect("write zeros");
            flush(&mut client);
            let after = disk.taken();
            eprintln!("{format} with {arguments:?}: {before} bytes, {after} with zeros over data");
            assert_eq!(after <= before + size / 100, small, "{after} bytes with {arguments:?}");
            bulk::verify(&mut client, 0..size, Content::Zeros).expect("verify");
            // Zeros where nothing was; with any detection that is nothing to write either.
            bulk::write(&mut client, size..2 * size, Content::Zeros).expect("write zeros");
            flush(&mut client);
            let grown = disk.taken().saturating_sub(after);
            // A raw image has a place for every byte, and "on" is to take it.
            let nothing = small || (format == "qcow2" && arguments.contains(&"on"));
            assert_eq!(grown <= size / 100, nothing, "{grown} bytes with {arguments:?}");
            bulk::verify(&mut client, 0..2 * size, Content::Zeros).expect("verify");
            disk.finish(daemon, client);
        }
    }
}

/// A request with zeros in its middle: whole clusters of them are found.
#[test]
fn zeros_inside_of_larger_writes_are_found() {
    let disk = Disk::new("space-mixed", "qcow2", "cluster_size=64k", 64 * MIB);
    let (daemon, mut client) = disk.serve(&["--detect-zeroes", "unmap"]);
    let (piece, cluster) = (256 << 10, 64 << 10);
    for offset in (0..64 * MIB).step_by(piece) {
        let buffer = &mut client.buffer(0)[..piece];
        Content::Numbered(3).fill(offset, buffer);
        buffer[cluster..3 * cluster].fill(0);
        client.execute(Request::Write { offset, length: piece }).expect("write");
    }
    flush(&mut client);
    let taken = disk.taken();
    assert!((32 * MIB..36 * MIB).contains(&taken), "half of 64 MiB is zeros: {taken} bytes");
    for offset in (0..64 * MIB).step_by(piece) {
        let middle = offset + cluster as u64..offset + 3 * cluster as u64;
        let numbered = Content::Numbered(3);
        bulk::verify(&mut client, offset..middle.start, numbered).expect("the head");
        bulk::verify(&mut client, middle.clone(), Content::Zeros).expect("the middle");
        bulk::verify(&mut client, middle.end..offset + piece as u64, numbered).expect("the tail");
    }
    disk.finish(daemon, client);
}

/// `--discard ignore`: the feature is there, requests succeed, and the file is as before.
#[test]
fn ignored_discards_keep_content_and_space() {
    for (format, options) in [("qcow2", "cluster_size=64k"), ("raw", "")] {
        let disk = Disk::new("space-ignore", format, options, 64 * MIB);
        let (daemon, mut client) = disk.serve(&["--discard", "ignore"]);
        let range = 0..64 * MIB;
        bulk::write(&mut client, range.clone(), Content::Numbered(9)).expect("write");
        flush(&mut client);
        let full = disk.taken();
        bulk::discard(&mut client, range.clone()).expect("a discard that does nothing");
        flush(&mut client);
        assert!(disk.taken() >= full, "space was given back");
        bulk::verify(&mut client, range.clone(), Content::Numbered(9)).expect("verify");
        bulk::write_zeroes(&mut client, range.clone(), true).expect("write zeroes");
        flush(&mut client);
        assert!(disk.taken() >= full, "space was given back");
        bulk::verify(&mut client, range, Content::Zeros).expect("verify");
        disk.finish(daemon, client);
    }
}

/// What contradicts itself is refused before anything is made.
#[test]
fn zeros_cannot_give_back_what_discards_must_keep() {
    let scratch = Scratch::new("space-refused");
    let image = scratch.file("disk.qcow2");
    let arguments = ["--create", "1G", "--discard", "ignore", "--detect-zeroes", "unmap"];
    let mut daemon = Daemon::spawn(&scratch, Path::new(&image), &arguments);
    assert!(!daemon.wait().success());
    let log = daemon.log();
    assert!(log.contains("--detect-zeroes unmap") && log.contains("--discard ignore"), "{log}");
    assert!(!image.exists());
}
