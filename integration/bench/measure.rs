//! Measuring two servers against each other.
//!
//! For each run a server is started on its image, warmed up, measured and ended, ours and theirs in
//! turn: A B A B. Whoever is not measured does not exist, so it cannot disturb, and each run has
//! another layout in memory, whose luck therefore evens out; a server that is kept and stopped with
//! SIGSTOP would keep its luck for all rounds, and its caches would compete with the other's. Only
//! ratios of neighbouring runs are compared, because the speed of a machine drifts.
//!
//! Reads are measured on one file that both servers share, so that both have the same pages in the
//! page cache and the same places on the disk. Whoever writes has a copy of its own, made the same
//! way. All of it is on the disk before a run begins.

use std::io::Result;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::client::{Client, Kind, Outcome, Request};
use crate::count::{Counts, Tool};
use crate::images::{CLUSTER, Images, warm};
use crate::plan::Load;
use crate::server::{Disk, Memory, Mode, Programs, Server, Side};

/// How many short runs of each mode choose one.
const TRIALS: usize = 3;

/// What all rows share.
pub(crate) struct Bench {
    pub(crate) images: Images,
    pub(crate) programs: Programs,
    /// How long a run lasts.
    pub(crate) time: Duration,
    /// How many runs of each server.
    pub(crate) rounds: usize,
    /// The part of the full size at which the largest rows are run.
    pub(crate) scale: f64,
    pub(crate) tool: Option<Tool>,
    /// Where counters leave what they counted.
    pub(crate) scratch: PathBuf,
}

/// What is measured.
pub(crate) struct Case<'a> {
    /// Gives the image before each run.
    pub(crate) disk: &'a dyn Fn(Side) -> Result<Disk>,
    pub(crate) load: Load,
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// Whether servers go around the page cache.
    pub(crate) direct: bool,
    /// Whether tables and pages are in memory before the run begins.
    pub(crate) warm: bool,
}

impl<'a> Case<'a> {
    /// One queue, warm.
    pub(crate) fn new(disk: &'a dyn Fn(Side) -> Result<Disk>, load: Load, depth: usize) -> Self {
        // Work that is done once has nothing to warm up with.
        Self { disk, load, depth, queues: 1, direct: false, warm: !load.is_whole() }
    }
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Requests a second; of a write and its flush, pairs.
    pub(crate) rate: f64,
    /// Microseconds of processor time for each request, the kernel's part included.
    pub(crate) processor: f64,
    /// Latency in microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) memory: Memory,
}

/// Both servers.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) ours: Vec<Sample>,
    pub(crate) theirs: Vec<Sample>,
    pub(crate) mode: Mode,
    /// Rates of the modes in the run that chose one.
    pub(crate) modes: Vec<(Mode, f64)>,
    /// Counts for each request, ours and theirs.
    pub(crate) counts: Option<(Counts, Counts)>,
}

/// The value in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 if values.is_empty() => f64::NAN,
        0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

/// The median of a property over some runs.
pub(crate) fn typical(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    median(samples.iter().map(of).collect())
}

/// The median ratio of runs that are neighbours in the order A B A B.
pub(crate) fn ratio(left: &[Sample], right: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let same = left.iter().zip(right);
    let next = left.iter().skip(1).zip(right);
    median(same.chain(next).map(|(left, right)| of(left) / of(right)).collect())
}

impl Comparison {
    pub(crate) fn ratio(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        ratio(&self.ours, &self.theirs, of)
    }
}

impl Bench {
    /// Measures both servers, theirs in its best mode.
    pub(crate) fn compare(&self, case: &Case<'_>) -> Result<Comparison> {
        let mut rates = vec![Vec::new(); self.programs.modes().len()];
        for _ in 0..TRIALS {
            for (rates, &mode) in rates.iter_mut().zip(self.programs.modes()) {
                rates.push(self.sample(Side::Theirs(mode), case, self.time / 4)?.rate);
            }
        }
        let medians = rates.into_iter().map(median);
        let modes: Vec<_> = self.programs.modes().iter().copied().zip(medians).collect();
        let best = modes.iter().max_by(|left, right| left.1.total_cmp(&right.1));
        let mode = best.expect("there is a mode").0;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            ours.push(self.sample(Side::Ours, case, self.time)?);
            theirs.push(self.sample(Side::Theirs(mode), case, self.time)?);
        }
        let counts = match self.tool {
            None => None,
            Some(tool) => Some((
                self.count(tool, Side::Ours, case)?,
                self.count(tool, Side::Theirs(mode), case)?,
            )),
        };
        Ok(Comparison { ours, theirs, mode, modes, counts })
    }

    /// Measures two cases, both with our server, in turn.
    pub(crate) fn alternate(
        &self,
        left: &Case<'_>,
        right: &Case<'_>,
    ) -> Result<(Vec<Sample>, Vec<Sample>)> {
        let mut samples = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            samples.0.push(self.sample(Side::Ours, left, self.time)?);
            samples.1.push(self.sample(Side::Ours, right, self.time)?);
        }
        Ok(samples)
    }

    /// One run of one server.
    pub(crate) fn sample(&self, side: Side, case: &Case<'_>, time: Duration) -> Result<Sample> {
        let (server, mut client) = self.ready(side, case)?;
        let before = server.processor_time()?;
        let outcome = run(&mut client, case, time)?;
        let used = server.processor_time()?.saturating_sub(before);
        let memory = server.memory()?;
        drop(client);
        server.stop()?;
        let done = requests(&outcome, case);
        let times = outcome.of(if case.load.flush { Kind::Flush } else { case.load.kind });
        Ok(Sample {
            rate: done / outcome.elapsed.as_secs_f64(),
            processor: used.as_secs_f64() * 1e6 / done,
            p50: times.permille(500),
            p99: times.permille(990),
            memory,
        })
    }

    fn count(&self, tool: Tool, side: Side, case: &Case<'_>) -> Result<Counts> {
        let (server, mut client) = self.ready(side, case)?;
        let file = self.scratch.join("counts");
        // Nothing is under way while the counter attaches itself, so it misses nothing.
        let counter = tool.attach(server.id(), &file)?;
        let outcome = run(&mut client, case, self.time / 4)?;
        let counts = counter.end(&file)?;
        drop(client);
        server.stop()?;
        let done = requests(&outcome, case);
        Ok(Counts { calls: counts.calls / done, syncs: counts.syncs / done })
    }

    /// A server with a client, ready for the run.
    fn ready(&self, side: Side, case: &Case<'_>) -> Result<(Server, Client)> {
        let disk = (case.disk)(side)?;
        if case.warm && !case.direct {
            warm(&disk.path)?;
            disk.backing.iter().try_for_each(|path| warm(path))?;
        }
        let server = Server::start(&self.programs, side, &disk, case.direct, case.queues)?;
        let block = case.load.block as usize;
        let mut client = Client::connect(&server.socket(), case.queues, case.depth, block)?;
        if case.warm {
            client.run((0..case.queues as u64).map(|_| each_cluster(case.load.span)).collect())?;
            run(&mut client, case, self.time / 4)?;
        }
        Ok((server, client))
    }
}

/// Reads a block of every cluster once: all tables, and whatever else a server keeps of clusters,
/// are in memory afterwards as far as they fit.
fn each_cluster(span: u64) -> impl FnMut(usize, Instant) -> Option<Request> + Send {
    let mut next = 0;
    move |_, _| {
        let offset = next;
        next += CLUSTER;
        (offset < span).then_some(Request { kind: Kind::Read, offset, length: 4096 })
    }
}

fn run(client: &mut Client, case: &Case<'_>, time: Duration) -> Result<Outcome> {
    // A run never repeats the one that warmed up.
    let seed = fastrand::u64(..);
    let plan = |queue| case.load.plan(seed ^ queue, case.depth, time);
    client.run((0..case.queues as u64).map(plan).collect())
}

fn requests(outcome: &Outcome, case: &Case<'_>) -> f64 {
    let kind = if case.load.flush { case.load.kind } else { return outcome.requests() as f64 };
    outcome.of(kind).count() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!(median(Vec::new()).is_nan());
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn ratios_are_of_neighbours() {
        let sample = |rate| {
            let memory = Memory::default();
            Sample { rate, processor: 0.0, p50: 0.0, p99: 0.0, memory }
        };
        let [left, right] = [[2.0, 8.0, 20.0], [1.0, 4.0, 10.0]].map(|rates| rates.map(sample));
        // 2/1, 8/4, 20/10 side by side, 8/1 and 20/4 across.
        assert_eq!(ratio(&left, &right, |sample| sample.rate), 2.0);
    }
}
