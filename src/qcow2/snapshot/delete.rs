//! Deleting a snapshot.

use crate::error::Result;
use crate::qcow2::Qcow2;
use crate::qcow2::offline::Bytes;
use crate::qcow2::snapshot::tree::Change;
use crate::storage::Storage;

impl Qcow2 {
    /// Deletes the snapshot whose id is `key`, or whose name if no id is, with the state of the
    /// virtual machine that it may hold. Nothing else uses the image.
    ///
    /// # Errors
    /// `Refused` or `Unsupported`, with nothing changed, when there is none; I/O errors and
    /// `Corrupt`, after which clusters may be counted too high.
    pub async fn delete_snapshot(&mut self, st: &dyn Storage, key: &str) -> Result<()> {
        self.refuse_data_file()?;
        let (mut snapshots, place) = self.find_snapshot(st, key).await?;
        let (_, old_len) = self.snapshots(st).await?;
        let gone = snapshots.remove(place);
        let l1 = self.snapshot_l1(st, &gone).await?;
        self.settle(st).await?;
        self.check_tree(st, &l1, 0, Change::Lower).await?;
        self.begin_offline(st, Bytes::Kept).await?;
        let table = self.write_snapshots(st, &snapshots).await?;
        self.flush(st).await?;
        self.switch_snapshots(st, table, old_len).await?;
        self.release(st, &l1).await?;
        self.forget_table(gone.l1_at, gone.l1_entries * 8);
        // COPIED is set again only where the lowered refcount is known; the flush that writes the
        // flags writes refcounts first.
        self.write_everything(st).await?;
        self.refresh_flags(st).await?;
        self.end_offline(st).await
    }
}
