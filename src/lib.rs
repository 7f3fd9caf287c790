//! A vhost-user-blk daemon that serves qcow2 and raw images to virtual machines.
pub mod bytes;
pub mod error;
pub mod exec;
pub mod image;
pub mod qcow2;
pub mod raw;
pub mod storage;
pub mod sync;
