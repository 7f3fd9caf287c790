//! The disk as front-ends get at it: any number of them may be connected, one is served.
//!
//! A guest that moves from one virtual machine monitor to another on the same host has two
//! front-ends for a while: the new one does its handshake while the old one's guest still runs.
//! Two guests that run at once would spoil each other's file systems, so there is one set of
//! workers, and the session that has rings to be served holds it. When its last ring has stopped it
//! gives the workers back, and whoever waits for them goes on.

use std::fmt;

use crate::blk::Device;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::sync::{Arc, Mutex, lock};
use crate::worker::Report;
use crate::worker::pool::Pool;

/// What all sessions share.
pub struct Export {
    device: Mutex<Arc<Device>>,
    /// The workers, unless a session has them.
    pool: Mutex<Option<Pool>>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("is_free", &self.is_free()).finish_non_exhaustive()
    }
}

impl Export {
    /// The disk behind the workers of `pool`.
    pub fn new(pool: Pool) -> Self {
        let device = Mutex::new(Arc::clone(pool.device()));
        Self { device, pool: Mutex::new(Some(pool)) }
    }

    /// The device that is served.
    pub fn device(&self) -> Arc<Device> {
        Arc::clone(&lock(&self.device))
    }

    /// Changes the image while nobody else has it; no ring is served. That nobody has it is proved
    /// by taking it from the workers.
    ///
    /// # Errors
    /// When somebody has it after all; else the answer is that of `change`.
    pub(super) fn change_image<R>(&self, change: impl FnOnce(&mut Image) -> R) -> Result<R> {
        let in_use = || Error::refused("disk", "somebody else uses the image; try again");
        let mut pool = self.take().ok_or_else(in_use)?;
        let mut device = lock(&self.device);
        pool.set_device(Arc::new(device.without_image()));
        let image = Arc::get_mut(&mut device).and_then(Device::image_mut);
        let done = image.map(change).ok_or_else(in_use);
        pool.set_device(Arc::clone(&device));
        drop(device);
        self.put(pool);
        done
    }

    /// Puts another device in place of the one that is served, which nothing holds afterwards but
    /// whoever asks; no ring is served.
    ///
    /// # Errors
    /// When a session has the workers.
    pub fn replace_device(&self, device: Arc<Device>) -> Result<Arc<Device>> {
        let in_use = || Error::refused("disk", "a front-end has the workers");
        let mut pool = self.take().ok_or_else(in_use)?;
        pool.set_device(Arc::clone(&device));
        self.put(pool);
        Ok(std::mem::replace(&mut *lock(&self.device), device))
    }

    /// Whether no session has the workers.
    pub fn is_free(&self) -> bool {
        lock(&self.pool).is_some()
    }

    /// What the workers have done, unless a session has them.
    pub(super) fn report(&self) -> Option<Vec<(usize, Report)>> {
        lock(&self.pool).as_ref().map(Pool::report)
    }

    /// Takes the workers, if nobody else has them.
    pub(super) fn take(&self) -> Option<Pool> {
        lock(&self.pool).take()
    }

    /// Gives the workers back, none of which serves a ring.
    pub(super) fn put(&self, pool: Pool) {
        *lock(&self.pool) = Some(pool);
    }
}
