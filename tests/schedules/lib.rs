//! The shared structures under [shuttle](https://docs.rs/shuttle), which runs a scenario again and
//! again and decides at every lock and atomic which thread goes on.
//!
//! The source files are those of the daemon: compiled once more, here, beside a [`sync`] module
//! whose locks and atomics are the checker's. So the daemon's own code knows nothing of this, and
//! no flag compiles it differently. A scenario is a function that starts some threads, asserts what
//! must hold, and must come to an end: a thread that nothing will wake is reported as a deadlock.
//!
//! The checker knows sequentially consistent memory only. The places that depend on weaker orders
//! than that are in `tests/memory-order`.

#[path = "../../src/exec.rs"]
pub mod exec;
pub mod explore;
#[path = "../../src/flush_gate.rs"]
mod flush_gate;
pub mod qcow2;
pub mod sync;
pub mod tasks;

pub use vhost_user_qcow2::{error, storage};
