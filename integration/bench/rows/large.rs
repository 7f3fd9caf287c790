//! Rows on images whose size is the point.

use std::io::{Error, Result};
use std::time::{Duration, Instant};

use crate::client::{Client, Kind, Outcome, Request};
use crate::images::{CLUSTER, forget};
use crate::measure::{Bench, Case, median, typical};
use crate::plan::Load;
use crate::report::{Check, Finding, short};
use crate::server::{Disk, Memory, Server, Side};

const TIB: u64 = 1 << 40;
/// What our tables may take in MiB by default, L2 and refcounts, and the rest of the daemon.
const BUDGET: f64 = 128.0 + 4.0 + 20.0;

fn scaled(bench: &Bench, bytes: u64) -> u64 {
    // Whole gibibytes, so that every table is full.
    (((bytes >> 30) as f64 * bench.scale).ceil() as u64).max(1) << 30
}

pub(super) fn cold(bench: &Bench, finding: Finding) -> Result<Finding> {
    let size = scaled(bench, TIB);
    let disk = |_: Side| {
        let disk = bench.images.mapped("cold", size, CLUSTER)?;
        forget(&disk.path)?;
        Ok(disk)
    };
    let case = Case { warm: false, ..Case::new(&disk, Load::random(Kind::Read, size), 32) };
    let comparison = bench.compare(&case)?;
    let [ours, theirs] = [&comparison.ours, &comparison.theirs]
        .map(|samples| typical(samples, |sample| sample.memory.anonymous));
    bench.images.discard("mapped-cold")?;
    Ok(finding
        .with(&comparison)
        .ratio_at_least(2.0)
        .check(Check::at_most("MiB of memory", ours, BUDGET))
        .note(format!(
            "{} GiB, every cluster mapped to a hole of the file, nothing of which is in the page \
             cache; memory of its own after the run: {} MiB ({} MiB with theirs)",
            size >> 30,
            short(ours),
            short(theirs)
        )))
}

pub(super) fn discard(bench: &Bench, finding: Finding) -> Result<Finding> {
    let size = scaled(bench, 64 << 30);
    let mut runs = [Vec::new(), Vec::new()];
    for _ in 0..bench.rounds {
        for (runs, side) in
            runs.iter_mut().zip([Side::Ours, Side::Theirs(bench.programs.modes()[0])])
        {
            runs.push(discarded(bench, side, size)?);
        }
    }
    let [ours, theirs] = runs.map(|runs: Vec<Discarded>| {
        let of = |field: fn(&Discarded) -> f64| median(runs.iter().map(field).collect());
        (of(|run| run.before), of(|run| run.during), of(|run| run.seconds), of(|run| run.reads))
    });
    let describe = |(before, during, seconds, _): (f64, f64, f64, f64)| {
        format!("p99 {} → {} µs, {} s", short(before), short(during), short(seconds))
    };
    let mut finding = finding;
    (finding.ours, finding.theirs) = (describe(ours), describe(theirs));
    let note = format!(
        "{} GiB, every cluster mapped to a hole of the file; 8 reads in flight, and one discard of \
         the length that the device allows; {} reads were answered meanwhile",
        size >> 30,
        short(ours.3)
    );
    let check = Check::at_most("p99 against that without", ours.1 / ours.0, 3.0);
    Ok(finding.check(check).note(note))
}

/// What became of reads while a disk was discarded.
struct Discarded {
    /// p99 in microseconds without the discard, and with it.
    before: f64,
    during: f64,
    /// How long the discard took.
    seconds: f64,
    /// How many reads there were meanwhile.
    reads: f64,
}

fn discarded(bench: &Bench, side: Side, size: u64) -> Result<Discarded> {
    const READERS: usize = 8;
    let disk = bench.images.mapped("full", size, CLUSTER)?;
    let server = Server::start(&bench.programs, side, &disk, false, 1)?;
    let mut client = Client::connect(&server.socket(), 1, READERS + 1, 4096)?;
    let load = Load::random(Kind::Read, size);
    let only_reads = |time| {
        let mut reads = load.plan(fastrand::u64(..), READERS, time);
        move |slot, now| if slot < READERS { reads(slot, now) } else { None }
    };
    client.run(vec![only_reads(bench.time / 4)])?;
    let before = client.run(vec![only_reads(bench.time)])?;
    let longest = client.longest_discard()?.next_multiple_of(CLUSTER).min(size);
    let (mut done, mut over, mut random) = (0, false, fastrand::Rng::new());
    let during: Outcome = client.run(vec![move |slot: usize, _: Instant| {
        if slot == READERS {
            let (offset, length) = (done, longest.min(size - done));
            (done, over) = (done + length, length == 0);
            return (length > 0).then_some(Request { kind: Kind::Discard, offset, length });
        }
        // Reads go on until the last discard was answered, and end with it.
        let offset = random.u64(0..size / 4096) * 4096;
        (!over).then_some(Request { kind: Kind::Read, offset, length: 4096 })
    }])?;
    drop(client);
    server.stop()?;
    bench.images.discard("mapped-full")?;
    Ok(Discarded {
        before: before.of(Kind::Read).permille(990),
        during: during.of(Kind::Read).permille(990),
        seconds: during.elapsed.as_secs_f64(),
        reads: during.of(Kind::Read).count() as f64,
    })
}

pub(super) fn start(bench: &Bench, finding: Finding) -> Result<Finding> {
    // 8 bytes of L2 table for each cluster of 8 KiB: a gibibyte for a tebibyte.
    let size = scaled(bench, TIB);
    let disk = bench.images.mapped("start", size, 8 << 10)?;
    let mut runs = [Vec::new(), Vec::new()];
    for _ in 0..bench.rounds {
        for (runs, side) in
            runs.iter_mut().zip([Side::Ours, Side::Theirs(bench.programs.modes()[0])])
        {
            forget(&disk.path)?;
            runs.push(started(bench, side, &disk)?);
        }
    }
    bench.images.discard("mapped-start")?;
    let [ours, theirs] = runs.map(|runs: Vec<(f64, Memory)>| {
        let first = median(runs.iter().map(|run| run.0).collect());
        let memory = median(runs.iter().map(|run| run.1.anonymous + run.1.file).collect());
        (first, memory)
    });
    let describe =
        |(first, memory): (f64, f64)| format!("{} ms, {} MiB", short(first), short(memory));
    let mut finding = finding;
    (finding.ours, finding.theirs) = (describe(ours), describe(theirs));
    Ok(finding
        .check(Check::at_most("ms to the first answer", ours.0, 100.0))
        .check(Check::at_most("MiB when idle", ours.1, 20.0))
        .note(format!(
            "{} GiB in clusters of 8 KiB, nothing of the file in the page cache; memory is heap, \
             stacks and mapped files, without what is shared with the guest",
            size >> 30
        )))
}

/// Milliseconds from the start of the process to its first answer, and what it holds afterwards.
fn started(bench: &Bench, side: Side, disk: &Disk) -> Result<(f64, Memory)> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let begun = Instant::now();
    let server = Server::spawn(&bench.programs, side, disk, false, 1)?;
    let mut client = loop {
        match Client::connect(&server.socket(), 1, 1, 4096) {
            Ok(client) => break client,
            Err(_) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_micros(500));
            }
            Err(error) => return Err(Error::other(format!("{error}: {}", server.log()))),
        }
    };
    let mut request = Some(Request { kind: Kind::Read, offset: 0, length: 4096 });
    client.run(vec![move |_: usize, _: Instant| request.take()])?;
    let first = begun.elapsed().as_secs_f64() * 1000.0;
    std::thread::sleep(Duration::from_secs(1));
    let memory = server.memory()?;
    drop(client);
    server.stop()?;
    Ok((first, memory))
}
