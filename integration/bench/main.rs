//! Measures the daemon against qemu-storage-daemon, both driven by one host-side virtio driver.
//!
//! ```text
//! cargo run --release -p integration --bin bench -- --list
//! cargo run --release -p integration --bin bench -- --rows 1,4 --seconds 1 --rounds 3
//! cargo run --release -p integration --bin bench
//! ```
//!
//! The machine should have nothing else to do. Images take up to 4 GiB in `target/bench`; they
//! vanish at the end. `measure` says how runs are arranged, `rows` what they are.

mod bare;
mod client;
mod count;
mod facts;
mod histogram;
mod images;
mod measure;
mod null;
mod plan;
mod report;
mod rows;
mod server;

use std::fs;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;

use crate::count::Tool;
use crate::images::Images;
use crate::measure::Bench;
use crate::rows::{ROWS, Row};
use crate::server::Programs;

/// Measures the daemon against qemu-storage-daemon.
#[derive(Debug, Parser)]
struct Arguments {
    /// The rows to measure, such as 1,4,9 [default: all]
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    rows: Vec<String>,

    /// Another build of the daemon to measure against, in place of qemu-storage-daemon
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,

    /// How long one run lasts
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,

    /// How many runs of each server
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// The part of the full size at which the rows of the largest images are run
    #[arg(long, default_value_t = 1.0)]
    scale: f64,

    /// Where results.md and results.svg go; without it they are only printed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Where images go [default: bench in cargo's target directory]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,

    /// Name the rows and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for Row { number, title, promise, .. } in &ROWS {
            println!("{number:>3}  {title}: {promise}");
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let rows = chosen(&arguments.rows)?;
    let program = program()?;
    let beside = std::env::current_exe()?;
    let target = beside.ancestors().nth(2).ok_or_else(|| Error::other("no target directory"))?;
    let directory = arguments.directory.clone().unwrap_or_else(|| target.join("bench"));
    let images = Images::new(&directory)?;
    let scratch = tempfile::Builder::new().prefix("vub-bench-").tempdir()?;
    let bench = Bench {
        images,
        programs: Programs { ours: program, against: arguments.against.clone() },
        time: Duration::from_secs_f64(arguments.seconds),
        rounds: arguments.rounds.max(1),
        scale: arguments.scale,
        tool: Tool::find(scratch.path()),
        scratch: scratch.path().to_owned(),
    };
    let (mut findings, mut failed) = (Vec::new(), Vec::new());
    for row in rows {
        eprintln!("row {}: {}", row.number, row.title);
        match row.measure(&bench) {
            Ok(finding) => {
                eprintln!("{}", finding.line());
                findings.push(finding);
            }
            Err(error) => {
                eprintln!("row {} failed: {error}", row.number);
                failed.push(row.number);
            }
        }
    }
    let text = report::markdown(&bench, &facts::facts(&bench.programs), &findings);
    println!("{text}");
    if let Some(out) = &arguments.out {
        fs::create_dir_all(out)?;
        fs::write(out.join("results.md"), text)?;
        fs::write(out.join("results.svg"), report::picture(&findings))?;
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::other(format!("rows {} could not be measured", failed.join(", "))))
}

/// The rows of these numbers; `9` stands for all of 9a to 9d.
fn chosen(numbers: &[String]) -> Result<Vec<&'static Row>> {
    let bare = |number: &str| number.trim_end_matches(char::is_alphabetic).to_owned();
    let names = |row: &Row, number: &str| row.number == number || bare(row.number) == number;
    for number in numbers {
        if !ROWS.iter().any(|row| names(row, number)) {
            return Err(Error::other(format!("there is no row {number}: see --list")));
        }
    }
    let wanted = |row: &&Row| numbers.is_empty() || numbers.iter().any(|number| names(row, number));
    Ok(ROWS.iter().filter(wanted).collect())
}

/// The daemon: `VHOST_USER_QCOW2` names it, otherwise it is the release build, made up to date when
/// cargo runs us.
fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("VHOST_USER_QCOW2") {
        return Ok(path.into());
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let mut command = Command::new(cargo);
        command.current_dir(root).args(["build", "--release", "--bin", "vhost-user-qcow2"]);
        if !command.status()?.success() {
            return Err(Error::other("the daemon cannot be built"));
        }
    }
    let program = std::env::current_exe()?.with_file_name("vhost-user-qcow2");
    if program.is_file() {
        return Ok(program);
    }
    let why = "run `cargo build --release` first, or set VHOST_USER_QCOW2";
    Err(Error::other(format!("{} is missing: {why}", program.display())))
}
