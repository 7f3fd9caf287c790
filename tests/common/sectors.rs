//! What each sector of a disk may hold.
//!
//! Each sector has a list of versions in the order in which they were written; requests that
//! change it never overlap, so there is one order. A read may return the newest version answered
//! before it began, or any newer one. A power cut may leave the newest version answered before
//! the last successful flush began, or any newer one. A version whose request failed may have
//! arrived or not, so it never replaces those before it.

use std::ops::Range;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// What tells versions apart; 0 is a sector of zeros.
pub type Tag = u32;

#[derive(Clone, Copy)]
struct Version {
    tag: Tag,
    /// When its request was answered; `u64::MAX` while it is under way.
    answered: u64,
    certain: bool,
}

/// The versions of all sectors of a disk.
#[derive(Clone)]
pub struct Sectors {
    versions: Vec<Vec<Version>>,
    busy: Vec<bool>,
    clock: u64,
    durable: u64,
    next: Tag,
}

impl Sectors {
    /// A disk on which every sector holds what `tags` says, durably.
    pub fn new(tags: &[Tag]) -> Self {
        let version = |&tag: &Tag| vec![Version { tag, answered: 0, certain: true }];
        Self {
            versions: tags.iter().map(version).collect(),
            busy: vec![false; tags.len()],
            clock: 1,
            durable: 0,
            next: tags.iter().max().copied().unwrap_or(0) + 1,
        }
    }

    /// How many sectors there are.
    pub fn len(&self) -> usize {
        self.versions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.versions.is_empty()
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Whether a request that changes one of these sectors is under way.
    pub fn is_busy(&self, range: Range<usize>) -> bool {
        self.busy[range].contains(&true)
    }

    /// A write of fresh bytes begins; returns their tag.
    pub fn begin_write(&mut self, range: Range<usize>) -> Tag {
        self.next += 1;
        self.begin(range, self.next);
        self.next
    }

    /// A change to zeros begins.
    pub fn begin_zero(&mut self, range: Range<usize>) {
        self.begin(range, 0);
    }

    fn begin(&mut self, range: Range<usize>, tag: Tag) {
        assert!(!self.is_busy(range.clone()), "changes never overlap");
        self.tick();
        self.busy[range.clone()].fill(true);
        for versions in &mut self.versions[range] {
            versions.push(Version { tag, answered: u64::MAX, certain: true });
        }
    }

    /// The change that was begun last on this range was answered.
    pub fn end(&mut self, range: Range<usize>, succeeded: bool) {
        let now = self.tick();
        self.busy[range.clone()].fill(false);
        for versions in &mut self.versions[range] {
            let last = versions.last_mut().expect("it was begun");
            (last.answered, last.certain) = (now, succeeded);
        }
    }

    /// A discard was answered, after which one sector was found to hold `tag`: what it held
    /// before, or zeros; `Err` says which were allowed.
    ///
    /// # Errors
    /// When it holds neither.
    pub fn end_discard(&mut self, sector: usize, tag: Tag) -> Result<(), String> {
        let now = self.tick();
        self.busy[sector] = false;
        let versions = &mut self.versions[sector];
        let zero = versions.last_mut().expect("it was begun");
        (zero.answered, zero.certain) = (now, false);
        let allowed = Self::since(versions, now);
        if !allowed.iter().any(|version| version.tag == tag) {
            return Err(Self::describe(sector, tag, allowed));
        }
        versions.push(Version { tag, answered: now, certain: true });
        Ok(())
    }

    /// A flush begins; the number is for [`Sectors::end_flush`].
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// A flush was answered with success.
    pub fn end_flush(&mut self, begun: u64) {
        self.durable = self.durable.max(begun);
    }

    /// Now, for [`Sectors::check_read`].
    pub fn now(&self) -> u64 {
        self.clock
    }

    /// The newest certain version answered at `time`, and all newer ones.
    fn since(versions: &[Version], time: u64) -> &[Version] {
        let settled = |version: &Version| version.certain && version.answered <= time;
        let first = versions.iter().rposition(settled).unwrap_or(0);
        &versions[first..]
    }

    /// Whether bytes from `sector` on that a read begun at `begun` returned are allowed.
    ///
    /// # Errors
    /// Which sector is not, and what it may hold.
    pub fn check_read(&self, sector: usize, bytes: &[u8], begun: u64) -> Result<(), String> {
        self.check(sector, bytes, begun)
    }

    /// Whether the bytes of the whole disk are allowed after a power cut now.
    ///
    /// # Errors
    /// Which sector is not, and what it may hold.
    pub fn check_crash(&self, bytes: &[u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.len() * SECTOR);
        self.check(0, bytes, self.durable)
    }

    fn check(&self, first: usize, bytes: &[u8], time: u64) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let allowed = Self::since(&self.versions[sector], time);
            let tag = tag_of(sector, bytes).ok_or_else(|| {
                let word = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
                let what = Self::describe(sector, 0, allowed);
                format!("{what}; in fact foreign or mixed bytes, first {word:#x}")
            })?;
            if !allowed.iter().any(|version| version.tag == tag) {
                return Err(Self::describe(sector, tag, allowed));
            }
        }
        Ok(())
    }

    fn describe(sector: usize, tag: Tag, allowed: &[Version]) -> String {
        let allowed: Vec<Tag> = allowed.iter().map(|version| version.tag).collect();
        format!("sector {sector} holds version {tag}, may hold {allowed:?}")
    }
}

/// Fills `bytes`, whole sectors from `sector` on, with a version.
pub fn fill(sector: usize, tag: Tag, bytes: &mut [u8]) {
    for (sector, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR)) {
        let word = word(sector, tag).to_le_bytes();
        bytes.chunks_exact_mut(8).for_each(|target| target.copy_from_slice(&word));
    }
}

/// Whole sectors from `sector` on, each with its own version.
pub fn bytes_of(sector: usize, tags: &[Tag]) -> Vec<u8> {
    let mut bytes = vec![0; tags.len() * SECTOR];
    for (step, (&tag, bytes)) in tags.iter().zip(bytes.chunks_exact_mut(SECTOR)).enumerate() {
        fill(sector + step, tag, bytes);
    }
    bytes
}

/// The versions in the bytes of whole sectors from `sector` on; `None` for foreign bytes.
pub fn tags_of(sector: usize, bytes: &[u8]) -> Option<Vec<Tag>> {
    (sector..).zip(bytes.chunks_exact(SECTOR)).map(|(at, bytes)| tag_of(at, bytes)).collect()
}

fn word(sector: usize, tag: Tag) -> u64 {
    if tag == 0 { 0 } else { u64::from(tag) << 32 | sector as u64 }
}

fn tag_of(sector: usize, bytes: &[u8]) -> Option<Tag> {
    let first = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    // All words are the same when the sector equals itself moved by one word.
    if bytes[8..] != bytes[..bytes.len() - 8] {
        return None;
    }
    let tag = Tag::try_from(first >> 32).expect("half a word");
    (first == word(sector, tag)).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_may_bring_back_what_no_flush_has_covered_and_nothing_else() {
        let mut sectors = Sectors::new(&[7, 7]);
        let holds = |sectors: &Sectors, tag| sectors.check_crash(&bytes_of(0, &[tag, 7])).is_ok();
        let first = sectors.begin_write(0..1);
        assert!(holds(&sectors, 7) && holds(&sectors, first) && !holds(&sectors, 0));
        let early = sectors.begin_flush();
        sectors.end(0..1, true);
        sectors.end_flush(early);
        assert!(holds(&sectors, 7), "the flush began before the answer");
        let late = sectors.begin_flush();
        let second = sectors.begin_write(0..1);
        sectors.end(0..1, true);
        assert!(holds(&sectors, 7), "the flush has not ended");
        sectors.end_flush(late);
        assert!(!holds(&sectors, 7) && holds(&sectors, first) && holds(&sectors, second));
    }

    #[test]
    fn a_read_sees_the_newest_answered_version_or_one_under_way() {
        let mut sectors = Sectors::new(&[7]);
        let tag = sectors.begin_write(0..1);
        let begun = sectors.now();
        let reads = |sectors: &Sectors, tag, begun| {
            sectors.check_read(0, &bytes_of(0, &[tag]), begun).is_ok()
        };
        assert!(reads(&sectors, 7, begun) && reads(&sectors, tag, begun));
        sectors.end(0..1, true);
        assert!(reads(&sectors, 7, begun), "it began before the answer");
        assert!(!reads(&sectors, 7, sectors.now()));
        sectors.begin_write(0..1);
        sectors.end(0..1, false);
        assert!(reads(&sectors, tag, sectors.now()), "a failed write may not have arrived");
    }

    #[test]
    fn mixed_and_misplaced_sectors_have_no_tag() {
        let mut bytes = bytes_of(3, &[9]);
        assert_eq!(tags_of(3, &bytes), Some(vec![9]));
        assert_eq!(tags_of(4, &bytes), None);
        bytes[300] ^= 1;
        assert_eq!(tags_of(3, &bytes), None);
        assert_eq!(tags_of(3, &[0; SECTOR]), Some(vec![0]));
    }
}
