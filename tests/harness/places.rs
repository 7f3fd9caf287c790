//! Where the parts of an image lie, read by code of our own that believes nothing it reads.

use std::ops::Range;

/// The offset bits of L1, L2 and refcount table entries.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// The header extension that describes bitmaps.
const BITMAPS: u64 = 0x2385_2875;
/// Most of anything that is looked at: what lies behind is not guarded, and not spoiled.
const MOST: u64 = 4096;

/// Fields of the header: offset and bytes.
const FIELDS: [(u64, u64); 19] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
];

/// A table of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// First byte in the file.
    pub(crate) at: u64,
    /// How many numbers there are.
    pub(crate) count: u64,
    /// Bytes of each.
    pub(crate) width: u64,
}

/// A big-endian number in an image; `None` where the image ends before.
pub(crate) fn number(bytes: &[u8], at: u64, width: u64) -> Option<u64> {
    let start = usize::try_from(at).ok()?;
    let end = start.checked_add(usize::try_from(width).ok()?)?;
    Some(bytes.get(start..end)?.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// The numbers of an image's header that say where the rest is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    pub(crate) cluster: u64,
    l1: Place,
    reftable: Place,
    snapshots: (u64, u64),
    extended: bool,
}

impl Head {
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let field = |at, width| number(bytes, at, width);
        let bits = field(20, 4)?;
        if !(9..=21).contains(&bits) {
            return None;
        }
        let cluster = 1 << bits;
        let table = |at, count: u64| Place { at, count: count.min(MOST), width: 8 };
        let reftable = field(56, 4)?.min(MOST) * (cluster / 8);
        Some(Self {
            cluster,
            l1: table(field(40, 8)?, field(36, 4)?),
            reftable: table(field(48, 8)?, reftable),
            snapshots: (field(64, 8)?, field(60, 4)?.min(MOST)),
            extended: field(4, 4)? == 3 && field(72, 8)? & 16 != 0,
        })
    }

    /// The clusters that a table's entries refer to.
    fn targets(&self, bytes: &[u8], table: Place) -> Vec<u64> {
        let entries = (0..table.count).map_while(|index| {
            let at = table.at.checked_add(index * 8)?;
            number(bytes, at, 8)
        });
        entries.map(|entry| entry & OFFSET).filter(|at| *at != 0).collect()
    }

    /// The snapshot table's length in bytes, and the snapshots' L1 tables.
    fn snapshots(&self, bytes: &[u8]) -> (u64, Vec<Place>) {
        let (start, count) = self.snapshots;
        let (mut at, mut tables) = (start, Vec::new());
        for _ in 0..count {
            let field = |offset: u64, width| number(bytes, at.checked_add(offset)?, width);
            let (Some(l1), Some(entries), Some(id), Some(name), Some(extra)) =
                (field(0, 8), field(8, 4), field(12, 2), field(14, 2), field(36, 4))
            else {
                break;
            };
            tables.push(Place { at: l1, count: entries.min(MOST), width: 8 });
            at = at.saturating_add(40 + id + name + extra).next_multiple_of(8);
        }
        (at.saturating_sub(start), tables)
    }

    /// The ranges in which a guest's data must never be written.
    pub(crate) fn metadata(&self, bytes: &[u8]) -> Vec<Range<u64>> {
        let mut ranges = Vec::with_capacity(16);
        let mut add = |at: u64, len: u64| ranges.push(at..at.saturating_add(len));
        add(0, self.cluster);
        for table in [self.l1, self.reftable] {
            add(table.at, table.count * 8);
            // What a table refers to: L2 tables, refcount blocks.
            for at in self.targets(bytes, table) {
                add(at, self.cluster);
            }
        }
        let (len, tables) = self.snapshots(bytes);
        add(self.snapshots.0, len);
        for table in tables {
            add(table.at, table.count * 8);
        }
        ranges.retain(|range| !range.is_empty());
        ranges
    }
}

/// Everything in an image that is worth spoiling.
///
/// # Panics
/// When the image is not one that `qemu-img` made.
pub(crate) fn places(bytes: &[u8]) -> Vec<Place> {
    let head = Head::read(bytes).expect("a seed has a header");
    let end = bytes.len() as u64;
    let mut places = vec![
        // Extensions and names.
        Place { at: 104, count: (head.cluster.min(512) - 104) / 4, width: 4 },
        Place { at: 104, count: head.cluster.min(512) - 104, width: 1 },
        head.l1,
        head.reftable,
        // Anything.
        Place { at: 0, count: end / 8, width: 8 },
        Place { at: 0, count: end, width: 1 },
    ];
    places.extend(FIELDS.map(|(at, width)| Place { at, count: 1, width }));
    let whole = |at, width| Place { at, count: head.cluster / width, width };
    for at in head.targets(bytes, head.reftable) {
        places.push(whole(at, 2));
    }
    let (len, tables) = head.snapshots(bytes);
    if len > 0 {
        places.push(Place { at: head.snapshots.0, count: len, width: 1 });
        places.push(Place { at: head.snapshots.0, count: len / 4, width: 4 });
        places.extend(&tables);
    }
    places.extend(bitmaps(bytes, head.cluster));
    for table in tables.into_iter().chain([head.l1]) {
        for at in head.targets(bytes, table) {
            let table = whole(at, 8);
            places.push(table);
            places.extend(compressed(bytes, &head, table));
        }
    }
    places.retain(|place| place.count > 0 && place.at + place.count * place.width <= end);
    places
}

/// The compressed clusters that a table refers to.
fn compressed(bytes: &[u8], head: &Head, table: Place) -> Vec<Place> {
    if head.extended {
        return Vec::new();
    }
    let bits = 62 - (head.cluster.trailing_zeros() - 8);
    let entries = (0..table.count).filter_map(|index| number(bytes, table.at + index * 8, 8));
    let clusters = entries.filter(|entry| entry & COMPRESSED != 0);
    // The beginning is where the codec's own headers are.
    let data = clusters.map(|entry| Place { at: entry & ((1 << bits) - 1), count: 24, width: 1 });
    data.take(8).collect()
}

/// The directory of bitmaps and the tables that it names.
fn bitmaps(bytes: &[u8], cluster: u64) -> Vec<Place> {
    let mut at = number(bytes, 100, 4).unwrap_or(104);
    while at + 8 <= cluster {
        let (Some(kind), Some(len)) = (number(bytes, at, 4), number(bytes, at + 4, 4)) else {
            break;
        };
        if kind == BITMAPS {
            let size = number(bytes, at + 16, 8).unwrap_or_default();
            let directory = number(bytes, at + 24, 8).unwrap_or_default();
            let table = number(bytes, directory, 8).unwrap_or_default();
            let entries = number(bytes, directory + 8, 4).unwrap_or_default();
            return vec![
                Place { at: directory, count: size, width: 1 },
                Place { at: directory, count: size / 4, width: 4 },
                Place { at: table, count: entries, width: 8 },
            ];
        }
        if kind == 0 {
            break;
        }
        at += 8 + len.next_multiple_of(8);
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seed;

    fn seed(name: &str) -> &'static [u8] {
        &Seed::of(name).bytes
    }

    #[test]
    fn metadata_is_found_and_data_is_none() {
        let bytes = seed("plain");
        let head = Head::read(bytes).expect("a header");
        let guarded = head.metadata(bytes);
        // Header, L1 table and refcount table; a refcount block, and three L2 tables.
        assert_eq!(guarded.len(), 3 + 1 + 3, "{guarded:x?}");
        // What qemu-img map calls data.
        for at in [0xa00, 0x1000, 0x1a00, 0x2400, 0x2c00] {
            assert!(guarded.iter().all(|range| !range.contains(&at)), "{at:x}");
        }
    }

    #[test]
    fn every_kind_of_table_is_found() {
        let count = |name| places(seed(name)).len();
        assert!(count("snapshots") > count("plain"));
        assert!(count("bitmaps") >= count("plain") + 3);
        assert!(count("zlib") > count("plain"));
        let guarded = |name| Head::read(seed(name)).expect("a header").metadata(seed(name)).len();
        // The table, and an L1 table for each of two snapshots; two L2 tables are copies.
        assert!(guarded("snapshots") >= guarded("plain") + 2);
    }
}
