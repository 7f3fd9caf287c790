//! The disk as a snapshot holds it, for reading.

use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::header::is_size_allowed;
use crate::storage::Storage;
use crate::sync::AtomicU64;

impl Qcow2 {
    /// Shows the disk as it was, in content and size, when the snapshot was taken whose id is
    /// `key`, or whose name if no id is. The image must have been opened for reading only; the file
    /// is not changed.
    ///
    /// # Errors
    /// `Refused` or `Unsupported` when there is no such snapshot; `Corrupt` when it is too large
    /// for its tables; I/O errors.
    pub(crate) async fn show_snapshot(&mut self, st: &dyn Storage, key: &str) -> Result<()> {
        self.refuse_data_file()?;
        let (snapshots, place) = self.find_snapshot(st, key).await?;
        let snapshot = &snapshots[place];
        let size = snapshot.disk_size.unwrap_or(self.header.size);
        let needed = self.geometry.l1_entries(size);
        if !is_size_allowed(size, needed) {
            return Err(Error::corrupt("snapshot", CorruptKind::VirtualSize(size)));
        }
        let entries = usize::try_from(needed.max(1)).expect("the limit was checked");
        let mut words = self.snapshot_l1(st, snapshot).await?;
        // Behind the disk's end lies the state of the virtual machine.
        words.resize(entries, 0);
        self.header.l1_at = snapshot.l1_at;
        self.header.l1_entries = needed.max(1);
        self.header.size = size;
        self.l1 = words.into_iter().map(AtomicU64::new).collect();
        self.l2 = self.l2.emptied();
        Ok(())
    }
}
