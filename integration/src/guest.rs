//! A Debian guest under QEMU, without hardware virtualisation, whose root filesystem is the disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::qmp::Monitor;
use crate::scratch::{Scratch, number_from_environment, target_directory};

/// How long the guest may take from one mark on its console to the next.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running virtual machine. Dropping it kills it; if the test is failing, what the guest and
/// QEMU said is printed as well.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    console: PathBuf,
    errors: PathBuf,
    /// How much of the console has been looked at by [`Self::wait_for`].
    seen: usize,
}

/// A file of the guest that the set-up script has built.
///
/// # Panics
///
/// Panics when it is missing.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let path = target_directory().join("guest").join(name);
    assert!(path.exists(), "{} is missing: run .ci/setup first", path.display());
    path
}

impl Guest {
    /// Starts a virtual machine with so many processors on the disk at the scratch's socket.
    /// `words` go to the kernel's command line, where the scripts of `integration/guest` read them.
    #[must_use]
    pub fn start(scratch: &Scratch, processors: usize, words: &str) -> Self {
        Self::start_with(scratch, processors, words, "")
    }

    /// The same, with more options of the socket, each after a comma.
    #[must_use]
    pub fn start_with(
        scratch: &Scratch,
        processors: usize,
        words: &str,
        socket_options: &str,
    ) -> Self {
        let memory = number_from_environment("GUEST_MIB", 512);
        // On a busy machine the guest's timer may seem not to work.
        let words = format!("console=ttyS0 quiet mitigations=off no_timer_check {words}");
        Self::launch(scratch, "guest", memory, &built("initramfs"), socket_options, |command| {
            command.args(["-smp", &processors.to_string(), "-append", &words]);
        })
    }

    /// Starts a virtual machine with so many MiB of memory on the disk at the scratch's socket,
    /// with another initramfs, more options of the socket, and whatever `more` adds to the command
    /// line. Its logs are named after `name`.
    #[must_use]
    pub fn launch(
        scratch: &Scratch,
        name: &str,
        memory: u64,
        initramfs: &Path,
        socket_options: &str,
        more: impl FnOnce(&mut Command),
    ) -> Self {
        let console = scratch.file(&format!("{name}.console.log"));
        let errors = scratch.file(&format!("{name}.qemu.log"));
        let output = |path: &Path| Stdio::from(File::create(path).expect("make a log"));
        let socket = format!("{}{socket_options}", scratch.socket().display());
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .args(["-accel", "tcg", "-machine", "q35,memory-backend=memory"])
            .args(["-m", &memory.to_string()])
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")])
            .args(["-chardev", &format!("socket,id=disk,path={socket}")])
            // Without num-queues QEMU asks for as many queues as there are processors.
            .args(["-device", "vhost-user-blk-pci,chardev=disk"])
            .arg("-kernel")
            .arg(built("vmlinuz"))
            .arg("-initrd")
            .arg(initramfs);
        more(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(output(&console))
            .stderr(output(&errors))
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start QEMU ({error}): run .ci/setup first"));
        Self { child, console, errors, seen: 0 }
    }

    /// A virtual machine that was started already: its process, where the guest's console goes, and
    /// where its own messages go.
    #[must_use]
    pub fn of(child: Child, console: PathBuf, errors: PathBuf) -> Self {
        Self { child, console, errors, seen: 0 }
    }

    /// Looks from now on at what the guest says later.
    pub fn forget_console(&mut self) {
        self.seen = self.console().len();
    }

    /// Waits until the guest says `mark` after everything it was waited for before, and returns
    /// the rest of that line.
    ///
    /// # Panics
    ///
    /// Panics when the guest fails, ends or says nothing of the kind in time.
    pub fn wait_for(&mut self, mark: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The state is asked for first: what was said before the end is then seen below.
            let ended = self.child.try_wait().expect("ask for QEMU's state");
            let console = self.console();
            let fresh = console.get(self.seen..).unwrap_or_default();
            if let Some(at) = fresh.find(mark) {
                let rest = &fresh[at + mark.len()..];
                if let Some(line_end) = rest.find('\n') {
                    self.seen += at + mark.len() + line_end;
                    return rest[..line_end].trim().to_owned();
                }
            }
            for bad in ["GUEST-FAILED", "Kernel panic", "I/O error", "EXT4-fs error"] {
                assert!(!fresh.contains(bad), "the guest says {bad:?}");
            }
            if let Some(status) = ended {
                panic!("QEMU ended with {status} before the guest said {mark}");
            }
            assert!(Instant::now() < deadline, "the guest does not say {mark}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the guest has powered off.
    ///
    /// # Panics
    ///
    /// Panics when it does not, or when QEMU reports a failure.
    pub fn wait_for_end(self) {
        let errors = self.end();
        assert!(errors.is_empty(), "QEMU complained: {errors}");
    }

    /// Waits until the guest has powered off, and returns what QEMU complained about.
    ///
    /// # Panics
    ///
    /// Panics when it does not, or when QEMU reports a failure.
    #[must_use]
    pub fn end(mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait().expect("ask for QEMU's state") {
                break status;
            }
            assert!(Instant::now() < deadline, "the guest does not power off");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert!(status.success(), "QEMU ended with {status}");
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Whether the guest has said something, wherever.
    #[must_use]
    pub fn has_said(&self, mark: &str) -> bool {
        self.console().contains(mark)
    }

    /// Ends QEMU through its monitor, whatever the guest does.
    ///
    /// # Panics
    ///
    /// Panics when QEMU does not end after the monitor was told to.
    pub fn quit(mut self, monitor: &mut Monitor) {
        monitor.run("quit");
        self.wait_until_gone();
    }

    /// Waits until the monitor's process has ended in whatever way.
    ///
    /// # Panics
    ///
    /// Panics when it does not.
    pub fn wait_until_gone(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("ask for QEMU's state").is_none() {
            assert!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Everything that the guest has said. A serial console is not always plain text.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail harmlessly when QEMU has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- console of the guest ----\n{}---- end of it ----", self.console());
            let errors = fs::read_to_string(&self.errors).unwrap_or_default();
            eprintln!("---- errors of QEMU ----\n{errors}---- end of them ----");
        }
    }
}
