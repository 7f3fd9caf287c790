//! The front-ends' side: a socket, connections, and the messages on them.
//!
//! Section names are those of the vhost-user specification. One thread does all of this; it sleeps
//! until a front-end connects, says something, or the process is told to end. Any front-end may
//! connect at any time; [`export`] says whose guest is served.

mod backend_channel;
mod connection;
pub mod control;
pub mod export;
mod handler;
mod inflight;
pub mod listen;
mod log;
pub mod memory;
mod message;
mod ring;
pub mod session;
mod transfer;

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, lock};
use crate::vhost::connection::{Connection, Pumped};
use crate::vhost::control::{Control, FrontEnds};
use crate::vhost::export::Export;
use crate::vhost::listen::Listener;
use crate::vhost::session::Session;
use crate::worker::poller::{Poller, Trigger};

/// Most front-ends that are connected at once; more wait for one to go.
pub const MAX_CONNECTIONS: usize = 16;
/// How long to wait before a front-end that could not be accepted is tried again.
const RETRY: Duration = Duration::from_millis(100);

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const CONTROL: u64 = 2;
/// The number of the first connection; each further one has the next.
const FIRST_PEER: u64 = 3;

/// Serves front-ends until `stop` is readable. At the end every ring is drained.
///
/// # Errors
/// When the process has no descriptors left to begin with.
pub fn serve(listener: &Listener, export: &Arc<Export>, stop: &impl AsRawFd) -> Result<()> {
    serve_with(listener, export, stop, None)
}

/// As [`serve`], with something to serve beside the front-ends.
///
/// # Errors
/// As [`serve`].
pub fn serve_with<'a>(
    listener: &'a Listener,
    export: &'a Arc<Export>,
    stop: &impl AsRawFd,
    control: Option<Box<dyn Control + 'a>>,
) -> Result<()> {
    let mut server = Server::new(listener, export, stop, control)
        .map_err(|error| Error::io("cannot wait for front-ends", error))?;
    let result = server.run().map_err(|error| Error::io("cannot wait for front-ends", error));
    while let Some(peer) = server.peers.pop() {
        peer.hang_up(Some("the daemon ends"));
    }
    result
}

/// A front-end that is connected.
struct Peer {
    number: u64,
    connection: Connection,
    session: Arc<Mutex<Session>>,
    /// There are messages that were not looked at yet.
    busy: bool,
}

impl Peer {
    fn hang_up(self, why: Option<&str>) {
        let mut session = lock(&self.session);
        let features = session.features();
        session.disconnect();
        let (number, messages) = (self.number, self.connection.messages);
        match why {
            Some(why) => tracing::warn!("front-end {number} was disconnected: {why}"),
            // Somebody only looked whether the socket answers.
            None if messages == 0 => {}
            None => {
                tracing::info!("front-end {number} with features {features:#x} has disconnected");
            }
        }
    }
}

struct Server<'a> {
    listener: &'a Listener,
    /// Whether the listener is in the set: it is not while there are too many connections.
    listening: bool,
    export: &'a Arc<Export>,
    poller: Poller,
    control: Option<Box<dyn Control + 'a>>,
    peers: Vec<Peer>,
    next_number: u64,
}

impl<'a> Server<'a> {
    fn new(
        listener: &'a Listener,
        export: &'a Arc<Export>,
        stop: &impl AsRawFd,
        control: Option<Box<dyn Control + 'a>>,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        if let Some(control) = &control {
            poller.add(&control.as_raw_fd(), CONTROL, Trigger::Level)?;
        }
        poller.add(&stop.as_raw_fd(), STOP, Trigger::Level)?;
        poller.add(listener, LISTENER, Trigger::Level)?;
        let (peers, next_number) = (Vec::new(), FIRST_PEER);
        Ok(Self { listener, listening: true, export, poller, control, peers, next_number })
    }

    fn run(&mut self) -> std::io::Result<()> {
        loop {
            // Messages that are there already must not keep the order to end from being seen.
            let busy = self.peers.iter().any(|peer| peer.busy);
            let events: Vec<u64> = self.poller.wait(if busy { 0 } else { -1 })?.collect();
            if events.contains(&STOP) {
                return Ok(());
            }
            for peer in &mut self.peers {
                peer.busy |= events.contains(&peer.number);
            }
            self.pump();
            if events.contains(&LISTENER) {
                self.accept();
            }
            if events.contains(&CONTROL) && self.control() {
                return Ok(());
            }
        }
    }

    /// Serves what is not a front-end; returns whether the daemon is to end.
    fn control(&mut self) -> bool {
        let Some(control) = &mut self.control else { return false };
        let sessions = self.peers.iter().map(|peer| (peer.number, &peer.session)).collect();
        let mut front_ends = FrontEnds { sessions, export: self.export, over: false };
        control.serve(&mut front_ends);
        let over = front_ends.over;
        self.pass_on();
        over
    }

    fn accept(&mut self) {
        let accepted = self.listener.accept().and_then(|socket| {
            let Some(socket) = socket else { return Ok(()) };
            let session = Arc::new(Mutex::new(Session::new(Arc::clone(self.export))));
            let connection = Connection::new(socket, &session)?;
            let number = self.next_number;
            self.poller.add(&connection, number, Trigger::Edge)?;
            self.next_number += 1;
            tracing::debug!("somebody has connected: {number}");
            self.peers.push(Peer { number, connection, session, busy: true });
            Ok(())
        });
        if let Err(error) = accepted {
            tracing::error!("a front-end cannot be accepted: {error}");
            std::thread::sleep(RETRY);
        }
        if self.peers.len() == MAX_CONNECTIONS {
            self.poller.remove(self.listener);
            self.listening = false;
        }
    }

    /// Serves what the front-ends have said.
    fn pump(&mut self) {
        let mut index = 0;
        while let Some(peer) = self.peers.get_mut(index) {
            index += 1;
            if !peer.busy {
                continue;
            }
            let before = peer.connection.messages;
            let pumped = peer.connection.pump();
            if before == 0 && peer.connection.messages != 0 {
                tracing::info!("front-end {} has connected", peer.number);
            }
            peer.busy = matches!(pumped, Pumped::Busy);
            if let Pumped::Over(why) = pumped {
                index -= 1;
                self.peers.remove(index).hang_up(why.as_deref());
                self.listen();
            } else {
                lock(&peer.session).rest();
            }
            self.pass_on();
        }
    }

    /// Lets a session that waits for the workers have them if nobody else does.
    fn pass_on(&self) {
        for peer in &self.peers {
            let mut session = lock(&peer.session);
            if self.export.is_free() && session.is_waiting() {
                session.settle_all();
                session.rest();
                if session.is_serving() {
                    tracing::info!("front-end {} has the disk now", peer.number);
                }
            }
        }
    }

    /// Waits for front-ends again, of which there were too many.
    fn listen(&mut self) {
        if self.listening {
            return;
        }
        match self.poller.add(self.listener, LISTENER, Trigger::Level) {
            Ok(()) => self.listening = true,
            Err(error) => tracing::error!("front-ends cannot be waited for: {error}"),
        }
    }
}
