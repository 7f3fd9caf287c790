//! Bitmaps added, removed, cleared, enabled, disabled and merged while nothing else uses the image.
//!
//! All changes are made in memory first. Then the bits and tables that are new and a whole new
//! directory are written to new places, the header names that directory by one write of its first
//! sector, and what nothing refers to any more is freed (R19 and R21 in `ORDERING.md`).

use crate::bytes::{HostOffset, be64};
use crate::error::{Error, Kind, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap::bits::{Bits, bytes_of};
use crate::qcow2::bitmap::directory::{
    self, COUNT_LIMIT, DIRECTORY_LIMIT, Entry, NAME_LIMIT, Part,
};
use crate::qcow2::bitmap::{Bitmaps, MEMORY_LIMIT, Table};
use crate::qcow2::format::AUTOCLEAR_BITMAPS;
use crate::qcow2::header::Header;
use crate::qcow2::offline::Bytes;
use crate::qcow2::refcount::Run;
use crate::qcow2::rewrite::{Bits as FeatureBits, HeaderChange};
use crate::storage::{Buf, FileId, Op, Purpose, Storage};

/// log2 of the smallest and of the largest granularity in bytes of a new bitmap.
pub(super) const GRANULARITIES: std::ops::RangeInclusive<u32> = 9..=31;

/// One change of an image's bitmaps.
#[derive(Debug)]
pub enum BitmapEdit {
    /// A new, enabled one without a bit set.
    Add {
        /// Its name, which no other bitmap has.
        name: String,
        /// How many bytes of the disk one of its bits stands for, a power of two from 512 to 2 GiB;
        /// without it that of the clusters, but 4 KiB to 64 KiB.
        granularity: Option<u64>,
    },
    /// It goes, whatever state it is in.
    Remove(String),
    /// None of its bits is set any more.
    Clear(String),
    /// Changes of the disk are recorded in it.
    Enable(String),
    /// Changes of the disk are not recorded in it any more.
    Disable(String),
    /// What is set in another one is set in it as well.
    Merge {
        /// The bitmap that is changed.
        name: String,
        /// The other one.
        source: MergeSource,
    },
}

/// Where the bits to merge come from.
#[derive(Debug)]
pub enum MergeSource {
    /// A bitmap of the same image.
    Own(String),
    /// What [`load_bitmap`] has read.
    Loaded(LoadedBitmap),
}

/// The bits of a bitmap, in memory.
pub struct LoadedBitmap {
    pub(super) size: u64,
    pub(super) bits: Bits,
}

impl std::fmt::Debug for LoadedBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoadedBitmap(of a disk of {} bytes)", self.size)
    }
}

impl LoadedBitmap {
    /// Bytes that the bits take in memory.
    pub fn bytes(&self) -> u64 {
        self.bits.bytes()
    }
}

/// A bitmap as it is to become.
struct Draft {
    /// Its entry in the directory, with padding.
    entry: Vec<u8>,
    /// What the entry said when it was read or made.
    parsed: Entry,
    /// Where the image holds its bits, if it does.
    table: Option<Table>,
    /// Its bits, when they are to be written.
    bits: Option<Bits>,
}

/// The bits of a bitmap of an image that is open.
///
/// # Errors
/// `Refused` when there is none of that name or it cannot be trusted; I/O errors and `Corrupt`.
pub async fn load_bitmap(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
    name: &str,
) -> Result<LoadedBitmap> {
    let drafts = read(st, file, header).await?;
    let draft = find(&drafts, name)?;
    let draft = &drafts[draft];
    refuse_unusable(draft, name)?;
    let bits = read_bits(st, file, header, draft).await?;
    Ok(LoadedBitmap { size: header.size, bits })
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::refused("bitmap", why))
}

fn find(drafts: &[Draft], name: &str) -> Result<usize> {
    let found = drafts.iter().position(|draft| draft.parsed.name == name);
    found.map_or_else(|| refuse(format!("there is none called {name:?}")), Ok)
}

/// Refuses a bitmap whose bits mean nothing, or nothing that is known here.
fn refuse_unusable(draft: &Draft, name: &str) -> Result<()> {
    if draft.parsed.facts().in_use {
        return refuse(format!(
            "{name:?} is inconsistent: it was in use when a program died; it can only be removed"
        ));
    }
    match draft.parsed.obstacle() {
        None => Ok(()),
        Some(why) => refuse(format!("{name:?} cannot be used: {why}")),
    }
}

pub(super) async fn read_at(
    st: &dyn Storage,
    file: FileId,
    at: HostOffset,
    len: u64,
) -> Result<Vec<u8>> {
    let buf = Buf::zeroed(usize::try_from(len).expect("tables are bounded"));
    let done = st.submit(file, Purpose::BitmapLoad, Op::Read { at, buf: buf.clone() }).await;
    done.map_err(|source| Error::io("reading the image's bitmaps", source))?;
    Ok(buf.to_vec())
}

/// All bitmaps of an image, where they are valid.
async fn read(st: &dyn Storage, file: FileId, header: &Header) -> Result<Vec<Draft>> {
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 || header.bitmaps.is_empty() {
        return Ok(Vec::new());
    }
    let wrong = |kind| Error::corrupt("bitmap directory", kind);
    let cluster = header.geometry.cluster_size();
    let place = directory::place(&header.bitmaps, cluster).map_err(wrong)?;
    let bytes = read_at(st, file, place.at, place.len).await?;
    let entries = directory::parse(&bytes, place).map_err(wrong)?;
    let ends = entries.iter().skip(1).map(|entry| entry.start).chain([bytes.len()]);
    let mut drafts = Vec::new();
    let mut tables = 0;
    for (entry, end) in entries.iter().zip(ends) {
        let len = entry.table_entries * 8;
        tables += len;
        if tables > super::TABLES_LIMIT {
            return refuse("the tables of the image's bitmaps are too large".to_owned());
        }
        drafts.push(Draft {
            entry: bytes[entry.start..end].to_vec(),
            parsed: entry.clone(),
            table: Some(Table {
                at: entry.table_at,
                parts: read_table(st, file, cluster, entry).await?,
            }),
            bits: None,
        });
    }
    Ok(drafts)
}

/// The table of one bitmap, whose length was looked at.
pub(super) async fn read_table(
    st: &dyn Storage,
    file: FileId,
    cluster: u64,
    entry: &Entry,
) -> Result<Vec<Part>> {
    let words = read_at(st, file, entry.table_at, entry.table_entries * 8).await?;
    let parse = |index: u64| {
        let at = usize::try_from(index * 8).unwrap_or(usize::MAX);
        Part::parse(be64(&words, at).unwrap_or_default(), index, cluster)
    };
    let parts = (0..entry.table_entries).map(parse).collect::<std::result::Result<_, _>>();
    parts.map_err(|kind| Error::corrupt("bitmap directory", kind))
}

/// The bits of one bitmap as they are in the image.
async fn read_bits(st: &dyn Storage, file: FileId, header: &Header, draft: &Draft) -> Result<Bits> {
    let parts = draft.table.as_ref().map_or([].as_slice(), |table| &table.parts);
    read_parts(st, file, header, (&draft.parsed, parts)).await
}

/// The bits that a table leads to.
pub(super) async fn read_parts(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
    (entry, parts): (&Entry, &[Part]),
) -> Result<Bits> {
    let cluster = header.geometry.cluster_size();
    let bits = new_bits(header.size, entry.granularity_bits)?;
    if parts.len() as u64 != bits.clusters(cluster) {
        let name = &entry.name;
        return refuse(format!("the table of {name:?} does not fit the disk's size; remove it"));
    }
    for (number, part) in (0..).zip(parts) {
        match part {
            Part::Zeros => {}
            Part::Ones => bits.load(number, cluster, None),
            Part::At(at) => {
                let bytes = read_at(st, file, *at, cluster).await?;
                bits.load(number, cluster, Some(&bytes));
            }
        }
    }
    Ok(bits)
}

/// No bit set. A bitmap that could not be kept true afterwards is not made.
fn new_bits(size: u64, granularity_bits: u32) -> Result<Bits> {
    if bytes_of(size, granularity_bits) > MEMORY_LIMIT {
        let why = "the bitmap would take more than 64 MiB; give a larger granularity (-g)";
        return refuse(why.to_owned());
    }
    Ok(Bits::new(size, granularity_bits))
}

/// The granularity of a bitmap that is to be made, as log2 of bytes.
fn granularity_bits(asked: Option<u64>, cluster: u64) -> Result<u32> {
    let bytes = asked.unwrap_or_else(|| cluster.clamp(4096, 65536));
    if !bytes.is_power_of_two() || !GRANULARITIES.contains(&bytes.ilog2()) {
        let why = format!("a granularity of {bytes} bytes is no power of two from 512 to 2 GiB");
        return refuse(why);
    }
    Ok(bytes.ilog2())
}

impl Qcow2 {
    /// Makes changes of the image's bitmaps, all of them or none. Nothing else uses the image, and
    /// it is opened anew before it is written to.
    ///
    /// # Errors
    /// `Refused` with nothing changed when a change cannot be made; I/O errors and `Corrupt`, after
    /// which clusters may be counted too high.
    pub async fn edit_bitmaps(&mut self, st: &dyn Storage, edits: Vec<BitmapEdit>) -> Result<()> {
        if self.header.version < 3 {
            let why = "a version 2 image has no bitmaps; upgrade it with amend -o compat=1.1";
            return Err(Error::unsupported("bitmap", why));
        }
        self.settle(st).await?;
        if self.bitmaps.is_broken() {
            let why = "the image's bitmaps contradict themselves; check -r all makes them invalid";
            return refuse(why.to_owned());
        }
        let mut drafts = read(st, self.file, &self.header).await?;
        let old = drafts.iter().filter_map(|draft| draft.table.clone()).collect::<Vec<_>>();
        for edit in edits {
            self.apply_edit(st, &mut drafts, edit).await?;
        }
        let bytes: usize = drafts.iter().map(|draft| draft.entry.len()).sum();
        let count = u32::try_from(drafts.len()).unwrap_or(u32::MAX);
        if count > COUNT_LIMIT || bytes as u64 > DIRECTORY_LIMIT {
            return refuse("an image has at most 65535 bitmaps and a directory of 64 MiB".into());
        }
        self.begin_offline(st, Bytes::Kept).await?;
        let mut taken = Vec::new();
        match self.write_drafts(st, &mut drafts, &mut taken).await {
            Ok(extension) => self.switch_bitmaps(st, extension, &drafts, old, taken).await?,
            Err(error) => {
                self.give_back(taken);
                // The image is as it was; whether what was taken could be given back is no matter.
                let _ = self.end_offline(st).await;
                return Err(error);
            }
        }
        self.end_offline(st).await
    }

    async fn apply_edit(
        &self,
        st: &dyn Storage,
        drafts: &mut Vec<Draft>,
        edit: BitmapEdit,
    ) -> Result<()> {
        let (size, file) = (self.header.size, self.file);
        match edit {
            BitmapEdit::Add { name, granularity } => {
                if find(drafts, &name).is_ok() {
                    return refuse(format!("there is one called {name:?} already"));
                }
                if name.is_empty() || name.len() > NAME_LIMIT {
                    return refuse(format!("a name has 1 to {NAME_LIMIT} bytes"));
                }
                let granularity_bits = granularity_bits(granularity, self.cluster_size())?;
                let bits = new_bits(size, granularity_bits)?;
                let entries = bits.clusters(self.cluster_size());
                let entry = directory::new_entry(&name, granularity_bits, entries);
                let entry = entry.map_err(|kind| Error::corrupt("bitmap", kind))?;
                let (entry, parsed) = entry;
                drafts.push(Draft { entry, parsed, table: None, bits: Some(bits) });
            }
            BitmapEdit::Remove(name) => drop(drafts.remove(find(drafts, &name)?)),
            BitmapEdit::Clear(name) => {
                let draft = usable(drafts, &name)?;
                draft.bits = Some(new_bits(size, draft.parsed.granularity_bits)?);
            }
            BitmapEdit::Enable(name) => {
                directory::set_enabled(&mut usable(drafts, &name)?.entry, true);
            }
            BitmapEdit::Disable(name) => {
                directory::set_enabled(&mut usable(drafts, &name)?.entry, false);
            }
            BitmapEdit::Merge { name, source } => {
                let source = match source {
                    MergeSource::Loaded(loaded) => loaded,
                    MergeSource::Own(name) => {
                        let draft = usable(drafts, &name)?;
                        let bits = match &draft.bits {
                            Some(bits) => bits.copy(),
                            None => read_bits(st, file, &self.header, draft).await?,
                        };
                        LoadedBitmap { size, bits }
                    }
                };
                if source.size != size {
                    return refuse(format!(
                        "the disks have {size} and {} bytes: their bitmaps cannot be merged",
                        source.size
                    ));
                }
                let draft = usable(drafts, &name)?;
                let bits = match draft.bits.take() {
                    Some(bits) => bits,
                    None => read_bits(st, file, &self.header, draft).await?,
                };
                bits.merge(&source.bits);
                draft.bits = Some(bits);
            }
        }
        Ok(())
    }

    /// Writes new bits, new tables and the whole directory into new clusters; returns the bytes of
    /// the extension that names it, if any bitmap is left.
    async fn write_drafts(
        &self,
        st: &dyn Storage,
        drafts: &mut [Draft],
        taken: &mut Vec<Run>,
    ) -> Result<Option<Vec<u8>>> {
        for draft in drafts.iter_mut() {
            if let Some(bits) = &draft.bits {
                let table = self.write_bits(st, bits, taken).await?;
                directory::set_table(&mut draft.entry, 0, table.at);
                draft.table = Some(table);
            }
        }
        let bytes = drafts.iter().flat_map(|draft| draft.entry.iter().copied()).collect::<Vec<_>>();
        if bytes.is_empty() {
            return Ok(None);
        }
        let len = bytes.len() as u64;
        let at = self.place_table(st, Purpose::BitmapWrite, bytes).await?;
        taken.push(self.table_run(at, len));
        let count = u32::try_from(drafts.len()).expect("the limit was checked");
        Ok(Some(directory::extension(count, len, at)))
    }

    /// Lets the header name the new directory, and frees what only the old one named.
    async fn switch_bitmaps(
        &mut self,
        st: &dyn Storage,
        extension: Option<Vec<u8>>,
        drafts: &[Draft],
        old: Vec<Table>,
        taken: Vec<Run>,
    ) -> Result<()> {
        let cluster = self.cluster_size();
        let valid = self.header.autoclear & AUTOCLEAR_BITMAPS != 0;
        let place = directory::place(&self.header.bitmaps, cluster).ok().filter(|_| valid);
        let autoclear = match extension {
            Some(_) => FeatureBits { set: AUTOCLEAR_BITMAPS, clear: 0 },
            None => FeatureBits { set: 0, clear: AUTOCLEAR_BITMAPS },
        };
        let change =
            HeaderChange { bitmaps: Some(extension), autoclear, ..HeaderChange::default() };
        self.flush(st).await?;
        if let Err(error) = self.rewrite_header(st, &change).await {
            if matches!(error.kind(), Kind::Refused(_)) {
                self.give_back(taken);
                let _ = self.end_offline(st).await;
            }
            return Err(error);
        }
        // The next writer looks at the new ones.
        self.bitmaps = Bitmaps::None;
        if let Some(place) = place {
            self.forget_table(place.at, place.len);
        }
        let kept = |table: &Table| {
            let mut tables = drafts.iter().filter_map(|draft| draft.table.as_ref());
            table.parts.is_empty() || tables.any(|kept| kept.at == table.at)
        };
        old.iter().filter(|table| !kept(table)).for_each(|table| self.drop_table(table));
        Ok(())
    }

    fn table_run(&self, at: HostOffset, len: u64) -> Run {
        Run { first: self.geometry.host_cluster(at), count: len.div_ceil(self.cluster_size()) }
    }

    /// Frees clusters that nothing durable names.
    fn give_back(&self, taken: Vec<Run>) {
        taken.into_iter().for_each(|run| self.limbo.never_linked(run, self.epochs.now()));
    }
}

/// The bitmap of that name, when its bits are known and mean something.
fn usable<'a>(drafts: &'a mut [Draft], name: &str) -> Result<&'a mut Draft> {
    let draft = find(drafts, name)?;
    let draft = &mut drafts[draft];
    refuse_unusable(draft, name)?;
    Ok(draft)
}
