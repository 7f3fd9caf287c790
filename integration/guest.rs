//! A Debian guest lives on the disk: it boots from its root filesystem, writes files, resets the
//! machine while QEMU and the daemon stay, reads the files back and powers off.

use std::path::{Path, PathBuf};

use integration::daemon::Daemon;
use integration::guest::{Guest, built};
use integration::images;
use integration::scratch::{Scratch, seed};

/// The disk of one test: an image, and how to serve it.
struct Disk {
    scratch: Scratch,
    image: PathBuf,
    arguments: Vec<String>,
}

impl Disk {
    /// A disk whose image the caller still has to make.
    fn new(name: &str, format: &str) -> Self {
        let scratch = Scratch::new(name);
        let image = scratch.file("disk.img");
        Self { scratch, image, arguments: vec!["--format".to_owned(), format.to_owned()] }
    }

    /// A qcow2 overlay of the qcow2 base that all tests share. The base lies in another directory,
    /// which the daemon must be told to allow.
    fn overlay(name: &str) -> Self {
        let mut disk = Self::new(name, "qcow2");
        let base = built("root.qcow2");
        let base = base.canonicalize().expect("find the base image");
        let options = format!("backing_file={},backing_fmt=qcow2", base.display());
        let path = disk.image.as_os_str();
        images::qemu_img(&[
            "create".as_ref(),
            "-q".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            "-o".as_ref(),
            options.as_ref(),
            path,
        ]);
        let directory = base.parent().expect("a file lies in a directory");
        disk.arguments.extend(["--allow-path".to_owned(), directory.display().to_string()]);
        disk
    }

    /// A qcow2 image with options of `qemu-img create -o` that holds the whole system.
    fn converted(name: &str, options: impl Fn(&Path) -> String) -> Self {
        let disk = Self::new(name, "qcow2");
        let options = options(disk.scratch.directory());
        images::convert_from_raw(&built("root.raw"), &disk.image, &options, false);
        disk
    }

    fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Lets a guest with so many processors live on the disk.
    fn run(self, processors: usize) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let mut daemon = Daemon::start(&self.scratch, &self.image, &arguments);
        // The guest gets a small number: it goes through awk.
        let words = format!("disk_test_seed={}", seed() % 100_000);
        let mut guest = Guest::start(&self.scratch, processors, &words);
        let expected = format!("processors={processors} queues={processors}");
        for mark in ["GUEST-WROTE", "GUEST-VERIFIED"] {
            let system = guest.wait_for("GUEST-UP");
            assert!(system.starts_with("debian="), "a Debian guest: {system}");
            assert!(system.ends_with(&expected), "{expected}: {system}");
            guest.wait_for(mark);
        }
        guest.wait_for_end();
        daemon.assert_alive();
        daemon.terminate();
        if self.arguments[1] == "qcow2" {
            images::assert_clean(&self.image);
        }
    }
}

#[test]
fn overlay_on_a_base() {
    Disk::overlay("guest-overlay").run(1);
}

#[test]
fn two_processors_and_default_queues() {
    Disk::overlay("guest-processors").run(2);
}

#[test]
fn threads_instead_of_io_uring() {
    Disk::overlay("guest-threads").with(&["--aio", "threads"]).run(1);
}

#[test]
fn direct_io() {
    Disk::overlay("guest-direct").with(&["--cache", "none"]).run(1);
}

#[test]
fn raw_image() {
    let disk = Disk::new("guest-raw", "raw");
    images::convert_to_raw(&built("root.raw"), "raw", None, &disk.image);
    disk.run(1);
}

#[test]
fn external_data_file() {
    let options = |directory: &Path| format!("data_file={}/disk.data", directory.display());
    Disk::converted("guest-data", options).run(1);
}

#[test]
fn external_raw_data_file() {
    let options =
        |directory: &Path| format!("data_file={}/disk.data,data_file_raw=on", directory.display());
    Disk::converted("guest-data-raw", options).run(1);
}
