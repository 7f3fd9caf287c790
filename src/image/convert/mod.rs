//! Copying disks into an image: only what holds something is read, and many requests are under way
//! at once.
//!
//! The caller's thread looks up what there is to do ([`scan`]) and tells how far it is; worker
//! threads, each with an engine of its own, take chunk after chunk ([`work`]), read it, look for
//! zeros in it, compress it if need be, and write it ([`copy`]). A chunk is small enough to stay in
//! a processor's cache between its read and its write. A [`stream`](fn@stream) is written from
//! front to back, to a pipe; [`packed`] is how that is compressed.

mod bitmaps;
mod copy;
mod packed;
mod scan;
mod source;
mod stream;
#[cfg(test)]
mod tests;
mod turn;
mod work;

use crate::bytes::round_up;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::{Chain, Layer};
use crate::image::convert::copy::{Copier, Zeros};
use crate::image::convert::scan::{Cut, Scanner};
use crate::image::convert::source::{Disks, Map, Scope};
use crate::image::convert::work::Board;
use crate::storage::{Engine, Storage, block_on};

pub use crate::image::watch::Outcome;
pub use bitmaps::{SourceBitmaps, check_bitmaps, check_fit, copy_bitmaps, source_bitmaps};
pub use stream::{Output, stream};

/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

/// How disks are copied.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How many chunks are worked on at once; at least one.
    pub parallel: usize,
    /// The most threads; at least one.
    pub threads: usize,
    /// Places in the target may come in any order.
    pub out_of_order: bool,
    /// Clusters are compressed.
    pub compress: bool,
    /// Runs of so many bytes of zeros, a multiple of 512 and aligned to it, are not written. With 0
    /// everything is: what the source has not allocated too.
    pub sparse: u64,
    /// The target reads as zeros, but for its backing file.
    pub target_is_zero: bool,
    /// The target has a backing file that holds what the source's backing file does.
    pub keep_backing: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            parallel: 8,
            threads: 1,
            out_of_order: false,
            compress: false,
            sparse: 4096,
            target_is_zero: false,
            keep_backing: false,
        }
    }
}

/// Makes the engine of the worker of that lane, on the worker's own thread; lane 0 is the caller's.
pub type MakeEngine<'a> = dyn Fn(usize) -> Result<Box<dyn Engine>> + Sync + 'a;

/// The size in bytes of disks one behind the other.
///
/// # Errors
/// `Refused` when it is larger than any disk can be.
pub fn size(sources: &[Image]) -> Result<u64> {
    let size = Disks(sources).size();
    size.ok_or_else(|| Error::refused("copying", "all disks together are too large"))
}

/// Copies `sources`, one behind the other, to the beginning of `target`, and makes that durable as
/// [`Image::close`] does, also when it fails or is stopped. `engine` is the caller's own. Every few
/// milliseconds `watch` is told how many bytes of the disk are done, and says whether to go on.
///
/// # Errors
/// `Refused` when the target is too small or cannot hold what is asked for; when a source cannot be
/// read or the target not be written.
pub fn convert(
    sources: &[Image],
    target: &Image,
    options: &Options,
    engine: &dyn Engine,
    make: &MakeEngine<'_>,
    watch: &mut dyn FnMut(u64) -> bool,
) -> Result<Outcome> {
    let size = size(sources)?;
    if size > target.size() {
        let why = format!("the target's {} bytes are less than {size} bytes", target.size());
        return Err(Error::refused("copying", why));
    }
    let unit = if options.compress { target.discard_granularity() } else { 1 };
    let chunk = round_up(CHUNK, unit);
    let copier = Copier::new(Disks(sources), target, options, chunk, engine)?;
    let scope = match options {
        Options { keep_backing: true, .. } => Scope::Top,
        Options { sparse: 0, .. } => Scope::All,
        _ => Scope::Flat,
    };
    let zeros = copier.zeros() != Zeros::Skipped;
    let cut = Cut { chunk, unit, zeros };
    let done = block_on(engine, Map::new(engine, Disks(sources), scope)).and_then(|map| {
        let mut scanner = Scanner::new(map, cut);
        let mut next = || block_on(engine, scanner.next(engine));
        Board::new(options).run(&copier, make, &mut next, watch)
    });
    let closed = block_on(engine, target.close(engine));
    let outcome = done?;
    closed.map(|()| outcome)
}

impl Image {
    /// Shows the disk as it was, in content and size, when the snapshot was taken whose id is
    /// `key`, or whose name if no id is. The image is open for reading only.
    ///
    /// # Errors
    /// `Refused` or `Unsupported` when it is not, or there is no such snapshot; when its tables
    /// cannot be read.
    pub async fn show_snapshot(&mut self, st: &dyn Storage, key: &str) -> Result<()> {
        let name = self.name.clone();
        let refuse = |why: &str| Err(Error::refused(&*name, why));
        if !self.read_only {
            return refuse("a snapshot is shown of an image that is opened read-only");
        }
        let mut layers = std::mem::replace(&mut self.chain, Chain::new(Vec::new())).0;
        let shown = match layers.first_mut() {
            Some(Layer::Qcow2(image)) => image.show_snapshot(st, key).await,
            _ => refuse("only qcow2 images have internal snapshots"),
        };
        self.chain = Chain::new(layers);
        self.size = self.chain.top().size();
        shown.map_err(|error| error.within(&name))
    }
}
