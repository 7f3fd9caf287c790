//! Discard and write-zeroes: changes of the mapping that move no guest bytes.

use smallvec::SmallVec;

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{COPIED, Cluster, L2Entry, OFFSET_MASK};
use crate::qcow2::geometry::GuestCluster;
use crate::storage::{Op, Purpose, Storage};

/// What a range of whole clusters shall become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Erase {
    /// The guest needs the bytes no more.
    Discard,
    /// The bytes are zeros; `unmap` says that the host's space may go.
    Zero {
        /// Whether the host's space may be given back.
        unmap: bool,
    },
}

impl Qcow2 {
    /// Whether [`Qcow2::erase`] can make whole clusters read as zeros: version 2 has no zero flag,
    /// so there only an unbacked cluster can, by being unallocated.
    pub(crate) fn can_zero(&self, unmap: bool) -> bool {
        self.header.version >= 3 || (!self.backed && unmap)
    }

    /// The unit in bytes in which [`Qcow2::erase`] makes zeros: a cluster, or a subcluster.
    pub(crate) fn zero_granularity(&self) -> u64 {
        1 << self.geometry.fill_bits()
    }

    /// Erases from `at` on, at most `len` bytes; both are multiples of the cluster size, or of
    /// [`Qcow2::zero_granularity`] for zeros, or `len` ends with the disk. Returns how many bytes
    /// were handled; 0 when the cluster's first bytes can only become zeros by being written.
    ///
    /// # Errors
    /// As [`Qcow2::prepare_write`].
    pub(crate) async fn erase(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
        how: Erase,
    ) -> Result<u64> {
        self.start_writing(st).await?;
        self.relieve(st).await?;
        let bits = self.geometry.cluster_bits;
        let first = self.geometry.guest_cluster(at);
        let within = at.within(1 << bits);
        if within + len < 1 << bits && at.0 + len < self.size() || within > 0 {
            let end = (within + len).min(1 << bits);
            return self.erase_part(st, first, (within, end), how).await;
        }
        let count = len.div_ceil(1 << bits).min(self.entries_from(first));
        // The last cluster may be wanted in part, and not be the disk's last.
        let whole = if at.0 + len < self.size() { len >> bits } else { count };
        let count = count.min(whole);
        let handled = len.min(count << bits);
        if how == Erase::Discard && self.header.version < 3 && self.backed {
            // Dropping the cluster would bring the backing file's old bytes back.
            return Ok(handled);
        }
        let nothing_there = self.l1_entry(first)?.1.is_none();
        if nothing_there && (how == Erase::Discard || !self.backed) {
            return Ok(handled);
        }
        let _claim = self.clusters.claim(first.0..first.0 + count).await;
        self.own_table(st, first).await?;
        let old = self.old_clusters(st, first, count).await?;
        let new: SmallVec<[L2Entry; 16]> =
            old.iter().zip(0..).map(|(old, step)| self.erased(*old, step, first, how)).collect();
        if self.has_data_file() {
            self.zero_data_file(st, first, &old, how).await?;
        }
        let entry = |step: u64| new[usize::try_from(step).expect("a run fits in a slice")];
        self.set_entries(st, first, count, entry).await?;
        let unlinked = old.iter().zip(&new).filter(|(_, new)| new.word & OFFSET_MASK == 0);
        let gone: SmallVec<[Cluster; 16]> = unlinked.map(|(old, _)| *old).collect();
        self.drop_references(&gone, None);
        Ok(handled)
    }

    /// Makes subclusters of one cluster zeros. A discard of less than a cluster has no effect.
    async fn erase_part(
        &self,
        st: &dyn Storage,
        cluster: GuestCluster,
        (begin, end): (u64, u64),
        how: Erase,
    ) -> Result<u64> {
        let handled = end - begin;
        let Erase::Zero { unmap } = how else { return Ok(handled) };
        if self.header.is_raw_data() {
            return Ok(0);
        }
        if self.l1_entry(cluster)?.1.is_none() && !self.backed {
            return Ok(handled);
        }
        let _claim = self.clusters.claim(cluster.0..cluster.0 + 1).await;
        self.own_table(st, cluster).await?;
        let old = self.old_clusters(st, cluster, 1).await?[0];
        let word = old.host().map_or(0, |at| at.0 | if old.own().is_some() { COPIED } else { 0 });
        let units = self.geometry.units();
        // The disk's last subcluster may be wanted up to the disk's end only.
        let erased = units.touched(begin, end);
        let drop = unmap && !self.has_data_file();
        let Some(new) = units.partly_zero(old, word, erased, drop) else { return Ok(0) };
        self.set_entries(st, cluster, 1, |_| new).await?;
        if new.word == 0 {
            self.drop_references(&[old], None);
        }
        Ok(handled)
    }

    /// The new entry of one cluster.
    fn erased(&self, old: Cluster, step: u64, first: GuestCluster, how: Erase) -> L2Entry {
        let (bits, units) = (self.geometry.cluster_bits, self.geometry.units());
        if self.header.is_raw_data() {
            // A raw data file keeps its one-to-one mapping; its bytes are zeroed as well.
            return units.zero((first.0 + step) << bits | COPIED);
        }
        match (how, old.own()) {
            (Erase::Zero { unmap: false }, Some(at)) if self.header.version >= 3 => {
                units.zero(at.0 | COPIED)
            }
            _ if self.header.version < 3 => L2Entry::default(),
            // Version 3 can say "zeros" without a cluster, whatever lies below.
            (Erase::Discard, _) if !self.backed => L2Entry::default(),
            _ if old == Cluster::Unallocated && (how == Erase::Discard || !self.backed) => {
                L2Entry::default()
            }
            _ => units.zero(0),
        }
    }

    /// In an external data file a cluster has one place only: its space is given back before the
    /// entry changes, while the claim keeps writers away.
    async fn zero_data_file(
        &self,
        st: &dyn Storage,
        first: GuestCluster,
        old: &[Cluster],
        how: Erase,
    ) -> Result<()> {
        let raw = self.header.is_raw_data();
        let unmap = how != Erase::Zero { unmap: false };
        if !raw && !unmap {
            return Ok(());
        }
        let allocated = |cluster: &Cluster| raw || cluster.host().is_some();
        let mut step = 0;
        while step < old.len() {
            let run = old[step..].iter().take_while(|cluster| allocated(cluster)).count();
            if run > 0 {
                let start = self.geometry.guest_start(GuestCluster(first.0 + step as u64)).0;
                let len = ((run as u64) << self.geometry.cluster_bits)
                    .min(self.header.size.saturating_sub(start));
                let op = Op::Zero { at: HostOffset(start), len, unmap };
                let done = st.submit(self.data, Purpose::GuestZero, op).await;
                self.mark_dirty(self.data);
                done.map_err(|source| Error::io("zeroing the data file", source))?;
            }
            step += run.max(1);
        }
        Ok(())
    }
}
