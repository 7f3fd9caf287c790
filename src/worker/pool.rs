//! The workers' threads, from outside: started when the first of their queues is.

use std::fmt;
use std::fs::File;
use std::num::NonZero;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::event::EventNotifier;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::blk::Device;
use crate::blk::serve::Context;
use crate::error::{Error, Result};
use crate::qcow2::journal::SharedWords;
use crate::storage::Engine;
use crate::sync::Arc;
use crate::worker::dirty::Logging;
use crate::worker::mailbox::{self, Command};
use crate::worker::queue::{RingError, RingSetup};
use crate::worker::spin::{Places, Spin};
use crate::worker::{GuestMemory, Report};

/// Makes the engine of one worker, on that worker's thread; the argument is its lane.
pub type EngineSource = Arc<dyn Fn(usize) -> Result<Box<dyn Engine>> + Send + Sync>;

/// All workers of a device. Queues are dealt out to them in turn.
pub struct Pool {
    device: Arc<Device>,
    engines: EngineSource,
    memory: Arc<GuestMemory>,
    logging: Option<Arc<Logging>>,
    workers: Vec<Option<Handle>>,
    /// How long a worker looks for a request before it sleeps.
    poll: Duration,
    /// Where workers that look take their places.
    places: Arc<Places>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running = self.workers.iter().flatten().count();
        write!(f, "Pool({running} of {} workers run)", self.workers.len())
    }
}

/// One worker's thread.
struct Handle {
    commands: Sender<Command>,
    mailbox: EventFd,
    thread: JoinHandle<()>,
}

impl Handle {
    fn send(&self, command: Command) {
        // A worker that panics takes the process along, so somebody is there to read this.
        let _ = self.commands.send(command);
        let _ = self.mailbox.write(1);
    }

    /// Sends an order; the answer comes some time later.
    fn ask<T>(&self, order: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (reply, answer) = mpsc::channel();
        self.send(order(reply));
        answer
    }
}

impl Pool {
    /// A pool of at most `threads` workers, none of which runs yet. They sleep whenever there is
    /// nothing to do; [`Pool::polling`] changes that.
    pub fn new(device: Arc<Device>, engines: EngineSource, threads: usize) -> Self {
        let workers = (0..threads.max(1)).map(|_| None).collect();
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            device,
            engines,
            memory: Arc::default(),
            logging: None,
            workers,
            poll: Duration::ZERO,
            places: Arc::new(Places::new(processors / 2)),
        }
    }

    /// Lets workers that start from now on look for requests so long before they sleep.
    #[must_use]
    pub fn polling(mut self, window: Duration) -> Self {
        self.poll = window;
        self
    }

    /// The device that the workers serve.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Serves a ring; starts its worker's thread if this is the first.
    ///
    /// # Errors
    /// When the ring makes no sense or the worker cannot be started.
    pub fn start(&mut self, index: usize, setup: RingSetup) -> Result<()> {
        let context = || format!("queue {index}");
        let place = index % self.workers.len();
        let handle = self.hire(place).map_err(|error| error.within(context()))?;
        let setup = Box::new(setup);
        let answer = handle.ask(|reply| Command::Start { index, setup, reply });
        let started: Result<(), RingError> = answer.recv().expect("a worker answers");
        started.map_err(|error| Error::refused(context(), error.to_string()))
    }

    /// The worker of that number, whose thread is started if need be.
    fn hire(&mut self, place: usize) -> Result<&Handle> {
        if self.workers[place].is_none() {
            self.workers[place] = Some(self.spawn(place)?);
            self.set_memory_of(place);
            self.set_logging_of(place);
        }
        Ok(self.workers[place].as_ref().expect("it was started just now"))
    }

    /// Takes the image over from a process that may have died, and notes changes of its mapping in
    /// `words` from now on ([`crate::image::Image::attach_journal`]). No ring is served.
    ///
    /// # Errors
    /// When a worker cannot be started; else what the image says.
    pub fn attach(&mut self, words: Arc<dyn SharedWords>) -> Result<usize> {
        let answer = self.hire(0)?.ask(|reply| Command::Attach { words, reply });
        answer.recv().expect("a worker answers")
    }

    /// Flushes the image and notes no changes any more. No ring is served.
    ///
    /// # Errors
    /// What the image says.
    pub fn detach(&mut self) -> Result<()> {
        let answer = self.hire(0)?.ask(|reply| Command::Detach { reply });
        answer.recv().expect("a worker answers")
    }

    /// Starts the first `count` workers' threads before they are needed.
    ///
    /// # Errors
    /// When one of them cannot be started.
    pub fn warm(&mut self, count: usize) -> Result<()> {
        (0..count.min(self.workers.len())).try_for_each(|place| self.hire(place).map(drop))
    }

    /// How many workers' threads run.
    pub fn running(&self) -> usize {
        self.workers.iter().flatten().count()
    }

    /// Stops rings and waits until everything taken from them was published. Gives for each the
    /// first entry of its available ring that was not taken.
    pub fn stop(&mut self, indices: &[usize]) -> Vec<u16> {
        let ask = |index: &usize| {
            let order = |reply| Command::Stop { index: *index, reply };
            self.worker(*index).expect("a running ring has a worker").ask(order)
        };
        // All of them drain at the same time.
        let answers: Vec<Receiver<u16>> = indices.iter().map(ask).collect();
        answers.into_iter().map(|answer| answer.recv().expect("a worker answers")).collect()
    }

    /// Replaces the descriptor that tells the guest of a running ring.
    pub fn set_call(&self, index: usize, call: Option<EventNotifier>) {
        if let Some(worker) = self.worker(index) {
            let done = worker.ask(|reply| Command::SetCall { index, call, reply });
            done.recv().expect("a worker answers");
        }
    }

    /// Replaces the descriptor that tells the front-end of a broken ring.
    pub fn set_error(&self, index: usize, error: Option<File>) {
        if let Some(worker) = self.worker(index) {
            let done = worker.ask(|reply| Command::SetError { index, error, reply });
            done.recv().expect("a worker answers");
        }
    }

    /// Gives all workers other guest memory; returns when none uses the old one for new requests.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        self.memory = memory;
        (0..self.workers.len()).for_each(|place| self.set_memory_of(place));
    }

    fn set_memory_of(&self, place: usize) {
        if let Some(worker) = &self.workers[place] {
            let memory = Arc::clone(&self.memory);
            let done = worker.ask(|reply| Command::SetMemory { memory, reply });
            done.recv().expect("a worker answers");
        }
    }

    /// Lets all workers log their writes to the guest's memory, elsewhere, or no longer; returns
    /// when none uses the old log. To begin, all rings must be stopped.
    pub fn set_logging(&mut self, logging: Option<Arc<Logging>>) {
        self.logging = logging;
        (0..self.workers.len()).for_each(|place| self.set_logging_of(place));
    }

    /// What the workers log to.
    pub fn logging(&self) -> Option<&Arc<Logging>> {
        self.logging.as_ref()
    }

    fn set_logging_of(&self, place: usize) {
        if let Some(worker) = &self.workers[place] {
            let logging = self.logging.clone();
            let done = worker.ask(|reply| Command::SetLogging { logging, reply });
            done.recv().expect("a worker answers");
        }
    }

    /// Gives all workers another device, or the same one with another image; returns when none
    /// holds the old one. No ring is served meanwhile.
    pub fn set_device(&mut self, device: Arc<Device>) {
        self.device = device;
        for worker in self.workers.iter().flatten() {
            let device = Arc::clone(&self.device);
            let done = worker.ask(|reply| Command::SetDevice { device, reply });
            done.recv().expect("a worker answers");
        }
    }

    /// What the workers that run have done, by their number.
    pub fn report(&self) -> Vec<(usize, Report)> {
        let ask = |(place, worker): (usize, &Option<Handle>)| {
            let worker = worker.as_ref()?;
            Some((place, worker.ask(|reply| Command::Report { reply })))
        };
        // All of them look at the same time.
        let answers: Vec<_> = self.workers.iter().enumerate().filter_map(ask).collect();
        let take = |(place, answer): (usize, Receiver<Report>)| {
            (place, answer.recv().expect("a worker answers"))
        };
        answers.into_iter().map(take).collect()
    }

    fn worker(&self, index: usize) -> Option<&Handle> {
        self.workers[index % self.workers.len()].as_ref()
    }

    fn spawn(&self, place: usize) -> Result<Handle> {
        let failed = |error| Error::io("cannot start a worker", error);
        let mailbox = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
        let bell = mailbox.try_clone().map_err(failed)?;
        let (commands, orders) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let (device, engines) = (Arc::clone(&self.device), Arc::clone(&self.engines));
        let spin = Spin::new(self.poll, Arc::clone(&self.places));
        let body = move || {
            let _guard = AbortOnPanic;
            // Lane 0 is the control thread's, which opens and closes the image.
            let engine = match engines(place + 1) {
                Ok(engine) => engine,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let context = Rc::new(Context::new(device, Rc::from(engine)));
            let tell = ready.clone();
            let started = move || {
                let _ = tell.send(Ok(()));
            };
            if let Err(error) = mailbox::run(context, orders, bell, spin, started) {
                let _ = ready.send(Err(failed(error)));
            }
        };
        let name = format!("worker {place}");
        let thread = thread::Builder::new().name(name).spawn(body).map_err(failed)?;
        started.recv().expect("a worker says how it starts")?;
        Ok(Handle { commands, mailbox, thread })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for handle in self.workers.iter_mut().filter_map(Option::take) {
            handle.send(Command::Exit);
            // A worker that panicked has ended the process.
            let _ = handle.thread.join();
        }
    }
}

/// A worker that dies would leave the guest waiting for ever, and perhaps the image in a state that
/// nobody has thought of. A process that dies is restarted.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("a worker has panicked, which is a defect of this program");
            std::process::abort();
        }
    }
}
