//! The structures of qcow2 images that are read without a lock.

pub mod looking;
#[path = "../../../src/qcow2/table.rs"]
#[expect(dead_code, reason = "the scenarios look, load and change, and nothing else")]
mod table;
