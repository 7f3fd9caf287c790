//! A front-end on the host that outlives its daemon, as a virtual machine does.
//!
//! Guest memory, rings and the in-flight region belong to the [`FrontEnd`]; a connection comes and
//! goes. It sends QEMU's messages in QEMU's order, or tells cloud-hypervisor's bases. Every entry
//! of a used ring is held against what was submitted: an unknown head, a second answer, a wrong
//! length or a status that was never written is an error of [`FrontEnd::answers`].
//!
//! ```no_run
//! # use std::path::Path;
//! use integration::client::Request;
//! use integration::disk::Disk;
//! use integration::frontend::{FrontEnd, Options};
//! let mut disk = FrontEnd::new(Options::default()).unwrap();
//! disk.connect(Path::new("vub.sock")).unwrap();
//! disk.submit(0, 0, Request::Flush, &[]).unwrap();
//! disk.kick().unwrap();
//! // The daemon is killed and another one started; the request is still there.
//! disk.connect(Path::new("vub.sock")).unwrap();
//! ```
//!
//! In reading order: [`wire`] puts messages on a socket, [`ring`] is the driver's side of one ring,
//! and this file has the handshake and the requests.

pub mod ring;
pub mod wire;

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::client::{Answer, MAX_REQUEST, Request};
use crate::disk::{Disk, Limits};
use crate::frontend::ring::{Piece, Ring};
use crate::frontend::wire::{Wire, request as R};

/// Where guest memory begins, in the guest and in what the daemon takes for our address space.
const GUEST: u64 = 1 << 32;
const USER: u64 = 0x7f00_0000_0000;
/// Bytes of guest memory for each ring, and for each slot's header, status, segment and table.
const RING_BYTES: u64 = 64 << 10;
const SLOT_BYTES: u64 = 4096;
/// Where they are in a slot's memory.
const STATUS: u64 = 64;
const SEGMENT: u64 = 128;
const TABLE: u64 = 1024;
/// What the status byte holds before the device has written it.
const UNTOUCHED: u8 = 0xee;

/// Virtio features: FLUSH, BLK_SIZE, MQ, DISCARD, WRITE_ZEROES, INDIRECT, PROTOCOL_FEATURES,
/// VERSION_1; and EVENT_IDX, which is optional here.
const FEATURES: u64 = 1 << 9 | 1 << 6 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 28 | 1 << 30 | 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
/// Protocol features: MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS; and INFLIGHT_SHMFD.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 15;
const INFLIGHT: u64 = 1 << 12;

/// What a front-end tells as a ring's base when it connects again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The used index, as QEMU does.
    Used,
    /// The available index, as cloud-hypervisor does.
    Available,
}

/// What can be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many queues.
    pub queues: usize,
    /// Descriptors of each ring, a power of two up to 1024.
    pub ring_size: u16,
    /// Requests in flight, in all queues together; each has a buffer of [`MAX_REQUEST`] bytes.
    pub slots: usize,
    /// Whether EVENT_IDX is taken.
    pub event_idx: bool,
    /// Whether INFLIGHT_SHMFD is taken. Without it, requests in flight are lost with the daemon.
    pub inflight: bool,
    /// The base that is told.
    pub base: Base,
    /// Where the rings stand at the beginning.
    pub start: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            ring_size: 128,
            slots: 64,
            event_idx: true,
            inflight: true,
            base: Base::Used,
            start: 0,
        }
    }
}

/// The region that the daemon has made, as it came.
struct Inflight {
    file: File,
    payload: Vec<u8>,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    request: Request,
    /// Bytes that the device writes.
    writable: u32,
}

/// One queue's ring, and the descriptors both sides signal.
struct Queue {
    ring: Ring,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
}

/// A virtio-blk driver with its memory; see the module.
pub struct FrontEnd {
    options: Options,
    memory: GuestMemoryMmap,
    file: File,
    length: u64,
    queues: Vec<Queue>,
    inflight: Option<Inflight>,
    wire: Option<Wire>,
    config: Vec<u8>,
    flights: Vec<Option<Flight>>,
    /// What the caller sees of the slots' buffers in guest memory.
    buffers: Vec<u8>,
    submitted: u64,
    answered: u64,
}

impl FrontEnd {
    /// Memory and empty rings, connected to nothing.
    ///
    /// # Errors
    ///
    /// Fails when the host has no memory or descriptors.
    pub fn new(options: Options) -> Result<Self> {
        let data = (options.slots * MAX_REQUEST) as u64;
        let rings = options.queues as u64 * RING_BYTES;
        let length = rings + options.slots as u64 * SLOT_BYTES + data;
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        file.set_len(length)?;
        let part = FileOffset::new(file.try_clone()?, 0);
        let range = (GuestAddress(GUEST), length as usize, Some(part));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(Error::other)?;
        let queue = |index: usize| -> Result<Queue> {
            let at = GUEST + index as u64 * RING_BYTES;
            let ring = Ring::new(
                &memory,
                at,
                options.ring_size,
                options.event_idx,
                (options.start, options.slots),
            );
            let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            Ok(Queue { ring, kick: event()?, call: event()?, error: event()? })
        };
        let queues = (0..options.queues).map(queue).collect::<Result<Vec<Queue>>>()?;
        Ok(Self {
            options,
            queues,
            memory,
            file,
            length,
            inflight: None,
            wire: None,
            config: Vec::new(),
            flights: vec![None; options.slots],
            buffers: vec![0; options.slots * MAX_REQUEST],
            submitted: 0,
            answered: 0,
        })
    }

    /// Connects to a daemon and starts the rings where they are; what is in flight stays in flight.
    /// A connection that there was is closed first, or is broken anyway.
    ///
    /// # Errors
    ///
    /// Fails when nobody listens, or the daemon refuses something.
    pub fn connect(&mut self, socket: &Path) -> Result<()> {
        self.disconnect();
        let mut wire = Wire::connect(socket)?;
        let event_idx = if self.options.event_idx { EVENT_IDX } else { 0 };
        let (features, protocol) = (FEATURES | event_idx, self.protocol());
        let offered = wire.ask_u64(R::GET_FEATURES)?;
        if offered & features != features {
            return Err(Error::other(format!("the daemon offers only {offered:#x}")));
        }
        let offered = wire.ask_u64(R::GET_PROTOCOL_FEATURES)?;
        if offered & protocol != protocol {
            return Err(Error::other(format!("the daemon offers the protocol {offered:#x} only")));
        }
        wire.tell(R::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes())?;
        wire.ask_u64(R::GET_QUEUE_NUM)?;
        wire.ask_u64(R::GET_MAX_MEM_SLOTS)?;
        wire.tell(R::SET_OWNER, &[])?;
        wire.ask_u64(R::GET_FEATURES)?;
        for (index, queue) in (0_u64..).zip(&self.queues) {
            wire.send(R::SET_VRING_CALL, 1, &index.to_ne_bytes(), &[queue.call.as_raw_fd()])?;
            wire.send(R::SET_VRING_ERR, 1, &index.to_ne_bytes(), &[queue.error.as_raw_fd()])?;
        }
        if self.config.is_empty() {
            self.config = wire.config(60)?;
        }
        wire.tell(R::SET_FEATURES, &features.to_ne_bytes())?;
        if self.options.inflight {
            self.share_inflight(&mut wire)?;
        }
        let region = [0, GUEST, self.length, USER, 0].map(u64::to_ne_bytes).concat();
        wire.acknowledged(R::ADD_MEM_REG, &region, &[self.file.as_raw_fd()])?;
        for index in 0..self.queues.len() {
            self.start(&mut wire, index)?;
        }
        for index in 0..self.queues.len() as u32 {
            wire.acknowledged(R::SET_VRING_ENABLE, &pair(index, 1), &[])?;
        }
        self.wire = Some(wire);
        Ok(())
    }

    fn protocol(&self) -> u64 {
        PROTOCOL | if self.options.inflight { INFLIGHT } else { 0 }
    }

    /// Sends the in-flight region; asks for one first if there is none.
    fn share_inflight(&mut self, wire: &mut Wire) -> Result<()> {
        if self.inflight.is_none() {
            let [queues, size] = [self.queues.len() as u16, self.options.ring_size];
            let mut wish = vec![0; 16];
            wish.extend([queues, size].map(u16::to_ne_bytes).concat());
            wish.extend([0; 4]);
            let (payload, file) = wire.ask_with_file(R::GET_INFLIGHT_FD, &wish)?;
            self.inflight = Some(Inflight { file, payload });
        }
        if let Some(Inflight { file, payload }) = &self.inflight {
            wire.acknowledged(R::SET_INFLIGHT_FD, payload, &[file.as_raw_fd()])?;
        }
        Ok(())
    }

    fn start(&self, wire: &mut Wire, index: usize) -> Result<()> {
        let Queue { ring, kick, call, .. } = &self.queues[index];
        let (index, number) = (index as u64, index as u32);
        wire.send(R::SET_VRING_CALL, 1, &index.to_ne_bytes(), &[call.as_raw_fd()])?;
        wire.tell(R::SET_VRING_NUM, &pair(number, u32::from(self.options.ring_size)))?;
        let base = match self.options.base {
            Base::Used => ring.used_index(),
            Base::Available => ring.available_index(),
        };
        wire.tell(R::SET_VRING_BASE, &pair(number, u32::from(base)))?;
        let [table, used, available] =
            [ring.table(), ring.used_ring(), ring.available_ring()].map(|at| at - GUEST + USER);
        let mut payload = pair(number, 0);
        payload.extend([table, used, available, 0].map(u64::to_ne_bytes).concat());
        wire.tell(R::SET_VRING_ADDR, &payload)?;
        wire.send(R::SET_VRING_KICK, 1, &index.to_ne_bytes(), &[kick.as_raw_fd()])
    }

    /// Hangs up. The rings stay as they are.
    pub fn disconnect(&mut self) {
        self.wire = None;
    }

    /// Forgets the in-flight region, as a virtual machine does at a reset: the next connection asks
    /// for a new one. Nothing may be in flight.
    pub fn forget_inflight(&mut self) {
        assert_eq!(Disk::in_flight(self), 0, "requests are in flight");
        self.inflight = None;
    }

    /// Stops a queue; gives the index at which the daemon would go on.
    ///
    /// # Errors
    ///
    /// Fails when there is no connection.
    pub fn stop_queue(&mut self, index: usize) -> Result<u16> {
        let wire = self.wire.as_mut().ok_or_else(|| Error::other("there is no connection"))?;
        let reply = wire.ask(R::GET_VRING_BASE, &pair(index as u32, 0))?;
        let base = reply.get(4..6).and_then(|bytes| bytes.try_into().ok());
        base.map(u16::from_ne_bytes).ok_or_else(|| Error::other("a short answer"))
    }

    /// The connection, for messages of the caller's own.
    pub fn wire(&mut self) -> Option<&mut Wire> {
        self.wire.as_mut()
    }

    /// How many requests were submitted, and how many were answered.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.submitted, self.answered)
    }

    fn slot_memory(&self, slot: usize) -> u64 {
        GUEST + self.queues.len() as u64 * RING_BYTES + slot as u64 * SLOT_BYTES
    }

    fn slot_data(&self, slot: usize) -> u64 {
        self.slot_memory(self.flights.len()) + (slot * MAX_REQUEST) as u64
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(Error::other)
    }

    fn get(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory.read_slice(bytes, GuestAddress(at)).map_err(Error::other)
    }

    /// Writes a request's header and what else it needs; gives the pieces between header and
    /// status.
    fn lay_out(&self, slot: usize, request: Request, cuts: &[usize]) -> Result<Vec<Piece>> {
        let (at, data) = (self.slot_memory(slot), self.slot_data(slot));
        let (kind, sector, pieces) = match request {
            Request::Read { offset, length } | Request::Write { offset, length } => {
                let is_read = matches!(request, Request::Read { .. });
                // What a read leaves must come from the daemon, so its buffer is copied as well.
                self.put(data, &self.buffers[slot * MAX_REQUEST..][..length])?;
                let edges = [&[0], cuts, &[length]].concat();
                let piece = |edge: &[usize]| Piece {
                    at: data + edge[0] as u64,
                    length: (edge[1] - edge[0]) as u32,
                    writable: is_read,
                };
                let pieces = edges.windows(2).filter(|edge| edge[0] < edge[1]).map(piece);
                (u32::from(!is_read), offset / 512, pieces.collect())
            }
            Request::Discard { offset, length } | Request::WriteZeroes { offset, length, .. } => {
                let unmap = matches!(request, Request::WriteZeroes { unmap: true, .. });
                let kind = if matches!(request, Request::Discard { .. }) { 11 } else { 13 };
                let mut segment = (offset / 512).to_le_bytes().to_vec();
                segment.extend(((length / 512) as u32).to_le_bytes());
                segment.extend(u32::from(unmap).to_le_bytes());
                self.put(at + SEGMENT, &segment)?;
                (kind, 0, vec![Piece { at: at + SEGMENT, length: 16, writable: false }])
            }
            Request::Flush => (4, 0, Vec::new()),
        };
        let mut header = [kind, 0].map(u32::to_le_bytes).concat();
        header.extend(sector.to_le_bytes());
        self.put(at, &header)?;
        self.put(at + STATUS, &[UNTOUCHED])?;
        Ok(pieces)
    }

    /// Collects what has been answered, without waiting.
    ///
    /// # Errors
    ///
    /// Fails when a used ring holds what was not asked for, or asked for once and answered twice.
    pub fn answers(&mut self) -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        for index in 0..self.queues.len() {
            while let Some((slot, length)) = self.queues[index].ring.take_used()? {
                let flight = self.flights[slot].take();
                let flight = flight.ok_or_else(|| Error::other(format!("slot {slot} is idle")))?;
                answers.push(self.finish(slot, flight, length)?);
            }
        }
        self.answered += answers.len() as u64;
        Ok(answers)
    }

    fn finish(&mut self, slot: usize, flight: Flight, length: u32) -> Result<Answer> {
        let Flight { request, writable } = flight;
        let mut status = [0];
        self.get(self.slot_memory(slot) + STATUS, &mut status)?;
        if status[0] > 2 || length != writable {
            let why = format!("{request:?}: status {:#x}, {length} of {writable} bytes", status[0]);
            return Err(Error::other(why));
        }
        if let Request::Read { length, .. } = request {
            let at = self.slot_data(slot);
            let target = &mut self.buffers[slot * MAX_REQUEST..][..length];
            self.memory.read_slice(target, GuestAddress(at)).map_err(Error::other)?;
        }
        Ok(Answer { slot, result: [0, -5, -95][usize::from(status[0])] })
    }
}

fn pair(first: u32, second: u32) -> Vec<u8> {
    [first, second].map(u32::to_ne_bytes).concat()
}

fn clear(event: &OwnedFd) {
    // An event that was not signalled has nothing to clear.
    let _ = rustix::io::read(event, &mut [0; 8]);
}

impl Disk for FrontEnd {
    fn limits(&mut self) -> Result<Limits> {
        let word = |at: usize| {
            let bytes = self.config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes).ok_or_else(|| Error::other("no configuration"))
        };
        let sectors = u64::from(word(4)?) << 32 | u64::from(word(0)?);
        Ok(Limits {
            size: sectors * 512,
            block: word(20)? as usize,
            discard: word(36)? as usize,
            write_zeroes: word(48)? as usize,
        })
    }

    fn queue_count(&self) -> usize {
        self.queues.len()
    }

    fn slot_count(&self) -> usize {
        self.flights.len()
    }

    fn free_slot(&self) -> Option<usize> {
        self.flights.iter().position(Option::is_none)
    }

    fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count()
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(self.flights[slot].is_none(), "the buffer of a request in flight");
        &mut self.buffers[slot * MAX_REQUEST..][..MAX_REQUEST]
    }

    fn submit(
        &mut self,
        queue: usize,
        slot: usize,
        request: Request,
        cuts: &[usize],
    ) -> Result<()> {
        assert!(self.flights[slot].is_none(), "the slot has a request in flight");
        let at = self.slot_memory(slot);
        let mut pieces = vec![Piece { at, length: 16, writable: false }];
        pieces.extend(self.lay_out(slot, request, cuts)?);
        pieces.push(Piece { at: at + STATUS, length: 1, writable: true });
        let writable = pieces.iter().filter(|piece| piece.writable);
        let writable = writable.map(|piece| piece.length).sum();
        self.queues[queue].ring.offer(slot, &pieces, at + TABLE)?;
        self.flights[slot] = Some(Flight { request, writable });
        self.submitted += 1;
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        for queue in &mut self.queues {
            if queue.ring.wants_kick() {
                rustix::io::write(&queue.kick, &1_u64.to_ne_bytes())?;
            }
        }
        Ok(())
    }

    fn wait(&mut self, time: Duration) -> Result<Vec<Answer>> {
        let deadline = Instant::now() + time;
        loop {
            let answers = self.answers()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !answers.is_empty() || left.is_zero() {
                return Ok(answers);
            }
            // Only the daemon's interrupt wakes this up: a lost one shows as a time-out.
            let events = self.queues.iter().map(|queue| queue.call.as_fd());
            let mut events: Vec<PollFd<'_>> =
                events.map(|call| PollFd::from_borrowed_fd(call, PollFlags::IN)).collect();
            match poll(&mut events, i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.queues.iter().for_each(|queue| clear(&queue.call));
            for (index, queue) in self.queues.iter().enumerate() {
                if rustix::io::read(&queue.error, &mut [0; 8]).is_ok() {
                    return Err(Error::other(format!("the daemon calls queue {index} broken")));
                }
            }
        }
    }
}

impl AsRawFd for FrontEnd {
    /// The file of guest memory.
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
