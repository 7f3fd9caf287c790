//! The control thread's loop: who is connected, who may come, and who must go.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::sync::{Arc, Mutex, lock};
use crate::vhost::connection::{Connection, Pumped};
use crate::vhost::control::{Control, FrontEnds};
use crate::vhost::export::Export;
use crate::vhost::handover::Connections;
use crate::vhost::listen::Listener;
use crate::vhost::session::Session;
use crate::vhost::successors::Successors;
use crate::vhost::terms::{Clock, State, Terms};
use crate::worker::poller::{Poller, Trigger};
use crate::worker::pool::Pool;

/// Most front-ends that are connected at once. Then one that has come to nothing is given up for
/// the next; if there is none, that one waits.
pub const MAX_CONNECTIONS: usize = 16;
/// How long to wait before a front-end that could not be accepted is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// How long until it is looked whether a front-end has read the answers that it got.
const BLOCKED: Duration = Duration::from_millis(5);

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const CONTROL: u64 = 2;
/// Whoever wants to take the disk over.
const SUCCESSOR: u64 = u64::MAX;
/// The number of the first connection; each further one has the next.
pub(super) const FIRST_PEER: u64 = 3;

/// A front-end that is connected.
pub(super) struct Peer {
    pub(super) number: u64,
    pub(super) connection: Connection,
    pub(super) session: Arc<Mutex<Session>>,
    /// There are messages that were not looked at yet.
    busy: bool,
    /// It does not read its answers.
    blocked: bool,
    clock: Clock,
}

impl Peer {
    /// A front-end that is looked at for the first time.
    pub(super) fn new(number: u64, connection: Connection, session: Arc<Mutex<Session>>) -> Self {
        let clock = Clock::start(Instant::now());
        Self { number, connection, session, busy: true, blocked: false, clock }
    }

    /// Begins anew with a front-end that was connected to somebody else until now.
    fn resume(self) -> Self {
        Self::new(self.number, self.connection, self.session)
    }

    /// Takes note of what the front-end has done.
    fn look(&mut self, now: Instant) {
        let session = lock(&self.session);
        let state = State {
            messages: self.connection.messages,
            is_midway: self.blocked || self.connection.is_midway(),
            is_attached: session.is_attached(),
            is_serving: session.is_serving(),
        };
        drop(session);
        self.clock.look(state, now);
    }

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

pub(super) struct Server<'a> {
    /// Without one there is only the front-end that is connected already.
    listener: Option<&'a Listener>,
    /// Whether the listener is in the set: it is not while there are too many connections.
    listening: bool,
    export: &'a Arc<Export>,
    poller: Poller,
    control: Option<&'a mut (dyn Control + 'a)>,
    successors: Option<Successors<'a>>,
    peers: Vec<Peer>,
    next_number: u64,
    terms: Terms,
    /// The last front-end that was attached has gone.
    deserted: bool,
}

impl<'a> Server<'a> {
    pub(super) fn new(
        listener: Option<&'a Listener>,
        export: &'a Arc<Export>,
        stop: &impl AsRawFd,
        terms: Terms,
        control: Option<&'a mut (dyn Control + 'a)>,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        if let Some(control) = &control {
            poller.add(&control.as_raw_fd(), CONTROL, Trigger::Level)?;
        }
        poller.add(&stop.as_raw_fd(), STOP, Trigger::Level)?;
        listener.map_or(Ok(()), |listener| poller.add(listener, LISTENER, Trigger::Level))?;
        let (peers, next_number, deserted) = (Vec::new(), FIRST_PEER, false);
        Ok(Self {
            listener,
            listening: listener.is_some(),
            export,
            poller,
            control,
            successors: None,
            peers,
            next_number,
            terms,
            deserted,
        })
    }

    /// Goes on with front-ends that are connected already, and looks for a successor.
    pub(super) fn resume(
        &mut self,
        connections: Connections,
        successors: Option<Successors<'a>>,
    ) -> std::io::Result<()> {
        if let Some(successors) = &successors {
            self.poller.add(successors, SUCCESSOR, Trigger::Level)?;
        }
        self.successors = successors;
        connections.go_on();
        for peer in connections.peers {
            self.next_number = self.next_number.max(peer.number + 1);
            self.poller.add(&peer.connection, peer.number, Trigger::Edge)?;
            self.peers.push(peer.resume());
        }
        Ok(())
    }

    /// Lets somebody else have the front-ends.
    pub(super) fn leave(&mut self) -> Connections {
        let peers = std::mem::take(&mut self.peers);
        peers.iter().for_each(|peer| self.poller.remove(&peer.connection));
        Connections::of(peers)
    }

    /// Runs until the process is told to end, nobody is left, or somebody wants to take over.
    pub(super) fn run(&mut self) -> std::io::Result<Option<UnixStream>> {
        while !self.is_over() {
            let timeout = self.timeout_ms();
            let events: Vec<u64> = self.poller.wait(timeout)?.collect();
            if events.contains(&STOP) {
                break;
            }
            for peer in &mut self.peers {
                peer.busy |= peer.blocked || events.contains(&peer.number);
            }
            self.pump();
            self.give_up();
            if events.contains(&LISTENER) {
                self.accept();
            }
            if events.contains(&CONTROL) && self.control() {
                break;
            }
            if events.contains(&SUCCESSOR)
                && let Some(successor) = self.look_for_successor()
            {
                return Ok(Some(successor));
            }
        }
        Ok(None)
    }

    fn look_for_successor(&mut self) -> Option<UnixStream> {
        let running = |peer: &Peer| lock(&peer.session).pool.as_ref().map(Pool::running);
        let workers = self.peers.iter().find_map(running).unwrap_or(0);
        self.successors.as_mut()?.look(workers)
    }

    /// Disconnects all front-ends; what was taken from their rings is finished.
    pub(super) fn end(&mut self) {
        while let Some(peer) = self.peers.pop() {
            peer.hang_up(Some("the daemon ends"));
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

    /// Whether nobody is left to serve.
    fn is_over(&self) -> bool {
        let alone = self.listener.is_none() && self.peers.is_empty();
        alone || self.terms.until_disconnect && self.deserted
    }

    /// How long nothing needs to be done.
    fn timeout_ms(&self) -> i32 {
        // Messages that are there already must not keep the order to end from being seen.
        if self.peers.iter().any(|peer| peer.busy) {
            return 0;
        }
        let blocked = self.peers.iter().any(|peer| peer.blocked).then_some(BLOCKED);
        let now = Instant::now();
        let deadlines = self.peers.iter().filter_map(|peer| self.deadline(peer));
        let left = deadlines.map(|(when, _)| when.saturating_duration_since(now)).min();
        let Some(sleep) = blocked.into_iter().chain(left).min() else { return -1 };
        // A bit longer, so that the deadline has passed by then.
        i32::try_from(sleep.as_millis() + 1).unwrap_or(i32::MAX)
    }

    /// When a front-end is given up. The only one there will be keeps nobody waiting.
    fn deadline(&self, peer: &Peer) -> Option<(Instant, &'static str)> {
        self.listener.and_then(|_| peer.clock.deadline(&self.terms))
    }

    /// Disconnects front-ends that have not gone on for too long.
    fn give_up(&mut self) {
        let now = Instant::now();
        self.peers.iter_mut().for_each(|peer| peer.look(now));
        let late = |peer: &Peer| self.deadline(peer).filter(|(when, _)| *when <= now);
        let late: Vec<(u64, &str)> =
            self.peers.iter().filter_map(|peer| Some((peer.number, late(peer)?.1))).collect();
        late.into_iter().for_each(|(number, why)| self.dismiss(number, Some(why)));
    }

    /// Ends a connection, from which side ever.
    fn dismiss(&mut self, number: u64, why: Option<&str>) {
        let Some(place) = self.peers.iter().position(|peer| peer.number == number) else { return };
        let peer = self.peers.remove(place);
        let was_attached = lock(&peer.session).is_attached();
        peer.hang_up(why);
        let attached = |peer: &Peer| lock(&peer.session).is_attached();
        self.deserted |= was_attached && !self.peers.iter().any(attached);
        self.listen();
        self.pass_on();
    }

    fn accept(&mut self) {
        if !self.make_room() {
            self.listener.inspect(|listener| self.poller.remove(*listener));
            self.listening = false;
            return;
        }
        let accepted = self.listener.map_or(Ok(None), Listener::accept);
        let admitted =
            accepted.and_then(|socket| socket.map_or(Ok(()), |socket| self.admit(socket)));
        if let Err(error) = admitted {
            tracing::error!("a front-end cannot be accepted: {error}");
            std::thread::sleep(RETRY);
        }
    }

    /// Gives up who has come to nothing if there are too many; returns whether there is room then.
    fn make_room(&mut self) -> bool {
        if self.peers.len() < MAX_CONNECTIONS {
            return true;
        }
        // A guest that was served may come back; who was not has not begun, or never will.
        let superfluous = self.peers.iter().find(|peer| !lock(&peer.session).is_attached());
        let Some(number) = superfluous.map(|peer| peer.number) else { return false };
        self.dismiss(number, Some("others want to connect"));
        true
    }

    pub(super) fn admit(&mut self, socket: UnixStream) -> std::io::Result<()> {
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(self.export))));
        let connection = Connection::new(socket, &session)?;
        let number = self.next_number;
        self.poller.add(&connection, number, Trigger::Edge)?;
        self.next_number += 1;
        tracing::debug!("somebody has connected: {number}");
        self.peers.push(Peer::new(number, connection, session));
        Ok(())
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
            peer.blocked = matches!(pumped, Pumped::Blocked);
            if let Pumped::Over(why) = pumped {
                index -= 1;
                let number = peer.number;
                self.dismiss(number, why.as_deref());
            } else {
                lock(&peer.session).rest();
                self.pass_on();
            }
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
        let Some(listener) = self.listener.filter(|_| !self.listening) else { return };
        match self.poller.add(listener, LISTENER, Trigger::Level) {
            Ok(()) => self.listening = true,
            Err(error) => tracing::error!("front-ends cannot be waited for: {error}"),
        }
    }
}
