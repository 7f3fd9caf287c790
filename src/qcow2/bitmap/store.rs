//! From memory to the image, at a clean close.

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::bits::{Bits, Content};
use crate::qcow2::bitmap::directory::{self, Part};
use crate::qcow2::bitmap::{Bitmaps, Live, Table};
use crate::qcow2::refcount::Run;
use crate::storage::{Buf, Op, Purpose, Storage};
use crate::sync::lock;

/// Bytes of bits that are written at once.
const PIECE: u64 = 1 << 20;

/// A bitmap's new place in the image, complete but for the directory.
struct Stored<'a> {
    bitmap: &'a Live,
    /// `None` when the bits are as the image has them.
    table: Option<Table>,
}

impl Qcow2 {
    /// Stores the bitmaps that were kept, and says that they can be trusted again. The guest's
    /// requests are over. What the bitmaps took up before goes to limbo.
    ///
    /// A bitmap that finds no room stays marked as in use; that is logged.
    ///
    /// # Errors
    /// As [`Qcow2::flush`].
    pub(in crate::qcow2) async fn store_bitmaps(&self, st: &dyn Storage) -> Result<()> {
        let Bitmaps::Tracked(tracker) = &self.bitmaps else { return Ok(()) };
        if tracker.live.iter().all(|bitmap| bitmap.bits.get().is_none()) {
            return Ok(());
        }
        // The guest's bytes come first: they shall be safe even if the bitmaps find no room.
        self.flush(st).await?;
        let mut stored = Vec::new();
        for bitmap in &tracker.live {
            let Some(bits) = bitmap.bits.get() else { continue };
            match self.store_bits(st, bits).await {
                Ok(table) => stored.push(Stored { bitmap, table }),
                Err(error) => {
                    let what = "a dirty bitmap could not be stored and stays inconsistent; \
                                remove it with qemu-img bitmap --remove";
                    tracing::warn!(bitmap = ?bitmap.name, %error, "{what}");
                }
            }
        }
        // Tables, bits and their refcounts are durable before the directory refers to them.
        self.flush(st).await?;
        let places = |directory: &mut [u8]| {
            for one in &stored {
                if let Some(table) = &one.table {
                    directory::set_table(directory, one.bitmap.start, table.at);
                }
            }
        };
        self.write_directory(st, tracker.change(places)).await?;
        // The two fields of an entry may lie in different sectors: no mark goes before the place
        // is durable, else a power cut makes an old table look like the newest.
        let marks = |directory: &mut [u8]| {
            for one in &stored {
                directory::set_in_use(directory, one.bitmap.start, false);
            }
        };
        self.write_directory(st, tracker.change(marks)).await?;
        for Stored { bitmap, table } in stored {
            let Some(table) = table else { continue };
            let old = std::mem::replace(&mut *lock(&bitmap.table), table);
            self.drop_table(&old);
        }
        Ok(())
    }

    /// Writes bits and their table into new clusters, unless the image has them already.
    async fn store_bits(&self, st: &dyn Storage, bits: &Bits) -> Result<Option<Table>> {
        if !bits.is_changed() {
            return Ok(None);
        }
        let mut taken = Vec::new();
        let written = self.write_bits(st, bits, &mut taken).await;
        if written.is_err() {
            taken.into_iter().for_each(|run| self.limbo.never_linked(run, self.epochs.now()));
        }
        written.map(Some)
    }

    pub(super) async fn write_bits(
        &self,
        st: &dyn Storage,
        bits: &Bits,
        taken: &mut Vec<Run>,
    ) -> Result<Table> {
        let cluster = self.cluster_size();
        let count = bits.clusters(cluster);
        let mut parts = Vec::new();
        // The clusters whose bits need room, a piece at a time.
        let mut waiting: Vec<usize> = Vec::new();
        let mut bytes = Vec::new();
        for number in 0..count {
            parts.push(match bits.content(number, cluster) {
                Content::Zeros => Part::Zeros,
                Content::Ones => Part::Ones,
                Content::Mixed(mut content) => {
                    waiting.push(parts.len());
                    bytes.append(&mut content);
                    Part::Zeros
                }
            });
            if bytes.len() as u64 >= PIECE || number + 1 == count {
                self.place_bits(st, &mut parts, &waiting, &bytes, taken).await?;
                waiting.clear();
                bytes.clear();
            }
        }
        let mut bytes: Vec<u8> = parts.iter().flat_map(|part| part.entry().to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(index(cluster)), 0);
        let run = self.allocate_together(st, bytes.len() as u64 / cluster).await?;
        let at = self.write_piece(st, run, &bytes, taken).await?;
        Ok(Table { at, parts })
    }

    /// Finds room for clusters of bits, `bytes` in all, and says in `parts` where it is.
    async fn place_bits(
        &self,
        st: &dyn Storage,
        parts: &mut [Part],
        waiting: &[usize],
        bytes: &[u8],
        taken: &mut Vec<Run>,
    ) -> Result<()> {
        let cluster = self.cluster_size();
        let (mut waiting, mut bytes) = (waiting, bytes);
        while !waiting.is_empty() {
            let run = self.allocate(st, waiting.len() as u64).await?.run;
            let (now, later) = waiting.split_at(index(run.count));
            let (piece, rest) = bytes.split_at(index(run.count * cluster));
            let at = self.write_piece(st, run, piece, taken).await?;
            for (step, &number) in (0..).zip(now) {
                parts[number] = Part::At(at + step * cluster);
            }
            (waiting, bytes) = (later, rest);
        }
        Ok(())
    }

    /// Writes a run of new clusters and guards it.
    async fn write_piece(
        &self,
        st: &dyn Storage,
        run: Run,
        bytes: &[u8],
        taken: &mut Vec<Run>,
    ) -> Result<HostOffset> {
        taken.push(run);
        let at = self.geometry.host_start(run.first);
        self.regions.add(at, bytes.len() as u64);
        let write = Op::Write { at, buf: Buf::copy_of(bytes) };
        let done = st.submit(self.file, Purpose::BitmapWrite, write).await;
        self.mark_dirty(self.file);
        done.map_err(|source| Error::io("storing a bitmap", source))?;
        Ok(at)
    }

    /// Gives back what the image held of a bitmap; the directory refers to it no more, durably.
    pub(super) fn drop_table(&self, old: &Table) {
        let epoch = self.epochs.now();
        let clusters = (old.parts.len() as u64 * 8).div_ceil(self.cluster_size());
        let table = Run { first: self.geometry.host_cluster(old.at), count: clusters };
        self.limbo.never_linked(table, epoch);
        for part in &old.parts {
            if let Part::At(at) = part {
                let first = self.geometry.host_cluster(*at);
                self.limbo.never_linked(Run { first, count: 1 }, epoch);
            }
        }
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("a piece of a bitmap fits in memory")
}
