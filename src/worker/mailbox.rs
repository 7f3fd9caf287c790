//! The thread around a worker: it sleeps in epoll on kicks, the engine and its mailbox.

use std::fs::File;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use vmm_sys_util::event::EventNotifier;
use vmm_sys_util::eventfd::EventFd;

use crate::blk::Device;
use crate::blk::serve::Context;
use crate::error::Result as Outcome;
use crate::qcow2::journal::SharedWords;
use crate::storage::{block_on, switches};
use crate::sync::Arc;
use crate::worker::dirty::Logging;
use crate::worker::poller::{Poller, Trigger};
use crate::worker::queue::{RingError, RingSetup};
use crate::worker::spin::Spin;
use crate::worker::{GuestMemory, Report, TASKS, Worker, worker};

/// How long a worker that nothing would wake sleeps at most, in milliseconds.
const POLL_INTERVAL_MS: i32 = 1;

/// An order to a worker. Each is answered when it has been carried out.
#[derive(Debug)]
pub enum Command {
    /// Serve a ring.
    Start {
        /// The queue's number.
        index: usize,
        /// The ring.
        setup: Box<RingSetup>,
        /// Whether it is served now.
        reply: Sender<Result<(), RingError>>,
    },
    /// Stop a ring: take no more chains, finish those that were taken.
    Stop {
        /// The queue's number.
        index: usize,
        /// The first entry of the available ring that was not taken.
        reply: Sender<u16>,
    },
    /// Tell the guest of one ring by another descriptor.
    SetCall {
        /// The queue's number.
        index: usize,
        /// The new descriptor.
        call: Option<EventNotifier>,
        /// Done.
        reply: Sender<()>,
    },
    /// Tell the front-end of a broken ring by another descriptor.
    SetError {
        /// The queue's number.
        index: usize,
        /// The new descriptor.
        error: Option<File>,
        /// Done.
        reply: Sender<()>,
    },
    /// Use other guest memory. Rings that are served lie in both.
    SetMemory {
        /// The memory.
        memory: Arc<GuestMemory>,
        /// Done.
        reply: Sender<()>,
    },
    /// Log writes to the guest's memory, elsewhere, or no longer. Rings are drained first.
    SetLogging {
        /// Where.
        logging: Option<Arc<Logging>>,
        /// Done: nothing is marked in the old log any more.
        reply: Sender<()>,
    },
    /// Serve another device, or the same one with another image. No ring is served.
    SetDevice {
        /// The device.
        device: Arc<Device>,
        /// Nothing refers to the old one any more.
        reply: Sender<()>,
    },
    /// Take the image over from a process that may have died, and note changes of its mapping from
    /// now on. No ring is served.
    Attach {
        /// Where they are noted.
        words: Arc<dyn SharedWords>,
        /// How many changes were made again.
        reply: Sender<Outcome<usize>>,
    },
    /// Flush the image, and note no changes any more. No ring is served.
    Detach {
        /// Done.
        reply: Sender<Outcome<()>>,
    },
    /// Tell what was done so far.
    Report {
        /// The answer.
        reply: Sender<Report>,
    },
    /// End the thread, once nothing is under way.
    Exit,
}

/// A worker's thread, from inside.
pub(super) struct Thread<F> {
    worker: Worker<F>,
    commands: Receiver<Command>,
    poller: Poller,
    spin: Spin,
    stopping: Vec<(usize, Sender<u16>)>,
    exit: bool,
}

/// Runs a worker until it is told to end. `mailbox` is written after each command; the engine
/// belongs to this thread.
///
/// # Errors
/// When the process has no descriptors left.
pub(super) fn run(
    context: Rc<Context>,
    commands: Receiver<Command>,
    mailbox: EventFd,
    spin: Spin,
    started: impl FnOnce(),
) -> std::io::Result<()> {
    let poller = Poller::new()?;
    poller.add(&mailbox, 0, Trigger::Edge)?;
    let engine = context.storage.pollable();
    if engine >= 0 {
        poller.add(&engine, 0, Trigger::Level)?;
    }
    let unpark = move || {
        // Only a full counter refuses, and then the sleeper is being woken already.
        let _ = mailbox.write(1);
    };
    let worker = worker(context, TASKS, unpark);
    let mut thread = Thread { worker, commands, poller, spin, stopping: Vec::new(), exit: false };
    started();
    thread.run();
    Ok(())
}

impl<F: Future<Output = ()>> Thread<F> {
    fn run(&mut self) {
        loop {
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            let progress = self.worker.turn();
            self.answer_stopped();
            if self.exit && self.worker.is_idle() {
                return self.log_stats();
            }
            if progress.any() {
                self.spin.found(Instant::now, || switches().preempted);
                continue;
            }
            if self.looks_again() {
                std::hint::spin_loop();
                continue;
            }
            if self.worker.park() {
                let timeout = self.timeout_ms();
                let woken = self.poller.wait(timeout);
                // Who woke us does not matter: a turn looks at everything.
                drop(woken.expect("waiting has no reason to fail"));
            }
            self.worker.unpark();
        }
    }

    /// Whether to look for requests once more instead of sleeping.
    fn looks_again(&mut self) -> bool {
        // What the disk works on takes longer than waking up.
        let busy = self.worker.storage().is_busy();
        !busy && self.spin.looks_again(Instant::now(), || switches().preempted)
    }

    fn timeout_ms(&self) -> i32 {
        let throttled = self.worker.throttled_ms();
        let storage = self.worker.storage();
        if storage.pollable() < 0 && storage.is_busy() {
            0
        } else if self.worker.needs_polling() {
            POLL_INTERVAL_MS
        } else {
            throttled.unwrap_or(-1)
        }
    }

    /// Carries an order out. A session that does not wait for the answer is no concern of ours.
    fn obey(&mut self, command: Command) {
        match command {
            Command::Start { index, setup, reply } => {
                let _ = reply.send(self.start(index, *setup));
            }
            Command::Stop { index, reply } => {
                self.worker.stop(index);
                self.stopping.push((index, reply));
            }
            Command::SetCall { index, call, reply } => {
                if let Some(ring) = self.worker.ring(index) {
                    ring.set_call(call);
                }
                let _ = reply.send(());
            }
            Command::SetError { index, error, reply } => {
                if let Some(ring) = self.worker.ring(index) {
                    ring.set_error(error);
                }
                let _ = reply.send(());
            }
            Command::SetMemory { memory, reply } => {
                self.worker.set_memory(memory);
                let _ = reply.send(());
            }
            Command::SetLogging { logging, reply } => {
                self.worker.set_logging(logging);
                let _ = reply.send(());
            }
            Command::SetDevice { device, reply } => {
                self.worker.set_device(device);
                let _ = reply.send(());
            }
            Command::Attach { words, reply } => {
                let storage = self.worker.storage();
                let attach = self.worker.context().device.image().attach_journal(storage, words);
                let _ = reply.send(block_on(storage, attach));
            }
            Command::Detach { reply } => {
                let storage = self.worker.storage();
                let detach = self.worker.context().device.image().detach_journal(storage);
                let _ = reply.send(block_on(storage, detach));
            }
            Command::Report { reply } => {
                let _ = reply.send(self.worker.report());
            }
            Command::Exit => self.exit = true,
        }
    }

    fn start(&mut self, index: usize, setup: RingSetup) -> Result<(), RingError> {
        let ring = self.worker.start(index, setup)?;
        let Some(kick) = &ring.kick else { return Ok(()) };
        let Err(error) = self.poller.add(kick, 0, Trigger::Edge) else { return Ok(()) };
        let error = RingError::Kick(error);
        // Nothing was taken from it, and nothing that a predecessor had taken will be.
        if let Some(ring) = self.worker.ring(index) {
            ring.fail(&error);
        }
        self.worker.stop(index);
        self.worker.take_stopped();
        Err(error)
    }

    fn answer_stopped(&mut self) {
        if self.stopping.is_empty() {
            return;
        }
        while let Some(stopped) = self.worker.take_stopped() {
            if let Some(kick) = &stopped.ring.kick {
                self.poller.remove(kick);
            }
            if let Some(place) = self.stopping.iter().position(|(index, _)| *index == stopped.index)
            {
                let (_, reply) = self.stopping.swap_remove(place);
                let _ = reply.send(stopped.next_available);
            }
        }
    }

    fn log_stats(&self) {
        let stats = &self.worker.context().stats;
        tracing::debug!(
            reads = stats.reads.get(),
            read_bytes = stats.read_bytes.get(),
            writes = stats.writes.get(),
            written_bytes = stats.written_bytes.get(),
            flushes = stats.flushes.get(),
            erases = stats.erases.get(),
            errors = stats.errors.get(),
            "a worker has ended"
        );
    }
}
