//! `convert`: a copy of one or several disks in another file, format or layout.

use std::path::{Path, PathBuf};
use std::thread;

use clap::{Args, ValueEnum};

use crate::cli::image::options::Layout;
use crate::cli::image::target::{self, is_device, lock_old};
use crate::cli::image::{Opening, Sharing, Tool, print};
use crate::cli::interrupt::Interrupts;
use crate::cli::progress::Reporting;
use crate::cli::{ImageFormat, size};
use crate::error::{Error, Result};
use crate::image::convert::{self, Options, Outcome};
use crate::image::make::NewImage;
use crate::image::{Format, Image, OpenOptions};
use crate::qcow2::bitmap::StoredBitmap;
use crate::qcow2::create::Preallocation;
use crate::storage::appear::{Appearing, Foreseen};
use crate::storage::files::Options as FileOptions;
use crate::storage::host::{self, Aio};

const EXAMPLES: &str = "\
The target appears under its name when it is complete and durable. What was there before is
replaced then, and stays when the copy fails, is interrupted, or killed. With -n, and on a block
device, bytes are written in place. A data file (-o data_file=FILE) that is there already is emptied
at the beginning, whatever becomes of the copy.

Examples:
  vhost-user-qcow2 convert -f raw -O qcow2 disk.raw disk.qcow2
  vhost-user-qcow2 convert -f qcow2 -O raw disk.qcow2 disk.raw
  vhost-user-qcow2 convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2
  vhost-user-qcow2 convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2
  vhost-user-qcow2 convert -l before-upgrade -O qcow2 disk.qcow2 then.qcow2
  vhost-user-qcow2 convert --bitmaps -O qcow2 disk.qcow2 copy.qcow2
  vhost-user-qcow2 convert -O qcow2 disk.qcow2 - | ssh host 'cat > disk.qcow2'
  vhost-user-qcow2 convert -c -O qcow2 disk.qcow2 - > small.qcow2";

/// How the target is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum TargetCache {
    /// Through the page cache; durable at the end
    Writeback,
    /// Around the page cache (O_DIRECT), the source too; durable at the end
    None,
    /// Through the page cache; a power cut soon after the end may lose it
    Unsafe,
}

/// The arguments of `convert`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Convert {
    /// The images to copy, one behind the other, and the target last; `-` is standard output
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// The target's format
    #[arg(long, short = 'O', value_enum, default_value = "raw")]
    target_format: ImageFormat,

    /// The target's layout, `name=value,...`; `-o help` lists the options
    #[arg(long, short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Compress the target's clusters
    #[arg(long, short)]
    compress: bool,

    /// The target's backing file, which holds what the source's does; only what differs is copied
    #[arg(long = "backing-file", short = 'B', visible_short_alias = 'b', value_name = "FILE")]
    backing: Option<String>,

    /// The format of the target's backing file
    #[arg(long = "target-backing-format", short = 'F', value_enum, value_name = "FORMAT")]
    recorded_format: Option<ImageFormat>,

    /// Copy what this internal snapshot holds: its id or name
    #[arg(long, short = 'l', value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Leave holes for so many bytes of zeros; 0 writes everything
    #[arg(long, short = 'S', value_name = "SIZE", value_parser = size::parse)]
    #[arg(default_value = "4k")]
    sparse_size: u64,

    /// The target is there already and is written in place
    #[arg(long = "no-create", short = 'n')]
    existing: bool,

    /// The existing target reads as zeros
    #[arg(long, requires = "existing")]
    target_is_zero: bool,

    /// Let the target's clusters come in any order, which is faster
    #[arg(long, short = 'W')]
    out_of_order: bool,

    /// How many pieces are copied at once
    #[arg(long, short = 'm', value_name = "N", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,

    /// Copy the source's persistent bitmaps, too
    #[arg(long)]
    bitmaps: bool,

    /// Leave bitmaps out that are inconsistent, cannot be read, or are of a kind that is not known
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// How the target is written
    #[arg(long, short = 't', value_enum, value_name = "CACHE", default_value = "writeback")]
    target_cache: TargetCache,

    /// Keep what is there of the target when the copy is interrupted
    #[arg(long)]
    keep_partial: bool,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Convert {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When the options contradict each other, a source cannot be read, or the target not be made
    /// or written. A target that was begun is gone then, unless it was there before.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let format = Format::from(self.target_format);
        let layout = Layout::parse(&self.options, format)?;
        if let Some(help) = layout.help {
            print(help)?;
            return Ok(0);
        }
        // Options may come between them, so that it is not the parser who counts.
        let [sources @ .., target] = self.images.as_slice() else { return no_target() };
        if sources.is_empty() {
            return no_target();
        }
        let new = self.new_image(target, layout, format)?;
        let streams = target.as_os_str() == "-";
        let in_place = !streams && (self.existing || is_device(target));
        let tool = Tool::with(FileOptions {
            direct: self.target_cache == TargetCache::None,
            // A file that nobody can see yet is made durable once, when it is complete.
            sync: in_place && self.target_cache != TargetCache::Unsafe,
            lock: !self.sharing.is_forced(),
            ..FileOptions::default()
        })?;
        let interrupts = Interrupts::watch()?;
        let sources = tool.run(self.open_sources(&tool, sources))?;
        let new = NewImage { size: Some(new.size.unwrap_or(convert::size(&sources)?)), ..new };
        let mut copy =
            Copy { arguments: self, tool: &tool, interrupts: &interrupts, bitmaps: Vec::new() };
        copy.bitmaps = copy.find_bitmaps(&sources, target, &new)?;
        if streams {
            copy.convert_to_stream(&sources, &new)
        } else if in_place {
            copy.convert_to_existing(&sources, target, &new)
        } else {
            copy.convert_to_new(&sources, target, &new)
        }
    }

    fn new_image(&self, target: &Path, layout: Layout, format: Format) -> Result<NewImage> {
        let name = || target.display().to_string();
        let refuse = |why: &str| Err(Error::refused(name(), why));
        let mut options = layout.options;
        options.backing = self.backing.clone().or(options.backing);
        let recorded = self.recorded_format.map(|format| match format {
            ImageFormat::Qcow2 => "qcow2".to_owned(),
            ImageFormat::Raw => "raw".to_owned(),
        });
        options.backing_format = recorded.or(options.backing_format);
        if self.opening.read_only {
            return refuse("nothing is made read-only");
        }
        if format == Format::Raw && (options.backing.is_some() || self.compress) {
            return refuse("a raw image has neither a backing file nor compressed clusters");
        }
        if options.backing.is_none() && options.backing_format.is_some() {
            return refuse("the format of a backing file that is not named");
        }
        if options.backing.is_some() && self.images.len() > 2 {
            return refuse("only a copy of one image can have a backing file");
        }
        if self.existing && !self.options.is_empty() {
            return refuse("an image that is there already has a layout; -o is for new ones");
        }
        if self.compress && options.data_file.is_some() {
            return refuse("an image with an external data file cannot hold compressed clusters");
        }
        self.check_bitmaps(target, format)?;
        Ok(NewImage {
            format,
            size: layout.size,
            layout: options,
            replace: true,
            trust_backing: false,
        })
    }

    /// Whether there can be bitmaps to copy, and a place for them.
    fn check_bitmaps(&self, target: &Path, format: Format) -> Result<()> {
        let why = if !self.bitmaps {
            return Ok(());
        } else if format == Format::Raw {
            "a raw image has no bitmaps; copy them to a qcow2 image (-O qcow2)"
        } else if target.as_os_str() == "-" {
            "a stream has no bitmaps; write to a file"
        } else if self.images.len() > 2 {
            "bitmaps are copied from one image, not from several"
        } else if self.snapshot.is_some() {
            "bitmaps tell of the disk as it is now, not of a snapshot"
        } else {
            return Ok(());
        };
        Err(Error::refused(target.display().to_string(), why))
    }

    async fn open_sources(&self, tool: &Tool, sources: &[PathBuf]) -> Result<Vec<Image>> {
        let (st, files) = (&*tool.engine, &*tool.files);
        let mut opened = Vec::new();
        for path in sources {
            let mut image = Image::open(st, files, path, &self.opening.looking()).await?;
            if let Some(key) = &self.snapshot {
                image.show_snapshot(st, snapshot_key(key)).await?;
            }
            opened.push(image);
        }
        Ok(opened)
    }

    fn options(&self, new: &NewImage, target_is_zero: bool) -> Options {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Options {
            parallel: usize::from(self.parallel),
            threads,
            out_of_order: self.out_of_order,
            compress: self.compress,
            sparse: self.sparse_size,
            target_is_zero,
            keep_backing: new.layout.backing.is_some(),
        }
    }
}

/// One copy.
struct Copy<'a> {
    arguments: &'a Convert,
    tool: &'a Tool,
    interrupts: &'a Interrupts,
    /// The bitmaps that the target gets when everything else is there.
    bitmaps: Vec<StoredBitmap>,
}

impl Copy<'_> {
    /// Copies into a file that appears when it is complete.
    fn convert_to_new(&self, sources: &[Image], target: &Path, new: &NewImage) -> Result<u8> {
        let _lock = lock_old(target)?;
        let file = Appearing::new(target)?;
        let begun = target::begun(target, new);
        let begun = begun.as_deref();
        let status =
            self.fill(sources, target, new, &file).inspect_err(|_| target::discard(begun))?;
        if status == 0 || self.arguments.keep_partial {
            let durable = self.arguments.target_cache != TargetCache::Unsafe;
            file.publish(durable)?;
        } else {
            target::discard(begun);
        }
        Ok(status)
    }

    fn fill(
        &self,
        sources: &[Image],
        target: &Path,
        new: &NewImage,
        file: &Appearing,
    ) -> Result<u8> {
        let opening = OpenOptions {
            format: Some(new.format),
            allow_paths: self.arguments.opening.allow_path.clone(),
            ..OpenOptions::default()
        };
        let tool = self.tool;
        target::make(tool, target, new, &opening, Some(file))?;
        let source = Foreseen { source: &*tool.files, path: target, file };
        let mut image = tool.run(Image::open(&*tool.engine, &source, target, &opening))?;
        self.copy(sources, &mut image, new, true)
    }

    /// Copies to standard output, from front to back.
    fn convert_to_stream(&self, sources: &[Image], new: &NewImage) -> Result<u8> {
        let arguments = self.arguments;
        if arguments.existing {
            return Err(Error::refused("standard output", "there is no image yet (-n)"));
        }
        if new.size != Some(convert::size(sources)?) {
            let why = "a stream is as large as what it is made of; -o size is not for it";
            return Err(Error::refused("standard output", why));
        }
        let layout = (new.format == Format::Qcow2).then_some(&new.layout);
        let options = arguments.options(new, true);
        let (engine, files) = (&*self.tool.engine, &self.tool.files);
        self.watched(sources, true, |watch| {
            let output = Box::new(std::io::stdout());
            let make = |lane| host::engine(Aio::Auto, files, lane);
            convert::stream(sources, output, layout, &options, engine, &make, watch)
        })
    }

    /// Copies into what is there already.
    fn convert_to_existing(&self, sources: &[Image], target: &Path, new: &NewImage) -> Result<u8> {
        let tool = self.tool;
        let opening = OpenOptions { format: Some(new.format), ..self.arguments.opening.options() };
        let _lock = if self.arguments.sharing.is_forced() { lock_old(target)? } else { None };
        let mut zero = self.arguments.target_is_zero;
        if !self.arguments.existing {
            target::make(tool, target, new, &opening, None)?;
            // A block device holds anything, but nothing of it is shown before it is allocated.
            let layout = &new.layout;
            zero = new.format == Format::Qcow2
                && layout.preallocation == Preallocation::Off
                && layout.data_file.is_none();
        }
        let mut image = tool.run(Image::open(&*tool.engine, &*tool.files, target, &opening))?;
        self.copy(sources, &mut image, new, zero)
    }

    fn copy(
        &self,
        sources: &[Image],
        target: &mut Image,
        new: &NewImage,
        zero: bool,
    ) -> Result<u8> {
        let files = &self.tool.files;
        let options = self.arguments.options(new, zero);
        let bitmaps = &self.bitmaps;
        if !bitmaps.is_empty() {
            let fit = convert::check_bitmaps(&*self.tool.engine, &sources[0], bitmaps, target);
            self.tool.run(fit)?;
        }
        let status = self.watched(sources, false, |watch| {
            let make = |lane| host::engine(Aio::Auto, files, lane);
            convert::convert(sources, target, &options, &*self.tool.engine, &make, watch)
        })?;
        if status != 0 || bitmaps.is_empty() {
            return Ok(status);
        }
        let mut goes_on = || self.interrupts.status().is_none();
        let st = &*self.tool.engine;
        let copied = convert::copy_bitmaps(st, &sources[0], bitmaps, target, &mut goes_on);
        Ok(match self.tool.run(copied)? {
            Outcome::Complete => 0,
            Outcome::Stopped => self.interrupts.status().unwrap_or(1),
        })
    }

    /// Finds out which bitmaps the target gets, before anything of it is touched.
    fn find_bitmaps(
        &self,
        sources: &[Image],
        target: &Path,
        new: &NewImage,
    ) -> Result<Vec<StoredBitmap>> {
        let [source] = sources else { return Ok(Vec::new()) };
        if !self.arguments.bitmaps {
            return Ok(Vec::new());
        }
        let st = &*self.tool.engine;
        let found = self.tool.run(convert::source_bitmaps(st, source))?;
        let path = self.arguments.images[0].display();
        for (name, why) in found.broken {
            let what = format!("the bitmap {name:?} cannot be copied: {why}");
            if !self.arguments.skip_broken_bitmaps {
                let help = "leave it out with --skip-broken-bitmaps, or remove it";
                return Err(Error::refused(path.to_string(), format!("{what}; {help}")));
            }
            eprintln!("vhost-user-qcow2: {path}: {what}, and is left out");
        }
        if let (false, Some(size)) = (self.arguments.existing, new.size) {
            let name = target.display().to_string();
            convert::check_fit(source, &name, new.layout.version, size)?;
        }
        Ok(found.usable)
    }

    /// Runs a copy, telling how far it is; returns the exit status.
    fn watched(
        &self,
        sources: &[Image],
        streams: bool,
        copy: impl FnOnce(&mut dyn FnMut(u64) -> bool) -> Result<Outcome>,
    ) -> Result<u8> {
        let arguments = self.arguments;
        let size = convert::size(sources)?;
        let mut told = arguments.reporting.start("convert", size, arguments.quiet, streams);
        let outcome = copy(&mut |done| {
            told.set(done);
            self.interrupts.status().is_none()
        })?;
        match outcome {
            Outcome::Complete => {
                told.finish();
                Ok(0)
            }
            Outcome::Stopped => Ok(self.interrupts.status().unwrap_or(1)),
        }
    }
}

fn no_target() -> Result<u8> {
    Err(Error::refused("convert", "say what is copied and where to: two images or more"))
}

/// What qemu-img takes too: `snapshot.id=ID` and `snapshot.name=NAME`.
fn snapshot_key(text: &str) -> &str {
    let words = text.strip_prefix("snapshot.id=").or(text.strip_prefix("snapshot.name="));
    words.unwrap_or(text)
}
