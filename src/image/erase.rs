//! Discard and write-zeroes of any range: whole clusters by their entries, the edges as the kind
//! of request allows.

use crate::bytes::GuestOffset;
use crate::error::{Error, Result};
use crate::exec::yield_now;
use crate::image::Image;
use crate::image::chain::Layer;
use crate::qcow2::{Erase, Qcow2};
use crate::storage::{Buf, Op, Purpose, Storage};

/// Zeros are written in pieces of at most this many bytes.
const ZEROS: u64 = 1 << 20;

impl Image {
    /// Makes a range read as zeros; with `unmap` the host's space may be given back.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn write_zeroes(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        self.check_write(at, len)?;
        let unmap = unmap && self.policy.unmaps();
        let image = match self.chain.top() {
            Layer::Raw(raw) => return raw.zero(st, at, len, unmap).await,
            Layer::Qcow2(image) => image,
        };
        image.start_change(st, at.0, len).await?;
        let _stay = image.epochs().enter(st.lane());
        if !image.can_zero(unmap) {
            return self.write_zero_bytes(st, at, len).await;
        }
        let (start, end) = self.whole_units(image.zero_granularity(), at, len);
        if start.0 >= end {
            return self.write_zero_bytes(st, at, len).await;
        }
        self.write_zero_bytes(st, at, start - at).await?;
        self.erase(st, image, start, end, Erase::Zero { unmap }).await?;
        self.write_zero_bytes(st, GuestOffset(end), (at.0 + len).saturating_sub(end)).await
    }

    /// Tells that the guest needs a range no more; it reads as old bytes or as zeros afterwards.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn discard(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<()> {
        self.check_write(at, len)?;
        if !self.policy.unmaps() {
            return Ok(());
        }
        match self.chain.top() {
            Layer::Raw(raw) => raw.discard(st, at, len).await,
            Layer::Qcow2(image) => {
                image.start_change(st, at.0, len).await?;
                let _stay = image.epochs().enter(st.lane());
                let (start, end) = self.whole_units(image.cluster_size(), at, len);
                self.erase(st, image, start, end, Erase::Discard).await
            }
        }
    }

    async fn erase(
        &self,
        st: &dyn Storage,
        image: &Qcow2,
        mut at: GuestOffset,
        end: u64,
        how: Erase,
    ) -> Result<()> {
        while at.0 < end {
            let erased = image.erase(st, at, end - at.0, how).await;
            let mut handled = self.answer(st, erased).await?;
            if handled == 0 {
                let cluster = image.cluster_size();
                handled = (end - at.0).min(cluster - at.within(cluster));
                self.write_zero_bytes(st, at, handled).await?;
            }
            at = at + handled;
            if at.0 < end {
                // A whole disk takes as long as thousands of reads, which do not wait for its end.
                yield_now().await;
            }
        }
        Ok(())
    }

    /// The part of a range that is whole units; the disk's last unit is whole when the range
    /// reaches the disk's end. Empty when the first is not below the second.
    fn whole_units(&self, unit: u64, at: GuestOffset, len: u64) -> (GuestOffset, u64) {
        let start = crate::bytes::round_up(at.0, unit);
        let end = at.0 + len;
        let whole_end =
            if end >= self.size { self.size } else { crate::bytes::round_down(end, unit) };
        (GuestOffset(start), whole_end)
    }

    /// Writes zeros as bytes, where the range is not known to be zeros already.
    async fn write_zero_bytes(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZEROS);
            let zero = self.is_zero(st, at + done, piece).await;
            if !self.answer(st, zero).await? {
                let zeros = Buf::zeroed(usize::try_from(piece).expect("a small piece"));
                self.write_mode(st, at + done, &zeros, self.compress).await?;
            }
            done += piece;
            if done < len {
                yield_now().await;
            }
        }
        Ok(())
    }
}

impl crate::raw::Raw {
    async fn zero(&self, st: &dyn Storage, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        let op = Op::Zero { at: self.host(at), len, unmap };
        let done = st.submit(self.file(), Purpose::GuestZero, op).await;
        done.map_err(|source| Error::io("zeroing the image", source))
    }

    async fn discard(&self, st: &dyn Storage, at: GuestOffset, len: u64) -> Result<()> {
        let op = Op::Discard { at: self.host(at), len };
        let done = st.submit(self.file(), Purpose::GuestDiscard, op).await;
        done.map_err(|source| Error::io("discarding in the image", source))
    }
}
