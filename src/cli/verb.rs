//! What the program does instead of serving an image: the verbs.

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Subcommand};

use crate::cli::Arguments;
use crate::cli::ctl;
use crate::cli::image::amend::Amend;
use crate::cli::image::bitmap::Bitmap;
use crate::cli::image::check::Check;
use crate::cli::image::commit::Commit;
use crate::cli::image::compare::Compare;
use crate::cli::image::convert::Convert;
use crate::cli::image::create::Create;
use crate::cli::image::dd::Dd;
use crate::cli::image::finish;
use crate::cli::image::info::Info;
use crate::cli::image::map::Map;
use crate::cli::image::measure::Measure;
use crate::cli::image::rebase::Rebase;
use crate::cli::image::resize::Resize;
use crate::cli::image::snapshot::Snapshot;
use crate::cli::inside::cat::Cat;
use crate::cli::inside::copy_out::CopyOut;
use crate::cli::inside::ls::Ls;
use crate::cli::inside::partitions::Partitions;
use crate::cli::inside::stat::Stat;
use crate::cli::manual::{Completions, Man};

/// A verb with its arguments.
#[derive(Debug, Clone, Subcommand)]
pub enum Verb {
    /// Tell what an image is: size, format, backing file, snapshots, bitmaps
    Info(Info),
    /// Look for contradictions and leaks in an image, and repair them
    Check(Check),
    /// Tell where the disk's bytes are, layer by layer
    Map(Map),
    /// Tell how large the file of a new image or of a copy becomes
    Measure(Measure),
    /// Tell whether two images hold the same bytes
    Compare(Compare),
    /// Copy disks into another file, format or layout
    Convert(Convert),
    /// Make an image
    Create(Create),
    /// Make a disk larger or smaller
    Resize(Resize),
    /// List, take, apply and delete internal snapshots
    Snapshot(Snapshot),
    /// Write what an overlay holds into its backing file
    Commit(Commit),
    /// Give an overlay another backing file
    Rebase(Rebase),
    /// Change the version and other properties of an image
    Amend(Amend),
    /// Add, remove, clear, enable, disable and merge dirty bitmaps
    Bitmap(Bitmap),
    /// Copy a part of a disk into a new image
    Dd(Dd),
    /// Tell what partitions a disk has, or make a partition table
    Partitions(Partitions),
    /// List files inside a disk
    Ls(Ls),
    /// Print a file inside a disk
    Cat(Cat),
    /// Tell what is known of a file inside a disk
    Stat(Stat),
    /// Copy files from inside a disk to the host
    CpOut(CopyOut),
    /// Ask a running daemon something, or change its disk
    Ctl(ctl::Arguments),
    /// Write manual pages, one for each verb, into a directory
    Man(Man),
    /// Print the script that lets a shell complete this program's arguments
    Completions(Completions),
}

/// Tells what is wrong with the command line; returns the program's exit status. A verb's statuses
/// mean something: 2 would say that an image is corrupt.
pub fn misused(error: &clap::Error) -> ExitCode {
    // There is nobody left to tell if this fails.
    let _ = error.print();
    let first = std::env::args().nth(1).unwrap_or_default();
    let is_verb = Arguments::command().get_subcommands().any(|verb| verb.get_name() == first);
    match (error.use_stderr(), first.as_str()) {
        (false, _) => ExitCode::SUCCESS,
        (true, "compare" | "ctl") => ExitCode::from(2),
        (true, _) if is_verb => ExitCode::FAILURE,
        (true, _) => ExitCode::from(2),
    }
}

impl Verb {
    /// Does it; returns the program's exit status, which is qemu-img's.
    pub fn run(&self) -> ExitCode {
        match self {
            Self::Info(verb) => finish(verb.run(), 1),
            Self::Check(verb) => finish(verb.run(), 1),
            Self::Map(verb) => finish(verb.run(), 1),
            Self::Measure(verb) => finish(verb.run(), 1),
            Self::Compare(verb) => finish(verb.run(), 2),
            Self::Convert(verb) => finish(verb.run(), 1),
            Self::Create(verb) => finish(verb.run(), 1),
            Self::Resize(verb) => finish(verb.run(), 1),
            Self::Snapshot(verb) => finish(verb.run(), 1),
            Self::Commit(verb) => finish(verb.run(), 1),
            Self::Rebase(verb) => finish(verb.run(), 1),
            Self::Amend(verb) => finish(verb.run(), 1),
            Self::Bitmap(verb) => finish(verb.run(), 1),
            Self::Dd(verb) => finish(verb.run(), 1),
            Self::Partitions(verb) => finish(verb.run(), 1),
            Self::Ls(verb) => finish(verb.run(), 1),
            Self::Cat(verb) => finish(verb.run(), 1),
            Self::Stat(verb) => finish(verb.run(), 1),
            Self::CpOut(verb) => finish(verb.run(), 1),
            Self::Ctl(call) => finish(ctl::run(call).map(|result| printed(&result)), 1),
            Self::Man(verb) => finish(verb.run(), 1),
            Self::Completions(verb) => finish(verb.run(), 1),
        }
    }
}

/// Prints a daemon's answer; returns the exit status. Who has stopped reading, as `head` does,
/// wants no more.
fn printed(result: &str) -> u8 {
    writeln!(std::io::stdout(), "{result}").map_or(1, |()| 0)
}
