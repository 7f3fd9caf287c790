//! What we say to a front-end unasked: that the configuration space has changed.
//!
//! The front-end passes one end of a socket pair (SET_BACKEND_REQ_FD). The one message sent there
//! is BACKEND_CONFIG_CHANGE_MSG, and never with NEED_REPLY: a front-end answers it by asking for
//! the configuration space, on the connection that this very thread serves.
//!
//! A front-end may ignore the message while its device does not run, and one that connects again
//! does not ask for what it believes to know. So the session remembers which capacity each has read
//! last, and repeats the message when a device starts that may believe in another one.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{BackendReq, VhostUserProtocolFeatures};

use crate::error::Result;
use crate::vhost::handover::{ChannelState, Descriptors, Received};
use crate::vhost::ring::Ring;
use crate::vhost::session::Session;
use crate::worker::poller::send_now;

/// The version of the protocol, in the two lowest bits of the flags.
const VERSION: u32 = 1;
/// Bytes of the capacity, the first field of the configuration space.
const CAPACITY_BYTES: u32 = 8;

/// The message: request, flags, and no payload.
fn config_change() -> Vec<u8> {
    [BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, 0].map(u32::to_ne_bytes).concat()
}

/// What is known of the front-end's idea of the disk's size.
#[derive(Debug, Default)]
pub(super) struct BackendChannel {
    socket: Option<OwnedFd>,
    /// The capacity in bytes that it has read last on this connection.
    read: Option<u64>,
    /// The capacity in bytes that it was told of last.
    told: Option<u64>,
}

impl BackendChannel {
    /// The channel for a successor.
    pub(super) fn save(&self, descriptors: &mut Descriptors) -> ChannelState {
        let socket = self.socket.as_ref().map(|socket| descriptors.add(socket));
        ChannelState { socket, read: self.read, told: self.told }
    }

    /// The channel that a predecessor had.
    ///
    /// # Errors
    /// When its descriptor did not come.
    pub(super) fn restore(state: &ChannelState, received: &mut Received) -> Result<Self> {
        let socket = received.take(state.socket)?.map(OwnedFd::from);
        Ok(Self { socket, read: state.read, told: state.told })
    }

    /// Whether the front-end can be told of changes.
    pub(super) fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// Whether the front-end may believe in another capacity than `size` bytes.
    fn is_behind(&self, size: u64) -> bool {
        match self.read {
            Some(read) => read != size,
            // It has connected again, perhaps after the end of a predecessor who knew another size.
            None => self.told != Some(size),
        }
    }

    /// Says that the configuration space has changed, if it may not know that the disk has `size`
    /// bytes.
    fn announce(&mut self, size: u64) {
        if !self.is_behind(size) {
            return;
        }
        let Some(socket) = &self.socket else { return };
        let message = config_change();
        let sent = match send_now(socket, &message) {
            Ok(sent) if sent == message.len() => Ok(true),
            Ok(_) => Err(io::Error::from(ErrorKind::WriteZero)),
            // What it has not read yet says the same.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        };
        match sent {
            Ok(true) => {
                tracing::debug!("a front-end is told that the disk has {size} bytes");
                self.told = Some(size);
            }
            Ok(false) => tracing::warn!("a front-end does not read what it is told"),
            Err(error) => {
                tracing::warn!("a front-end cannot be told of changes any more: {error}");
                self.socket = None;
            }
        }
    }
}

impl Session {
    /// Takes the descriptor that came with SET_BACKEND_REQ_FD.
    ///
    /// # Errors
    /// When the front-end has not agreed to use it, or there is none.
    pub(super) fn set_channel(
        &mut self,
        file: Option<File>,
    ) -> std::result::Result<(), &'static str> {
        if self.protocol & VhostUserProtocolFeatures::BACKEND_REQ.bits() == 0 {
            return Err("its protocol feature was not acknowledged");
        }
        let file = file.ok_or("no descriptor came with it")?;
        self.channel.socket = Some(OwnedFd::from(file));
        // Some front-ends pass it when the device runs already.
        if self.rings.iter().any(Ring::is_enabled) {
            self.announce();
        }
        Ok(())
    }

    /// Tells the front-end of the disk's size, unless it knows.
    pub(super) fn announce(&mut self) {
        let size = self.export.device().image().size();
        self.channel.announce(size);
    }

    /// Remembers that the front-end has read a part of the configuration space.
    pub(super) fn note_config_read(&mut self, offset: u32, len: u32) {
        if offset == 0 && len >= CAPACITY_BYTES {
            self.channel.read = Some(self.export.device().image().size());
        }
    }
}
