//! Disks written from front to back, to a pipe: raw, or as a qcow2 image whose tables come first.

use std::cell::Cell;
use std::io::Write;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::convert::copy::Copier;
use crate::image::convert::scan::{Cut, Job, Piece, Scanner, Work};
use crate::image::convert::source::{Disks, Map, Scope};
use crate::image::convert::work::Board;
use crate::image::convert::{CHUNK, MakeEngine, Options, Outcome};
use crate::qcow2::create::CreateOptions;
use crate::qcow2::stream::{StreamLayout, StreamRun};
use crate::storage::{Buf, Engine, block_on};
use crate::sync::{Mutex, lock};

/// Zeros are written in pieces of at most this many bytes.
const ZEROS: usize = 64 << 10;

/// Where a stream goes.
pub(super) struct Sink {
    state: Mutex<State>,
    /// Whether bytes that no job has are zeros of the stream; else they are left out.
    gaps: bool,
}

struct State {
    output: Box<dyn Write + Send>,
    /// The disk's next byte.
    at: u64,
}

impl Sink {
    pub(super) fn new(output: Box<dyn Write + Send>, gaps: bool) -> Self {
        Self { state: Mutex::new(State { output, at: 0 }), gaps }
    }

    /// Writes the disk's bytes from `at` on, which is not before those that were written last.
    pub(super) fn write(&self, at: u64, buf: &Buf) -> Result<()> {
        let state = &mut *lock(&self.state);
        self.fill(state, at)?;
        state.at = at + buf.len() as u64;
        state.output.write_all(&buf.to_vec()).map_err(failed)
    }

    /// Writes zeros up to the disk's byte `end`, and then everything that is still on its way.
    fn finish(&self, end: u64) -> Result<()> {
        let state = &mut *lock(&self.state);
        self.fill(state, end)?;
        state.output.flush().map_err(failed)
    }

    fn fill(&self, state: &mut State, end: u64) -> Result<()> {
        while self.gaps && state.at < end {
            let len = usize::try_from(end - state.at).map_or(ZEROS, |left| left.min(ZEROS));
            state.output.write_all(&[0; ZEROS][..len]).map_err(failed)?;
            state.at += len as u64;
        }
        Ok(())
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("writing the stream", error)
}

/// Writes `sources`, one behind the other, to `output` from front to back: raw, or as a qcow2 image
/// laid out as `layout` says but for the size. `options` say nothing of compression here. Otherwise
/// as [`convert`](super::convert).
///
/// # Errors
/// As [`convert`](super::convert), and when nobody reads `output` any more.
pub fn stream(
    sources: &[Image],
    output: Box<dyn Write + Send>,
    layout: Option<&CreateOptions>,
    options: &Options,
    engine: &dyn Engine,
    make: &MakeEngine<'_>,
    watch: &mut dyn FnMut(u64) -> bool,
) -> Result<Outcome> {
    let size = super::size(sources)?;
    if options.compress {
        let why = "how long compressed clusters are is not known before they are written, so that \
                   they cannot be streamed; write to a file";
        return Err(Error::refused("streaming an image", why));
    }
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
    let sink = Sink::new(output, layout.is_none());
    let copier = Copier::streaming(Disks(sources), &sink, cut.chunk);
    let board = Board::new(options);
    let Some(layout) = layout else {
        let mut next = || block_on(engine, scanner.next(engine));
        let outcome = board.run(&copier, make, &mut next, watch)?;
        if outcome == Outcome::Complete {
            sink.finish(size)?;
        }
        return Ok(outcome);
    };
    let runs = block_on(engine, runs(engine, &mut scanner, (unit, size)))?;
    let layout = CreateOptions { size, ..layout.clone() };
    let tables = StreamLayout::new(&layout, runs.clone())?;
    for bytes in tables.tables() {
        if !watch(0) {
            return Ok(Outcome::Stopped);
        }
        lock(&sink.state).output.write_all(&bytes).map_err(failed)?;
    }
    let (number, covered) = (Cell::new(0), Cell::new(0));
    let data = runs.into_iter().filter(|run| !run.zero);
    let mut jobs = data.flat_map(|run| pieces(&run, (unit, size), cut.chunk)).map(|piece| {
        number.set(number.get() + 1);
        let end = piece.at + piece.len;
        let covers = end - covered.replace(end);
        Job { number: number.get() - 1, pieces: vec![piece], covers }
    });
    let outcome = board.run(&copier, make, &mut || Ok(jobs.next()), watch)?;
    if outcome == Outcome::Complete {
        // The disk may end inside its last cluster, which the image has as a whole.
        let missing = usize::try_from(size.next_multiple_of(unit) - size).unwrap_or_default();
        let missing = if covered.get() == size { missing } else { 0 };
        lock(&sink.state).output.write_all(&vec![0; missing]).map_err(failed)?;
        sink.finish(size)?;
    }
    Ok(outcome)
}

/// What the image will hold, in clusters.
async fn runs(
    engine: &dyn Engine,
    scanner: &mut Scanner<'_>,
    (unit, size): (u64, u64),
) -> Result<Vec<StreamRun>> {
    let mut runs: Vec<StreamRun> = Vec::new();
    while let Some(job) = scanner.next(engine).await? {
        for Piece { at, len, work } in job.pieces {
            let clusters = at / unit..(at + len).min(size).div_ceil(unit);
            let zero = work == Work::Zero;
            match runs.last_mut() {
                Some(last) if last.zero == zero && last.clusters.end == clusters.start => {
                    last.clusters.end = clusters.end;
                }
                _ => runs.push(StreamRun { clusters, zero }),
            }
        }
    }
    Ok(runs)
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
        let piece = Piece { at, len, work: Work::Copy };
        at += len;
        (len > 0).then_some(piece)
    })
}
