//! Simulated workers: random requests on one image, several under way on each of several engines,
//! every answer held against what the sectors may hold.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;

use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::{Error, Result};
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::qcow2::CacheSizes;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, Engine, Storage, block_on};

use crate::images::IMAGE;
use crate::sectors::{SECTOR, Sectors, Tag, bytes_of, fill, tags_of};

/// How often each kind of request comes, as parts of the sum.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Reads.
    pub read: u8,
    /// Writes.
    pub write: u8,
    /// Write-zeroes; half of them may unmap.
    pub zero: u8,
    /// Discards.
    pub discard: u8,
    /// Flushes.
    pub flush: u8,
    /// The longest request in sectors.
    pub longest: usize,
}

impl Default for Mix {
    fn default() -> Self {
        Self { read: 4, write: 8, zero: 2, discard: 2, flush: 1, longest: 40 }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Worker {
    engine: Rc<dyn Engine>,
    tasks: TaskSet<Task>,
}

/// What all requests share.
pub struct Shared {
    image: Image,
    sectors: RefCell<Sectors>,
    tolerant: Cell<bool>,
    errors: RefCell<Vec<String>>,
    answered: Cell<u64>,
}

/// Random requests on one image.
pub struct Run {
    shared: Rc<Shared>,
    workers: Vec<Worker>,
    random: fastrand::Rng,
    mix: Mix,
    left: usize,
}

/// Options that open an image with caches of the least size, or of the usual one.
pub fn options(tiny: bool) -> OpenOptions {
    let least = CacheSizes { l2_bytes: 0, refcount_bytes: 0 };
    let caches = if tiny { least } else { CacheSizes::default() };
    OpenOptions { caches, ..OpenOptions::default() }
}

/// Opens the image of a simulated host.
///
/// # Errors
/// What the open says.
pub fn open(engine: &dyn Engine, disk: &MemDisk, tiny: bool) -> Result<Image> {
    block_on(engine, Image::open(engine, disk, Path::new(IMAGE), &options(tiny)))
}

/// The bytes of the whole disk.
///
/// # Errors
/// What the read says.
pub fn read_all(engine: &dyn Engine, image: &Image) -> Result<Vec<u8>> {
    let buf = Buf::zeroed(usize::try_from(image.size()).expect("a small disk"));
    block_on(engine, image.read(engine, GuestOffset(0), buf.clone()))?;
    Ok(buf.to_vec())
}

impl Run {
    /// `requests` requests, at most `depth` under way on each engine.
    pub fn new(
        image: Image,
        engines: Vec<Rc<dyn Engine>>,
        sectors: Sectors,
        (seed, mix): (u64, Mix),
        (requests, depth): (usize, usize),
    ) -> Self {
        let shared = Shared {
            image,
            sectors: RefCell::new(sectors),
            tolerant: Cell::new(false),
            errors: RefCell::default(),
            answered: Cell::new(0),
        };
        let worker = |engine| Worker { engine, tasks: TaskSet::new(depth, || {}) };
        Self {
            shared: Rc::new(shared),
            workers: engines.into_iter().map(worker).collect(),
            random: fastrand::Rng::with_seed(seed),
            mix,
            left: requests,
        }
    }

    /// Lets requests fail: then a change may have happened or not.
    pub fn tolerate_errors(&self) {
        self.shared.tolerant.set(true);
    }

    /// Asks for `requests` more.
    pub fn more(&mut self, requests: usize) {
        self.left += requests;
    }

    /// The errors that requests were answered with.
    pub fn errors(&self) -> Vec<String> {
        self.shared.errors.borrow().clone()
    }

    /// What the sectors may hold now.
    pub fn sectors(&self) -> Sectors {
        self.shared.sectors.borrow().clone()
    }

    /// How many requests were answered.
    pub fn answered(&self) -> u64 {
        self.shared.answered.get()
    }

    /// Whether a power cut now may leave a disk with these bytes.
    ///
    /// # Errors
    /// Which sector may not.
    pub fn check_crash(&self, bytes: &[u8]) -> std::result::Result<(), String> {
        self.shared.sectors.borrow().check_crash(bytes)
    }

    /// Whether a read of the whole disk, with nothing under way, may return these bytes.
    ///
    /// # Errors
    /// Which sector may not.
    pub fn check_content(&self, bytes: &[u8]) -> std::result::Result<(), String> {
        let sectors = self.shared.sectors.borrow();
        sectors.check_read(0, bytes, sectors.now())
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.shared.image
    }

    /// One turn of one worker, drawn by chance; `false` when everything was answered.
    ///
    /// # Panics
    /// When nothing can go on although requests are under way, and when an answer is wrong.
    pub fn step(&mut self) -> bool {
        let pick = self.random.usize(0..self.workers.len());
        while self.left > 0 && self.workers[pick].tasks.has_room() && self.random.u8(0..3) > 0 {
            self.left -= 1;
            let task = self.draw(Rc::clone(&self.workers[pick].engine));
            self.workers[pick].tasks.spawn(task);
        }
        let worker = &mut self.workers[pick];
        let polled = worker.tasks.run_ready();
        let done = worker.engine.reap();
        if polled + done > 0 {
            return true;
        }
        let idle = self.workers.iter().all(|worker| worker.tasks.is_idle());
        let hope = |worker: &Worker| worker.tasks.has_ready() || worker.engine.is_busy();
        let hope = self.left > 0 && self.workers.iter().any(|worker| worker.tasks.has_room())
            || self.workers.iter().any(hope);
        assert!(idle || hope, "deadlock: {} requests wait for nothing", self.alive());
        self.left > 0 || !idle
    }

    /// Takes turns until everything was answered.
    pub fn finish(&mut self) {
        while self.step() {}
    }

    /// How many requests are under way.
    pub fn alive(&self) -> usize {
        self.workers.iter().map(|worker| worker.tasks.len()).sum()
    }

    /// Spawns a close of the image as one more request; nothing else may be under way.
    pub fn start_close(&mut self) {
        let (shared, worker) = (Rc::clone(&self.shared), &mut self.workers[0]);
        let engine = Rc::clone(&worker.engine);
        worker.tasks.spawn(Box::pin(async move {
            let begun = shared.sectors.borrow_mut().begin_flush();
            let result = shared.image.close(engine.as_ref()).await;
            shared.after_flush(begun, result);
        }));
    }

    fn draw(&mut self, engine: Rc<dyn Engine>) -> Task {
        let Mix { read, write, zero, discard, flush, longest } = self.mix;
        let shared = Rc::clone(&self.shared);
        let count = shared.sectors.borrow().len();
        let at = self.random.usize(0..count);
        let range = at..(at + self.random.usize(1..=longest)).min(count);
        let busy = shared.sectors.borrow().is_busy(range.clone());
        let mut kind = self.random.u8(0..read + write + zero + discard + flush);
        let mut is = |parts: u8| {
            let hit = kind < parts;
            kind = kind.wrapping_sub(parts);
            hit
        };
        if is(flush) {
            return Box::pin(async move {
                let begun = shared.sectors.borrow_mut().begin_flush();
                let result = shared.image.flush(engine.as_ref()).await;
                shared.after_flush(begun, result);
            });
        }
        if is(read) || busy {
            return Box::pin(async move { shared.read(engine.as_ref(), range).await });
        }
        // The sectors are claimed now, not when the task runs for the first time.
        if is(write) {
            let tag = shared.sectors.borrow_mut().begin_write(range.clone());
            return Box::pin(async move { shared.write(engine.as_ref(), range, tag).await });
        }
        shared.sectors.borrow_mut().begin_zero(range.clone());
        if is(zero) {
            let unmap = self.random.bool();
            return Box::pin(async move {
                let (at, len) = place(&range);
                let done = shared.image.write_zeroes(engine.as_ref(), at, len, unmap).await;
                shared.after_change(range, done);
            });
        }
        Box::pin(async move { shared.discard(engine.as_ref(), range).await })
    }
}

fn place(range: &Range<usize>) -> (GuestOffset, u64) {
    (GuestOffset((range.start * SECTOR) as u64), (range.len() * SECTOR) as u64)
}

impl Shared {
    fn fail(&self, error: &Error) {
        assert!(self.tolerant.get(), "a request failed: {error}");
        self.errors.borrow_mut().push(error.to_string());
    }

    fn count(&self) {
        self.answered.set(self.answered.get() + 1);
    }

    fn after_change(&self, range: Range<usize>, result: Result<()>) {
        self.sectors.borrow_mut().end(range, result.is_ok());
        result.unwrap_or_else(|error| self.fail(&error));
        self.count();
    }

    fn after_flush(&self, begun: u64, result: Result<()>) {
        match result {
            Ok(()) => self.sectors.borrow_mut().end_flush(begun),
            Err(error) => self.fail(&error),
        }
        self.count();
    }

    async fn read(&self, st: &dyn Storage, range: Range<usize>) {
        let begun = self.sectors.borrow().now();
        let buf = Buf::zeroed(range.len() * SECTOR);
        let result = self.image.read(st, place(&range).0, buf.clone()).await;
        self.count();
        match result {
            Ok(()) => {
                let fine = self.sectors.borrow().check_read(range.start, &buf.to_vec(), begun);
                fine.unwrap_or_else(|what| panic!("a read of {range:?}: {what}"));
            }
            Err(error) => self.fail(&error),
        }
    }

    async fn write(&self, st: &dyn Storage, range: Range<usize>, tag: Tag) {
        let mut bytes = vec![0; range.len() * SECTOR];
        fill(range.start, tag, &mut bytes);
        let result = self.image.write(st, place(&range).0, Buf::copy_of(&bytes)).await;
        self.after_change(range, result);
    }

    /// A discarded sector holds what it held before, or zeros: the next read shows which, and so
    /// it must stay.
    async fn discard(&self, st: &dyn Storage, range: Range<usize>) {
        let (at, len) = place(&range);
        let discarded = self.image.discard(st, at, len).await;
        let buf = Buf::zeroed(range.len() * SECTOR);
        let result = match discarded {
            Ok(()) => self.image.read(st, at, buf.clone()).await,
            error => error,
        };
        if result.is_err() {
            return self.after_change(range, result);
        }
        let tags = tags_of(range.start, &buf.to_vec());
        let tags = tags.unwrap_or_else(|| panic!("foreign bytes after a discard of {range:?}"));
        let mut sectors = self.sectors.borrow_mut();
        for (sector, tag) in range.clone().zip(tags) {
            let fine = sectors.end_discard(sector, tag);
            fine.unwrap_or_else(|what| panic!("after a discard of {range:?}: {what}"));
        }
        self.count();
    }
}

/// Writes a few versions to an image with nothing else under way; `tags` is kept up to date.
pub fn write_some(
    engine: &dyn Engine,
    image: &Image,
    tags: &mut [Tag],
    random: &mut fastrand::Rng,
) -> Result<()> {
    let fresh = tags.iter().max().copied().unwrap_or(0) + 1;
    for step in 0..random.u32(1..=6) {
        let at = random.usize(0..tags.len());
        let range = at..(at + random.usize(1..=24)).min(tags.len());
        let (start, len) = place(&range);
        match random.u8(0..4) {
            0 => {
                block_on(engine, image.write_zeroes(engine, start, len, random.bool()))?;
                tags[range].fill(0);
            }
            1 => block_on(engine, image.flush(engine))?,
            _ => {
                tags[range.clone()].fill(fresh + step);
                let buf = Buf::copy_of(&bytes_of(range.start, &tags[range]));
                block_on(engine, image.write(engine, start, buf))?;
            }
        }
    }
    Ok(())
}
