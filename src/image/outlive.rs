//! What a guest that does not notice the death of this process relies on.

use crate::error::Result;
use crate::image::Image;
use crate::image::chain::Layer;
use crate::qcow2::journal::SharedWords;
use crate::storage::Storage;
use crate::sync::Arc;

impl Image {
    /// Takes the disk over from a process that may have died: makes the changes of the mapping that
    /// it has left in `words`, and notes those to come there, so that they need no flush to outlive
    /// this process. Nobody else uses the disk meanwhile. Returns how many changes were made.
    ///
    /// A raw disk has no mapping, and a disk that is opened read-only is not changed.
    ///
    /// # Errors
    /// When `words` contradict the image, which was not changed then; when the host cannot read or
    /// write.
    pub async fn attach_journal(
        &self,
        st: &dyn Storage,
        words: Arc<dyn SharedWords>,
    ) -> Result<usize> {
        match self.chain.top() {
            Layer::Qcow2(image) if !self.read_only => {
                let attached = image.attach_journal(st, words).await;
                attached.map_err(|error| error.within(&self.name))
            }
            _ => Ok(0),
        }
    }

    /// Says that a process may have written to the disk and died before it could sync: the next
    /// flush syncs, although nothing was written since the open.
    pub fn distrust_syncs(&self) {
        if let Layer::Qcow2(image) = self.chain.top() {
            image.distrust_syncs();
        }
    }

    /// Says that a guest may come whose former daemon has died: where that one has put what it had
    /// answered and not flushed looks free until [`Image::attach_journal`], and is spared until
    /// [`Image::expect_nobody`]. Nothing was written yet.
    pub fn expect_predecessor(&self) {
        if let Layer::Qcow2(image) = self.chain.top() {
            image.expect_predecessor();
        }
    }

    /// Says that the disk was taken over, or that there was nothing to take over.
    pub fn expect_nobody(&self) {
        if let Layer::Qcow2(image) = self.chain.top() {
            image.expect_nobody();
        }
    }

    /// Flushes, forgets what is noted in the words that were attached, and notes nothing more
    /// there. No request is under way.
    ///
    /// # Errors
    /// As [`Image::flush`]; what is noted stays there then.
    pub async fn detach_journal(&self, st: &dyn Storage) -> Result<()> {
        match self.chain.top() {
            Layer::Qcow2(image) if !self.read_only => image.detach_journal(st).await,
            _ => Ok(()),
        }
    }

    /// Makes everything that was completed before outlive this process. What was written in place
    /// does as it is. A change of the mapping is in the journal; where it cannot be, or there is
    /// none, it is flushed, because tables reach the file in an order that power cuts respect and
    /// in no other.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub async fn hand_over(&self, st: &dyn Storage) -> Result<()> {
        match self.chain.top() {
            Layer::Qcow2(image) if !self.read_only && image.is_behind() => self.flush(st).await,
            _ => Ok(()),
        }
    }
}
