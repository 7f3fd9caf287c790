//! `create`: a new image.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::image::options::Layout;
use crate::cli::image::{Tool, print, target};
use crate::cli::progress::{Reporting, Steps};
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::make::{self, NewImage};
use crate::image::{Format, OpenOptions};
use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::header::Compression;
use crate::storage::appear::{Appearing, Foreseen};

const EXAMPLES: &str = "\
A file that is there already is replaced, unless it is in use. A data file (-o data_file=FILE) that
is there already is emptied, even if the image cannot be made.

Examples:
  vhost-user-qcow2 create disk.qcow2 10G
  vhost-user-qcow2 create -b base.qcow2 -F qcow2 overlay.qcow2
  vhost-user-qcow2 create -o cluster_size=2M,compression_type=zstd disk.qcow2 1T
  vhost-user-qcow2 create -f raw -o preallocation=falloc disk.raw 10G";

/// The arguments of `create`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Create {
    /// The image
    image: PathBuf,

    /// The disk's size: bytes, or a number with K, M, G or T [default: the backing file's]
    #[arg(value_parser = size::parse)]
    size: Option<u64>,

    /// The image's format
    #[arg(long, short, value_enum, default_value = "qcow2")]
    format: ImageFormat,

    /// The backing file, relative to the new image
    #[arg(long, short, value_name = "FILE")]
    backing_file: Option<String>,

    /// The backing file's format
    #[arg(long, short = 'F', value_enum)]
    backing_format: Option<ImageFormat>,

    /// The layout, `name=value,...`; `-o help` lists the options
    #[arg(long, short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Do not look at the backing file
    #[arg(long = "unsafe", short = 'u')]
    trust_backing: bool,

    /// Let the image refer to files in this directory as well as in its own; repeatable
    #[arg(long, value_name = "DIR")]
    allow_path: Vec<PathBuf>,

    /// Refuse to make anything
    #[arg(long)]
    read_only: bool,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Create {
    /// Does it.
    ///
    /// # Errors
    /// When the options contradict each other, a file that the image refers to cannot be opened, or
    /// the image cannot be written. A file that was begun is removed.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let format = Format::from(self.format);
        let layout = Layout::parse(&self.options, format)?;
        if let Some(help) = layout.help {
            print(help)?;
            return Ok(0);
        }
        let new = self.new_image(layout, format)?;
        let options = OpenOptions {
            read_only: self.read_only,
            allow_paths: self.allow_path.clone(),
            ..OpenOptions::default()
        };
        let tool = Tool::new()?;
        let begun = target::begun(&self.image, &new);
        let mut steps = self.reporting.steps("create", self.quiet);
        let made = if target::is_device(&self.image) {
            let mut progress = |done, of| steps.set(done, of);
            let (st, source) = (&*tool.engine, &*tool.files);
            tool.run(make::make_told(st, source, &self.image, &new, &options, &mut progress))
        } else {
            self.make_appear(&tool, &new, &options, &mut steps)
        };
        let made = made.inspect_err(|_| target::discard(begun.as_deref()))?;
        steps.finish();
        if !self.quiet {
            print(&describe(&self.image, format, &made))?;
        }
        Ok(0)
    }

    /// Makes a file that is there only when it is complete, however this ends.
    fn make_appear(
        &self,
        tool: &Tool,
        new: &NewImage,
        options: &OpenOptions,
        steps: &mut Steps,
    ) -> Result<CreateOptions> {
        let _lock = target::lock_old(&self.image)?;
        let file = Appearing::new(&self.image)?;
        let source = Foreseen { source: &*tool.files, path: &self.image, file: &file };
        let mut progress = |done, of| steps.set(done, of);
        let work =
            make::make_told(&*tool.engine, &source, &self.image, new, options, &mut progress);
        let made = tool.run(work)?;
        file.publish(true)?;
        Ok(made)
    }

    fn new_image(&self, layout: Layout, format: Format) -> Result<NewImage> {
        let name = self.image.display().to_string();
        if format == Format::Raw && self.backing_file.is_some() {
            return Err(Error::refused(name, "a raw image has no backing file"));
        }
        let mut options = layout.options;
        let backing_format = self.backing_format.map(|format| match format {
            ImageFormat::Qcow2 => "qcow2".to_owned(),
            ImageFormat::Raw => "raw".to_owned(),
        });
        options.backing = self.backing_file.clone().or(options.backing);
        options.backing_format = backing_format.or(options.backing_format);
        if options.backing.is_none() && options.backing_format.is_some() {
            return Err(Error::refused(name, "the format of a backing file that is not named"));
        }
        let (size, trust_backing) = (self.size.or(layout.size), self.trust_backing);
        Ok(NewImage { format, size, layout: options, replace: true, trust_backing })
    }
}

/// What was made, in qemu-img's words.
fn describe(path: &Path, format: Format, made: &CreateOptions) -> String {
    let switch = |on: bool| if on { "on" } else { "off" };
    let mode = match made.preallocation {
        Preallocation::Off => None,
        Preallocation::Metadata => Some("metadata"),
        Preallocation::Falloc => Some("falloc"),
        Preallocation::Full => Some("full"),
    };
    let mode = mode.map_or_else(String::new, |mode| format!(" preallocation={mode}"));
    if format == Format::Raw {
        return format!("Formatting '{}', fmt=raw size={}{mode}\n", path.display(), made.size);
    }
    let mut text = format!(
        "Formatting '{}', fmt=qcow2 cluster_size={} extended_l2={}{mode} compression_type={} \
         size={}",
        path.display(),
        1_u64 << made.cluster_bits,
        switch(made.extended_l2),
        if made.compression == Compression::Zlib { "zlib" } else { "zstd" },
        made.size
    );
    for (name, value) in [
        ("backing_file", &made.backing),
        ("backing_fmt", &made.backing_format),
        ("data_file", &made.data_file),
    ] {
        if let Some(value) = value {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    if made.data_file_raw {
        text.push_str(" data_file_raw=on");
    }
    if made.version < 3 {
        text.push_str(" compat=0.10");
    }
    let (lazy, bits) = (switch(made.lazy_refcounts), 1_u32 << made.refcount_order);
    text.push_str(&format!(" lazy_refcounts={lazy} refcount_bits={bits}\n"));
    text
}
