//! What the daemon's `sync` has, with the checker's types.

pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
pub use shuttle::sync::{Mutex, MutexGuard};
// The checker has none. Who fills a cell first is not asked here, only what the atomics in it say.
pub use std::sync::OnceLock;

/// Trees of 64 leaves: the checker records each atomic.
pub const FAN_OUT_BITS: u32 = 2;

/// Locks `mutex`.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A value; the cache lines of a simulation do not matter.
#[derive(Debug, Default)]
pub struct CacheLine<T>(pub T);
