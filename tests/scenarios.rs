//! Scenarios that every writer of qcow2 has to survive, taken in turns by us and by QEMU's tools:
//! what one of them did, the other reads, checks, and goes on with.
//!
//! `tests/data/README.md` lists them beside the numbers of QEMU's own tests of the same behaviour.

#[path = "scenarios/compression.rs"]
mod compression;
#[path = "scenarios/data_file.rs"]
mod data_file;
#[path = "scenarios/errors.rs"]
mod errors;
#[path = "scenarios/growth.rs"]
mod growth;
#[path = "scenarios/header.rs"]
mod header;
#[path = "scenarios/io.rs"]
mod io;
#[path = "scenarios/locking.rs"]
mod locking;
#[path = "scenarios/preallocation.rs"]
mod preallocation;
#[path = "scenarios/repair.rs"]
mod repair;
#[path = "scenarios/resize.rs"]
mod resize;
#[path = "scenarios/snapshots.rs"]
mod snapshots;
#[path = "scenarios/stage.rs"]
mod stage;
#[path = "scenarios/subclusters.rs"]
mod subclusters;
#[path = "scenarios/zero.rs"]
mod zero;
