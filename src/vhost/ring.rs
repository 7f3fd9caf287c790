//! What the session knows of one ring. The worker that serves it has its own copy.

use std::fs::File;

use vhost_user_backend::{VringMutex, VringT};
use vm_memory::GuestMemoryMmap;

use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vhost::handover::{Descriptors, Received, RingState};
use crate::vhost::memory::MemoryTable;
use crate::worker::queue::{RingSetup, signal_file};

/// Where a ring's three parts are in the front-end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// One ring, as the front-end has described it so far.
///
/// Messages come in any order, so each part is kept by itself, and the ring is served as soon as
/// all of them are there: size, base, addresses, a kick descriptor, and the permission.
pub(super) struct Ring {
    /// Size, base, kick, call, enabled. Its memory stays empty: the session never looks into the
    /// guest's.
    vring: VringMutex<Arc<GuestMemoryMmap>>,
    max_size: u16,
    addresses: Option<Addresses>,
    has_size: bool,
    has_base: bool,
    /// The base that the front-end has told last.
    told_base: Option<u16>,
    /// The front-end has sent a kick descriptor, or has said that there is none.
    started: bool,
    error: Option<File>,
    /// The guest address at which writes to the used ring are logged.
    pub(super) used_log: Option<u64>,
    /// A worker serves it.
    pub(super) running: bool,
}

impl Ring {
    pub(super) fn new(max_size: u16) -> Self {
        let vring = VringMutex::new(Arc::default(), max_size);
        Self {
            vring: vring.expect("the size is a power of two"),
            max_size,
            addresses: None,
            has_size: false,
            has_base: false,
            told_base: None,
            started: false,
            error: None,
            used_log: None,
            running: false,
        }
    }

    /// Forgets everything but where to signal: front-ends send those descriptors once.
    pub(super) fn reset(&mut self) {
        self.vring.set_queue_ready(false);
        self.vring.set_enabled(false);
        self.vring.set_kick(None);
        self.addresses = None;
        (self.has_size, self.has_base, self.started) = (false, false, false);
        (self.told_base, self.used_log) = (None, None);
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<()> {
        let max = self.max_size;
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= max);
        let Some(size) = size else {
            let why = format!("the size must be a power of two and at most {max} (--queue-size)");
            return Err(Error::refused("ring", why));
        };
        self.vring.set_queue_size(size);
        self.has_size = true;
        Ok(())
    }

    pub(super) fn size(&self) -> Option<u32> {
        self.has_size.then(|| u32::from(self.vring.get_ref().get_queue().state().size))
    }

    pub(super) fn set_addresses(&mut self, addresses: Addresses) {
        self.addresses = Some(addresses);
    }

    pub(super) fn addresses(&self) -> Option<Addresses> {
        self.addresses
    }

    /// Where popping begins, or began when the ring was started.
    pub(super) fn base(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// The base that the front-end has told last, wherever the ring stands by now.
    pub(super) fn told_base(&self) -> Option<u16> {
        self.told_base
    }

    pub(super) fn tell_base(&mut self, base: u16) {
        self.told_base = Some(base);
        self.set_base(base);
    }

    pub(super) fn set_base(&mut self, base: u16) {
        self.vring.set_queue_next_avail(base);
        self.has_base = true;
    }

    pub(super) fn set_kick(&mut self, kick: Option<File>) {
        self.vring.set_kick(kick);
        self.started = true;
    }

    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.vring.set_call(call);
    }

    /// Tells the guest to look at the used ring, whatever is there.
    pub(super) fn signal_call(&self) {
        if let Err(error) = self.vring.signal_used_queue() {
            tracing::debug!("a guest cannot be told: {error}");
        }
    }

    /// A copy of the descriptor that tells the guest.
    pub(super) fn call(&self) -> std::io::Result<Option<vmm_sys_util::event::EventNotifier>> {
        let vring = self.vring.get_ref();
        vring.get_call().as_ref().map(|call| call.try_clone()).transpose()
    }

    pub(super) fn set_error(&mut self, error: Option<File>) {
        self.error = error;
    }

    /// A copy of the descriptor that tells the front-end of a broken ring.
    pub(super) fn error(&self) -> std::io::Result<Option<File>> {
        self.error.as_ref().map(File::try_clone).transpose()
    }

    /// Tells the front-end that the ring cannot be served.
    pub(super) fn signal_error(&mut self) {
        if let Some(error) = &mut self.error {
            signal_file(error);
        }
    }

    pub(super) fn set_enabled(&mut self, enabled: bool) {
        self.vring.set_enabled(enabled);
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.vring.get_ref().is_enabled()
    }

    /// Forgets the descriptors of a stopped ring; what it was like stays known.
    pub(super) fn close(&mut self) {
        self.vring.set_kick(None);
        self.vring.set_call(None);
        self.started = false;
    }

    /// What the front-end has said, for a successor. The ring must not be running.
    pub(super) fn save(&self, descriptors: &mut Descriptors) -> RingState {
        // Asked before the lock on the rest is taken, because it takes the same one.
        let size = self.size();
        let vring = self.vring.get_ref();
        RingState {
            size,
            addresses: self.addresses.map(|at| [at.descriptors, at.available, at.used]),
            base: self.has_base.then(|| vring.get_queue().state().next_avail),
            told_base: self.told_base,
            started: self.started,
            enabled: vring.is_enabled(),
            kick: vring.get_kick().as_ref().map(|kick| descriptors.add(kick)),
            call: vring.get_call().as_ref().map(|call| descriptors.add(call)),
            error: self.error.as_ref().map(|error| descriptors.add(error)),
            used_log: self.used_log,
        }
    }

    /// A ring as it was with a predecessor.
    ///
    /// # Errors
    /// When it is larger than allowed here, or descriptors are missing.
    pub(super) fn restore(&mut self, state: &RingState, received: &mut Received) -> Result<()> {
        if let Some(size) = state.size {
            self.set_size(size)?;
        }
        self.addresses = state.addresses.map(|[descriptors, available, used]| Addresses {
            descriptors,
            available,
            used,
        });
        if let Some(base) = state.base {
            self.set_base(base);
        }
        self.told_base = state.told_base;
        if state.started {
            self.set_kick(received.take(state.kick)?);
        }
        self.set_call(received.take(state.call)?);
        self.set_error(received.take(state.error)?);
        self.set_enabled(state.enabled);
        self.used_log = state.used_log;
        Ok(())
    }

    /// Whether the front-end has said everything that is needed to serve it.
    pub(super) fn is_described(&self) -> bool {
        self.started && self.has_size && self.has_base && self.addresses.is_some()
    }

    /// The ring for a worker; `None` while its memory is not there.
    ///
    /// # Errors
    /// When the addresses are not aligned, or no descriptors are left.
    pub(super) fn setup(
        &self,
        memory: &MemoryTable,
        event_idx: bool,
        has_flush: bool,
    ) -> Result<Option<RingSetup>> {
        let Some(Addresses { descriptors, available, used }) = self.addresses else {
            return Ok(None);
        };
        let guest = [descriptors, available, used].map(|address| memory.translate(address));
        let [Some(descriptors), Some(available), Some(used)] = guest else { return Ok(None) };
        self.vring
            .set_queue_info(descriptors, available, used)
            .map_err(|error| Error::refused("ring", error.to_string()))?;
        self.vring.set_queue_event_idx(event_idx);
        self.vring.set_queue_ready(true);
        let copied = |error| Error::io("copying a ring's descriptors", error);
        let vring = self.vring.get_ref();
        let kick = vring.get_kick().as_ref().map(|kick| kick.try_clone()).transpose();
        let call = vring.get_call().as_ref().map(|call| call.try_clone()).transpose();
        Ok(Some(RingSetup {
            state: vring.get_queue().state(),
            kick: kick.map_err(copied)?,
            call: call.map_err(copied)?,
            error: self.error().map_err(copied)?,
            has_flush,
            inflight: None,
        }))
    }
}
