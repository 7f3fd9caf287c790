//! The front-ends' side: a socket, connections, and the messages on them.
//!
//! Section names are those of the vhost-user specification. One thread does all of this; it sleeps
//! until a front-end connects, says something, or the process is told to end. Any front-end may
//! connect at any time; [`export`] says whose guest is served. [`control`] is for operators.

mod backend_channel;
mod connection;
pub mod control;
pub mod export;
mod handler;
mod inflight;
pub mod listen;
mod log;
pub mod memory;
mod message;
mod ring;
mod server;
pub mod session;
pub mod terms;
mod transfer;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vhost::control::Control;
use crate::vhost::export::Export;
use crate::vhost::listen::{Entrance, Listener};
use crate::vhost::server::Server;
use crate::vhost::terms::Terms;

pub use server::MAX_CONNECTIONS;

/// Serves front-ends until `stop` is readable. At the end every ring is drained.
///
/// # Errors
/// When the process has no descriptors left to begin with.
pub fn serve(listener: &Listener, export: &Arc<Export>, stop: &impl AsRawFd) -> Result<()> {
    run(Some(listener), None, export, stop, &Terms::default(), None)
}

/// The same on certain terms, with front-ends from anywhere, and with something to serve beside
/// them. Where there is only one front-end, it may take all the time it likes, and the service ends
/// with it.
///
/// # Errors
/// When the process has no descriptors left to begin with.
pub fn serve_at<'a>(
    entrance: &'a Entrance,
    export: &'a Arc<Export>,
    stop: &impl AsRawFd,
    terms: &Terms,
    control: Option<Box<dyn Control + 'a>>,
) -> Result<()> {
    match entrance {
        Entrance::Listening(listener) => run(Some(listener), None, export, stop, terms, control),
        Entrance::Connected(socket) => {
            let copy = socket.try_clone().map_err(|error| Error::io("a connection", error))?;
            run(None, Some(copy), export, stop, terms, control)
        }
    }
}

fn run<'a>(
    listener: Option<&'a Listener>,
    socket: Option<UnixStream>,
    export: &'a Arc<Export>,
    stop: &impl AsRawFd,
    terms: &Terms,
    control: Option<Box<dyn Control + 'a>>,
) -> Result<()> {
    let failed = |error| Error::io("cannot wait for front-ends", error);
    let mut server = Server::new(listener, export, stop, *terms, control).map_err(failed)?;
    socket.map_or(Ok(()), |socket| server.admit(socket)).map_err(failed)?;
    let result = server.run().map_err(failed);
    server.end();
    result
}
