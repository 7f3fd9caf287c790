//! `ls`: the files of a directory.

use std::io::{BufWriter, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::image::print_json;
use crate::cli::inside::show::{self, Form};
use crate::cli::inside::{Looking, Place};
use crate::cli::serve::complaint;
use crate::error::{Error, Result};
use crate::inside::filesystem::{Filesystem, Kind, Node};

const EXAMPLES: &str = "\
Exit status: 0 all was listed, 1 something could not be read.

Examples:
  vhost-user-qcow2 ls disk.qcow2:1 /
  vhost-user-qcow2 ls -l disk.qcow2:root /etc
  vhost-user-qcow2 ls -lR --json disk.qcow2:2 /boot";

/// The arguments of `ls`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Ls {
    #[command(flatten)]
    place: Place,

    /// The directory or file
    #[arg(default_value = "/")]
    path: String,

    /// Permissions, owners, sizes, times of change, and where symbolic links lead
    #[arg(long, short)]
    long: bool,

    /// What is in its directories as well
    #[arg(long, short = 'R')]
    recursive: bool,

    #[command(flatten)]
    looking: Looking,

    #[command(flatten)]
    form: Form,
}

/// One listing under way.
struct Listing<'a> {
    filesystem: &'a Filesystem,
    arguments: &'a Ls,
    output: BufWriter<std::io::StdoutLock<'static>>,
    /// The answer, for programs.
    found: Vec<Value>,
    /// Whether something could not be read.
    wrong: bool,
}

impl Ls {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let filesystem = self.looking.filesystem(&self.place)?;
        let mut listing = Listing {
            filesystem: &filesystem,
            arguments: self,
            output: BufWriter::new(std::io::stdout().lock()),
            found: Vec::new(),
            wrong: false,
        };
        let (path, node) = filesystem.resolve(self.path.as_bytes(), true)?;
        if node.kind == Kind::Directory {
            listing.directory(&path, 0)?;
        } else {
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            listing.entry(name, &path, &node)?;
        }
        // Who has stopped reading wants no more.
        drop(listing.output.flush());
        if self.form.is_json() {
            print_json(&Value::Array(listing.found))?;
        }
        Ok(u8::from(listing.wrong))
    }
}

impl Listing<'_> {
    fn line(&mut self, text: &str) -> Result<()> {
        match writeln!(self.output, "{text}") {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
            Err(error) => Err(Error::io("writing the answer", error)),
            Ok(()) => Ok(()),
        }
    }

    fn complain(&mut self, error: &Error) {
        self.wrong = true;
        eprintln!("{}", complaint(error));
    }

    fn directory(&mut self, path: &[u8], depth: usize) -> Result<()> {
        let arguments = self.arguments;
        let entries = self.filesystem.entries(path)?;
        if arguments.recursive && !arguments.form.is_json() {
            let between = if depth == 0 { "" } else { "\n" };
            self.line(&format!("{between}{}:", show::safe(path)))?;
        }
        let mut below = Vec::new();
        for entry in entries {
            let mut inner = if path == b"/" { Vec::new() } else { path.to_vec() };
            inner.push(b'/');
            inner.extend(&entry.name);
            match &entry.node {
                Ok(node) => {
                    self.entry(&entry.name, &inner, node)?;
                    if node.kind == Kind::Directory && entry.is_plain() {
                        below.push(inner);
                    }
                }
                Err(error) => self.complain(error),
            }
        }
        if !arguments.recursive {
            return Ok(());
        }
        let most = self.filesystem.watch().limits().depth;
        for inner in below {
            let listed = if depth < most {
                self.directory(&inner, depth + 1)
            } else {
                let why = format!("directories lie more than {most} deep");
                Err(Error::refused(show::safe(&inner), why))
            };
            match listed {
                Err(error) if !self.filesystem.watch().is_over() => self.complain(&error),
                other => other?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &[u8], path: &[u8], node: &Node) -> Result<()> {
        let json = self.arguments.form.is_json();
        let target = if node.kind == Kind::Symlink && (self.arguments.long || json) {
            self.filesystem.read_link(path).map_err(|error| self.complain(&error)).ok()
        } else {
            None
        };
        if json {
            let mut value = show::json_of(name, node, target.as_deref());
            value["path"] = json!(String::from_utf8_lossy(path));
            self.found.push(value);
            return Ok(());
        }
        if !self.arguments.long {
            return self.line(&show::safe(name));
        }
        let target = target.map_or_else(String::new, |to| format!(" -> {}", show::safe(&to)));
        let (mode, time) = (show::mode(node), show::time(node.modified));
        let (uid, gid, size, name) = (node.uid, node.gid, node.size, show::safe(name));
        self.line(&format!("{mode} {uid:>5} {gid:>5} {size:>12} {time} {name}{target}"))
    }
}
