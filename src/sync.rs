//! The locks and atomics that the shared structures use, under one name.
//!
//! Everything shared between workers imports from here and from nowhere else, so that a model
//! checker's types can take their place: `tests/schedules` and `tests/memory-order` compile the
//! same source files beside a `sync` module of their own.

pub use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
pub use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

/// log2 of the fan-out of trees of atomics that fill as they are used. It stands here because a
/// model checker records the history of every atomic and gets by with a handful.
pub const FAN_OUT_BITS: u32 = 12;

/// Locks `mutex`; a panic of another holder does not spread, since every structure here is
/// consistent between statements (a failed step poisons the image, not the lock).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A value on cache lines of its own, so that its writer does not slow its neighbours' readers.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct CacheLine<T>(pub T);
