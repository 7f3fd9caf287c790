//! Going back to a snapshot.

use crate::bytes::HostOffset;
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{COPIED, OFFSET_MASK};
use crate::qcow2::header::{SIZE_AT, is_size_allowed};
use crate::qcow2::offline::Bytes;
use crate::qcow2::snapshot::tree::Change;
use crate::storage::Storage;

impl Qcow2 {
    /// Makes the disk what it was, in content and size, when the snapshot was taken whose id is
    /// `key`, or whose name if no id is. The snapshot stays. Nothing else uses the image.
    ///
    /// The state of the virtual machine stays in the snapshot and is not made part of the disk.
    ///
    /// # Errors
    /// `Refused` or `Unsupported`, with nothing changed, when there is none or the image cannot
    /// take its size; I/O errors and `Corrupt`, after which clusters may be counted too high, and
    /// the disk is as it was unless the header's sync, or what follows it, failed.
    pub async fn apply_snapshot(&mut self, st: &dyn Storage, key: &str) -> Result<()> {
        self.refuse_data_file()?;
        if self.has_bitmaps() {
            let why = "the image has bitmaps of changed clusters, which would miss the change; \
                       remove them first with qemu-img bitmap --remove";
            return Err(Error::refused("snapshot", why));
        }
        let (snapshots, place) = self.find_snapshot(st, key).await?;
        let size = snapshots[place].disk_size.unwrap_or(self.header.size);
        let needed = self.geometry.l1_entries(size);
        if !is_size_allowed(size, needed) {
            return Err(Error::corrupt("snapshot", CorruptKind::VirtualSize(size)));
        }
        let entries = usize::try_from(needed.max(1)).expect("the limit was checked");
        let mut new = self.snapshot_l1(st, &snapshots[place]).await?;
        // Behind the disk's end lies the state of the virtual machine.
        new.resize(entries, 0);
        self.settle(st).await?;
        let old = self.l1_words();
        self.check_tree(st, &new, 0, Change::Raise).await?;
        self.check_tree(st, &old, 0, Change::Lower).await?;
        self.begin_offline(st, Bytes::Changed).await?;
        new.iter_mut().for_each(|entry| *entry &= !COPIED);
        let at = self.place_l1(st, &new).await?;
        self.share_snapshot(st, &new).await?;
        self.flush(st).await?;
        self.switch_disk(st, size, at, new).await?;
        self.release(st, &old).await?;
        self.write_everything(st).await?;
        self.refresh_flags(st).await?;
        self.end_offline(st).await
    }

    /// Gives the disk another size and another L1 table, both by one write of the header.
    async fn switch_disk(
        &mut self,
        st: &dyn Storage,
        size: u64,
        at: HostOffset,
        l1: Vec<u64>,
    ) -> Result<()> {
        let entries = u32::try_from(l1.len()).expect("the limit was checked");
        // Between size and L1 table lies the encryption method: none.
        let field = [size.to_be_bytes().as_slice(), &[0; 4], &entries.to_be_bytes()].concat();
        let field = [field.as_slice(), &at.0.to_be_bytes()].concat();
        self.switch_header(st, SIZE_AT, field).await?;
        self.header.size = size;
        for entry in l1.iter().filter(|entry| *entry & OFFSET_MASK != 0) {
            self.regions.add(HostOffset(entry & OFFSET_MASK), self.geometry.cluster_size());
        }
        self.replace_l1(at, l1);
        self.l2 = self.l2.emptied();
        Ok(())
    }
}
