//! What a daemon tells the one that takes its place: every front-end's connection as it stands.
//!
//! It is plain data beside a list of open descriptors, which the data refer to by place. Rings are
//! drained before, so nothing is under way; what a front-end has said and nobody has read stays in
//! its socket. A field that only some front-ends need is optional, and has `#[serde(default)]` so
//! that a predecessor which does not know it can be followed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::{FrontendReq, VhostUserMemoryRegion};

use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, lock};
use crate::vhost::backend_channel::BackendChannel;
use crate::vhost::connection::Connection;
use crate::vhost::export::Export;
use crate::vhost::inflight::Region;
use crate::vhost::server::{FIRST_PEER, Peer};
use crate::vhost::session::Session;

/// A descriptor's place in the list of descriptors.
pub type Place = usize;

/// Descriptors to pass on. They are not copies: whoever they belong to must live until they were
/// sent.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<RawFd>);

impl Descriptors {
    /// Puts a descriptor into the list.
    pub fn add(&mut self, descriptor: &impl AsRawFd) -> Place {
        self.0.push(descriptor.as_raw_fd());
        self.0.len() - 1
    }

    /// The list.
    pub fn list(&self) -> &[RawFd] {
        &self.0
    }
}

/// Descriptors that were received, by place.
#[derive(Debug, Default)]
pub struct Received(BTreeMap<Place, File>);

impl Received {
    /// The descriptors in the order of their places.
    pub fn new(files: Vec<File>) -> Self {
        Self(files.into_iter().enumerate().collect())
    }

    /// Takes the descriptor of a place, if a place is named.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&mut self, place: Option<Place>) -> Result<Option<File>> {
        place.map(|place| self.need(place)).transpose()
    }

    /// Takes the descriptor of a place.
    ///
    /// # Errors
    /// When there is none.
    pub fn need(&mut self, place: Place) -> Result<File> {
        let missing = || Error::refused("takeover", format!("descriptor {place} did not come"));
        self.0.remove(&place).ok_or_else(missing)
    }
}

/// A region of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: Place,
}

/// A ring.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RingState {
    pub(super) size: Option<u32>,
    /// Descriptor table, available ring and used ring.
    pub(super) addresses: Option<[u64; 3]>,
    pub(super) base: Option<u16>,
    pub(super) told_base: Option<u16>,
    pub(super) started: bool,
    pub(super) enabled: bool,
    pub(super) kick: Option<Place>,
    pub(super) call: Option<Place>,
    pub(super) error: Option<Place>,
    pub(super) used_log: Option<u64>,
}

/// The region where requests in flight are noted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    pub(super) size: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) file: Place,
}

/// The dirty log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogState {
    pub(super) size: u64,
    pub(super) offset: u64,
    pub(super) file: Option<Place>,
    pub(super) failed: bool,
}

/// The way to tell a front-end that the disk has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChannelState {
    pub(super) socket: Option<Place>,
    pub(super) read: Option<u64>,
    pub(super) told: Option<u64>,
}

/// A front-end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionState {
    number: u64,
    socket: Place,
    messages: u64,
    knows_features: bool,
    features: u64,
    protocol: u64,
    /// Whether its driver has a write cache, once it has said so or was served.
    write_back: Option<bool>,
    attached: bool,
    /// It had the workers.
    served: bool,
    inflight: Option<InflightState>,
    log: LogState,
    channel: ChannelState,
    /// The channel through which a state is loaded.
    loading: Option<Place>,
    regions: Vec<RegionState>,
    /// By number; those at the end that are as they were in the beginning are left out.
    rings: Vec<RingState>,
}

/// The front-ends that are connected, from one daemon or one image to the next.
#[derive(Default)]
pub struct Connections {
    pub(super) peers: Vec<Peer>,
    /// The number of the front-end that had the workers.
    pub(super) served: Option<u64>,
    /// When the rings were told to stop, if they were.
    halted: Option<Instant>,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connections({} front-ends)", self.peers.len())
    }
}

impl Connections {
    /// The front-ends of a service that has ended without them.
    pub(super) fn of(peers: Vec<Peer>) -> Self {
        Self { peers, served: None, halted: None }
    }

    /// The connection of a front-end that is the only one.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn only(socket: UnixStream, export: &Arc<Export>) -> std::io::Result<Self> {
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(export))));
        let connection = Connection::new(socket, &session)?;
        Ok(Self::of(vec![Peer::new(FIRST_PEER, connection, session)]))
    }

    /// Drains every ring and takes the workers from whoever has them.
    pub fn halt(&mut self) {
        self.halted = Some(Instant::now());
        for peer in &self.peers {
            let mut session = lock(&peer.session);
            if session.is_serving() {
                self.served = Some(peer.number);
            }
            session.stop_all();
            session.rest();
        }
    }

    /// How long guests have waited so far.
    pub fn waited(&self) -> Duration {
        self.halted.map_or(Duration::ZERO, |halted| halted.elapsed())
    }

    /// How many front-ends there are.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// What a successor must know.
    pub fn save(&self, descriptors: &mut Descriptors) -> Vec<SessionState> {
        let save = |peer: &Peer| {
            let served = self.served == Some(peer.number);
            save(peer, served, descriptors)
        };
        self.peers.iter().map(save).collect()
    }

    /// The front-ends of a predecessor, whose guests have waited for so long. No ring is served
    /// before the service begins.
    ///
    /// # Errors
    /// When this daemon cannot serve one of them as its predecessor did.
    pub fn restore(
        states: &[SessionState],
        received: &mut Received,
        export: &Arc<Export>,
        waited: Duration,
    ) -> Result<Self> {
        let halted = Instant::now().checked_sub(waited);
        let mut connections = Self { halted, ..Self::default() };
        for state in states {
            let peer = restore(state, received, export);
            let what = format!("front-end {}", state.number);
            connections.peers.push(peer.map_err(|error| error.within(what))?);
            if state.served {
                connections.served = Some(state.number);
            }
        }
        Ok(connections)
    }

    /// Serves the rings; those of the front-end that was served before come first.
    pub(super) fn go_on(&self) {
        let first = |peer: &&Peer| Some(peer.number) == self.served;
        for peer in self.peers.iter().filter(first).chain(&self.peers) {
            let mut session = lock(&peer.session);
            session.settle_all();
            session.rest();
        }
        if self.halted.is_some() {
            let milliseconds = self.waited().as_secs_f64() * 1e3;
            tracing::info!("guests have waited for {milliseconds:.1} ms");
        }
    }
}

fn save(peer: &Peer, served: bool, descriptors: &mut Descriptors) -> SessionState {
    let session = lock(&peer.session);
    let regions = session.memory.described().map(|(region, file)| RegionState {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
        file: descriptors.add(file),
    });
    let regions = regions.collect();
    let (inflight, log) = (session.inflight.as_ref(), session.save_log(descriptors));
    let inflight = inflight.and_then(|region| region.save(descriptors));
    let mut rings: Vec<RingState> =
        session.rings.iter().map(|ring| ring.save(descriptors)).collect();
    let used = rings.iter().rposition(|ring| *ring != RingState::default());
    rings.truncate(used.map_or(0, |last| last + 1));
    SessionState {
        number: peer.number,
        socket: descriptors.add(&peer.connection),
        messages: peer.connection.messages,
        knows_features: session.knows_features,
        features: session.features,
        protocol: session.protocol,
        write_back: session.write_back,
        attached: session.attached,
        served,
        inflight,
        log,
        channel: session.channel.save(descriptors),
        loading: session.loading.as_ref().map(|file| descriptors.add(file)),
        regions,
        rings,
    }
}

fn restore(state: &SessionState, received: &mut Received, export: &Arc<Export>) -> Result<Peer> {
    let session = Arc::new(Mutex::new(Session::new(Arc::clone(export))));
    let socket = UnixStream::from(OwnedFd::from(received.need(state.socket)?));
    let mut negotiated = Vec::new();
    if state.knows_features {
        negotiated.push((FrontendReq::GET_FEATURES, None));
    }
    if state.features != 0 {
        negotiated.push((FrontendReq::SET_FEATURES, Some(state.features)));
    }
    if state.protocol != 0 {
        negotiated.push((FrontendReq::SET_PROTOCOL_FEATURES, Some(state.protocol)));
    }
    let connection = Connection::resume(socket, &session, &negotiated);
    let mut connection = connection.map_err(|error| Error::io("cannot be taken over", error))?;
    connection.messages = state.messages;
    restore_session(&mut lock(&session), state, received)?;
    Ok(Peer::new(state.number, connection, session))
}

fn restore_session(
    session: &mut Session,
    state: &SessionState,
    received: &mut Received,
) -> Result<()> {
    session.take_entered();
    session.write_back = state.write_back;
    session.attached = state.attached;
    for RegionState { guest, size, user, offset, file } in &state.regions {
        let region = VhostUserMemoryRegion::new(*guest, *size, *user, *offset);
        session.memory.add(&region, received.need(*file)?)?;
    }
    session.restore_log(&state.log, received)?;
    if let Some(region) = &state.inflight {
        session.inflight = Some(Region::restore(region, received)?);
    }
    session.channel = BackendChannel::restore(&state.channel, received)?;
    session.loading = received.take(state.loading)?;
    if state.rings.len() > session.rings.len() {
        let why = format!("it uses {} queues (--num-queues)", state.rings.len());
        return Err(Error::refused("queues", why));
    }
    for (index, (ring, state)) in session.rings.iter_mut().zip(&state.rings).enumerate() {
        let restored = ring.restore(state, received);
        restored.map_err(|error| error.within(format!("queue {index}")))?;
    }
    // Where rings are logged is known by now.
    session.settle_log();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserLog};
    use vhost::vhost_user::{VhostUserBackendReqHandlerMut, message::VhostUserVringAddrFlags};

    use crate::blk::{Device, Settings};
    use crate::worker::pool::Pool;

    fn export() -> Arc<Export> {
        let device = Device::of_no_bytes(Settings { queues: 4, ..Settings::default() });
        let engines = Arc::new(|_| Err(Error::refused("engine", "nothing is served here")));
        Arc::new(Export::new(Pool::new(Arc::new(device), engines, 1)))
    }

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(len).expect("its length");
        file
    }

    /// A front-end that has said everything there is to say, but starts no ring.
    fn talkative(export: &Arc<Export>) -> Peer {
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(export))));
        let (ours, _) = UnixStream::pair().expect("a connection");
        let mut connection = Connection::new(ours, &session).expect("a connection");
        connection.messages = 77;
        let mut held = lock(&session);
        let log_all = 1 << 26;
        let features = held.get_features().expect("features");
        held.set_owner().expect("an owner");
        let protocol = held.get_protocol_features().expect("protocol features");
        held.set_protocol_features(protocol.bits()).expect("they were offered");
        held.set_features(features | log_all).expect("they were offered");
        let region = VhostUserMemoryRegion::new(1 << 32, 1 << 16, 1 << 40, 4096);
        held.knows_features = true;
        held.set_mem_table(&[region], vec![file(1 << 17)], None).expect("memory");
        held.set_log_base(&VhostUserLog::new(100, 8), file(4096)).expect("a log");
        let (told, memory) = held.get_inflight_fd(&inflight(0)).expect("a region");
        held.set_inflight_fd(&inflight(told.mmap_size), memory).expect("the region");
        held.set_channel(Some(file(1))).expect("a channel");
        let flags = VhostUserConfigFlags::empty();
        held.get_config(0, 60, flags).expect("the capacity");
        held.set_config(32, &[0], flags).expect("no write cache");
        held.loading = Some(file(2));
        held.set_vring_num(2, 256).expect("a size");
        let logged = VhostUserVringAddrFlags::VHOST_VRING_F_LOG;
        held.set_vring_addr(2, logged, 1 << 40, 3 << 38, 5 << 38, 0x4000).expect("addresses");
        held.set_vring_base(2, 12_345).expect("a base");
        held.set_vring_call(2, Some(file(3))).expect("a descriptor");
        held.set_vring_err(2, Some(file(4))).expect("a descriptor");
        held.set_vring_kick(2, Some(file(5))).expect("a descriptor");
        drop(held);
        Peer::new(9, connection, session)
    }

    fn inflight(size: u64) -> VhostUserInflight {
        VhostUserInflight::new(size, 0, 3, 256)
    }

    /// The state as text, the descriptors as a successor gets them, and what they are open on.
    fn sent(connections: &Connections) -> (String, Received, Vec<(u64, u64)>) {
        let mut descriptors = Descriptors::default();
        let state = connections.save(&mut descriptors);
        let text = serde_json::to_string(&state).expect("plain data");
        let send = |fd: &RawFd| {
            let (left, right) = UnixStream::pair().expect("a pair");
            left.send_with_fd(&[0u8][..], *fd).expect("it is sent");
            right.recv_with_fd(&mut [0]).expect("it comes").1.expect("a descriptor")
        };
        let files: Vec<File> = descriptors.list().iter().map(send).collect();
        let identity = |file: &File| {
            let metadata = file.metadata().expect("a file");
            (metadata.dev(), metadata.ino())
        };
        let identities = files.iter().map(identity).collect();
        (text, Received::new(files), identities)
    }

    #[test]
    fn a_session_with_everything_set_is_the_same_afterwards() {
        let mut connections = Connections::of(vec![talkative(&export())]);
        connections.served = Some(9);
        let (text, mut received, files) = sent(&connections);
        let states: Vec<SessionState> = serde_json::from_str(&text).expect("the state");
        let state = &states[0];
        assert_eq!((state.number, state.messages, state.served), (9, 77, true));
        assert!(state.attached && state.knows_features && state.write_back == Some(false));
        assert!(state.inflight.is_some() && state.log.file.is_some() && state.loading.is_some());
        assert_eq!((state.log.size, state.log.offset, state.log.failed), (100, 8, false));
        assert_eq!((state.channel.read, state.rings.len()), (Some(0), 3));
        let ring = &state.rings[2];
        assert_eq!((ring.base, ring.told_base), (Some(12_345), Some(12_345)));
        assert_eq!((ring.size, ring.used_log, ring.started), (Some(256), Some(0x4000), true));
        assert!(ring.kick.is_some() && ring.call.is_some() && ring.error.is_some());
        let there = export();
        let restored =
            Connections::restore(&states, &mut received, &there, Duration::ZERO).expect("it fits");
        assert_eq!(received.0.len(), 0, "every descriptor is somebody's");
        let (again, _, same_files) = sent(&restored);
        assert_eq!(again, text);
        assert_eq!(same_files, files);
        assert!(lock(&restored.peers[0].session).logging().is_some(), "writes are logged");
    }

    #[test]
    fn fields_of_other_versions_are_left_out_and_descriptors_are_needed() {
        let state: SessionState = serde_json::from_str("{\"number\":5,\"new\":{}}").expect("text");
        assert_eq!(state, SessionState { number: 5, ..SessionState::default() });
        let connections = Connections::of(vec![talkative(&export())]);
        let (text, received, _) = sent(&connections);
        let states: Vec<SessionState> = serde_json::from_str(&text).expect("the state");
        for missing in 0..received.0.len() {
            let (_, mut received, _) = sent(&connections);
            received.0.remove(&missing);
            let error = Connections::restore(&states, &mut received, &export(), Duration::ZERO);
            let error = error.expect_err("one is missing").to_string();
            assert!(error.contains(&format!("descriptor {missing} ")), "{error}");
        }
    }
}
