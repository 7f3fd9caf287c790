//! From vhost-user messages to orders for the workers.
//!
//! A ring is served while the front-end has described it in full, has enabled it, and its memory is
//! there. Every message changes a part of that picture and then `Session::settle` makes the
//! workers agree with it. A ring is always drained before it is given back: on GET_VRING_BASE,
//! SET_VRING_ENABLE 0, RESET_DEVICE, a change of memory, and the end of the connection.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as Refusal, Result as Answer};

use crate::blk::{FEATURE_EVENT_IDX, FEATURE_FLUSH};
use crate::error::Error;
use crate::vhost::memory::MemoryTable;
use crate::vhost::ring::Ring;
use crate::worker::pool::Pool;

/// The bit that says whether a front-end knows protocol features, and with them enabled rings.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What this back-end can do beyond the basic protocol.
pub(super) fn offered_protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
}

/// The device as seen by one front-end after the other.
pub struct Session {
    pub(super) pool: Pool,
    pub(super) rings: Vec<Ring>,
    pub(super) memory: MemoryTable,
    pub(super) features: u64,
    pub(super) protocol: u64,
    /// The front-end has asked for the features: acknowledgements depend on it.
    pub(super) knows_features: bool,
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
    /// A session that serves rings with the workers of `pool`.
    pub fn new(pool: Pool) -> Self {
        let settings = pool.device().settings();
        let rings = (0..settings.queues).map(|_| Ring::new(settings.queue_size)).collect();
        Self {
            pool,
            rings,
            memory: MemoryTable::default(),
            features: 0,
            protocol: 0,
            knows_features: false,
            entered: false,
        }
    }

    /// Ends the service of one front-end: drains every ring, forgets the guest's memory and all
    /// that was negotiated.
    pub fn disconnect(&mut self) {
        self.stop_all();
        self.pool.device().reset();
        let max_size = self.pool.device().settings().queue_size;
        self.rings.iter_mut().for_each(|ring| *ring = Ring::new(max_size));
        self.memory = MemoryTable::default();
        self.pool.set_memory(self.memory.memory());
        (self.features, self.protocol, self.knows_features) = (0, 0, false);
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
            Ok(Some(setup)) => self.pool.start(index, setup),
            Err(error) => Err(error),
        };
        let ring = &mut self.rings[index];
        ring.running = result.is_ok();
        if result.is_err() {
            ring.signal_error();
        }
        tracing::debug!("queue {index} is served from {}: {}", ring.base(), ring.running);
        result.map_err(refuse)
    }

    /// Drains rings; their bases then say where to go on.
    pub(super) fn stop(&mut self, indices: &[usize]) {
        let bases = self.pool.stop(indices);
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
        self.pool.set_memory(self.memory.memory());
        self.settle_all();
    }
}
