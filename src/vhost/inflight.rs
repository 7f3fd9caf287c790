#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! The memory in which chains under way are noted: GET_INFLIGHT_FD makes it, SET_INFLIGHT_FD brings
//! it back. What is in it is the business of [`crate::worker::inflight`].
//!
//! A front-end asks for the memory at the first start of a driver, keeps it, and sends it at every
//! start from then on, also to a daemon that has taken a dead one's place. It does so before the
//! rings are described, so nothing is looked at before a ring is started. A reset of the device and
//! the end of a connection forget it, after the rings are drained.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::Result as Answer;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::error::{Error, Result};
use crate::storage::memory_file;
use crate::sync::Arc;
use crate::vhost::session::{Session, refuse};
use crate::worker::inflight::{Record, stride};

/// The unit of a mapping's place in its file.
const PAGE: u64 = 4096;

/// The memory of all queues, one record after the other.
#[derive(Debug)]
pub(super) struct Region {
    memory: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

fn refused(why: impl Into<String>) -> Error {
    Error::refused("in-flight region", why.into())
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
        let memory = MmapRegion::from_file(FileOffset::new(file, at), needed);
        let memory = memory.map_err(|error| refused(error.to_string()))?;
        Ok(Self { memory: Arc::new(memory), queues, queue_size })
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
        let bytes = length(queues, queue_size).map_err(refuse)?;
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
        self.inflight = Some(region);
        self.settle_all();
        Ok(())
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
