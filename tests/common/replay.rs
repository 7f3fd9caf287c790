//! Traces of what a disk was told to do, replayed: beside the file as readers see it runs the file
//! as it is surely durable.

use std::collections::BTreeMap;

use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::mem::{Effect, Event, Stage};

use crate::check::{Map, map};
use crate::images::Made;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// A file as it is surely durable, and as readers see it.
pub struct Replay {
    /// Bytes in a cluster.
    pub cluster: u64,
    /// What a power cut cannot take away.
    pub durable: Vec<u8>,
    /// What a reader sees.
    pub volatile: Vec<u8>,
    /// Changes that have ended and are not durable.
    unsynced: Vec<Event>,
    running: BTreeMap<u64, Event>,
    /// How many changes had ended when a sync was submitted.
    syncs: BTreeMap<u64, usize>,
}

impl Replay {
    /// Begins with an image as it was made.
    pub fn new(made: &mut Made) -> Self {
        let bytes = made.image().clone();
        Self {
            cluster: 1 << made.layout.cluster_bits,
            durable: bytes.clone(),
            volatile: bytes,
            unsynced: Vec::new(),
            running: BTreeMap::new(),
            syncs: BTreeMap::new(),
        }
    }

    /// Takes one event; `rule` sees each submitted change before it takes effect.
    ///
    /// # Panics
    /// When an operation ends that was not submitted.
    pub fn take(&mut self, event: Event, rule: &mut impl FnMut(&Self, &Event)) {
        match (event.stage, &event.effect) {
            (_, Effect::None) => {}
            (Stage::Submitted, Effect::Sync) => {
                self.syncs.insert(event.serial, self.unsynced.len());
            }
            (Stage::Submitted, _) => {
                rule(self, &event);
                self.running.insert(event.serial, event);
            }
            (Stage::Finished, Effect::Sync) => {
                let covered = self.syncs.remove(&event.serial).expect("it was submitted");
                self.unsynced.drain(..covered).for_each(|done| apply(&mut self.durable, &done));
                // Two syncs at once cover the same changes.
                for other in self.syncs.values_mut() {
                    *other = other.saturating_sub(covered);
                }
            }
            (Stage::Finished, _) => {
                let change = self.running.remove(&event.serial).expect("it was submitted");
                apply(&mut self.volatile, &change);
                self.unsynced.push(change);
            }
        }
    }

    /// Changes that have not ended.
    pub fn under_way(&self) -> impl Iterator<Item = &Event> {
        self.running.values()
    }

    /// The durable tables.
    pub fn map(&self) -> Map {
        map(&self.durable)
    }

    /// Durable bytes.
    pub fn durable_at(&self, at: u64, len: u64) -> Vec<u8> {
        slice(&self.durable, at, len)
    }

    /// Changes to one cluster that have not ended, or are not durable.
    pub fn pending(&self, cluster: u64) -> impl Iterator<Item = &Event> {
        let at = cluster * self.cluster;
        let all = self.unsynced.iter().chain(self.running.values());
        all.filter(move |change| change.at < at + self.cluster && at < change.at + change.len)
    }
}

/// An offset as an index.
pub fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small file")
}

/// Bytes of a file, zeros behind its end.
fn slice(bytes: &[u8], at: u64, len: u64) -> Vec<u8> {
    let end = bytes.len();
    let mut found = bytes[index(at).min(end)..index(at + len).min(end)].to_vec();
    found.resize(index(len), 0);
    found
}

/// Changes `bytes` as an operation does.
pub fn apply(bytes: &mut Vec<u8>, change: &Event) {
    let (at, end) = (index(change.at), index(change.at + change.len));
    let hole = change.why == Purpose::GuestDiscard;
    match &change.effect {
        Effect::Length => bytes.resize(index(change.len), 0),
        Effect::Write(data) => {
            bytes.resize(bytes.len().max(end), 0);
            bytes[at..end].copy_from_slice(data);
        }
        _ => {
            let end = if hole { end.min(bytes.len()) } else { end };
            bytes.resize(bytes.len().max(end), 0);
            bytes[at.min(end)..end].fill(0);
        }
    }
}

/// The entries of a piece of a table.
fn entries(event: &Event) -> Vec<u64> {
    let Effect::Write(bytes) = &event.effect else { return Vec::new() };
    let word = |word: &[u8]| u64::from_be_bytes(word.try_into().expect("eight bytes"));
    bytes.chunks_exact(8).map(word).collect()
}

/// Entries that a write of a table changes: place and new value.
pub fn changed(replay: &Replay, event: &Event) -> Vec<(u64, u64)> {
    let old =
        Event { effect: Effect::Write(replay.durable_at(event.at, event.len)), ..event.clone() };
    let places = (event.at..).step_by(8);
    let pairs = places.zip(entries(&old).into_iter().zip(entries(event)));
    pairs.filter(|(_, (old, new))| old != new).map(|(at, (_, new))| (at, new)).collect()
}

/// The cluster that an entry of a table refers to, unless it is compressed.
pub fn targets(replay: &Replay, entry: u64) -> Vec<u64> {
    let at = entry & OFFSET_MASK;
    if at == 0 || entry & COMPRESSED != 0 { Vec::new() } else { vec![at / replay.cluster] }
}
