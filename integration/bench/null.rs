//! What the ring costs: our server without a disk, whose requests are all answered at once.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use vhost_user_qcow2::blk::{Device, Settings};
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::image::Image;
use vhost_user_qcow2::raw::Raw;
use vhost_user_qcow2::storage::{Engine, FileId, Lane, Limits, Op, Pending, Purpose, Storage};
use vhost_user_qcow2::vhost;
use vhost_user_qcow2::vhost::export::Export;
use vhost_user_qcow2::vhost::listen::Listener;
use vhost_user_qcow2::worker::pool::{EngineSource, Pool};
use vhost_user_qcow2::worker::spin::WINDOW_US;
use vmm_sys_util::eventfd::EventFd;

use crate::client::Client;
use crate::plan::Load;

/// A disk that has done everything already.
struct Null(usize);

impl Storage for Null {
    fn limits(&self, _file: FileId) -> Limits {
        Limits::default()
    }

    fn length(&self, _file: FileId) -> io::Result<u64> {
        Ok(0)
    }

    fn submit(&self, _file: FileId, _why: Purpose, _op: Op) -> Pending {
        Pending::ready(Ok(()))
    }

    fn lane(&self) -> Lane {
        Lane(self.0)
    }
}

impl Engine for Null {
    fn reap(&self) -> usize {
        0
    }

    fn submit_all(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_busy(&self) -> bool {
        false
    }

    fn pollable(&self) -> RawFd {
        -1
    }

    fn wait(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Requests a second of a server in this process over a disk that does nothing.
pub(crate) fn requests_per_second(load: Load, depth: usize, time: Duration) -> io::Result<f64> {
    let directory = tempfile::Builder::new().prefix("vub-null-").tempdir()?;
    let socket = directory.path().join("socket");
    let stop = EventFd::new(0)?;
    let listener = Listener::bind(&socket).map_err(io::Error::other)?;
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&listener, load.span, &stop));
        let outcome =
            Client::connect(&socket, 1, depth, load.block as usize).and_then(|mut client| {
                client.run(vec![load.plan(1, depth, time / 4)])?;
                client.run(vec![load.plan(2, depth, time)])
            });
        stop.write(1)?;
        serving.join().expect("the server's thread").map_err(io::Error::other)?;
        let outcome = outcome?;
        Ok(outcome.requests() as f64 / outcome.elapsed.as_secs_f64())
    })
}

fn serve(listener: &Listener, size: u64, stop: &EventFd) -> Result<()> {
    let image = Arc::new(Image::from_raw(Raw::new(FileId(0), size), false));
    let device = Arc::new(Device::new(image, Settings::default()));
    let engines: EngineSource = Arc::new(|lane| Ok(Box::new(Null(lane)) as Box<dyn Engine>));
    let pool = Pool::new(device, engines, 1).polling(Duration::from_micros(WINDOW_US.into()));
    let export = Arc::new(Export::new(pool));
    vhost::serve(listener, &export, stop)
}
