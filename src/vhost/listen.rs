//! The socket's file: whose it is, and that it goes when we do.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A listening socket. Its file is removed when this is dropped, if it still is ours.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Finds out whether a socket could be made at `path`, without changing anything. `true` means that
/// a stale one is in the way.
///
/// # Errors
/// When something else is there, or somebody listens.
pub fn check(path: &Path) -> Result<bool> {
    let refused = |why: &str| Err(Error::refused(path.display().to_string(), why));
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        metadata => metadata
            .map_err(|error| Error::io(format!("{}: cannot listen", path.display()), error))?,
    };
    if !metadata.file_type().is_socket() {
        return refused("it exists and is no socket; remove it or choose another --socket");
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            refused("another process answers on this socket; end it or choose another --socket")
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        // It went in the meantime.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(
            format!("{}: cannot tell whether the socket is in use", path.display()),
            error,
        )),
    }
}

impl Listener {
    /// Listens at `path`. A socket that nobody answers on is replaced; anything else is left alone.
    ///
    /// # Errors
    /// Names the path, the reason and what would help.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("{}: cannot listen", path.display()), error);
        if check(path)? {
            tracing::info!("{}: nobody answers on the old socket, it is replaced", path.display());
            fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), identity: identity(&metadata) })
    }

    /// The next front-end that waits, if one does.
    ///
    /// # Errors
    /// What the kernel answered; usually that the process has no descriptors left.
    pub fn accept(&self) -> std::io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(error),
            },
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another daemon may have taken the path over; then the file is its.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| identity(&metadata) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{}: cannot remove the socket: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_taken_over_is_not_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let first = Listener::bind(&path).expect("listen");
        fs::remove_file(&path).expect("remove");
        let second = Listener::bind(&path).expect("listen again");
        drop(first);
        assert!(path.exists(), "it belongs to the second");
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_and_a_file_are_left_alone_and_a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let live = UnixListener::bind(&path).expect("listen");
        let error = Listener::bind(&path).expect_err("somebody answers").to_string();
        assert!(error.contains("another process answers"), "{error}");
        drop(live);
        assert!(check(&path).expect("stale"));
        drop(Listener::bind(&path).expect("it is replaced"));
        fs::write(&path, "text").expect("a file");
        let error = Listener::bind(&path).expect_err("a file").to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(fs::read(&path).expect("read"), b"text");
    }
}
