//! How many references there are to each host cluster, in bounded memory.
//!
//! Counts are kept for a window of the file: sixteen bits for each cluster, in leaves of 4096
//! clusters that exist only where something refers to, and that begin as short lists. When the
//! leaves outgrow their budget, the highest ones go and the window ends where they began; the
//! caller walks the tables once more for the next window. So no image, however sparse or crafted,
//! takes more memory than the budget and one leaf; what it can cost is time, one walk for each
//! window.

#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Range;

/// log2 of the clusters in a leaf.
const LEAF_BITS: u32 = 12;
const LEAF: usize = 1 << LEAF_BITS;
/// A list of cells gets longer than that only as an array.
const FEW: usize = 512;
/// What a leaf or an entry of a map costs beside its content, in bytes, with room to spare.
const OVERHEAD: usize = 96;

/// What a cluster is used for: a set, since it may be several things at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) struct Use(u16);

impl Use {
    /// Nothing that was seen.
    pub(super) const NONE: Self = Self(0);
    /// Guest data.
    pub(in crate::qcow2) const DATA: Self = Self(1);
    /// An L2 table; internal snapshots share it.
    pub(super) const L2: Self = Self(2);
    /// Metadata with one reference.
    pub(super) const SOLE: Self = Self(4);
    /// A refcount block.
    pub(super) const BLOCK: Self = Self(8);

    fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it is this, too.
    pub(super) fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether it may have so many references: guest data and L2 tables may be shared, but only
    /// with their like.
    pub(super) fn admits(self, references: u64) -> bool {
        references < 2 || self == Self::DATA || self == Self::L2
    }
}

/// What is known of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) struct Seen {
    /// References of any kind.
    pub(in crate::qcow2) references: u64,
    /// Entries of the active tables that point here and say COPIED.
    pub(super) copied: u64,
    /// Entries of the active tables that point here and do not.
    pub(super) shared: u64,
    /// What it is used for.
    pub(super) kind: Use,
}

impl Seen {
    const NOTHING: Self = Self { references: 0, copied: 0, shared: 0, kind: Use::NONE };

    /// Whether it is guest data with one reference, and no entry says that it were shared.
    pub(super) fn is_sole_data(&self) -> bool {
        self.references == 1 && self.kind == Use::DATA && self.shared == 0
    }
}

/// One cluster's cell: eight bits of references, two for each flag count, four for the uses.
/// `WIDE` references mean that the counts are in the map of wide ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell(u16);

const WIDE: u64 = 255;
const MOST_FLAGS: u64 = 3;

impl Cell {
    /// `None` when a count is too large.
    fn pack(seen: Seen) -> Option<Self> {
        if seen.references >= WIDE || seen.copied > MOST_FLAGS || seen.shared > MOST_FLAGS {
            return None;
        }
        let small = |value: u64| u16::try_from(value).ok();
        let counts = small(seen.references)? | small(seen.copied)? << 8 | small(seen.shared)? << 10;
        Some(Self(counts | seen.kind.0 << 12))
    }

    fn wide(kind: Use) -> Self {
        Self(0xff | kind.0 << 12)
    }

    fn is_wide(self) -> bool {
        u64::from(self.0 & 0xff) == WIDE
    }

    fn unpack(self) -> Seen {
        Seen {
            references: u64::from(self.0 & 0xff),
            copied: u64::from(self.0 >> 8 & 3),
            shared: u64::from(self.0 >> 10 & 3),
            kind: Use(self.0 >> 12),
        }
    }
}

/// 4096 clusters: those that something refers to, in order, or all of them.
enum Leaf {
    Few(Vec<(u16, Cell)>),
    All(Box<[Cell]>),
}

impl Leaf {
    fn get(&self, place: u16) -> Cell {
        let cell = match self {
            Self::Few(cells) => {
                let found = cells.binary_search_by_key(&place, |(place, _)| *place).ok();
                found.and_then(|index| cells.get(index)).map(|(_, cell)| *cell)
            }
            Self::All(cells) => cells.get(usize::from(place)).copied(),
        };
        cell.unwrap_or(Cell(0))
    }

    fn set(&mut self, place: u16, cell: Cell) {
        match self {
            Self::Few(cells) => match cells.binary_search_by_key(&place, |(place, _)| *place) {
                Ok(index) => cells.iter_mut().skip(index).take(1).for_each(|slot| slot.1 = cell),
                Err(index) if cells.len() < FEW => cells.insert(index, (place, cell)),
                Err(_) => self.set_in_array(place, cell),
            },
            Self::All(_) => self.set_in_array(place, cell),
        }
    }

    fn set_in_array(&mut self, place: u16, cell: Cell) {
        self.array().iter_mut().skip(usize::from(place)).take(1).for_each(|slot| *slot = cell);
    }

    /// All cells; a list becomes an array.
    fn array(&mut self) -> &mut [Cell] {
        if let Self::Few(cells) = self {
            let mut all = vec![Cell(0); LEAF].into_boxed_slice();
            for (place, cell) in cells.iter().copied() {
                all.iter_mut().skip(usize::from(place)).take(1).for_each(|slot| *slot = cell);
            }
            *self = Self::All(all);
        }
        match self {
            Self::All(cells) => cells,
            Self::Few(_) => &mut [],
        }
    }

    /// Bytes it takes.
    fn cost(&self) -> usize {
        let content = match self {
            Self::Few(cells) => cells.capacity().saturating_mul(size_of::<(u16, Cell)>()),
            Self::All(cells) => cells.len().saturating_mul(size_of::<Cell>()),
        };
        content.saturating_add(OVERHEAD)
    }

    fn cells(&self) -> Vec<(u16, Cell)> {
        match self {
            Self::Few(cells) => cells.clone(),
            Self::All(cells) => {
                (0..=u16::MAX).zip(cells.iter().copied()).filter(|(_, cell)| cell.0 != 0).collect()
            }
        }
    }
}

/// The references to the clusters of one window of the file.
pub(in crate::qcow2) struct References {
    window: Range<u64>,
    leaves: BTreeMap<u64, Leaf>,
    wide: BTreeMap<u64, Seen>,
    bytes: usize,
    budget: usize,
}

impl References {
    /// Nothing is known yet of the clusters from `first` on; takes `budget` bytes and a leaf.
    pub(in crate::qcow2) fn new(first: u64, budget: usize) -> Self {
        let (leaves, wide) = (BTreeMap::new(), BTreeMap::new());
        Self { window: first..u64::MAX, leaves, wide, bytes: 0, budget }
    }

    /// The clusters that are counted here. It only shrinks while references are added.
    pub(in crate::qcow2) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Whether every cluster is counted here.
    pub(super) fn is_whole(&self) -> bool {
        self.window == (0..u64::MAX)
    }

    /// Most bytes that may be taken, for a sibling.
    pub(super) fn budget(&self) -> usize {
        self.budget
    }

    /// Counts `times` references to a cluster.
    pub(in crate::qcow2) fn refer(&mut self, cluster: u64, kind: Use, times: u64) {
        self.change(cluster, |seen| {
            seen.kind = seen.kind.and(kind);
            seen.references = seen.references.saturating_add(times);
        });
    }

    /// Counts `times` entries of the active tables that point to a cluster.
    pub(super) fn point(&mut self, cluster: u64, copied: bool, times: u64) {
        self.change(cluster, |seen| {
            let count = if copied { &mut seen.copied } else { &mut seen.shared };
            *count = count.saturating_add(times);
        });
    }

    /// Counts `times` references of L2 entries to each of a run of clusters of guest data, and the
    /// entries of the active tables among them: whether they say COPIED, and how many they are.
    pub(super) fn refer_run(&mut self, run: Range<u64>, times: u64, pointing: (bool, u64)) {
        let seen = {
            let (copied, pointers) = pointing;
            let [copied, shared] = if copied { [pointers, 0] } else { [0, pointers] };
            Seen { references: times, copied, shared, kind: Use::DATA }
        };
        let mut next = run.start.max(self.window.start);
        while next < run.end.min(self.window.end) {
            let leaf_end = ((next >> LEAF_BITS).saturating_add(1) << LEAF_BITS).min(run.end);
            let piece = next..leaf_end.min(self.window.end);
            next = self.fill(piece.clone(), seen);
            while next < piece.end {
                self.change(next, |old| {
                    old.kind = old.kind.and(seen.kind);
                    old.references = old.references.saturating_add(seen.references);
                    old.copied = old.copied.saturating_add(seen.copied);
                    old.shared = old.shared.saturating_add(seen.shared);
                });
                next = next.saturating_add(1);
            }
        }
    }

    /// Sets the first clusters of a piece of one leaf, as far as nothing is known of them, and
    /// returns where that ends. A piece that is too short to be worth an array is left alone.
    fn fill(&mut self, piece: Range<u64>, seen: Seen) -> u64 {
        let Some(cell) = Cell::pack(seen) else { return piece.start };
        let (number, place) = split(piece.start);
        let len = usize::try_from(piece.end.saturating_sub(piece.start)).unwrap_or(usize::MAX);
        let is_array = |leaf: &Leaf| matches!(leaf, Leaf::All(_));
        if len <= FEW && !self.leaves.get(&number).is_some_and(is_array) {
            return piece.start;
        }
        let leaf = self.leaves.entry(number).or_insert_with(|| {
            self.bytes = self.bytes.saturating_add(OVERHEAD);
            Leaf::Few(Vec::new())
        });
        let before = leaf.cost();
        let cells = leaf.array().iter_mut().skip(usize::from(place)).take(len);
        let mut next = piece.start;
        for slot in cells.take_while(|slot| slot.0 == 0) {
            *slot = cell;
            next = next.saturating_add(1);
        }
        self.bytes = self.bytes.saturating_add(leaf.cost()).saturating_sub(before);
        self.shrink();
        next
    }

    fn change(&mut self, cluster: u64, change: impl FnOnce(&mut Seen)) {
        if !self.window.contains(&cluster) {
            return;
        }
        let (number, place) = split(cluster);
        let leaf = self.leaves.entry(number).or_insert_with(|| {
            self.bytes = self.bytes.saturating_add(OVERHEAD);
            Leaf::Few(Vec::new())
        });
        let before = leaf.cost();
        let old = leaf.get(place);
        let mut seen = match self.wide.get(&cluster) {
            Some(seen) if old.is_wide() => *seen,
            _ => old.unpack(),
        };
        change(&mut seen);
        match Cell::pack(seen) {
            Some(cell) if !old.is_wide() => leaf.set(place, cell),
            _ => {
                leaf.set(place, Cell::wide(seen.kind));
                if self.wide.insert(cluster, seen).is_none() {
                    self.bytes = self.bytes.saturating_add(OVERHEAD);
                }
            }
        }
        self.bytes = self.bytes.saturating_add(leaf.cost()).saturating_sub(before);
        self.shrink();
    }

    /// Gives up the highest leaves until the budget is kept; one always stays.
    fn shrink(&mut self) {
        while self.bytes > self.budget && self.leaves.len() > 1 {
            let Some((number, leaf)) = self.leaves.pop_last() else { break };
            self.window.end = number << LEAF_BITS;
            let wide = self.wide.split_off(&self.window.end);
            let gone = wide.len().saturating_mul(OVERHEAD).saturating_add(leaf.cost());
            self.bytes = self.bytes.saturating_sub(gone);
        }
    }

    /// What is known of a cluster inside the window.
    pub(in crate::qcow2) fn get(&self, cluster: u64) -> Seen {
        let (number, place) = split(cluster);
        let Some(leaf) = self.leaves.get(&number) else { return Seen::NOTHING };
        self.seen(cluster, leaf.get(place))
    }

    fn seen(&self, cluster: u64, cell: Cell) -> Seen {
        let wide = if cell.is_wide() { self.wide.get(&cluster) } else { None };
        wide.copied().unwrap_or_else(|| cell.unpack())
    }

    /// Calls `each` for every cluster of a range inside the window, in order.
    pub(super) fn each(&self, range: Range<u64>, mut each: impl FnMut(u64, Seen)) {
        let mut next = range.start;
        while next < range.end {
            let (number, place) = split(next);
            let end = (number.saturating_add(1) << LEAF_BITS).min(range.end);
            match self.leaves.get(&number) {
                None => (next..end).for_each(|cluster| each(cluster, Seen::NOTHING)),
                Some(Leaf::All(cells)) => {
                    let cells = cells.iter().skip(usize::from(place));
                    for (cluster, cell) in (next..end).zip(cells) {
                        each(cluster, self.seen(cluster, *cell));
                    }
                }
                Some(Leaf::Few(_)) => {
                    (next..end).for_each(|cluster| each(cluster, self.get(cluster)));
                }
            }
            next = end;
        }
    }

    /// Whether nothing is known of any cluster of a range.
    pub(super) fn is_empty(&self, range: Range<u64>) -> bool {
        let last = range.end.saturating_sub(1) >> LEAF_BITS;
        self.leaves.range(range.start >> LEAF_BITS..=last).next().is_none()
    }

    /// Every cluster of which something is known and that is in a range which `wanted` asks for, in
    /// order, one leaf at a time. The ranges are those of the leaves.
    pub(super) fn leaves(
        &self,
        wanted: impl Fn(Range<u64>) -> bool,
    ) -> impl Iterator<Item = Vec<(u64, Seen)>> {
        let range = |number: u64| number << LEAF_BITS..number.saturating_add(1) << LEAF_BITS;
        let leaves = self.leaves.iter().filter(move |(number, _)| wanted(range(**number)));
        leaves.map(|(number, leaf)| {
            let cells = leaf.cells().into_iter().map(|(place, cell)| {
                let cluster = (number << LEAF_BITS).saturating_add(u64::from(place));
                (cluster, self.seen(cluster, cell))
            });
            cells.collect()
        })
    }
}

/// The leaf of a cluster, and its place there.
fn split(cluster: u64) -> (u64, u16) {
    let place = cluster & ((1 << LEAF_BITS) - 1);
    (cluster >> LEAF_BITS, u16::try_from(place).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_widen_and_survive_it() {
        let mut counts = References::new(0, 1 << 20);
        for step in 1..=300 {
            counts.refer(7, Use::DATA, 1);
            counts.point(7, true, 1);
            counts.point(7, false, 2);
            let seen = Seen { references: step, copied: step, shared: 2 * step, kind: Use::DATA };
            assert_eq!(counts.get(7), seen);
        }
        counts.refer(8, Use::L2, 1 << 40);
        assert_eq!(counts.get(8).references, 1 << 40);
        assert_eq!(counts.get(9), Seen::NOTHING);
        assert!(counts.is_whole());
    }

    #[test]
    fn a_leaf_of_many_becomes_an_array_and_keeps_its_counts() {
        let mut counts = References::new(0, 1 << 20);
        for cluster in (0..4096).rev() {
            counts.refer(cluster, Use::DATA, 1 + cluster % 3);
        }
        for cluster in 0..4096 {
            assert_eq!(counts.get(cluster).references, 1 + cluster % 3);
        }
        assert_eq!(counts.leaves(|_| true).map(|leaf| leaf.len()).sum::<usize>(), 4096);
    }

    #[test]
    fn metadata_with_another_use_is_an_overlap() {
        let mut counts = References::new(0, 1 << 20);
        counts.refer(1, Use::L2, 2);
        assert!(counts.get(1).kind.admits(2));
        counts.refer(1, Use::DATA, 1);
        assert!(!counts.get(1).kind.admits(3));
        counts.refer(2, Use::SOLE, 1);
        assert!(counts.get(2).kind.admits(1));
        counts.refer(2, Use::SOLE, 1);
        assert!(!counts.get(2).kind.admits(2));
    }

    #[test]
    fn windows_keep_the_budget_and_together_count_everything() {
        let budget = 64 << 10;
        let mut random = fastrand::Rng::with_seed(1);
        let clusters: Vec<u64> = (0..20_000).map(|_| random.u64(0..1 << 47)).collect();
        let (mut first, mut windows, mut total) = (0, 0, 0);
        while first < u64::MAX {
            let mut counts = References::new(first, budget);
            clusters.iter().for_each(|&cluster| counts.refer(cluster, Use::DATA, 1));
            assert!(counts.bytes <= budget + LEAF * 2 + 2 * OVERHEAD);
            total +=
                counts.leaves(|_| true).flatten().map(|(_, seen)| seen.references).sum::<u64>();
            first = counts.window().end;
            windows += 1;
        }
        assert_eq!(total, 20_000);
        assert!((10..100).contains(&windows), "{windows} windows");
    }

    #[test]
    fn a_run_counts_as_its_clusters_one_by_one() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        let budget = random.usize(20_000..200_000);
        let first = random.u64(0..3) * 5000;
        let (mut runs, mut ones) = (References::new(first, budget), References::new(first, budget));
        for _ in 0..60 {
            let start = random.u64(0..40_000);
            let len = if random.bool() { random.u64(1..20) } else { random.u64(1..9000) };
            let (times, copied) = (random.u64(1..3), random.bool());
            let pointers = random.u64(0..=times);
            runs.refer_run(start..start + len, times, (copied, pointers));
            for cluster in start..start + len {
                ones.refer(cluster, Use::DATA, times);
                ones.point(cluster, copied, pointers);
            }
        }
        let end = runs.window().end.min(ones.window().end).min(60_000);
        assert!(end > first, "seed {seed}");
        let mut seen = Vec::new();
        runs.each(first..end, |cluster, known| seen.push((cluster, known)));
        let all: Vec<u64> = seen.iter().map(|(cluster, _)| *cluster).collect();
        assert_eq!(all, (first..end).collect::<Vec<_>>(), "seed {seed}");
        for (cluster, known) in seen {
            assert_eq!(known, ones.get(cluster), "cluster {cluster}, seed {seed}");
            assert_eq!(known, runs.get(cluster), "cluster {cluster}, seed {seed}");
        }
    }
}
