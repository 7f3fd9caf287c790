//! What the scenarios share: an image that we and QEMU change in turns, and what it must hold.

use std::ops::Range;
use std::path::Path;
use std::pin::Pin;

use common::check::{Report, check};
use common::images::IMAGE;
use common::qemu::{Dir, Verdict};
use common::workers::options;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::{Error, Result};
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::{Image, OpenOptions};
use vhost_user_qcow2::storage::files::{Files, Options};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::threads::Threads;
use vhost_user_qcow2::storage::{Buf, Engine, block_on};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// One change of the guest's: where, how many bytes, and what becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// All bytes become this one.
    Write(u64, u64, u8),
    /// Zeros; the host's space is kept.
    Zero(u64, u64),
    /// Zeros; the host's space may go.
    Unmap(u64, u64),
    /// Not needed any more.
    Discard(u64, u64),
}

use Act::{Discard, Unmap, Write, Zero};

impl Act {
    /// The command of `qemu-io`.
    fn command(self) -> String {
        match self {
            Write(at, len, byte) => format!("write -q -P {byte} {at} {len}"),
            Zero(at, len) => format!("write -q -z {at} {len}"),
            Unmap(at, len) => format!("write -q -z -u {at} {len}"),
            Discard(at, len) => format!("discard -q {at} {len}"),
        }
    }

    /// The same through our layer.
    pub(crate) async fn run(self, st: &dyn Engine, image: &Image) -> Result<()> {
        match self {
            Write(at, len, byte) => {
                let bytes = vec![byte; index(len)];
                image.write(st, GuestOffset(at), Buf::copy_of(&bytes)).await
            }
            Zero(at, len) => image.write_zeroes(st, GuestOffset(at), len, false).await,
            Unmap(at, len) => image.write_zeroes(st, GuestOffset(at), len, true).await,
            Discard(at, len) => image.discard(st, GuestOffset(at), len).await,
        }
    }
}

/// An offset or a length as an index.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).expect("what a test reads is small")
}

/// The image opened by us.
pub(crate) struct Session {
    /// The engine that drives it.
    pub(crate) engine: Box<dyn Engine>,
    /// The image.
    pub(crate) image: Image,
    /// The simulated host, unless the files are the host's own.
    pub(crate) disk: Option<MemDisk>,
}

impl Session {
    /// One act.
    pub(crate) fn act(&self, act: Act) -> Result<()> {
        block_on(self.engine.as_ref(), act.run(self.engine.as_ref(), &self.image))
    }

    /// A range's bytes.
    pub(crate) fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(index(len));
        let engine = self.engine.as_ref();
        block_on(engine, self.image.read(engine, GuestOffset(at), buf.clone()))?;
        Ok(buf.to_vec())
    }

    /// What was answered becomes durable.
    pub(crate) fn flush(&self) -> Result<()> {
        block_on(self.engine.as_ref(), self.image.flush(self.engine.as_ref()))
    }

    /// All acts at once, each a request of its own; they must not overlap.
    pub(crate) fn together(&self, acts: &[Act]) {
        let engine = self.engine.as_ref();
        type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;
        let mut tasks: TaskSet<Task<'_>> = TaskSet::new(acts.len(), || {});
        for &act in acts {
            tasks.spawn(Box::pin(async move {
                act.run(engine, &self.image).await.unwrap_or_else(|error| {
                    panic!("{act:?}: {error}");
                });
            }));
        }
        while !tasks.is_idle() {
            let polled = tasks.run_ready();
            let reaped = engine.reap();
            let hope = polled + reaped > 0 || engine.is_busy() || tasks.has_ready();
            assert!(tasks.is_idle() || hope, "{} requests wait for nothing", tasks.len());
        }
    }

    /// Closes the image.
    pub(crate) fn close(self) -> Option<MemDisk> {
        let engine = self.engine.as_ref();
        block_on(engine, self.image.close(engine)).expect("close");
        self.disk
    }
}

/// An image in a directory, and the bytes that its guest must see in a window of its disk.
pub(crate) struct Stage {
    /// The image and the files it refers to.
    pub(crate) dir: Dir,
    /// What the window must hold.
    pub(crate) bytes: Vec<u8>,
    /// Where the window begins.
    start: u64,
    /// Whether our caches have the least size.
    pub(crate) tiny: bool,
    /// Whether we work on the host's own files, since they are too large for a simulated host.
    on_host: bool,
    /// How lazily the simulated host answers, and in which order.
    pub(crate) order: (u8, u64),
}

impl Stage {
    /// A new image by `qemu-img`, with these options beside each other and that size in bytes.
    pub(crate) fn new(options: &str, size: u64) -> Self {
        Self::windowed(Dir::new(), options, size, 0..size)
    }

    /// A new image in a directory that may hold its backing file; the test looks at a window only.
    pub(crate) fn windowed(dir: Dir, options: &str, size: u64, window: Range<u64>) -> Self {
        let size = size.to_string();
        dir.img(&["create", "-q", "-f", "qcow2", "-o", options, IMAGE, &size]);
        Self::around(dir, window)
    }

    /// The image that is in a directory, whatever it holds.
    pub(crate) fn of(dir: Dir) -> Self {
        let header = dir.read(IMAGE);
        let size = u64::from_be_bytes(header[24..32].try_into().expect("eight bytes"));
        Self::around(dir, 0..size)
    }

    /// The image that is in a directory; the test looks at a window only.
    pub(crate) fn around(dir: Dir, window: Range<u64>) -> Self {
        let mut stage = Self {
            dir,
            bytes: Vec::new(),
            start: window.start,
            tiny: false,
            on_host: false,
            order: (0, 0),
        };
        stage.bytes = stage.theirs_read(window.end - window.start);
        stage
    }

    /// The same on the host's own files.
    pub(crate) fn on_host(self) -> Self {
        Self { on_host: true, ..self }
    }

    /// The same with caches of the least size.
    pub(crate) fn tiny(self) -> Self {
        Self { tiny: true, ..self }
    }

    /// Runs `qemu-img`.
    pub(crate) fn img(&self, arguments: &[&str]) -> String {
        self.dir.img(arguments)
    }

    /// A word of the image's header or tables.
    pub(crate) fn word(&self, at: u64) -> u64 {
        word(&self.dir, at)
    }

    /// A half word, as the header has some.
    pub(crate) fn half_word(&self, at: u64) -> u64 {
        self.word(at) >> 32
    }

    /// Changes bytes of the image's file.
    pub(crate) fn poke(&self, at: u64, bytes: &[u8]) {
        let path = self.dir.path().join(IMAGE);
        let file = std::fs::OpenOptions::new().write(true).open(path).expect("the image");
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).expect("changing the image");
    }

    /// The length of the image's file in bytes.
    pub(crate) fn file_length(&self) -> u64 {
        self.dir.path().join(IMAGE).metadata().expect("the image").len()
    }

    /// What our checker says of the file.
    pub(crate) fn report(&self) -> Report {
        check(&self.dir.read(IMAGE))
    }

    /// `qemu-io` acts.
    pub(crate) fn theirs(&mut self, acts: &[Act]) {
        self.expect(acts);
        let commands: Vec<String> = acts.iter().map(|act| act.command()).collect();
        self.dir.io(IMAGE, &commands);
    }

    /// Whether `qemu-io` carries a command out.
    pub(crate) fn qemu_does(&self, command: &str) -> bool {
        let mut run = std::process::Command::new("qemu-io");
        run.args(["-f", "qcow2", "-c", command, IMAGE]).current_dir(self.dir.path());
        let output = run.output().expect("qemu-io");
        let said = [output.stdout, output.stderr].concat();
        output.status.success() && !String::from_utf8_lossy(&said).contains("failed")
    }

    /// We act, one thing after the other.
    pub(crate) fn ours(&mut self, acts: &[Act]) {
        let session = self.open().unwrap_or_else(|error| panic!("opening: {error}"));
        for &act in acts {
            session.act(act).unwrap_or_else(|error| panic!("{act:?}: {error}"));
            if let Discard(at, len) = act {
                self.settle(&session, at, len);
            } else {
                self.expect(&[act]);
            }
        }
        if let Some(disk) = session.close() {
            self.put_back(&disk);
        }
    }

    /// A discarded sector holds what it held before, or zeros: the next read shows which, and so
    /// it must stay.
    fn settle(&mut self, session: &Session, at: u64, len: u64) {
        let (from, to) = (at.max(self.start), (at + len).min(self.start + self.bytes.len() as u64));
        if from >= to {
            return;
        }
        let now = session.read(from, to - from).expect("reading");
        let model = &mut self.bytes[index(from - self.start)..index(to - self.start)];
        for (old, now) in model.chunks_mut(512).zip(now.chunks(512)) {
            assert!(old == now || now.iter().all(|&byte| byte == 0), "a discard made up bytes");
            old.copy_from_slice(now);
        }
    }

    /// We act, everything at once.
    pub(crate) fn ours_together(&mut self, acts: &[Act]) {
        self.expect(acts);
        self.session(|session| session.together(acts));
    }

    /// Opens the image, lets `work` use it, closes it, and puts the files back.
    pub(crate) fn session<R>(&mut self, work: impl FnOnce(&Session) -> R) -> R {
        let session = self.open().unwrap_or_else(|error| panic!("opening: {error}"));
        let result = work(&session);
        if let Some(disk) = session.close() {
            self.put_back(&disk);
        }
        result
    }

    /// The files of a simulated host become those of the directory.
    pub(crate) fn put_back(&mut self, disk: &MemDisk) {
        for (name, content) in disk.files() {
            self.dir.write(name, &content);
        }
    }

    /// A directory with the same files.
    pub(crate) fn copy(&self) -> Dir {
        let dir = Dir::new();
        for (name, content) in self.dir.files() {
            dir.write(name, &content);
        }
        dir
    }

    /// A simulated host with the files of the directory.
    pub(crate) fn host(&self) -> MemDisk {
        let disk = MemDisk::new();
        let mut files = self.dir.files();
        files.sort_by_key(|(name, _)| name != Path::new(IMAGE));
        for (name, content) in files {
            disk.add(name, content);
        }
        disk
    }

    /// Opens the image for writing.
    pub(crate) fn open(&self) -> Result<Session> {
        self.open_with(&options(self.tiny))
    }

    /// Opens the image.
    pub(crate) fn open_with(&self, options: &OpenOptions) -> Result<Session> {
        if self.on_host {
            let files = Files::new(Options { sync: false, ..Options::default() });
            let engine = Threads::new(&files, 0).expect("an engine");
            let path = self.dir.path().join(IMAGE);
            let image = block_on(&engine, Image::open(&engine, files.as_ref(), &path, options))?;
            return Ok(Session { engine: Box::new(engine), image, disk: None });
        }
        let disk = self.host();
        let engine = disk.engine(0, self.order.1);
        let image = block_on(&engine, Image::open(&engine, &disk, Path::new(IMAGE), options))?;
        engine.set_hold(self.order.0);
        Ok(Session { engine: Box::new(engine), image, disk: Some(disk) })
    }

    /// Why the image cannot be opened for writing.
    pub(crate) fn refusal(&self) -> Error {
        self.open().map(|_| ()).expect_err("an image that must be refused")
    }

    /// The check finds nothing, and everybody reads what the window must hold.
    pub(crate) fn judge(&mut self) {
        let (verdict, printed) = self.dir.check(IMAGE);
        assert_eq!(verdict, Verdict::Clean, "{printed}");
        self.judge_content();
    }

    /// Everybody reads what the window must hold.
    pub(crate) fn judge_content(&mut self) {
        let theirs = self.theirs_read(self.bytes.len() as u64);
        self.assert_same(&theirs, "QEMU reads");
        let read_only = OpenOptions { read_only: true, ..options(self.tiny) };
        let session = self.open_with(&read_only).unwrap_or_else(|error| panic!("{error}"));
        let ours = session.read(self.start, self.bytes.len() as u64).expect("reading");
        self.assert_same(&ours, "we read");
    }

    fn assert_same(&self, have: &[u8], who: &str) {
        assert_eq!(have.len(), self.bytes.len(), "{who} another length");
        if let Some(at) = (0..have.len()).find(|&at| have[at] != self.bytes[at]) {
            let (have, expected) = (have[at], self.bytes[at]);
            panic!("{who} {have} at {}, where {expected} must be", at as u64 + self.start);
        }
    }

    fn theirs_read(&self, len: u64) -> Vec<u8> {
        let start = self.start;
        let source = format!(
            "driver=raw,offset={start},size={len},file.driver=qcow2,file.file.driver=file,\
             file.file.filename={IMAGE}"
        );
        // The last part of a sector is not in the raw view.
        self.img(&["convert", "--image-opts", &source, "-O", "raw", "window.out"]);
        let bytes = self.dir.read("window.out");
        std::fs::remove_file(self.dir.path().join("window.out")).expect("removing a copy");
        bytes
    }

    /// Keeps the model: what the guest must see after these acts.
    pub(crate) fn expect(&mut self, acts: &[Act]) {
        let cluster = 1 << self.half_word(20);
        let old = self.half_word(4) == 2 && self.word(8) != 0;
        let size = self.word(24);
        for &act in acts {
            let (at, len, byte) = match act {
                Write(at, len, byte) => (at, len, byte),
                Zero(at, len) | Unmap(at, len) => (at, len, 0),
                // Version 2 could only bring the backing file's bytes back.
                Discard(..) if old => continue,
                Discard(at, len) => {
                    let end = at + len;
                    let whole = if end == size { end } else { end - end % cluster };
                    let begin = at.next_multiple_of(cluster);
                    (begin, whole.saturating_sub(begin), 0)
                }
            };
            let window = self.start..self.start + self.bytes.len() as u64;
            let (from, to) = (at.max(window.start), (at + len).min(window.end));
            if from < to {
                self.bytes[index(from - self.start)..index(to - self.start)].fill(byte);
            }
        }
    }
}

/// A word of the image in a directory.
pub(crate) fn word(dir: &Dir, at: u64) -> u64 {
    let file = std::fs::File::open(dir.path().join(IMAGE)).expect("the image");
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).expect("a word");
    u64::from_be_bytes(bytes)
}

/// A backing file of a size in bytes and the given acts, as the only file of a new directory.
pub(crate) fn base(size: u64, acts: &[Act]) -> Dir {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "base.qcow2", &size.to_string()]);
    let commands: Vec<String> = acts.iter().map(|act| act.command()).collect();
    dir.io("base.qcow2", &commands);
    dir
}

/// The options that name [`base`]'s file.
pub(crate) const BACKED: &str = "backing_file=base.qcow2,backing_fmt=qcow2";
