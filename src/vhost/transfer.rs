//! The device's own state on its way into a snapshot and back (vhost-user, "Migrating back-end
//! state"): there is none. What a disk is to its guest lies in the image and in the rings.

use std::fs::File;
use std::io::{ErrorKind, Read};

use vhost::vhost_user::Result as Answer;
use vhost::vhost_user::message::VhostTransferStateDirection as Direction;

use crate::error::{Error, Result};
use crate::vhost::session::{Session, refuse};
use crate::worker::poller::{is_readable, set_nonblocking};

/// How long the end of a state is waited for when the front-end asks whether it was taken, in
/// milliseconds. It asks after it has closed its end, so there is nothing to wait for.
const PATIENCE_MS: i32 = 100;

impl Session {
    /// Takes the channel of a transfer. A state that is saved ends before it begins.
    ///
    /// # Errors
    /// When a ring is served.
    pub(super) fn begin_transfer(&mut self, direction: Direction, file: File) -> Answer<()> {
        self.entered = true;
        self.loading = None;
        if self.is_serving() {
            let why = "the device must be stopped first";
            return Err(refuse(Error::refused("transfer of the device's state", why)));
        }
        if direction == Direction::LOAD {
            self.loading = Some(file);
        }
        Ok(())
    }

    /// Whether the last transfer went well.
    ///
    /// # Errors
    /// When a state was loaded that is not this device's.
    pub(super) fn end_transfer(&mut self) -> Answer<()> {
        self.entered = true;
        match self.loading.take() {
            Some(file) => expect_nothing(file).map_err(refuse),
            None => Ok(()),
        }
    }
}

/// Reads a state that must be empty.
fn expect_nothing(mut file: File) -> Result<()> {
    let what = "loading the device's state";
    // The channel's other end belongs to the front-end, this one was given away.
    set_nonblocking(&file).map_err(|error| Error::io(what, error))?;
    if !is_readable(&file, PATIENCE_MS) {
        return Err(Error::refused(what, "it does not end"));
    }
    match file.read(&mut [0; 16]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Error::refused(what, "it is not empty, so it is another device's")),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(Error::refused(what, "it does not end"))
        }
        Err(error) => Err(Error::io(what, error)),
    }
}
