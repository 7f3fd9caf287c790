//! `commit`: what an overlay holds goes into the image below it.

use std::path::PathBuf;

use clap::Args;

use crate::cli::image::{Opening, Tool, print, stopped};
use crate::cli::interrupt::Interrupts;
use crate::cli::progress::Reporting;
use crate::error::Result;
use crate::image::commit::{self, Commit as How};
use crate::image::watch::Outcome;

const EXAMPLES: &str = "\
The backing file grows if it is smaller. Interrupted or killed at any time, the image still reads
the same; the same command goes on then.

Examples:
  vhost-user-qcow2 commit overlay.qcow2
  vhost-user-qcow2 commit -d overlay.qcow2
  vhost-user-qcow2 commit -b base.qcow2 top.qcow2";

/// The arguments of `commit`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Commit {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    opening: Opening,

    /// Commit everything above this file of the backing chain into it; the images between are worth
    /// nothing afterwards, and the image itself is not emptied
    #[arg(long, short, value_name = "FILE")]
    base: Option<PathBuf>,

    /// Do not empty the image
    #[arg(long, short = 'd')]
    drop: bool,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Commit {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// As [`commit::commit`].
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::new()?;
        let options = self.opening.options();
        // A name in the chain is relative to the image, as it is recorded there.
        let beside = self.image.parent().unwrap_or("".as_ref());
        let base = self
            .base
            .as_ref()
            .map(|base| if base.exists() { base.clone() } else { beside.join(base) });
        let how = How { base: base.as_deref(), keep: self.drop };
        let (st, source) = (&*tool.engine, &*tool.files);
        let interrupts = Interrupts::watch()?;
        let mut steps = self.reporting.steps("commit", self.quiet);
        let mut watch = |done, of| {
            steps.set(done, of);
            interrupts.status().is_none()
        };
        let work = commit::commit(st, source, &self.image, &options, how, &mut watch);
        if tool.run(work)? == Outcome::Stopped {
            drop(steps);
            return Ok(stopped(&self.image, &interrupts));
        }
        steps.finish();
        if !self.quiet {
            print("Image committed.\n")?;
        }
        Ok(0)
    }
}
