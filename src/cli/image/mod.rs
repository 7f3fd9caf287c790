//! The image tool: qemu-img's verbs over the same image layer that the daemon serves from. Each
//! verb is a thin file here; what it does with images is in [`crate::image`].

pub(super) mod amend;
pub(super) mod bitmap;
pub(super) mod check;
pub(super) mod commit;
pub(super) mod compare;
pub(super) mod convert;
pub(super) mod create;
pub(super) mod dd;
mod human;
pub(super) mod info;
pub(super) mod map;
pub(super) mod measure;
mod options;
pub(super) mod rebase;
pub(super) mod resize;
pub(super) mod snapshot;
mod target;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::cli::ImageFormat;
use crate::cli::interrupt::Interrupts;
use crate::cli::serve::complaint;
use crate::error::{Error, Result};
use crate::image::{Format, OpenOptions};
use crate::storage::files::{Files, Options as FileOptions};
use crate::storage::host::{self, Aio};
use crate::storage::{Engine, block_on};
use crate::sync::Arc;

/// How an image is opened, for every verb.
#[derive(Debug, Clone, Args)]
pub(super) struct Opening {
    /// The image's format; a raw image is never guessed
    #[arg(long, short, value_enum)]
    format: Option<ImageFormat>,

    /// The format of backing files whose format is not recorded
    #[arg(long, value_enum)]
    backing_format: Option<ImageFormat>,

    /// Let images refer to files in this directory as well as in their own; repeatable
    #[arg(long, value_name = "DIR")]
    allow_path: Vec<PathBuf>,

    /// Refuse to change anything
    #[arg(long)]
    read_only: bool,
}

/// For verbs that only look.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Sharing {
    /// Look at an image that somebody else writes to, without a lock; what is found may be stale
    #[arg(long, short = 'U')]
    force_share: bool,
}

impl Sharing {
    /// Whether to look without a lock.
    pub(super) fn force_share(self) -> bool {
        self.force_share
    }
}

/// What a verb prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people
    Human,
    /// For programs, with qemu-img's keys
    Json,
}

impl Sharing {
    /// Whether nothing is locked.
    fn is_forced(self) -> bool {
        self.force_share
    }
}

impl Opening {
    /// What the image layer is told.
    pub(super) fn options(&self) -> OpenOptions {
        OpenOptions {
            format: self.format.map(Format::from),
            read_only: self.read_only,
            allow_paths: self.allow_path.clone(),
            backing_format: self.backing_format.map(Format::from),
            ..OpenOptions::default()
        }
    }

    /// The same for an image that is only looked at.
    pub(super) fn looking(&self) -> OpenOptions {
        OpenOptions { read_only: true, ..self.options() }
    }
}

/// The host's files and the engine that reaches them. Locks on files end with it.
struct Tool {
    files: Arc<Files>,
    engine: Box<dyn Engine>,
}

impl Tool {
    /// Files that are locked when they are opened.
    fn new() -> Result<Self> {
        Self::with(FileOptions::default())
    }

    /// Files that are only looked at, locked unless they are shared by force.
    fn looking(sharing: Sharing) -> Result<Self> {
        Self::with(FileOptions { lock: !sharing.force_share, ..FileOptions::default() })
    }

    fn with(options: FileOptions) -> Result<Self> {
        let files = Files::new(options);
        let engine = host::engine(Aio::Auto, &files, 0)?;
        Ok(Self { files, engine })
    }

    /// Runs `future`, which uses the engine, to its end.
    fn run<F: Future>(&self, future: F) -> F::Output {
        block_on(&*self.engine, future)
    }
}

/// Says that a change of an image was interrupted, and what that means; returns the exit status.
fn stopped(image: &Path, interrupts: &Interrupts) -> u8 {
    eprintln!(
        "vhost-user-qcow2: {}: interrupted; the disk reads as before, and the same command goes on",
        image.display()
    );
    interrupts.status().unwrap_or(1)
}

/// Writes to standard output. Nobody has to read it all.
///
/// # Errors
/// When it cannot be written, but for a reader that has gone.
pub(super) fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("writing the answer", error))
        }
        _ => Ok(()),
    }
}

/// Writes JSON as qemu-img does, indented.
pub(super) fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// The exit status of a verb; an error is one line on standard error and `failure`.
pub(super) fn finish(done: Result<u8>, failure: u8) -> ExitCode {
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("{}", complaint(&error));
            ExitCode::from(failure)
        }
    }
}
