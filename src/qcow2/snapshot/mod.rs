//! Internal snapshots: listed, taken, applied and deleted while nothing else uses the image.
//!
//! A snapshot is a copy of the L1 table, kept with a reference to everything the table leads to.
//! [`mod@table`] reads and writes the table of snapshots; `tree` walks what an L1 table leads to;
//! `create`, `apply` and `delete` change the image. Each of these prepares everything durably, and
//! then happens by one write inside the header's first sector: a power cut before it leaves leaks,
//! one after it leaves clusters that are counted too high until somebody repairs them.

mod apply;
mod create;
mod delete;
mod show;
pub(super) mod table;
pub(super) mod tree;

pub use create::NewSnapshot;
pub use table::Snapshot;
pub(super) use table::{Parsed, TABLE_LIMIT, parse};

use crate::bytes::HostOffset;
use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::header::L1_LIMIT;
use crate::qcow2::offline::Bytes;
use crate::storage::{Purpose, Storage};

impl Qcow2 {
    /// Refuses what no snapshot can hold: guest data in a file of its own has one version only.
    fn refuse_data_file(&self) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        let why = "an image with an external data file cannot have internal snapshots: the data \
                   file holds one version of each cluster; make an overlay instead";
        Err(Error::unsupported("snapshot", why))
    }

    /// The snapshots, and the place of the one whose id is `key`, or whose name if no id is.
    async fn find_snapshot(&self, st: &dyn Storage, key: &str) -> Result<(Vec<Snapshot>, usize)> {
        let (snapshots, _) = self.snapshots(st).await?;
        let by_id = snapshots.iter().position(|one| one.id == key);
        let found = by_id.or_else(|| snapshots.iter().position(|one| one.name == key));
        match found {
            Some(place) => Ok((snapshots, place)),
            None => Err(Error::refused("snapshot", format!("there is none called {key:?}"))),
        }
    }

    /// The L1 table of a snapshot.
    ///
    /// # Errors
    /// When it is larger than any L1 table may be, or cannot be read.
    async fn snapshot_l1(&self, st: &dyn Storage, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let (entries, limit) = (snapshot.l1_entries, L1_LIMIT >> 3);
        if entries > limit {
            let table = "snapshot's L1 table";
            return Err(Error::corrupt(
                "snapshot",
                CorruptKind::TableSize { table, entries, limit },
            ));
        }
        let bytes = self.read_bytes(st, Purpose::SnapshotRead, snapshot.l1_at, entries * 8).await?;
        let word = |word: &[u8]| u64::from_be_bytes(word.try_into().expect("eight bytes"));
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Writes a table of snapshots into room that was counted for it; returns the header's fields
    /// that name it, for when it is durable.
    async fn write_snapshots(
        &self,
        st: &dyn Storage,
        snapshots: &[Snapshot],
    ) -> Result<(u32, HostOffset)> {
        let bytes = table::serialise(snapshots);
        if bytes.len() as u64 > TABLE_LIMIT {
            let why = format!("the table of snapshots would be larger than {TABLE_LIMIT} bytes");
            return Err(Error::refused("snapshot", why));
        }
        let count = u32::try_from(snapshots.len()).expect("the number of snapshots is bounded");
        if bytes.is_empty() {
            return Ok((0, HostOffset(0)));
        }
        let at = self.place_table(st, Purpose::SnapshotWrite, bytes).await?;
        Ok((count, at))
    }

    /// Lets every snapshot say how large the disk was, which version 3 asks for. Where it is not
    /// recorded the disk has had one size only. Everything is durable.
    pub(super) async fn complete_snapshots(&mut self, st: &dyn Storage) -> Result<()> {
        if self.header.snapshots == 0 {
            return Ok(());
        }
        let (mut snapshots, old_len) = self.snapshots(st).await?;
        if snapshots.iter().all(|one| one.disk_size.is_some()) {
            return Ok(());
        }
        for one in snapshots.iter_mut().filter(|one| one.disk_size.is_none()) {
            one.disk_size = Some(self.header.size);
            one.encode();
        }
        self.begin_offline(st, Bytes::Kept).await?;
        let table = self.write_snapshots(st, &snapshots).await?;
        self.flush(st).await?;
        self.switch_snapshots(st, table, old_len).await?;
        self.end_offline(st).await
    }

    /// Lets the header name another table of snapshots, which is durable, and frees the old one.
    async fn switch_snapshots(
        &mut self,
        st: &dyn Storage,
        (count, at): (u32, HostOffset),
        old_len: u64,
    ) -> Result<()> {
        let field = [count.to_be_bytes().as_slice(), &at.0.to_be_bytes()].concat();
        self.switch_header(st, crate::qcow2::header::SNAPSHOTS_AT, field).await?;
        let old = (self.header.snapshots_at, self.header.snapshots);
        (self.header.snapshots_at, self.header.snapshots) = (at, count);
        if old.1 > 0 {
            self.forget_table(old.0, old_len);
        }
        Ok(())
    }
}
