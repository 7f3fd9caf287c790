//! `resize`: a larger or smaller disk.

use std::path::PathBuf;

use clap::Args;

use crate::cli::image::options::preallocation;
use crate::cli::image::{Opening, Tool, print};
use crate::cli::progress::Reporting;
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image;
use crate::image::inspect::inspect;
use crate::image::offline::take_tail;
use crate::qcow2::create::Preallocation;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 resize disk.qcow2 20G
  vhost-user-qcow2 resize disk.qcow2 +5G
  vhost-user-qcow2 resize --shrink disk.qcow2 -1G
  vhost-user-qcow2 resize -f raw --preallocation=falloc disk.raw 20G";

/// The arguments of `resize`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Resize {
    /// The image
    image: PathBuf,

    /// The disk's new size, or with + or - in front how much larger or smaller it becomes
    #[arg(allow_hyphen_values = true, value_name = "[+|-]SIZE", value_parser = change)]
    size: Change,

    #[command(flatten)]
    opening: Opening,

    /// The disk may become smaller, and what lies behind its new end is lost
    #[arg(long)]
    shrink: bool,

    /// What is prepared of the new part of a raw image: off, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    #[arg(value_parser = mode)]
    preallocation: Preallocation,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

/// How a size changes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    To(u64),
    By(u64),
    Minus(u64),
}

fn change(text: &str) -> std::result::Result<Change, String> {
    match text.split_at_checked(1) {
        Some(("+", rest)) => size::parse(rest).map(Change::By),
        Some(("-", rest)) => size::parse(rest).map(Change::Minus),
        _ => size::parse(text).map(Change::To),
    }
}

fn mode(text: &str) -> std::result::Result<Preallocation, String> {
    preallocation(text).ok_or_else(|| "there are off, metadata, falloc and full".to_owned())
}

impl Resize {
    /// Does it.
    ///
    /// # Errors
    /// As [`image::resize`].
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let name = || self.image.display().to_string();
        let old = self.look()?;
        let size = match self.size {
            Change::To(size) => Some(size),
            Change::By(bytes) => old.checked_add(bytes),
            Change::Minus(bytes) => old.checked_sub(bytes),
        };
        let Some(size) = size else {
            let why = format!("a disk of {old} bytes cannot change by so much");
            return Err(Error::refused(name(), why));
        };
        let options = self.opening.options();
        let raw = options.format == Some(image::Format::Raw);
        if self.preallocation != Preallocation::Off
            && (!raw || self.preallocation == Preallocation::Metadata)
        {
            let why = "only the new part of a raw image can be prepared (falloc or full); leave \
                       --preallocation out";
            return Err(Error::unsupported(name(), why));
        }
        let tool = Tool::new()?;
        let (st, source) = (&*tool.engine, &*tool.files);
        tool.run(image::resize(st, source, &self.image, &options, (size, self.shrink)))?;
        drop(tool);
        if size > old && self.preallocation != Preallocation::Off {
            let tool = Tool::new()?;
            let (st, source, mode) = (&*tool.engine, &*tool.files, self.preallocation);
            let mut steps = self.reporting.steps("resize", self.quiet);
            let mut progress = |done, of| steps.set(done, of);
            tool.run(take_tail(st, source, &self.image, old, mode, &mut progress))?;
            steps.finish();
        }
        if !self.quiet {
            print("Image resized.\n")?;
        }
        Ok(0)
    }

    /// The disk's size. Locks end with this.
    fn look(&self) -> Result<u64> {
        let tool = Tool::new()?;
        let options = self.opening.looking();
        let found = inspect(&*tool.engine, &*tool.files, &self.image, &options, false);
        Ok(tool.run(found)?.first().map_or(0, |facts| facts.virtual_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_be_relative() {
        assert_eq!(change("1G"), Ok(Change::To(1 << 30)));
        assert_eq!(change("+1M"), Ok(Change::By(1 << 20)));
        assert_eq!(change("-512"), Ok(Change::Minus(512)));
        for text in ["", "+", "--1", "+-1", "x"] {
            change(text).expect_err(text);
        }
    }
}
