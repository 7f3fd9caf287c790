//! `-o`: the layout of a new image, in qemu-img's words.

use crate::cli::size;
use crate::error::{Error, Result};
use crate::image::Format;
use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::header::Compression;

/// Every option with what it means; the first column is what `-o help` prints.
const HELP: &str = "\
Supported options:
  backing_file=<str>      - name of the backing file
  backing_fmt=<str>       - format of the backing file: qcow2 or raw
  cluster_size=<size>     - 512 bytes to 2 MiB, 64 KiB unless said
  compat=<str>            - version of the format: 0.10 (v2) or 1.1 (v3)
  compression_type=<str>  - how clusters are compressed: zlib or zstd
  data_file=<str>         - name of an external data file
  data_file_raw=<bool>    - the data file stays readable as a raw image
  extended_l2=<bool>      - L2 entries describe subclusters
  lazy_refcounts=<bool>   - refcounts are written late
  preallocation=<str>     - off, metadata, falloc or full
  refcount_bits=<num>     - width of a refcount, 1 to 64
  size=<size>             - size of the disk
A raw image has only preallocation (off, falloc or full) and size.
";

/// What `-o` says.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Of the disk, in bytes, if it is said.
    pub(super) size: Option<u64>,
    /// Everything else.
    pub(super) options: CreateOptions,
    /// Whether the options were asked for and nothing is to be done.
    pub(super) help: Option<&'static str>,
}

impl Layout {
    /// Parses the arguments of every `-o`; a comma in a value is doubled.
    ///
    /// # Errors
    /// `Refused`, with the name of an option that is not known or has no such value.
    pub(super) fn parse(arguments: &[String], format: Format) -> Result<Self> {
        let mut layout = Self { size: None, options: CreateOptions::new(0), help: None };
        for word in arguments.iter().flat_map(|argument| words(argument)) {
            if word == "help" || word == "?" {
                layout.help = Some(HELP);
                continue;
            }
            let (name, value) = word.split_once('=').unwrap_or((&word, "on"));
            if format == Format::Raw && !matches!(name, "preallocation" | "size") {
                return refuse(name, "a raw image has no such option");
            }
            if !layout.set(name, value)? {
                return refuse(name, "there is no such option; -o help lists them");
            }
        }
        if format == Format::Raw && layout.options.preallocation == Preallocation::Metadata {
            return refuse("preallocation", "a raw image has no metadata");
        }
        Ok(layout)
    }

    /// Sets one option; false when it is not known.
    fn set(&mut self, name: &str, value: &str) -> Result<bool> {
        let wrong = |why: &str| refuse(name, format!("{value:?} is no {why}"));
        let sized = |bytes: std::result::Result<u64, String>| {
            bytes.map_err(|why| Error::refused(format!("option {name}"), why))
        };
        let options = &mut self.options;
        match name {
            "size" => self.size = Some(sized(size::parse(value))?),
            "backing_file" => options.backing = Some(value.to_owned()),
            "backing_fmt" => options.backing_format = Some(value.to_owned()),
            "data_file" => options.data_file = Some(value.to_owned()),
            "data_file_raw" => options.data_file_raw = switch(name, value)?,
            "extended_l2" => options.extended_l2 = switch(name, value)?,
            "lazy_refcounts" => options.lazy_refcounts = switch(name, value)?,
            "cluster_size" => match sized(size::number(value))? {
                cluster if cluster.is_power_of_two() => options.cluster_bits = cluster.ilog2(),
                _ => return wrong("power of two"),
            },
            "refcount_bits" => match value.parse::<u32>() {
                Ok(bits) if bits.is_power_of_two() => options.refcount_order = bits.ilog2(),
                _ => return wrong("power of two"),
            },
            "compat" => match value {
                "0.10" | "v2" => options.version = 2,
                "1.1" | "v3" => options.version = 3,
                _ => return wrong("version; there are 0.10 and 1.1"),
            },
            "compression_type" => match value {
                "zlib" => options.compression = Compression::Zlib,
                "zstd" => options.compression = Compression::Zstd,
                _ => return wrong("way to compress; there are zlib and zstd"),
            },
            "preallocation" => match preallocation(value) {
                Some(mode) => options.preallocation = mode,
                None => return wrong("mode; there are off, metadata, falloc and full"),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The mode that `text` names.
pub(super) fn preallocation(text: &str) -> Option<Preallocation> {
    Some(match text {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return None,
    })
}

fn refuse<T>(name: &str, why: impl Into<Box<str>>) -> Result<T> {
    Err(Error::refused(format!("option {name}"), why))
}

/// What an option that is on or off says.
///
/// # Errors
/// `Refused` when it says neither.
pub(super) fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => refuse(name, format!("{value:?} is neither on nor off")),
    }
}

/// The words between commas; two commas are one of the word.
pub(super) fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let last = words.last_mut().expect("there is one");
        if letter != ',' {
            last.push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            last.push(',');
        } else {
            words.push(String::new());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Layout> {
        Layout::parse(&[text.to_owned()], Format::Qcow2)
    }

    #[test]
    fn options_are_taken_apart_as_qemu_img_does() {
        let layout = parse("backing_file=a,,b=c,cluster_size=2M,lazy_refcounts,refcount_bits=64");
        let options = layout.expect("good options").options;
        assert_eq!(options.backing.as_deref(), Some("a,b=c"));
        assert_eq!((options.cluster_bits, options.refcount_order), (21, 6));
        assert!(options.lazy_refcounts && !options.extended_l2);
        assert_eq!(parse("size=3M").expect("a size").size, Some(3 << 20));
        assert!(parse("help").expect("help").help.is_some());
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (text, name) in [
            ("clustersize=64k", "clustersize"),
            ("cluster_size=3k", "cluster_size"),
            ("cluster_size=500", "cluster_size"),
            ("refcount_bits=7", "refcount_bits"),
            ("compat=2", "compat"),
            ("lazy_refcounts=maybe", "lazy_refcounts"),
            ("compression_type=lz4", "compression_type"),
            ("preallocation=some", "preallocation"),
            ("encryption=on", "encryption"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(name), "{text}: {error}");
        }
        for text in ["cluster_size=64k", "preallocation=metadata"] {
            Layout::parse(&[text.to_owned()], Format::Raw).expect_err(text);
        }
    }
}
