//! From vhost-user messages to orders for the workers.
//!
//! A ring is served while the front-end has described it in full, has enabled it, and its memory is
//! there. Every message changes a part of that picture and then `Session::settle` makes the
//! workers agree with it. A ring is always drained before it is given back: on GET_VRING_BASE,
//! SET_VRING_ENABLE 0, RESET_DEVICE, a change of memory, and the end of the connection.

use std::fs::File;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as Refusal, Result as Answer};

use crate::blk::{FEATURE_EVENT_IDX, FEATURE_FLUSH};
use crate::error::Error;
use crate::sync::Arc;
use crate::vhost::backend_channel::BackendChannel;
use crate::vhost::control::FrontEnd;
use crate::vhost::export::Export;
use crate::vhost::inflight::{JournalState, Region};
use crate::vhost::log::{LOG_ALL, Log};
use crate::vhost::memory::MemoryTable;
use crate::vhost::ring::Ring;
use crate::worker::Report;
use crate::worker::pool::Pool;

/// The bit that says whether a front-end knows protocol features, and with them enabled rings.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The virtio feature bits that are the front-end's and not the driver's.
pub(super) const FRONT_END_FEATURES: u64 = PROTOCOL_FEATURES | LOG_ALL;

/// What this back-end can do beyond the basic protocol.
pub(super) fn offered_protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// The device as seen by one front-end.
pub struct Session {
    pub(super) export: Arc<Export>,
    /// The workers, while a ring is served or was a moment ago.
    pub(super) pool: Option<Pool>,
    /// Whether this front-end's driver has a write cache, once it has said so, or has had a ring
    /// served; else it finds the device as it is.
    pub(super) write_back: Option<bool>,
    pub(super) rings: Vec<Ring>,
    pub(super) memory: MemoryTable,
    pub(super) inflight: Option<Region>,
    /// What became of the region's journal.
    pub(super) journal: JournalState,
    pub(super) log: Log,
    /// The channel through which a state is loaded.
    pub(super) loading: Option<File>,
    pub(super) features: u64,
    pub(super) protocol: u64,
    /// The way to tell the front-end that the disk has changed.
    pub(super) channel: BackendChannel,
    /// The front-end has asked for the features: acknowledgements depend on it.
    pub(super) knows_features: bool,
    /// The front-end has said that the device is its, or has had a ring served.
    pub(super) attached: bool,
    /// A message has reached this session, which means that its answer is given.
    pub(super) entered: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let running = self.rings.iter().filter(|ring| ring.running).count();
        write!(f, "Session({running} of {} rings are served)", self.rings.len())
    }
}

pub(super) fn refuse(error: Error) -> Refusal {
    tracing::warn!("{error}");
    Refusal::ReqHandlerError(std::io::Error::other(error.to_string()))
}

impl Session {
    /// A session that serves rings with the workers of `export` while no other one has them.
    pub fn new(export: Arc<Export>) -> Self {
        let device = export.device();
        let settings = device.settings();
        let rings = (0..settings.queues).map(|_| Ring::new(settings.queue_size)).collect();
        Self {
            pool: None,
            write_back: None,
            export,
            rings,
            memory: MemoryTable::default(),
            inflight: None,
            journal: JournalState::default(),
            log: Log::default(),
            loading: None,
            features: 0,
            protocol: 0,
            channel: BackendChannel::default(),
            knows_features: false,
            attached: false,
            entered: false,
        }
    }

    /// Ends the service of the front-end: drains every ring and lets the workers go.
    pub fn disconnect(&mut self) {
        self.stop_all();
        self.rest();
        self.inflight = None;
    }

    /// Whether the front-end has ever attached itself to the device, and so may be silent.
    pub fn is_attached(&self) -> bool {
        self.attached || self.is_waiting()
    }

    /// Whether a ring is served.
    pub fn is_serving(&self) -> bool {
        self.rings.iter().any(|ring| ring.running)
    }

    /// What an operator is told of this front-end.
    pub(super) fn describe(&self, number: u64) -> FrontEnd {
        let numbers = |is: fn(&Ring) -> bool| {
            let ring = |(index, ring): (usize, &Ring)| is(ring).then_some(index);
            self.rings.iter().enumerate().filter_map(ring).collect()
        };
        FrontEnd {
            number,
            features: self.features,
            protocol_features: self.protocol,
            enabled: numbers(Ring::is_enabled),
            served: numbers(|ring| ring.running),
            can_be_told: self.channel.is_open(),
        }
    }

    /// What the workers have done, if this session has them.
    pub(super) fn report(&self) -> Option<Vec<(usize, Report)>> {
        self.pool.as_ref().map(Pool::report)
    }

    /// Lets the workers go if no ring needs them.
    pub fn rest(&mut self) {
        if self.is_serving() {
            return;
        }
        self.let_journal_go();
        if let Some(mut pool) = self.pool.take() {
            // The guest's memory and its log are not kept longer than its rings.
            pool.set_memory(MemoryTable::default().memory());
            pool.set_logging(None);
            self.export.put(pool);
        }
    }

    /// The workers, for this front-end's guest; `None` while another one's is served.
    fn hire(&mut self) -> Option<&mut Pool> {
        if self.pool.is_none() {
            let mut pool = self.export.take()?;
            pool.set_memory(self.memory.memory());
            pool.set_logging(self.logging());
            self.pool = Some(pool);
            self.set_write_back(self.is_write_back());
        }
        self.pool.as_mut()
    }

    /// Whether this front-end's driver has a write cache. A guest that comes from another
    /// front-end believes what it was told there.
    pub(super) fn is_write_back(&self) -> bool {
        self.write_back.unwrap_or_else(|| self.export.device().is_write_back())
    }

    /// Has a write cache from now on, or none.
    pub(super) fn set_write_back(&mut self, write_back: bool) {
        self.write_back = Some(write_back);
        if let Some(region) = &self.inflight {
            region.keep_write_back(write_back);
        }
        if self.pool.is_some() {
            self.export.device().set_write_back(write_back);
        }
    }

    /// Gives the workers the guest's memory as it is now.
    pub(super) fn update_memory(&mut self) {
        if let Some(pool) = &mut self.pool {
            pool.set_memory(self.memory.memory());
        }
    }

    /// The virtio features that the front-end has taken.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the front-end may ask for acknowledgements, as the `vhost` crate sees it.
    pub(super) fn acknowledges(&self) -> bool {
        let bit = VhostUserProtocolFeatures::REPLY_ACK.bits();
        self.knows_features && self.protocol & bit != 0
    }

    /// Whether a message has reached the session since this was last asked.
    pub(super) fn take_entered(&mut self) -> bool {
        std::mem::take(&mut self.entered)
    }

    pub(super) fn ring(&mut self, index: u32) -> Answer<(usize, &mut Ring)> {
        self.entered = true;
        let offered = self.rings.len();
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.rings.get_mut(index).map(|ring| (index, ring)).ok_or_else(|| {
            let why = format!("there are {offered} queues (--num-queues)");
            refuse(Error::refused(format!("queue {index}"), why))
        })
    }

    /// Whether a ring is to be served now.
    fn is_wanted(&self, ring: &Ring) -> bool {
        // A front-end that does not know about enabling means rings that are enabled at once.
        let enabled = self.features & PROTOCOL_FEATURES == 0 || ring.is_enabled();
        enabled && ring.is_described()
    }

    /// Whether rings wait for the workers.
    pub(super) fn is_waiting(&self) -> bool {
        self.rings.iter().any(|ring| !ring.running && self.is_wanted(ring))
    }

    /// Makes the workers agree with what is known of one ring.
    pub(super) fn settle(&mut self, index: usize) -> Answer<()> {
        let ring = &self.rings[index];
        match (self.is_wanted(ring), ring.running) {
            (true, false) => self.start(index),
            (false, true) => {
                self.stop(&[index]);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The same for all rings, after something that is not one ring's fault.
    pub(super) fn settle_all(&mut self) {
        for index in 0..self.rings.len() {
            // The reason is in the log, and the front-end is told by the ring's own descriptor.
            let _ = self.settle(index);
        }
    }

    fn start(&mut self, index: usize) -> Answer<()> {
        let event_idx = self.features & FEATURE_EVENT_IDX != 0;
        let has_flush = self.features & FEATURE_FLUSH != 0;
        let ring = &mut self.rings[index];
        let setup = ring.setup(&self.memory, event_idx, has_flush);
        let result = match setup.map_err(|error| error.within(format!("queue {index}"))) {
            // It waits: front-ends replace regions by removing and adding them.
            Ok(None) => {
                tracing::info!("queue {index} waits for its memory");
                return Ok(());
            }
            Ok(Some(mut setup)) => {
                setup.inflight = self.inflight.as_ref().and_then(|region| region.record(index));
                if self.hire().is_none() {
                    tracing::info!("queue {index} waits: another front-end's guest is served");
                    return Ok(());
                }
                self.take_over().and_then(|pool| pool.start(index, setup))
            }
            Err(error) => Err(error),
        };
        let ring = &mut self.rings[index];
        ring.running = result.is_ok();
        self.attached |= ring.running;
        if result.is_err() {
            ring.signal_error();
        }
        tracing::debug!("queue {index} is served from {}: {}", ring.base(), ring.running);
        result.map_err(refuse)
    }

    /// Drains rings; their bases then say where to go on.
    pub(super) fn stop(&mut self, indices: &[usize]) {
        let Some(pool) = &mut self.pool else { return };
        let bases = pool.stop(indices);
        for (index, base) in indices.iter().zip(bases) {
            let ring = &mut self.rings[*index];
            ring.set_base(base);
            ring.running = false;
            tracing::debug!("queue {index} is stopped at {base}");
        }
    }

    pub(super) fn stop_all(&mut self) {
        let running = |(index, ring): (usize, &Ring)| ring.running.then_some(index);
        let indices: Vec<usize> = self.rings.iter().enumerate().filter_map(running).collect();
        self.stop(&indices);
    }

    /// Changes a ring that may be served: it is drained, changed, and goes on.
    pub(super) fn change(&mut self, index: usize, change: impl FnOnce(&mut Ring)) -> Answer<()> {
        if self.rings[index].running {
            self.stop(&[index]);
        }
        change(&mut self.rings[index]);
        self.settle(index)
    }

    /// Takes another memory table into use. Rings are drained first: a region that goes must not be
    /// in use, and one that stays may have moved.
    pub(super) fn replace_memory(&mut self, memory: MemoryTable) {
        self.stop_all();
        self.memory = memory;
        self.update_memory();
        self.settle_all();
    }
}
