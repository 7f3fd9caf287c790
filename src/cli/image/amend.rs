//! `amend`: what can be changed of an image that is there.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::image::options::{switch, words};
use crate::cli::image::steps::Steps;
use crate::cli::image::{Opening, Tool, print};
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image;
use crate::image::amend::amend;
use crate::image::inspect::inspect;
use crate::qcow2::Amend as Change;
use crate::qcow2::format::AUTOCLEAR_RAW_DATA;
use crate::qcow2::header::Header;

/// Every option with what it means.
const HELP: &str = "\
Supported options:
  backing_file=<str>      - name of the backing file; nothing is copied, unlike rebase
  backing_fmt=<str>       - format of the backing file: qcow2 or raw
  compat=<str>            - version of the format: 0.10 (v2) or 1.1 (v3)
  data_file=<str>         - name of the external data file
  lazy_refcounts=<bool>   - refcounts are written late
  size=<size>             - size of the disk, which may only grow
All other options of create are chosen when an image is made.
";

const EXAMPLES: &str = "\
Clusters, refcounts, L2 entries and compression stay as they are: convert the image instead.

Examples:
  vhost-user-qcow2 amend -o compat=1.1 disk.qcow2
  vhost-user-qcow2 amend -o lazy_refcounts=on disk.qcow2
  vhost-user-qcow2 amend -o backing_file=base.qcow2,backing_fmt=qcow2 overlay.qcow2
  vhost-user-qcow2 amend -o data_file=moved.raw disk.qcow2";

/// The arguments of `amend`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Amend {
    /// The image
    image: Option<PathBuf>,

    #[command(flatten)]
    opening: Opening,

    /// What it becomes, `name=value,...`; `-o help` lists the options
    #[arg(long, short, value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    #[command(flatten)]
    steps: Steps,

    /// Print errors only, which is all there is to print
    #[arg(long, short)]
    quiet: bool,
}

impl Amend {
    /// Does it.
    ///
    /// # Errors
    /// As [`amend`]; `Refused` for what can only be chosen when an image is made.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let words: Vec<String> = self.options.iter().flat_map(|argument| words(argument)).collect();
        if words.iter().any(|word| word == "help" || word == "?") {
            print(HELP)?;
            return Ok(0);
        }
        let Some(path) = &self.image else {
            return Err(Error::refused("amend", "say which image"));
        };
        let header = self.look(path)?;
        let (mut change, mut size) = (Change::default(), None);
        for word in &words {
            let (name, value) = word.split_once('=').unwrap_or((word, "on"));
            if name == "size" {
                let bytes = size::parse(value);
                size = Some(bytes.map_err(|why| Error::refused("option size", why))?);
            } else if !set(&mut change, name, value)? {
                stays(&header, name, value)?;
            }
        }
        if change != Change::default() {
            let (tool, options) = (Tool::new()?, self.opening.options());
            let (st, source) = (&*tool.engine, &*tool.files);
            tool.run(amend(st, source, path, &options, &change, self.steps.teller()))?;
        }
        if let Some(size) = size {
            let (tool, options) = (Tool::new()?, self.opening.options());
            let (st, source) = (&*tool.engine, &*tool.files);
            tool.run(image::resize(st, source, path, &options, (size, false)))?;
        }
        self.steps.finish();
        Ok(0)
    }

    /// What the image says of itself. Locks end with this.
    fn look(&self, path: &Path) -> Result<Header> {
        let tool = Tool::new()?;
        let options = self.opening.looking();
        let facts = tool.run(inspect(&*tool.engine, &*tool.files, path, &options, false))?;
        let qcow2 = facts.into_iter().next().and_then(|facts| facts.qcow2);
        let header = qcow2.map(|qcow2| qcow2.header);
        header.ok_or_else(|| {
            let why = "a raw image has nothing that could be amended";
            Error::unsupported(path.display().to_string(), why)
        })
    }
}

/// Notes a change; false when the option is none that can be changed.
fn set(change: &mut Change, name: &str, value: &str) -> Result<bool> {
    match name {
        "compat" => match value {
            "0.10" | "v2" => change.version = Some(2),
            "1.1" | "v3" => change.version = Some(3),
            _ => return refuse(name, format!("{value:?} is no version; there are 0.10 and 1.1")),
        },
        "lazy_refcounts" => change.lazy_refcounts = Some(switch(name, value)?),
        "backing_file" => change.backing = Some(value.to_owned()),
        "backing_fmt" if matches!(value, "qcow2" | "raw") => {
            change.backing_format = Some(value.to_owned());
        }
        "backing_fmt" => return refuse(name, format!("{value:?} is neither qcow2 nor raw")),
        "data_file" if !value.is_empty() => change.data_file = Some(value.to_owned()),
        _ => return Ok(false),
    }
    Ok(true)
}

/// Takes what says what is so already, of what cannot be changed.
fn stays(header: &Header, name: &str, value: &str) -> Result<()> {
    let same = match name {
        "refcount_bits" => value.parse() == Ok(1_u32 << header.geometry.refcount_order),
        "data_file_raw" => switch(name, value)? == (header.autoclear & AUTOCLEAR_RAW_DATA != 0),
        "cluster_size" | "extended_l2" | "compression_type" | "preallocation" => false,
        _ => return refuse(name, "there is no such option; -o help lists them"),
    };
    if same {
        return Ok(());
    }
    refuse(name, "it is chosen when an image is made; convert this one to a new one")
}

fn refuse<T>(name: &str, why: impl Into<Box<str>>) -> Result<T> {
    Err(Error::refused(format!("option {name}"), why))
}
