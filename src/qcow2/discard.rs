//! Discard and write-zeroes: changes of the mapping that move no guest bytes.

use smallvec::SmallVec;

use crate::bytes::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::format::{COPIED, Cluster, OFFSET_MASK, ZERO};
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

    /// Erases the whole clusters from `at` on, at most `len` bytes of them; both are multiples of
    /// the cluster size, or `len` ends with the disk. Returns how many bytes were handled.
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
        let in_slice = (self.geometry.slice_size() >> 3) - self.geometry.l2_slot(first) as u64;
        let count = len.div_ceil(1 << bits).min(in_slice);
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
        let new: SmallVec<[u64; 16]> =
            old.iter().zip(0..).map(|(old, step)| self.erased(*old, step, first, how)).collect();
        if self.has_data_file() {
            self.zero_data_file(st, first, &old, how).await?;
        }
        let entry = |step: u64| new[usize::try_from(step).expect("a run fits in a slice")];
        self.set_entries(st, first, count, entry).await?;
        let unlinked = old.iter().zip(&new).filter(|(_, new)| *new & OFFSET_MASK == 0);
        let gone: SmallVec<[Cluster; 16]> = unlinked.map(|(old, _)| *old).collect();
        self.drop_references(&gone, None);
        Ok(handled)
    }

    /// The new entry of one cluster.
    fn erased(&self, old: Cluster, step: u64, first: GuestCluster, how: Erase) -> u64 {
        let bits = self.geometry.cluster_bits;
        let own = match old {
            Cluster::Data { at, copied: true } | Cluster::ZeroAllocated { at, copied: true } => {
                Some(at.0)
            }
            _ => None,
        };
        if self.header.is_raw_data() {
            // A raw data file keeps its one-to-one mapping; its bytes are zeroed as well.
            return (first.0 + step) << bits | COPIED | ZERO;
        }
        match (how, own) {
            (Erase::Zero { unmap: false }, Some(at)) if self.header.version >= 3 => {
                at | COPIED | ZERO
            }
            _ if self.header.version < 3 => 0,
            // Version 3 can say "zeros" without a cluster, whatever lies below.
            (Erase::Discard, _) if !self.backed => 0,
            _ if old == Cluster::Unallocated && (how == Erase::Discard || !self.backed) => 0,
            _ => ZERO,
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
        let allocated = |cluster: &Cluster| {
            raw || matches!(cluster, Cluster::Data { .. } | Cluster::ZeroAllocated { .. })
        };
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
