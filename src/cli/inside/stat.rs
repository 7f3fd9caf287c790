//! `stat`: what is known of a file.

use clap::Args;
use serde_json::{Value, json};

use crate::cli::image::{print, print_json};
use crate::cli::inside::show::{self, Form};
use crate::cli::inside::{Looking, Place};
use crate::error::Result;
use crate::inside::filesystem::Kind;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 stat disk.qcow2:1 /etc/passwd
  vhost-user-qcow2 stat --json disk.qcow2:1 /vmlinuz /bin/sh";

/// The arguments of `stat`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Stat {
    #[command(flatten)]
    place: Place,

    /// The files
    #[arg(required = true)]
    path: Vec<String>,

    /// Follow a symbolic link instead of telling of it
    #[arg(long, short = 'L')]
    dereference: bool,

    #[command(flatten)]
    looking: Looking,

    #[command(flatten)]
    form: Form,
}

impl Stat {
    /// Does it.
    ///
    /// # Errors
    /// When a file is not there or cannot be read.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let filesystem = self.looking.filesystem(&self.place)?;
        let mut values = Vec::new();
        for path in &self.path {
            let (path, node) = filesystem.resolve(path.as_bytes(), self.dereference)?;
            let link = (node.kind == Kind::Symlink).then(|| filesystem.read_link(&path));
            let target = link.transpose()?;
            if self.form.is_json() {
                let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
                let mut value = show::json_of(name, &node, target.as_deref());
                value["path"] = json!(String::from_utf8_lossy(&path));
                value["filesystem"] = json!(filesystem.kind());
                values.push(value);
                continue;
            }
            let arrow = target.map_or_else(String::new, |to| format!(" -> {}", show::safe(&to)));
            print(&format!(
                "  File: {}{arrow}\n  Size: {:<12} Type: {}\n  Mode: {:04o}/{}  Uid: {}  Gid: {}\n\
                 Access: {}\nModify: {}\n Birth: {}\n",
                show::safe(&path),
                node.size,
                node.kind.name(),
                node.mode,
                show::mode(&node),
                node.uid,
                node.gid,
                show::time(node.accessed),
                show::time(node.modified),
                show::time(node.created),
            ))?;
        }
        if self.form.is_json() {
            print_json(&Value::Array(values))?;
        }
        Ok(0)
    }
}
