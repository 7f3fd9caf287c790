#![expect(unsafe_code, reason = "shares memory with the server and hands the driver raw buffers")]
//! The benchmark's front-end: the loop of a busy guest and nothing else.
//!
//! It does what Linux does for a process that keeps so many requests in flight: takes everything
//! that was answered, submits as much again, kicks once if the server wants to know, and sleeps on
//! the completion descriptor when nothing is there, after asking for the next completion to be told
//! (EVENT_IDX). Both servers meet the same loop.

use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use integration::client::wanted_features;
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport,
};

use crate::histogram::Histogram;

const QUEUE_SIZE: u16 = 256;
/// A server that is silent for so long has stopped serving.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
}

/// A request; offset and length in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What one queue did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Latencies by [`Kind`].
    times: [Histogram; 4],
    /// From the first submission to the last answer.
    pub(crate) elapsed: Duration,
}

impl Outcome {
    pub(crate) fn of(&self, kind: Kind) -> &Histogram {
        &self.times[kind as usize]
    }

    /// Requests of all kinds.
    pub(crate) fn requests(&self) -> u64 {
        self.times.iter().map(Histogram::count).sum()
    }

    /// Adds what another queue did at the same time.
    pub(crate) fn join(&mut self, other: &Self) {
        for (own, more) in self.times.iter_mut().zip(&other.times) {
            own.merge(more);
        }
        self.elapsed = self.elapsed.max(other.elapsed);
    }
}

/// A connection.
pub(crate) struct Client {
    // The queues point into memory of the transport, so they are dropped first.
    lanes: Vec<Lane>,
    transport: Box<VirtioBlkTransport>,
    _buffers: MmapMut,
}

/// One queue with the buffers of its requests in flight.
pub(crate) struct Lane {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    called: Arc<EventFd>,
    /// Where the first slot's buffer is; the mapping lives as long as the client.
    buffers: usize,
    depth: usize,
    block: usize,
    done: Vec<usize>,
    started: Vec<(Instant, Kind)>,
    abandoned: Arc<AtomicBool>,
}

impl Client {
    /// Connects to the server at `socket`, for requests of up to `block` bytes, `depth` in flight
    /// in each queue.
    pub(crate) fn connect(
        socket: &Path,
        queues: usize,
        depth: usize,
        block: usize,
    ) -> Result<Self> {
        let path = socket.to_str().ok_or_else(|| Error::other("a socket path in plain text"))?;
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, wanted_features())?);
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE)?;
        let memory = std::fs::File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        memory.set_len((queues.len() * depth * block) as u64)?;
        // SAFETY: the file was made just now and is never truncated, so the mapping stays valid.
        // Nobody here looks at the bytes.
        let buffers = unsafe { MmapMut::map_mut(&memory)? };
        let address = buffers.as_ptr().expose_provenance();
        transport.map_mem_region(address, buffers.len(), memory.as_raw_fd(), 0)?;
        let lane = |(index, queue)| Lane {
            queue,
            notifier: transport.get_submission_notifier(index),
            called: transport.get_completion_fd(index),
            buffers: address + index * depth * block,
            depth,
            block,
            done: Vec::with_capacity(depth),
            started: vec![(Instant::now(), Kind::Read); depth],
            abandoned: Arc::default(),
        };
        let lanes = queues.into_iter().enumerate().map(lane).collect();
        Ok(Self { lanes, transport, _buffers: buffers })
    }

    /// The most bytes of one discard.
    pub(crate) fn longest_discard(&self) -> Result<u64> {
        Ok(u64::from(u32::from(self.transport.get_config()?.max_discard_sectors)) * 512)
    }

    /// Runs a plan on each queue, each on a thread of its own if there are several, and adds up
    /// what they did. A plan names the next request of a slot, or ends it.
    pub(crate) fn run<Plan>(&mut self, mut plans: Vec<Plan>) -> Result<Outcome>
    where
        Plan: FnMut(usize, Instant) -> Option<Request> + Send,
    {
        assert_eq!(plans.len(), self.lanes.len(), "a plan for each queue");
        if let ([lane], [plan]) = (&mut self.lanes[..], &mut plans[..]) {
            return lane.run_watched(plan);
        }
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for (lane, mut plan) in self.lanes.iter_mut().zip(plans) {
                running.push(scope.spawn(move || lane.run_watched(&mut plan)));
            }
            let mut whole = Outcome::default();
            for thread in running {
                whole.join(&thread.join().expect("a queue's thread")?);
            }
            Ok(whole)
        })
    }
}

impl Lane {
    /// Runs a plan; fails instead of sleeping for ever when the server goes silent.
    fn run_watched(
        &mut self,
        plan: &mut impl FnMut(usize, Instant) -> Option<Request>,
    ) -> Result<Outcome> {
        let (called, abandoned) = (Arc::clone(&self.called), Arc::clone(&self.abandoned));
        let (over, ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    abandoned.store(true, Ordering::Relaxed);
                    // The sleeper sees why it was woken.
                    let _ = called.write(1);
                }
            });
            let outcome = self.run(plan);
            drop(over);
            outcome
        })
    }

    fn run(&mut self, plan: &mut impl FnMut(usize, Instant) -> Option<Request>) -> Result<Outcome> {
        // QEMU makes the descriptors that it is given non-blocking, for us as well.
        let flags = fcntl_getfl(&*self.called)?;
        fcntl_setfl(&*self.called, flags - OFlags::NONBLOCK)?;
        let mut outcome = Outcome::default();
        let begun = Instant::now();
        let mut in_flight = 0;
        for slot in 0..self.depth {
            if let Some(request) = plan(slot, begun) {
                self.submit(slot, request, begun)?;
                in_flight += 1;
            }
        }
        self.kick()?;
        while in_flight > 0 {
            self.take()?;
            let now = Instant::now();
            let mut done = std::mem::take(&mut self.done);
            in_flight -= done.len();
            for slot in done.drain(..) {
                let (started, kind) = self.started[slot];
                outcome.times[kind as usize].add(now - started);
                if let Some(request) = plan(slot, now) {
                    self.submit(slot, request, now)?;
                    in_flight += 1;
                }
            }
            self.done = done;
            self.kick()?;
        }
        outcome.elapsed = begun.elapsed();
        Ok(outcome)
    }

    fn submit(&mut self, slot: usize, request: Request, now: Instant) -> Result<()> {
        let Request { kind, offset, length } = request;
        self.started[slot] = (now, kind);
        let buffer = std::ptr::with_exposed_provenance_mut(self.buffers + slot * self.block);
        let bytes = length as usize;
        assert!(kind == Kind::Discard || bytes <= self.block, "a request larger than its buffer");
        match kind {
            // SAFETY: the buffer is the slot's own, and the mapping that it lies in outlives the
            // connection. Nobody reads or writes it here.
            Kind::Read => unsafe { self.queue.read_raw(offset, buffer, bytes, slot) },
            // SAFETY: as for reading.
            Kind::Write => unsafe { self.queue.write_raw(offset, buffer, bytes, slot) },
            Kind::Flush => self.queue.flush(slot),
            Kind::Discard => self.queue.discard(offset, length, slot),
        }
    }

    fn kick(&mut self) -> Result<()> {
        if self.queue.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Fills `done`; sleeps until there is something to fill it with.
    fn take(&mut self) -> Result<()> {
        loop {
            for answer in self.queue.completions() {
                if answer.ret != 0 {
                    return Err(Error::from_raw_os_error(-answer.ret));
                }
                self.done.push(answer.context);
            }
            if !self.done.is_empty() {
                return Ok(());
            }
            // With EVENT_IDX this asks for the next completion to be told, whatever is passed;
            // `false` keeps the driver from asking again, with a full barrier, after each one.
            self.queue.set_used_notif_enabled(false);
            if self.queue.completions().has_next() {
                continue;
            }
            self.called.read()?;
            if self.abandoned.load(Ordering::Relaxed) {
                return Err(Error::other("the server does not answer"));
            }
        }
    }
}
