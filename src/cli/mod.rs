//! The command line.

mod attach;
mod control;
pub mod ctl;
mod doors;
mod image;
mod inside;
mod interrupt;
pub mod logging;
mod manual;
pub mod packaging;
mod progress;
pub mod serve;
pub mod size;
pub mod socket;
mod takeover;
mod values;
pub mod verb;

use std::num::NonZero;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::builder::PossibleValuesParser;

use crate::blk::rates::RateLimits;
use crate::blk::{SERIAL_BYTES, Settings};
pub use crate::cli::values::{
    Cache, DiscardMode, Engine, FullMode, ImageFormat, Processors, ZeroesMode,
};
use crate::cli::values::{processors, queue_size, rates, serial};
use crate::error::Result;
use crate::image::policy::{DetectZeroes, Discards};
use crate::image::{Format, OpenOptions, Policy};
use crate::storage::files::Options as FileOptions;
use crate::storage::host::Aio;
use crate::worker::spin::WINDOW_US;

/// What `--print-capabilities` prints, as QEMU's conventions for back-end programs want it.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

const EXAMPLES: &str = "\
Examples:
  Serve an image, making a disk of 10 GiB if there is none:
    vhost-user-qcow2 --socket /tmp/vub.sock --image disk.qcow2 --create 10G
  Serve a raw image without the host's page cache:
    vhost-user-qcow2 --socket /tmp/vub.sock --image disk.raw --format raw --cache none
  Look at an image, with the verbs, options and exit codes of qemu-img:
    vhost-user-qcow2 info --output=json disk.qcow2
  Make the disk of a running guest larger:
    vhost-user-qcow2 --socket /tmp/vub.sock --image disk.qcow2 --control /tmp/ctl.sock &
    vhost-user-qcow2 ctl --control /tmp/ctl.sock resize size=20G

The arguments that attach the disk to QEMU and cloud-hypervisor are printed at start.
SIGTERM and SIGINT finish what is under way, flush, remove the socket and end with status 0.";

/// Serves a qcow2 or raw image as a disk to a guest of QEMU or cloud-hypervisor, over
/// vhost-user-blk.
#[derive(Debug, Clone, Parser)]
#[command(name = "vhost-user-qcow2", version, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(subcommand_help_heading = "Verbs", subcommand_value_name = "VERB")]
pub struct Arguments {
    /// What to do other than to serve an image
    #[command(subcommand)]
    pub verb: Option<verb::Verb>,

    /// The Unix socket to listen on
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// The image to serve
    #[arg(long, visible_alias = "blk-file", value_name = "PATH")]
    #[arg(required_unless_present_any = ["print_capabilities", "print_file"])]
    pub image: Option<PathBuf>,

    /// The image's format; a raw image is never guessed
    #[arg(long, short, value_enum)]
    pub format: Option<ImageFormat>,

    /// Refuse writes
    #[arg(long, short)]
    pub read_only: bool,

    /// Make a qcow2 image of this size if there is none: bytes, or a number with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub create: Option<u64>,

    /// Queues offered; the guest uses as many as it likes
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub num_queues: u16,

    /// The largest queue accepted, a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// The most worker threads; each starts with the first of its queues [default: processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,

    /// Microseconds for which a worker whose guest is quick looks for its next request before it
    /// sleeps; 0 never
    #[arg(long, value_name = "N", default_value_t = WINDOW_US)]
    #[arg(value_parser = clap::value_parser!(u16).range(0..=10_000))]
    pub poll_us: u16,

    /// How the host caches, and what a completed write means
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    pub cache: Cache,

    /// How files are read and written
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub aio: Engine,

    /// The disk's serial number, at most 20 bytes [default: the image's file name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub serial: Option<String>,

    /// The guest's block size in bytes
    #[arg(long, value_name = "BYTES", default_value = "512")]
    #[arg(value_parser = PossibleValuesParser::new(["512", "4096"]))]
    pub block_size: String,

    /// Let images refer to files in this directory as well as in their own; repeatable
    #[arg(long, value_name = "DIR")]
    pub allow_path: Vec<PathBuf>,

    /// The format of backing files whose format is not recorded
    #[arg(long, value_enum)]
    pub backing_format: Option<ImageFormat>,

    /// Compress what the guest writes, where it writes whole clusters to a new place
    #[arg(long)]
    pub compress: bool,

    /// What becomes of a guest's discards
    #[arg(long, value_enum, default_value_t = DiscardMode::Unmap)]
    pub discard: DiscardMode,

    /// What becomes of a guest's writes of nothing but zeros
    #[arg(long, value_enum, default_value_t = ZeroesMode::Off)]
    pub detect_zeroes: ZeroesMode,

    /// What happens when the host has no space left
    #[arg(long, value_enum, default_value_t = FullMode::Report)]
    pub on_enospc: FullMode,

    /// The Unix socket on which the disk can be looked at and resized, for `ctl`
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Limit the rate: bw_size=BYTES,bw_refill_time=MS,bw_one_time_burst=BYTES and the same with
    /// ops for requests; a bucket of that size is refilled in that time [default: 1000]
    #[arg(long, value_name = "KEY=N,...", value_parser = rates)]
    pub rate_limit: Option<RateLimits>,

    /// Take the disk over from the daemon that listens at this Unix socket, if one does, without a
    /// guest noticing; listen there for the next one
    #[arg(long, value_name = "PATH")]
    pub takeover: Option<PathBuf>,

    /// How much to log: error, warn, info, debug or trace [default: info]; RUST_LOG overrides it
    #[arg(long, value_name = "LEVEL")]
    #[arg(value_parser = PossibleValuesParser::new(["error", "warn", "info", "debug", "trace"]))]
    #[arg(hide_possible_values = true)]
    pub log_level: Option<String>,

    /// Whose the socket is, and what becomes of the process around it.
    #[command(flatten)]
    pub listening: socket::Listening,

    /// The processors that workers run on, such as 0-3,7; each worker keeps to one, in turn
    #[arg(long, value_name = "LIST", value_parser = processors)]
    pub cpus: Option<Processors>,

    /// Print what this back-end can do, as JSON, and end
    #[arg(long)]
    pub print_capabilities: bool,

    /// Print a file for packages and end: what tells QEMU and libvirt of this program, or a
    /// systemd unit
    #[arg(long, value_enum, value_name = "FILE")]
    pub print_file: Option<packaging::File>,
}

/// How many threads inflate clusters: more processors than these have better things to do.
fn inflaters() -> usize {
    const MOST: usize = 4;
    std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST)
}

impl Arguments {
    /// How the image is opened.
    fn open_options(&self) -> OpenOptions {
        OpenOptions {
            format: self.format.map(Format::from),
            read_only: self.read_only,
            allow_paths: self.allow_path.clone(),
            backing_format: self.backing_format.map(Format::from),
            compress: self.compress,
            inflaters: inflaters(),
            policy: self.policy(),
            ..OpenOptions::default()
        }
    }

    /// What becomes of discards and of zeros.
    fn policy(&self) -> Policy {
        let discards = match self.discard {
            DiscardMode::Ignore => Discards::Ignore,
            DiscardMode::Unmap => Discards::Unmap,
        };
        let detect_zeroes = match self.detect_zeroes {
            ZeroesMode::Off => DetectZeroes::Off,
            ZeroesMode::On => DetectZeroes::On,
            ZeroesMode::Unmap => DetectZeroes::Unmap,
        };
        Policy { discards, detect_zeroes }
    }

    /// Refuses arguments that contradict each other, before anything is touched.
    fn check(&self) -> Result<()> {
        self.policy().check()?;
        self.cpus.as_ref().map_or(Ok(()), Processors::check)
    }

    /// How files are opened.
    fn file_options(&self) -> FileOptions {
        FileOptions {
            direct: self.cache == Cache::None,
            sync: self.cache != Cache::Unsafe,
            stall: self.on_enospc == FullMode::Stall,
            ..FileOptions::default()
        }
    }

    /// What the guest sees, beside the image.
    fn settings(&self, image: &Path) -> Settings {
        let serial = match &self.serial {
            Some(text) => text.clone(),
            None => image.file_name().unwrap_or_default().to_string_lossy().replace(' ', "_"),
        };
        let mut padded = [0; SERIAL_BYTES];
        for (target, byte) in padded.iter_mut().zip(serial.bytes()) {
            *target = byte;
        }
        Settings {
            block_size: if self.block_size == "4096" { 4096 } else { 512 },
            queues: self.num_queues,
            queue_size: self.queue_size,
            serial: padded,
            write_back: self.cache != Cache::Writethrough,
        }
    }

    fn aio(&self) -> Aio {
        match self.aio {
            Engine::Auto => Aio::Auto,
            Engine::IoUring => Aio::IoUring,
            Engine::Threads => Aio::Threads,
        }
    }

    /// The most worker threads: more than queues would have nothing to do.
    fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or_else(processors, usize::from);
        threads.min(usize::from(self.num_queues))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Arguments {
        let needed = ["vhost-user-qcow2", "--socket-path", "s", "--blk-file", "a disk.qcow2"];
        Arguments::try_parse_from(needed.iter().chain(arguments)).expect("good arguments")
    }

    #[test]
    fn every_cache_mode_means_what_it_says() {
        for (mode, direct, sync, write_back) in [
            ("writeback", false, true, true),
            ("none", true, true, true),
            ("writethrough", false, true, false),
            ("unsafe", false, false, true),
        ] {
            let arguments = parse(&["--cache", mode]);
            let files = arguments.file_options();
            let settings = arguments.settings(Path::new("x"));
            assert_eq!((files.direct, files.sync), (direct, sync), "{mode}");
            assert_eq!(settings.write_back, write_back, "{mode}");
        }
    }

    #[test]
    fn the_serial_number_is_padded_and_defaults_to_the_files_name() {
        let arguments = parse(&[]);
        let image = arguments.image.clone().expect("an image");
        assert_eq!(&arguments.settings(&image).serial, b"a_disk.qcow2\0\0\0\0\0\0\0\0");
        let long = Path::new("/x/a-name-of-more-than-twenty-bytes.qcow2");
        assert_eq!(&arguments.settings(long).serial, b"a-name-of-more-than-");
        let arguments = parse(&["--serial", "12345678901234567890"]);
        assert_eq!(&arguments.settings(long).serial, b"12345678901234567890");
    }

    #[test]
    fn by_default_discards_unmap_zeros_are_data_and_a_full_host_is_reported() {
        let arguments = parse(&[]);
        assert_eq!(arguments.policy(), Policy::default());
        assert!(!arguments.file_options().stall);
        arguments.check().expect("the defaults agree");
    }

    #[test]
    fn what_becomes_of_discards_zeros_and_a_lack_of_space() {
        let policy = |words: &[&str]| parse(words).policy();
        for (word, discards) in [
            ("ignore", Discards::Ignore),
            ("off", Discards::Ignore),
            ("unmap", Discards::Unmap),
            ("on", Discards::Unmap),
        ] {
            assert_eq!(policy(&["--discard", word]).discards, discards, "{word}");
        }
        for (word, detect_zeroes) in
            [("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)]
        {
            assert_eq!(policy(&["--detect-zeroes", word]).detect_zeroes, detect_zeroes, "{word}");
        }
        assert!(parse(&["--on-enospc", "stall"]).file_options().stall);
        let error = parse(&["--detect-zeroes", "unmap", "--discard", "ignore"]).check();
        let error = error.expect_err("a contradiction").to_string();
        assert!(error.contains("--detect-zeroes on"), "{error}");
    }

    #[test]
    fn the_defaults_let_a_guest_with_many_processors_start() {
        let arguments = parse(&[]);
        assert_eq!((arguments.num_queues, arguments.queue_size), (64, 1024));
        assert!(arguments.threads() >= 1);
        assert_eq!(parse(&["--threads", "9", "--num-queues", "3"]).threads(), 3);
    }

    #[test]
    fn wrong_values_are_refused() {
        for wrong in [
            ["--queue-size", "100"],
            ["--queue-size", "1"],
            ["--fd", "2"],
            ["--socket-mode", "999"],
            ["--socket-mode", "10666"],
            ["--socket-group", "no group has this name"],
            ["--cpus", "3-1"],
            ["--cpus", ""],
            ["--cpus", "0,,1"],
            ["--cpus", "9999999"],
            ["--queue-size", "65536"],
            ["--num-queues", "0"],
            ["--num-queues", "257"],
            ["--threads", "0"],
            ["--poll-us", "10001"],
            ["--serial", "123456789012345678901"],
            ["--block-size", "1024"],
            ["--create", "ten"],
            ["--format", "vmdk"],
            ["--discard", "yes"],
            ["--detect-zeroes", "yes"],
            ["--on-enospc", "stop"],
            ["--log-level", "loud"],
            ["--rate-limit", "bw_size"],
            ["--rate-limit", "bw_size=1,bw_refill_time=0"],
        ] {
            let words = ["x", "--socket", "s", "--image", "i"];
            assert!(Arguments::try_parse_from(words.iter().chain(&wrong)).is_err(), "{wrong:?}");
        }
        Arguments::try_parse_from(["x", "--print-capabilities"]).expect("needs nothing else");
    }
}
