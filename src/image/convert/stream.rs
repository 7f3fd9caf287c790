//! Disks written from front to back, to a pipe: raw, or as a qcow2 image whose tables come first.

use std::io::Write;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::convert::copy::{Content, Copier, Drain};
use crate::image::convert::scan::{Cut, Job, Piece, Scanner, Work as Kind};
use crate::image::convert::source::{Disks, Map, Scope};
use crate::image::convert::work::Board;
use crate::image::convert::{CHUNK, MakeEngine, Options, Outcome};
use crate::qcow2::create::CreateOptions;
use crate::qcow2::stream::{StreamLayout, StreamRun};
use crate::storage::{Engine, block_on};
use crate::sync::{Arc, Mutex, lock};

/// Zeros are written in pieces of at most this many bytes.
const ZEROS: usize = 64 << 10;

/// An image is streamed that has at most so many runs of data and zeros, which take 24 bytes each:
/// its tables come first, so that all of them have to be known.
const MOST_RUNS: usize = 1 << 24;

/// What takes the bytes of a stream.
pub type Output = Box<dyn Write + Send>;

/// Where a stream goes that is not compressed.
struct Sink {
    state: Mutex<State>,
    /// Whether bytes that no job has are zeros of the stream; else they are left out.
    gaps: bool,
}

struct State {
    output: Output,
    /// The disk's next byte.
    at: u64,
}

impl Drain for Sink {
    /// What comes is not before what came last.
    fn take(&self, at: u64, content: Content<'_>) -> Result<()> {
        let Content::Plain(buf) = content else { return Err(changed()) };
        let state = &mut *lock(&self.state);
        self.fill(state, at)?;
        state.at = at + buf.len() as u64;
        state.output.write_all(&buf.to_vec()).map_err(failed)
    }
}

impl Sink {
    fn new(output: Output, gaps: bool) -> Self {
        Self { state: Mutex::new(State { output, at: 0 }), gaps }
    }

    /// Writes zeros up to the disk's byte `end`, and then everything that is still on its way.
    fn finish(&self, end: u64) -> Result<()> {
        let state = &mut *lock(&self.state);
        self.fill(state, end)?;
        state.output.flush().map_err(failed)
    }

    fn fill(&self, state: &mut State, end: u64) -> Result<()> {
        if self.gaps && state.at < end {
            zeros(&mut *state.output, end - state.at)?;
            state.at = end;
        }
        Ok(())
    }
}

/// Writes so many zeros.
pub(super) fn zeros(output: &mut dyn Write, mut len: u64) -> Result<()> {
    while len > 0 {
        let piece = usize::try_from(len).map_or(ZEROS, |left| left.min(ZEROS));
        output.write_all(&[0; ZEROS][..piece]).map_err(failed)?;
        len -= piece as u64;
    }
    Ok(())
}

pub(super) fn failed(error: std::io::Error) -> Error {
    Error::io("writing the stream", error)
}

/// What was read is not what was read before.
pub(super) fn changed() -> Error {
    Error::refused("streaming an image", "the disk has changed while it was copied")
}

/// Writes `sources`, one behind the other, to `output` from front to back: raw, or as a qcow2 image
/// laid out as `layout` says but for the size. What is compressed is compressed twice: how long it
/// becomes has to be known before the tables, which come first. Otherwise as
/// [`convert`](super::convert).
///
/// # Errors
/// As [`convert`](super::convert), and when nobody reads `output` any more; `Refused` when a disk
/// that is compressed changes meanwhile.
pub fn stream(
    sources: &[Image],
    output: Output,
    layout: Option<&CreateOptions>,
    options: &Options,
    engine: &dyn Engine,
    make: &MakeEngine<'_>,
    watch: &mut dyn FnMut(u64) -> bool,
) -> Result<Outcome> {
    let size = super::size(sources)?;
    let scope = match options {
        Options { keep_backing: true, .. } => Scope::Top,
        Options { sparse: 0, .. } => Scope::All,
        _ => Scope::Flat,
    };
    let unit = layout.map_or(1, |layout| 1 << layout.cluster_bits.min(21));
    // Only over a backing file are zeros something to tell of.
    let cut = Cut { chunk: CHUNK.max(unit), unit, zeros: options.keep_backing };
    let map = block_on(engine, Map::new(engine, Disks(sources), scope))?;
    let mut scanner = Scanner::new(map, cut);
    let Some(layout) = layout else {
        let sink = Sink::new(output, true);
        let copier = Copier::streaming(Disks(sources), &sink, cut.chunk, None);
        let mut next = || block_on(engine, scanner.next(engine));
        let outcome = Board::new(options).run(&copier, make, &mut next, watch)?;
        if outcome == Outcome::Complete {
            sink.finish(size)?;
        }
        return Ok(outcome);
    };
    let runs = block_on(engine, runs(engine, &mut scanner, (unit, size)))?;
    let layout = CreateOptions { size, ..layout.clone() };
    let runs = Arc::new(runs);
    let tables = StreamLayout::new(&layout, Arc::clone(&runs))?;
    let work = Work { sources, runs, units: (unit, size), chunk: cut.chunk, options, make };
    // Where no two clusters can share one, there is no use in compressing them.
    if options.compress && layout.refcount_order > 0 {
        return work.packed(output, &layout, tables, watch);
    }
    work.plain(output, &tables, watch)
}

/// An image that is written to a stream: what is known of it before.
pub(super) struct Work<'a> {
    pub(super) sources: &'a [Image],
    runs: Arc<Vec<StreamRun>>,
    /// Bytes of a cluster, and of the disk.
    pub(super) units: (u64, u64),
    pub(super) chunk: u64,
    pub(super) options: &'a Options,
    pub(super) make: &'a MakeEngine<'a>,
}

impl Work<'_> {
    /// Every cluster as it is.
    fn plain(
        &self,
        mut output: Output,
        tables: &StreamLayout,
        watch: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Outcome> {
        if !self.write_tables(&mut *output, tables, &mut || watch(0))? {
            return Ok(Outcome::Stopped);
        }
        let sink = Sink::new(output, false);
        let copier = Copier::streaming(Disks(self.sources), &sink, self.chunk, None);
        let mut jobs = self.jobs();
        let mut next = || Ok(jobs.next());
        let outcome = Board::new(self.options).run(&copier, self.make, &mut next, watch)?;
        if outcome == Outcome::Complete {
            let (unit, size) = self.units;
            // The disk may end inside its last cluster, which the image has as a whole.
            let missing = size.next_multiple_of(unit) - size;
            let missing = if jobs.covered == size { missing } else { 0 };
            zeros(&mut *lock(&sink.state).output, missing)?;
            sink.finish(size)?;
        }
        Ok(outcome)
    }

    /// Writes what comes before the data; false when `goes_on` says no before the end.
    pub(super) fn write_tables(
        &self,
        output: &mut dyn Write,
        tables: &StreamLayout,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        for bytes in tables.tables() {
            if !goes_on() {
                return Ok(false);
            }
            output.write_all(&bytes).map_err(failed)?;
        }
        Ok(true)
    }

    /// What there is to do for all clusters of data.
    pub(super) fn jobs(&self) -> Jobs<'_> {
        let data = self.runs.iter().filter(|run| !run.zero);
        let pieces = data.flat_map(|run| pieces(run, self.units, self.chunk));
        Jobs { pieces: Box::new(pieces), number: 0, covered: 0 }
    }
}

/// Jobs of one piece each, in order.
pub(super) struct Jobs<'a> {
    pieces: Box<dyn Iterator<Item = Piece> + 'a>,
    number: u64,
    /// Where the last piece ended.
    covered: u64,
}

impl Iterator for Jobs<'_> {
    type Item = Job;

    fn next(&mut self) -> Option<Job> {
        let piece = self.pieces.next()?;
        let end = piece.at + piece.len;
        let job = Job { number: self.number, pieces: vec![piece], covers: end - self.covered };
        (self.number, self.covered) = (self.number + 1, end);
        Some(job)
    }
}

/// What the image will hold, in clusters; refused when that is more than [`MOST_RUNS`] runs.
async fn runs(
    engine: &dyn Engine,
    scanner: &mut Scanner<'_>,
    (unit, size): (u64, u64),
) -> Result<Vec<StreamRun>> {
    let mut runs: Vec<StreamRun> = Vec::new();
    while let Some(job) = scanner.next(engine).await? {
        for Piece { at, len, work } in job.pieces {
            let clusters = at / unit..(at + len).min(size).div_ceil(unit);
            add(&mut runs, StreamRun { clusters, zero: work == Kind::Zero }, MOST_RUNS)?;
        }
    }
    Ok(runs)
}

/// Adds what comes next, as long as there are no more than `most` runs.
fn add(runs: &mut Vec<StreamRun>, next: StreamRun, most: usize) -> Result<()> {
    let full = runs.len() >= most;
    match runs.last_mut() {
        Some(last) if last.zero == next.zero && last.clusters.end == next.clusters.start => {
            last.clusters.end = next.clusters.end;
        }
        _ if full => {
            let why = format!("the disk has more than {most} runs of data; convert it to a file");
            return Err(Error::refused("streaming an image", why));
        }
        _ => runs.push(next),
    }
    Ok(())
}

/// The pieces of a run of clusters, none longer than a chunk.
fn pieces(
    run: &StreamRun,
    (unit, size): (u64, u64),
    chunk: u64,
) -> impl Iterator<Item = Piece> + use<> {
    let (mut at, end) = (run.clusters.start * unit, (run.clusters.end * unit).min(size));
    std::iter::from_fn(move || {
        let len = (end - at).min(chunk);
        let piece = Piece { at, len, work: Kind::Copy };
        at += len;
        (len > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_of_too_many_runs_is_refused() {
        let mut runs = Vec::new();
        let run = |number: u64, zero| StreamRun { clusters: number..number + 1, zero };
        for (number, zero) in [(0, false), (2, false), (3, false), (4, true), (5, true)] {
            add(&mut runs, run(number, zero), 3).expect("three runs");
        }
        assert_eq!(runs[1], StreamRun { clusters: 2..4, zero: false });
        add(&mut runs, run(6, false), 3).expect_err("a fourth one");
        add(&mut runs, run(7, true), 3).expect_err("a gap");
        assert_eq!(runs.len(), 3);
    }
}
