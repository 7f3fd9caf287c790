//! What a queue is asked for, one request after the other.

use std::time::{Duration, Instant};

use crate::client::{Kind, Request};

/// In which order blocks are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Any block at any time, until the time is over.
    Random,
    /// Each block once, in an order drawn by chance: the same work for both servers.
    Permuted,
    /// Each block once, from the first to the last.
    Sequential,
}

/// What is asked of a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) kind: Kind,
    pub(crate) order: Order,
    /// Bytes of one request.
    pub(crate) block: u64,
    /// The part of the disk that is visited, in bytes from its start.
    pub(crate) span: u64,
    /// Whether each write is followed by a flush of the same slot.
    pub(crate) flush: bool,
}

impl Load {
    /// Blocks of 4 KiB anywhere in the first `span` bytes.
    pub(crate) fn random(kind: Kind, span: u64) -> Self {
        Self { kind, order: Order::Random, block: 4096, span, flush: false }
    }

    /// Whether it is a fixed amount of work rather than work for some time.
    pub(crate) fn is_whole(&self) -> bool {
        self.order != Order::Random
    }

    /// The requests of one queue.
    pub(crate) fn plan(
        self,
        seed: u64,
        depth: usize,
        time: Duration,
    ) -> impl FnMut(usize, Instant) -> Option<Request> + Send {
        let blocks = self.span / self.block;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut order: Vec<u32> = Vec::new();
        if self.order == Order::Permuted {
            order.extend(0..u32::try_from(blocks).expect("a working set of few blocks"));
            random.shuffle(&mut order);
        }
        let mut next = 0;
        let mut wrote = vec![false; depth];
        let end = Instant::now() + time;
        move |slot, now| {
            if self.flush && wrote[slot] {
                wrote[slot] = false;
                return Some(Request { kind: Kind::Flush, offset: 0, length: 0 });
            }
            let block = match self.order {
                Order::Random if now < end => random.u64(0..blocks),
                Order::Random => return None,
                Order::Permuted => u64::from(*order.get(next)?),
                Order::Sequential if (next as u64) < blocks => next as u64,
                Order::Sequential => return None,
            };
            next += 1;
            wrote[slot] = true;
            Some(Request { kind: self.kind, offset: block * self.block, length: self.block })
        }
    }
}
