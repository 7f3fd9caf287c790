//! What the options' values may be, and what they stand for.

use clap::ValueEnum;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::blk::SERIAL_BYTES;
use crate::blk::rates::RateLimits;
use crate::error::Error;
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

pub(super) fn rates(text: &str) -> std::result::Result<RateLimits, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

pub(super) fn queue_size(text: &str) -> Result<u16, String> {
    let size: Option<u16> = text.parse().ok();
    let allowed = |size: &u16| size.is_power_of_two() && (2..=32768).contains(size);
    size.filter(allowed).ok_or_else(|| "it must be a power of two from 2 to 32768".to_owned())
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_BYTES {
        return Err(format!("it has {} bytes, {SERIAL_BYTES} are allowed", text.len()));
    }
    Ok(text.to_owned())
}

/// Numbers of processors, in the order in which workers get them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processors(pub Vec<usize>);

/// A list of processors as taskset and the kernel write it: numbers and ranges between commas.
pub(super) fn processors(text: &str) -> Result<Processors, String> {
    let wrong = || format!("{text:?} is no list of processors; write numbers and ranges: 0-3,7");
    let number = |word: &str| word.parse().ok().filter(|number: &usize| *number < CpuSet::count());
    let mut list = Vec::new();
    for word in text.split(',') {
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let ends = number(first).zip(number(last)).filter(|(first, last)| first <= last);
        let (first, last) = ends.ok_or_else(wrong)?;
        list.extend(first..=last);
    }
    Ok(Processors(list))
}

impl Processors {
    /// Keeps this thread, and those that it starts, on the processor of one worker.
    ///
    /// # Errors
    /// When the machine has no such processor, or this process may not use it.
    pub(super) fn keep_to(&self, worker: usize) -> crate::error::Result<()> {
        let Some(processor) = self.0.get(worker % self.0.len().max(1)) else { return Ok(()) };
        let mut set = CpuSet::new();
        let kept = set.set(*processor).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
        kept.map_err(|error| Error::io(format!("--cpus: processor {processor}"), error.into()))
    }

    /// Finds out whether all of them can be used, without staying on any.
    ///
    /// # Errors
    /// Names the first that cannot.
    pub(super) fn check(&self) -> crate::error::Result<()> {
        let all = || (0..self.0.len()).try_for_each(|worker| self.keep_to(worker));
        let checked = std::thread::scope(|scope| scope.spawn(all).join());
        checked.expect("nothing in it panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        for (text, list) in [("0", vec![0]), ("0-3,7", vec![0, 1, 2, 3, 7]), ("5,1-1", vec![5, 1])]
        {
            assert_eq!(processors(text), Ok(Processors(list)), "{text}");
        }
        for text in ["", "a", "1-", "-1", "2-1", "1,,2", "0-99999999", "1 "] {
            assert!(processors(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn workers_take_turns_on_the_processors_and_a_missing_one_is_named() {
        let first = Processors(vec![0]);
        first.check().expect("the first processor can be used");
        let kept = std::thread::spawn(move || {
            first.keep_to(7)?;
            let set = nix::sched::sched_getaffinity(Pid::from_raw(0)).expect("its processors");
            let allowed = |processor: &usize| set.is_set(*processor).expect("a number");
            Ok::<_, Error>((0..CpuSet::count()).filter(allowed).collect::<Vec<_>>())
        });
        assert_eq!(kept.join().expect("no panic").expect("it can be kept"), [0]);
        let far = CpuSet::count() - 1;
        let error = Processors(vec![0, far]).check().expect_err("no machine has so many");
        assert!(error.to_string().contains(&far.to_string()), "{error}");
    }
}
