//! Whether the refcounts of an image can be relied on: before an operation that lowers many of
//! them, or that cuts off what they call free.
//!
//! COPIED flags do not matter here, nor does what is counted too high: a power cut leaves such
//! things, and lowering a refcount makes nothing worse then.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeSet;

use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::check::references::References;
use crate::qcow2::check::target::Target;
use crate::qcow2::check::walk::{View, Walk};
use crate::qcow2::check::{MEMORY, survey};
use crate::storage::{FileId, Storage};

/// What the references in a whole image say about its refcounts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::qcow2) struct Counted {
    /// The lowest place of a cluster that is referred to more often than its refcount says.
    low: Option<u64>,
    /// The end in bytes of the last cluster that anything refers to.
    end: u64,
}

impl Counted {
    /// Looks at the cluster at `at`, which has that refcount and so many references.
    pub(super) fn look(&mut self, at: u64, len: u64, count: u64, references: u64) {
        if references > 0 {
            self.end = self.end.max(at.saturating_add(len));
        }
        if count < references {
            self.low = Some(self.low.map_or(at, |low| low.min(at)));
        }
    }

    /// The end in bytes of the last cluster that anything refers to.
    pub(in crate::qcow2) fn end(&self) -> u64 {
        self.end
    }

    /// Refuses to lower refcounts of which one is too low already.
    ///
    /// # Errors
    /// `Corrupt` with the place.
    pub(in crate::qcow2) fn refuse_low(&self) -> Result<()> {
        match self.low {
            None => Ok(()),
            Some(at) => Err(Error::corrupt("refcounts", CorruptKind::RefcountLow(at))),
        }
    }
}

/// Counts all references in the image in `file`, which does not change meanwhile, and compares them
/// with the refcounts in the file. Memory and time are bounded as for a check.
///
/// # Errors
/// When the header cannot be used, or there are more tables than a check looks at; `Refused` when
/// not everything can be read that the image refers to.
pub(in crate::qcow2) async fn counted(st: &dyn Storage, file: FileId) -> Result<Counted> {
    let target = Target::load(st, "counting references", file).await?;
    let found = survey(&target, MEMORY).await?;
    if found.report.check_errors == 0 {
        return Ok(found.counted);
    }
    let finding = found.report.findings.last().map_or("", String::as_str);
    let why = format!(
        "not everything that the image refers to can be read ({finding}), so nothing can be freed; \
         see qemu-img check"
    );
    Err(Error::refused("refcounts", why))
}

/// The place of the first of some clusters of the image in `file` that anything refers to. Nothing
/// changes meanwhile. Memory and time are bounded as for a check.
///
/// # Errors
/// When the header cannot be used, there are more tables than a check looks at, or not everything
/// can be read that the image refers to.
pub(in crate::qcow2) async fn referred(
    st: &dyn Storage,
    file: FileId,
    clusters: &BTreeSet<u64>,
) -> Result<Option<u64>> {
    let target = Target::load(st, "counting references", file).await?;
    let mut first = 0;
    while first < u64::MAX {
        let mut references = References::new(first, MEMORY);
        Walk::new(&target, View::AS_IS, &mut references).count().await?;
        let window = references.window();
        let hit = clusters.range(window.clone()).find(|at| references.get(**at).references > 0);
        if let Some(&cluster) = hit {
            return Ok(Some(cluster.saturating_mul(target.cluster_size())));
        }
        first = window.end;
    }
    Ok(None)
}
