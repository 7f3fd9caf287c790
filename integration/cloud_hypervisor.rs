//! cloud-hypervisor on the daemon: boot, pause, snapshot, resume, restore, and a daemon that is
//! killed meanwhile.
//!
//! `CLOUD_HYPERVISOR=PATH` names the program, which is not packaged by Debian; it needs `/dev/kvm`.
//! Without either the test says that it is skipped.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use integration::daemon::Daemon;
use integration::guest::{Guest, built};
use integration::images;
use integration::initramfs;
use integration::scratch::{Scratch, number_from_environment};

/// How long the monitor may take to listen or to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the guest's console goes; a restored machine has the same.
const CONSOLE: &str = "console.log";

/// A virtual machine and the socket of its interface.
struct Machine {
    guest: Guest,
    api: PathBuf,
}

impl Machine {
    fn launch(program: &Path, scratch: &Scratch, name: &str, more: &[&str]) -> Self {
        let api = scratch.socket().with_file_name(format!("{name}.api"));
        let console = scratch.file(CONSOLE);
        let errors = scratch.file(&format!("{name}.log"));
        let output = File::create(&errors).expect("make a log");
        let child = Command::new(program)
            .arg("--api-socket")
            .arg(format!("path={}", api.display()))
            .args(more)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("share the log"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        Self { guest: Guest::of(child, console, errors), api }
    }

    /// Boots a guest that writes to the disk for ever and checks what it has written.
    fn boot(program: &Path, scratch: &Scratch) -> Self {
        let initramfs = scratch.file("initramfs");
        initramfs::with_init(&initramfs, include_str!("guest/load"));
        let [kernel, initramfs] =
            [built("vmlinuz"), initramfs].map(|path| path.display().to_string());
        let disk = format!("vhost_user=on,socket={},num_queues=2", scratch.socket().display());
        let serial = format!("file={}", scratch.file(CONSOLE).display());
        Self::launch(
            program,
            scratch,
            "boot",
            &[
                "--cpus",
                "boot=2",
                "--memory",
                "size=512M,shared=on",
                "--kernel",
                &kernel,
                "--initramfs",
                &initramfs,
                "--cmdline",
                "console=ttyS0 quiet panic=-1",
                "--disk",
                &disk,
                "--serial",
                &serial,
                "--console",
                "off",
            ],
        )
    }

    /// One request to the interface; gives the answer's body.
    fn ask(&self, method: &str, action: &str, body: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut socket = loop {
            match UnixStream::connect(&self.api) {
                Ok(socket) => break socket,
                Err(error) => assert!(Instant::now() < deadline, "no interface: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        socket.set_read_timeout(Some(PATIENCE)).expect("set a time-out");
        let request = format!(
            "{method} /api/v1/{action} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).expect("the interface reads");
        let (head, body) = read_answer(&mut socket);
        let status = head.split(' ').nth(1).unwrap_or_default();
        assert!(status.starts_with('2'), "{action}: {head}\n{body}");
        body
    }

    fn put(&self, action: &str, body: &str) {
        self.ask("PUT", action, body);
    }

    fn wait_for_rounds(&mut self) {
        for _ in 0..6 {
            self.guest.wait_for("GUEST-ROUND");
        }
    }
}

/// The head and the body of an answer.
fn read_answer(socket: &mut UnixStream) -> (String, String) {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let lines = head.lines().filter_map(|line| line.split_once(':'));
            let mut lengths = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            let length =
                lengths.next().map_or(0, |(_, value)| value.trim().parse().expect("a length"));
            if body.len() >= length {
                return (head.to_owned(), body.to_owned());
            }
        }
        let mut part = [0; 4096];
        let count = socket.read(&mut part).expect("the interface answers");
        assert!(count != 0, "half an answer: {text}");
        bytes.extend(&part[..count]);
    }
}

/// The program under test; says why there is none.
fn program() -> Option<PathBuf> {
    let Some(program) = std::env::var_os("CLOUD_HYPERVISOR") else {
        eprintln!("SKIPPED: CLOUD_HYPERVISOR does not name the program cloud-hypervisor");
        return None;
    };
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: cloud-hypervisor needs /dev/kvm, which is not there");
        return None;
    }
    Some(PathBuf::from(program))
}

fn host(name: &str) -> (Scratch, PathBuf, Daemon) {
    let scratch = Scratch::new(name);
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 64 << 20);
    let daemon = Daemon::start(&scratch, &image, &[]);
    (scratch, image, daemon)
}

#[test]
fn a_guest_is_paused_saved_resumed_and_restored() {
    let Some(program) = program() else { return };
    let (scratch, image, daemon) = host("ch-snapshot");
    let mut machine = Machine::boot(&program, &scratch);
    machine.guest.wait_for("GUEST-CHECKED");
    for _ in 0..number_from_environment("STOPS", 3) {
        machine.wait_for_rounds();
        machine.put("vm.pause", "");
        machine.put("vm.resume", "");
    }
    machine.wait_for_rounds();
    machine.put("vm.pause", "");
    let state = scratch.file("state");
    std::fs::create_dir(&state).expect("make a directory");
    let url = format!("file://{}", state.display());
    machine.put("vm.snapshot", &format!("{{\"destination_url\": \"{url}\"}}"));
    // The disk must be what it was when the guest was saved, so a copy is made for later.
    let saved = scratch.file("saved.qcow2");
    images::qemu_img(&[
        "convert".as_ref(),
        "-U".as_ref(),
        "-O".as_ref(),
        "qcow2".as_ref(),
        image.as_os_str(),
        saved.as_os_str(),
    ]);
    machine.put("vm.resume", "");
    machine.wait_for_rounds();
    machine.put("vmm.shutdown", "");
    machine.guest.wait_until_gone();
    daemon.terminate();
    images::assert_clean(&image);
    std::fs::rename(&saved, &image).expect("put the old disk back");
    let daemon = Daemon::start(&scratch, &image, &[]);
    let restore = format!("source_url={url}");
    std::fs::remove_file(scratch.file(CONSOLE)).expect("remove what was said");
    let mut machine = Machine::launch(&program, &scratch, "restored", &["--restore", &restore]);
    machine.put("vm.resume", "");
    machine.wait_for_rounds();
    machine.put("vmm.shutdown", "");
    machine.guest.wait_until_gone();
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn a_guest_goes_on_when_its_daemon_was_killed() {
    let Some(program) = program() else { return };
    let (scratch, image, mut daemon) = host("ch-kill");
    let mut machine = Machine::boot(&program, &scratch);
    machine.guest.wait_for("GUEST-CHECKED");
    for _ in 0..number_from_environment("KILLS", 3) {
        machine.wait_for_rounds();
        daemon.kill();
        daemon = Daemon::start(&scratch, &image, &[]);
    }
    machine.wait_for_rounds();
    machine.put("vmm.shutdown", "");
    machine.guest.wait_until_gone();
    daemon.terminate();
    images::assert_clean(&image);
}
