//! Bitmaps read one by one from a directory that is read once, to be copied.

use crate::error::{Error, Result};
use crate::qcow2::bitmap::bits::bytes_of;
use crate::qcow2::bitmap::directory::Entry;
use crate::qcow2::bitmap::edit::{GRANULARITIES, LoadedBitmap, read_parts, read_table};
use crate::qcow2::bitmap::{BitmapFacts, MEMORY_LIMIT, TABLES_LIMIT, read_entries};
use crate::qcow2::header::Header;
use crate::storage::{FileId, Storage};

/// A bitmap as the directory of an image names it.
#[derive(Debug, Clone)]
pub struct StoredBitmap {
    entry: Entry,
}

/// The bitmaps of the image in `file`, as [`read_bitmaps`](super::read_bitmaps).
///
/// # Errors
/// As [`read_bitmaps`](super::read_bitmaps).
pub async fn stored_bitmaps(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
) -> Result<Vec<StoredBitmap>> {
    let entries = read_entries(st, file, header).await?;
    Ok(entries.into_iter().map(|entry| StoredBitmap { entry }).collect())
}

impl StoredBitmap {
    /// What the directory says.
    pub fn facts(&self) -> BitmapFacts {
        self.entry.facts()
    }

    /// Bytes that reading all of it takes: its table, and the bits of a disk of `size` bytes.
    pub fn cost(&self, size: u64) -> u64 {
        self.entry.table_entries * 8 + bytes_of(size, self.entry.granularity_bits)
    }

    /// Why it cannot be used, or none like it be made for a disk of `size` bytes, if so.
    pub fn obstacle(&self, size: u64) -> Option<&'static str> {
        if self.entry.facts().in_use {
            Some("it is inconsistent, since it was in use when a program died")
        } else if let Some(why) = self.entry.obstacle() {
            Some(why)
        } else if self.entry.renamed {
            Some("its name is no UTF-8")
        } else if !GRANULARITIES.contains(&self.entry.granularity_bits) {
            Some("its granularity is not from 512 bytes to 2 GiB")
        } else if bytes_of(size, self.entry.granularity_bits) > MEMORY_LIMIT
            || self.entry.table_entries * 8 > TABLES_LIMIT
        {
            Some("it is larger than 64 MiB")
        } else {
            None
        }
    }

    /// Its bits.
    ///
    /// # Errors
    /// `Refused` with why it cannot be used, or not be made anew elsewhere; I/O errors and
    /// `Corrupt`.
    pub async fn load(
        &self,
        st: &dyn Storage,
        file: FileId,
        header: &Header,
    ) -> Result<LoadedBitmap> {
        if let Some(why) = self.obstacle(header.size) {
            return Err(Error::refused("bitmap", why));
        }
        let table = read_table(st, file, header.geometry.cluster_size(), &self.entry).await?;
        let bits = read_parts(st, file, header, (&self.entry, &table)).await?;
        Ok(LoadedBitmap { size: header.size, bits })
    }
}
