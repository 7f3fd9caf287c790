//! `snapshot`: internal snapshots.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::Value;

use crate::cli::image::{Opening, Output, Sharing, Tool, human, info, print, print_json};
use crate::error::{Error, Result};
use crate::image;
use crate::image::inspect::inspect;
use crate::qcow2::snapshot::NewSnapshot;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 snapshot -l disk.qcow2
  vhost-user-qcow2 snapshot -c before-upgrade disk.qcow2
  vhost-user-qcow2 snapshot -a before-upgrade disk.qcow2
  vhost-user-qcow2 snapshot -d before-upgrade disk.qcow2";

/// The arguments of `snapshot`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Snapshot {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    action: Action,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// What a list is printed as
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

/// What is done; without any of them snapshots are listed.
#[derive(Debug, Clone, Args)]
#[group(multiple = false)]
struct Action {
    /// List the snapshots, which is also done when nothing is said
    #[arg(long, short)]
    list: bool,

    /// Take a snapshot
    #[arg(long, short, value_name = "NAME", conflicts_with = "force_share")]
    create: Option<String>,

    /// Make the disk what it was when this snapshot was taken, by its id or name
    #[arg(long, short, value_name = "SNAPSHOT", conflicts_with = "force_share")]
    apply: Option<String>,

    /// Delete a snapshot, by its id or name
    #[arg(long, short, value_name = "SNAPSHOT", conflicts_with = "force_share")]
    delete: Option<String>,
}

impl Snapshot {
    /// Does it.
    ///
    /// # Errors
    /// As the functions of [`crate::image::offline`].
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::looking(self.sharing)?;
        let (st, source, path) = (&*tool.engine, &*tool.files, self.image.as_path());
        let options = self.opening.options();
        let action = &self.action;
        if let Some(name) = &action.create {
            let new = taken_now(name)?;
            tool.run(image::create_snapshot(st, source, path, &options, &new))?;
        } else if let Some(key) = &action.apply {
            tool.run(image::apply_snapshot(st, source, path, &options, key))?;
        } else if let Some(key) = &action.delete {
            tool.run(image::delete_snapshot(st, source, path, &options, key))?;
        } else {
            let options = self.opening.looking();
            let all = tool.run(inspect(st, source, path, &options, false))?;
            let qcow2 = all.first().and_then(|facts| facts.qcow2.as_ref());
            let list = qcow2.map_or([].as_slice(), |facts| facts.snapshots.as_slice());
            match self.output {
                Output::Json => {
                    print_json(&list.iter().map(info::snapshot).collect::<Value>())?;
                }
                Output::Human => print(&human::snapshots(list))?,
            }
        }
        Ok(0)
    }
}

fn taken_now(name: &str) -> Result<NewSnapshot> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = now.as_ref().ok().and_then(|now| u32::try_from(now.as_secs()).ok());
    let (Ok(now), Some(date_seconds)) = (now, seconds) else {
        let why = "the host's clock is set to a time that no snapshot can have";
        return Err(Error::refused("snapshot", why));
    };
    Ok(NewSnapshot {
        name: name.to_owned(),
        date_seconds,
        date_nanoseconds: now.subsec_nanos(),
        icount: Some(0),
        ..NewSnapshot::default()
    })
}
