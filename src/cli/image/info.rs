//! `info`: what an image is.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::image::{Opening, Output, Sharing, Tool, human, print, print_json};
use crate::error::Result;
use crate::image::Format;
use crate::image::inspect::{Facts, Qcow2Facts, inspect};
use crate::qcow2::bitmap::BitmapFacts;
use crate::qcow2::format::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY};
use crate::qcow2::header::Compression;
use crate::qcow2::snapshot::Snapshot;

const EXAMPLES: &str = "\
Examples:
  vhost-user-qcow2 info disk.qcow2
  vhost-user-qcow2 info --backing-chain --output=json overlay.qcow2
  vhost-user-qcow2 info -U running.qcow2";

/// The arguments of `info`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Info {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// Tell of the images below as well; without this nothing but the image itself is opened
    #[arg(long)]
    backing_chain: bool,

    /// What is printed
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

impl Info {
    /// Does it.
    ///
    /// # Errors
    /// When the image cannot be opened or its lists cannot be read.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::looking(self.sharing)?;
        let (options, chain) = (self.opening.looking(), self.backing_chain);
        let found = inspect(&*tool.engine, &*tool.files, &self.image, &options, chain);
        let all = tool.run(found)?;
        match self.output {
            Output::Json if chain => print_json(&all.iter().map(json_of).collect())?,
            Output::Json => print_json(&all.first().map_or(Value::Null, json_of))?,
            Output::Human => {
                let texts: Vec<String> = all.iter().map(human_of).collect();
                print(&texts.join("\n"))?;
            }
        }
        Ok(0)
    }
}

/// A path as text.
fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Adds keys to an object.
fn add(object: &mut Map<String, Value>, more: Value) {
    if let Value::Object(more) = more {
        object.extend(more);
    }
}

fn json_of(facts: &Facts) -> Value {
    let mut object = Map::new();
    add(
        &mut object,
        json!({
            "children": [{"name": "file", "info": file_of(facts)}],
            "virtual-size": facts.virtual_size,
            "filename": text(&facts.path),
            "format": if facts.format == Format::Raw { "raw" } else { "qcow2" },
            "actual-size": facts.allocated,
            "dirty-flag": false,
        }),
    );
    let Some(qcow2) = &facts.qcow2 else { return Value::Object(object) };
    let header = &qcow2.header;
    add(
        &mut object,
        json!({
            "cluster-size": header.geometry.cluster_size(),
            "dirty-flag": header.incompatible & INCOMPATIBLE_DIRTY != 0,
            "format-specific": {"type": "qcow2", "data": specific(qcow2)},
        }),
    );
    if let (Some(name), Some(full)) = (&header.backing, facts.full_backing()) {
        add(&mut object, json!({"backing-filename": name, "full-backing-filename": text(&full)}));
        if let Some(format) = &header.backing_format {
            add(&mut object, json!({"backing-filename-format": format}));
        }
    }
    if !qcow2.snapshots.is_empty() {
        let list: Value = qcow2.snapshots.iter().map(snapshot).collect();
        add(&mut object, json!({"snapshots": list}));
    }
    Value::Object(object)
}

/// The node of the image's file.
fn file_of(facts: &Facts) -> Value {
    let kind = if facts.is_device { "host_device" } else { "file" };
    json!({
        "children": [],
        "virtual-size": crate::bytes::round_up(facts.file_length, 512),
        "filename": text(&facts.path),
        "format": kind,
        "actual-size": facts.allocated,
        "format-specific": {"type": "file", "data": {}},
        "dirty-flag": false,
    })
}

fn compression(qcow2: &Qcow2Facts) -> &'static str {
    match qcow2.header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

fn flags(bitmap: &BitmapFacts) -> Vec<&'static str> {
    let both = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    both.into_iter().filter_map(|(set, name)| set.then_some(name)).collect()
}

fn specific(qcow2: &Qcow2Facts) -> Value {
    let header = &qcow2.header;
    let mut data = Map::new();
    add(
        &mut data,
        json!({
            "compat": if header.version < 3 { "0.10" } else { "1.1" },
            "compression-type": compression(qcow2),
            "refcount-bits": 1 << header.geometry.refcount_order,
        }),
    );
    if header.version < 3 {
        return Value::Object(data);
    }
    add(
        &mut data,
        json!({
            "lazy-refcounts": header.is_lazy(),
            "corrupt": header.incompatible & INCOMPATIBLE_CORRUPT != 0,
            "extended-l2": header.geometry.rules.extended,
        }),
    );
    if header.geometry.rules.data_file {
        add(&mut data, json!({"data-file-raw": header.is_raw_data()}));
        if let Some(name) = &header.data_file {
            add(&mut data, json!({"data-file": name}));
        }
    }
    if !qcow2.bitmaps.is_empty() {
        let bitmap = |it: &BitmapFacts| {
            let flags = flags(it);
            json!({"name": it.name, "granularity": it.granularity, "flags": flags})
        };
        let list: Value = qcow2.bitmaps.iter().map(bitmap).collect();
        add(&mut data, json!({"bitmaps": list}));
    }
    Value::Object(data)
}

/// A snapshot with qemu-img's keys.
pub(super) fn snapshot(one: &Snapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut object = Map::new();
    add(
        &mut object,
        json!({
            "id": one.id,
            "name": one.name,
            "vm-state-size": one.vm_state_size,
            "date-sec": one.date_seconds,
            "date-nsec": one.date_nanoseconds,
            "vm-clock-sec": one.vm_clock_nanoseconds / SECOND,
            "vm-clock-nsec": one.vm_clock_nanoseconds % SECOND,
        }),
    );
    if let Some(icount) = one.icount {
        add(&mut object, json!({"icount": icount}));
    }
    Value::Object(object)
}

fn human_of(facts: &Facts) -> String {
    let mut lines = vec![
        format!("image: {}", facts.path.display()),
        format!("file format: {}", if facts.format == Format::Raw { "raw" } else { "qcow2" }),
        format!("virtual size: {}", human::size(facts.virtual_size)),
        format!("disk size: {}", human::bytes(facts.allocated)),
    ];
    let mut tables = String::new();
    if let Some(qcow2) = &facts.qcow2 {
        let header = &qcow2.header;
        lines.push(format!("cluster_size: {}", header.geometry.cluster_size()));
        if header.incompatible & INCOMPATIBLE_DIRTY != 0 {
            lines.push("cleanly shut down: no".to_owned());
        }
        if let (Some(name), Some(full)) = (&header.backing, facts.full_backing()) {
            let full = text(&full);
            let actual =
                if full == *name { String::new() } else { format!(" (actual path: {full})") };
            lines.push(format!("backing file: {name}{actual}"));
            let format = header.backing_format.iter();
            lines.extend(format.map(|format| format!("backing file format: {format}")));
        }
        tables = human::snapshots(&qcow2.snapshots);
        tables.push_str(&human_specific(qcow2));
    }
    let kind = if facts.is_device { "host_device" } else { "file" };
    let file = format!(
        "Child node '/file':\n    filename: {}\n    protocol type: {kind}\n    \
         file length: {}\n    disk size: {}\n",
        facts.path.display(),
        human::size(crate::bytes::round_up(facts.file_length, 512)),
        human::bytes(facts.allocated)
    );
    format!("{}\n{tables}{file}", lines.join("\n"))
}

fn human_specific(qcow2: &Qcow2Facts) -> String {
    let header = &qcow2.header;
    let mut text = String::from("Format specific information:\n");
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "    {name}: {value}");
    };
    line("compat", &if header.version < 3 { "0.10" } else { "1.1" });
    line("compression type", &compression(qcow2));
    if header.version > 2 {
        line("lazy refcounts", &header.is_lazy());
    }
    if header.version > 2 && !qcow2.bitmaps.is_empty() {
        let mut list = String::new();
        for (number, bitmap) in qcow2.bitmaps.iter().enumerate() {
            let _ = write!(list, "\n        [{number}]:\n            flags:");
            for (number, flag) in flags(bitmap).iter().enumerate() {
                let _ = write!(list, "\n                [{number}]: {flag}");
            }
            let _ = write!(list, "\n            name: {}", bitmap.name);
            let _ = write!(list, "\n            granularity: {}", bitmap.granularity);
        }
        line("bitmaps", &list);
    }
    line("refcount bits", &(1_u32 << header.geometry.refcount_order));
    if header.version > 2 {
        if let Some(name) = &header.data_file {
            line("data file", name);
        }
        if header.geometry.rules.data_file {
            line("data file raw", &header.is_raw_data());
        }
        line("corrupt", &(header.incompatible & INCOMPATIBLE_CORRUPT != 0));
        line("extended l2", &header.geometry.rules.extended);
    }
    text
}
