//! `dd`: a part of a disk becomes a new image.

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::image::target::{self, is_device, lock_old};
use crate::cli::image::{Opening, Sharing, Tool};
use crate::cli::interrupt::Interrupts;
use crate::cli::progress::Reporting;
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::dd::{Part, copy_part};
use crate::image::make::NewImage;
use crate::image::watch::Outcome;
use crate::image::{Format, Image, OpenOptions};
use crate::qcow2::create::CreateOptions;
use crate::storage::FileSource;
use crate::storage::appear::{Appearing, Foreseen};
use crate::storage::files::Options as FileOptions;

const EXAMPLES: &str = "\
The operands are if=FILE, of=FILE, bs=SIZE (512 unless said), count=N and skip=N, in blocks. As with
qemu-img, count says where the part ends, so that skipped blocks count, and of= is replaced: when
the copy is complete and durable. Until then, and when it fails or is interrupted, what was there
stays. On a block device bytes are written in place.

Examples:
  vhost-user-qcow2 dd if=disk.qcow2 of=disk.raw bs=1M
  vhost-user-qcow2 dd -O qcow2 if=disk.qcow2 of=part.qcow2 bs=1M skip=1 count=3";

/// The arguments of `dd`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Dd {
    /// if=FILE of=FILE bs=SIZE count=N skip=N
    #[arg(required = true, value_name = "OPERAND")]
    operands: Vec<String>,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// The new image's format
    #[arg(long, short = 'O', value_enum, default_value = "raw")]
    output_format: ImageFormat,

    #[command(flatten)]
    reporting: Reporting,
}

/// What the operands say.
#[derive(Debug, PartialEq, Eq)]
struct Operands {
    from: PathBuf,
    to: PathBuf,
    part: Part,
}

impl Dd {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When an operand is wrong or missing, an image cannot be read, or the new one cannot be
    /// written. What was there before stays then.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let Operands { from, to, part } = parse(&self.operands)?;
        if self.opening.options().read_only {
            return Err(Error::refused(to.display().to_string(), "nothing is made read-only"));
        }
        let in_place = is_device(&to);
        let tool = Tool::with(FileOptions {
            // A file that nobody can see yet is made durable once, when it is complete.
            sync: in_place,
            lock: !self.sharing.is_forced(),
            ..FileOptions::default()
        })?;
        let interrupts = Interrupts::watch()?;
        // Opened before the target is touched: the two may be one file, which is refused then.
        let reading = self.opening.looking();
        let disk = tool.run(Image::open(&*tool.engine, &*tool.files, &from, &reading))?;
        if part.skips_all(disk.size()) {
            eprintln!(
                "vhost-user-qcow2: {}: there is nothing behind what is skipped",
                from.display()
            );
        }
        let copy =
            Copy { arguments: self, tool: &tool, disk: &disk, range: part.range(disk.size()) };
        if in_place {
            // Nobody is asked when other users of the source are accepted; the target is ours.
            let _lock = if self.sharing.is_forced() { lock_old(&to)? } else { None };
            return copy.run(&to, None, &interrupts);
        }
        let _lock = lock_old(&to)?;
        let file = Appearing::new(&to)?;
        let status = copy.run(&to, Some(&file), &interrupts)?;
        if status == 0 {
            file.publish(true)?;
        }
        Ok(status)
    }
}

/// One copy.
struct Copy<'a> {
    arguments: &'a Dd,
    tool: &'a Tool,
    disk: &'a Image,
    range: Range<u64>,
}

impl Copy<'_> {
    /// Makes the new image, in place or in a file that is still to appear, and copies into it.
    fn run(&self, to: &Path, file: Option<&Appearing>, interrupts: &Interrupts) -> Result<u8> {
        // A disk is whole sectors; what is added are zeros.
        let size = (self.range.end - self.range.start).next_multiple_of(512);
        let format = Format::from(self.arguments.output_format);
        let new = NewImage {
            format,
            size: Some(size),
            layout: CreateOptions::new(size),
            replace: true,
            trust_backing: false,
        };
        let writing = OpenOptions { format: Some(format), ..OpenOptions::default() };
        let tool = self.tool;
        target::make(tool, to, &new, &writing, file)?;
        let foreseen = file.map(|file| Foreseen { source: &*tool.files, path: to, file });
        let source: &dyn FileSource = match &foreseen {
            Some(foreseen) => foreseen,
            None => &*tool.files,
        };
        let st = &*tool.engine;
        let target = tool.run(Image::open(st, source, to, &writing))?;
        let mut steps = self.arguments.reporting.steps("dd", false);
        let mut watch = |done, of| {
            steps.set(done, of);
            interrupts.status().is_none()
        };
        // A block device holds anything, but a qcow2 image shows nothing before it is allocated.
        let zero = file.is_some() || format == Format::Qcow2;
        let copied = copy_part(st, self.disk, self.range.clone(), (&target, zero), &mut watch);
        match tool.run(copied).map_err(|error| error.within(to.display()))? {
            Outcome::Complete => {
                steps.finish();
                Ok(0)
            }
            Outcome::Stopped => Ok(interrupts.status().unwrap_or(1)),
        }
    }
}

fn parse(operands: &[String]) -> Result<Operands> {
    let refuse = |why: String| Error::refused("dd", why);
    let (mut from, mut to) = (None, None);
    let mut part = Part { block: 512, count: None, skip: 0 };
    for operand in operands {
        let Some((name, value)) = operand.split_once('=') else {
            return Err(refuse(format!("{operand:?} is no operand; they look like if=FILE")));
        };
        let number = || size::number(value).map_err(|why| refuse(format!("{name}: {why}")));
        match name {
            "if" => from = Some(PathBuf::from(value)),
            "of" => to = Some(PathBuf::from(value)),
            "bs" => part.block = number()?,
            "count" => part.count = Some(number()?),
            "skip" => part.skip = number()?,
            _ => {
                let why = "there are if=, of=, bs=, count= and skip=";
                return Err(refuse(format!("{name:?} is no operand; {why}")));
            }
        }
    }
    if part.block == 0 {
        return Err(refuse("blocks have one byte or more".to_owned()));
    }
    match (from, to) {
        (Some(from), Some(to)) => Ok(Operands { from, to, part }),
        _ => Err(refuse("if=FILE and of=FILE are needed".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Operands> {
        parse(&text.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn operands_come_in_any_order() {
        let operands = words("bs=1M of=b skip=2 if=a").expect("good operands");
        let part = Part { block: 1 << 20, count: None, skip: 2 };
        assert_eq!(operands, Operands { from: "a".into(), to: "b".into(), part });
        for text in ["if=a", "of=b", "if=a of=b bs=0", "if=a of=b seek=1", "if=a of=b count=x", "a"]
        {
            words(text).expect_err(text);
        }
    }

    #[test]
    fn the_part_ends_where_count_says_from_the_beginning_on() {
        let part = |count, skip| Part { block: 100, count, skip };
        assert_eq!(part(None, 0).range(1000), 0..1000);
        assert_eq!(part(Some(3), 1).range(1000), 100..300);
        assert_eq!(part(Some(3), 5).range(1000), 300..300);
        assert!(part(Some(3), 5).skips_all(1000));
        assert_eq!(part(Some(u64::MAX), u64::MAX).range(1000), 1000..1000);
    }
}
