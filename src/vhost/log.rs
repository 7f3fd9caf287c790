//! The dirty log as the front-end asks for it: a file, a feature bit, and where rings are logged
//! (vhost-user, "Migration").
//!
//! The log is in use while the front-end has taken VHOST_F_LOG_ALL; it never takes the file back.
//! Some front-ends send a fresh file for each round of copying, so the log is replaced while rings
//! run: when the message is answered no worker marks pages in the old one.

use std::fs::File;

use vhost::vhost_user::Result as Answer;
use vhost::vhost_user::message::{VhostUserLog, VhostUserVirtioFeatures};
use vm_memory::{FileOffset, MmapRegion};

use crate::bytes::round_down;
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vhost::handover::{Descriptors, LogState, Received};
use crate::vhost::session::{Session, refuse};
use crate::worker::dirty::{DirtyLog, Logging};

/// The bit by which a front-end turns logging on.
pub(super) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// The smallest unit of a mapping in bytes.
const PAGE: u64 = 4096;

/// What the front-end has said about the log.
#[derive(Debug, Default)]
pub(super) struct Log {
    base: Option<Arc<DirtyLog>>,
    /// Size and offset in the file, as the front-end has told them.
    layout: (u64, u64),
    /// The last file could not be mapped.
    failed: bool,
    /// What the workers log to, if they do.
    current: Option<Arc<Logging>>,
}

impl Session {
    /// Takes a file as the log.
    ///
    /// # Errors
    /// When it cannot be mapped while changes must be logged already.
    pub(super) fn set_log(&mut self, log: &VhostUserLog, file: File) -> Answer<()> {
        match map(log, file) {
            Ok(base) => {
                self.log.layout = (log.mmap_size, log.mmap_offset);
                (self.log.base, self.log.failed) = (Some(Arc::new(base)), false);
            }
            Err(error) if self.features & LOG_ALL != 0 => return Err(refuse(error)),
            Err(error) => {
                // The answer has no room for a failure; that of SET_FEATURES has.
                tracing::warn!("{error}");
                (self.log.base, self.log.failed) = (None, true);
            }
        }
        self.settle_log();
        Ok(())
    }

    /// The log for a successor.
    pub(super) fn save_log(&self, descriptors: &mut Descriptors) -> LogState {
        let (size, offset) = self.log.layout;
        let file = self.log.base.as_ref().and_then(|base| base.file());
        let file = file.map(|file| descriptors.add(file));
        LogState { size, offset, file, failed: self.log.failed }
    }

    /// The log that a predecessor had.
    ///
    /// # Errors
    /// When its file did not come or cannot be mapped.
    pub(super) fn restore_log(&mut self, state: &LogState, received: &mut Received) -> Result<()> {
        self.log.failed = state.failed;
        let Some(file) = received.take(state.file)? else { return Ok(()) };
        let log = VhostUserLog::new(state.size, state.offset);
        self.log.layout = (state.size, state.offset);
        self.log.base = Some(Arc::new(map(&log, file)?));
        self.settle_log();
        Ok(())
    }

    /// Refuses features for which there is no log.
    ///
    /// # Errors
    /// When logging is to begin in a file that could not be mapped.
    pub(super) fn check_log(&self, features: u64) -> Answer<()> {
        if features & LOG_ALL == 0 || !self.log.failed {
            return Ok(());
        }
        Err(refuse(Error::refused("virtio features", "there is no log that could be written")))
    }

    /// What the workers of this session have to log to.
    pub(super) fn logging(&self) -> Option<Arc<Logging>> {
        self.log.current.clone()
    }

    /// Makes the workers agree with what is known of the log.
    pub(super) fn settle_log(&mut self) {
        let wanted = self.wanted_logging();
        if is_same(wanted.as_ref(), self.log.current.as_deref()) {
            return;
        }
        // Of requests under way nobody has remembered what they write: they are done with first.
        let begins = self.log.current.is_none() && self.is_serving();
        if begins {
            self.stop_all();
        }
        self.log.current = wanted.map(Arc::new);
        let logging = self.logging();
        if let Some(pool) = &mut self.pool {
            pool.set_logging(logging);
        }
        if begins {
            self.settle_all();
        }
        tracing::debug!("writes to the guest's memory are logged: {}", self.log.current.is_some());
    }

    fn wanted_logging(&self) -> Option<Logging> {
        let base = self.log.base.as_ref().filter(|_| self.features & LOG_ALL != 0)?;
        let used = self.rings.iter().map(|ring| ring.used_log).collect();
        Some(Logging { log: Arc::clone(base), used })
    }
}

fn is_same(wanted: Option<&Logging>, current: Option<&Logging>) -> bool {
    match (wanted, current) {
        (Some(wanted), Some(current)) => {
            Arc::ptr_eq(&wanted.log, &current.log) && wanted.used == current.used
        }
        (wanted, current) => wanted.is_none() && current.is_none(),
    }
}

/// Maps a log.
fn map(log: &VhostUserLog, file: File) -> Result<DirtyLog> {
    let (offset, size) = (log.mmap_offset, log.mmap_size);
    let refused =
        |why: String| Error::refused(format!("dirty log of {size:#x} bytes at {offset:#x}"), why);
    let metadata = file.metadata().map_err(|error| refused(error.to_string()))?;
    let end = offset.checked_add(size).filter(|_| size != 0);
    let end = end.ok_or_else(|| refused("it is empty or wraps around".to_owned()))?;
    // An access beyond the end of a file would kill the process.
    if !metadata.is_file() || end > metadata.len() {
        return Err(refused(format!("its file ends at {:#x}", metadata.len())));
    }
    let start = round_down(offset, PAGE);
    let [length, before] = [end - start, offset - start].map(usize::try_from);
    let (Ok(length), Ok(before)) = (length, before) else {
        return Err(refused("it is larger than the address space".to_owned()));
    };
    let mapping = MmapRegion::from_file(FileOffset::new(file, start), length);
    Ok(DirtyLog::new(mapping.map_err(|error| refused(error.to_string()))?, before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(len).expect("its length");
        file
    }

    #[test]
    fn a_log_lies_anywhere_in_its_file() {
        for offset in [0, 1, 4096, 5000] {
            let file = file(8000);
            let log = VhostUserLog::new(100, offset);
            let log = map(&log, file.try_clone().expect("a copy")).expect("it is mapped");
            log.mark(0, 1);
            log.mark(799 << 12, 1 << 12);
            log.mark(800 << 12, 1 << 30);
            let mut bytes = [0; 8000];
            file.read_exact_at(&mut bytes, 0).expect("read");
            let set: Vec<(u64, u8)> = (0..).zip(bytes).filter(|(_, byte)| *byte != 0).collect();
            assert_eq!(set, [(offset, 1), (offset + 99, 0x80)]);
        }
    }

    #[test]
    fn impossible_logs_are_refused() {
        for (size, offset, why) in [
            (4097, 0, "its file ends"),
            (1, 4096, "its file ends"),
            (0, 0, "empty"),
            (1 << 60, 0, "its file ends"),
            (u64::MAX, 1, "wraps"),
        ] {
            let error = map(&VhostUserLog::new(size, offset), file(4096)).expect_err("refused");
            assert!(error.to_string().contains(why), "{error}");
        }
        let device = File::open("/dev/zero").expect("open");
        map(&VhostUserLog::new(4096, 0), device).expect_err("it has no length");
        let read_only = tempfile::NamedTempFile::new().expect("a file");
        read_only.as_file().set_len(4096).expect("its length");
        let read_only = File::open(read_only.path()).expect("open");
        map(&VhostUserLog::new(4096, 0), read_only).expect_err("it cannot be written");
    }
}
