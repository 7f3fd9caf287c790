//! Rows that read images of ordinary size.

use std::io::Result;

use crate::bare;
use crate::client::Kind;
use crate::images::{SPAN, forget};
use crate::measure::{Bench, Case, median, ratio, typical};
use crate::plan::Load;
use crate::report::{Check, Finding, rate_text, short};
use crate::rows::{bare_cached, with_limit};
use crate::server::{Disk, Side};

const DEPTH: usize = 32;

fn load() -> Load {
    Load::random(Kind::Read, SPAN)
}

pub(super) fn deep(bench: &Bench, finding: Finding) -> Result<Finding> {
    let disk = |_: Side| bench.images.flat(None);
    let comparison = bench.compare(&Case::new(&disk, load(), DEPTH))?;
    let finding = finding.with(&comparison).ratio_at_least(1.8).processor_at_most(0.5);
    let bare = bare_cached(bench, Kind::Read)?;
    let finding = with_limit(bench, finding, &comparison, (load(), DEPTH), bare)?;
    let part = finding.limit.unwrap_or(f64::NAN);
    Ok(finding.check(Check::at_least("of the limit", part, 0.6)))
}

pub(super) fn single(bench: &Bench, finding: Finding) -> Result<Finding> {
    let disk = |_: Side| bench.images.flat(None);
    let comparison = bench.compare(&Case::new(&disk, load(), 1))?;
    let slowest = comparison.ratio(|sample| sample.p99);
    let finding = finding.with(&comparison).ratio_at_least(1.1).processor_at_most(0.8);
    let finding = finding.check(Check::at_most("p99 ratio", slowest, 1.0));
    let bare = bare_cached(bench, Kind::Read)?;
    with_limit(bench, finding, &comparison, (load(), 1), bare)
}

pub(super) fn direct(bench: &Bench, finding: Finding) -> Result<Finding> {
    let disk = |_: Side| {
        let disk = bench.images.flat(None)?;
        forget(&disk.path)?;
        Ok(disk)
    };
    let case = Case { direct: true, ..Case::new(&disk, load(), DEPTH) };
    let comparison = bench.compare(&case)?;
    let raw = bench.images.raw()?.path;
    forget(&raw)?;
    let run = || bare::direct(&raw, 4096, DEPTH, bench.time / 2);
    let bare = median((0..bench.rounds).map(|_| run()).collect::<Result<_>>()?);
    let part = typical(&comparison.ours, |sample| sample.rate) / bare;
    let finding = finding.with(&comparison);
    let faster = Check::at_least("ratio", finding.ratio.unwrap_or(f64::NAN), 1.15);
    let calls = comparison.counts.map_or(f64::NAN, |(ours, _)| ours.calls);
    let finding = finding
        .check(faster.or(&Check::at_least("of a bare io_uring", part, 0.95)))
        .check(Check::at_most("system calls", calls, 0.3))
        .processor_at_most(0.5);
    with_limit(bench, finding, &comparison, (load(), DEPTH), bare)
}

pub(super) fn chain(bench: &Bench, finding: Finding) -> Result<Finding> {
    const LAYERS: usize = 32;
    let chain = |_: Side| bench.images.chain(LAYERS);
    let flat = |_: Side| bench.images.flat(None);
    let case = Case::new(&chain, load(), DEPTH);
    let comparison = bench.compare(&case)?;
    let (long, short) = bench.alternate(&case, &Case::new(&flat, load(), DEPTH))?;
    let part = ratio(&long, &short, |sample| sample.rate);
    bench.images.discard("layer-")?;
    let finding = finding.with(&comparison).ratio_at_least(4.0);
    Ok(finding.check(Check::at_least("of our single layer", part, 0.8)))
}

pub(super) fn zlib_small(bench: &Bench, finding: Finding) -> Result<Finding> {
    compressed(bench, finding, "zlib", FITTING, 5.0)
}

pub(super) fn zlib_large(bench: &Bench, finding: Finding) -> Result<Finding> {
    compressed(bench, finding, "zlib", COMPRESSED, 1.5)
}

pub(super) fn zstd_small(bench: &Bench, finding: Finding) -> Result<Finding> {
    compressed(bench, finding, "zstd", FITTING, 5.0)
}

pub(super) fn zstd_large(bench: &Bench, finding: Finding) -> Result<Finding> {
    compressed(bench, finding, "zstd", COMPRESSED, 1.5)
}

/// Four times our cache of decompressed clusters, in bytes.
const COMPRESSED: u64 = 64 << 20;
/// What fits into that cache with some room to spare, in bytes.
const FITTING: u64 = 12 << 20;

fn compressed(bench: &Bench, finding: Finding, kind: &str, span: u64, bar: f64) -> Result<Finding> {
    let disk = |_: Side| bench.images.compressed(kind, COMPRESSED);
    let case = Case::new(&disk, Load::random(Kind::Read, span), DEPTH);
    Ok(finding.with(&bench.compare(&case)?).ratio_at_least(bar))
}

pub(super) fn against_raw(bench: &Bench, finding: Finding) -> Result<Finding> {
    let flat = |_: Side| bench.images.flat(None);
    let raw = |_: Side| -> Result<Disk> { bench.images.raw() };
    let cases = [Case::new(&flat, load(), DEPTH), Case::new(&raw, load(), DEPTH)];
    let both = bench.alternate(&cases[0], &cases[1])?;
    let mut finding = finding.with_own(&both, "raw");
    finding.ratio = Some(ratio(&both.0, &both.1, |sample| sample.rate));
    Ok(finding.ratio_at_least(0.95))
}

pub(super) fn queues(bench: &Bench, finding: Finding) -> Result<Finding> {
    const QUEUES: usize = 4;
    let disk = |_: Side| bench.images.flat(None);
    let one = Case::new(&disk, load(), DEPTH);
    let four = Case { queues: QUEUES, ..Case::new(&disk, load(), DEPTH) };
    let both = bench.alternate(&four, &one)?;
    let growth = ratio(&both.0, &both.1, |sample| sample.processor);
    let rate = ratio(&both.0, &both.1, |sample| sample.rate);
    let theirs = bench.compare(&four)?;
    let note = format!(
        "{DEPTH} in flight in each queue; four queues have {} times the rate of one; their best \
         with four queues: {}/s with {} µs ({})",
        short(rate),
        rate_text(typical(&theirs.theirs, |sample| sample.rate)),
        short(typical(&theirs.theirs, |sample| sample.processor)),
        theirs.mode.name()
    );
    let mut finding = finding.with_own(&both, "one queue");
    finding.processor = Some(growth);
    let check = Check::at_most("CPU a request against one queue", growth, 1.1);
    Ok(finding.check(check).note(note))
}
