#![expect(unsafe_code, reason = "shares memory with the daemon and hands the driver raw iovecs")]
//! A front-end inside the test: a virtio-blk driver that talks vhost-user to the daemon.

use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags, iovec,
};

/// The largest data buffer of one request.
pub const MAX_REQUEST: usize = 256 << 10;
/// A request takes a header, a status and up to four pieces of data, and 32 requests fit in.
const QUEUE_SIZE: u16 = 256;
/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request to the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into the slot's buffer.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: usize,
    },
    /// Write from the slot's buffer.
    Write {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: usize,
    },
    /// Give the range up.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
        /// Whether the space may be given up.
        unmap: bool,
    },
    /// Make everything that was answered before durable.
    Flush,
}

/// The answer to the request of one slot.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The slot the request was submitted in.
    pub slot: usize,
    /// Zero, or a negative error number.
    pub result: i32,
}

/// A connection with its queues and one data buffer for each request in flight.
pub struct Client {
    // The queues point into memory of the transport, so they are dropped first.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    notifiers: Vec<Box<dyn QueueNotifier>>,
    called: Vec<Arc<EventFd>>,
    transport: Box<VirtioBlkTransport>,
    buffers: MmapMut,
    busy: Vec<bool>,
}

impl Client {
    /// Connects to the daemon at `socket` with so many queues and requests in flight.
    ///
    /// # Errors
    ///
    /// Fails when the daemon is not there or does not offer what is asked for.
    pub fn connect(socket: &Path, queues: usize, depth: usize) -> Result<Self> {
        let path = socket.to_str().ok_or_else(|| Error::other("a socket path in plain text"))?;
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, wanted_features())?);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE)?;
        let memory = std::fs::File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        memory.set_len((depth * MAX_REQUEST) as u64)?;
        // SAFETY: the file was made just now and is never truncated, so the mapping stays valid.
        // The daemon writes only to buffers of requests in flight, which nobody reads meanwhile.
        let buffers = unsafe { MmapMut::map_mut(&memory)? };
        let address = buffers.as_ptr().addr();
        transport.map_mem_region(address, buffers.len(), memory.as_raw_fd(), 0)?;
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        Ok(Self {
            notifiers: (0..queues.len()).map(|i| transport.get_submission_notifier(i)).collect(),
            called: (0..queues.len()).map(|i| transport.get_completion_fd(i)).collect(),
            queues,
            transport,
            buffers,
            busy: vec![false; depth],
        })
    }

    /// What the device says about itself.
    ///
    /// # Errors
    ///
    /// Fails when the daemon does not answer.
    pub fn config(&self) -> Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// The features that both sides agreed on.
    #[must_use]
    pub fn features(&self) -> VirtioBlkFeatureFlags {
        VirtioBlkFeatureFlags::from_bits_truncate(self.transport.get_features())
    }

    /// How many queues there are.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// How many slots there are.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.busy.len()
    }

    /// A slot with no request in flight.
    #[must_use]
    pub fn free_slot(&self) -> Option<usize> {
        self.busy.iter().position(|busy| !busy)
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.busy.iter().filter(|busy| **busy).count()
    }

    /// The data buffer of a slot that has no request in flight.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(!self.busy[slot], "the daemon owns the buffer of a request in flight");
        &mut self.buffers[slot * MAX_REQUEST..][..MAX_REQUEST]
    }

    /// Queues a request. Its data is cut into pieces at `cuts`, each a descriptor of its own.
    ///
    /// # Errors
    ///
    /// Fails when the queue is full.
    pub fn submit(
        &mut self,
        queue: usize,
        slot: usize,
        request: Request,
        cuts: &[usize],
    ) -> Result<()> {
        assert!(!self.busy[slot], "the slot has a request in flight");
        let (queue, offset, length) = match request {
            Request::Read { offset, length } | Request::Write { offset, length } => {
                (&mut self.queues[queue], offset, length)
            }
            _ => (&mut self.queues[queue], 0, 0),
        };
        let start = self.buffers[slot * MAX_REQUEST..][..MAX_REQUEST].as_mut_ptr();
        assert!(length <= MAX_REQUEST && cuts.iter().all(|cut| *cut <= length));
        let edges = [&[0], cuts, &[length]].concat();
        let pieces: Vec<iovec> = edges
            .windows(2)
            .map(|edge| iovec {
                iov_base: start.wrapping_add(edge[0]).cast(),
                iov_len: edge[1].checked_sub(edge[0]).expect("cuts in ascending order"),
            })
            .filter(|piece| piece.iov_len > 0)
            .collect();
        let (first, count) = (pieces.as_ptr(), pieces.len());
        match request {
            // SAFETY: every piece lies in the slot's buffer, which stays mapped as long as the
            // client lives and is not touched before the answer: `busy` sees to that.
            Request::Read { .. } => unsafe { queue.readv(offset, first, count, slot)? },
            // SAFETY: as for reading.
            Request::Write { .. } => unsafe { queue.writev(offset, first, count, slot)? },
            Request::Discard { offset, length } => queue.discard(offset, length, slot)?,
            Request::WriteZeroes { offset, length, unmap } => {
                queue.write_zeroes(offset, length, unmap, slot)?;
            }
            Request::Flush => queue.flush(slot)?,
        }
        self.busy[slot] = true;
        Ok(())
    }

    /// Tells the daemon about queued requests where it wants to be told.
    ///
    /// # Errors
    ///
    /// Fails when the descriptor for it does not work, which is a defect of the test.
    pub fn kick(&mut self) -> Result<()> {
        for (queue, notifier) in self.queues.iter_mut().zip(&self.notifiers) {
            if queue.avail_notif_needed() {
                notifier.notify()?;
            }
        }
        Ok(())
    }

    /// Collects what has been answered, without waiting.
    pub fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        for queue in &mut self.queues {
            for completion in queue.completions() {
                self.busy[completion.context] = false;
                answers.push(Answer { slot: completion.context, result: completion.ret });
            }
        }
        answers
    }

    /// Waits until something has been answered. The list is empty if nothing was in time.
    ///
    /// # Errors
    ///
    /// Fails when waiting itself does.
    pub fn wait(&mut self, time: Duration) -> Result<Vec<Answer>> {
        let deadline = Instant::now() + time;
        loop {
            let answers = self.answers();
            let left = deadline.saturating_duration_since(Instant::now());
            if !answers.is_empty() || left.is_zero() {
                return Ok(answers);
            }
            let mut events: Vec<PollFd<'_>> =
                self.called.iter().map(|fd| PollFd::new(fd.as_ref(), PollFlags::IN)).collect();
            // The daemon's interrupt alone must wake this up: a lost one shows as a timeout.
            match poll(&mut events, i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for (event, called) in events.iter().zip(&self.called) {
                if event.revents().contains(PollFlags::IN) {
                    called.read()?;
                }
            }
        }
    }

    /// Submits one request on the first queue and waits for its answer, with nothing else in
    /// flight. The data is in the buffer of slot 0.
    ///
    /// # Errors
    ///
    /// Fails with the error the daemon answered, or when it does not answer at all.
    pub fn execute(&mut self, request: Request) -> Result<()> {
        assert_eq!(self.in_flight(), 0, "execute is for a quiet client");
        self.submit(0, 0, request, &[])?;
        self.kick()?;
        match self.wait(PATIENCE)?.first() {
            Some(answer) if answer.result == 0 => Ok(()),
            Some(answer) => Err(Error::from_raw_os_error(-answer.result)),
            None => Err(Error::other(format!("no answer to {request:?}"))),
        }
    }
}

/// The features that front-ends of ours ask for.
#[must_use]
pub fn wanted_features() -> u64 {
    let block = VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::RO
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::TOPOLOGY
        | VirtioBlkFeatureFlags::CONFIG_WCE
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES;
    let ring = VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::VERSION_1;
    block.bits() | ring.bits()
}
