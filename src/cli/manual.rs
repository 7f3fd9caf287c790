//! Manual pages and completions, from the same definitions as the command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Arguments;
use crate::error::{Error, Result};

/// The arguments of `man`.
#[derive(Debug, Clone, Args)]
pub struct Man {
    /// The directory that the pages are written to; it must exist
    directory: PathBuf,
}

impl Man {
    /// Writes a page for the program and one for each verb.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let written = clap_mangen::generate_to(Arguments::command(), &self.directory);
        let name = self.directory.display().to_string();
        written.map(|()| 0).map_err(|error| Error::io(name, error))
    }
}

/// The arguments of `completions`.
#[derive(Debug, Clone, Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// Prints a script that teaches the shell the program's arguments.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let mut command = Arguments::command();
        let name = command.get_name().to_owned();
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        super::image::print(&String::from_utf8_lossy(&script)).map(|()| 0)
    }
}
