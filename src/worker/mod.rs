//! One thread's share of the queues: rings, tasks and a way to the files.
//!
//! [`Worker::turn`] does everything that can be done without waiting, and is what a simulator calls
//! too; [`mailbox`] has the thread around it, which sleeps between turns and takes orders from the
//! session. The worker alone owns the state of its rings. Stopping a ring means: take no more
//! chains, finish those that were taken, publish them, then answer. Nothing is ever cancelled.

pub mod dirty;
pub mod inflight;
pub mod mailbox;
pub mod poller;
pub mod pool;
pub mod queue;
pub mod spin;
mod split;
mod throttle;

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use vm_memory::{GuestMemoryMmap, MmapRegion};

use crate::blk::Device;
use crate::blk::limit::{Admission, Seat};
use crate::blk::memory::Finder;
use crate::blk::request::{Request, Rules, parse};
use crate::blk::serve::{Context, serve};
use crate::blk::stats::Totals;
use crate::blk::token::{Token, Used};
use crate::exec::TaskSet;
use crate::storage::Engine;
use crate::sync::Arc;
use crate::worker::dirty::Logging;
use crate::worker::queue::{Ring, RingError, RingSetup};

/// Most requests under way in one worker. More than any ring that a front-end sets up by default;
/// longer rings wait in guest memory.
pub const TASKS: usize = 256;

/// How many tasks are polled at most before what they have done is published. A guest that keeps
/// some thirty requests under way is back with the first of them before the last are done: told of
/// half at a time it was late where waking it takes tens of microseconds, and we waited for it.
const PORTION_TASKS: u32 = 8;
/// After how many bytes, though the tasks be fewer. They count when a request begins, which is when
/// it ends if the page cache has them.
const PORTION_BYTES: u64 = 512 << 10;

/// The guest's memory, and the mappings it is part of.
#[derive(Debug, Default)]
pub struct GuestMemory {
    map: GuestMemoryMmap,
    /// Larger mappings that regions of the map lie in.
    _mappings: Vec<Arc<MmapRegion>>,
}

impl GuestMemory {
    /// Memory that stays mapped as long as this lives.
    pub fn new(map: GuestMemoryMmap, mappings: Vec<Arc<MmapRegion>>) -> Self {
        Self { map, _mappings: mappings }
    }

    /// The regions by guest address.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }
}

/// What one turn has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Operations on files that have finished.
    pub reaped: usize,
    /// Chains taken from rings.
    pub popped: usize,
    /// Tasks that ran.
    pub polled: usize,
    /// Chains put on used rings.
    pub published: usize,
}

impl Progress {
    /// Whether anything was done; if not, the next turn would do nothing either.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// One queue as its worker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueReport {
    /// The queue's number.
    pub index: usize,
    /// Requests that were taken and are not answered.
    pub under_way: usize,
    /// How long ago the oldest of them was taken, in nanoseconds.
    pub oldest_ns: Option<u64>,
}

/// What a worker has done so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Its counters.
    pub totals: Totals,
    /// The queues it serves now.
    pub queues: Vec<QueueReport>,
}

/// A ring that was stopped.
#[derive(Debug)]
pub struct Stopped {
    /// The queue's number.
    pub index: usize,
    /// The first entry of the available ring that was not taken.
    pub next_available: u16,
    /// The ring, for whoever watches its kick descriptor.
    pub ring: Ring,
}

/// The owner of some queues. `F` is the one future type that serves a request.
pub struct Worker<F> {
    context: Rc<Context>,
    serve: fn(Rc<Context>, Request, Token) -> F,
    tasks: TaskSet<F>,
    rings: Vec<Ring>,
    memory: Arc<GuestMemory>,
    /// Where writes to the guest's memory are logged.
    logging: Option<Arc<Logging>>,
    /// What a buffer in guest memory holds on to.
    keep: Rc<dyn Any>,
    /// Which ring is looked at first; it moves on with each turn.
    first: usize,
    /// The kernel took no operations when they were handed over last; they wait.
    refused: bool,
    /// Where this worker stands when rates are limited.
    seat: Seat,
}

impl<F> fmt::Debug for Worker<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("rings", &self.rings).finish_non_exhaustive()
    }
}

/// A worker with at most `tasks` requests under way; `unpark` ends its sleep and may be called on
/// any thread.
pub fn worker(
    context: Rc<Context>,
    tasks: usize,
    unpark: impl Fn() + Send + Sync + 'static,
) -> Worker<impl Future<Output = ()>> {
    let memory = Arc::new(GuestMemory::default());
    let unpark = Arc::new(unpark);
    let seat = context.device.limiter().seat(unpark.clone());
    Worker {
        context,
        serve,
        tasks: TaskSet::new(tasks, move || unpark()),
        rings: Vec::new(),
        keep: Rc::new(Arc::clone(&memory)),
        memory,
        logging: None,
        first: 0,
        refused: false,
        seat,
    }
}

impl<F: Future<Output = ()>> Worker<F> {
    /// What the worker's requests use.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The worker's way to the files.
    pub fn storage(&self) -> &dyn Engine {
        &*self.context.storage
    }

    /// Whether no request is under way.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_idle()
    }

    /// Replaces the guest's memory. Requests under way keep the old mapping; rings that are served
    /// must lie in both.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        self.keep = Rc::new(Arc::clone(&memory));
        self.memory = memory;
    }

    /// Logs writes to the guest's memory from now on, elsewhere, or no longer. To begin, all rings
    /// must be drained.
    pub fn set_logging(&mut self, logging: Option<Arc<Logging>>) {
        self.logging = logging;
        let logging = self.logging.as_deref();
        self.rings.iter_mut().for_each(|ring| log_to(logging, ring));
    }

    /// Whether writes to the guest's memory are logged.
    pub fn is_logging(&self) -> bool {
        self.logging.is_some()
    }

    /// Serves another device from now on, or the same one with another image.
    ///
    /// # Panics
    /// When a request is under way: all rings must have been stopped.
    pub fn set_device(&mut self, device: Arc<Device>) {
        let context = Rc::get_mut(&mut self.context);
        context.expect("no request is under way").device = device;
    }

    /// What the worker has done, and what is under way.
    pub fn report(&self) -> Report {
        self.context.clock.tick();
        let now = self.context.clock.now_ns();
        let queue = |ring: &Ring| QueueReport {
            index: ring.index,
            under_way: ring.completions.under_way(),
            oldest_ns: ring.completions.oldest().map(|began| now.saturating_sub(began)),
        };
        let queues = self.rings.iter().map(queue).collect();
        Report { totals: self.context.stats.totals(), queues }
    }

    /// Begins to serve a ring.
    ///
    /// # Errors
    /// When it cannot be served as it is described.
    pub fn start(&mut self, index: usize, setup: RingSetup) -> Result<&Ring, RingError> {
        let mut ring = Ring::new(index, setup, self.memory.map())?;
        log_to(self.logging.as_deref(), &mut ring);
        self.rings.push(ring);
        Ok(self.rings.last().expect("it was pushed just now"))
    }

    /// Takes no more chains from a ring; [`Worker::take_stopped`] has it once it is drained.
    pub fn stop(&mut self, index: usize) {
        if let Some(ring) = self.ring(index) {
            ring.stopping = true;
        }
    }

    /// The ring of that number, if it is served.
    pub fn ring(&mut self, index: usize) -> Option<&mut Ring> {
        self.rings.iter_mut().find(|ring| ring.index == index)
    }

    /// Gives back a ring that was stopped and is drained.
    pub fn take_stopped(&mut self) -> Option<Stopped> {
        let done = |ring: &Ring| ring.stopping && ring.is_drained();
        let place = self.rings.iter().position(done)?;
        let ring = self.rings.swap_remove(place);
        Some(Stopped { index: ring.index, next_available: ring.next_available(), ring })
    }

    /// Whether somebody must look now and then, because nothing will end the sleep: a ring has no
    /// kick descriptor, or operations must be handed to the kernel again.
    pub fn needs_polling(&self) -> bool {
        self.refused || self.rings.iter().any(|ring| ring.kick.is_none())
    }

    /// Does everything that can be done without waiting. When nothing was done, the caller may
    /// sleep as [`Worker::park`] says.
    pub fn turn(&mut self) -> Progress {
        let mut progress = Progress { reaped: self.storage().reap(), ..Progress::default() };
        progress.popped = if self.seat.is_free() { self.pop(None) } else { self.pop_limited() };
        if progress.reaped != 0 || progress.popped != 0 {
            self.context.clock.tick();
        }
        progress.polled = self.run_tasks(&mut progress.published);
        progress.published += self.publish();
        // Whoever was answered just now may come back at once.
        let idle = progress.published == 0 && !self.tasks.has_ready();
        let storage = self.storage();
        let submitted = if idle { storage.submit_and_rest() } else { storage.submit_all() };
        self.refused = submitted.is_err();
        if let Err(error) = submitted {
            self.context.complaints.warn("the kernel takes no operations", error);
        }
        progress
    }

    /// Takes chains from the rings; `limit` has what their rates allow, if those are limited.
    fn pop(&mut self, limit: Option<Admission<'_>>) -> usize {
        let limit = limit.map(RefCell::new);
        let is_open = || limit.as_ref().is_none_or(|limit| limit.borrow().is_open());
        let image = self.context.device.image();
        let write_back = self.context.device.is_write_back();
        let mut rules = Rules {
            size: image.size(),
            read_only: image.is_read_only(),
            write_through: false,
            outlives: false,
        };
        let memory = Finder::new(self.memory.map());
        let count = self.rings.len();
        self.first = self.first.wrapping_add(1);
        let mut popped = 0;
        for turn in 0..count {
            let ring = &mut self.rings[self.first.wrapping_add(turn) % count];
            if !ring.is_open() || !self.tasks.has_room() || !is_open() {
                continue;
            }
            rules.write_through = !(write_back && ring.has_flush);
            rules.outlives = ring.outlives();
            let tasks = RefCell::new(&mut self.tasks);
            let result = ring.pop(
                &memory,
                || tasks.borrow().has_room() && is_open(),
                |chain, completions| {
                    let head = chain.head();
                    let parsed = parse(chain, &self.keep, &rules);
                    if let Some(limit) = &limit {
                        limit.borrow_mut().charge(&parsed.request.action);
                    }
                    let used = Used { head, len: parsed.writable };
                    let token = Token::new(completions, used, parsed.status);
                    let context = Rc::clone(&self.context);
                    tasks.borrow_mut().spawn((self.serve)(context, parsed.request, token));
                },
            );
            match result {
                Ok(count) => popped += count,
                Err(why) => ring.fail(&why),
            }
        }
        popped
    }

    /// Polls the tasks that are ready, and publishes now and then: a guest that waits for all of a
    /// long turn would have nothing to do meanwhile, and then we would wait for the guest.
    fn run_tasks(&mut self, published: &mut usize) -> usize {
        let (rings, memory) = (&mut self.rings, Finder::new(self.memory.map()));
        let (mut since, stats) = (Portion::default(), &self.context.stats);
        let mut before = stats.bytes();
        self.tasks.run_ready_then(|| {
            let bytes = stats.bytes();
            if since.add(bytes.wrapping_sub(before)) {
                *published += publish(rings, &memory);
            }
            before = bytes;
        })
    }

    fn publish(&mut self) -> usize {
        publish(&mut self.rings, &Finder::new(self.memory.map()))
    }

    /// Prepares for sleep and returns whether the worker may: no task is ready and no ring has
    /// chains that could be taken. Whatever happens later ends the sleep: the guest kicks, an
    /// operation finishes, or a waker calls `unpark`. [`Worker::unpark`] must follow.
    pub fn park(&mut self) -> bool {
        self.tasks.ready().park();
        if self.tasks.has_ready() {
            return false;
        }
        // Without room or tokens no chain can be taken, so no kick is wanted either.
        if !self.tasks.has_room() || self.seat.waits() {
            return true;
        }
        let (mut quiet, memory) = (true, Finder::new(self.memory.map()));
        for ring in self.rings.iter_mut().filter(|ring| ring.is_open()) {
            match ring.arm(&memory) {
                Ok(available) => quiet &= !available,
                Err(why) => ring.fail(&why),
            }
        }
        quiet
    }

    /// Says that the worker is awake.
    pub fn unpark(&mut self) {
        self.tasks.ready().unparked();
        let memory = Finder::new(self.memory.map());
        for ring in self.rings.iter_mut().filter(|ring| ring.is_open()) {
            ring.quieten(&memory);
        }
    }
}

/// Publishes what is done with on all rings; returns how many chains that were.
fn publish(rings: &mut [Ring], memory: &Finder<'_>) -> usize {
    let mut published = 0;
    for ring in rings {
        match ring.publish(memory) {
            Ok(count) => published += count,
            Err(why) => ring.fail(&why),
        }
    }
    published
}

/// How much was done since the last publication.
#[derive(Debug, Default)]
struct Portion {
    tasks: u32,
    bytes: u64,
}

impl Portion {
    /// Adds a task that was polled and what it moved; whether that is enough to be published.
    fn add(&mut self, bytes: u64) -> bool {
        self.tasks += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        let enough = self.tasks >= PORTION_TASKS || self.bytes >= PORTION_BYTES;
        if enough {
            *self = Self::default();
        }
        enough
    }
}

fn log_to(logging: Option<&Logging>, ring: &mut Ring) {
    let used = logging.and_then(|logging| *logging.used.get(ring.index)?);
    ring.set_log(logging.map(|logging| &logging.log), used);
}

impl<F> Drop for Worker<F> {
    fn drop(&mut self) {
        // The thread drains its rings before it goes. A simulated power cut does not.
        self.rings.iter().for_each(|ring| ring.completions.abandon());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portion_is_so_many_tasks_or_so_many_bytes() {
        let mut portion = Portion::default();
        let published = (0..4 * PORTION_TASKS).filter(|_| portion.add(4096)).count();
        assert_eq!(published, 4);
        assert!(portion.add(PORTION_BYTES), "one that is large");
        assert!(!portion.add(PORTION_BYTES - 1));
        assert!(portion.add(1));
        assert!(!portion.add(0) && portion.add(u64::MAX), "however large");
    }
}
