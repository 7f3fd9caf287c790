//! The daemon's session and workers in threads of the test, with a disk that can be held up.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::image::{self, Format, Image, OpenOptions};
use vhost_user_qcow2::qcow2::create::CreateOptions;
use vhost_user_qcow2::storage::files::{Files, Options as FileOptions};
use vhost_user_qcow2::storage::host::{Aio, engine};
use vhost_user_qcow2::storage::{
    Engine, FileId, Lane, Limits, Op, Pending, Purpose, Storage, block_on,
};
use vhost_user_qcow2::vhost;
use vhost_user_qcow2::vhost::control::{Control, FrontEnds};
use vhost_user_qcow2::vhost::export::Export;
use vhost_user_qcow2::vhost::listen::{Entrance, Listener};
use vhost_user_qcow2::vhost::terms::Terms;
use vhost_user_qcow2::worker::pool::{EngineSource, Pool};

use super::front_end::{FrontEnd, features, request as R};
use super::guest::Guest;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What can be chosen.
pub(crate) struct Options {
    pub(crate) queues: u16,
    pub(crate) threads: usize,
    /// A new qcow2 image instead of a raw one.
    pub(crate) qcow2: bool,
    /// Around the page cache, where the file system can.
    pub(crate) direct: bool,
    pub(crate) terms: Terms,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 64, threads: 2, direct: false, qcow2: false, terms: Terms::default() }
    }
}

/// The switch that keeps every answer of the disk back, and what was seen on the way.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    held: AtomicU64,
    syncs: AtomicU64,
}

/// An engine whose answers can be kept back.
struct Gated {
    inner: Box<dyn Engine>,
    gate: Arc<Gate>,
}

impl Storage for Gated {
    fn limits(&self, file: FileId) -> Limits {
        self.inner.limits(file)
    }

    fn length(&self, file: FileId) -> std::io::Result<u64> {
        self.inner.length(file)
    }

    fn submit(&self, file: FileId, why: Purpose, op: Op) -> Pending {
        if matches!(op, Op::Sync) {
            self.gate.syncs.fetch_add(1, Ordering::SeqCst);
        }
        if self.gate.closed.load(Ordering::SeqCst) {
            self.gate.held.fetch_add(1, Ordering::SeqCst);
        }
        self.inner.submit(file, why, op)
    }

    fn lane(&self) -> Lane {
        self.inner.lane()
    }
}

impl Engine for Gated {
    fn reap(&self) -> usize {
        if self.gate.closed.load(Ordering::SeqCst) {
            // Without an answer the worker looks again at once; that is only a test's waste.
            thread::sleep(Duration::from_micros(200));
            return 0;
        }
        self.inner.reap()
    }

    fn submit_all(&self) -> std::io::Result<()> {
        self.inner.submit_all()
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy()
    }

    fn pollable(&self) -> RawFd {
        self.inner.pollable()
    }

    fn wait(&self) -> std::io::Result<()> {
        self.inner.wait()
    }
}

/// The daemon's session and workers over a raw image.
pub(crate) struct Server {
    directory: tempfile::TempDir,
    gate: Arc<Gate>,
    stop: UnixStream,
    /// Sizes go in, and answers come out.
    sizes: UnixStream,
    thread: JoinHandle<()>,
}

impl Server {
    /// The disk's size in bytes.
    pub(crate) const DISK: u64 = 2 << 20;

    /// Sector `n` of the disk holds the byte `n`.
    pub(crate) fn start(options: Options) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.raw");
        let content: Vec<u8> = (0..Self::DISK).map(|at| (at / 512) as u8).collect();
        std::fs::write(&path, content).expect("write the image");
        let (stop, stopped) = UnixStream::pair().expect("a pair");
        let (sizes, wanted) = UnixStream::pair().expect("a pair");
        let gate = Arc::new(Gate::default());
        let listener = Listener::bind(&directory.path().join("socket")).expect("listen");
        let shared = Arc::clone(&gate);
        let serve = move || serve(options, path, listener, shared, (stopped, wanted));
        Self { directory, gate, stop, sizes, thread: thread::spawn(serve) }
    }

    pub(crate) fn connect(&self) -> FrontEnd {
        let socket = UnixStream::connect(self.directory.path().join("socket")).expect("connect");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        FrontEnd { socket }
    }

    /// A front-end with a guest whose queues all run.
    pub(crate) fn attached(&self, queues: usize) -> (FrontEnd, Guest) {
        let (mut front_end, guest) = (self.connect(), Guest::new(queues));
        front_end.negotiate();
        front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
        front_end.add_memory(&guest);
        (0..queues).for_each(|queue| front_end.set_up(&guest, queue as u32));
        (front_end, guest)
    }

    /// Gives the disk another size in bytes while it is served.
    pub(crate) fn resize(&self, size: u64) {
        self.ask_for_size(size);
        self.wait_for_size(true);
    }

    pub(crate) fn ask_for_size(&self, size: u64) {
        (&self.sizes).write_all(&size.to_ne_bytes()).expect("ask for a size");
    }

    /// Waits until a size was taken into use, or refused.
    pub(crate) fn wait_for_size(&self, taken: bool) {
        let mut answer = [0];
        self.sizes.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        (&self.sizes).read_exact(&mut answer).expect("an answer");
        assert_eq!(answer == [1], taken);
    }

    /// Keeps answers of the disk back, or lets them go.
    pub(crate) fn hold(&self, hold: bool) {
        self.gate.held.store(0, Ordering::SeqCst);
        self.gate.closed.store(hold, Ordering::SeqCst);
    }

    /// Waits until an operation of the disk is kept back.
    pub(crate) fn wait_until_held(&self) {
        eventually("an operation", || self.gate.held.load(Ordering::SeqCst) > 0);
    }

    /// How often the disk was synced.
    pub(crate) fn syncs(&self) -> u64 {
        self.gate.syncs.load(Ordering::SeqCst)
    }

    /// What the disk holds.
    pub(crate) fn disk(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("disk.raw")).expect("read the image")
    }

    /// Ends the service as a signal does; gives what the disk holds then.
    pub(crate) fn end(self) -> Vec<u8> {
        drop(self.stop);
        self.thread.join().expect("the service ends");
        let left = self.directory.path().join("socket");
        assert!(!left.exists(), "the socket is removed");
        std::fs::read(self.directory.path().join("disk.raw")).expect("read the image")
    }
}

/// Resizes the disk as an operator does.
struct Operator<'a> {
    socket: UnixStream,
    engine: &'a dyn Engine,
}

impl AsRawFd for Operator<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Control for Operator<'_> {
    fn serve(&mut self, front_ends: &mut FrontEnds<'_>) {
        let mut size = [0; 8];
        if self.socket.read_exact(&mut size).is_err() {
            // The test ends, and the server is told so in a moment.
            return thread::sleep(Duration::from_millis(1));
        }
        let (engine, size) = (self.engine, u64::from_ne_bytes(size));
        let resize = |image: &mut Image| block_on(engine, image.resize(engine, size, true));
        let done = front_ends.change_image(resize).and_then(|done| done);
        self.socket.write_all(&[u8::from(done.is_ok())]).expect("answer");
    }
}

fn serve(
    options: Options,
    path: PathBuf,
    listener: Listener,
    gate: Arc<Gate>,
    (stopped, sizes): (UnixStream, UnixStream),
) {
    // Answers that are there at once could not be held.
    let choice = FileOptions { direct: options.direct, prompt: false, ..FileOptions::default() };
    let files = Files::new(choice);
    let control = engine(Aio::Threads, &files, 0).expect("an engine");
    let format = if options.qcow2 { Format::Qcow2 } else { Format::Raw };
    let path = if options.qcow2 { path.with_extension("qcow2") } else { path };
    if options.qcow2 {
        let layout = CreateOptions::new(Server::DISK);
        let files = Files::new(choice);
        let control = engine(Aio::Threads, &files, 0).expect("an engine");
        let made = image::create(&*control, &*files, &path, &layout);
        block_on(&*control, made).expect("a new image");
    }
    let open = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let image = block_on(&*control, Image::open(&*control, &*files, &path, &open));
    let settings = Settings { queues: options.queues, ..Settings::default() };
    let device = Arc::new(Device::new(Arc::new(image.expect("the image")), settings));
    let engines: EngineSource = Arc::new(move |lane| {
        let inner = engine(Aio::Threads, &files, lane)?;
        Ok(Box::new(Gated { inner, gate: Arc::clone(&gate) }))
    });
    let export = Arc::new(Export::new(Pool::new(device, engines, options.threads)));
    let operator = Operator { socket: sizes, engine: &*control };
    let (entrance, terms) = (Entrance::Listening(listener), options.terms);
    let served = vhost::serve_at(&entrance, &export, &stopped, &terms, Some(Box::new(operator)));
    served.expect("the service");
    drop(entrance);
    let device = export.device();
    drop(export);
    block_on(&*control, device.image().close(&*control)).expect("closing the image");
}

/// Waits until something is true.
pub(crate) fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come");
        thread::sleep(Duration::from_micros(200));
    }
}
