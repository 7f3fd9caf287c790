//! Rows that write.

use std::io::Result;
use std::time::Duration;

use crate::bare;
use crate::client::{Client, Kind};
use crate::images::{CLUSTER, SPAN, contiguity, forget, warm};
use crate::measure::{Bench, Case, median, ratio, typical};
use crate::plan::{Load, Order};
use crate::report::{Check, Finding, rate_text, short};
use crate::rows::{bare_cached, with_limit};
use crate::server::{Server, Side};

const DEPTH: usize = 32;

pub(super) fn allocated(bench: &Bench, finding: Finding) -> Result<Finding> {
    let load = Load::random(Kind::Write, SPAN);
    let disk = |side: Side| bench.images.flat(Some(side));
    let comparison = bench.compare(&Case::new(&disk, load, DEPTH))?;
    let finding = finding.with(&comparison).ratio_at_least(2.5).processor_at_most(0.4);
    let bare = bare_cached(bench, Kind::Write)?;
    with_limit(bench, finding, &comparison, (load, DEPTH), bare)
}

pub(super) fn empty(bench: &Bench, finding: Finding) -> Result<Finding> {
    let load = Load { order: Order::Permuted, ..Load::random(Kind::Write, SPAN) };
    let disk = |side: Side| bench.images.empty(side, SPAN);
    let comparison = bench.compare(&Case::new(&disk, load, DEPTH))?;
    let ours = filled(bench, Side::Ours)?;
    let theirs = filled(bench, Side::Theirs(bench.programs.modes()[0]))?;
    bench.images.discard("empty-")?;
    Ok(finding
        .with(&comparison)
        .ratio_at_least(2.0)
        .check(Check::at_least("contiguity", ours, 0.9))
        .note(format!(
            "each of the {} blocks of {} MiB once, so that one write in 16 finds no cluster; after \
             a fill of 64 MiB in order, 4 KiB each, {DEPTH} in flight, {} of neighbouring clusters \
             are neighbours in the file ({} with theirs)",
            SPAN / load.block,
            SPAN >> 20,
            short(ours),
            short(theirs)
        )))
}

/// The contiguity of an image that was filled in order.
fn filled(bench: &Bench, side: Side) -> Result<f64> {
    const FILL: u64 = 64 << 20;
    let disk = bench.images.empty(side, SPAN)?;
    let load = Load::random(Kind::Write, FILL);
    let load = Load { order: Order::Sequential, ..load };
    let server = Server::start(&bench.programs, side, &disk, false, 1)?;
    let mut client = Client::connect(&server.socket(), 1, DEPTH, load.block as usize)?;
    client.run(vec![load.plan(1, DEPTH, Duration::ZERO)])?;
    drop(client);
    server.stop()?;
    contiguity(&disk, FILL / CLUSTER)
}

pub(super) fn sequential(bench: &Bench, finding: Finding) -> Result<Finding> {
    const IN_FLIGHT: usize = 8;
    let load = Load {
        kind: Kind::Write,
        order: Order::Sequential,
        block: 128 << 10,
        span: SPAN,
        flush: false,
    };
    let empty = |side: Side| bench.images.empty(side, SPAN);
    let raw = |_: Side| bench.images.preallocated(SPAN);
    let case = Case::new(&empty, load, IN_FLIGHT);
    let comparison = bench.compare(&case)?;
    let (qcow2, raw) = bench.alternate(&case, &Case::new(&raw, load, IN_FLIGHT))?;
    let part = ratio(&qcow2, &raw, |sample| sample.rate);
    bench.images.discard("empty-")?;
    bench.images.discard("preallocated")?;
    let new = bench.images.file("new.raw");
    let fill = || bare::fill(&new, load.block as usize, SPAN);
    let bare = median((0..bench.rounds).map(|_| fill()).collect::<Result<_>>()?);
    bench.images.discard("new")?;
    let finding = finding.with(&comparison).ratio_at_least(1.3);
    let finding = with_limit(bench, finding, &comparison, (load, IN_FLIGHT), bare)?;
    Ok(finding
        .check(Check::at_least("of a preallocated raw image through us", part, 0.9))
        .note(format!("{IN_FLIGHT} in flight, {} MiB", SPAN >> 20)))
}

pub(super) fn flushed(bench: &Bench, finding: Finding) -> Result<Finding> {
    const IN_FLIGHT: usize = 8;
    let load = Load { flush: true, ..Load::random(Kind::Write, SPAN) };
    let disk = |side: Side| bench.images.flat(Some(side));
    let comparison = bench.compare(&Case::new(&disk, load, IN_FLIGHT))?;
    let group = |syncs: f64| syncs * IN_FLIGHT as f64;
    let counts = comparison.counts.unwrap_or_default();
    let (ours, theirs) = (group(counts.0.syncs), group(counts.1.syncs));
    let ours = if comparison.counts.is_some() { ours } else { f64::NAN };
    let raw = bench.images.raw()?.path;
    // In the state that the servers' files are in.
    forget(&raw)?;
    warm(&raw)?;
    let run = || bare::synced(&raw, load.block as usize, IN_FLIGHT as u32, bench.time / 2);
    let bare = median((0..bench.rounds).map(|_| run()).collect::<Result<_>>()?);
    let mut finding = finding.with(&comparison).ratio_at_least(1.5);
    finding.limit = Some(typical(&comparison.ours, |sample| sample.rate) / bare);
    Ok(finding
        .note(format!(
            "limit: bare groups of {IN_FLIGHT} writes and an fdatasync, {}/s",
            rate_text(bare)
        ))
        .check(Check::at_most("fdatasync for 8 flushes", ours, 2.0))
        .note(format!(
            "a request is a write and its flush, and the latency that of the flush; for each 8 of \
             them {} fdatasync ({} with theirs)",
            short(ours),
            short(theirs)
        )))
}
