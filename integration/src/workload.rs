//! Random requests, many in flight, each answer held against the model.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;

use crate::client::{Answer, MAX_REQUEST, Request};
use crate::disk::{Disk, Limits};
use crate::model::{Effect, Model, SECTOR, Tag};

/// How many requests are in flight.
pub const DEPTH: usize = 32;
/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(60);
/// Half of the requests fall into a window of so many sectors, so that several in flight share a
/// cluster. The window moves on after some requests.
const WINDOW_SECTORS: usize = 2048;
const WINDOW_REQUESTS: u64 = 300;

/// What a buffer holds before a read: one that transfers nothing must not find earlier data.
const STALE: u8 = 0xa5;

/// A request in flight.
#[derive(Debug)]
struct Flight {
    request: Request,
    sectors: Range<usize>,
    /// What [`Model::begin_flush`] returned, for a flush.
    flush_begun_at: u64,
}

/// A stream of random requests to one connected front-end.
#[derive(Debug)]
pub struct Workload<'a> {
    model: &'a mut Model,
    rng: &'a mut Rng,
    flights: Vec<Option<Flight>>,
    limits: Limits,
    /// The image's cluster and the device's block in sectors.
    cluster: usize,
    block: usize,
    window: usize,
    submitted: u64,
    history: History,
}

/// Everything that was submitted and answered, in order, for the report of a failure.
#[derive(Debug, Default)]
pub struct History(Vec<(bool, Request, Range<usize>)>);

impl History {
    /// The requests that changed a sector, and when the last answered flush was submitted.
    #[must_use]
    pub fn of(&self, sector: usize) -> String {
        let mut lines = Vec::new();
        let (mut flushes, mut last_flush) = (VecDeque::new(), None);
        for (step, (is_answered, request, sectors)) in self.0.iter().enumerate() {
            match request {
                Request::Flush if *is_answered => last_flush = flushes.pop_front(),
                Request::Flush => flushes.push_back(step),
                Request::Read { .. } => {}
                _ if sectors.contains(&sector) => {
                    let verb = if *is_answered { "answered" } else { "submitted" };
                    lines.push(format!("step {step}: {verb} {request:?}"));
                }
                _ => {}
            }
        }
        if let Some(step) = last_flush {
            lines.push(format!("a flush submitted about step {step} was the last to be answered"));
        }
        lines.join("\n")
    }
}

impl<'a> Workload<'a> {
    /// Requests for the disk behind `client`, whose image has clusters of so many bytes.
    ///
    /// # Panics
    ///
    /// Panics when the device does not offer everything that the requests need.
    #[must_use]
    pub fn new(
        client: &mut impl Disk,
        model: &'a mut Model,
        rng: &'a mut Rng,
        cluster: usize,
    ) -> Self {
        let limits = client.limits().expect("a disk that offers everything");
        assert_eq!(limits.size, (model.len() * SECTOR) as u64, "the disk's size");
        Self {
            model,
            rng,
            flights: (0..client.slot_count()).map(|_| None).collect(),
            limits,
            cluster: (cluster / SECTOR).max(1),
            block: (limits.block / SECTOR).max(1),
            window: 0,
            submitted: 0,
            history: History::default(),
        }
    }

    /// Submits requests until all slots are in use or no place is free, and waits for no answer.
    ///
    /// # Errors
    ///
    /// Fails when a request cannot be submitted.
    pub fn fill(&mut self, client: &mut impl Disk) -> Result<(), String> {
        self.submit(client).map_err(|error| format!("cannot submit: {error}"))
    }

    /// Runs until so many requests have been answered. Others are in flight then.
    ///
    /// # Errors
    ///
    /// Tells the first answer that is wrong or does not come.
    pub fn load(&mut self, client: &mut impl Disk, answers: u64) -> Result<(), String> {
        let mut left = answers;
        while left > 0 {
            self.submit(client).map_err(|error| format!("cannot submit: {error}"))?;
            left = left.saturating_sub(self.collect(client)?);
        }
        Ok(())
    }

    /// Waits for the answers of all requests in flight.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn drain(&mut self, client: &mut impl Disk) -> Result<(), String> {
        while client.in_flight() > 0 {
            self.collect(client)?;
        }
        Ok(())
    }

    /// Gives up what is in flight, as the daemon is no more, and says what was done.
    #[must_use]
    pub fn into_history(self) -> History {
        self.history
    }

    /// Reads the whole disk, with nothing else in flight.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn verify_all(&mut self, client: &mut impl Disk) -> Result<(), String> {
        let end = self.model.len() * SECTOR;
        for start in (0..end).step_by(MAX_REQUEST) {
            let length = MAX_REQUEST.min(end - start);
            let request = Request::Read { offset: start as u64, length };
            client.buffer(0)[..length].fill(STALE);
            client.execute(request).map_err(|error| format!("{request:?}: {error}"))?;
            self.check(request, start / SECTOR, &client.buffer(0)[..length])?;
        }
        Ok(())
    }

    /// Holds what a read brought against the model.
    fn check(&mut self, request: Request, first: usize, bytes: &[u8]) -> Result<(), String> {
        self.model.check_read(first, bytes).map_err(|error| {
            let (origin, history) = (self.model.origin(&error), self.history.of(error.sector()));
            format!("{request:?}: {error}; {origin}\n{history}")
        })
    }

    fn submit(&mut self, client: &mut impl Disk) -> std::io::Result<()> {
        while let Some(slot) = client.free_slot() {
            let request = self.choose();
            let Some(sectors) = self.place(request) else {
                break;
            };
            let request = at(request, &sectors);
            let flush_begun_at = self.begin(client, slot, request, &sectors);
            let queue = self.rng.usize(..client.queue_count());
            let cuts = self.cuts(request);
            client.submit(queue, slot, request, &cuts)?;
            self.history.0.push((false, request, sectors.clone()));
            self.flights[slot] = Some(Flight { request, sectors, flush_begun_at });
            self.submitted += 1;
        }
        client.kick()
    }

    /// Tells the model about the request and fills the buffer of a write.
    fn begin(
        &mut self,
        client: &mut impl Disk,
        slot: usize,
        request: Request,
        sectors: &Range<usize>,
    ) -> u64 {
        let effect = match request {
            Request::Read { length, .. } => {
                client.buffer(slot)[..length].fill(STALE);
                return 0;
            }
            Request::Flush => return self.model.begin_flush(),
            Request::Write { length, .. } => {
                let is_zeroes = self.rng.usize(..20) == 0;
                let tag = if is_zeroes { Tag::ZEROES } else { self.model.fresh_tag() };
                tag.fill(sectors.start, &mut client.buffer(slot)[..length]);
                Effect::Set(tag)
            }
            Request::WriteZeroes { .. } => Effect::Set(Tag::ZEROES),
            Request::Discard { .. } => Effect::PerhapsZeroes,
        };
        self.model.begin(sectors.clone(), effect);
        0
    }

    fn collect(&mut self, client: &mut impl Disk) -> Result<u64, String> {
        let answers = client.wait(PATIENCE).map_err(|error| format!("cannot wait: {error}"))?;
        if answers.is_empty() {
            let waiting: Vec<&Flight> = self.flights.iter().flatten().collect();
            return Err(format!("no answer came to any of {waiting:?}"));
        }
        for answer in &answers {
            self.finish(client, *answer)?;
        }
        Ok(answers.len() as u64)
    }

    fn finish(&mut self, client: &mut impl Disk, answer: Answer) -> Result<(), String> {
        let flight = self.flights[answer.slot].take().expect("answers come to requests in flight");
        let Flight { request, sectors, flush_begun_at } = flight;
        self.history.0.push((true, request, sectors.clone()));
        if answer.result != 0 {
            return Err(format!("{request:?} was answered with error {}", -answer.result));
        }
        match request {
            Request::Read { length, .. } => {
                self.check(request, sectors.start, &client.buffer(answer.slot)[..length])?;
            }
            Request::Flush => self.model.finish_flush(flush_begun_at),
            _ => self.model.finish(sectors),
        }
        Ok(())
    }

    /// A kind of request and its length; the offset is found by [`Self::place`].
    fn choose(&mut self) -> Request {
        let offset = 0;
        match self.rng.usize(..100) {
            0..40 => Request::Read { offset, length: self.data_sectors() * SECTOR },
            40..82 => Request::Write { offset, length: self.data_sectors() * SECTOR },
            82..89 => {
                let length = (self.range_sectors(self.limits.discard) * SECTOR) as u64;
                Request::Discard { offset, length }
            }
            89..97 => {
                let length = (self.range_sectors(self.limits.write_zeroes) * SECTOR) as u64;
                Request::WriteZeroes { offset, length, unmap: self.rng.bool() }
            }
            _ => Request::Flush,
        }
    }

    /// Mostly small, as guests do it.
    fn data_sectors(&mut self) -> usize {
        let most = match self.rng.usize(..100) {
            0..60 => 8,
            60..90 => 64,
            90..99 => 256,
            _ => MAX_REQUEST / SECTOR,
        };
        let sectors = self.rng.usize(1..=most);
        self.whole_blocks(sectors)
    }

    /// Parts of clusters, whole clusters, and now and then much more.
    fn range_sectors(&mut self, limit: usize) -> usize {
        let cluster = self.cluster;
        let sectors = match self.rng.usize(..100) {
            0..50 => self.rng.usize(1..=64),
            50..75 => self.rng.usize(1..=512),
            75..98 => cluster * self.rng.usize(1..=3),
            _ => self.rng.usize(1..=8192),
        };
        self.whole_blocks(sectors.min(limit).min(self.model.len() / 4))
    }

    fn whole_blocks(&self, sectors: usize) -> usize {
        sectors.next_multiple_of(self.block)
    }

    /// Finds sectors that no request in flight touches. Two reads may overlap.
    fn place(&mut self, request: Request) -> Option<Range<usize>> {
        let length = match request {
            Request::Read { length, .. } | Request::Write { length, .. } => length,
            Request::Discard { length, .. } | Request::WriteZeroes { length, .. } => {
                usize::try_from(length).expect("a length within the disk")
            }
            Request::Flush => return Some(0..0),
        };
        if self.submitted.is_multiple_of(WINDOW_REQUESTS) {
            self.window = self.rng.usize(..self.model.len());
        }
        let sectors = length / SECTOR;
        (0..8).find_map(|_| {
            let start = self.start(request, self.model.len() - sectors);
            let range = start..start + sectors;
            let is_read = matches!(request, Request::Read { .. });
            let is_free = self.flights.iter().flatten().all(|other| {
                (is_read && matches!(other.request, Request::Read { .. }))
                    || other.sectors.end <= range.start
                    || range.end <= other.sectors.start
            });
            is_free.then_some(range)
        })
    }

    fn start(&mut self, request: Request, last: usize) -> usize {
        let anywhere = self.rng.usize(..=last);
        let nearby = self.window + self.rng.usize(..WINDOW_SECTORS);
        let start = if self.rng.bool() { anywhere } else { nearby.min(last) };
        let gives_up = matches!(request, Request::Discard { .. } | Request::WriteZeroes { .. });
        let is_whole = gives_up && self.rng.bool();
        let unit = if is_whole { self.cluster } else { 1 }.max(self.block);
        start - start % unit
    }

    /// Where to cut the data into descriptors: nowhere, at sectors, or anywhere.
    fn cuts(&mut self, request: Request) -> Vec<usize> {
        let (Request::Read { length, .. } | Request::Write { length, .. }) = request else {
            return Vec::new();
        };
        let unit = match self.rng.usize(..4) {
            0 => SECTOR,
            1 => 1,
            _ => return Vec::new(),
        };
        let count = self.rng.usize(1..=3);
        let mut cuts: Vec<usize> = (0..count).map(|_| self.rng.usize(..length) / unit).collect();
        cuts.sort_unstable();
        cuts.iter().map(|cut| cut * unit).collect()
    }
}

/// The request moved to its sectors.
fn at(request: Request, sectors: &Range<usize>) -> Request {
    let offset = (sectors.start * SECTOR) as u64;
    match request {
        Request::Read { length, .. } => Request::Read { offset, length },
        Request::Write { length, .. } => Request::Write { offset, length },
        Request::Discard { length, .. } => Request::Discard { offset, length },
        Request::WriteZeroes { length, unmap, .. } => {
            Request::WriteZeroes { offset, length, unmap }
        }
        Request::Flush => Request::Flush,
    }
}
