//! Where front-ends come from: a socket of our own, or one that was handed to us.
//!
//! A socket of our own has a file. Nobody can connect before that file belongs to whom it shall:
//! its mode is right from the moment it is made (the process's umask is set for as long as bind
//! takes), its group is set next, and only then does the socket begin to listen, before which the
//! kernel refuses every connection. The file goes when we do, if it still is ours.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, fchownat};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, Result};

/// Who may connect to a socket of our own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// The permissions of the socket's file; without them the process's umask decides.
    pub mode: Option<u32>,
    /// The group that the file belongs to; without one it is the process's.
    pub group: Option<u32>,
}

/// A listening socket. A file that was made for it is removed when this is dropped, if it still is
/// ours.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    /// The file's path and identity. A socket that was handed to us has none of ours.
    file: Option<(PathBuf, Identity)>,
    /// The file goes with us.
    is_ours: bool,
}

/// Device and inode of a file.
pub type Identity = (u64, u64);

/// Where front-ends come from.
#[derive(Debug)]
pub enum Entrance {
    /// A socket that they connect to.
    Listening(Listener),
    /// The connection of the only one there will be.
    Connected(UnixStream),
    /// Nowhere: the only one there will be is known already.
    Occupied,
}

impl Entrance {
    /// A copy of the connection of the only front-end there will be.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn connected(&self) -> Result<Option<UnixStream>> {
        let Self::Connected(socket) = self else { return Ok(None) };
        socket.try_clone().map(Some).map_err(|error| Error::io("a connection", error))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

fn identity(metadata: &Metadata) -> Identity {
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

/// Takes over a descriptor that this process was started with. Whether it listens or is connected
/// is the kernel's to say.
///
/// # Errors
/// When it is no open descriptor, or no Unix stream socket.
pub fn inherit(fd: RawFd) -> Result<Entrance> {
    let failed = |error: std::io::Error| Error::io(format!("descriptor {fd}"), error);
    // Taking a number for a descriptor needs unsafe code. Sent to ourselves it comes back as one
    // that is ours without doubt, and that no child inherits; the first stays open to no effect.
    let (left, right) = UnixStream::pair().map_err(failed)?;
    let sent = left.send_with_fd(&[0u8][..], fd);
    sent.map_err(|error| failed(std::io::Error::from_raw_os_error(error.errno())))?;
    let received = right.recv_with_fd(&mut [0]);
    let (_, file) =
        received.map_err(|error| failed(std::io::Error::from_raw_os_error(error.errno())))?;
    let Some(file) = file else {
        return Err(Error::refused(format!("descriptor {fd}"), "it cannot be taken over"));
    };
    let descriptor = OwnedFd::from(file);
    let answer = |error: nix::Error| failed(error.into());
    let is_stream = getsockopt(&descriptor, sockopt::SockType).map_err(answer)? == SockType::Stream;
    let listens = getsockopt(&descriptor, sockopt::AcceptConn).map_err(answer)?;
    let local = UnixListener::from(descriptor);
    if !is_stream || local.local_addr().is_err() {
        return Err(Error::refused(format!("descriptor {fd}"), "it is no Unix stream socket"));
    }
    if !listens {
        return Ok(Entrance::Connected(UnixStream::from(OwnedFd::from(local))));
    }
    local.set_nonblocking(true).map_err(failed)?;
    Ok(Entrance::Listening(Listener { listener: local, file: None, is_ours: false }))
}

/// Makes the file of a socket that does not listen yet.
fn make(path: &Path, access: Access) -> nix::Result<OwnedFd> {
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = UnixAddr::new(path)?;
    // No other thread makes files at this time.
    let before = access.mode.map(|mode| umask(Mode::from_bits_truncate(!mode & 0o777)));
    let bound = bind(descriptor.as_raw_fd(), &address);
    if let Some(before) = before {
        umask(before);
    }
    bound?;
    if let Some(group) = access.group {
        let group = Some(Gid::from_raw(group));
        let changed = fchownat(AT_FDCWD, path, None, group, AtFlags::AT_SYMLINK_NOFOLLOW);
        changed.inspect_err(|_| drop(fs::remove_file(path)))?;
    }
    Ok(descriptor)
}

impl Listener {
    /// Listens at `path`. A socket that nobody answers on is replaced; anything else is left alone.
    ///
    /// # Errors
    /// Names the path, the reason and what would help.
    pub fn bind(path: &Path) -> Result<Self> {
        Self::bind_for(path, Access::default())
    }

    /// The same, for a chosen group of processes.
    ///
    /// # Errors
    /// Also when the file cannot be given to the group; then there is no file.
    pub fn bind_for(path: &Path, access: Access) -> Result<Self> {
        let failed = |error| Error::io(format!("{}: cannot listen", path.display()), error);
        if check(path)? {
            tracing::info!("{}: nobody answers on the old socket, it is replaced", path.display());
            fs::remove_file(path).map_err(failed)?;
        }
        let descriptor = make(path, access).map_err(|error| failed(error.into()))?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let file = Some((path.to_owned(), identity(&metadata)));
        let bound = Self { listener: UnixListener::from(descriptor), file, is_ours: true };
        listen(&bound.listener, Backlog::MAXCONN).map_err(|error| failed(error.into()))?;
        bound.listener.set_nonblocking(true).map_err(failed)?;
        Ok(bound)
    }

    /// A socket that a predecessor has made or was given, and the file that it had for it. The file
    /// stays until [`Listener::keep`] says that it is ours.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn succeed(socket: OwnedFd, file: Option<(PathBuf, Identity)>) -> std::io::Result<Self> {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self { listener, file, is_ours: false })
    }

    /// The absolute path and the identity of the file that was made for this socket.
    pub fn file(&self) -> Option<(PathBuf, Identity)> {
        let (path, identity) = self.file.as_ref()?;
        Some((std::path::absolute(path).unwrap_or_else(|_| path.clone()), *identity))
    }

    /// Whether the file that was made for this socket is what `path` leads to.
    pub fn is_at(&self, path: &Path) -> bool {
        let made = self.file.as_ref().map(|(_, made)| *made);
        made.is_some() && fs::metadata(path).ok().map(|found| identity(&found)) == made
    }

    /// Takes the file over: from now on it goes with us.
    pub fn keep(&mut self) {
        self.is_ours = true;
    }

    /// Leaves the file to a successor, who listens at the same socket.
    pub fn leave(&mut self) {
        self.is_ours = false;
    }

    /// The path that front-ends connect to; a socket may have none.
    pub fn path(&self) -> Option<PathBuf> {
        let address = self.listener.local_addr().ok()?;
        address.as_pathname().map(Path::to_owned)
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
        let Some((path, made)) = self.file.as_ref().filter(|_| self.is_ours) else { return };
        // Another daemon may have taken the path over; then the file is its.
        let ours = fs::symlink_metadata(path).is_ok_and(|metadata| identity(&metadata) == *made);
        if ours && let Err(error) = fs::remove_file(path) {
            tracing::warn!("{}: cannot remove the socket: {error}", path.display());
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

    #[test]
    fn nobody_connects_before_the_file_is_what_it_shall_be() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let group = fs::metadata(directory.path()).expect("the directory").gid();
        let access = Access { mode: Some(0o640), group: Some(group) };
        let made = make(&path, access).expect("a socket");
        let metadata = fs::metadata(&path).expect("its file");
        assert_eq!((metadata.permissions().mode() & 0o777, metadata.gid()), (0o640, group));
        let error = UnixStream::connect(&path).expect_err("it does not listen yet");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        drop(made);
        drop(Listener::bind_for(&path, access).expect("listen"));
    }
}
