//! A simulated host: files in memory with a volatile and a durable half.
//!
//! Operations finish in an order drawn from a seed, each as late as the test lets it. A write lands
//! in the volatile half; a sync moves what had finished before it was submitted to the durable
//! half. [`MemDisk::crash`] makes the disk that a power cut would leave: the durable bytes plus any
//! part of what was not yet synced, finished or not, torn at sectors.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use super::ops::{OpTable, Pending};
use super::{Engine, FileId, FileSource, Lane, Limits, Op, OpenMode, Opened, Purpose, Storage};
use crate::bytes::HostOffset;
use crate::error::{Error, Result};

/// What a power cut may tear a write at, in bytes.
pub const SECTOR: usize = 512;
/// The longest file that the simulated host takes, in bytes; more fails with `EFBIG`.
pub const LONGEST: u64 = 1 << 28;

/// One thing that happened to the disk, in order; traces of these are what ordering tests read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Whether the operation was submitted or has finished.
    pub stage: Stage,
    /// The file.
    pub file: FileId,
    /// Why it was done.
    pub why: Purpose,
    /// First byte, or 0 for a sync.
    pub at: u64,
    /// Length in bytes, or 0 for a sync.
    pub len: u64,
    /// Tells operations apart; the same at submission and end.
    pub serial: u64,
    /// What it does to the file.
    pub effect: Effect,
}

/// What an operation does to a file, as a trace tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: it reads.
    None,
    /// It writes these bytes; they are in the trace once, at submission.
    Write(Vec<u8>),
    /// It makes a range read as zeros.
    Zeros,
    /// It sets the file's length.
    Length,
    /// It makes what was finished before durable.
    Sync,
}

/// The two moments of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The operation was handed over.
    Submitted,
    /// The operation has taken effect.
    Finished,
}

#[derive(Clone)]
enum Change {
    Bytes(Vec<u8>),
    Zeros(u64),
    Length,
}

#[derive(Clone)]
struct Unsynced {
    at: u64,
    change: Change,
    serial: u64,
}

impl Unsynced {
    /// Applies this change to `bytes`, but only the sectors that `keep` picks.
    fn apply(&self, bytes: &mut Vec<u8>, mut keep: impl FnMut() -> bool) {
        let at = usize::try_from(self.at).expect("a simulated file fits in memory");
        let len = match &self.change {
            Change::Bytes(data) => data.len(),
            Change::Zeros(len) => usize::try_from(*len).expect("fits in memory"),
            Change::Length => {
                if keep() {
                    bytes.resize(at, 0);
                }
                return;
            }
        };
        let mut done = 0;
        while done < len {
            let run = (SECTOR - (at + done) % SECTOR).min(len - done);
            if keep() {
                let end = at + done + run;
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                let target = &mut bytes[at + done..end];
                match &self.change {
                    Change::Bytes(data) => target.copy_from_slice(&data[done..done + run]),
                    _ => target.fill(0),
                }
            }
            done += run;
        }
    }
}

#[derive(Clone, Default)]
struct File {
    name: PathBuf,
    volatile: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Unsynced>,
    limits: Limits,
    read_only: bool,
}

struct Disk {
    files: Vec<File>,
    /// Changes that were submitted and have not finished: a crash may have done part of them.
    in_flight: BTreeMap<u64, (FileId, Unsynced)>,
    trace: Option<Vec<Event>>,
    serial: u64,
}

/// A simulated host; clones are handles on the same one.
#[derive(Clone)]
pub struct MemDisk(Rc<RefCell<Disk>>);

impl fmt::Debug for MemDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemDisk({} files)", self.0.borrow().files.len())
    }
}

impl Default for MemDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl MemDisk {
    /// A host without files.
    pub fn new() -> Self {
        let disk = Disk { files: Vec::new(), in_flight: BTreeMap::new(), trace: None, serial: 0 };
        Self(Rc::new(RefCell::new(disk)))
    }

    /// Adds a file with durable content.
    pub fn add(&self, name: impl Into<PathBuf>, content: Vec<u8>) -> FileId {
        let mut disk = self.0.borrow_mut();
        let file = File {
            name: name.into(),
            durable: content.clone(),
            volatile: content,
            ..File::default()
        };
        disk.files.push(file);
        FileId(u32::try_from(disk.files.len() - 1).expect("few files"))
    }

    /// Sets what [`Storage::limits`] says of a file.
    pub fn set_limits(&self, file: FileId, limits: Limits) {
        self.0.borrow_mut().files[index(file)].limits = limits;
    }

    /// The volatile content of a file: what a reader on this host sees.
    pub fn content(&self, file: FileId) -> Vec<u8> {
        self.0.borrow().files[index(file)].volatile.clone()
    }

    /// The content of the file of that name.
    pub fn content_of(&self, name: impl AsRef<Path>) -> Option<Vec<u8>> {
        let disk = self.0.borrow();
        let file = disk.find(name.as_ref()).map(|number| &disk.files[number])?;
        Some(file.volatile.clone())
    }

    /// All files by name, with what a reader on this host sees.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let disk = self.0.borrow();
        disk.files.iter().map(|file| (file.name.clone(), file.volatile.clone())).collect()
    }

    /// Runs `look` on what a reader on this host sees of the file of that name.
    pub fn look<R>(&self, name: impl AsRef<Path>, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let disk = self.0.borrow();
        let file = disk.find(name.as_ref()).map(|number| &disk.files[number])?;
        Some(look(&file.volatile))
    }

    /// One worker's way to the files; operations finish in an order drawn from `seed`.
    pub fn engine(&self, lane: usize, seed: u64) -> MemEngine {
        MemEngine {
            disk: self.clone(),
            lane: Lane(lane),
            table: OpTable::new(),
            queue: RefCell::new(Vec::new()),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            hold: Cell::new(0),
        }
    }

    /// Starts recording what happens.
    pub fn start_trace(&self) {
        self.0.borrow_mut().trace = Some(Vec::new());
    }

    /// What happened since the trace was started or last taken.
    pub fn take_trace(&self) -> Vec<Event> {
        self.0.borrow_mut().trace.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// How many changes a crash now could lose or tear, with their sectors; the size of the space
    /// that an exhaustive test enumerates.
    pub fn unsynced_sectors(&self) -> usize {
        let mut sectors = 0;
        self.with_unsynced(|_, change| {
            change.apply(&mut Vec::new(), || {
                sectors += 1;
                false
            });
        });
        sectors
    }

    /// The disk that a power cut now would leave, drawn from `seed`: each change that is not
    /// durable is kept, lost, or torn by sectors.
    #[must_use]
    pub fn crash(&self, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        // One draw a disk, so that "nothing reached the medium" and "all of it" are both common.
        let (keep_all, keep_none) = (random.u8(1..=4), random.u8(1..=4));
        self.crash_with(|| match random.u8(0..16) {
            draw if draw < keep_all => Fate::Kept,
            draw if draw < keep_all + keep_none => Fate::Lost,
            _ => Fate::Torn(random.u64(..)),
        })
    }

    /// The disk that a power cut leaves when exactly the sectors whose bit is set in `kept` (in
    /// the order of [`MemDisk::unsynced_sectors`]) reached the medium.
    #[must_use]
    pub fn crash_exactly(&self, kept: u64) -> Self {
        let mut next = 0;
        let mut crashed = self.durable_half();
        self.with_unsynced(|file, change| {
            change.apply(&mut crashed[index(file)].durable, || {
                next += 1;
                next <= 64 && kept >> (next - 1) & 1 == 1
            });
        });
        Self::reopen(crashed)
    }

    /// The host after the process was killed that has used it until now, drawn from `seed`. What
    /// had finished is there, and no more durable than before; what was under way happened or not,
    /// or in part.
    #[must_use]
    pub fn kill(&self, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let disk = self.0.borrow();
        let (mut files, mut serial) = (disk.files.clone(), disk.serial);
        for (file, change) in disk.in_flight.values() {
            let file = &mut files[index(*file)];
            let mut change = change.clone();
            // Whole sectors from the start on, and the file may be longer than before.
            let at = change.at;
            let sectors = |len: u64, random: &mut fastrand::Rng| {
                let end = (at + random.u64(..=len)).next_multiple_of(SECTOR as u64);
                (end - at).min(len)
            };
            match (random.u8(0..8), &mut change.change) {
                (0..=2, _) => continue,
                (3, Change::Bytes(bytes)) => {
                    let len = sectors(bytes.len() as u64, &mut random);
                    bytes.truncate(usize::try_from(len).expect("fits in memory"));
                }
                (3, Change::Zeros(len)) => *len = sectors(*len, &mut random),
                _ => {}
            }
            serial += 1;
            change.serial = serial;
            change.apply(&mut file.volatile, || true);
            file.unsynced.push(change);
        }
        let killed = Disk { files, in_flight: BTreeMap::new(), trace: None, serial };
        Self(Rc::new(RefCell::new(killed)))
    }

    fn crash_with(&self, mut fate: impl FnMut() -> Fate) -> Self {
        let mut crashed = self.durable_half();
        self.with_unsynced(|file, change| {
            let bytes = &mut crashed[index(file)].durable;
            match fate() {
                Fate::Kept => change.apply(bytes, || true),
                Fate::Lost => {}
                Fate::Torn(seed) => {
                    let mut random = fastrand::Rng::with_seed(seed);
                    change.apply(bytes, || random.bool());
                }
            }
        });
        Self::reopen(crashed)
    }

    fn durable_half(&self) -> Vec<File> {
        let disk = self.0.borrow();
        let copy = |file: &File| File {
            name: file.name.clone(),
            durable: file.durable.clone(),
            limits: file.limits,
            ..File::default()
        };
        disk.files.iter().map(copy).collect()
    }

    fn with_unsynced(&self, mut visit: impl FnMut(FileId, &Unsynced)) {
        let disk = self.0.borrow();
        for (number, file) in disk.files.iter().enumerate() {
            let id = FileId(u32::try_from(number).expect("few files"));
            file.unsynced.iter().for_each(|change| visit(id, change));
        }
        disk.in_flight.values().for_each(|(file, change)| visit(*file, change));
    }

    fn reopen(mut files: Vec<File>) -> Self {
        for file in &mut files {
            file.volatile.clone_from(&file.durable);
        }
        let crashed = Self::new();
        crashed.0.borrow_mut().files = files;
        crashed
    }
}

enum Fate {
    Kept,
    Lost,
    Torn(u64),
}

fn index(file: FileId) -> usize {
    usize::try_from(file.0).expect("a file number")
}

/// The simulated host has no links, and its programs run in its root directory.
fn absolute(path: &Path) -> PathBuf {
    let mut whole = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => {
                whole.pop();
            }
            Component::CurDir => {}
            other => whole.push(other),
        }
    }
    whole
}

impl FileSource for MemDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Opened> {
        let mut disk = self.0.borrow_mut();
        let Some(number) = disk.find(path) else {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            return Err(Error::io(path.display().to_string(), missing));
        };
        disk.files[number].read_only = mode.read_only;
        let id = u32::try_from(number).expect("few files");
        let length = disk.files[number].volatile.len() as u64;
        Ok(Opened { id: FileId(id), identity: (0, u64::from(id)), length })
    }

    fn create(&self, path: &Path) -> Result<Opened> {
        if self.0.borrow().find(path).is_some() {
            let exists = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(Error::io(path.display().to_string(), exists));
        }
        let id = self.add(path, Vec::new());
        Ok(Opened { id, identity: (0, u64::from(id.0)), length: 0 })
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        let whole = absolute(path);
        // A directory exists when a file lies in it.
        let disk = self.0.borrow();
        let exists = disk.files.iter().any(|file| absolute(&file.name).starts_with(&whole));
        if !exists {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            return Err(Error::io(path.display().to_string(), missing));
        }
        Ok(whole)
    }
}

struct Running {
    file: FileId,
    why: Purpose,
    op: Op,
    serial: u64,
}

/// One worker's way to a [`MemDisk`].
pub struct MemEngine {
    disk: MemDisk,
    lane: Lane,
    table: Rc<OpTable<Running>>,
    queue: RefCell<Vec<usize>>,
    random: RefCell<fastrand::Rng>,
    hold: Cell<u8>,
}

impl MemEngine {
    /// How lazy [`Engine::reap`] is: each operation under way finishes with a chance of one in
    /// `1 + hold` at each call. 0, the start, finishes all, in drawn order.
    pub fn set_hold(&self, hold: u8) {
        self.hold.set(hold);
    }

    fn finish_one(&self) {
        let pick = self.random.borrow_mut().usize(0..self.queue.borrow().len());
        let key = self.queue.borrow_mut().swap_remove(pick);
        let (file, why, op, serial) =
            self.table.with(key, |run| (run.file, run.why, run.op.clone(), run.serial));
        let result = self.disk.0.borrow_mut().finish(file, &op, serial);
        self.disk.0.borrow_mut().record(Stage::Finished, file, why, &op, serial);
        self.table.finish(key, result);
    }
}

impl Disk {
    fn find(&self, name: &Path) -> Option<usize> {
        let name = absolute(name);
        self.files.iter().position(|file| absolute(&file.name) == name)
    }

    fn record(&mut self, stage: Stage, file: FileId, why: Purpose, op: &Op, serial: u64) {
        let Some(trace) = &mut self.trace else { return };
        let (at, len, effect) = match op {
            Op::Read { at, buf } => (at.0, buf.len() as u64, Effect::None),
            Op::Write { at, buf } if stage == Stage::Submitted => {
                (at.0, buf.len() as u64, Effect::Write(buf.to_vec()))
            }
            Op::Write { at, buf } => (at.0, buf.len() as u64, Effect::Write(Vec::new())),
            Op::Zero { at, len, .. } | Op::Discard { at, len } => (at.0, *len, Effect::Zeros),
            Op::Reserve { at, len } => (at.0, *len, Effect::None),
            Op::Resize { len } => (0, *len, Effect::Length),
            Op::Sync => (0, 0, Effect::Sync),
        };
        trace.push(Event { stage, file, why, at, len, serial, effect });
    }

    fn begin(&mut self, file: FileId, op: &Op) -> u64 {
        self.serial += 1;
        let serial = self.serial;
        let (at, change) = match op {
            _ if is_too_long(op) => return serial,
            Op::Write { at, buf } => (at.0, Change::Bytes(buf.to_vec())),
            Op::Zero { at, len, .. } => (at.0, Change::Zeros(*len)),
            Op::Discard { at, len } => {
                // A hole never makes a file longer.
                let end = self.files[index(file)].volatile.len() as u64;
                let end = end.min(at.0.saturating_add(*len));
                (at.0, Change::Zeros(end.saturating_sub(at.0)))
            }
            Op::Resize { len } => (*len, Change::Length),
            Op::Read { .. } | Op::Reserve { .. } | Op::Sync => return serial,
        };
        self.in_flight.insert(serial, (file, Unsynced { at, change, serial }));
        serial
    }

    fn finish(&mut self, id: FileId, op: &Op, serial: u64) -> io::Result<()> {
        let file = &mut self.files[index(id)];
        match op {
            Op::Read { at, buf } => read(&file.volatile, *at, buf),
            Op::Reserve { .. } => {}
            Op::Sync => {
                let (done, later) = std::mem::take(&mut file.unsynced)
                    .into_iter()
                    .partition::<Vec<_>, _>(|change| change.serial < serial);
                // A change with an earlier number that finishes after the sync was submitted may
                // be made durable too; a later number never is, although a real disk might.
                for change in &done {
                    change.apply(&mut file.durable, || true);
                }
                file.unsynced = later;
            }
            _ if file.read_only => {
                self.in_flight.remove(&serial);
                return Err(io::Error::from_raw_os_error(9));
            }
            _ if is_too_long(op) => return Err(io::Error::from_raw_os_error(27)),
            _ => {
                let (_, mut change) = self.in_flight.remove(&serial).expect("it was begun");
                if let Op::Discard { at, len } = op {
                    // A hole never makes a file longer.
                    let end = (file.volatile.len() as u64).min(at.0.saturating_add(*len));
                    change.change = Change::Zeros(end.saturating_sub(at.0));
                }
                change.apply(&mut file.volatile, || true);
                // The order of finishing is the order that counts from here on.
                self.serial += 1;
                change.serial = self.serial;
                file.unsynced.push(change);
            }
        }
        Ok(())
    }
}

fn is_too_long(op: &Op) -> bool {
    let end = match op {
        Op::Write { at, buf } => at.0.saturating_add(buf.len() as u64),
        Op::Zero { at, len, .. } => at.0.saturating_add(*len),
        Op::Resize { len } => *len,
        Op::Read { .. } | Op::Discard { .. } | Op::Reserve { .. } | Op::Sync => 0,
    };
    end > LONGEST
}

fn read(bytes: &[u8], at: HostOffset, buf: &super::Buf) {
    let start = usize::try_from(at.0).unwrap_or(usize::MAX).min(bytes.len());
    let have = (bytes.len() - start).min(buf.len());
    buf.copy_from(0, &bytes[start..start + have]);
    buf.fill_zero(have, buf.len() - have);
}

impl Storage for MemEngine {
    fn limits(&self, file: FileId) -> Limits {
        self.disk.0.borrow().files[index(file)].limits
    }

    fn length(&self, file: FileId) -> io::Result<u64> {
        Ok(self.disk.0.borrow().files[index(file)].volatile.len() as u64)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        let mut disk = self.disk.0.borrow_mut();
        let serial = disk.begin(file, &op);
        disk.record(Stage::Submitted, file, why, &op, serial);
        let (key, pending) = self.table.begin(Running { file, why, op, serial });
        self.queue.borrow_mut().push(key);
        pending
    }

    fn lane(&self) -> Lane {
        self.lane
    }
}

impl Engine for MemEngine {
    fn reap(&self) -> usize {
        let mut done = 0;
        let under_way = self.queue.borrow().len();
        for _ in 0..under_way {
            if self.random.borrow_mut().u8(0..=self.hold.get()) == 0 {
                self.finish_one();
                done += 1;
            }
        }
        done
    }

    fn submit_all(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_busy(&self) -> bool {
        !self.queue.borrow().is_empty()
    }

    fn pollable(&self) -> RawFd {
        -1
    }

    fn wait(&self) -> io::Result<()> {
        if self.is_busy() && self.reap() == 0 {
            self.finish_one();
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
