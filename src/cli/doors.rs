//! The sockets that a daemon listens at, made by itself or by a predecessor.

use std::path::{Path, PathBuf};

use crate::cli::Arguments;
use crate::cli::control::Socket;
use crate::cli::socket::{Announced, Origin};
use crate::error::{Error, Result};
use crate::storage::Engine;
use crate::storage::files::Files;
use crate::sync::Arc;
use crate::vhost::listen::{self, Access, Entrance, Listener};

/// Whoever connects for a takeover gets the guests' memory.
const OWNER_ALONE: Access = Access { mode: Some(0o600), group: None };

/// Everything but the connections through which others get at the daemon.
pub(super) struct Doors<'a> {
    pub(super) entrance: Entrance,
    pub(super) successors: Option<Listener>,
    pub(super) control: Option<Socket<'a>>,
    pub(super) announced: Announced,
}

/// The same as a predecessor had it.
#[derive(Debug)]
pub(super) struct Heritage {
    pub(super) listener: Option<Listener>,
    pub(super) successors: Option<Listener>,
    pub(super) control: Option<Listener>,
    pub(super) pidfile: Option<PathBuf>,
}

/// What operators reach through the control socket.
pub(super) struct Inside<'a> {
    pub(super) image: &'a Path,
    pub(super) files: &'a Arc<Files>,
    pub(super) engine: &'a dyn Engine,
}

/// Refuses one path for two sockets.
pub(super) fn check_paths(arguments: &Arguments) -> Result<()> {
    let paths = [
        ("--socket", arguments.socket.as_deref()),
        ("--control", arguments.control.as_deref()),
        ("--takeover", arguments.takeover.as_deref()),
    ];
    for (index, (name, path)) in paths.iter().enumerate() {
        let Some(path) = path else { continue };
        let earlier = paths[..index].iter().find(|(_, other)| *other == Some(*path));
        if let Some((other, _)) = earlier {
            let why = format!("{other} and {name} are two sockets; give each a path of its own");
            return Err(Error::refused(path.display().to_string(), why));
        }
    }
    Ok(())
}

/// Refuses sockets that could not be made, without changing anything.
pub(super) fn check(arguments: &Arguments) -> Result<()> {
    let paths = [&arguments.control, &arguments.takeover];
    paths.into_iter().flatten().try_for_each(|path| listen::check(path).map(drop))
}

impl<'a> Doors<'a> {
    /// Makes all sockets. That of the disk comes last: whoever has waited for it finds the others.
    pub(super) fn open(arguments: &Arguments, origin: Origin, inside: &Inside<'a>) -> Result<Self> {
        let takeover = arguments.takeover.as_deref();
        Ok(Self {
            successors: takeover.map(|path| Listener::bind_for(path, OWNER_ALONE)).transpose()?,
            control: arguments.control.as_deref().map(|path| inside.control(path)).transpose()?,
            entrance: origin.open()?,
            announced: arguments.listening.announce(None)?,
        })
    }

    /// Takes over what a predecessor has; nothing is announced yet, and no file is ours. What it
    /// has and was not asked for here will be removed with its file by [`Heritage::keep`].
    ///
    /// # Errors
    /// When something else was asked for that cannot be had.
    pub(super) fn inherit(
        arguments: &Arguments,
        heritage: &mut Heritage,
        inside: &Inside<'a>,
    ) -> Result<Self> {
        let wanted = arguments.socket.as_deref();
        let entrance = match (heritage.listener.take(), wanted) {
            (Some(listener), Some(path)) if listener.file().is_some() && !listener.is_at(path) => {
                let found = listener.path().unwrap_or_default();
                let why = format!(
                    "the running daemon listens at {}, where front-ends come back to; give the \
                     same --socket",
                    found.display()
                );
                return Err(Error::refused(path.display().to_string(), why));
            }
            (Some(listener), _) => Entrance::Listening(listener),
            (None, _) => Entrance::Occupied,
        };
        let inherited = heritage.control.take_if(|listener| {
            arguments.control.as_deref().is_some_and(|path| listener.is_at(path))
        });
        let control = match (inherited, arguments.control.as_deref()) {
            (Some(listener), _) => Some(inside.control_at(listener)?),
            (None, path) => path.map(|path| inside.control(path)).transpose()?,
        };
        let successors = heritage.successors.take();
        Ok(Self { entrance, successors, control, announced: Announced::default() })
    }

    /// Has the files from now on, and says that the disk is served.
    pub(super) fn keep(&mut self, arguments: &Arguments, mut heritage: Heritage) {
        self.files().for_each(Listener::keep);
        match arguments.listening.announce(heritage.pidfile.take()) {
            Ok(announced) => self.announced = announced,
            // Guests are served whatever becomes of the file.
            Err(error) => tracing::error!("{error}"),
        }
        // What nobody listens at any more goes.
        heritage.control.iter_mut().for_each(Listener::keep);
    }

    /// Leaves the files to a successor, which is the process of this number.
    pub(super) fn leave(&mut self, successor: Option<u32>) {
        self.files().for_each(Listener::leave);
        self.announced.leave(successor);
    }

    fn files(&mut self) -> impl Iterator<Item = &mut Listener> {
        let entrance = match &mut self.entrance {
            Entrance::Listening(listener) => Some(listener),
            Entrance::Connected(_) | Entrance::Occupied => None,
        };
        let control = self.control.as_mut().map(Socket::listener_mut);
        entrance.into_iter().chain(&mut self.successors).chain(control)
    }

    /// Where front-ends connect, if any can.
    pub(super) fn listener(&self) -> Option<&Listener> {
        listener(&self.entrance)
    }
}

/// Where front-ends connect, if any can.
pub(super) fn listener(entrance: &Entrance) -> Option<&Listener> {
    match entrance {
        Entrance::Listening(listener) => Some(listener),
        Entrance::Connected(_) | Entrance::Occupied => None,
    }
}

impl<'a> Inside<'a> {
    fn control(&self, path: &Path) -> Result<Socket<'a>> {
        Socket::bind(path, self.image.to_owned(), self.files, self.engine)
    }

    fn control_at(&self, listener: Listener) -> Result<Socket<'a>> {
        let socket = Socket::at(listener, self.image.to_owned(), self.files, self.engine);
        socket.map_err(|error| Error::io("--control", error))
    }
}
