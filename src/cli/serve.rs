//! Serving an image until the process is told to end.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::blk::Device;
use crate::blk::limit::Limiter;
use crate::cli::control::Socket;
use crate::cli::logging::Logging;
use crate::cli::socket::Origin;
use crate::cli::{Arguments, ImageFormat, attach};
use crate::error::{Error, Kind, Result};
use crate::image::{self, Image};
use crate::qcow2::create::CreateOptions;
use crate::storage::files::{Files, Options as FileOptions};
use crate::storage::{Engine, FileSource, block_on, host};
use crate::sync::{Arc, AtomicBool};
use crate::vhost::control::Control;
use crate::vhost::export::Export;
use crate::vhost::listen;
use crate::worker::pool::{EngineSource, Pool};

/// Opens the image, serves it, and closes it after a signal.
///
/// # Errors
/// One sentence that names the file, what was wrong, and what would help. What was refused before
/// anything was served has left no trace: no image, no socket.
pub fn run(arguments: &Arguments, logging: Logging) -> Result<()> {
    let Some(path) = &arguments.image else {
        return Err(Error::refused("arguments", "--image is needed"));
    };
    arguments.check()?;
    // The socket is looked at first, because making an image leaves a trace.
    let origin = arguments.listening.origin(arguments.socket.as_deref())?;
    let files = Files::new(arguments.file_options());
    // What waits for space fails once the process is told to end.
    let told = Arc::clone(files.outage().over());
    let stop = signals(&told).map_err(|error| Error::io("cannot wait for signals", error))?;
    if let Some(control) = &arguments.control {
        check_control(arguments.socket.as_deref(), control)?;
    }
    let engine = host::engine(arguments.aio(), &files, 0)?;
    let image = Arc::new(open(arguments, &*engine, &files, path)?);
    let limiter = Limiter::new();
    limiter.set(arguments.rate_limit.unwrap_or_default())?;
    let device = Device::new(image, arguments.settings(path)).with_limiter(limiter);
    let pool = Pool::new(Arc::new(device), engines(arguments, &files), arguments.threads());
    let export = Arc::new(Export::new(pool));
    let own = Own { path, files: &files, engine: &*engine, export: &export };
    let served = serve(arguments, logging, origin, &own, &stop);
    let device = export.device();
    // The workers' threads end here; nothing is under way any more.
    drop(export);
    let closed = block_on(&*engine, device.image().close(&*engine));
    served.and(closed.map_err(|error| error.within(path.display())))
}

/// Refuses a control socket that could not be made, without changing anything.
fn check_control(socket: Option<&Path>, control: &Path) -> Result<()> {
    if Some(control) == socket {
        let why = "--socket and --control are two sockets; give each a path of its own";
        return Err(Error::refused(control.display().to_string(), why));
    }
    listen::check(control).map(drop)
}

/// The image, and what serves it.
struct Own<'a> {
    path: &'a Path,
    files: &'a Arc<Files>,
    engine: &'a dyn Engine,
    export: &'a Arc<Export>,
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
    if let Some(size) = arguments.create
        && !exists(path)?
    {
        if arguments.format == Some(ImageFormat::Raw) {
            let why = "--create makes qcow2 images; for a raw one use truncate -s, or leave \
                       --format raw out";
            return Err(Error::refused(path.display().to_string(), why));
        }
        create(arguments, path, size)?;
    }
    let image = block_on(engine, Image::open(engine, source, path, &arguments.open_options()))?;
    image.expect_predecessor();
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

fn serve(
    arguments: &Arguments,
    logging: Logging,
    origin: Origin,
    own: &Own<'_>,
    stop: &UnixStream,
) -> Result<()> {
    let socket = origin.path();
    let entrance = origin.open()?;
    let control = match &arguments.control {
        None => None,
        Some(control) => {
            let socket = Socket::bind(control, own.path.to_owned(), own.files, own.engine)?;
            Some(Box::new(socket) as Box<dyn Control>)
        }
    };
    let announced = arguments.listening.announce()?;
    logging.serving();
    let socket = socket.map(|path| std::path::absolute(&path).unwrap_or(path));
    if let Some(socket) = &socket {
        // Nobody has to read it.
        let _ = std::io::stdout().write_all(attach::arguments(socket).as_bytes());
    }
    let device = own.export.device();
    let image = device.image();
    tracing::info!(
        "serving {} ({} bytes{}) on {}",
        own.path.display(),
        image.size(),
        if image.is_read_only() { ", read-only" } else { "" },
        socket.unwrap_or_else(|| "a descriptor".into()).display()
    );
    // The image can be changed only while nobody else has it.
    drop(device);
    let terms = arguments.listening.terms();
    crate::vhost::serve_at(&entrance, own.export, stop, &terms, control)?;
    tracing::info!("the service ends");
    drop(announced);
    Ok(())
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
