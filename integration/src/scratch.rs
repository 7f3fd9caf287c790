//! Directories for one test, and where the build put things.

use std::path::{Path, PathBuf};

use tempfile::{Builder, TempDir};

/// The directories of one test. They vanish with it unless it fails.
#[derive(Debug)]
pub struct Scratch {
    images: TempDir,
    sockets: TempDir,
}

impl Scratch {
    /// Makes the directories of the test called `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        // Images lie beside the build: the system's temporary directory may be a memory filesystem,
        // which is neither large enough nor able to do direct I/O everywhere.
        let parent = target_directory().join("integration");
        std::fs::create_dir_all(&parent).expect("make a directory for images");
        let prefix = format!("{name}-");
        let images = Builder::new().prefix(&prefix).tempdir_in(parent);
        // A socket's path is limited to 107 bytes, so it cannot lie as deep as the build may be.
        let sockets = Builder::new().prefix("vub-").tempdir();
        Self {
            images: images.expect("make a directory for images"),
            sockets: sockets.expect("make a directory for sockets"),
        }
    }

    /// The directory the images lie in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.images.path()
    }

    /// The path of a file in the image directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    /// The path of the socket the test's daemon listens on.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.sockets.path().join("vub.sock")
    }

    /// The path of the test's control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.sockets.path().join("ctl.sock")
    }
}

impl Scratch {
    /// The path of the socket where a daemon waits for its successor.
    #[must_use]
    pub fn takeover_socket(&self) -> PathBuf {
        self.sockets.path().join("takeover.sock")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the images are left in {}", self.images.path().display());
            self.images.disable_cleanup(true);
        }
    }
}

/// The directory cargo builds into: the running test lies in `<target>/<profile>/deps`.
#[must_use]
pub fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("find the running test");
    test.ancestors().nth(3).expect("a test lies in <target>/<profile>/deps").to_path_buf()
}

/// A number from the environment, or `default` when the variable is not set.
#[must_use]
pub fn number_from_environment(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => default,
    }
}

/// The seed of a test: `SEED` from the environment or a fresh one. It is printed, and the output
/// of a failing test is shown, so every failure can be repeated.
#[must_use]
pub fn seed() -> u64 {
    let seed = number_from_environment("SEED", fastrand::u64(..));
    eprintln!("to repeat this run: SEED={seed}");
    seed
}
