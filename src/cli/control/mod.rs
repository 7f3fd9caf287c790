//! The control socket: an operator sees and changes a disk while guests use it.
//!
//! One JSON-RPC 2.0 call is one line. The thread that serves front-ends serves operators as well,
//! so nothing here waits for a client: lines and clients are bounded, and one that does not read
//! its answers is left alone until it does. A new method is a line in `methods::METHODS` and a
//! function.

mod client;
mod methods;
mod report;
mod rpc;

use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::cli::control::client::{Client, MAX_LINE, Next};
use crate::cli::control::methods::{Disk, Reach};
use crate::error::{Error, Result};
use crate::storage::Engine;
use crate::storage::files::Files;
use crate::sync::Arc;
use crate::vhost::control::{Control, FrontEnds};
use crate::vhost::listen::Listener;
use crate::worker::poller::{Poller, Trigger};

/// Most clients that are connected at once. When another one comes, the one that has been silent
/// for the longest time must go: clients that say nothing keep nobody out.
const MAX_CLIENTS: usize = 16;

const LISTENER: u64 = 0;

/// A client and where it stands.
struct Place {
    number: u64,
    client: Client,
    /// It has to read before it is served on.
    must_read: bool,
    heard: Instant,
}

/// The control socket and who is connected to it.
pub(super) struct Socket<'a> {
    listener: Listener,
    poller: Poller,
    places: Vec<Place>,
    next_number: u64,
    disk: Disk<'a>,
}

impl AsRawFd for Socket<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }
}

impl<'a> Socket<'a> {
    /// Listens at `path` for whoever may write there, which is the owner. Methods reach the image
    /// at `image`, one of `files`, through `engine`.
    ///
    /// # Errors
    /// Names the path, the reason and what would help.
    pub(super) fn bind(
        path: &Path,
        image: PathBuf,
        files: &Arc<Files>,
        engine: &'a dyn Engine,
    ) -> Result<Self> {
        let failed = |error| Error::io(format!("{}: cannot listen", path.display()), error);
        let listener = Listener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        // Whoever has connected before that may not have been allowed to.
        while let Some(early) = listener.accept().map_err(failed)? {
            drop(early);
        }
        Self::at(listener, image, files, engine).map_err(failed)
    }

    /// The same at a socket that a predecessor has made.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub(super) fn at(
        listener: Listener,
        image: PathBuf,
        files: &Arc<Files>,
        engine: &'a dyn Engine,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER, Trigger::Level)?;
        let disk = Disk { path: image, files: Arc::clone(files), engine, since: Instant::now() };
        Ok(Self { listener, poller, places: Vec::new(), next_number: LISTENER + 1, disk })
    }

    /// Where operators connect.
    pub(super) fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The same, to have its file or to leave it.
    pub(super) fn listener_mut(&mut self) -> &mut Listener {
        &mut self.listener
    }

    fn accept(&mut self) {
        if self.places.len() == MAX_CLIENTS
            && let Some(silent) = (0..MAX_CLIENTS).min_by_key(|index| self.places[*index].heard)
        {
            tracing::debug!("too many control connections: the most silent one is closed");
            self.places.remove(silent);
        }
        let number = self.next_number;
        let accepted = self.listener.accept().and_then(|socket| {
            let Some(socket) = socket else { return Ok(()) };
            let client = Client::new(socket)?;
            self.poller.add(&client, number, Trigger::Level)?;
            self.next_number += 1;
            let heard = Instant::now();
            self.places.push(Place { number, client, must_read: false, heard });
            Ok(())
        });
        if let Err(error) = accepted {
            // Without a descriptor for it, it would be reported again at once.
            tracing::error!("a control connection cannot be accepted: {error}");
            if let Some(place) = self.places.pop() {
                drop(place);
            } else {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }

    fn pump(&mut self, number: u64, front_ends: &mut FrontEnds<'_>) {
        let Some(index) = self.places.iter().position(|place| place.number == number) else {
            return;
        };
        let place = &mut self.places[index];
        place.heard = Instant::now();
        let mut reach = Reach { front_ends, disk: &self.disk };
        let mut answer = |line: &[u8]| {
            rpc::serve(line, &mut |method, parameters| methods::run(&mut reach, method, parameters))
        };
        let next = place.client.pump(&mut answer, &|| rpc::too_long(MAX_LINE));
        let must_read = next == Next::Room;
        if next == Next::End {
            self.places.remove(index);
        } else if must_read != place.must_read {
            place.must_read = must_read;
            let trigger = if must_read { Trigger::Room } else { Trigger::Level };
            self.poller.remove(&place.client);
            if let Err(error) = self.poller.add(&place.client, number, trigger) {
                tracing::error!("a control connection cannot be waited for: {error}");
                self.places.remove(index);
            }
        }
    }
}

impl Control for Socket<'_> {
    fn serve(&mut self, front_ends: &mut FrontEnds<'_>) {
        let ready: Vec<u64> = match self.poller.wait(0) {
            Ok(ready) => ready.collect(),
            Err(error) => {
                tracing::error!("control connections cannot be waited for: {error}");
                return;
            }
        };
        for number in ready {
            if number == LISTENER {
                self.accept();
            } else {
                self.pump(number, front_ends);
            }
        }
    }
}
