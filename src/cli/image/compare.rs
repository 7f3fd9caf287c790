//! `compare`: whether two images hold the same bytes.

use std::path::PathBuf;

use clap::Args;

use crate::cli::ImageFormat;
use crate::cli::image::{Opening, Sharing, Tool, print};
use crate::cli::progress::Reporting;
use crate::error::Result;
use crate::image::compare::{Difference, compare};
use crate::image::status::BlockMap;
use crate::image::{Format, Image, OpenOptions};

const EXAMPLES: &str = "\
Exit status: 0 they hold the same, 1 they differ, 2 or more one of them cannot be read.

Examples:
  vhost-user-qcow2 compare disk.qcow2 copy.qcow2
  vhost-user-qcow2 compare -f qcow2 -F raw disk.qcow2 disk.raw
  vhost-user-qcow2 compare -s disk.qcow2 copy.qcow2";

/// The arguments of `compare`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Compare {
    /// One image
    first: PathBuf,

    /// The other image
    second: PathBuf,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// The other image's format
    #[arg(long, short = 'F', value_enum)]
    second_format: Option<ImageFormat>,

    /// Sizes must be the same, and the same bytes allocated
    #[arg(long, short)]
    strict: bool,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Compare {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When one of the images cannot be read.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::looking(self.sharing)?;
        let (text, status) = tool.run(self.compare(&tool))?;
        if !self.quiet {
            print(&text)?;
        }
        Ok(status)
    }

    async fn compare(&self, tool: &Tool) -> Result<(String, u8)> {
        let (st, source) = (&*tool.engine, &*tool.files);
        let options = self.opening.looking();
        let first = Image::open(st, source, &self.first, &options).await?;
        let format = self.second_format.map(Format::from);
        let options = OpenOptions { format, ..options };
        let second = Image::open(st, source, &self.second, &options).await?;
        let first = BlockMap::new(st, &first).await?;
        let second = BlockMap::new(st, &second).await?;
        let mut steps = self.reporting.steps("compare", self.quiet);
        let mut progress = |done, of| steps.set(done, of);
        let disks = (&first, &second);
        let difference = compare(st, disks, self.strict, &mut progress).await?;
        steps.finish();
        let sizes = first.size() != second.size();
        let common = first.size().min(second.size());
        let warning = "Warning: Image size mismatch!\n";
        Ok(match difference {
            None if sizes => (format!("{warning}Images are identical.\n"), 0),
            None => ("Images are identical.\n".to_owned(), 0),
            Some(Difference::Size) => ("Strict mode: Image size mismatch!\n".to_owned(), 1),
            Some(Difference::Status(at)) => {
                (format!("Strict mode: Offset {at} block status mismatch!\n"), 1)
            }
            Some(Difference::Content(at)) => {
                let warning = if at >= common { warning } else { "" };
                (format!("{warning}Content mismatch at offset {at}!\n"), 1)
            }
        })
    }
}
