//! Commit: what an overlay holds goes into a file below it.

use std::path::Path;

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::gate::{Gate, OpenOptions};
use crate::image::status::{BlockMap, Status};
use crate::image::watch::{Outcome, Watch};
use crate::storage::{Buf, FileSource, Storage};

/// Bytes are copied in pieces of at most this many.
const PIECE: u64 = 1 << 20;

/// What is committed, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Commit<'a> {
    /// The file of the chain that takes everything above it; without it the image's own backing
    /// file. Layers between the two are worth nothing afterwards.
    pub base: Option<&'a Path>,
    /// Leave what the image holds in it. It is not emptied either when layers lie between.
    pub keep: bool,
}

/// Writes what the image at `path` holds, and what layers between hold, into a file below it, which
/// grows if it is smaller; then empties the image, unless `watch` says no before.
///
/// At any time, also after a power cut, the image reads as before: it hides what changes below, and
/// is emptied only after that is durable (R22 in `ORDERING.md`). A commit that was stopped can be
/// done again.
///
/// # Errors
/// As [`Image::open`], [`Image::resize`] for a file that must grow, and [`Image::write`].
pub async fn commit(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &OpenOptions,
    how: Commit<'_>,
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    let name = path.display().to_string();
    if options.read_only {
        return Err(Error::refused(name, "it was opened read-only"));
    }
    let gate = Gate::new(st, source, path, options)?;
    let wanted = how.base.map(|base| source.canonical(base)).transpose()?;
    let keep = how.keep || how.base.is_some();
    let mut found = None;
    let mut writes = |depth: usize, path: &Path| {
        let is_base = match &wanted {
            None => depth == 1,
            Some(wanted) => depth > 0 && path == wanted,
        };
        if is_base && found.is_none() {
            found = Some(depth);
            return true;
        }
        depth == 0 && !keep
    };
    let mut layers = gate.open_layers(path, &mut writes).await?;
    let Some(depth) = found else {
        let why = match how.base {
            None => "it has no backing file that it could be committed into".to_owned(),
            Some(base) => format!("{} is not in its backing chain", base.display()),
        };
        return Err(Error::refused(name, why));
    };
    let below = layers.split_off(depth);
    let mut base = Image::from_layers(below, false);
    (base.inflated, base.name) = (gate.inflated(), format!("a layer below {name}").into());
    let mut upper = Image::from_layers(layers, keep);
    (upper.inflated, upper.name) = (gate.inflated(), name.into());
    let within = |error: Error| error.within(path.display());
    if base.size() < upper.size() {
        base.resize(st, upper.size(), false).await.map_err(within)?;
    }
    let outcome = copy_up(st, &upper, &base, watch).await.map_err(within)?;
    base.close(st).await.map_err(within)?;
    if !keep && outcome == Outcome::Complete {
        upper.make_empty(st).await.map_err(within)?;
    }
    Ok(outcome)
}

/// Copies all that the layers of `upper` hold into `base`, which is at least as long.
async fn copy_up(
    st: &dyn Storage,
    upper: &Image,
    base: &Image,
    watch: &mut Watch<'_>,
) -> Result<Outcome> {
    let map = BlockMap::new(st, upper).await?;
    let (mut at, size) = (0, upper.size());
    let mut goes_on = watch(0, size);
    while goes_on && at < size {
        let here = GuestOffset(at);
        let status = map.status(st, here, size - at).await?;
        let mut len = status.len;
        if status.present && !status.zero {
            len = len.min(PIECE);
            let buf = Buf::zeroed(usize::try_from(len).expect("a small piece"));
            upper.read(st, here, buf.clone()).await?;
            base.write(st, here, buf).await?;
        } else if status.present || ends_early(upper, &status) {
            base.write_zeroes(st, here, len, true).await?;
        }
        at += len;
        goes_on = watch(at, size);
    }
    base.flush(st).await?;
    Ok(if at < size { Outcome::Stopped } else { Outcome::Complete })
}

/// Whether bytes that no layer holds are zeros because a layer between is too short to let the one
/// below show through.
fn ends_early(upper: &Image, status: &Status) -> bool {
    status.depth + 1 < upper.chain.0.len()
}

impl Image {
    /// Drops everything that the top layer holds, so that the one below shows through everywhere;
    /// nothing else uses the image.
    ///
    /// # Errors
    /// As [`crate::qcow2::Qcow2::make_empty`]; `Refused` without a layer of tables.
    pub(crate) async fn make_empty(&mut self, st: &dyn Storage) -> Result<()> {
        match self.chain.0.first_mut() {
            Some(Layer::Qcow2(image)) => image.make_empty(st).await,
            _ => Err(Error::refused("disk", "a raw image cannot be empty")),
        }
    }
}
