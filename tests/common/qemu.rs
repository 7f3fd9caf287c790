//! `qemu-img` and `qemu-io`: makers of images, and the judges from outside.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vhost_user_qcow2::storage::mem::MemDisk;

/// What `qemu-img check` says by its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to find.
    Clean,
    /// Clusters are counted that nothing refers to.
    Leaks,
    /// A contradiction, or the check could not be done.
    Corrupt,
}

/// A directory of image files that vanishes with the test.
pub struct Dir(tempfile::TempDir);

impl Default for Dir {
    fn default() -> Self {
        Self::new()
    }
}

impl Dir {
    /// An empty directory.
    ///
    /// # Panics
    /// When it cannot be made; so do all others here, since a test cannot go on.
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory for images"))
    }

    /// A directory with the files of a simulated host, as its readers see them.
    pub fn of(disk: &MemDisk) -> Self {
        let dir = Self::new();
        for (name, content) in disk.files() {
            dir.write(name, &content);
        }
        dir
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file.
    pub fn write(&self, name: impl AsRef<Path>, content: &[u8]) {
        std::fs::write(self.0.path().join(name), content).expect("writing an image");
    }

    /// Reads a file.
    pub fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        std::fs::read(self.0.path().join(name)).expect("reading an image")
    }

    /// All files, in the order of their names.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.0.path()).expect("listing images");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names.into_iter().map(|name| (PathBuf::from(&name), self.read(&name))).collect()
    }

    /// Runs `qemu-img` here and returns what it printed; it must succeed.
    pub fn img<A: AsRef<OsStr>>(&self, arguments: &[A]) -> String {
        self.succeed("qemu-img", arguments)
    }

    /// Runs commands of `qemu-io` on an image here.
    pub fn io(&self, image: &str, commands: &[String]) -> String {
        let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
        commands.iter().for_each(|command| arguments.extend(["-c".to_owned(), command.clone()]));
        arguments.push(image.to_owned());
        let printed = self.succeed("qemu-io", &arguments);
        let failed = printed.contains("failed") || printed.contains("rror");
        assert!(!failed, "qemu-io {arguments:?}: {printed}");
        printed
    }

    /// The bytes that the guest sees, by `qemu-img convert`.
    pub fn guest_bytes(&self, image: &str) -> Vec<u8> {
        self.img(&["convert", "-f", "qcow2", "-O", "raw", image, "guest.out"]);
        self.take("guest.out")
    }

    /// The bytes of an internal snapshot, by `qemu-img convert`.
    pub fn snapshot_bytes(&self, image: &str, snapshot: &str) -> Vec<u8> {
        let source = ["convert", "-f", "qcow2", "-O", "raw", "-l", snapshot, image, "guest.out"];
        self.img(&source);
        self.take("guest.out")
    }

    fn take(&self, name: &str) -> Vec<u8> {
        let bytes = self.read(name);
        std::fs::remove_file(self.0.path().join(name)).expect("removing a copy");
        bytes
    }

    /// What `qemu-img check` says, and what it printed.
    pub fn check(&self, image: &str) -> (Verdict, String) {
        let output = self.run("qemu-img", &["check", "-f", "qcow2", image]);
        let verdict = match output.status.code() {
            Some(0) => Verdict::Clean,
            Some(3) => Verdict::Leaks,
            _ => Verdict::Corrupt,
        };
        (verdict, describe(&output))
    }

    fn run<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> Output {
        let run = Command::new(program).args(arguments).current_dir(self.0.path()).output();
        run.unwrap_or_else(|error| {
            panic!("{program} is needed ({error}): install qemu-utils, or run .ci/setup")
        })
    }

    fn succeed<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> String {
        let output = self.run(program, arguments);
        let what: Vec<_> = arguments.iter().map(|part| part.as_ref().to_string_lossy()).collect();
        assert!(output.status.success(), "{program} {}: {}", what.join(" "), describe(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn describe(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    format!("{}\n{}", text(&output.stdout), text(&output.stderr))
}
