//! What can be changed of an image's header while nothing else uses the image: its version, lazy
//! refcounts, and the names and formats of the files it refers to.

use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{
    AUTOCLEAR_BITMAPS, COMPATIBLE_LAZY_REFCOUNTS, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
};
use crate::qcow2::offline::Bytes;
use crate::qcow2::rewrite::{Bits, HeaderChange};
use crate::storage::Storage;

/// What is changed of an image; `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amend {
    /// The format's version, 2 or 3.
    pub version: Option<u32>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// The name of the backing file, as it is recorded; an empty one for none.
    pub backing: Option<String>,
    /// The format of the backing file, as it is recorded.
    pub backing_format: Option<String>,
    /// The name of the external data file, which the image must have, as it is recorded.
    pub data_file: Option<String>,
}

fn refuse<T>(why: &str) -> Result<T> {
    Err(Error::refused("amend", why))
}

impl Qcow2 {
    /// Whether the image can have a backing file.
    ///
    /// # Errors
    /// `Refused` when its data file holds the whole disk by itself.
    pub fn check_backing(&self, wanted: bool) -> Result<()> {
        if wanted && self.header.is_raw_data() {
            let why = "its data file is a raw image of the whole disk, so that there can be no \
                       backing file";
            return Err(Error::refused("rebase", why));
        }
        Ok(())
    }

    /// From now on what is not allocated counts as what a layer below holds, also without one.
    pub(crate) fn set_backed(&mut self) {
        self.backed = true;
    }

    /// Records another backing file, durably; what it is and what the disk holds then is up to the
    /// caller. Nothing else uses the image, which is opened anew before it is written to.
    ///
    /// # Errors
    /// `Refused`, with nothing changed, when the first cluster has no room for the name; I/O
    /// errors, after which the image has one of the two.
    pub async fn set_backing(
        &mut self,
        st: &dyn Storage,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        let owned = |text: Option<&str>| Some(text.map(str::to_owned));
        let change = HeaderChange {
            backing: owned(name),
            backing_format: owned(format),
            ..HeaderChange::default()
        };
        self.settle(st).await?;
        self.change_header(st, &change).await
    }

    /// Changes the header between a beginning and an end with everything durable.
    async fn change_header(&mut self, st: &dyn Storage, change: &HeaderChange) -> Result<()> {
        self.begin_offline(st, Bytes::Kept).await?;
        let changed = self.rewrite_header(st, change).await;
        let ended = self.end_offline(st).await;
        changed.and(ended)
    }

    /// Whether the image can be changed so; for version 2 all clusters of zeros have to be made
    /// into something else before [`Qcow2::amend`].
    ///
    /// # Errors
    /// `Refused` with what is in the way and what would help.
    pub fn check_amend(&self, amend: &Amend) -> Result<()> {
        self.check_amend_after(amend, self.geometry.refcount_order)
    }

    /// As [`Qcow2::check_amend`], when refcounts have become `1 << order` bits wide.
    ///
    /// # Errors
    /// As [`Qcow2::check_amend`].
    pub fn check_amend_after(&self, amend: &Amend, order: u32) -> Result<()> {
        let version = amend.version.unwrap_or(self.header.version);
        if version < 3 && amend.lazy_refcounts == Some(true) {
            return refuse("lazy refcounts need version 3 (compat=1.1)");
        }
        if amend.data_file.is_some() && !self.has_data_file() {
            return refuse("the image has no external data file whose name could be changed");
        }
        let named = amend.backing.as_deref().is_some_and(|name| !name.is_empty());
        self.check_backing(named)?;
        let stays = amend.backing.is_none() && self.header.backing.is_some();
        if amend.backing_format.is_some() && !named && !stays {
            return refuse("there is no backing file whose format could be recorded");
        }
        if version == 3 || self.header.version == 2 {
            return Ok(());
        }
        let needs = [
            (INCOMPATIBLE_DATA_FILE, "that there is an external data file"),
            (INCOMPATIBLE_COMPRESSION, "that clusters are compressed by zstd"),
            (INCOMPATIBLE_EXTENDED_L2, "that L2 entries are extended"),
        ];
        for (bit, what) in needs {
            if self.header.incompatible & bit != 0 {
                let why = format!("version 2 (compat=0.10) cannot say {what}; convert the image");
                return Err(Error::refused("amend", why));
            }
        }
        if order != 4 {
            return refuse("version 2 (compat=0.10) has refcounts of 16 bits; convert the image");
        }
        if self.header.snapshots > 0 {
            return refuse(
                "an image with internal snapshots keeps its version: version 2 (compat=0.10) \
                 could not hold all of them; delete them first",
            );
        }
        if self.header.autoclear & AUTOCLEAR_BITMAPS != 0 && !self.header.bitmaps.is_empty() {
            return refuse("version 2 (compat=0.10) has no bitmaps; remove them first");
        }
        Ok(())
    }

    /// Changes the header. Nothing else uses the image, which is opened anew before it is written
    /// to.
    ///
    /// # Errors
    /// As [`Qcow2::check_amend`] and [`Qcow2::set_backing`].
    pub async fn amend(&mut self, st: &dyn Storage, amend: &Amend) -> Result<()> {
        self.check_amend(amend)?;
        self.settle(st).await?;
        let version = amend.version.unwrap_or(self.header.version);
        if version > self.header.version {
            self.complete_snapshots(st).await?;
        }
        let named = |name: &String| Some(name.clone()).filter(|name| !name.is_empty());
        let lazy = COMPATIBLE_LAZY_REFCOUNTS;
        let mut change = HeaderChange {
            version: amend.version,
            backing: amend.backing.as_ref().map(named),
            backing_format: amend.backing_format.as_ref().map(named),
            data_file: amend.data_file.clone(),
            compatible: match amend.lazy_refcounts {
                None => Bits::default(),
                Some(true) => Bits { set: lazy, clear: 0 },
                Some(false) => Bits { set: 0, clear: lazy },
            },
            ..HeaderChange::default()
        };
        if change.backing == Some(None) {
            change.backing_format = Some(None);
        }
        if version < 3 {
            change.bitmaps = Some(None);
        }
        self.change_header(st, &change).await
    }
}
