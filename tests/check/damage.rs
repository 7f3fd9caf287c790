//! Seeded damage to the metadata of an image in memory.

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An image's bytes, and what was done to them.
pub(crate) struct Damage {
    /// The damaged image.
    pub(crate) bytes: Vec<u8>,
    /// Guest offsets whose clusters may read differently: first and end.
    pub(crate) touched: Vec<(u64, u64)>,
    /// What was done, for failures.
    pub(crate) story: Vec<String>,
    /// Whether counts must be those of `qemu-img check`. Not for clusters of a data file at another
    /// place, which that tool takes as they are; not where a whole table is read from another place
    /// or cannot be read, since what counts below it is a matter of taste.
    pub(crate) exact: bool,
    cluster_bits: u32,
    random: fastrand::Rng,
}

impl Damage {
    /// Nothing is damaged yet.
    pub(crate) fn new(bytes: Vec<u8>, seed: u64) -> Self {
        let mut damage = Self {
            bytes,
            touched: Vec::new(),
            story: Vec::new(),
            exact: true,
            cluster_bits: 0,
            random: fastrand::Rng::with_seed(seed),
        };
        damage.cluster_bits = damage.word32(20);
        damage
    }

    fn word32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"))
    }

    fn word(&self, at: u64) -> u64 {
        let at = index(at);
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn put(&mut self, at: u64, word: u64) {
        let at = index(at);
        self.bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn say(&mut self, what: String) {
        self.story.push(what);
    }

    fn version(&self) -> u32 {
        self.word32(4)
    }

    fn has(&self, incompatible: u64) -> bool {
        self.version() == 3 && self.word(72) & incompatible != 0
    }

    /// log2 of the width of a refcount.
    fn order(&self) -> u32 {
        if self.version() == 3 { self.word32(96) } else { 4 }
    }

    fn clusters(&self) -> u64 {
        (self.bytes.len() as u64).div_ceil(1 << self.cluster_bits)
    }

    fn entry_size(&self) -> u64 {
        if self.has(16) { 16 } else { 8 }
    }

    /// The places of all entries of the active L1 table that lead to a table, and what they map.
    fn l1(&self) -> Vec<(u64, u64)> {
        let (table, entries) = (self.word(40), u64::from(self.word32(36)));
        let coverage = (1 << (2 * self.cluster_bits)) / self.entry_size();
        let place = |number| (table + number * 8, number * coverage);
        (0..entries).map(place).filter(|(at, _)| self.word(*at) & OFFSET_MASK != 0).collect()
    }

    /// The places of all L2 entries with a cluster in the active tables, and what they map.
    fn l2(&self) -> Vec<(u64, u64)> {
        let per_table = (1 << self.cluster_bits) / self.entry_size();
        let mut found = Vec::new();
        for (at, guest) in self.l1() {
            let table = self.word(at) & OFFSET_MASK;
            for slot in 0..per_table {
                let place = table + slot * self.entry_size();
                let inside = index(place) + 16 <= self.bytes.len();
                if inside && self.word(place) & (OFFSET_MASK | COMPRESSED) != 0 {
                    found.push((place, guest + (slot << self.cluster_bits)));
                }
            }
        }
        found
    }

    /// Does one thing, drawn from the seed.
    pub(crate) fn once(&mut self) {
        match self.random.u8(0..20) {
            0..7 => self.refcount(),
            7..13 => self.l2_entry(),
            13..16 => self.l1_entry(),
            16 => self.reftable(),
            17 => self.dirty(),
            _ => self.flags(),
        }
    }

    /// Sets the refcount of some cluster.
    fn refcount(&mut self) {
        let cluster = self.random.u64(0..self.clusters());
        let order = self.order();
        let per_block = 1 << (self.cluster_bits + 3 - order);
        let block = self.word(self.word(48) + cluster / per_block * 8) & OFFSET_MASK;
        if block == 0 || index(block) + (1 << self.cluster_bits) > self.bytes.len() {
            return;
        }
        let bit = (cluster % per_block) << order;
        let at = index(block + bit / 8);
        let value = self.random.choice([0, 1, 2, 3, 255]).expect("not empty");
        if order < 3 {
            let most = u8::try_from((1_u32 << (1 << order)) - 1).expect("below a byte");
            let value = value.min(most);
            let shift = bit % 8;
            self.bytes[at] = self.bytes[at] & !(most << shift) | value << shift;
        } else {
            let width = 1 << (order - 3);
            self.bytes[at..at + width].fill(0);
            self.bytes[at + width - 1] = value;
        }
        self.say(format!("refcount of cluster {cluster:#x} is {value}"));
    }

    /// Changes an L2 entry so that it means something else, or nothing.
    fn l2_entry(&mut self) {
        let entries = self.l2();
        let Some(&(at, guest)) = self.random.choice(&entries) else { return };
        let old = self.word(at);
        let anywhere = self.random.u64(0..self.clusters()) << self.cluster_bits;
        let new = match self.random.u8(0..6) {
            0 => 0,
            1 if self.cluster_bits > 9 => old & !COMPRESSED | 0x200,
            2 => 1 << self.random.u32(40..50) | COPIED,
            3 => anywhere | COPIED,
            4 => old | 1 << self.random.u32(56..62),
            _ => {
                let other = self.random.choice(&entries).expect("not empty").0;
                self.word(other)
            }
        };
        self.exact &= !self.has(4);
        self.put(at, new);
        // Several L1 entries may lead to the table by now.
        let same = entries.iter().filter(|(place, _)| *place == at);
        self.touched.extend(same.map(|(_, guest)| (*guest, guest + (1 << self.cluster_bits))));
        self.say(format!("L2 entry of guest offset {guest:#x} is {new:#x}, was {old:#x}"));
    }

    /// Turns flags of an L2 entry over.
    fn flags(&mut self) {
        let entries = self.l2();
        let Some(&(at, guest)) = self.random.choice(&entries) else { return };
        let old = self.word(at);
        self.put(at, old ^ COPIED);
        self.say(format!("L2 entry of guest offset {guest:#x}: COPIED turned over, was {old:#x}"));
    }

    fn l1_entry(&mut self) {
        let entries = self.l1();
        let Some(&(at, guest)) = self.random.choice(&entries) else { return };
        let old = self.word(at);
        let (new, touched) = match self.random.u8(0..6) {
            0 => (0, true),
            1 => (old ^ COPIED, false),
            2 => (old | 1 << self.random.u32(56..62), false),
            3 if self.cluster_bits > 9 => (old | 0x200, true),
            4 => (1 << self.random.u32(40..50) | COPIED, true),
            _ => {
                let other = self.random.choice(&entries).expect("not empty").0;
                (self.word(other), true)
            }
        };
        self.put(at, new);
        let unaligned = new & 0x200 != 0 && self.cluster_bits > 9;
        self.exact &= !unaligned && !self.has(4);
        if touched {
            let coverage = (1 << (2 * self.cluster_bits)) / self.entry_size();
            self.touched.push((guest, guest + coverage));
        }
        self.say(format!("L1 entry of guest offset {guest:#x} is {new:#x}, was {old:#x}"));
    }

    fn reftable(&mut self) {
        let at = self.word(48);
        let old = self.word(at);
        let new = match self.random.u8(0..4) {
            0 => 0,
            1 => old | 1 << self.random.u32(56..62),
            2 if self.cluster_bits > 9 => old | 0x200,
            _ => 1 << self.random.u32(40..50),
        };
        let unaligned = new & 0x200 != 0 && self.cluster_bits > 9;
        self.exact &= !unaligned;
        self.put(at, new);
        self.say(format!("refcount table entry 0 is {new:#x}, was {old:#x}"));
    }

    /// Marks the image as not closed.
    fn dirty(&mut self) {
        if self.version() == 3 {
            self.put(72, self.word(72) | 1);
            self.say("dirty".to_owned());
        }
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small image")
}
