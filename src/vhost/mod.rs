//! The front-end's side: a socket, one connection after the other, and the messages on it.
//!
//! Section names are those of the vhost-user specification. One thread does all of this; it sleeps
//! until a front-end connects, says something, or the process is told to end.

mod connection;
mod handler;
pub mod listen;
pub mod memory;
mod message;
mod ring;
pub mod session;

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, lock};
use crate::vhost::connection::{Connection, Pumped};
use crate::vhost::listen::Listener;
use crate::vhost::session::Session;
use crate::worker::poller::{Poller, Trigger};

/// How long to wait before a front-end that could not be accepted is tried again.
const RETRY: Duration = Duration::from_millis(100);

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const CONNECTION: u64 = 2;

/// Serves front-ends, one after the other, until `stop` is readable. A front-end that connects
/// meanwhile waits for its turn. At the end every ring is drained.
///
/// # Errors
/// When the process has no descriptors left to begin with.
pub fn serve(
    listener: &Listener,
    session: &Arc<Mutex<Session>>,
    stop: &impl AsRawFd,
) -> Result<()> {
    let mut server = Server::new(listener, session, stop)
        .map_err(|error| Error::io("cannot wait for front-ends", error))?;
    let result = server.run().map_err(|error| Error::io("cannot wait for front-ends", error));
    server.hang_up(Some("the daemon ends"));
    result
}

struct Server<'a> {
    listener: &'a Listener,
    session: &'a Arc<Mutex<Session>>,
    poller: Poller,
    connection: Option<Connection>,
}

impl<'a> Server<'a> {
    fn new(
        listener: &'a Listener,
        session: &'a Arc<Mutex<Session>>,
        stop: &impl AsRawFd,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&stop.as_raw_fd(), STOP, Trigger::Level)?;
        poller.add(listener, LISTENER, Trigger::Level)?;
        Ok(Self { listener, session, poller, connection: None })
    }

    fn run(&mut self) -> std::io::Result<()> {
        let mut busy = false;
        loop {
            // Messages that are there already must not keep the order to end from being seen.
            let events: Vec<u64> = self.poller.wait(if busy { 0 } else { -1 })?.collect();
            if events.contains(&STOP) {
                return Ok(());
            }
            if events.contains(&LISTENER) && self.connection.is_none() {
                self.accept();
            }
            busy = (busy || events.contains(&CONNECTION)) && self.pump();
        }
    }

    fn accept(&mut self) {
        let accepted = self.listener.accept().and_then(|socket| {
            let Some(socket) = socket else { return Ok(None) };
            let connection = Connection::new(socket, self.session)?;
            self.poller.add(&connection, CONNECTION, Trigger::Edge)?;
            Ok(Some(connection))
        });
        match accepted {
            Ok(None) => {}
            Ok(connection) => {
                tracing::debug!("somebody has connected");
                self.poller.remove(self.listener);
                self.connection = connection;
            }
            Err(error) => {
                tracing::error!("a front-end cannot be accepted: {error}");
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Serves what the front-end has said; returns whether there is more.
    fn pump(&mut self) -> bool {
        let Some(connection) = &mut self.connection else { return false };
        let before = connection.messages;
        let pumped = connection.pump();
        if before == 0 && connection.messages != 0 {
            tracing::info!("a front-end has connected");
        }
        match pumped {
            Pumped::Quiet => false,
            Pumped::Busy => true,
            Pumped::Over(why) => {
                self.hang_up(why.as_deref());
                // The next one may have waited for a long time already.
                if let Err(error) = self.poller.add(self.listener, LISTENER, Trigger::Level) {
                    tracing::error!("front-ends cannot be waited for: {error}");
                }
                false
            }
        }
    }

    fn hang_up(&mut self, why: Option<&str>) {
        let Some(connection) = self.connection.take() else { return };
        let mut session = lock(self.session);
        let features = session.features();
        session.disconnect();
        let messages = connection.messages;
        match why {
            Some(why) => tracing::warn!("a front-end was disconnected: {why}"),
            // Somebody only looked whether the socket answers.
            None if messages == 0 => {}
            None => tracing::info!("the front-end with features {features:#x} has disconnected"),
        }
    }
}
