//! `cat`: what is in a file.

use std::io::{ErrorKind, Write};

use clap::Args;

use crate::cli::inside::{Looking, Place};
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 cat disk.qcow2:1 /etc/os-release
  vhost-user-qcow2 cat -f raw floppy.img /AUTOEXEC.BAT";

/// The arguments of `cat`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Cat {
    #[command(flatten)]
    place: Place,

    /// The files
    #[arg(required = true)]
    path: Vec<String>,

    #[command(flatten)]
    looking: Looking,
}

impl Cat {
    /// Does it.
    ///
    /// # Errors
    /// When a file cannot be read or written out.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let filesystem = self.looking.filesystem(&self.place)?;
        let mut output = std::io::stdout().lock();
        let mut piece = vec![0; 1 << 20];
        for path in &self.path {
            let mut file = filesystem.open_file(path.as_bytes())?;
            loop {
                let count = file.read(&mut piece)?;
                if count == 0 {
                    break;
                }
                match output.write_all(&piece[..count]) {
                    // Who has stopped reading, as `head` does, wants no more.
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(0),
                    done => done.map_err(|error| Error::io("writing the file out", error))?,
                }
            }
        }
        output.flush().map_err(|error| Error::io("writing the file out", error))?;
        Ok(0)
    }
}
