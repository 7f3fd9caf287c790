//! What the simulations share.
//!
//! [`images`] makes images in every layout, with [`qemu`] where our own code cannot; [`sectors`]
//! knows which versions each sector of the disk may hold, now and after a power cut; [`workers`]
//! drives random requests through simulated workers and holds every answer against that; [`check`]
//! reads an image's bytes with code of its own and says what is corrupt and what has leaked;
//! [`replay`] follows a trace of what a disk was told; [`memory`] and [`processor`] tell what
//! something costs; [`seeds`] picks the seeds of a run and prints how to repeat one.

pub mod check;
pub mod images;
pub mod memory;
pub mod processor;
pub mod qemu;
pub mod replay;
pub mod sectors;
pub mod seeds;
pub mod workers;
