//! `dd`: a part of a disk becomes a new image.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::image::{Opening, Sharing, Tool};
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::dd::{Part, copy_part};
use crate::image::make::{self, NewImage};
use crate::image::{Format, Image, OpenOptions};
use crate::qcow2::create::CreateOptions;

const EXAMPLES: &str = "\
The operands are if=FILE, of=FILE, bs=SIZE (512 unless said), count=N and skip=N, in blocks. As with
qemu-img, count says where the part ends, so that skipped blocks count, and of= is replaced.

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
}

/// What the operands say.
#[derive(Debug, PartialEq, Eq)]
struct Operands {
    from: PathBuf,
    to: PathBuf,
    part: Part,
}

impl Dd {
    /// Does it.
    ///
    /// # Errors
    /// When an operand is wrong or missing, an image cannot be read, or the new one cannot be
    /// written. A file that was begun is removed.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let Operands { from, to, part } = parse(&self.operands)?;
        let reading = self.opening.looking();
        if self.opening.options().read_only {
            return Err(Error::refused(to.display().to_string(), "nothing is made read-only"));
        }
        let source = Tool::looking(self.sharing)?;
        let disk = source.run(Image::open(&*source.engine, &*source.files, &from, &reading))?;
        let size = disk.size();
        drop((disk, source));
        if part.skips_all(size) {
            eprintln!(
                "vhost-user-qcow2: {}: there is nothing behind what is skipped",
                from.display()
            );
        }
        let is_new = to.symlink_metadata().is_err();
        let made = self.make(&from, &to, part.range(size)).inspect_err(|_| {
            // The error that matters is the first one.
            is_new.then(|| std::fs::remove_file(&to));
        });
        made.map(|()| 0)
    }

    /// Makes the new image and copies into it.
    fn make(&self, from: &Path, to: &Path, range: std::ops::Range<u64>) -> Result<()> {
        // A disk is whole sectors; what is added are zeros.
        let size = (range.end - range.start).next_multiple_of(512);
        let format = Format::from(self.output_format);
        let new = NewImage {
            format,
            size: Some(size),
            layout: CreateOptions::new(size),
            replace: true,
            trust_backing: false,
        };
        let writing = OpenOptions { format: Some(format), ..OpenOptions::default() };
        // Opened before the target is touched: the two may be one file, which is refused then.
        let tool = Tool::looking(self.sharing)?;
        let (st, source) = (&*tool.engine, &*tool.files);
        let disk = tool.run(Image::open(st, source, from, &self.opening.looking()))?;
        let maker = Tool::new()?;
        maker.run(make::make(&*maker.engine, &*maker.files, to, &new, &writing))?;
        // Its locks end with it.
        drop(maker);
        let target = tool.run(Image::open(st, source, to, &writing))?;
        let copied = copy_part(st, &disk, range, &target, |_, _| {});
        tool.run(copied).map_err(|error| error.within(to.display()))
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
