//! What is copied: one disk, or several one behind the other.

use crate::bytes::GuestOffset;
use crate::error::Result;
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::status::BlockMap;
use crate::storage::{Buf, Storage};

/// What becomes of a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// They are read and written.
    Data,
    /// They are zeros.
    Zero,
    /// The target's backing file has them.
    Below,
}

/// How much of the source is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// All layers; where none has anything there are zeros.
    Flat,
    /// The top layer: the target has a backing file with what is in those below.
    Top,
    /// Everything is data, whatever tables say.
    All,
}

/// Disks one behind the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disks<'a>(pub(super) &'a [Image]);

impl Disks<'_> {
    /// The size of all of them in bytes; `None` when it is larger than any disk can be.
    pub(super) fn size(&self) -> Option<u64> {
        let size = self.0.iter().try_fold(0_u64, |size, disk| size.checked_add(disk.size()));
        size.filter(|size| i64::try_from(*size).is_ok())
    }

    /// Fills `buf` with the bytes from `at` on.
    pub(super) async fn read(&self, st: &dyn Storage, at: u64, buf: &Buf) -> Result<()> {
        let (mut start, mut done) = (0, 0);
        for disk in self.0 {
            let here = at + done as u64;
            if done < buf.len() && here < start + disk.size() {
                let inside = start + disk.size() - here;
                let left = buf.len() - done;
                let len = usize::try_from(inside).map_or(left, |inside| inside.min(left));
                let part = if len == buf.len() { buf.clone() } else { buf.slice(done, len) };
                disk.read_into(st, GuestOffset(here - start), &part).await?;
                done += len;
            }
            start += disk.size();
        }
        Ok(())
    }
}

/// The map of disks one behind the other.
pub(super) struct Map<'a> {
    /// Each with where it starts.
    disks: Vec<(u64, BlockMap<'a>)>,
    scope: Scope,
    size: u64,
    /// The run that was looked up last: where it starts and ends, and what it is.
    run: Option<(u64, u64, Kind)>,
}

impl<'a> Map<'a> {
    pub(super) async fn new(st: &dyn Storage, disks: Disks<'a>, scope: Scope) -> Result<Self> {
        let (mut all, mut size) = (Vec::new(), 0);
        for disk in disks.0 {
            all.push((size, BlockMap::new(st, disk).await?));
            size += disk.size();
        }
        Ok(Self { disks: all, scope, size, run: None })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// What the bytes from `at` on are, in whole units of `unit` bytes: units that hold some of
    /// each are data. `at` is a multiple of the unit inside the disk; the last unit may be shorter.
    pub(super) async fn units(
        &mut self,
        st: &dyn Storage,
        at: u64,
        unit: u64,
    ) -> Result<(Kind, u64)> {
        let (kind, end) = self.run(st, at).await?;
        if kind != Kind::Data && (end == self.size || end - at >= unit) {
            let end = if end == self.size { end } else { end - end % unit };
            return Ok((kind, end - at));
        }
        let end = (end.div_ceil(unit) * unit).min(self.size);
        Ok((Kind::Data, end - at))
    }

    /// What the byte at `at` is, and where its run ends.
    async fn run(&mut self, st: &dyn Storage, at: u64) -> Result<(Kind, u64)> {
        match self.run {
            Some((start, end, kind)) if (start..end).contains(&at) => Ok((kind, end)),
            _ => {
                let (kind, len) = self.status(st, at).await?;
                self.run = Some((at, at + len, kind));
                Ok((kind, at + len))
            }
        }
    }

    async fn status(&self, st: &dyn Storage, at: u64) -> Result<(Kind, u64)> {
        if self.scope == Scope::All {
            return Ok((Kind::Data, self.size - at));
        }
        let place = self.disks.partition_point(|(start, _)| *start <= at).saturating_sub(1);
        // Of several that start at one byte, all but the last are empty.
        let (start, disk) = &self.disks[place];
        let left = start + disk.size() - at;
        let status = disk.status(st, GuestOffset(at - start), left).await?;
        // Behind the end of the backing file there are zeros, also in an image that has none.
        let backing = disk.image().chain.0.get(1).map_or(0, Layer::size);
        let beneath = (status.depth > 0 || !status.present) && at - start < backing;
        let below = self.scope == Scope::Top && beneath;
        let kind = match (below, status.zero) {
            (true, _) => Kind::Below,
            (false, true) => Kind::Zero,
            (false, false) => Kind::Data,
        };
        Ok((kind, status.len))
    }
}
