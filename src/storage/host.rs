//! Which engine serves the host's files.

use std::io;

use super::Engine;
use super::bounce::Bounce;
use super::files::Files;
use super::stall::{self, Stall};
use super::threads::Threads;
use super::uring::{self, Uring};
use crate::error::{Error, Result};
use crate::sync::{Arc, OnceLock};

/// How system calls that would block are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// io_uring where it can be used, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Threads.
    Threads,
}

/// The engine over `files` for the worker of that lane. Must be called on the worker's own thread.
///
/// # Errors
/// When io_uring was asked for and cannot be used, or the process has no descriptors left.
pub fn engine(aio: Aio, files: &Arc<Files>, lane: usize) -> Result<Box<dyn Engine>> {
    let engine = prompt(aio, files, lane)?;
    if !files.options().stall {
        return Ok(engine);
    }
    let (outage, table) = (Arc::clone(files.outage()), Arc::clone(files));
    let stall = Stall::new(engine, stall::INTERVAL, outage, move |file| table.name(file));
    Ok(Box::new(stall.map_err(|error| Error::io("cannot prepare to wait for space", error))?))
}

/// The engine that answers as soon as the host does.
fn prompt(aio: Aio, files: &Arc<Files>, lane: usize) -> Result<Box<dyn Engine>> {
    let uring = match aio {
        Aio::Threads => false,
        Aio::IoUring => true,
        Aio::Auto => automatic(),
    };
    if uring {
        match Uring::new(files, lane) {
            Ok(engine) => return aligned(engine, files),
            Err(error) if aio == Aio::IoUring => return Err(no_uring(error)),
            Err(error) => tracing::warn!("no io_uring for worker {lane} ({error}): uses threads"),
        }
    }
    let failed = |error| Error::io("cannot prepare the storage threads", error);
    aligned(Threads::new(files, lane).map_err(failed)?, files)
}

fn aligned<E: Engine + 'static>(engine: E, files: &Arc<Files>) -> Result<Box<dyn Engine>> {
    if !files.options().direct {
        return Ok(Box::new(engine));
    }
    let failed = |error| Error::io("cannot prepare direct I/O", error);
    Ok(Box::new(Bounce::new(engine, Arc::clone(&files.locks)).map_err(failed)?))
}

fn no_uring(error: io::Error) -> Error {
    Error::io(
        "io_uring cannot be used (see kernel.io_uring_disabled and seccomp filters; \
         --aio threads does without)",
        error,
    )
}

/// Looks once for all workers.
fn automatic() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| match uring::available() {
        Ok(()) => {
            tracing::info!("storage uses io_uring");
            true
        }
        Err(error) => {
            tracing::info!("storage uses threads, since io_uring cannot be used: {error}");
            false
        }
    })
}
