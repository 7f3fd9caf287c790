//! What an operator may see and change while guests run, in terms of sessions and workers.
//!
//! The control thread serves one descriptor beside the front-ends' for a [`Control`], which speaks
//! whatever language it likes to operators, and gives it [`FrontEnds`] to look at and act on.

use std::os::fd::AsRawFd;

use crate::blk::Device;
use crate::error::Result;
use crate::image::Image;
use crate::sync::{Arc, Mutex, lock};
use crate::vhost::export::Export;
use crate::vhost::session::Session;
use crate::worker::Report;

/// Something that the control thread serves beside the front-ends.
pub trait Control: AsRawFd {
    /// Does what can be done without waiting. Called while the descriptor is readable.
    fn serve(&mut self, front_ends: &mut FrontEnds<'_>);
}

/// A front-end that is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontEnd {
    /// Its number in the log.
    pub number: u64,
    /// The virtio features that its driver has taken.
    pub features: u64,
    /// The protocol features that it has taken.
    pub protocol_features: u64,
    /// The queues that it has enabled, by number.
    pub enabled: Vec<usize>,
    /// The queues that are served, by number: none while another front-end's guest has the disk.
    pub served: Vec<usize>,
    /// Whether it can be told that the disk has changed.
    pub can_be_told: bool,
}

/// All front-ends and the disk they share.
pub struct FrontEnds<'a> {
    pub(super) sessions: Vec<(u64, &'a Arc<Mutex<Session>>)>,
    pub(super) export: &'a Arc<Export>,
    /// Whether the daemon is to end.
    pub(super) over: bool,
}

impl std::fmt::Debug for FrontEnds<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrontEnds").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}

impl FrontEnds<'_> {
    /// Who is connected, in the order of coming.
    pub fn list(&self) -> Vec<FrontEnd> {
        self.sessions.iter().map(|(number, session)| lock(session).describe(*number)).collect()
    }

    /// The device that is served, with its image. It must not be kept: the image cannot be changed
    /// while somebody has it.
    pub fn device(&self) -> Arc<Device> {
        self.export.device()
    }

    /// What the workers that run have done, by their number.
    pub fn report(&self) -> Vec<(usize, Report)> {
        let holder = self.sessions.iter().find_map(|(_, session)| lock(session).report());
        holder.or_else(|| self.export.report()).unwrap_or_default()
    }

    /// Changes the image while no ring is served: drains all, lets `change` have it, lets the rings
    /// go on, and tells front-ends if the disk's size is not what they believe. No request fails by
    /// this; guests see a disk that takes its time.
    ///
    /// # Errors
    /// When somebody else uses the image; else the answer is that of `change`.
    pub fn change_image<R>(&mut self, change: impl FnOnce(&mut Image) -> R) -> Result<R> {
        let holder = self.sessions.iter().find(|(_, session)| lock(session).is_serving());
        if let Some((_, session)) = holder {
            let mut session = lock(session);
            session.stop_all();
            session.rest();
        }
        let done = self.export.change_image(change);
        // Whoever had the workers has them again, and not somebody else who waits for them.
        if let Some((_, session)) = holder {
            let mut session = lock(session);
            session.settle_all();
            session.rest();
        }
        self.sessions.iter().for_each(|(_, session)| lock(session).announce());
        done
    }

    /// Ends the daemon as a signal does, once this is served.
    pub fn end(&mut self) {
        self.over = true;
    }
}
