//! From the image to memory: the directory and the tables at open, the bits at the first write.

use crate::bytes::{HostOffset, be64};
use crate::error::{CorruptKind, Error, Kind, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::bits::{Bits, bytes_of};
use crate::qcow2::bitmap::directory::{self, Entry, Part, Place};
use crate::qcow2::bitmap::{Bitmaps, Live, MEMORY_LIMIT, TABLES_LIMIT, Table, Tracker};
use crate::qcow2::format::AUTOCLEAR_BITMAPS;
use crate::storage::{Buf, Op, Purpose, Storage};
use crate::sync::{AtomicBool, Mutex, OnceLock, Ordering};

/// What is being found out about the bitmaps of an image.
struct Survey {
    /// The end of the file, rounded up to a cluster.
    end: u64,
    /// Clusters guarded so far.
    guarded: Vec<(HostOffset, u64)>,
    /// Bytes of tables, and of bits to be held in memory, so far.
    tables: u64,
    memory: u64,
}

impl Qcow2 {
    /// Reads the bitmap directory and all bitmap tables of an image that will be written to, and
    /// guards them and what they refer to against guest data; `end` is the end of the file.
    ///
    /// # Errors
    /// I/O errors. Bitmaps that contradict the format are [`Bitmaps::Broken`]: the guest's data is
    /// as good as ever.
    pub(in crate::qcow2) async fn open_bitmaps(
        &self,
        st: &dyn Storage,
        end: u64,
    ) -> Result<Bitmaps> {
        let valid = self.header.autoclear & AUTOCLEAR_BITMAPS != 0;
        if !valid || self.header.bitmaps.is_empty() {
            return Ok(Bitmaps::None);
        }
        let mut survey = Survey { end, guarded: Vec::new(), tables: 0, memory: 0 };
        match self.survey(st, &mut survey).await {
            Ok(tracker) => Ok(Bitmaps::Tracked(Box::new(tracker))),
            Err(error) if matches!(error.kind(), Kind::Corrupt(_)) => {
                survey.guarded.into_iter().for_each(|(at, len)| self.regions.remove(at, len));
                Ok(Bitmaps::Broken(error))
            }
            Err(error) => Err(error),
        }
    }

    async fn survey(&self, st: &dyn Storage, survey: &mut Survey) -> Result<Tracker> {
        let wrong = |kind| Error::corrupt("bitmap directory", kind);
        let place = directory::place(&self.header.bitmaps, self.cluster_size()).map_err(wrong)?;
        let Place { at, len, .. } = place;
        self.guard_bitmap(st, survey, "bitmaps", ("bitmap directory", at, len)).await?;
        let bytes = self.read_bitmap(st, at, len).await?;
        let mut live = Vec::new();
        for entry in directory::parse(&bytes, place).map_err(wrong)? {
            let parts = self.survey_table(st, survey, &entry).await?;
            if entry.is_live() {
                live.push(self.live(survey, entry, parts));
            }
        }
        Ok(Tracker { at, directory: Mutex::new(bytes), live })
    }

    /// Reads and guards the table of one bitmap, and guards the clusters it refers to.
    async fn survey_table(
        &self,
        st: &dyn Storage,
        survey: &mut Survey,
        entry: &Entry,
    ) -> Result<Vec<Part>> {
        let name = format!("bitmap {:?}", entry.name);
        let wrong = |kind| Error::corrupt(name.as_str(), kind);
        let (at, len) = (entry.table_at, entry.table_entries * 8);
        survey.tables += len;
        if survey.tables > TABLES_LIMIT {
            let (entries, limit) = (entry.table_entries, TABLES_LIMIT / 8);
            return Err(wrong(CorruptKind::TableSize { table: "bitmap table", entries, limit }));
        }
        if len == 0 {
            return Ok(Vec::new());
        }
        self.guard_bitmap(st, survey, &name, ("bitmap table", at, len)).await?;
        let bytes = self.read_bitmap(st, at, len).await?;
        let mut parts = Vec::new();
        for index in 0..entry.table_entries {
            let word = be64(&bytes, parts.len() * 8).unwrap_or_default();
            let part = Part::parse(word, index, self.cluster_size()).map_err(wrong)?;
            if let Part::At(at) = part {
                let piece = ("bitmap's cluster", at, self.cluster_size());
                self.guard_bitmap(st, survey, &name, piece).await?;
            }
            parts.push(part);
        }
        Ok(parts)
    }

    /// Guards a piece of a bitmap; refuses one that lies outside the file or over other metadata,
    /// because storing the bitmap anew would free what is not its own, and one that counts as free.
    async fn guard_bitmap(
        &self,
        st: &dyn Storage,
        survey: &mut Survey,
        name: &str,
        (table, at, len): (&'static str, HostOffset, u64),
    ) -> Result<()> {
        let (offset, cluster) = (at.0, self.cluster_size());
        let wrong = |kind| Err(Error::corrupt(name, kind));
        if offset == 0 || at.within(cluster) != 0 {
            return wrong(CorruptKind::TableAlignment { table, offset });
        }
        if offset.saturating_add(len) > survey.end {
            return wrong(CorruptKind::TableBeyondEnd { table, offset, file_len: survey.end });
        }
        if self.regions.contains(at, len) {
            return wrong(CorruptKind::TableOverlap { table, offset });
        }
        let first = self.geometry.host_cluster(at).0;
        let end = first + len.div_ceil(cluster);
        let (free, _) = self.refcounts.find_free(st, first, end, 1, usize::MAX).await?;
        if let Some(free) = free {
            return wrong(CorruptKind::RefcountUnderflow(self.geometry.host_start(free.first).0));
        }
        self.regions.add(at, len);
        survey.guarded.push((at, len));
        Ok(())
    }

    /// Decides whether an enabled bitmap can be kept true.
    fn live(&self, survey: &mut Survey, entry: Entry, parts: Vec<Part>) -> Live {
        let bytes = bytes_of(self.header.size, entry.granularity_bits);
        let mut obstacle = entry.obstacle();
        if obstacle.is_none() && parts.len() as u64 != bytes.div_ceil(self.cluster_size()) {
            obstacle = Some("its table does not fit the disk's size");
        }
        if obstacle.is_none() && survey.memory + bytes > MEMORY_LIMIT {
            obstacle = Some("the bitmaps need more than 64 MiB of memory");
        }
        if obstacle.is_none() {
            survey.memory += bytes;
        }
        Live {
            name: entry.name,
            start: entry.start,
            granularity_bits: entry.granularity_bits,
            obstacle,
            table: Mutex::new(Table { at: entry.table_at, parts }),
            bits: OnceLock::new(),
            given_up: AtomicBool::new(false),
        }
    }

    async fn read_bitmap(&self, st: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(usize::try_from(len).expect("tables are bounded"));
        let read = Op::Read { at, buf: buf.clone() };
        let done = st.submit(self.file, Purpose::BitmapLoad, read).await;
        done.map_err(|source| Error::io("reading the image's bitmaps", source))?;
        Ok(buf.to_vec())
    }

    /// Loads the bits of a bitmap; without them it stays marked as in use, also when they could be
    /// loaded at a later first write.
    pub(super) async fn load_bitmap(&self, st: &dyn Storage, bitmap: &Live) {
        let given_up = "a dirty bitmap is inconsistent from now on; \
                        remove it with qemu-img bitmap --remove";
        if bitmap.bits.get().is_some() || bitmap.given_up.load(Ordering::Acquire) {
            return;
        }
        if let Some(why) = bitmap.obstacle {
            bitmap.given_up.store(true, Ordering::Release);
            tracing::warn!(bitmap = ?bitmap.name, why, "{given_up}");
            return;
        }
        match self.load_bits(st, bitmap).await {
            // Only one task starts writing, so nobody was faster.
            Ok(bits) => drop(bitmap.bits.set(bits)),
            Err(error) => {
                bitmap.given_up.store(true, Ordering::Release);
                tracing::warn!(bitmap = ?bitmap.name, %error, "{given_up}");
            }
        }
    }

    async fn load_bits(&self, st: &dyn Storage, bitmap: &Live) -> Result<Bits> {
        let cluster = self.cluster_size();
        let parts = crate::sync::lock(&bitmap.table).parts.clone();
        let bits = Bits::new(self.header.size, bitmap.granularity_bits);
        for (number, part) in (0..).zip(parts) {
            match part {
                Part::Zeros => {}
                Part::Ones => bits.load(number, cluster, None),
                Part::At(at) => {
                    let bytes = self.read_bitmap(st, at, cluster).await?;
                    bits.load(number, cluster, Some(&bytes));
                }
            }
        }
        Ok(bits)
    }
}
