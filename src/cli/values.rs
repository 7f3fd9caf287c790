//! What the options' values may be, and what they stand for.

use clap::ValueEnum;

use crate::blk::SERIAL_BYTES;
use crate::image::Format;

/// An image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// qcow2, versions 2 and 3
    Qcow2,
    /// The disk's bytes as they are
    Raw,
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Qcow2 => Self::Qcow2,
            ImageFormat::Raw => Self::Raw,
        }
    }
}

/// How the host caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Use the page cache; a write is durable after the guest's next flush
    Writeback,
    /// Go around the page cache (O_DIRECT); a write is durable after the guest's next flush
    None,
    /// Use the page cache; a write is durable when it completes
    Writethrough,
    /// Use the page cache and ignore flushes: a power cut loses the image
    Unsafe,
}

/// How files are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// io_uring where it can be used, else threads
    Auto,
    /// io_uring or nothing
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

/// What becomes of a guest's discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiscardMode {
    /// They are accepted and do nothing, and write-zeroes keeps the host's space
    #[value(alias = "off")]
    Ignore,
    /// The host gets its space back
    #[value(alias = "on")]
    Unmap,
}

/// What becomes of a guest's writes of nothing but zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ZeroesMode {
    /// They are written as any others
    Off,
    /// They become write-zeroes that keep the host's space
    On,
    /// They become write-zeroes that give the host's space back
    Unmap,
}

/// What happens when the host has no space left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FullMode {
    /// The guest gets an error
    Report,
    /// What needs space waits until there is some; the guest sees a disk that takes its time
    Stall,
}

pub(super) fn queue_size(text: &str) -> Result<u16, String> {
    let size: Option<u16> = text.parse().ok();
    let allowed = |size: &u16| size.is_power_of_two() && (4..=32768).contains(size);
    size.filter(allowed).ok_or_else(|| "it must be a power of two from 4 to 32768".to_owned())
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_BYTES {
        return Err(format!("it has {} bytes, {SERIAL_BYTES} are allowed", text.len()));
    }
    Ok(text.to_owned())
}
