//! One split ring: popping chains, publishing what is done, and when to notify (virtio 1.2, 2.7).

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::num::Wrapping;
use std::rc::Rc;

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::blk::token::{Completions, Used};
use crate::sync::{Arc, Ordering, fence};
use crate::worker::dirty::{DirtyLog, RingLog};
use crate::worker::inflight::{Record, RecordError};
use crate::worker::replay;

/// Most chains taken from one ring in a turn, so that a busy queue does not keep others waiting.
const BATCH: usize = 64;

/// A ring as the session hands it to a worker.
#[derive(Debug)]
pub struct RingSetup {
    /// Size, guest addresses, where popping goes on, and whether EVENT_IDX was negotiated.
    pub state: QueueState,
    /// Readable when the guest has made chains available; without it the ring is polled.
    pub kick: Option<EventConsumer>,
    /// Signalled when chains are done with; without it the guest polls.
    pub call: Option<EventNotifier>,
    /// Signalled when the ring is broken.
    pub error: Option<File>,
    /// Whether the driver knows FLUSH; one that does not gets a disk without a write cache.
    pub has_flush: bool,
    /// Where to keep note of what is under way, for whoever serves the ring after a crash.
    pub inflight: Option<Record>,
}

/// Why a ring cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The front-end's idea of the ring is impossible.
    #[error("size, addresses or alignment of the ring are wrong: {0}")]
    Setup(virtio_queue::Error),
    /// A part of it is not in guest memory.
    #[error("the ring does not lie in guest memory")]
    OutsideMemory,
    /// The kick descriptor cannot be waited for.
    #[error("its kick descriptor cannot be watched: {0}")]
    Kick(std::io::Error),
    /// The driver has made more chains available than the ring has entries.
    #[error("the available ring is broken: {0}")]
    Available(virtio_queue::Error),
    /// The driver has made a descriptor available that does not exist.
    #[error("descriptor {head} was made available in a ring of {size}")]
    Head {
        /// The index.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// The record of what a predecessor had under way is not one of this ring.
    #[error("its in-flight region contradicts it: {0}; a reset of the device makes a new one")]
    Inflight(#[from] RecordError),
    /// Guest memory went away under the ring.
    #[error("the ring cannot be accessed: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A ring that a worker serves.
#[derive(Debug)]
pub struct Ring {
    /// The queue's number.
    pub(super) index: usize,
    /// Whether the driver knows FLUSH.
    pub(super) has_flush: bool,
    /// No more chains are taken; the ring goes when the last one is published.
    pub(super) stopping: bool,
    /// No more chains are taken, since the guest's side makes no sense.
    broken: bool,
    pub(super) kick: Option<EventConsumer>,
    call: Option<EventNotifier>,
    error: Option<File>,
    queue: Queue,
    pub(super) completions: Rc<Completions>,
    done: Vec<Used>,
    inflight: Option<Inflight>,
    /// While the guest migrates: what is written is marked there.
    log: Option<RingLog>,
}

/// What is kept for a successor, and what a predecessor has left.
#[derive(Debug)]
struct Inflight {
    record: Record,
    /// Heads to take again before any other.
    replay: VecDeque<u16>,
}

impl Ring {
    /// Takes a ring over; chains that are available already are not looked at yet.
    ///
    /// # Errors
    /// When it cannot be served as it is described.
    pub fn new(
        index: usize,
        setup: RingSetup,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, RingError> {
        let mut queue = Queue::try_from(setup.state).map_err(RingError::Setup)?;
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(RingError::OutsideMemory);
        }
        // The used ring goes on where whoever served it before has left it.
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(RingError::Setup)?;
        queue.set_next_used(used.0);
        let inflight = match setup.inflight {
            Some(record) => Some(recover(index, record, &mut queue, used.0, memory)?),
            None => None,
        };
        let mut ring = Self {
            index,
            has_flush: setup.has_flush,
            stopping: false,
            broken: false,
            kick: setup.kick,
            call: setup.call,
            error: setup.error,
            queue,
            completions: Rc::default(),
            done: Vec::new(),
            inflight,
            log: None,
        };
        ring.quieten(memory);
        // Somebody may have published chains without having been able to tell the guest.
        ring.signal();
        Ok(ring)
    }

    /// The next entry of the available ring that was not taken.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Whether every chain that was taken has been published.
    pub fn is_drained(&self) -> bool {
        self.completions.under_way() == 0 && self.completions.is_empty() && !self.is_replaying()
    }

    /// Whether chains are taken from it. Those that a predecessor had taken count as taken: they
    /// are finished even if the ring is to stop.
    pub fn is_open(&self) -> bool {
        !self.broken && (!self.stopping || self.is_replaying())
    }

    /// Whether somebody keeps note of what is under way: the guest then lives on when this process
    /// dies.
    pub fn outlives(&self) -> bool {
        self.inflight.is_some()
    }

    fn is_replaying(&self) -> bool {
        self.inflight.as_ref().is_some_and(|inflight| !inflight.replay.is_empty())
    }

    /// Whether what is written is marked in a log.
    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Replaces the descriptor that tells the guest, and signals it once: what was published just
    /// before may have been told to nobody.
    pub fn set_call(&mut self, call: Option<EventNotifier>) {
        self.call = call;
        self.signal();
    }

    /// Replaces the descriptor that tells the front-end of a broken ring.
    pub fn set_error(&mut self, error: Option<File>) {
        self.error = error;
    }

    /// Marks what is written from now on in a log, or in none. A ring that begins to log must be
    /// drained: of chains that were taken before nobody has remembered what they write. Its used
    /// ring is logged at `used`, or else where it lies.
    pub fn set_log(&mut self, log: Option<&Arc<DirtyLog>>, used: Option<u64>) {
        let used = used.unwrap_or(self.queue.used_ring());
        match (&mut self.log, log.cloned()) {
            (Some(own), Some(log)) => own.replace(log, used),
            (own, log) => {
                debug_assert!(log.is_none() || self.completions.under_way() == 0);
                *own = log.map(|log| RingLog::new(log, used, self.queue.size()));
                // A predecessor may have died between its last entries and their marks.
                if let Some(own) = own.as_ref().filter(|_| self.inflight.is_some()) {
                    own.mark_used(0, usize::from(self.queue.size()));
                }
            }
        }
        // The ring may have been quietened just before.
        self.log.iter().for_each(RingLog::mark_wish);
    }

    /// Whether there are chains that were not taken, be it again.
    ///
    /// # Errors
    /// When the ring is not in guest memory any more.
    pub fn has_available(&self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if self.is_replaying() {
            return Ok(true);
        }
        let index = self.queue.avail_idx(memory, Ordering::Acquire);
        Ok(index.map_err(RingError::Available)?.0 != self.queue.next_avail())
    }

    /// Takes up to `room` chains and gives each to `each`; returns how many. Everything about the
    /// ring that makes no sense breaks it for good: the front-end is told and no more is taken.
    pub fn pop(
        &mut self,
        memory: &GuestMemoryMmap,
        mut room: impl FnMut() -> bool,
        mut each: impl FnMut(DescriptorChain<&GuestMemoryMmap>, &Rc<Completions>),
    ) -> Result<usize, RingError> {
        if self.is_replaying() {
            return self.replay(memory, room, each);
        }
        let size = self.queue.size();
        let mut iter = self.queue.iter(memory).map_err(RingError::Available)?;
        let mut popped = 0;
        while popped < BATCH && room() {
            let Some(chain) = iter.next() else { break };
            let head = chain.head_index();
            if head >= size {
                return Err(RingError::Head { head, size });
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.record.take(head);
            }
            if let Some(log) = &mut self.log {
                log.take(&chain);
            }
            each(chain, &self.completions);
            popped += 1;
        }
        Ok(popped)
    }

    /// Takes chains that a predecessor had taken. They are marked already, and keep their place in
    /// the order until they are published.
    fn replay(
        &mut self,
        memory: &GuestMemoryMmap,
        mut room: impl FnMut() -> bool,
        mut each: impl FnMut(DescriptorChain<&GuestMemoryMmap>, &Rc<Completions>),
    ) -> Result<usize, RingError> {
        let Some(inflight) = &mut self.inflight else { return Ok(0) };
        let mut popped = 0;
        while room()
            && let Some(head) = inflight.replay.pop_front()
        {
            replay::chain(head, self.queue.state(), memory, |chain| {
                if let Some(log) = &mut self.log {
                    log.take(&chain);
                }
                each(chain, &self.completions);
            })?;
            popped += 1;
        }
        Ok(popped)
    }

    /// Marks the ring as broken and tells the front-end; what was taken is still answered.
    pub fn fail(&mut self, why: &RingError) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        tracing::error!("queue {}: {why}; it is not served any more", self.index);
        // What was not taken again stays in the record.
        if let Some(inflight) = &mut self.inflight {
            inflight.replay.clear();
        }
        if let Some(error) = &mut self.error {
            signal_file(error);
        }
    }

    /// Puts everything that is done with on the used ring, then decides once whether the guest is
    /// told. Returns how many chains it was.
    ///
    /// # Errors
    /// When the ring is not in guest memory any more.
    pub fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<usize, RingError> {
        self.completions.take(&mut self.done);
        let count = self.done.len();
        if count == 0 {
            return Ok(0);
        }
        let result = self.put_used(memory);
        self.done.clear();
        result.map(|()| count)
    }

    fn put_used(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        if let Some(log) = &mut self.log {
            log.mark_done(&self.done);
        }
        let old = Wrapping(self.queue.next_used());
        let mut new = old;
        for used in &self.done {
            let slot = u64::from(new.0 % self.queue.size());
            // The index and then the length, each a little-endian word.
            let element = u64::from(used.len) << 32 | u64::from(used.head);
            memory.write_obj(element.to_le(), self.used(4 + slot * 8))?;
            new += 1;
        }
        if let Some(inflight) = &self.inflight {
            inflight.record.link(&self.done);
        }
        memory.store(new.0.to_le(), self.used(2), Ordering::Release)?;
        self.queue.set_next_used(new.0);
        if let Some(inflight) = &self.inflight {
            inflight.record.finish(&self.done, new.0);
        }
        if let Some(log) = &self.log {
            log.mark_used(old.0, self.done.len());
        }
        if self.wants_notification(memory, old, new)? {
            self.signal();
        }
        Ok(())
    }

    /// Whether the guest wants to be told that the used ring went from `old` to `new` (2.7.7).
    fn wants_notification(
        &self,
        memory: &GuestMemoryMmap,
        old: Wrapping<u16>,
        new: Wrapping<u16>,
    ) -> Result<bool, RingError> {
        // The used index must be visible before the guest's wish is read: a guest that changes its
        // wish looks at the index afterwards.
        fence(Ordering::SeqCst);
        let available = |offset| GuestAddress(self.queue.avail_ring().wrapping_add(offset));
        if self.queue.event_idx_enabled() {
            let at = available(4 + 2 * u64::from(self.queue.size()));
            let event = Wrapping(u16::from_le(memory.load(at, Ordering::Relaxed)?));
            return Ok(new - event - Wrapping(1) < new - old);
        }
        let flags = u16::from_le(memory.load(available(0), Ordering::Relaxed)?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks for a kick with the next chain. Returns whether there is one already, which nobody will
    /// kick for.
    ///
    /// # Errors
    /// When the ring is not in guest memory any more.
    pub fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if self.is_replaying() {
            return Ok(true);
        }
        let available = self.queue.enable_notification(memory).map_err(RingError::Available);
        self.log.iter().for_each(RingLog::mark_wish);
        available
    }

    /// Asks for no kicks while the worker is awake. With EVENT_IDX there are none as it is, because
    /// the entry that was asked for lies behind.
    pub fn quieten(&mut self, memory: &GuestMemoryMmap) {
        if !self.queue.event_idx_enabled() {
            let flags = (VRING_USED_F_NO_NOTIFY as u16).to_le();
            // It is a hint; a ring that went away is found out where it matters.
            let _ = memory.store(flags, self.used(0), Ordering::Relaxed);
            self.log.iter().for_each(RingLog::mark_wish);
        }
    }

    fn used(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.queue.used_ring().wrapping_add(offset))
    }

    fn signal(&self) {
        if let Some(call) = &self.call
            && let Err(error) = call.notify()
        {
            tracing::debug!("queue {}: the guest cannot be told: {error}", self.index);
        }
    }
}

/// Puts a record in order and makes the ring go on where it says.
fn recover(
    index: usize,
    mut record: Record,
    queue: &mut Queue,
    used: u16,
    memory: &GuestMemoryMmap,
) -> Result<Inflight, RingError> {
    let available = queue.avail_idx(memory, Ordering::Acquire).map_err(RingError::Setup)?;
    let recovered = record.recover(queue.size(), used, available.0)?;
    let replay = recovered.replay;
    if !replay.is_empty() {
        let count = replay.len();
        tracing::info!("queue {index}: {count} requests of a predecessor are taken up again");
    }
    queue.set_next_avail(recovered.next_available);
    Ok(Inflight { record, replay })
}

/// Adds one to an eventfd that came as a file.
pub fn signal_file(file: &mut File) {
    // A front-end that does not take it has stopped listening.
    let _ = file.write_all(&1u64.to_ne_bytes());
}
