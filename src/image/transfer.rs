//! Moving bytes up the chain: one place after the other, all transfers under way at once.

use smallvec::SmallVec;

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::chain::Place;
use crate::qcow2::{Extent, Packed};
use crate::storage::{Buf, Op, Pending, Purpose, Storage};

/// Transfers under way. All of them are awaited before the request ends, also when one fails: the
/// guest may use its memory again as soon as it has the answer.
#[derive(Default)]
pub(super) struct Batch(SmallVec<[Pending; 2]>);

impl Batch {
    pub(super) fn add(&mut self, pending: Pending) {
        self.0.push(pending);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Waits for all of them.
    pub(super) async fn finish(&mut self) -> Result<()> {
        let mut result = Ok(());
        for pending in &mut self.0 {
            result = result.and(pending.await);
        }
        result.map_err(|source| Error::io("the image's file", source))
    }
}

impl Image {
    /// Fills `buf` from whichever layers hold the bytes.
    pub(super) async fn read_chain(
        &self,
        st: &dyn Storage,
        why: Purpose,
        at: GuestOffset,
        buf: &Buf,
    ) -> Result<()> {
        let mut batch = Batch::default();
        let result = match self.read_known(st, why, at, buf, &mut batch) {
            Ok(done) if done == buf.len() => Ok(()),
            // In a box, so that those who find everything have no use for its memory.
            Ok(done) => Box::pin(self.read_parts(st, why, at, (buf, done), &mut batch)).await,
            Err(error) => Err(error),
        };
        let read = batch.finish().await;
        result.and(read)
    }

    /// Starts reading as far as the top layer has the bytes and its tables are in memory; returns
    /// how far that is.
    fn read_known(
        &self,
        st: &dyn Storage,
        why: Purpose,
        at: GuestOffset,
        buf: &Buf,
        batch: &mut Batch,
    ) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let left = (buf.len() - done) as u64;
            let Some(extent) = self.chain.lookup(at + done as u64, left)? else { break };
            let len = usize::try_from(extent.len()).expect("no longer than the buffer");
            match extent {
                Extent::Data { file, at, len } => {
                    let buf = super::part(buf, done, len);
                    batch.add(st.submit(file, why, Op::Read { at, buf }));
                }
                _ => buf.fill_zero(done, len),
            }
            done += len;
        }
        Ok(done)
    }

    async fn read_parts(
        &self,
        st: &dyn Storage,
        why: Purpose,
        at: GuestOffset,
        (buf, mut done): (&Buf, usize),
        batch: &mut Batch,
    ) -> Result<()> {
        while done < buf.len() {
            let left = (buf.len() - done) as u64;
            let place = self.chain.resolve(st, at + done as u64, left).await?;
            let len = usize::try_from(place.len()).expect("no longer than the buffer");
            match place {
                Place::Plain(Extent::Data { file, at, len }) => {
                    let buf = super::part(buf, done, len);
                    batch.add(st.submit(file, why, Op::Read { at, buf }));
                }
                Place::Plain(_) => buf.fill_zero(done, len),
                Place::Compressed { .. } => self.read_compressed(st, &place, buf, done).await?,
            }
            done += len;
        }
        Ok(())
    }

    /// Whether a range is known to be zeros without reading any of it.
    pub(super) async fn is_zero(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
    ) -> Result<bool> {
        let mut done = 0;
        while done < len {
            match self.chain.resolve(st, at + done, len - done).await? {
                Place::Plain(Extent::Zero { len }) => done += len,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Copies the bytes asked for of a compressed cluster to `buf` from `done` on.
    async fn read_compressed(
        &self,
        st: &dyn Storage,
        place: &Place,
        buf: &Buf,
        done: usize,
    ) -> Result<()> {
        let Place::Compressed { file, kind, cluster_size, extent } = *place else {
            unreachable!("the caller has matched it");
        };
        let size = |bytes: u64| usize::try_from(bytes).expect("at most two clusters");
        let load = async || {
            let source = Buf::zeroed(size(extent.place.bytes));
            let op = Op::Read { at: extent.place.at, buf: source.clone() };
            let read = st.submit(file, Purpose::CompressedRead, op).await;
            read.map_err(|source| Error::io("reading a compressed cluster", source))?;
            let (place, source) = (extent.place, source.to_vec());
            self.inflaters.inflate(Packed { kind, place, source, size: size(cluster_size) }).await
        };
        let cluster = self.inflated.get(file, extent.place, load).await?;
        buf.copy_from(done, &cluster[size(extent.skip)..size(extent.skip + extent.len)]);
        Ok(())
    }
}
