//! Writing whole clusters compressed.

use crate::bytes::{GuestOffset, round_up};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::qcow2::Qcow2;
use crate::qcow2::header::Compression;
use crate::storage::{Buf, Op, Purpose, Storage};

impl Image {
    /// Writes one whole guest cluster compressed. It is written plainly where that saves nothing,
    /// where the cluster has a place that can be written to already, and where the image's
    /// refcounts are too narrow for clusters that share a host cluster. Durable after the next
    /// flush.
    ///
    /// # Errors
    /// As [`Image::write`]; when the range is not one cluster, or the disk's last one up to its
    /// end; when the disk is a raw file or has an external data file.
    pub async fn write_compressed(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: Buf,
    ) -> Result<()> {
        let image = self.compressible()?;
        self.check_write(at, buf.len() as u64)?;
        if !self.is_whole_cluster(image, at, buf.len() as u64) {
            let why = format!("{} bytes at {at} are not one cluster to compress", buf.len());
            return Err(Error::refused("disk", why));
        }
        self.write_mode(st, at, &buf, true).await
    }

    /// The top layer, if it can hold compressed clusters.
    pub(super) fn compressible(&self) -> Result<&Qcow2> {
        let why = match self.chain.top() {
            Layer::Raw(_) => "a raw image",
            Layer::Qcow2(image) if image.file() != image.data_file() => {
                "an image with an external data file"
            }
            Layer::Qcow2(image) => return Ok(image),
        };
        Err(Error::refused("disk", format!("{why} cannot hold compressed clusters")))
    }

    fn is_whole_cluster(&self, image: &Qcow2, at: GuestOffset, len: u64) -> bool {
        let cluster = image.cluster_size();
        let starts = at.within(cluster) == 0;
        starts && (len == cluster || (len < cluster && at.0 + len == self.size()))
    }

    /// Writes `buf` compressed if it is one whole cluster; `false` when it is to be written
    /// plainly.
    pub(super) async fn compress_cluster(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: &Buf,
    ) -> Result<bool> {
        let Layer::Qcow2(image) = self.chain.top() else { return Ok(false) };
        let Some(block) = image.compressed_block(st) else { return Ok(false) };
        if !self.is_whole_cluster(image, at, buf.len() as u64) {
            return Ok(false);
        }
        let Some(bytes) = deflate(image.compression(), buf, image.cluster_size()).await else {
            return Ok(false);
        };
        let len = round_up(bytes.len() as u64, block);
        if len >= image.cluster_size() {
            return Ok(false);
        }
        self.place_compressed(st, image, at, (&bytes, len)).await
    }

    /// Writes one whole cluster, or the disk's last one up to its end, whose compressed bytes are
    /// known if there is any use in them; else plainly, as [`Image::write_compressed`] does.
    pub(super) async fn write_deflated(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        buf: &Buf,
        bytes: Option<&[u8]>,
    ) -> Result<()> {
        let image = self.compressible()?;
        self.check_write(at, buf.len() as u64)?;
        if let (Some(bytes), Some(block)) = (bytes, image.compressed_block(st)) {
            let len = round_up(bytes.len() as u64, block);
            if !image.note_change(at.0, buf.len() as u64) {
                Box::pin(image.start_change(st, at.0, buf.len() as u64)).await?;
            }
            let _stay = image.epochs().enter(st.lane());
            if len < image.cluster_size() {
                let placed = self.place_compressed(st, image, at, (bytes, len)).await;
                if self.answer(st, placed).await? {
                    return Ok(());
                }
            }
        }
        self.write_mode(st, at, buf, false).await
    }

    /// Writes the compressed bytes of one cluster, filled up to `len` bytes, which are whole blocks
    /// and less than a cluster; `false` when the cluster is to be written plainly.
    pub(super) async fn place_compressed(
        &self,
        st: &dyn Storage,
        image: &Qcow2,
        at: GuestOffset,
        (bytes, len): (&[u8], u64),
    ) -> Result<bool> {
        let Some(plan) = image.prepare_compressed(st, at, len).await? else { return Ok(false) };
        let (file, to) = (plan.target(), plan.at());
        image.check_overlap(file, to, len)?;
        let padded = Buf::zeroed(usize::try_from(len).expect("less than a cluster"));
        padded.copy_from(0, bytes);
        let op = Op::Write { at: to, buf: padded };
        let done = st.submit(file, Purpose::CompressedWrite, op).await;
        image.mark_dirty(file);
        done.map_err(|source| Error::io("writing a compressed cluster", source))?;
        image.commit_compressed(st, plan).await?;
        Ok(true)
    }
}

/// Compresses a cluster, filled up with zeros where the disk ends in it. The only place where the
/// image layer compresses: it takes the worker's time, some milliseconds for the largest clusters.
async fn deflate(kind: Compression, buf: &Buf, cluster_size: u64) -> Option<Vec<u8>> {
    // A copy, which the guest cannot change meanwhile.
    let mut bytes = vec![0; usize::try_from(cluster_size).expect("a cluster is small")];
    buf.copy_to(0, &mut bytes[..buf.len()]);
    crate::qcow2::deflate(kind, &bytes)
}
