//! `rebase`: an overlay gets another backing file.

use std::path::PathBuf;

use clap::Args;

use crate::cli::ImageFormat;
use crate::cli::image::{Opening, Tool, stopped};
use crate::cli::interrupt::Interrupts;
use crate::cli::progress::Reporting;
use crate::error::{Error, Result};
use crate::image::rebase::{self, NewBacking};
use crate::image::watch::Outcome;
use crate::image::{Format, OpenOptions};

const EXAMPLES: &str = "\
The disk stays as it is: what the new backing file would show differently is copied into the image.
With -u only the name is changed, and the disk is what the new backing file makes it. Interrupted or
killed at any time, the disk still reads the same; the same command goes on then.

Examples:
  vhost-user-qcow2 rebase -b newer.qcow2 -F qcow2 overlay.qcow2
  vhost-user-qcow2 rebase -b '' overlay.qcow2
  vhost-user-qcow2 rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2";

/// The arguments of `rebase`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Rebase {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    opening: Opening,

    /// The new backing file, relative to the image; an empty name for none
    #[arg(long, short, value_name = "FILE")]
    backing_file: Option<String>,

    /// The new backing file's format
    #[arg(long, short = 'F', value_enum)]
    new_format: Option<ImageFormat>,

    /// Change the name only, and look at neither of the backing files
    #[arg(long = "unsafe", short = 'u')]
    trust: bool,

    /// Compress what is copied
    #[arg(long, short)]
    compress: bool,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only, which is all there is to print
    #[arg(long, short)]
    quiet: bool,
}

impl Rebase {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// As [`rebase::rebase`].
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let name = self.backing_file.clone();
        if name.is_none() && !self.trust {
            let why = "say which backing file it gets (-b FILE, or -b '' for none)";
            return Err(Error::refused(self.image.display().to_string(), why));
        }
        let new = NewBacking {
            name: name.filter(|name| !name.is_empty()),
            format: self.new_format.map(Format::from),
        };
        let tool = Tool::new()?;
        let options = OpenOptions { compress: self.compress, ..self.opening.options() };
        let (st, source, path) = (&*tool.engine, &*tool.files, self.image.as_path());
        if self.trust {
            tool.run(rebase::rebase_unsafe(st, source, path, &options, &new))?;
        } else {
            let interrupts = Interrupts::watch()?;
            let mut steps = self.reporting.steps("rebase", self.quiet);
            let mut watch = |done, of| {
                steps.set(done, of);
                interrupts.status().is_none()
            };
            let work = rebase::rebase(st, source, path, &options, &new, &mut watch);
            if tool.run(work)? == Outcome::Stopped {
                drop(steps);
                return Ok(stopped(path, &interrupts));
            }
            steps.finish();
        }
        Ok(0)
    }
}
