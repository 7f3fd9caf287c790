//! The guest's disk: a chain of layers, the top one written to.
//!
//! Reads walk the chain by [`chain`](self) and move each run of bytes straight into the guest's
//! memory. Writes go over the old bytes where the top layer owns them; else the top layer finds
//! room, the bytes around the guest's are read through the same read path, everything is written
//! in one go, and the mapping is changed last.

pub mod amend;
pub mod blocking;
mod chain;
pub mod commit;
pub mod compare;
mod compress;
pub mod convert;
pub mod dd;
pub mod describe;
mod erase;
mod explicit;
pub mod gate;
mod hints;
pub mod inspect;
pub mod make;
pub mod offline;
mod outlive;
pub mod policy;
pub mod rebase;
pub mod status;
mod transfer;
pub mod watch;

use std::fmt;

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::chain::{Chain, Layer};
use crate::image::transfer::Batch;
use crate::qcow2::{Epochs, Inflated, InflatedBytes, Inflaters, Stay, WritePlan, WriteTarget};
use crate::raw::Raw;
use crate::storage::{Buf, Op, Purpose, Storage};
use crate::sync::Arc;

pub use explicit::LayerFiles;
pub use gate::{Format, OpenOptions, create};
pub use offline::{apply_snapshot, create_snapshot, delete_snapshot, resize, snapshots};
pub use policy::Policy;

/// One guest's disk. Shared by all workers; each brings its own [`Storage`].
pub struct Image {
    /// What it is called in errors.
    name: Box<str>,
    chain: Chain,
    size: u64,
    read_only: bool,
    /// Whether guests' writes of whole new clusters are compressed.
    compress: bool,
    inflated: Arc<Inflated>,
    inflaters: Inflaters,
    policy: Policy,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, read_only) = (self.size, self.read_only);
        write!(f, "Image({size} bytes, {} layers, read only: {read_only})", self.chain.0.len())
    }
}

impl Image {
    /// A disk that is one raw file.
    pub fn from_raw(top: Raw, read_only: bool) -> Self {
        Self::from_layers(vec![Layer::Raw(top)], read_only)
    }

    fn from_layers(layers: Vec<Layer>, read_only: bool) -> Self {
        let size = layers[0].size();
        let inflated = Arc::new(Inflated::new(InflatedBytes(0)));
        let policy = Policy::default();
        let (name, chain) = ("disk".into(), Chain::new(layers));
        let inflaters = Inflaters::new(0);
        Self { name, chain, size, read_only, compress: false, inflated, inflaters, policy }
    }

    /// The same disk with other choices of the operator.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// What the operator chose.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The disk's size in bytes, a multiple of 512: a last sector that the image only holds in
    /// part is filled up with zeros.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How many layers there are, the top one included.
    pub fn depth(&self) -> usize {
        self.chain.0.len()
    }

    /// The unit in bytes in which the host's space is given back: discards smaller than that have
    /// no effect.
    pub fn discard_granularity(&self) -> u64 {
        match self.chain.top() {
            Layer::Raw(_) => 4096,
            Layer::Qcow2(image) => image.cluster_size(),
        }
    }

    /// Who may look at clusters of the top layer; a raw file frees none.
    fn epochs(&self) -> Option<&Epochs> {
        match self.chain.top() {
            Layer::Raw(_) => None,
            Layer::Qcow2(image) => Some(image.epochs()),
        }
    }

    fn check_range(&self, at: GuestOffset, len: u64) -> Result<()> {
        if at.0.checked_add(len).is_none_or(|end| end > self.size) {
            let why = format!("{len} bytes at {at} lie beyond the disk's {} bytes", self.size);
            return Err(Error::refused("disk", why));
        }
        Ok(())
    }

    fn check_write(&self, at: GuestOffset, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::refused("disk", "it was opened read-only"));
        }
        self.check_range(at, len)
    }

    /// Fills `buf` with the guest's bytes from `at` on.
    ///
    /// # Errors
    /// When the range lies beyond the disk, the host cannot read, or the image contradicts itself.
    pub async fn read(&self, st: &dyn Storage, at: GuestOffset, buf: Buf) -> Result<()> {
        self.read_into(st, at, &buf).await
    }

    /// As [`Image::read`] for a buffer that somebody else holds until this has ended.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub async fn read_into(&self, st: &dyn Storage, at: GuestOffset, buf: &Buf) -> Result<()> {
        self.check_range(at, buf.len() as u64)?;
        let _stay = self.epochs().map(|epochs| epochs.enter(st.lane()));
        let result = self.read_chain(st, Purpose::GuestRead, at, buf).await;
        self.answer(st, result).await
    }

    /// Passes a result on; an image that was found to contradict itself is marked on the way.
    async fn answer<T>(&self, st: &dyn Storage, result: Result<T>) -> Result<T> {
        if let (Err(error), Layer::Qcow2(image), false) =
            (&result, self.chain.top(), self.read_only)
        {
            Box::pin(image.mark_corrupt(st, error)).await;
        }
        result
    }

    /// Writes `buf` at `at`. Durable after the next flush.
    ///
    /// # Errors
    /// When the range lies beyond the disk, the disk is read-only, the host cannot write, or the
    /// image contradicts itself or was poisoned before.
    pub async fn write(&self, st: &dyn Storage, at: GuestOffset, buf: Buf) -> Result<()> {
        self.write_from(st, at, &buf).await
    }

    /// As [`Image::write`] for a buffer that somebody else holds until this has ended.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn write_from(&self, st: &dyn Storage, at: GuestOffset, buf: &Buf) -> Result<()> {
        self.check_write(at, buf.len() as u64)?;
        match self.policy.looks_for_zeros() {
            None => self.write_mode(st, at, buf, self.compress).await,
            // In a box, so that those who do not look have no use for its memory.
            Some(unmap) => Box::pin(self.write_sparse(st, at, buf, unmap)).await,
        }
    }

    /// Writes a range that was checked, whatever the bytes are; `compress` says what becomes of
    /// whole new clusters.
    async fn write_mode(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: &Buf,
        compress: bool,
    ) -> Result<()> {
        let image = match self.chain.top() {
            Layer::Raw(raw) => {
                let op = Op::Write { at: raw.host(at), buf: buf.clone() };
                let done = st.submit(raw.file(), Purpose::GuestWrite, op).await;
                return done.map_err(|source| Error::io("writing the image", source));
            }
            Layer::Qcow2(image) => image,
        };
        if !image.note_change(at.0, buf.len() as u64) {
            Box::pin(image.start_change(st, at.0, buf.len() as u64)).await?;
        }
        let mut stay = Some(image.epochs().enter(st.lane()));
        let mut batch = Batch::default();
        let result = match self.write_known(st, at, buf, &mut batch) {
            Ok(done) if done == buf.len() => Ok(()),
            // In a box, so that those who write in place have no use for its memory.
            Ok(done) => {
                let rest = self.write_parts(st, at, (buf, done), compress, &mut batch, &mut stay);
                Box::pin(rest).await
            }
            Err(error) => Err(error),
        };
        let written = batch.finish().await;
        image.mark_dirty(image.data_file());
        self.answer(st, result.and(written)).await
    }

    /// Starts writing as far as that goes in place and the tables are in memory; returns how far
    /// that is.
    fn write_known(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: &Buf,
        batch: &mut Batch,
    ) -> Result<usize> {
        let Layer::Qcow2(image) = self.chain.top() else { unreachable!("checked by the caller") };
        let mut done = 0;
        while done < buf.len() {
            let left = (buf.len() - done) as u64;
            let target = image.lookup_write(at + done as u64, left)?;
            let Some(WriteTarget::InPlace { file, at, len }) = target else { break };
            image.check_overlap(file, at, len)?;
            let part = part(buf, done, len);
            done += part.len();
            batch.add(st.submit(file, Purpose::GuestWrite, Op::Write { at, buf: part }));
        }
        Ok(done)
    }

    /// Starts in-place writes into `batch`; allocating ones are complete when this returns. The
    /// `stay` in an epoch is left for them as long as no in-place write is under way: claims keep
    /// everybody away from the clusters, the old and the new ones, and if the host has no space
    /// then what the guest discards may become free meanwhile.
    async fn write_parts<'i>(
        &'i self,
        st: &dyn Storage,
        at: GuestOffset,
        (buf, mut done): (&Buf, usize),
        compress: bool,
        batch: &mut Batch,
        stay: &mut Option<Stay<'i>>,
    ) -> Result<()> {
        let Layer::Qcow2(image) = self.chain.top() else { unreachable!("checked by the caller") };
        while done < buf.len() {
            let here = at + done as u64;
            let left = (buf.len() - done) as u64;
            let target = match image.lookup_write(here, left)? {
                Some(target) => target,
                None => image.map_write(st, here, left).await?,
            };
            match target {
                WriteTarget::InPlace { file, at, len } => {
                    image.check_overlap(file, at, len)?;
                    let part = part(buf, done, len);
                    done += part.len();
                    batch.add(st.submit(file, Purpose::GuestWrite, Op::Write { at, buf: part }));
                }
                WriteTarget::Allocate => {
                    let cluster = image.cluster_size();
                    let most = if compress { cluster - here.within(cluster) } else { left };
                    let left = left.min(most);
                    if compress && self.compress_cluster(st, here, &part(buf, done, left)).await? {
                        done += part(buf, done, left).len();
                        continue;
                    }
                    let left_epoch = batch.is_empty() && stay.take().is_some();
                    if let Some(plan) = image.prepare_write(st, here, left).await? {
                        let len = left.min(plan.start().0 + plan.len() - here.0);
                        let part = part(buf, done, len);
                        done += part.len();
                        self.write_new(st, plan, here, part).await?;
                    }
                    if left_epoch {
                        *stay = Some(image.epochs().enter(st.lane()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes whole new clusters: the guest's bytes and, around them, what was there before.
    async fn write_new(
        &self,
        st: &dyn Storage,
        plan: WritePlan<'_>,
        at: GuestOffset,
        buf: Buf,
    ) -> Result<()> {
        let Layer::Qcow2(image) = self.chain.top() else { unreachable!("checked by the caller") };
        let head = at - plan.start();
        let tail_at = at + buf.len() as u64;
        let tail = plan.start().0 + plan.len() - tail_at.0;
        let before = self.old_bytes(st, plan.start(), head, plan.is_fresh()).await?;
        let after = self.old_bytes(st, tail_at, tail, plan.is_fresh()).await?;
        let skip = if before.is_some() { 0 } else { head };
        let whole = Buf::concat([before, Some(buf), after].into_iter().flatten());
        let (file, to) = (plan.target(), plan.at() + skip);
        image.check_overlap(file, to, whole.len() as u64)?;
        let done = st.submit(file, Purpose::GuestWrite, Op::Write { at: to, buf: whole }).await;
        image.mark_dirty(file);
        done.map_err(|source| Error::io("writing new clusters", source))?;
        image.commit_write(st, plan).await
    }

    /// The bytes a new cluster must hold beside the guest's; `None` when the file has them there
    /// already: none are asked for, or they are zeros and the file is `fresh`.
    async fn old_bytes(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
        fresh: bool,
    ) -> Result<Option<Buf>> {
        if len == 0 || (fresh && self.is_zero(st, at, len).await?) {
            return Ok(None);
        }
        let buf = Buf::zeroed(usize::try_from(len).expect("less than a run of clusters"));
        self.read_chain(st, Purpose::CowRead, at, &buf).await?;
        Ok(Some(buf))
    }

    /// Makes everything that was completed before durable.
    ///
    /// # Errors
    /// When the host cannot; nothing is acknowledged after that.
    pub async fn flush(&self, st: &dyn Storage) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        match self.chain.top() {
            Layer::Raw(raw) => raw.flush(st).await,
            Layer::Qcow2(image) => self.answer(st, image.flush(st).await).await,
        }
    }

    /// Flushes and gives back what was only reserved. Whoever uses the image after all may do so if
    /// nobody else has written to it meanwhile, and has to close it again.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub async fn close(&self, st: &dyn Storage) -> Result<()> {
        match self.chain.top() {
            _ if self.read_only => Ok(()),
            Layer::Raw(raw) => raw.flush(st).await,
            Layer::Qcow2(image) => self.answer(st, image.close(st).await).await,
        }
    }
}

/// The `len` bytes of `buf` from `done` on; without a copy of the segment list when that is all.
fn part(buf: &Buf, done: usize, len: u64) -> Buf {
    let len = usize::try_from(len).expect("no longer than the buffer");
    if len == buf.len() { buf.clone() } else { buf.slice(done, len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared<T: Send + Sync>() {}

    #[test]
    fn one_image_serves_all_workers() {
        shared::<Image>();
    }
}
