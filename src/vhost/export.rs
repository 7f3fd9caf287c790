//! The disk as front-ends get at it: any number of them may be connected, one is served.
//!
//! A guest that moves from one virtual machine monitor to another on the same host has two
//! front-ends for a while: the new one does its handshake while the old one's guest still runs.
//! Two guests that run at once would spoil each other's file systems, so there is one set of
//! workers, and the session that has rings to be served holds it. When its last ring has stopped it
//! gives the workers back, and whoever waits for them goes on.

use std::fmt;

use crate::blk::Device;
use crate::sync::{Arc, Mutex, lock};
use crate::worker::pool::Pool;

/// What all sessions share.
pub struct Export {
    device: Arc<Device>,
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
        Self { device: Arc::clone(pool.device()), pool: Mutex::new(Some(pool)) }
    }

    /// The device that is served.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether no session has the workers.
    pub fn is_free(&self) -> bool {
        lock(&self.pool).is_some()
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
