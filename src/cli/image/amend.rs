//! `amend`: what can be changed of an image that is there.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::image::options::{switch, words};
use crate::cli::image::{Opening, Tool, print, stopped};
use crate::cli::interrupt::Interrupts;
use crate::cli::progress::{Reporting, Steps};
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image;
use crate::image::amend::{amend, amend_refcounts, check_changes};
use crate::image::inspect::inspect;
use crate::image::watch::Outcome;
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
  refcount_bits=<number>  - width of a refcount in bits
  size=<size>             - size of the disk, which may only grow
All other options of create are chosen when an image is made.
";

const EXAMPLES: &str = "\
Clusters, L2 entries and compression stay as they are: convert the image instead.
Interrupted or killed at any time, the disk still reads the same; the same command goes on then.

Examples:
  vhost-user-qcow2 amend -o compat=1.1 disk.qcow2
  vhost-user-qcow2 amend -o lazy_refcounts=on disk.qcow2
  vhost-user-qcow2 amend -o refcount_bits=64 disk.qcow2
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
    reporting: Reporting,

    /// Print errors only, which is all there is to print
    #[arg(long, short)]
    quiet: bool,
}

impl Amend {
    /// Does it; returns the exit status.
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
        let asked = Asked::parse(&words, &header)?;
        let interrupts = Interrupts::watch()?;
        let mut steps = self.reporting.steps("amend", self.quiet);
        self.check(path, &asked)?;
        // Version 2 has one width only. Elsewhere refcounts come first, so that nothing has been
        // changed when they are not right and refused.
        let width_first = header.version >= 3;
        if let Some(order) = asked.refcount_order.filter(|_| width_first) {
            self.change_refcounts(path, order, &mut steps)?;
        }
        if asked.change != Change::default()
            && self.change_header(path, &asked.change, &mut steps, &interrupts)? == Outcome::Stopped
        {
            drop(steps);
            return Ok(stopped(path, &interrupts));
        }
        if let Some(order) = asked.refcount_order.filter(|_| !width_first) {
            self.change_refcounts(path, order, &mut steps)?;
        }
        if let Some(size) = asked.size {
            let (tool, options) = (Tool::new()?, self.opening.options());
            let (st, source) = (&*tool.engine, &*tool.files);
            tool.run(image::resize(st, source, path, &options, (size, false)))?;
        }
        steps.finish();
        Ok(0)
    }

    /// Refuses what cannot be done, before anything is.
    fn check(&self, path: &Path, asked: &Asked) -> Result<()> {
        let (tool, options) = (Tool::new()?, self.opening.options());
        let (st, source) = (&*tool.engine, &*tool.files);
        let rest = (asked.refcount_order, asked.size);
        tool.run(check_changes(st, source, path, &options, &asked.change, rest))
    }

    fn change_header(
        &self,
        path: &Path,
        change: &Change,
        steps: &mut Steps,
        interrupts: &Interrupts,
    ) -> Result<Outcome> {
        let (tool, options) = (Tool::new()?, self.opening.options());
        let (st, source) = (&*tool.engine, &*tool.files);
        let mut watch = |done, of| {
            steps.set(done, of);
            interrupts.status().is_none()
        };
        tool.run(amend(st, source, path, &options, change, &mut watch))
    }

    fn change_refcounts(&self, path: &Path, order: u32, steps: &mut Steps) -> Result<()> {
        let (tool, options) = (Tool::new()?, self.opening.options());
        let (st, source) = (&*tool.engine, &*tool.files);
        let steps = RefCell::new(steps);
        let progress = |done, of| steps.borrow_mut().set(done, of);
        tool.run(amend_refcounts(st, source, path, &options, order, &progress))
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

/// What is to be changed.
#[derive(Debug, Default)]
struct Asked {
    change: Change,
    /// log2 of the width of refcounts in bits.
    refcount_order: Option<u32>,
    size: Option<u64>,
}

impl Asked {
    /// What options ask for of an image with this header.
    fn parse(words: &[String], header: &Header) -> Result<Self> {
        let mut asked = Self::default();
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, "on"));
            if name == "size" {
                let bytes = size::parse(value);
                asked.size = Some(bytes.map_err(|why| Error::refused("option size", why))?);
            } else if name == "refcount_bits" {
                asked.refcount_order = Some(refcount_order(name, value)?);
            } else if !set(&mut asked.change, name, value)? {
                stays(header, name, value)?;
            }
        }
        let now = header.geometry.refcount_order;
        let version = asked.change.version.unwrap_or(header.version);
        if version < 3 && asked.refcount_order.unwrap_or(now) != 4 {
            let why =
                "version 2 (compat=0.10) has refcounts of 16 bits; say refcount_bits=16 with it";
            return refuse("refcount_bits", why);
        }
        asked.refcount_order = asked.refcount_order.filter(|order| *order != now);
        Ok(asked)
    }
}

fn refcount_order(name: &str, value: &str) -> Result<u32> {
    match value.parse::<u32>() {
        Ok(bits @ 1..=64) if bits.is_power_of_two() => Ok(bits.ilog2()),
        _ => refuse(name, "refcounts have 1, 2, 4, 8, 16, 32 or 64 bits"),
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::image::Format;
    use crate::image::make::{NewImage, make};
    use crate::qcow2::create::CreateOptions;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        amend: Amend,
    }

    #[test]
    fn what_is_refused_changes_nothing_of_what_was_asked_for_with_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.qcow2");
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(2 << 20),
            layout: CreateOptions { refcount_order: 3, ..CreateOptions::new(2 << 20) },
            replace: false,
            trust_backing: false,
        };
        let tool = Tool::new().expect("a tool");
        let options = crate::image::OpenOptions::default();
        let made = make(&*tool.engine, &*tool.files, &path, &new, &options);
        tool.run(made).expect("make");
        drop(tool);
        let run = |what: &str| {
            let image = path.to_str().expect("a name");
            Line::parse_from(["amend", "-q", "-o", what, image]).amend.run()
        };
        let before = std::fs::read(&path).expect("the image");
        for what in [
            "lazy_refcounts=on,size=1M",
            "refcount_bits=64,size=1M",
            "refcount_bits=16,compat=0.10,size=1000",
            "refcount_bits=16,compat=0.10,lazy_refcounts=on",
            "refcount_bits=16,data_file=none",
        ] {
            run(what).expect_err(what);
            assert!(std::fs::read(&path).expect("the image") == before, "{what}");
        }
        assert_eq!(run("refcount_bits=16,compat=0.10,size=4M").expect("down"), 0);
        assert_eq!(run("refcount_bits=64,compat=1.1,size=6M").expect("up"), 0);
        assert!(std::fs::read(&path).expect("the image") != before);
    }
}
