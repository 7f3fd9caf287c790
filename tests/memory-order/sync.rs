//! What the daemon's `sync` has, with the checker's types.

pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
pub use loom::sync::{Mutex, MutexGuard};
// The checker has none. Cells are filled here before a second thread starts.
pub use std::sync::OnceLock;

/// Trees of eight leaves: the checker records every atomic.
pub const FAN_OUT_BITS: u32 = 1;

/// Locks `mutex`.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
