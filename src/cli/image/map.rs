//! `map`: where the disk's bytes are.

use std::path::PathBuf;

use clap::Args;

use crate::bytes::GuestOffset;
use crate::cli::image::{Opening, Output, Sharing, Tool, print};
use crate::cli::size;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::status::{BlockMap, Status};

/// Lines are printed together once they have so many bytes.
const BUFFER: usize = 64 << 10;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 map disk.qcow2
  vhost-user-qcow2 map --output=json overlay.qcow2
  vhost-user-qcow2 map --start-offset=1G --max-length=64M disk.qcow2";

/// The arguments of `map`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Map {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// The first byte of the disk to tell of
    #[arg(long, short, value_name = "OFFSET", value_parser = size::parse, default_value = "0")]
    start_offset: u64,

    /// How many bytes of the disk to tell of [default: up to its end]
    #[arg(long, short = 'l', value_name = "LENGTH", value_parser = size::parse)]
    max_length: Option<u64>,

    /// What is printed
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

impl Map {
    /// Does it.
    ///
    /// # Errors
    /// When the image cannot be opened or its tables cannot be read; for people also when bytes
    /// have no place that could be told.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::looking(self.sharing)?;
        tool.run(self.tell(&tool))?;
        Ok(0)
    }

    async fn tell(&self, tool: &Tool) -> Result<()> {
        let (st, source) = (&*tool.engine, &*tool.files);
        let image = Image::open(st, source, &self.image, &self.opening.looking()).await?;
        let map = BlockMap::new(st, &image).await?;
        let end = match self.max_length {
            Some(length) => self.start_offset.saturating_add(length).min(map.size()),
            None => map.size(),
        };
        let mut at = self.start_offset;
        let mut text = match self.output {
            Output::Json => "[".to_owned(),
            Output::Human => line(["Offset", "Length", "Mapped to", "File"]),
        };
        while at < end {
            let run = map.run(st, GuestOffset(at), end - at).await?;
            match self.output {
                Output::Json => text.push_str(&json_of(at, &run)),
                Output::Human => text.push_str(&self.human_of(tool, at, &run)?),
            }
            at += run.len;
            if self.output == Output::Json && at < end {
                text.push_str(",\n");
            }
            if text.len() > BUFFER {
                print(&std::mem::take(&mut text))?;
            }
        }
        if self.output == Output::Json {
            text.push_str("]\n");
        }
        print(&text)
    }

    fn human_of(&self, tool: &Tool, at: u64, run: &Status) -> Result<String> {
        if !run.data || run.zero {
            return Ok(String::new());
        }
        let Some((file, host)) = run.place else {
            let why = format!(
                "the bytes at {at:#x} are compressed and have no place of their own; use \
                 --output=json"
            );
            return Err(Error::unsupported(self.image.display().to_string(), why));
        };
        let hexadecimal = |number: u64| format!("{number:#x}");
        let name = tool.files.name(file);
        Ok(line([&hexadecimal(at), &hexadecimal(run.len), &hexadecimal(host.0), &name]))
    }
}

fn line([start, length, place, file]: [&str; 4]) -> String {
    format!("{start:<16}{length:<16}{place:<16}{file}\n")
}

/// One run, with the keys in qemu-img's order.
fn json_of(at: u64, run: &Status) -> String {
    let place = run.place.map_or_else(String::new, |(_, host)| format!(", \"offset\": {}", host.0));
    format!(
        "{{ \"start\": {at}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{place}}}",
        run.len, run.depth, run.present, run.zero, run.data, run.compressed,
    )
}
