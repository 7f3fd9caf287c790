//! One request, from its first look at the image to its answer.

use std::fmt;
use std::rc::Rc;

use crate::blk::complain::Complaints;
use crate::blk::request::{Action, Request, Segment};
use crate::blk::stats::{Clock, Kind, Stats, count};
use crate::blk::token::{Status, Token};
use crate::blk::{Device, SERIAL_BYTES};
use crate::error::Result;
use crate::storage::Engine;
use crate::sync::Arc;

/// What every request of one worker uses.
pub struct Context {
    /// The device that is served.
    pub device: Arc<Device>,
    /// The worker's way to the files.
    pub storage: Rc<dyn Engine>,
    /// What the worker has done.
    pub stats: Stats,
    /// The time as its requests see it.
    pub clock: Clock,
    /// Log lines that guests can cause.
    pub complaints: Complaints,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl Context {
    /// A context for a worker that reaches the files through `storage`.
    pub fn new(device: Arc<Device>, storage: Rc<dyn Engine>) -> Self {
        Self {
            device,
            storage,
            stats: Stats::default(),
            clock: Clock::default(),
            complaints: Complaints::default(),
        }
    }
}

/// Serves one request and answers it.
pub async fn serve(cx: Rc<Context>, request: Request, token: Token) {
    let since = cx.clock.now_ns();
    token.begin(since);
    if let Action::Refuse(refusal) = &request.action {
        count(&cx.stats.errors, 1);
        cx.complaints.warn("a request was refused", refusal);
        return token.complete(refusal.status());
    }
    let kind = Kind::of(&request.action);
    let result = run(&cx, request).await;
    if let Some(kind) = kind {
        cx.stats.took(kind, cx.clock.now_ns().saturating_sub(since));
    }
    match result {
        Ok(()) => token.complete(Status::Ok),
        Err(error) => {
            count(&cx.stats.errors, 1);
            cx.complaints.warn("a request failed", error);
            token.complete(Status::IoError);
        }
    }
}

async fn run(cx: &Context, request: Request) -> Result<()> {
    let (image, storage, stats) = (cx.device.image(), &*cx.storage, &cx.stats);
    match request.action {
        Action::Read { at, data } => {
            count(&stats.reads, 1);
            count(&stats.read_bytes, data.len() as u64);
            return image.read(storage, at, data).await;
        }
        Action::GetId { data } => {
            let len = data.len().min(SERIAL_BYTES);
            data.copy_from(0, &cx.device.settings().serial[..len]);
            return Ok(());
        }
        Action::Flush => {
            count(&stats.flushes, 1);
            return image.flush(storage).await;
        }
        Action::Refuse(_) => return Ok(()),
        Action::Write { at, data } => {
            count(&stats.writes, 1);
            count(&stats.written_bytes, data.len() as u64);
            image.write(storage, at, data).await?;
        }
        Action::Discard(segments) => {
            count(&stats.erases, 1);
            for Segment { at, len, .. } in segments {
                image.discard(storage, at, len).await?;
            }
        }
        Action::WriteZeroes(segments) => {
            count(&stats.erases, 1);
            for Segment { at, len, unmap } in segments {
                image.write_zeroes(storage, at, len, unmap).await?;
            }
        }
    }
    // Without a write cache what is answered is durable (5.2.6.2), and a driver that does not know
    // FLUSH has no other way to make it so.
    if request.write_through {
        return image.flush(storage).await;
    }
    // A guest that does not notice our death reads what it was told is written.
    if request.outlives { image.hand_over(storage).await } else { Ok(()) }
}
