//! What every sector of a disk may hold, now and after a crash.
//!
//! Content is not stored but computed: a [`Tag`] and a sector's number give its 512 bytes, so a
//! sector that turns up in a foreign place is recognised as wrong.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

/// The unit in which a disk is written and may be torn.
pub const SECTOR: usize = 512;

/// Names the content of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag(u64);

impl Tag {
    /// The content of a sector that was never written or was zeroed.
    pub const ZEROES: Self = Self(0);

    /// Content number `number` of the run with this seed.
    #[must_use]
    pub fn new(seed: u64, number: u64) -> Self {
        Self(seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1)
    }

    /// Writes the content of the sectors from `first` on into `bytes`.
    pub fn fill(self, first: usize, bytes: &mut [u8]) {
        if self == Self::ZEROES {
            bytes.fill(0);
            return;
        }
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let word = self.first_word(sector);
            for (index, bytes) in (0..).zip(bytes.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&word.wrapping_add(index).to_le_bytes());
            }
        }
    }

    /// Whether `bytes` are the content of `sector`.
    fn matches(self, sector: usize, bytes: &[u8]) -> bool {
        if self == Self::ZEROES {
            return bytes.iter().all(|byte| *byte == 0);
        }
        let word = self.first_word(sector);
        (0..).zip(bytes.chunks_exact(8)).all(|(i, b)| b == word.wrapping_add(i).to_le_bytes())
    }

    /// Mixes tag and sector so that any bit of either changes half the bits. Words of a sector
    /// count up from here: compressible, as the tests of compressed clusters need it.
    fn first_word(self, sector: usize) -> u64 {
        let mixed = (self.0 ^ (sector as u64)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb)
    }
}

/// What a request does to the sectors of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// They hold this afterwards.
    Set(Tag),
    /// Each holds what it held or zeroes: a discard promises no more.
    PerhapsZeroes,
}

/// A change that no flush has made durable yet.
#[derive(Clone, Copy, Debug)]
struct Change {
    effect: Effect,
    /// When the daemon answered; `None` while it has not.
    done_at: Option<u64>,
}

/// One sector: what a flush or a crash has settled, and the changes since, oldest first. Changes
/// of one sector never overlap in time, as [`crate::workload`] keeps ranges in flight disjoint.
#[derive(Clone, Debug)]
struct Sector {
    settled: Tag,
    /// The settled content may be zeroes instead.
    or_zeroes: bool,
    recent: Vec<Change>,
}

/// A sector that holds what it must not.
#[derive(Debug)]
pub struct Mismatch {
    sector: usize,
    expected: String,
    found: Vec<u8>,
}

impl Mismatch {
    /// The number of the wrong sector.
    #[must_use]
    pub fn sector(&self) -> usize {
        self.sector
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sector, expected, found } = self;
        let offset = sector * SECTOR;
        write!(formatter, "sector {sector} (offset {offset:#x}) holds {found:02x?}..., ")?;
        write!(formatter, "but it may only hold {expected}")
    }
}

impl std::error::Error for Mismatch {}

/// The disk.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Sector>,
    /// Sectors that have recent changes.
    changed: BTreeSet<usize>,
    clock: u64,
    seed: u64,
    tags: u64,
}

impl Model {
    /// A disk of so many sectors, all zero. Its content will differ from that of other seeds.
    #[must_use]
    pub fn new(seed: u64, sectors: usize) -> Self {
        let empty = Sector { settled: Tag::ZEROES, or_zeroes: false, recent: Vec::new() };
        Self { sectors: vec![empty; sectors], changed: BTreeSet::new(), clock: 0, seed, tags: 0 }
    }

    /// Content that no sector of this disk has held before.
    #[must_use]
    pub fn fresh_tag(&mut self) -> Tag {
        self.tags += 1;
        Tag::new(self.seed, self.tags)
    }

    /// How many sectors the disk has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Whether the disk has no sectors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Lays content down before the daemon has anything to do with the disk.
    pub fn lay_down(&mut self, range: Range<usize>, tag: Tag) {
        for sector in &mut self.sectors[range] {
            *sector = Sector { settled: tag, or_zeroes: false, recent: Vec::new() };
        }
    }

    /// A request that changes the range has been submitted.
    pub fn begin(&mut self, range: Range<usize>, effect: Effect) {
        for sector in range {
            self.sectors[sector].recent.push(Change { effect, done_at: None });
            self.changed.insert(sector);
        }
    }

    /// The request that changed the range has been answered.
    pub fn finish(&mut self, range: Range<usize>) {
        self.clock += 1;
        for sector in &mut self.sectors[range] {
            let change = sector.recent.last_mut().expect("a change that was begun");
            assert!(change.done_at.is_none(), "a change is finished once");
            change.done_at = Some(self.clock);
        }
    }

    /// A flush has been submitted. What it returns goes to [`Self::finish_flush`].
    #[must_use]
    pub fn begin_flush(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A flush has been answered: what had been answered before its submission is durable.
    pub fn finish_flush(&mut self, begun_at: u64) {
        let sectors = &mut self.sectors;
        self.changed.retain(|index| {
            let sector = &mut sectors[*index];
            let is_covered = |change: &Change| change.done_at.is_some_and(|at| at < begun_at);
            let covered = sector.recent.iter().rposition(is_covered).map_or(0, |last| last + 1);
            (sector.settled, sector.or_zeroes) = sector.after(covered);
            sector.recent.drain(..covered);
            !sector.recent.is_empty()
        });
    }

    /// Holds bytes read from the running daemon against the model. A sector whose discard left two
    /// possibilities has only the one that was seen from now on.
    ///
    /// # Errors
    ///
    /// Tells the first sector that holds what it must not.
    pub fn check_read(&mut self, first: usize, bytes: &[u8]) -> Result<(), Mismatch> {
        for (index, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let sector = &mut self.sectors[index];
            let (tag, or_zeroes) = sector.after(sector.recent.len());
            let is_tag = tag.matches(index, bytes);
            let is_zeroes = or_zeroes && Tag::ZEROES.matches(index, bytes);
            if !is_tag && !is_zeroes {
                return Err(mismatch(index, &[tag], or_zeroes, bytes));
            }
            if or_zeroes {
                sector.pin(is_tag);
            }
        }
        Ok(())
    }

    /// Says where the content of a wrong sector belongs. Slow: it tries every sector and tag.
    #[must_use]
    pub fn origin(&self, error: &Mismatch) -> String {
        let found = error.found.get(..8).and_then(|bytes| bytes.try_into().ok());
        let word = u64::from_le_bytes(found.unwrap_or_default());
        let tags = || (1..=self.tags).map(|number| (number, Tag::new(self.seed, number)));
        for sector in std::iter::once(error.sector).chain(0..self.len()) {
            if let Some((number, _)) = tags().find(|(_, tag)| tag.first_word(sector) == word) {
                return format!("what was found is content {number} of sector {sector}");
            }
        }
        "what was found belongs to no sector".to_owned()
    }

    /// Holds bytes read after the daemon was killed against the model: a sector holds its last
    /// durable content or any that was written since. From now on it holds what was seen.
    ///
    /// # Errors
    ///
    /// Tells the first sector that holds what it must not.
    pub fn check_after_crash(&mut self, first: usize, bytes: &[u8]) -> Result<(), Mismatch> {
        for (index, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let sector = &mut self.sectors[index];
            let mut possible = vec![sector.settled];
            if sector.or_zeroes {
                possible.push(Tag::ZEROES);
            }
            possible.extend(sector.recent.iter().map(|change| match change.effect {
                Effect::Set(tag) => tag,
                Effect::PerhapsZeroes => Tag::ZEROES,
            }));
            let Some(seen) = possible.iter().find(|tag| tag.matches(index, bytes)) else {
                return Err(mismatch(index, &possible, false, bytes));
            };
            *sector = Sector { settled: *seen, or_zeroes: false, recent: Vec::new() };
            self.changed.remove(&index);
        }
        Ok(())
    }
}

impl Sector {
    /// The content after the first `count` recent changes, all of them done, and whether it may be
    /// zeroes instead.
    fn after(&self, count: usize) -> (Tag, bool) {
        let start = (self.settled, self.or_zeroes);
        self.recent[..count].iter().fold(start, |(tag, _), change| match change.effect {
            Effect::Set(tag) => (tag, false),
            Effect::PerhapsZeroes => (tag, true),
        })
    }

    /// Decides between the two possibilities that discards have left open.
    fn pin(&mut self, is_tag: bool) {
        let after_last_set = self
            .recent
            .iter()
            .rposition(|change| matches!(change.effect, Effect::Set(_)))
            .map_or(0, |last| last + 1);
        let no_set = after_last_set == 0;
        if is_tag {
            // The discards did nothing.
            self.recent.truncate(after_last_set);
            if no_set {
                self.or_zeroes = false;
            }
        } else if self.recent.len() > after_last_set {
            // Which of several discards has zeroed it is not known, so a flush that covers the
            // earlier ones alone may still find the old content; after the newest it is zeroes.
            if let Some(newest) = self.recent.last_mut() {
                newest.effect = Effect::Set(Tag::ZEROES);
            }
        } else {
            (self.settled, self.or_zeroes) = (Tag::ZEROES, false);
        }
    }
}

fn mismatch(sector: usize, possible: &[Tag], or_zeroes: bool, bytes: &[u8]) -> Mismatch {
    let show = |tag: &Tag| {
        let mut content = [0; SECTOR];
        tag.fill(sector, &mut content);
        format!("{:02x?}...", &content[..16])
    };
    let mut expected: Vec<String> = possible.iter().map(show).collect();
    if or_zeroes {
        expected.push("zeroes".to_owned());
    }
    Mismatch { sector, expected: expected.join(" or "), found: bytes[..16].to_vec() }
}

#[cfg(test)]
mod tests;
