//! The front-ends' side: a socket, connections, and the messages on them.
//!
//! Section names are those of the vhost-user specification. One thread does all of this; it sleeps
//! until a front-end connects, says something, or the process is told to end. Any front-end may
//! connect at any time; [`export`] says whose guest is served. [`control`] is for operators.
//! [`successors`] come to take the disk over, and [`handover`] is what they are told.

mod backend_channel;
mod connection;
pub mod control;
pub mod export;
mod handler;
pub mod handover;
mod inflight;
pub mod listen;
mod log;
pub mod memory;
mod message;
mod ring;
mod server;
pub mod session;
pub mod successors;
pub mod terms;
mod transfer;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vhost::control::Control;
use crate::vhost::export::Export;
use crate::vhost::handover::Connections;
use crate::vhost::listen::{Entrance, Listener};
use crate::vhost::server::Server;
use crate::vhost::successors::Successors;
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
    let listener = match entrance {
        Entrance::Listening(listener) => Some(listener),
        Entrance::Connected(_) | Entrance::Occupied => None,
    };
    run(listener, entrance.connected()?, export, stop, terms, control)
}

fn run<'a>(
    listener: Option<&'a Listener>,
    socket: Option<UnixStream>,
    export: &'a Arc<Export>,
    stop: &impl AsRawFd,
    terms: &Terms,
    mut control: Option<Box<dyn Control + 'a>>,
) -> Result<()> {
    let control = control.as_mut().map(|control| &mut **control as &mut dyn Control);
    let mut server = Server::new(listener, export, stop, *terms, control).map_err(failed)?;
    socket.map_or(Ok(()), |socket| server.admit(socket)).map_err(failed)?;
    let result = server.run().map_err(failed);
    server.end();
    result.map(drop)
}

fn failed(error: std::io::Error) -> Error {
    Error::io("cannot wait for front-ends", error)
}

/// Why the service has ended.
#[derive(Debug)]
pub enum Ended {
    /// The process was told to end, or nobody is left to serve. No front-end is connected any more.
    Over,
    /// Somebody wants to take the disk over. Rings are still served.
    Successor(UnixStream, Connections),
}

/// What a service begins with that may be followed by another one.
#[derive(Debug)]
pub struct Beginning<'a> {
    /// Front-ends that are connected already.
    pub connections: Connections,
    /// Where front-ends come from beside them; without one there are only these.
    pub listener: Option<&'a Listener>,
    /// Where a successor comes from.
    pub successors: Option<Successors<'a>>,
}

/// Serves front-ends as [`serve_at`] does, and until somebody wants to take the disk over.
///
/// # Errors
/// When the process has no descriptors left to begin with.
pub fn serve_until<'a>(
    beginning: Beginning<'a>,
    export: &'a Arc<Export>,
    stop: &impl AsRawFd,
    terms: &Terms,
    control: Option<&'a mut (dyn Control + 'a)>,
) -> Result<Ended> {
    let Beginning { connections, listener, successors } = beginning;
    let mut server = Server::new(listener, export, stop, *terms, control).map_err(failed)?;
    server.resume(connections, successors).map_err(failed)?;
    match server.run().map_err(failed) {
        Ok(Some(successor)) => Ok(Ended::Successor(successor, server.leave())),
        ended => {
            server.end();
            ended.map(|_| Ended::Over)
        }
    }
}
