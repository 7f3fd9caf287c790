//! `measure`: how large a file becomes.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::image::options::Layout;
use crate::cli::image::{Opening, Output, Sharing, Tool, print, print_json};
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::compare::{self, Measure as Measured};
use crate::image::status::BlockMap;
use crate::image::{Format, Image};
use crate::qcow2::create::CreateOptions;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 measure -O qcow2 --size 100G
  vhost-user-qcow2 measure -O qcow2 -o cluster_size=2M --output=json disk.qcow2
  vhost-user-qcow2 measure -f raw -O qcow2 disk.raw";

/// The arguments of `measure`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Measure {
    /// The image that is copied
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    image: Option<PathBuf>,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// The size of a new disk
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// The format of the new file
    #[arg(long, short = 'O', value_enum, default_value = "raw")]
    target_format: ImageFormat,

    /// The layout of the new file, `name=value,...`; `-o help` lists the options
    #[arg(long, short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// What is printed
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

impl Measure {
    /// Does it.
    ///
    /// # Errors
    /// When the options contradict each other, or the image cannot be read.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let format = Format::from(self.target_format);
        let layout = Layout::parse(&self.options, format)?;
        if let Some(help) = layout.help {
            print(help)?;
            return Ok(0);
        }
        let tool = Tool::looking(self.sharing)?;
        let measured = tool.run(self.measure(&tool, format, &layout.options))?;
        let mut object = Map::new();
        let mut text = String::new();
        for (key, words, number) in [
            ("required", "required size", Some(measured.required)),
            ("fully-allocated", "fully allocated size", Some(measured.fully_allocated)),
            ("bitmaps", "bitmaps size", measured.bitmaps),
        ] {
            if let Some(number) = number {
                object.insert(key.to_owned(), json!(number));
                text.push_str(&format!("{words}: {number}\n"));
            }
        }
        match self.output {
            Output::Json => print_json(&Value::Object(object))?,
            Output::Human => print(&text)?,
        }
        Ok(0)
    }

    async fn measure(
        &self,
        tool: &Tool,
        format: Format,
        options: &CreateOptions,
    ) -> Result<Measured> {
        let (st, source) = (&*tool.engine, &*tool.files);
        let image = match &self.image {
            Some(path) => Some(Image::open(st, source, path, &self.opening.looking()).await?),
            None => None,
        };
        let size = image.as_ref().map(Image::size).or(self.size);
        let size = size.ok_or_else(|| Error::refused("measuring", "neither image nor size"))?;
        if format == Format::Raw {
            return Ok(Measured { required: size, fully_allocated: size, bitmaps: None });
        }
        let map = match &image {
            Some(image) => Some(BlockMap::new(st, image).await?),
            None => None,
        };
        let options = CreateOptions { size, ..options.clone() };
        compare::measure(st, map.as_ref(), &options).await
    }
}
