//! The one structure that reads without a lock, under [loom](https://docs.rs/loom), which tries
//! every value that a load may return by the rules of the memory orders in use.
//!
//! Like `tests/schedules`, this compiles the daemon's own source beside a [`sync`] module of its
//! own. It is slower by far, so it asks less: whether the fences of a look at a cached slice keep
//! what they must. What counts on sequentially consistent atomics (the ready bits of tasks, the
//! epochs) is in `tests/schedules` alone: loom takes those for acquire and release, and would
//! report failures that cannot happen.

pub mod qcow2;
pub mod sync;

pub use vhost_user_qcow2::{error, exec, storage};
