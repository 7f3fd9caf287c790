//! Serving an image until the process is told to end.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::blk::Device;
use crate::blk::limit::Limiter;
use crate::cli::doors::{self, Doors, Inside};
use crate::cli::logging::Logging;
use crate::cli::socket::Origin;
use crate::cli::takeover::{self, Predecessor};
use crate::cli::{Arguments, ImageFormat, attach};
use crate::error::{Error, Kind, Result};
use crate::image::{self, Image};
use crate::qcow2::create::CreateOptions;
use crate::storage::files::{Files, Options as FileOptions};
use crate::storage::{Engine, FileSource, block_on, host};
use crate::sync::{Arc, AtomicBool};
use crate::vhost::control::Control;
use crate::vhost::export::Export;
use crate::vhost::handover::Connections;
use crate::vhost::listen::Listener;
use crate::vhost::successors::Successors;
use crate::vhost::{Beginning, Ended, serve_until};
use crate::worker::pool::{EngineSource, Pool};

/// Opens the image, serves it, and closes it after a signal, or gives it to a successor.
///
/// # Errors
/// One sentence that names the file, what was wrong, and what would help. What was refused before
/// anything was served has left no trace: no image, no socket.
pub fn run(arguments: &Arguments, logging: Logging) -> Result<()> {
    let Some(path) = &arguments.image else {
        return Err(Error::refused("arguments", "--image is needed"));
    };
    arguments.check()?;
    doors::check_paths(arguments)?;
    let predecessor = arguments.takeover.as_deref().map_or(Ok(None), takeover::ask)?;
    let files = Files::new(arguments.file_options());
    // What waits for space fails once the process is told to end.
    let told = Arc::clone(files.outage().over());
    let cannot_wait = |error| Error::io("cannot wait for signals", error);
    match predecessor {
        None => {
            // The sockets are looked at first, because making an image leaves a trace.
            let origin = arguments.listening.origin(arguments.socket.as_deref())?;
            let stop = signals(&told).map_err(cannot_wait)?;
            doors::check(arguments)?;
            let engine = host::engine(arguments.aio(), &files, 0)?;
            let limiter = Limiter::new();
            limiter.set(arguments.rate_limit.unwrap_or_default())?;
            let own = Own { arguments, path, files: &files, engine: &*engine, limiter, stop };
            own.begin(origin, logging)
        }
        Some(predecessor) => {
            let stop = signals(&told).map_err(cannot_wait)?;
            let engine = host::engine(arguments.aio(), &files, 0)?;
            let limiter = Limiter::new();
            let own = Own { arguments, path, files: &files, engine: &*engine, limiter, stop };
            own.succeed(predecessor, logging)
        }
    }
}

/// What there is for as long as the process lives.
struct Own<'a> {
    arguments: &'a Arguments,
    path: &'a Path,
    files: &'a Arc<Files>,
    engine: &'a dyn Engine,
    limiter: Arc<Limiter>,
    stop: UnixStream,
}

impl<'a> Own<'a> {
    /// Serves a disk that nobody serves yet.
    fn begin(&self, origin: Origin, logging: Logging) -> Result<()> {
        let image = self.open()?;
        let export = self.export(self.device(image));
        let socket = origin.path();
        let served = Doors::open(self.arguments, origin, &self.inside()).and_then(|doors| {
            logging.serving();
            let connections = match doors.entrance.connected()? {
                None => Connections::default(),
                Some(socket) => Connections::only(socket, &export)
                    .map_err(|error| Error::io("a connection", error))?,
            };
            self.announce(&export, socket);
            self.serve(doors, &export, connections)
        });
        self.finish(export, served)
    }

    /// Serves a disk that another daemon gives to us. What fails before it has let go leaves
    /// everything to it, the image too, to which nothing was written.
    fn succeed(&self, predecessor: Predecessor, logging: Logging) -> Result<()> {
        let nothing = Device::of_no_bytes(self.arguments.settings(self.path));
        predecessor.check(&nothing, self.arguments.read_only)?;
        // What takes time is made ready before a guest has to wait for it.
        let mut pool = self.pool(nothing);
        pool.warm(predecessor.workers())?;
        let export = Arc::new(Export::new(pool));
        let mut inherited = predecessor.take()?;
        self.files.adopt(inherited.files(self.path)?);
        let device = self.device(self.open()?);
        inherited.check(&device)?;
        if let Some(write_back) = inherited.write_back() {
            device.set_write_back(write_back);
        }
        export.replace_device(Arc::new(device))?;
        self.limiter.set(self.arguments.rate_limit.unwrap_or_else(|| inherited.rates()))?;
        let mut heritage = inherited.heritage()?;
        let mut doors = Doors::inherit(self.arguments, &mut heritage, &self.inside())?;
        let connections = inherited.connections(&export)?;
        inherited.confirm()?;
        // Files that were not needed are let go.
        self.files.adopt(Vec::new());
        doors.keep(self.arguments, heritage);
        logging.serving();
        self.announce(&export, doors.listener().and_then(Listener::path));
        let served = self.serve(doors, &export, connections);
        self.finish(export, served)
    }

    /// Closes the image, unless a successor has it.
    fn finish(&self, export: Arc<Export>, served: Result<Outcome>) -> Result<()> {
        if let Ok(Outcome::Given) = served {
            return Ok(());
        }
        let device = export.device();
        // The workers' threads end here; nothing is under way any more.
        drop(export);
        served.map(drop).and(self.close(device.image()))
    }

    fn inside(&self) -> Inside<'a> {
        Inside { image: self.path, files: self.files, engine: self.engine }
    }

    fn open(&self) -> Result<Image> {
        open(self.arguments, self.engine, self.files, self.path)
    }

    fn close(&self, image: &Image) -> Result<()> {
        let closed = block_on(self.engine, image.close(self.engine));
        closed.map_err(|error| error.within(self.path.display()))
    }

    fn device(&self, image: Image) -> Device {
        let device = Device::new(Arc::new(image), self.arguments.settings(self.path));
        device.with_limiter(Arc::clone(&self.limiter))
    }

    fn pool(&self, device: Device) -> Pool {
        let device = device.with_limiter(Arc::clone(&self.limiter));
        let engines = engines(self.arguments, self.files);
        let poll = Duration::from_micros(self.arguments.poll_us.into());
        Pool::new(Arc::new(device), engines, self.arguments.threads()).polling(poll)
    }

    fn export(&self, device: Device) -> Arc<Export> {
        Arc::new(Export::new(self.pool(device)))
    }

    /// Serves until the process is told to end or a successor has the disk.
    fn serve(
        &self,
        mut doors: Doors<'a>,
        export: &Arc<Export>,
        mut connections: Connections,
    ) -> Result<Outcome> {
        let terms = self.arguments.listening.terms();
        loop {
            let greeting = |workers| takeover::greeting(export, workers);
            let successors = doors.successors.as_ref();
            let successors = successors.map(|at| Successors::new(at, Box::new(greeting)));
            let successors = successors.transpose();
            let beginning = Beginning {
                connections,
                listener: doors::listener(&doors.entrance),
                successors: successors.map_err(|error| Error::io("--takeover", error))?,
            };
            let control = doors.control.as_mut().map(|socket| socket as &mut dyn Control);
            let ended = serve_until(beginning, export, &self.stop, &terms, control)?;
            let Ended::Successor(stream, mut halted) = ended else {
                tracing::info!("the service ends");
                return Ok(Outcome::Over);
            };
            let process = takeover::process(&stream);
            tracing::info!("process {} wants the disk", process.unwrap_or(0));
            match self.give(stream, &doors, export, &mut halted)? {
                None => {
                    tracing::info!("it has the disk");
                    doors.leave(process);
                    return Ok(Outcome::Given);
                }
                Some(error) => tracing::warn!("{error}: the disk is served as before"),
            }
            connections = halted;
        }
    }

    /// Gives the disk away, or says why that did not work; then it can be served as before.
    ///
    /// # Errors
    /// When it cannot be served as before either.
    fn give(
        &self,
        stream: UnixStream,
        doors: &Doors<'_>,
        export: &Export,
        connections: &mut Connections,
    ) -> Result<Option<Error>> {
        let waiting = self.files.outage().waiting();
        if waiting != 0 {
            let why = format!("{waiting} operations wait for space on the host");
            return Ok(Some(Error::refused("takeover", why)));
        }
        let device = export.device();
        // What is written now does not keep guests waiting when the image is closed.
        let flushed = block_on(self.engine, device.image().flush(self.engine));
        if let Err(error) = flushed {
            return Ok(Some(error.within(self.path.display())));
        }
        let begun = Instant::now();
        connections.halt();
        let drained = begun.elapsed();
        // No task of a worker has the image after this.
        export.replace_device(Arc::new(device.without_image()))?;
        let given = self.close(device.image()).and_then(|()| {
            let closed = begun.elapsed();
            tracing::debug!("rings were drained in {drained:?}, the image closed in {closed:?}");
            takeover::hand_over(stream, doors, self.files, &device, connections)
        });
        tracing::debug!("guests waited for {:?} so far", begun.elapsed());
        let Err(error) = given else { return Ok(None) };
        // Nobody else has written to the image; what could not be flushed is in memory still.
        export.replace_device(device)?;
        Ok(Some(error))
    }

    /// Says what is served, and how guests get at it.
    fn announce(&self, export: &Export, socket: Option<PathBuf>) {
        let socket = socket.map(|path| std::path::absolute(&path).unwrap_or(path));
        if let Some(socket) = &socket {
            // Nobody has to read it.
            let _ = std::io::stdout().write_all(attach::arguments(socket).as_bytes());
        }
        let device = export.device();
        let image = device.image();
        tracing::info!(
            "serving {} ({} bytes{}) on {}",
            self.path.display(),
            image.size(),
            if image.is_read_only() { ", read-only" } else { "" },
            socket.unwrap_or_else(|| "a descriptor".into()).display()
        );
    }
}

/// How a service has ended.
enum Outcome {
    /// The image is to be closed.
    Over,
    /// A successor has it.
    Given,
}

/// A stream that is readable after SIGTERM or SIGINT, which also set `told`. A second signal ends
/// the process at once: the operator has lost patience with a disk that does not answer.
fn signals(told: &Arc<AtomicBool>) -> std::io::Result<UnixStream> {
    let (readable, written) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(told))?;
        signal_hook::flag::register(signal, Arc::clone(told))?;
        signal_hook::low_level::pipe::register(signal, written.try_clone()?)?;
    }
    Ok(readable)
}

fn open(
    arguments: &Arguments,
    engine: &dyn Engine,
    files: &Arc<Files>,
    path: &Path,
) -> Result<Image> {
    let source: &dyn FileSource = &**files;
    let new = match arguments.create {
        Some(size) if !exists(path)? => Some(size),
        _ => None,
    };
    if let Some(size) = new {
        if arguments.format == Some(ImageFormat::Raw) {
            let why = "--create makes qcow2 images; for a raw one use truncate -s, or leave \
                       --format raw out";
            return Err(Error::refused(path.display().to_string(), why));
        }
        create(arguments, path, size)?;
    }
    let image = block_on(engine, Image::open(engine, source, path, &arguments.open_options()))?;
    if new.is_none() {
        image.expect_predecessor();
    }
    Ok(image)
}

/// Makes an image. The table of files goes with the end of this, and with it the file's locks,
/// which would keep us from opening the image too.
fn create(arguments: &Arguments, path: &Path, size: u64) -> Result<()> {
    // An image that there is no space for need not be begun.
    let files = Files::new(FileOptions { stall: false, ..arguments.file_options() });
    let engine = host::engine(arguments.aio(), &files, 0)?;
    let options = CreateOptions::new(size);
    let created = block_on(&*engine, image::create(&*engine, &*files, path, &options));
    if let Err(error) = &created {
        let theirs = matches!(error.kind(), Kind::Io(io) if io.kind() == ErrorKind::AlreadyExists);
        if !theirs {
            // The beginning of an image is worth nothing and would be in the way next time.
            let _ = std::fs::remove_file(path);
        }
    }
    created
}

fn exists(path: &Path) -> Result<bool> {
    // A link that leads nowhere is there too: making its target is not what was asked for.
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(path.display().to_string(), error)),
    }
}

/// How each worker gets to the files, and where it runs.
fn engines(arguments: &Arguments, files: &Arc<Files>) -> EngineSource {
    let (aio, cpus, files) = (arguments.aio(), arguments.cpus.clone(), Arc::clone(files));
    Arc::new(move |lane| {
        // This runs on the worker's thread before anything else does, so that threads which the
        // engine starts stay on the same processor. Lane 0 is not a worker's.
        if let Some(cpus) = &cpus {
            cpus.keep_to(lane.saturating_sub(1))?;
        }
        host::engine(aio, &files, lane)
    })
}

/// The one line that says why the program ends with an error.
pub fn complaint(error: &Error) -> String {
    format!("vhost-user-qcow2: {}", error.to_string().replace(['\n', '\r'], " "))
}
