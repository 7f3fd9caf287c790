#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! The memory that outlives this process: GET_INFLIGHT_FD makes it, SET_INFLIGHT_FD brings it back.
//!
//! First there is a record for each queue, of the chains under way: the business of
//! [`crate::worker::inflight`]. Behind the records there are 64 bytes, the first word of which says
//! whether the driver has a write cache; then the journal of changes of the image's mapping,
//! [`crate::qcow2::journal`]. A front-end that brings a region without room for these is served
//! without them.
//!
//! A front-end asks for the memory at the first start of a driver, keeps it, and sends it at every
//! start from then on, also to a daemon that has taken a dead one's place. It does so before the
//! rings are described, so nothing is looked at before a ring is started. A reset of the device and
//! the end of a connection forget it, after the rings are drained.
//!
//! The journal is attached to the image before the first ring is served, which brings back what a
//! predecessor had told its guest and not flushed. Whenever nobody is served any more, the image is
//! flushed and the journal emptied: a region that comes back later has nothing stale in it.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::Result as Answer;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::error::{Error, Result};
use crate::qcow2::journal::{JOURNAL_WORDS, SharedWords, forget};
use crate::storage::memory_file;
use crate::sync::{Arc, Ordering};
use crate::vhost::handover::{Descriptors, InflightState, Received};
use crate::vhost::session::{Session, refuse};
use crate::worker::inflight::{Record, stride};
use crate::worker::pool::Pool;

/// The unit of a mapping's place in its file.
const PAGE: u64 = 4096;

/// Bytes of a word.
const WORD: usize = 8;
/// Bytes between the records and the journal.
const SESSION_BYTES: usize = 64;
/// What the first word there says of the write cache; 0 when nothing was said.
const WRITE_THROUGH: u64 = 1;
const WRITE_BACK: u64 = 2;

/// The memory of all queues, one record after the other, and what comes behind.
#[derive(Debug)]
pub(super) struct Region {
    memory: Arc<MmapRegion>,
    /// Bytes of the region as the front-end has told them.
    size: u64,
    queues: u16,
    queue_size: u16,
    /// What lies behind the records, if there is room for it.
    session: Option<Arc<Words>>,
    journal: Option<Arc<Words>>,
}

/// Words of a mapping.
#[derive(Debug)]
struct Words {
    memory: Arc<MmapRegion>,
    start: usize,
    count: usize,
}

impl Words {
    /// So many words from an offset of a mapping on; `None` when they do not lie there, or not
    /// aligned.
    fn new(memory: &Arc<MmapRegion>, start: usize, count: usize) -> Option<Arc<Self>> {
        let end = count.checked_mul(WORD).and_then(|bytes| bytes.checked_add(start))?;
        let fits = end <= memory.len() && start.is_multiple_of(WORD);
        fits.then(|| Arc::new(Self { memory: Arc::clone(memory), start, count }))
    }

    fn offset(&self, index: usize) -> usize {
        assert!(index < self.count, "word {index} of {}", self.count);
        index.saturating_mul(WORD)
    }

    fn slice(&self) -> vm_memory::VolatileSlice<'_> {
        let slice = self.memory.get_slice(self.start, self.count.saturating_mul(WORD));
        slice.expect("it lies in the mapping, which was checked")
    }
}

impl SharedWords for Words {
    fn len(&self) -> usize {
        self.count
    }

    fn load(&self, index: usize) -> u64 {
        self.slice().load(self.offset(index), Ordering::Acquire).expect("aligned and inside")
    }

    fn store(&self, index: usize, value: u64) {
        let stored = self.slice().store(value, self.offset(index), Ordering::Release);
        stored.expect("aligned and inside");
    }
}

/// What became of a region's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum JournalState {
    /// Nobody has looked at it.
    #[default]
    Untouched,
    /// The image notes its changes there, or there is none.
    Attached,
    /// It contradicts the image.
    Refused,
}

fn refused(why: impl Into<String>) -> Error {
    Error::refused("in-flight region", why.into())
}

/// Bytes of all that is kept for so many queues.
fn whole_length(queues: u16, queue_size: u16) -> Result<usize> {
    let records = length(queues, queue_size)?;
    Ok(records.saturating_add(SESSION_BYTES).saturating_add(JOURNAL_WORDS.saturating_mul(WORD)))
}

/// Bytes of the records of so many queues.
fn length(queues: u16, queue_size: u16) -> Result<usize> {
    let length = stride(queue_size).checked_mul(usize::from(queues));
    length.ok_or_else(|| refused("it is larger than the address space"))
}

impl Region {
    /// Maps what the front-end has sent.
    ///
    /// # Errors
    /// When the file is too short for so many queues of that size: the first access would kill the
    /// process. When it cannot be mapped.
    fn map(sent: &VhostUserInflight, file: File) -> Result<Self> {
        let (queues, queue_size, at) = (sent.num_queues, sent.queue_size, sent.mmap_offset);
        let needed = length(queues, queue_size)?;
        let bytes = u64::try_from(needed).map_err(|_| refused("it is too large"))?;
        if sent.mmap_size < bytes {
            let why =
                format!("{} bytes, {queues} queues of {queue_size} need {bytes}", sent.mmap_size);
            return Err(refused(why));
        }
        if !at.is_multiple_of(PAGE) {
            return Err(refused(format!("it begins at {at:#x}, inside a page")));
        }
        let found = file.metadata().map_err(|error| Error::io("in-flight region", error))?.len();
        if at.checked_add(bytes).is_none_or(|end| end > found) {
            let why =
                format!("its file ends at {found}, and {bytes} bytes from {at} on are needed");
            return Err(refused(why));
        }
        // A region of an older daemon ends with the records.
        let whole = whole_length(queues, queue_size)?;
        let bytes = u64::try_from(whole).map_err(|_| refused("it is too large"))?;
        let fits = |end: u64| end <= found && sent.mmap_size >= bytes;
        let size = if at.checked_add(bytes).is_some_and(fits) { whole } else { needed };
        let memory = MmapRegion::from_file(FileOffset::new(file, at), size);
        let memory = Arc::new(memory.map_err(|error| refused(error.to_string()))?);
        let session = Words::new(&memory, needed, SESSION_BYTES / WORD);
        let journal = needed.saturating_add(SESSION_BYTES);
        let journal = Words::new(&memory, journal, JOURNAL_WORDS);
        Ok(Self { memory, size: sent.mmap_size, queues, queue_size, session, journal })
    }

    /// Notes whether the driver has a write cache.
    pub(super) fn keep_write_back(&self, write_back: bool) {
        if let Some(session) = &self.session {
            session.store(0, if write_back { WRITE_BACK } else { WRITE_THROUGH });
        }
    }

    /// Whether the driver has a write cache, if a predecessor has noted it.
    fn kept_write_back(&self) -> Option<bool> {
        match self.session.as_ref()?.load(0) {
            WRITE_THROUGH => Some(false),
            WRITE_BACK => Some(true),
            _ => None,
        }
    }

    /// The region for a successor.
    pub(super) fn save(&self, descriptors: &mut Descriptors) -> Option<InflightState> {
        let place = self.memory.file_offset()?;
        let (size, offset, file) = (self.size, place.start(), descriptors.add(place.file()));
        let (queues, queue_size) = (self.queues, self.queue_size);
        Some(InflightState { size, offset, queues, queue_size, file })
    }

    /// The region that a predecessor had. Nothing in it is touched before a ring is started.
    ///
    /// # Errors
    /// When its file did not come or cannot be mapped.
    pub(super) fn restore(state: &InflightState, received: &mut Received) -> Result<Self> {
        let InflightState { size, offset, queues, queue_size, file } = *state;
        let sent = VhostUserInflight::new(size, offset, queues, queue_size);
        Self::map(&sent, received.need(file)?)
    }

    /// The record of one queue, if there is one.
    pub(super) fn record(&self, index: usize) -> Option<Record> {
        let start = stride(self.queue_size).checked_mul(index)?;
        let inside = index < usize::from(self.queues) && start < self.memory.len();
        inside.then(|| Record::new(Arc::clone(&self.memory), start, self.queue_size)).flatten()
    }
}

impl Session {
    /// Makes memory for as many queues as the front-end asks for. It is not in use yet: the
    /// front-end sends it back.
    pub(super) fn make_inflight(
        &self,
        wanted: &VhostUserInflight,
    ) -> Answer<(VhostUserInflight, File)> {
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        self.check_inflight(wanted).map_err(refuse)?;
        let bytes = whole_length(queues, queue_size).map_err(refuse)?;
        let bytes = u64::try_from(bytes).map_err(|_| refuse(refused("it is too large")))?;
        let file = memory_file(c"in-flight requests", bytes)
            .map_err(|error| refuse(Error::io("in-flight region", error)))?;
        tracing::debug!(
            "in-flight region {} for {queues} queues of {queue_size}",
            file.as_raw_fd()
        );
        Ok((VhostUserInflight::new(bytes, 0, queues, queue_size), file))
    }

    /// Takes memory into use. Rings that are served are drained first, and go on with it.
    pub(super) fn take_inflight(&mut self, sent: &VhostUserInflight, file: File) -> Answer<()> {
        self.check_inflight(sent).map_err(refuse)?;
        let region = Region::map(sent, file).map_err(refuse)?;
        self.stop_all();
        self.let_journal_go();
        self.journal = JournalState::Untouched;
        match (self.write_back, region.kept_write_back()) {
            (Some(write_back), _) => region.keep_write_back(write_back),
            // The guest goes on with what it was told by a process that has died.
            (None, Some(write_back)) => self.set_write_back(write_back),
            (None, None) => {}
        }
        self.inflight = Some(region);
        self.settle_all();
        Ok(())
    }

    /// Before a ring is served: takes the image over from whoever has served it before, if that has
    /// not been done. The caller has the workers.
    ///
    /// # Errors
    /// When what a predecessor has left contradicts the image, or cannot be made good.
    pub(super) fn take_over(&mut self) -> Result<&mut Pool> {
        let pool = self.pool.as_mut().expect("the caller has hired them");
        match self.journal {
            JournalState::Attached => return Ok(pool),
            JournalState::Refused => return Err(refused("its journal was refused")),
            JournalState::Untouched => {}
        }
        let device = Arc::clone(pool.device());
        device.image().distrust_syncs();
        let Some(region) = &self.inflight else {
            device.image().expect_nobody();
            return Ok(pool);
        };
        self.journal = JournalState::Refused;
        if let Some(words) = region.journal.clone() {
            let changes = pool.attach(words)?;
            if changes > 0 {
                tracing::info!("{changes} changes of the mapping by a predecessor are made again");
            }
        }
        self.journal = JournalState::Attached;
        device.image().expect_nobody();
        Ok(pool)
    }

    /// When nobody is served: makes durable what the journal has, so that nobody finds it there.
    pub(super) fn let_journal_go(&mut self) {
        if self.journal != JournalState::Attached {
            return;
        }
        self.journal = JournalState::Untouched;
        let detached = self.pool.as_mut().map_or(Ok(()), Pool::detach);
        if let Err(error) = detached {
            tracing::error!("the journal stays as it is: {error}");
        }
    }

    /// After a reset of the device, which ends all that the guest relied on.
    pub(super) fn forget_inflight(&mut self) {
        self.let_journal_go();
        let refused = self.journal == JournalState::Refused;
        self.journal = JournalState::Untouched;
        if let Some(region) = self.inflight.take()
            && let Some(words) = region.journal.filter(|_| refused)
        {
            forget(&*words);
        }
    }

    fn check_inflight(&self, region: &VhostUserInflight) -> Result<()> {
        let (queues, queue_size) = (region.num_queues, region.queue_size);
        let offered = self.rings.len();
        if queues == 0 || usize::from(queues) > offered {
            return Err(refused(format!("{queues} queues, of {offered} (--num-queues)")));
        }
        // A driver may use less of each queue than the front-end offers it, not more.
        let largest = self.export.device().settings().queue_size;
        if queue_size == 0 || queue_size > largest {
            let why = format!("queues of {queue_size}, at most {largest} (--queue-size)");
            return Err(refused(why));
        }
        Ok(())
    }
}
