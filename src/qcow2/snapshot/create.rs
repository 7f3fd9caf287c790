//! Taking a snapshot.

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::COPIED;
use crate::qcow2::header::SNAPSHOT_LIMIT;
use crate::qcow2::offline::Bytes;
use crate::qcow2::snapshot::Snapshot;
use crate::qcow2::snapshot::tree::Change;
use crate::storage::{Purpose, Storage};

/// Longest name of a snapshot in bytes; other programs cut longer ones off.
const NAME_LIMIT: usize = 255;

/// A snapshot to take.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshot {
    /// Its name, which no other snapshot has.
    pub name: String,
    /// Now, in seconds since 1970.
    pub date_seconds: u32,
    /// The rest of now, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the virtual machine has run, in nanoseconds; 0 when there is none.
    pub vm_clock_nanoseconds: u64,
    /// Instructions executed until now, where they are counted.
    pub icount: Option<u64>,
}

impl Qcow2 {
    /// Takes a snapshot of the disk as it is; returns it as it is recorded. Nothing else uses the
    /// image.
    ///
    /// # Errors
    /// `Refused` or `Unsupported`, with nothing changed, when the image cannot have this snapshot;
    /// I/O errors and `Corrupt`, after which clusters may be counted too high, and there is no new
    /// snapshot unless the last step, the header's sync, failed.
    pub async fn create_snapshot(
        &mut self,
        st: &dyn Storage,
        new: &NewSnapshot,
    ) -> Result<Snapshot> {
        self.refuse_data_file()?;
        let (mut snapshots, old_len) = self.snapshots(st).await?;
        refuse_name(&snapshots, &new.name)?;
        self.settle(st).await?;
        let l1 = self.l1_words();
        self.check_tree(st, &l1, 0, Change::Raise).await?;
        self.begin_offline(st, Bytes::Kept).await?;
        // What can fail for want of room comes before any refcount is raised.
        let l1_at = self.place_copy(st, &l1).await?;
        snapshots.push(self.describe(&snapshots, new, l1_at));
        let table = match self.write_snapshots(st, &snapshots).await {
            Ok(table) => table,
            Err(error) => {
                self.forget_table(l1_at, self.header.l1_entries * 8);
                self.end_offline(st).await?;
                return Err(error);
            }
        };
        self.share_active(st).await?;
        self.flush(st).await?;
        self.switch_snapshots(st, table, old_len).await?;
        self.end_offline(st).await?;
        Ok(snapshots.pop().expect("it was just added"))
    }

    /// Writes a copy of the active L1 table; an empty one has no place.
    async fn place_copy(&self, st: &dyn Storage, l1: &[u64]) -> Result<HostOffset> {
        if l1.is_empty() {
            return Ok(HostOffset(0));
        }
        let bytes = l1.iter().flat_map(|entry| (entry & !COPIED).to_be_bytes()).collect();
        self.place_table(st, Purpose::SnapshotWrite, bytes).await
    }

    fn describe(&self, others: &[Snapshot], new: &NewSnapshot, l1_at: HostOffset) -> Snapshot {
        let numbers = others.iter().filter_map(|one| one.id.parse::<u64>().ok());
        let id = numbers.max().unwrap_or(0).saturating_add(1);
        let mut snapshot = Snapshot {
            l1_at,
            l1_entries: self.header.l1_entries,
            id: id.to_string(),
            name: new.name.clone(),
            date_seconds: new.date_seconds,
            date_nanoseconds: new.date_nanoseconds,
            vm_clock_nanoseconds: new.vm_clock_nanoseconds,
            vm_state_size: 0,
            disk_size: Some(self.header.size),
            icount: new.icount,
            bytes: Vec::new(),
        };
        snapshot.encode();
        snapshot
    }
}

fn refuse_name(snapshots: &[Snapshot], name: &str) -> Result<()> {
    let refuse = |why: String| Err(Error::refused("snapshot", why));
    if name.is_empty() || name.len() > NAME_LIMIT || name.contains('\0') {
        return refuse(format!("a name has 1 to {NAME_LIMIT} bytes and no NUL, unlike {name:?}"));
    }
    if snapshots.iter().any(|one| one.name == name) {
        return refuse(format!(
            "there is one called {name:?} already; delete it first or choose another name"
        ));
    }
    if snapshots.len() as u64 >= SNAPSHOT_LIMIT {
        return refuse(format!("an image has at most {SNAPSHOT_LIMIT}; delete some first"));
    }
    Ok(())
}
