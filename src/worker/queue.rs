//! One split ring: popping chains, publishing what is done, and when to notify (virtio 1.2, 2.7).

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::rc::Rc;

use virtio_queue::QueueState;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::blk::chain::Chain;
use crate::blk::memory::Finder;
use crate::blk::token::{Completions, Used};
use crate::sync::{Arc, Ordering};
use crate::worker::dirty::{DirtyLog, RingLog};
use crate::worker::inflight::{Record, RecordError};
use crate::worker::split::Split;

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
    #[error("{waiting} chains were made available in a ring of {size}")]
    Available {
        /// How many chains wait by the available index.
        waiting: u16,
        /// The ring's size.
        size: u16,
    },
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
    split: Split,
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
        let mut split = Split::new(setup.state, memory)?;
        let memory = Finder::new(memory);
        let inflight = match setup.inflight {
            Some(record) => Some(recover(index, record, &mut split, &memory)?),
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
            split,
            completions: Rc::default(),
            done: Vec::new(),
            inflight,
            log: None,
        };
        ring.quieten(&memory);
        // Somebody may have published chains without having been able to tell the guest.
        ring.signal();
        Ok(ring)
    }

    /// The next entry of the available ring that was not taken.
    pub fn next_available(&self) -> u16 {
        self.split.next_available
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
        let used = used.unwrap_or(self.split.used_at());
        match (&mut self.log, log.cloned()) {
            (Some(own), Some(log)) => own.replace(log, used),
            (own, log) => {
                debug_assert!(log.is_none() || self.completions.under_way() == 0);
                *own = log.map(|log| RingLog::new(log, used, self.split.size()));
                // A predecessor may have died between its last entries and their marks.
                if let Some(own) = own.as_ref().filter(|_| self.inflight.is_some()) {
                    own.mark_used(0, usize::from(self.split.size()));
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
    pub fn has_available(&self, memory: &Finder<'_>) -> Result<bool, RingError> {
        if self.is_replaying() {
            return Ok(true);
        }
        let index = self.split.available(memory).index(Ordering::Acquire)?;
        Ok(index != self.split.next_available)
    }

    /// Takes up to `room` chains and gives each to `each`; returns how many. Everything about the
    /// ring that makes no sense breaks it for good: the front-end is told and no more is taken.
    pub fn pop<'a>(
        &mut self,
        memory: &'a Finder<'a>,
        mut room: impl FnMut() -> bool,
        mut each: impl FnMut(Chain<'a>, &Rc<Completions>),
    ) -> Result<usize, RingError> {
        if self.is_replaying() {
            return Ok(self.replay(memory, room, each));
        }
        let (available, size) = (self.split.available(memory), self.split.size());
        // Entries up to the index are read after it.
        let index = available.index(Ordering::Acquire)?;
        let waiting = index.wrapping_sub(self.split.next_available);
        if waiting == 0 {
            return Ok(0);
        }
        if waiting > size {
            return Err(RingError::Available { waiting, size });
        }
        let table = self.split.table(memory);
        let mut popped = 0;
        while popped < BATCH && self.split.next_available != index && room() {
            let head = available.head(self.split.next_available)?;
            self.split.next_available = self.split.next_available.wrapping_add(1);
            if head >= size {
                return Err(RingError::Head { head, size });
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.record.take(head);
            }
            let chain = Chain::new(memory, table, size, head);
            if let Some(log) = &mut self.log {
                log.take(&chain);
            }
            each(chain, &self.completions);
            popped += 1;
        }
        Ok(popped)
    }

    /// Takes chains that a predecessor had taken, by their heads: the entry of the available ring
    /// that named one may have been used again meanwhile. They are marked already, and keep their
    /// place in the order until they are published.
    fn replay<'a>(
        &mut self,
        memory: &'a Finder<'a>,
        mut room: impl FnMut() -> bool,
        mut each: impl FnMut(Chain<'a>, &Rc<Completions>),
    ) -> usize {
        let Some(inflight) = &mut self.inflight else { return 0 };
        let (table, size) = (self.split.table(memory), self.split.size());
        let mut popped = 0;
        while room()
            && let Some(head) = inflight.replay.pop_front()
        {
            let chain = Chain::new(memory, table, size, head);
            if let Some(log) = &mut self.log {
                log.take(&chain);
            }
            each(chain, &self.completions);
            popped += 1;
        }
        popped
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
    pub fn publish(&mut self, memory: &Finder<'_>) -> Result<usize, RingError> {
        self.completions.take(&mut self.done);
        let count = self.done.len();
        if count == 0 {
            return Ok(0);
        }
        let result = self.put_used(memory);
        self.done.clear();
        result.map(|()| count)
    }

    fn put_used(&mut self, memory: &Finder<'_>) -> Result<(), RingError> {
        if let Some(log) = &mut self.log {
            log.mark_done(&self.done);
        }
        let (ring, old) = (self.split.used(memory), self.split.next_used);
        let mut new = old;
        for used in &self.done {
            ring.put(new, *used)?;
            new = new.wrapping_add(1);
        }
        if let Some(inflight) = &self.inflight {
            inflight.record.link(&self.done);
        }
        ring.set_index(new)?;
        self.split.next_used = new;
        if let Some(inflight) = &self.inflight {
            inflight.record.finish(&self.done, new);
        }
        if let Some(log) = &self.log {
            log.mark_used(old, self.done.len());
        }
        if self.split.wants_notification(memory, old, new)? {
            self.signal();
        }
        Ok(())
    }

    /// Asks for a kick with the next chain. Returns whether there is one already, which nobody will
    /// kick for.
    ///
    /// # Errors
    /// When the ring is not in guest memory any more.
    pub fn arm(&mut self, memory: &Finder<'_>) -> Result<bool, RingError> {
        if self.is_replaying() {
            return Ok(true);
        }
        let available = self.split.arm(memory);
        self.log.iter().for_each(RingLog::mark_wish);
        Ok(available?)
    }

    /// Asks for no kicks while the worker is awake.
    pub fn quieten(&mut self, memory: &Finder<'_>) {
        if self.split.quieten(memory) {
            self.log.iter().for_each(RingLog::mark_wish);
        }
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
    split: &mut Split,
    memory: &Finder<'_>,
) -> Result<Inflight, RingError> {
    let available = split.available(memory).index(Ordering::Acquire)?;
    let recovered = record.recover(split.size(), split.next_used, available)?;
    let replay = recovered.replay;
    if !replay.is_empty() {
        let count = replay.len();
        tracing::info!("queue {index}: {count} requests of a predecessor are taken up again");
    }
    split.next_available = recovered.next_available;
    Ok(Inflight { record, replay })
}

/// Adds one to an eventfd that came as a file.
pub fn signal_file(file: &mut File) {
    // A front-end that does not take it has stopped listening.
    let _ = file.write_all(&1u64.to_ne_bytes());
}
