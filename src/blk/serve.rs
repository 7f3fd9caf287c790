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
#[expect(clippy::manual_async_fn, reason = "an async fn holds each of its arguments twice")]
pub fn serve(cx: Rc<Context>, request: Request, token: Token) -> impl Future<Output = ()> {
    async move {
        let since = cx.clock.now_ns();
        token.begin(since);
        if let Action::Refuse(refusal) = &request.action {
            count(&cx.stats.errors, 1);
            cx.complaints.warn("a request was refused", refusal);
            return token.complete(refusal.status());
        }
        let kind = Kind::of(&request.action);
        let (image, storage, stats) = (cx.device.image(), &*cx.storage, &cx.stats);
        let mut result = match &request.action {
            Action::Read { at, data } => {
                count(&stats.reads, 1);
                count(&stats.read_bytes, data.len() as u64);
                image.read_into(storage, *at, data).await
            }
            Action::Write { at, data } => {
                count(&stats.writes, 1);
                count(&stats.written_bytes, data.len() as u64);
                image.write_from(storage, *at, data).await
            }
            // In a box, so that reads and writes have no use for its memory.
            _ => Box::pin(serve_other(&cx, &request.action)).await,
        };
        if result.is_ok() && request.action.is_change() {
            // Without a write cache what is answered is durable (5.2.6.2), and a driver that does
            // not know FLUSH has no other way to make it so.
            if request.write_through {
                result = Box::pin(image.flush(storage)).await;
            } else if request.outlives {
                // A guest that does not notice our death reads what it was told is written.
                result = Box::pin(image.hand_over(storage)).await;
            }
        }
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
}

/// What is asked for less often than bytes.
async fn serve_other(cx: &Context, action: &Action) -> Result<()> {
    let (image, storage, stats) = (cx.device.image(), &*cx.storage, &cx.stats);
    match action {
        Action::Read { .. } | Action::Write { .. } => unreachable!("the caller serves these"),
        Action::Refuse(_) => {}
        Action::GetId { data } => {
            let len = data.len().min(SERIAL_BYTES);
            data.copy_from(0, &cx.device.settings().serial[..len]);
        }
        Action::Flush => {
            count(&stats.flushes, 1);
            return image.flush(storage).await;
        }
        Action::Discard(segments) => {
            count(&stats.erases, 1);
            for Segment { at, len, .. } in segments {
                image.discard(storage, *at, *len).await?;
            }
        }
        Action::WriteZeroes(segments) => {
            count(&stats.erases, 1);
            for Segment { at, len, unmap } in segments {
                image.write_zeroes(storage, *at, *len, *unmap).await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_output<F>(_: fn(Rc<Context>, Request, Token) -> F) -> usize {
        size_of::<F>()
    }

    /// Each request is moved into its task's slot, and what is not needed for those that find
    /// everything in memory belongs into boxes.
    #[test]
    fn a_request_under_way_is_small() {
        let size = size_of_output(serve);
        assert!(size <= 1024, "{size} bytes are moved for each request");
    }
}
