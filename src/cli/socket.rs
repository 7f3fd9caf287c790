//! Options about the socket, and about what surrounds the process: who handed it the socket, who
//! waits for it to be ready, and when it ends.

use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::Args;
use listenfd::ListenFd;
use nix::unistd::Group;
use sd_notify::NotifyState;

use crate::error::{Error, Result};
use crate::vhost::listen::{self, Access, Entrance, Listener};
use crate::vhost::terms::Terms;

/// Whose the socket is, and what becomes of the process around it.
#[derive(Debug, Clone, Default, Args)]
pub struct Listening {
    /// A descriptor in place of --socket: a socket that listens, or is connected to the one
    /// front-end to serve
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    #[arg(value_parser = clap::value_parser!(RawFd).range(3..))]
    pub fd: Option<RawFd>,

    /// The permissions of the socket's file, in octal [default: what the umask leaves]
    #[arg(long, value_name = "MODE", value_parser = mode, requires = "socket")]
    #[arg(conflicts_with = "fd")]
    pub socket_mode: Option<u32>,

    /// The group of the socket's file, by name or number
    #[arg(long, value_name = "GROUP", value_parser = group, requires = "socket")]
    #[arg(conflicts_with = "fd")]
    pub socket_group: Option<u32>,

    /// End when the front-end that has used the disk has gone, as if told by SIGTERM
    #[arg(long)]
    pub exit_on_disconnect: bool,

    /// A file that holds the process's number while it serves
    #[arg(long, value_name = "PATH")]
    pub pidfile: Option<PathBuf>,
}

fn mode(text: &str) -> std::result::Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("{text:?} is no mode; write an octal number such as 0660"))
}

fn group(text: &str) -> std::result::Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(format!("there is no group {text:?}")),
        Err(error) => Err(format!("cannot look the group {text:?} up: {error}")),
    }
}

/// Where front-ends will come from, before anything is done about it.
#[derive(Debug)]
pub(super) enum Origin {
    /// A socket to be made.
    Path(PathBuf, Access),
    /// One that was handed over.
    Inherited(Entrance),
}

impl Listening {
    /// How long front-ends are borne with, and when the service ends.
    pub(super) fn terms(&self) -> Terms {
        Terms { until_disconnect: self.exit_on_disconnect, ..Terms::default() }
    }

    /// Decides where front-ends come from: `--socket`, `--fd`, or the first socket that systemd has
    /// passed. Nothing is changed yet, except that the descriptor of such a socket is ours.
    ///
    /// # Errors
    /// When there is none of these, a socket could not be made, or a descriptor is no such socket.
    pub(super) fn origin(&self, socket: Option<&Path>) -> Result<Origin> {
        // Looked at in any case, so that nobody else takes the variables for theirs.
        let passed = ListenFd::from_env().take_raw_fd(0);
        if let Some(path) = socket {
            listen::check(path)?;
            let access = Access { mode: self.socket_mode, group: self.socket_group };
            return Ok(Origin::Path(path.to_owned(), access));
        }
        let passed = passed.map_err(|error| Error::io("LISTEN_FDS", error))?;
        match self.fd.or(passed) {
            Some(fd) => listen::inherit(fd).map(Origin::Inherited),
            None => {
                let why = "--socket or --fd is needed, or a socket passed by systemd";
                Err(Error::refused("arguments", why))
            }
        }
    }

    /// Says that front-ends can connect from now on: to systemd, and in the file for the process's
    /// number. The file goes with what is returned; one that a predecessor has left is taken over.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn announce(&self, left: Option<PathBuf>) -> Result<Announced> {
        let own = self.pidfile.as_ref().map(std::path::absolute);
        let own = own.transpose().map_err(|error| Error::io("--pidfile", error))?;
        if let (Some(left), Some(own)) = (&left, &own)
            && left != own
        {
            // Nobody else will remove it.
            let _ = fs::remove_file(left);
        }
        let pidfile = own.or(left);
        if let Some(path) = &pidfile {
            let written = fs::write(path, format!("{}\n", std::process::id()));
            written.map_err(|error| Error::io(path.display().to_string(), error))?;
        }
        tell(NotifyState::Ready);
        Ok(Announced { pidfile, is_told: true })
    }
}

fn tell(state: NotifyState<'_>) {
    // Without NOTIFY_SOCKET nobody wants to know.
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("the service manager cannot be told: {error}");
    }
}

/// The end of this is the end of the service.
#[derive(Debug, Default)]
pub(super) struct Announced {
    pidfile: Option<PathBuf>,
    /// The service manager was told, and must be told of the end.
    is_told: bool,
}

impl Announced {
    /// The file that holds the process's number.
    pub(super) fn pidfile(&self) -> Option<&Path> {
        self.pidfile.as_deref()
    }

    /// The service goes on in another process, which has the file now.
    pub(super) fn leave(&mut self, successor: Option<u32>) {
        self.pidfile = None;
        self.is_told = false;
        if let Some(process) = successor {
            tell(NotifyState::MainPid(process));
        }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if !self.is_told {
            return;
        }
        tell(NotifyState::Stopping);
        let Some(path) = &self.pidfile else { return };
        let own = format!("{}\n", std::process::id());
        // Another daemon may have been given the same file since.
        if fs::read_to_string(path).is_ok_and(|text| text == own)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!("{}: cannot remove the file: {error}", path.display());
        }
    }
}

impl Origin {
    /// The socket's path, if it has one that is known here.
    pub(super) fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Path(path, _) => Some(path.clone()),
            Self::Inherited(Entrance::Listening(listener)) => listener.path(),
            Self::Inherited(_) => None,
        }
    }

    /// Makes the socket if one is to be made.
    ///
    /// # Errors
    /// Names the path, the reason and what would help.
    pub(super) fn open(self) -> Result<Entrance> {
        match self {
            Self::Path(path, access) => Listener::bind_for(&path, access).map(Entrance::Listening),
            Self::Inherited(entrance) => Ok(entrance),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_and_groups_have_names_or_numbers() {
        assert_eq!(mode("0660"), Ok(0o660));
        assert_eq!(mode("600"), Ok(0o600));
        for text in ["", "rw", "1777", "8", "-1"] {
            assert!(mode(text).is_err(), "{text:?}");
        }
        assert_eq!(group("12345"), Ok(12345));
        assert_eq!(group("root"), Ok(0));
        assert!(group("no group has this name").is_err());
    }
}
