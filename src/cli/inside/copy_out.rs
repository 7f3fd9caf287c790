//! `cp-out`: files of the guest's to the host.

use std::path::PathBuf;

use clap::Args;

use crate::cli::inside::{Looking, Place};
use crate::cli::serve::complaint;
use crate::error::Result;
use crate::inside::copy::{Omission, Options, copy_out};

const EXAMPLES: &str = "\
Permissions and times are kept. Owners are not, nor are set-uid, set-gid and sticky bits: the files
belong to whoever copies. Devices, sockets and named pipes are left out. Nothing is written outside
of the target, whatever names are in the image.

Exit status: 0 all was copied, 1 something could not be.

Examples:
  vhost-user-qcow2 cp-out disk.qcow2:1 /etc/fstab .
  vhost-user-qcow2 cp-out -R disk.qcow2:root /var/log logs";

/// The arguments of `cp-out`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct CopyOut {
    #[command(flatten)]
    place: Place,

    /// The file or directory in the image
    path: String,

    /// Where to: into it, if it is a directory, else as it
    target: PathBuf,

    /// A directory with all that is in it; symbolic links are copied as links
    #[arg(long, short = 'R')]
    recursive: bool,

    /// Replace files that are there already
    #[arg(long)]
    force: bool,

    /// Say nothing of what is left out
    #[arg(long, short)]
    quiet: bool,

    #[command(flatten)]
    looking: Looking,
}

impl CopyOut {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When nothing could be copied, or the host cannot write.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let filesystem = self.looking.filesystem(&self.place)?;
        let options = Options { recursive: self.recursive, replace: self.force };
        let mut tell = |left: Omission| {
            if !left.skipped || !self.quiet {
                eprintln!("{}", complaint(&left.why));
            }
        };
        let path = self.path.as_bytes();
        let copied = copy_out(&filesystem, path, &self.target, options, &mut tell)?;
        Ok(u8::from(copied.failed > 0))
    }
}
