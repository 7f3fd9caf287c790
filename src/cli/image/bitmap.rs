//! `bitmap`: persistent dirty bitmaps are added, removed, cleared, enabled, disabled and merged.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::cli::image::{Opening, Tool};
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::Format;
use crate::image::amend::{BitmapAction, MergeFrom, edit_bitmap};

const EXAMPLES: &str = "\
What is asked for is done in the order in which it is given, all of it or nothing.

Examples:
  vhost-user-qcow2 bitmap --add -g 64k disk.qcow2 monday
  vhost-user-qcow2 bitmap --disable disk.qcow2 monday
  vhost-user-qcow2 bitmap --add --merge monday --disable disk.qcow2 week
  vhost-user-qcow2 bitmap --merge monday -b other.qcow2 disk.qcow2 week
  vhost-user-qcow2 bitmap --remove disk.qcow2 monday";

/// The arguments of `bitmap`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Bitmap {
    /// The image
    image: PathBuf,

    /// The bitmap's name
    bitmap: String,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    actions: Actions,

    /// How many bytes of the disk one bit of a new bitmap stands for
    #[arg(long, short, value_name = "SIZE", value_parser = size::number)]
    granularity: Option<u64>,

    /// The image whose bitmap is merged
    #[arg(long, short = 'b', value_name = "IMAGE", requires = "merge")]
    source_file: Option<PathBuf>,

    /// That image's format
    #[arg(long, short = 'F', value_enum, requires = "source_file")]
    source_format: Option<ImageFormat>,
}

/// What is done, in the order of the command line.
#[derive(Debug, Clone)]
struct Actions(Vec<BitmapAction>);

/// The actions without a value: name, what it is, help.
const PLAIN: [(&str, BitmapAction, &str); 5] = [
    ("add", BitmapAction::Add(None), "Make a new bitmap, which is enabled"),
    ("remove", BitmapAction::Remove, "Remove it"),
    ("clear", BitmapAction::Clear, "Forget every change that it has recorded"),
    ("enable", BitmapAction::Enable, "Record changes of the disk in it"),
    ("disable", BitmapAction::Disable, "Record no more changes in it"),
];

impl Args for Actions {
    fn augment_args(mut command: Command) -> Command {
        for (name, _, help) in PLAIN {
            let flag = Arg::new(name).long(name).help(help).action(ArgAction::Append);
            command = command.arg(flag.num_args(0).default_missing_value("on"));
        }
        let help = "Record in it what this other bitmap has recorded";
        let merge = Arg::new("merge").long("merge").value_name("BITMAP").help(help);
        command.arg(merge.action(ArgAction::Append))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let mut found = Vec::new();
        for (name, action, _) in PLAIN {
            let places = matches.indices_of(name).into_iter().flatten();
            found.extend(places.map(|place| (place, action.clone())));
        }
        let places = matches.indices_of("merge").into_iter().flatten();
        let names = matches.get_many::<String>("merge").into_iter().flatten();
        found.extend(places.zip(names.cloned().map(BitmapAction::Merge)));
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(
        &mut self,
        matches: &ArgMatches,
    ) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Bitmap {
    /// Does it.
    ///
    /// # Errors
    /// As [`edit_bitmap`].
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let refuse = |why: &str| Err(Error::refused(format!("bitmap {:?}", self.bitmap), why));
        let mut actions = self.actions.0.clone();
        if actions.is_empty() {
            return refuse(
                "say what to do: --add, --remove, --clear, --enable, --disable, --merge",
            );
        }
        let mut adds = false;
        for action in &mut actions {
            if let BitmapAction::Add(granularity) = action {
                (*granularity, adds) = (self.granularity, true);
            }
        }
        if self.granularity.is_some() && !adds {
            return refuse("only a new bitmap gets a granularity (-g); leave it out, or --add one");
        }
        let from = self
            .source_file
            .clone()
            .map(|path| MergeFrom { path, format: self.source_format.map(Format::from) });
        let (tool, options) = (Tool::new()?, self.opening.options());
        let (st, source) = (&*tool.engine, &*tool.files);
        let edit = (self.bitmap.as_str(), actions.as_slice());
        tool.run(edit_bitmap(st, source, &self.image, &options, edit, from.as_ref()))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        bitmap: Bitmap,
    }

    #[test]
    fn actions_keep_the_order_of_the_command_line() {
        let words = "x --disable --merge a --add --disable --merge b -g 4k disk.qcow2 name";
        let line = Line::try_parse_from(words.split(' ')).expect("a good line").bitmap;
        let merge = |name: &str| BitmapAction::Merge(name.to_owned());
        let (off, add) = (BitmapAction::Disable, BitmapAction::Add(None));
        assert_eq!(line.actions.0, [off.clone(), merge("a"), add, off, merge("b")]);
        assert_eq!(line.granularity, Some(4096));
    }
}
