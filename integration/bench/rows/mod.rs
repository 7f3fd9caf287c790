//! The rows: what is measured, and what is promised.

mod large;
mod reads;
mod writes;

use std::io::Result;

use crate::bare;
use crate::client::Kind;
use crate::images::{forget, warm};
use crate::measure::{Bench, Comparison, median, typical};
use crate::null;
use crate::plan::Load;
use crate::report::{Finding, rate_text};

/// One row of the table.
pub(crate) struct Row {
    pub(crate) number: &'static str,
    pub(crate) title: &'static str,
    /// What is promised, for the list of rows.
    pub(crate) promise: &'static str,
    pub(crate) run: fn(&Bench, Finding) -> Result<Finding>,
}

impl Row {
    pub(crate) fn measure(&self, bench: &Bench) -> Result<Finding> {
        (self.run)(bench, Finding::new(self.number, self.title))
    }
}

/// All rows in order.
pub(crate) const ROWS: [Row; 17] = [
    Row {
        number: "1",
        title: "4 KiB random read, 32 in flight",
        promise: "1.8 times, half the CPU, 60 % of the limit",
        run: reads::deep,
    },
    Row {
        number: "2",
        title: "4 KiB random read, one at a time",
        promise: "1.1 times, 0.8 of the CPU, p99 no worse",
        run: reads::single,
    },
    Row {
        number: "3",
        title: "4 KiB random read, 32 in flight, O_DIRECT",
        promise: "1.15 times or 95 % of a bare io_uring, 0.3 system calls, half the CPU",
        run: reads::direct,
    },
    Row {
        number: "4",
        title: "4 KiB random overwrite, 32 in flight",
        promise: "2.5 times, 0.4 of the CPU",
        run: writes::allocated,
    },
    Row {
        number: "5",
        title: "4 KiB random write, empty image",
        promise: "2 times; 90 % of clusters are neighbours after a sequential fill",
        run: writes::empty,
    },
    Row {
        number: "6",
        title: "128 KiB sequential write, empty image",
        promise: "1.3 times; 90 % of a preallocated raw image",
        run: writes::sequential,
    },
    Row {
        number: "7",
        title: "4 KiB write and flush, 8 in flight",
        promise: "1.5 times; two fdatasync for each group of 8",
        run: writes::flushed,
    },
    Row {
        number: "8",
        title: "4 KiB random read, chain of 32",
        promise: "4 times; 80 % of a single layer",
        run: reads::chain,
    },
    Row {
        number: "9a",
        title: "4 KiB random read, zlib, 12 MiB",
        promise: "5 times",
        run: reads::zlib_small,
    },
    Row {
        number: "9b",
        title: "4 KiB random read, zlib, 64 MiB",
        promise: "1.5 times",
        run: reads::zlib_large,
    },
    Row {
        number: "9c",
        title: "4 KiB random read, zstd, 12 MiB",
        promise: "5 times",
        run: reads::zstd_small,
    },
    Row {
        number: "9d",
        title: "4 KiB random read, zstd, 64 MiB",
        promise: "1.5 times",
        run: reads::zstd_large,
    },
    Row {
        number: "10",
        title: "4 KiB random read, 1 TiB, cold tables",
        promise: "2 times; memory within the budget",
        run: large::cold,
    },
    Row {
        number: "11",
        title: "qcow2 against raw, both through us",
        promise: "95 %",
        run: reads::against_raw,
    },
    Row {
        number: "12",
        title: "four queues against one",
        promise: "at most 10 % more CPU a request",
        run: reads::queues,
    },
    Row {
        number: "13",
        title: "reads during a discard of the disk",
        promise: "p99 less than 3 times that without",
        run: large::discard,
    },
    Row {
        number: "14",
        title: "start with 1 GiB of L2 tables",
        promise: "first answer within 100 ms, 20 MiB when idle",
        run: large::start,
    },
];

/// Adds which part of the limit our server reaches; the host's own rate is given.
fn with_limit(
    bench: &Bench,
    mut finding: Finding,
    comparison: &Comparison,
    (load, depth): (Load, usize),
    bare: f64,
) -> Result<Finding> {
    let ring = || null::requests_per_second(load, depth, bench.time / 4);
    let ring = median((0..bench.rounds).map(|_| ring()).collect::<Result<_>>()?);
    let limit = 1.0 / (1.0 / bare + 1.0 / ring);
    finding.limit = Some(typical(&comparison.ours, |sample| sample.rate) / limit);
    let note = format!("limit: bare {}/s, ring {}/s", rate_text(bare), rate_text(ring));
    Ok(finding.note(note))
}

/// The host's rate for requests that the page cache takes or gives.
fn bare_cached(bench: &Bench, kind: Kind) -> Result<f64> {
    let raw = bench.images.raw()?;
    // Whoever copied it has left large folios.
    forget(&raw.path)?;
    warm(&raw.path)?;
    let run = || bare::cached(&raw.path, kind, 4096, bench.time / 4);
    Ok(median((0..bench.rounds).map(|_| run()).collect::<Result<_>>()?))
}
