//! A compressed image, written from front to back.
//!
//! Its tables come first and say how long every compressed cluster is, so that everything is
//! compressed twice: once for the lengths, of which eight bytes for each cluster are kept, and once
//! for the bytes. A disk that changes in between is found out, and refused.

use crate::error::Result;
use crate::image::convert::Outcome;
use crate::image::convert::copy::{Content, Copier, Drain, Packing};
use crate::image::convert::source::Disks;
use crate::image::convert::stream::{Output, Work, changed, failed, zeros};
use crate::image::convert::work::Board;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::packing::Packed;
use crate::qcow2::stream::StreamLayout;
use crate::sync::{Mutex, lock};

/// What becomes of each cluster of data, found out in the first round.
#[derive(Default)]
struct Lengths(Mutex<Vec<Packed>>);

impl Drain for Lengths {
    fn take(&self, _: u64, content: Content<'_>) -> Result<()> {
        let packed = kind(content);
        lock(&self.0).push(packed);
        Ok(())
    }
}

fn kind(content: Content<'_>) -> Packed {
    match content {
        Content::Zeros => Packed::Zeros,
        Content::Plain(_) => Packed::Plain,
        Content::Packed(bytes) => {
            Packed::Bytes(u32::try_from(bytes.len()).expect("less than a cluster"))
        }
    }
}

/// Where the clusters go in the second round.
struct Sink<'a>(Mutex<State<'a>>);

struct State<'a> {
    output: Output,
    /// The stream's next byte.
    at: u64,
    places: Box<dyn Iterator<Item = (Packed, u64)> + Send + 'a>,
}

impl State<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        self.output.write_all(bytes).map_err(failed)
    }

    /// Writes zeros up to the stream's byte `end`.
    fn fill(&mut self, end: u64) -> Result<()> {
        let missing = end.saturating_sub(self.at);
        self.at += missing;
        zeros(&mut *self.output, missing)
    }
}

impl Drain for Sink<'_> {
    fn take(&self, _: u64, content: Content<'_>) -> Result<()> {
        let state = &mut *lock(&self.0);
        let (expected, place) = state.places.next().ok_or_else(changed)?;
        if expected != kind(content) {
            return Err(changed());
        }
        match content {
            Content::Zeros => Ok(()),
            Content::Plain(buf) => {
                state.fill(place)?;
                state.put(&buf.to_vec())
            }
            Content::Packed(bytes) => {
                state.fill(place)?;
                state.put(bytes)
            }
        }
    }
}

impl Work<'_> {
    /// Every cluster compressed, unless that saves nothing.
    pub(super) fn packed(
        &self,
        mut output: Output,
        layout: &CreateOptions,
        tables: StreamLayout,
        watch: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Outcome> {
        let hides = self.options.keep_backing;
        let packing = Packing {
            kind: layout.compression,
            cluster: self.units.0,
            // Version 2 cannot hide a backing file by zeros.
            finds_zeros: self.options.sparse > 0 && !(hides && layout.version < 3),
        };
        let run = |drain: &dyn Drain, watch: &mut dyn FnMut(u64) -> bool| {
            let copier = Copier::streaming(Disks(self.sources), drain, self.chunk, Some(packing));
            let mut jobs = self.jobs();
            Board::new(self.options).run(&copier, self.make, &mut || Ok(jobs.next()), watch)
        };
        let lengths = Lengths::default();
        if run(&lengths, &mut |done| watch(done / 2))? == Outcome::Stopped {
            return Ok(Outcome::Stopped);
        }
        let half = self.units.1 / 2;
        let lengths = std::mem::take(&mut *lock(&lengths.0));
        let tables = tables.packed(lengths, hides)?;
        if !self.write_tables(&mut *output, &tables, &mut || watch(half))? {
            return Ok(Outcome::Stopped);
        }
        let state = State { output, at: tables.data_start(), places: Box::new(tables.places()) };
        let sink = Sink(Mutex::new(state));
        let outcome = run(&sink, &mut |done| watch(half + done / 2))?;
        if outcome == Outcome::Complete {
            let state = &mut *lock(&sink.0);
            if state.places.next().is_some() {
                return Err(changed());
            }
            state.fill(tables.len())?;
            state.output.flush().map_err(failed)?;
        }
        Ok(outcome)
    }
}
