//! Compressed clusters on their way into the file: where their bytes go, and linking them.
//!
//! Compressed data are packed byte by byte, one behind the other, into clusters that the packer
//! holds. What is handed out is never handed out again while anything refers to its cluster, so a
//! write beside older data changes none of their bytes; that the sector which both share is written
//! as a whole, and by one of them at a time, is the kernel's work, or that of the engine for direct
//! I/O, as for any two writers. Where the file takes blocks only, compressed data begin and end
//! with a block, so that nothing must be read in order to write.
//!
//! The packer itself counts as one reference to each cluster that it holds: the cluster cannot be
//! freed while more may be packed into it. The last compressed cluster in it takes that over; what
//! a crash leaves of it is a leak.

use crate::bytes::{GuestOffset, HostOffset, round_up};
use crate::error::Result;
use crate::qcow2::Qcow2;
use crate::qcow2::claims::{Claim, Claims};
use crate::qcow2::format::{COMPRESSED, Cluster, Compressed, L2Entry};
use crate::qcow2::geometry::GuestCluster;
use crate::qcow2::refcount::Run;
use crate::storage::{FileId, Storage};
use crate::sync::{Mutex, lock};

/// Bytes of clusters that the packer takes at once, so that others who allocate do not come
/// between two of them too often.
const HELD_BYTES: u64 = 256 << 10;

/// Clusters that are being filled with compressed data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tail {
    /// The next free byte.
    at: u64,
    /// The end of the clusters held.
    end: u64,
    /// How many compressed clusters began or ended in the cluster of `at`, beside the packer.
    references: u64,
}

/// Room for compressed data in the clusters held.
#[derive(Debug, PartialEq, Eq)]
struct Room {
    at: u64,
    /// The cluster that gets one more reference; the packer's own serves for all others.
    shared: Option<u64>,
    rest: Option<Tail>,
}

impl Tail {
    /// A run of clusters that holds nothing yet.
    fn new(run: Run, cluster_bits: u32) -> Self {
        Self { at: run.first.0 << cluster_bits, end: run.end() << cluster_bits, references: 0 }
    }

    /// The clusters that are still held.
    fn held(&self, cluster_bits: u32) -> Run {
        let first = self.at >> cluster_bits;
        Run::new(first, (self.end >> cluster_bits) - first)
    }

    /// Room for `len` bytes, less than a cluster and more than none, in blocks of `block` bytes,
    /// where no refcount may exceed `most`, which is two or more.
    fn room(&self, len: u64, cluster_bits: u32, block: u64, most: u64) -> Option<Room> {
        let end = self.at + len;
        if end > self.end {
            return None;
        }
        let (first, last) = (self.at >> cluster_bits, (end - 1) >> cluster_bits);
        let references = if first == last { self.references + 1 } else { 1 };
        let next = round_up(end, block);
        let stays = next >> cluster_bits == last && references < most;
        let tail = if stays {
            Self { at: next, end: self.end, references }
        } else {
            Self { at: (last + 1) << cluster_bits, end: self.end, references: 0 }
        };
        let rest = (tail.at < tail.end).then_some(tail);
        Some(Room { at: self.at, shared: stays.then_some(last), rest })
    }
}

/// Finds places for compressed data, one after the other.
#[derive(Debug, Default)]
pub(super) struct Packer {
    /// One task at a time looks for a place.
    turn: Claims,
    tail: Mutex<Option<Tail>>,
}

/// Room for one compressed cluster, claimed and not yet linked.
#[must_use = "bytes are reachable only after commit_compressed"]
pub(crate) struct CompressedPlan<'a> {
    image: &'a Qcow2,
    _claim: Claim<'a>,
    cluster: GuestCluster,
    entry: u64,
    place: Compressed,
    old: Cluster,
    linked: bool,
}

impl CompressedPlan<'_> {
    /// The file to write to.
    pub(crate) fn target(&self) -> FileId {
        self.image.file
    }

    /// Where the compressed bytes go.
    pub(crate) fn at(&self) -> HostOffset {
        self.place.at
    }
}

impl Drop for CompressedPlan<'_> {
    fn drop(&mut self) {
        if !self.linked {
            let run = touched(self.place.at.0, self.place.bytes, self.image.geometry.cluster_bits);
            self.image.limbo.never_linked(run, self.image.epochs.now());
        }
    }
}

/// The host clusters that a range of bytes touches.
fn touched(at: u64, len: u64, cluster_bits: u32) -> Run {
    let first = at >> cluster_bits;
    Run::new(first, ((at + len - 1) >> cluster_bits) - first + 1)
}

/// The L2 entry of `len` compressed bytes at `at`, and what it says; `None` when the entry cannot
/// hold so large an offset ("Compressed Clusters Descriptor").
fn describe(at: u64, len: u64, cluster_bits: u32) -> Option<(u64, Compressed)> {
    let offset_bits = 70 - cluster_bits;
    let sectors = ((at + len - 1) >> 9) - (at >> 9);
    let bytes = (sectors + 1) * 512 - at % 512;
    let entry = COMPRESSED | sectors << offset_bits | at;
    (at >> offset_bits == 0).then_some((entry, Compressed { at: HostOffset(at), bytes }))
}

impl Qcow2 {
    /// The unit in which compressed data can be written, in bytes; `None` when this image cannot
    /// hold compressed clusters, or gains nothing by them: where a refcount is one at most, each
    /// would need clusters of its own.
    pub(crate) fn compressed_block(&self, st: &dyn Storage) -> Option<u64> {
        let block = u64::from(st.limits(self.file).request_alignment);
        let shares = !self.has_data_file() && self.geometry.refcount_order > 0;
        (shares && block < self.geometry.cluster_size()).then_some(block)
    }

    /// Finds room for `len` compressed bytes of the cluster at `at`, less than a cluster and whole
    /// blocks, and keeps other writers away from it. `None`: it is to be written plainly, since it
    /// can be written in place, or there is no room for compressed data.
    ///
    /// # Errors
    /// As [`Qcow2::prepare_write`].
    pub(crate) async fn prepare_compressed(
        &self,
        st: &dyn Storage,
        at: GuestOffset,
        len: u64,
    ) -> Result<Option<CompressedPlan<'_>>> {
        self.start_writing(st).await?;
        self.relieve(st).await?;
        let cluster = self.geometry.guest_cluster(at);
        let claim = self.clusters.claim(cluster.0..cluster.0 + 1).await;
        self.own_table(st, cluster).await?;
        let old = self.old_clusters(st, cluster, 1).await?[0];
        if old.own().is_some() {
            return Ok(None);
        }
        let bits = self.geometry.cluster_bits;
        let at = self.pack(st, len).await?;
        let Some((entry, place)) = describe(at, len, bits) else {
            self.limbo.never_linked(touched(at, len, bits), self.epochs.now());
            return Ok(None);
        };
        let (image, linked) = (self, false);
        Ok(Some(CompressedPlan { image, _claim: claim, cluster, entry, place, old, linked }))
    }

    /// Links a compressed cluster whose bytes are written. What it replaced goes to limbo.
    ///
    /// # Errors
    /// When the table cannot be read any more; then nothing was linked.
    pub(crate) async fn commit_compressed(
        &self,
        st: &dyn Storage,
        mut plan: CompressedPlan<'_>,
    ) -> Result<()> {
        let Compressed { at, bytes } = plan.place;
        // Nothing that the entry of a compressed cluster can say is longer than two clusters.
        let longest = 2 * self.geometry.cluster_size();
        self.inflated.forget(self.file, at.0..at.0 + bytes, longest);
        // No subcluster of a compressed cluster has a bit of its own.
        let entry = L2Entry { word: plan.entry, bitmap: 0 };
        self.set_entries(st, plan.cluster, 1, |_| entry).await?;
        plan.linked = true;
        self.drop_references(&[plan.old], None);
        Ok(())
    }

    /// Counts and hands out room for `len` compressed bytes.
    async fn pack(&self, st: &dyn Storage, len: u64) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let block = u64::from(st.limits(self.file).request_alignment);
        let most = match self.geometry.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        };
        let _turn = self.packer.turn.claim(0..1).await;
        let tail = *lock(&self.packer.tail);
        let room = match tail.and_then(|tail| tail.room(len, bits, block, most)) {
            Some(room) => room,
            None => {
                let tail = self.hold_more(st, tail).await?;
                tail.room(len, bits, block, most).expect("a cluster more than before")
            }
        };
        if let Some(cluster) = room.shared {
            self.refcounts.adjust(st, Run::new(cluster, 1), true).await?;
        }
        *lock(&self.packer.tail) = room.rest;
        Ok(room.at)
    }

    /// Takes more clusters; if they do not follow those that are held, the rest of these is given
    /// back. The caller has the packer's turn.
    async fn hold_more(&self, st: &dyn Storage, tail: Option<Tail>) -> Result<Tail> {
        let bits = self.geometry.cluster_bits;
        let run = self.allocate(st, (HELD_BYTES >> bits).max(1)).await?.run;
        let more = Tail::new(run, bits);
        let tail = match tail {
            Some(tail) if tail.end == more.at => Tail { end: more.end, ..tail },
            _ => {
                self.release_packer();
                more
            }
        };
        *lock(&self.packer.tail) = Some(tail);
        Ok(tail)
    }

    /// Gives back what the packer holds and has not handed out. Nobody may have its turn but the
    /// caller.
    pub(super) fn release_packer(&self) {
        if let Some(tail) = lock(&self.packer.tail).take() {
            let held = tail.held(self.geometry.cluster_bits);
            self.limbo.never_linked(held, self.epochs.now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::format::EntryRules;

    /// Packs lengths into a run of clusters of 4 KiB from cluster 10 on; returns the places, and
    /// the references counted for each cluster, the packer's included.
    fn pack(lengths: &[u64], clusters: u64, block: u64, most: u64) -> (Vec<u64>, Vec<u64>) {
        let mut counts = vec![1; usize::try_from(clusters).expect("few")];
        let mut tail = Some(Tail::new(Run::new(10, clusters), 12));
        let mut places = Vec::new();
        for &len in lengths {
            let Some(room) = tail.and_then(|tail| tail.room(len, 12, block, most)) else { break };
            if let Some(cluster) = room.shared {
                counts[usize::try_from(cluster - 10).expect("few")] += 1;
            }
            places.push(room.at - (10 << 12));
            tail = room.rest;
        }
        if let Some(tail) = tail {
            let held = tail.held(12);
            for cluster in held.first.0..held.end() {
                counts[usize::try_from(cluster - 10).expect("few")] -= 1;
            }
        }
        (places, counts)
    }

    #[test]
    fn every_cluster_is_counted_as_often_as_it_is_referred_to() {
        let mut random = fastrand::Rng::with_seed(1);
        for most in [3, 15, 255] {
            for block in [1, 512] {
                let count = random.usize(0..60);
                let mut draw = || round_up(random.u64(1..4096 - 512), block);
                let lengths: Vec<u64> = (0..count).map(|_| draw()).collect();
                let (places, counts) = pack(&lengths, 20, block, most);
                let mut expected = vec![0; 20];
                let mut end = 0;
                for (&at, &len) in places.iter().zip(&lengths) {
                    assert!(at >= end && at % block == 0, "{at} after {end}");
                    end = at + len;
                    for cluster in at / 4096..=(end - 1) / 4096 {
                        expected[usize::try_from(cluster).expect("few")] += 1;
                    }
                }
                assert_eq!(counts, expected, "most {most} block {block}");
                assert!(counts.iter().all(|&count| count <= most));
            }
        }
    }

    #[test]
    fn a_full_count_ends_a_cluster_early() {
        let (places, counts) = pack(&[100; 7], 3, 1, 3);
        assert_eq!(places, [0, 100, 200, 4096, 4196, 4296, 8192]);
        assert_eq!(counts, [3, 3, 1]);
    }

    #[test]
    fn descriptors_read_back_as_they_were_written() {
        for cluster_bits in [9, 12, 16, 21] {
            let rules = EntryRules { cluster_bits, version: 3, data_file: false, extended: false };
            for at in [0, 1, 511, 512, 0x1_2345_6789] {
                for len in [1, 2, 511, (1 << cluster_bits) - 1] {
                    let (entry, place) = describe(at, len, cluster_bits).expect("it fits");
                    let read = rules.parse(L2Entry { word: entry, bitmap: 0 }, GuestOffset(0));
                    assert_eq!(read, Ok(Cluster::Compressed(place)));
                    assert!(place.bytes >= len && place.bytes < len + 512);
                    assert_eq!((place.at.0 + place.bytes) % 512, 0);
                }
            }
        }
        assert!(describe(1 << 49, 1, 21).is_none(), "more than 512 TiB");
    }
}
