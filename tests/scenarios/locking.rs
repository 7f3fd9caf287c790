//! One writer at a time: QEMU and we keep each other away from the same image.

use std::io::{Read, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::images::IMAGE;
use common::workers::options;
use vhost_user_qcow2::image::OpenOptions;

use crate::stage::Act::Write;
use crate::stage::{KIB, MIB, Stage};

/// A `qemu-io` that has the image open until it is dropped.
struct Holder {
    child: Child,
    commands: Option<ChildStdin>,
    said: ChildStdout,
}

impl Holder {
    fn new(stage: &Stage, how: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .args(how)
            .arg(IMAGE)
            .current_dir(stage.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting qemu-io");
        let commands = child.stdin.take();
        let said = child.stdout.take().expect("a pipe");
        let mut holder = Self { child, commands, said };
        holder.ask("length");
        holder
    }

    /// A command, and whatever comes back first: then the image is open.
    fn ask(&mut self, command: &str) {
        let commands = self.commands.as_mut().expect("a pipe");
        writeln!(commands, "{command}").and_then(|()| commands.flush()).expect("asking");
        let mut byte = [0; 1];
        self.said.read_exact(&mut byte).expect("an answer");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its commands is the end of the program.
        drop(self.commands.take());
        let mut rest = Vec::new();
        let _ = self.said.read_to_end(&mut rest);
        let _ = self.child.wait();
    }
}

/// Whether a program of QEMU's may open the image.
fn may(stage: &Stage, program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).current_dir(stage.dir.path()).output();
    let output = output.expect("QEMU's tools");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let locked = said.contains("lock");
    assert!(output.status.success() != locked, "{program} {arguments:?}: {said}");
    output.status.success()
}

#[test]
fn qemu_is_kept_away_while_we_write() {
    let mut stage = Stage::new("compat=1.1", MIB).on_host();
    let session = stage.open().expect("opening");
    let write = ["-f", "qcow2", "-c", "write 0 4k", IMAGE];
    let read = ["-r", "-f", "qcow2", "-c", "read 0 4k", IMAGE];
    let shared = ["-r", "-U", "-f", "qcow2", "-c", "read 0 4k", IMAGE];
    assert!(!may(&stage, "qemu-io", &write), "two writers");
    assert!(!may(&stage, "qemu-io", &read), "a reader beside a writer");
    assert!(may(&stage, "qemu-io", &shared), "a reader that has said that it accepts a writer");
    assert!(!may(&stage, "qemu-img", &["info", "-f", "qcow2", IMAGE]));
    assert!(may(&stage, "qemu-img", &["info", "-U", "-f", "qcow2", IMAGE]));
    for changing in [
        &["snapshot", "-c", "one", IMAGE][..],
        &["resize", "-f", "qcow2", IMAGE, "+1M"],
        &["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", IMAGE],
        &["check", "-f", "qcow2", "-r", "all", IMAGE],
        &["rebase", "-u", "-f", "qcow2", "-b", "", IMAGE],
        &["commit", "-f", "qcow2", IMAGE],
    ] {
        assert!(!may(&stage, "qemu-img", changing), "{changing:?}");
    }
    // Another descriptor of this process on the same file, opened and closed, takes no lock away.
    drop(std::fs::File::open(stage.dir.path().join(IMAGE)).expect("the image"));
    assert!(!may(&stage, "qemu-io", &write), "the lock is gone");
    session.act(Write(0, 64 * KIB, 1)).expect("writing");
    session.close();
    stage.expect(&[Write(0, 64 * KIB, 1)]);
    assert!(may(&stage, "qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 4k", IMAGE]));
    stage.judge();
}

#[test]
fn we_are_kept_away_while_qemu_writes() {
    let mut stage = Stage::new("compat=1.1", MIB).on_host();
    let read_only = OpenOptions { read_only: true, ..options(false) };
    let holder = Holder::new(&stage, &[]);
    let error = stage.refusal();
    assert!(error.to_string().contains(IMAGE), "{error}");
    assert!(stage.open_with(&read_only).is_err(), "a reader beside a writer");
    drop(holder);
    stage.ours(&[Write(0, KIB, 1)]);
    stage.judge();
}

#[test]
fn readers_share_and_keep_writers_away() {
    let mut stage = Stage::new("compat=1.1", MIB).on_host();
    let read_only = OpenOptions { read_only: true, ..options(false) };
    let holder = Holder::new(&stage, &["-r"]);
    let reader = stage.open_with(&read_only).expect("two readers");
    stage.refusal();
    drop(holder);
    stage.refusal();
    assert!(!may(&stage, "qemu-io", &["-f", "qcow2", "-c", "write 0 4k", IMAGE]));
    assert!(may(&stage, "qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 4k", IMAGE]));
    drop(reader);
    stage.ours(&[Write(0, KIB, 1)]);
    stage.judge();
}

#[test]
fn a_backing_file_is_read_by_many_and_written_by_nobody() {
    let dir = crate::stage::base(MIB, &[Write(0, MIB, 5)]);
    let mut stage = Stage::windowed(dir, crate::stage::BACKED, MIB, 0..MIB).on_host();
    stage.img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "other.qcow2"]);
    let session = stage.open().expect("opening");
    assert!(!may(&stage, "qemu-io", &["-f", "qcow2", "-c", "write 0 4k", "base.qcow2"]));
    assert!(may(&stage, "qemu-io", &["-f", "qcow2", "-c", "write 0 4k", "other.qcow2"]));
    assert!(may(&stage, "qemu-img", &["info", "-f", "qcow2", "base.qcow2"]));
    session.close();
    assert!(may(&stage, "qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 4k", "base.qcow2"]));
    stage.judge();
}
