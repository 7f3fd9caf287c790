//! `check`: contradictions and leaks.

use std::cell::RefCell;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::cli::image::{Opening, Output, Sharing, Tool, print, print_json};
use crate::cli::progress::Reporting;
use crate::cli::serve::complaint;
use crate::error::{Error, Kind, Result};
use crate::image::offline::check_image;
use crate::qcow2::check::{Repair, Report};

/// Exit status: the check could not be completed.
const FAILED: u8 = 1;
/// Exit status: the image is corrupt.
const CORRUPT: u8 = 2;
/// Exit status: the image has leaks, and nothing worse.
const LEAKS: u8 = 3;
/// Exit status: images of this format cannot be checked.
const UNSUPPORTED: u8 = 63;

const EXAMPLES: &str = "\
Exit status: 0 nothing is wrong, 1 the check could not be completed, 2 the image is corrupt,
3 it has leaks and nothing worse, 63 images of this format cannot be checked. A repair can be
interrupted or killed at any time, and be done again. What is told of progress are bytes of tables;
a repair looks at them several times.

Examples:
  vhost-user-qcow2 check disk.qcow2
  vhost-user-qcow2 check -r leaks disk.qcow2
  vhost-user-qcow2 check -r all --output=json disk.qcow2";

/// What is repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RepairMode {
    /// Clusters that are counted and not used
    Leaks,
    /// Everything that can be; what contradicts itself is given up
    All,
}

/// The arguments of `check`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Check {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    opening: Opening,

    #[command(flatten)]
    sharing: Sharing,

    /// Repair what is found
    #[arg(long, short, value_enum, conflicts_with = "force_share")]
    repair: Option<RepairMode>,

    /// What is printed
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    #[command(flatten)]
    reporting: Reporting,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Check {
    /// Does it; returns the exit status.
    ///
    /// # Errors
    /// When the image cannot be opened, its header cannot be used, or a repair cannot be written.
    pub(in crate::cli) fn run(&self) -> Result<u8> {
        let tool = Tool::looking(self.sharing)?;
        let repair = match self.repair {
            None => Repair::None,
            Some(RepairMode::Leaks) => Repair::Leaks,
            Some(RepairMode::All) => Repair::All,
        };
        let options = self.opening.options();
        let steps = self.reporting.steps("check", self.quiet);
        let steps = RefCell::new(steps.streaming(self.output == Output::Json));
        let progress = |done, of| steps.borrow_mut().set(done, of);
        let (st, source) = (&*tool.engine, &*tool.files);
        let checked = check_image(st, source, &self.image, &options, repair, &progress);
        let report = match tool.run(checked) {
            Err(error) if is_other_format(&error) => {
                eprintln!("{}", complaint(&error));
                return Ok(UNSUPPORTED);
            }
            other => other?,
        };
        steps.into_inner().finish();
        if !self.quiet {
            match self.output {
                Output::Json => print_json(&self.json(&report))?,
                Output::Human => print(&human(&report))?,
            }
        }
        if self.output == Output::Json {
            findings(&report).iter().for_each(|finding| eprintln!("{finding}"));
        }
        Ok(status(&report))
    }

    fn json(&self, report: &Report) -> Value {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
        put("filename", json!(self.image.display().to_string()));
        put("format", json!("qcow2"));
        put("check-errors", json!(report.check_errors));
        let leaks = report.leaks.saturating_add(report.leaks_beyond_end);
        for (name, number) in [
            ("image-end-offset", report.image_end_offset),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("corruptions", report.corruptions),
            ("leaks", leaks),
            ("corruptions-fixed", report.corruptions_fixed),
            ("leaks-fixed", report.leaks_fixed),
        ] {
            if number > 0 {
                put(name, json!(number));
            }
        }
        Value::Object(object)
    }
}

fn is_other_format(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unsupported(why) if why.contains("could be checked"))
}

fn status(report: &Report) -> u8 {
    if report.check_errors > 0 {
        FAILED
    } else if report.corruptions > 0 {
        CORRUPT
    } else if report.is_clean() {
        0
    } else {
        LEAKS
    }
}

/// What was found, in words.
fn findings(report: &Report) -> Vec<String> {
    let mut all = report.findings.clone();
    if report.more_findings > 0 {
        all.push(format!("... and {} more", report.more_findings));
    }
    all
}

fn human(report: &Report) -> String {
    let mut text = String::new();
    for finding in findings(report) {
        text.push_str(&finding);
        text.push('\n');
    }
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        text.push_str(&format!(
            "The following inconsistencies were found and repaired:\n\n    \
             {} leaked clusters\n    {} corruptions\n\n",
            report.leaks_fixed, report.corruptions_fixed
        ));
    }
    if report.losses > 0 {
        text.push_str(&format!(
            "{} clusters or tables of the guest could not be read and were given up.\n\n",
            report.losses
        ));
    }
    let leaks = report.leaks.saturating_add(report.leaks_beyond_end);
    if report.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        text.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to \
             the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if leaks > 0 {
        text.push_str(&format!(
            "\n{leaks} leaked clusters were found on the image.\nThis means waste of disk space, \
             but no harm to data.\n"
        ));
    }
    if report.check_errors > 0 {
        text.push_str(&format!(
            "\n{} things could not be looked at during the check.\n",
            report.check_errors
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let hundredths = |part: u64, whole: u64| {
            let all = u128::from(part) * 10_000 / u128::from(whole.max(1));
            format!("{}.{:02}%", all / 100, all % 100)
        };
        let (total, allocated) = (report.total_clusters, report.allocated_clusters);
        text.push_str(&format!(
            "{allocated}/{total} = {} allocated, {} fragmented, {} compressed clusters\n",
            hundredths(allocated, total),
            hundredths(report.fragmented_clusters, allocated),
            hundredths(report.compressed_clusters, allocated)
        ));
    }
    if report.image_end_offset > 0 {
        text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    text
}
