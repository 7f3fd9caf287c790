//! Sockets that are given away, handed over, and told of.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Bench, Daemon, PATIENCE, program, run};

/// The daemon under a shell that runs `before`; descriptor 3 is `fd`, as a supervisor passes it.
fn under_shell(before: &str, fd: impl Into<OwnedFd>, image: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    let script = format!("{before} exec \"$0\" \"$@\" 3<&0 </dev/null");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_vhost-user-qcow2"), "--image"]);
    command.arg(image).args(["--format", "raw"]).args(arguments);
    command.env_remove("RUST_LOG").stdin(Stdio::from(fd.into()));
    command
}

/// Asks for the features, which every front-end begins with.
fn ask(socket: &mut UnixStream) {
    socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    socket.write_all(&[1u32, 1, 0].map(u32::to_ne_bytes).concat()).expect("send");
    socket.read_exact(&mut [0; 20]).expect("an answer");
}

/// Says that the device is its.
fn own(socket: &mut UnixStream) {
    socket.write_all(&[3u32, 1, 0].map(u32::to_ne_bytes).concat()).expect("send");
    ask(socket);
}

fn end(mut daemon: Daemon) -> String {
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    daemon.rest()
}

#[test]
fn the_socket_has_the_mode_and_group_that_were_chosen_whatever_the_umask() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let directory = fs::metadata(bench.0.path()).expect("the directory");
    let group = if directory.uid() == 0 { 12345 } else { directory.gid() };
    for (umask, mode) in [("000", 0o660), ("077", 0o660), ("022", 0o606), ("000", 0o600)] {
        let (socket, null) = (bench.path("socket"), fs::File::open("/dev/null").expect("open"));
        let mut command = under_shell(&format!("umask {umask};"), null, &image, &[]);
        command.arg("--socket").arg(&socket).arg(format!("--socket-mode=0{mode:o}"));
        command.arg(format!("--socket-group={group}"));
        let daemon = bench.launch(command);
        let metadata = fs::metadata(&socket).expect("the socket");
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "under the umask {umask}");
        assert_eq!(metadata.gid(), group);
        end(daemon);
    }
}

#[test]
fn a_listening_descriptor_is_served_and_its_file_stays() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let listener = UnixListener::bind(bench.path("socket")).expect("listen");
    for (before, arguments) in [
        ("", &["--fd", "3"][..]),
        ("export LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=disk;", &[]),
        ("export LISTEN_FDS=1 LISTEN_PID=1;", &["--fd", "3"]),
    ] {
        let copy = listener.try_clone().expect("a copy");
        let daemon = bench.launch(under_shell(before, copy, &image, arguments));
        for _ in 0..3 {
            ask(&mut UnixStream::connect(bench.path("socket")).expect("connect"));
        }
        let said = end(daemon);
        let socket = bench.path("socket");
        assert!(said.contains(&format!("path={}", socket.display())), "{said}");
        assert!(socket.exists(), "it is not ours to remove");
    }
}

#[test]
fn a_connected_descriptor_is_served_alone_and_the_process_ends_with_it() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    for waits in [false, true] {
        let (mut front_end, theirs) = UnixStream::pair().expect("a pair");
        let mut command = under_shell("", theirs, &image, &["--fd", "3"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut daemon = Daemon(command.spawn().expect("the program"));
        // The shell's end must not be the only reason for an end, and there is none yet.
        drop(command);
        if waits {
            std::thread::sleep(Duration::from_millis(300));
        }
        own(&mut front_end);
        assert!(daemon.0.try_wait().expect("its state").is_none());
        drop(front_end);
        assert_eq!(daemon.wait(), 0, "{}", daemon.rest());
    }
}

#[test]
fn descriptors_that_are_no_sockets_are_refused_in_one_line() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let file = fs::File::open(&image).expect("a file");
    let datagrams = UnixDatagram::unbound().expect("a socket");
    let network = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    for (fd, arguments, why) in [
        (OwnedFd::from(file), &["--fd", "3"][..], "descriptor 3"),
        (datagrams.into(), &["--fd", "3"], "no Unix stream socket"),
        (network.into(), &["--fd", "3"], "no Unix stream socket"),
        (fs::File::open("/dev/null").expect("open").into(), &["--fd", "77"], "descriptor 77"),
        (fs::File::open("/dev/null").expect("open").into(), &[], "--socket or --fd"),
    ] {
        let output = run(under_shell("", fd, &image, arguments));
        let error = String::from_utf8(output.stderr).expect("plain text");
        assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
        assert!(error.contains(why), "{why}: {error}");
    }
    bench.assert_refused(&image, &["--format", "raw", "--cpus", "0,1023"], "1023", "--cpus");
    bench.assert_refused(&image, &["--format", "raw", "--pidfile", "no/file"], "no/file", "");
}

#[test]
fn the_process_ends_when_it_shall_with_the_front_end_that_used_the_disk() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let arguments = ["--format", "raw", "--exit-on-disconnect", "--pidfile", "pid"];
    let mut daemon = bench.start(&image, &arguments);
    // Whoever only looks is no reason to end, and neither is one of two.
    ask(&mut UnixStream::connect(bench.path("socket")).expect("connect"));
    let [mut first, mut second] =
        [(); 2].map(|()| UnixStream::connect(bench.path("socket")).expect("connect"));
    own(&mut first);
    own(&mut second);
    drop(first);
    ask(&mut second);
    let pid = fs::read_to_string(bench.path("pid")).expect("the process's number");
    assert_eq!(pid, format!("{}\n", daemon.0.id()));
    drop(second);
    assert_eq!(daemon.wait(), 0, "{}", daemon.rest());
    assert!(!bench.path("pid").exists() && !bench.path("socket").exists());
}

#[test]
fn a_service_manager_is_told_when_the_disk_is_there_and_when_it_goes() {
    let bench = Bench::new();
    let image = bench.raw("disk.raw");
    let manager = UnixDatagram::bind(bench.path("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    let mut command = bench.command(&image, &["--format", "raw"]);
    command.env("NOTIFY_SOCKET", bench.path("notify"));
    let daemon = bench.launch(command);
    let mut told = [0; 100];
    for (state, signal) in [("READY=1", true), ("STOPPING=1", false)] {
        let len = manager.recv(&mut told).expect("a message");
        let text = String::from_utf8_lossy(&told[..len]).into_owned();
        assert_eq!(text.trim(), state);
        if signal {
            daemon.signal("TERM");
        }
    }
}

#[test]
fn files_for_packages_name_this_program() {
    let path = env!("CARGO_BIN_EXE_vhost-user-qcow2");
    for (file, parts) in [
        ("capability", &["\"type\": \"block\"", "\"binary\": \"", path][..]),
        ("service", &["Type=notify", "ExecStart=/", path]),
        ("socket", &["ListenStream=/run/vhost-user-qcow2/%i.sock", "SocketMode=0660"]),
    ] {
        let mut command = program();
        command.args(["--print-file", file]);
        let output = run(command);
        let text = String::from_utf8(output.stdout).expect("plain text");
        assert!(output.status.success(), "{file}");
        for part in parts {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
    }
}
