//! Helpers of the integration tests.
//!
//! A test lays out images with [`images`] in a [`scratch`] directory, serves one with [`daemon`],
//! and attaches a front-end: the host-side virtio driver of [`client`], that of [`frontend`], which
//! outlives its daemon, or a virtual machine of [`guest`], which [`qmp`] steers and whose first
//! program may be that of [`initramfs`]. [`model`] knows what every sector may hold; [`workload`]
//! drives random requests through a client and holds each answer against the model; [`bulk`]
//! writes and reads large ranges.

pub mod bulk;
pub mod client;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod frontend;
pub mod guest;
pub mod images;
pub mod initramfs;
pub mod model;
pub mod qmp;
pub mod scratch;
pub mod workload;
