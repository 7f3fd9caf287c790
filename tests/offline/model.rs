//! Random histories of writes, discards, snapshots and sizes against a model: the tags of the disk,
//! and of each snapshot. After each step the image must be free of corruption and leaks.

use common::images::{Kind, Layout, Made};
use common::sectors::{SECTOR, Tag, bytes_of, tags_of};
use common::seeds::{Repeat, seeds};
use common::workers::{open, read_all, write_some};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::disk::{Act, act, contents, list, report};

struct Model {
    layout: Layout,
    disk: MemDisk,
    tags: Vec<Tag>,
    /// The highest tag ever written, so that no later write looks like an older one.
    newest: Tag,
    snapshots: Vec<(String, Vec<Tag>)>,
    random: fastrand::Rng,
    next_name: usize,
}

impl Model {
    fn new(made: &Made, seed: u64) -> Self {
        let named = |(name, tags): &(&str, Vec<Tag>)| ((*name).to_owned(), tags.clone());
        Self {
            layout: made.layout,
            disk: made.disk(),
            tags: made.tags.clone(),
            newest: 1 << 16,
            snapshots: made.snapshots.iter().map(named).collect(),
            random: fastrand::Rng::with_seed(seed),
            next_name: 0,
        }
    }

    /// Requests as a guest makes them, and a close.
    fn write(&mut self) {
        let engine = self.disk.engine(0, self.random.u64(..));
        let image = open(&engine, &self.disk, self.random.bool()).expect("opening");
        // The tags that `write_some` draws begin behind the highest it sees.
        let mut tags = self.tags.clone();
        tags.push(self.newest);
        let last = self.tags.len();
        if self.random.bool() && last > 0 {
            let at = self.random.usize(0..last);
            let run = self.random.usize(1..=40).min(last - at);
            let place = (GuestOffset((at * SECTOR) as u64), (run * SECTOR) as u64);
            block_on(&engine, image.discard(&engine, place.0, place.1)).expect("discard");
            // A discarded sector holds what it held, or zeros: the read says which from now on.
            let bytes = read_all(&engine, &image).expect("reading");
            let now = tags_of(0, &bytes).expect("sectors of one version each");
            for (sector, &tag) in now.iter().enumerate() {
                let inside = (at..at + run).contains(&sector);
                assert!(tag == tags[sector] || (inside && tag == 0), "sector {sector}: {tag}");
            }
            tags[..last].copy_from_slice(&now);
        }
        if last > 0 {
            for _ in 0..self.random.usize(0..3) {
                let at = self.random.usize(0..last);
                let run = self.random.usize(1..=24).min(last - at);
                self.newest += 1;
                tags[at..at + run].fill(self.newest);
                let buf =
                    vhost_user_qcow2::storage::Buf::copy_of(&bytes_of(at, &tags[at..at + run]));
                let place = GuestOffset((at * SECTOR) as u64);
                block_on(&engine, image.write(&engine, place, buf)).expect("write");
            }
        }
        tags.truncate(last);
        write_some(&engine, &image, &mut tags, &mut self.random).expect("writing");
        self.newest = self.newest.max(tags.iter().max().copied().unwrap_or(0)) + 8;
        block_on(&engine, image.close(&engine)).expect("close");
        self.tags = tags;
    }

    fn pick(&mut self) -> Option<usize> {
        let count = self.snapshots.len();
        (count > 0).then(|| self.random.usize(0..count))
    }

    fn step(&mut self) {
        match self.random.u8(0..10) {
            0 | 1 if self.snapshots.len() < 4 => {
                self.next_name += 1;
                let name = format!("made {}", self.next_name);
                self.act(Act::Create(name.clone()));
                self.snapshots.push((name, self.tags.clone()));
            }
            2 => {
                if let Some(place) = self.pick() {
                    let (name, tags) = self.snapshots[place].clone();
                    self.act(Act::Apply(name));
                    self.tags = tags;
                }
            }
            3 | 4 => {
                if let Some(place) = self.pick() {
                    let (name, _) = self.snapshots.remove(place);
                    self.act(Act::Delete(name));
                }
            }
            5 | 6 if self.layout.version == 3 || self.snapshots.is_empty() => {
                let most = self.layout.sectors * 3 / 2;
                let sectors = self.random.usize(1..=most);
                self.act(Act::Resize(sectors));
                self.tags.resize(sectors, 0);
            }
            _ => self.write(),
        }
        self.check();
    }

    fn act(&self, what: Act) {
        act(&self.disk, &what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
    }

    fn check(&self) {
        let report = report(&self.disk);
        assert!(report.is_clean(), "{report:?}");
        let engine = self.disk.engine(0, 1);
        let image = open(&engine, &self.disk, false).expect("opening");
        let bytes = read_all(&engine, &image).expect("reading");
        assert!(tags_of(0, &bytes).as_ref() == Some(&self.tags), "the disk holds other bytes");
        let names: Vec<String> = list(&self.disk).into_iter().map(|one| one.name).collect();
        let expected: Vec<String> = self.snapshots.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, expected);
        if !matches!(self.layout.kind, Kind::Plain | Kind::Snapshots) {
            return;
        }
        let found = contents(&self.disk.content_of(common::images::IMAGE).expect("the image"));
        for ((name, tags), (_, bytes)) in self.snapshots.iter().zip(&found.snapshots) {
            assert!(
                tags_of(0, bytes).as_ref() == Some(tags),
                "snapshot {name:?} holds other bytes"
            );
        }
    }
}

fn histories(test: &str, layout: Layout, count: u64) {
    let made = layout.make(7);
    for seed in seeds(count) {
        let _repeat = Repeat::new("offline", test, seed);
        let mut model = Model::new(&made, seed);
        for _ in 0..40 {
            model.step();
        }
    }
}

macro_rules! layouts {
    ($($name:ident: $count:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            histories(concat!("model::", stringify!($name)), $layout, $count);
        })*
    };
}

layouts! {
    clusters_of_512: 12, Layout::new(9, 300, Kind::Snapshots);
    clusters_of_512_with_wide_counts: 8,
        Layout::new(9, 300, Kind::Snapshots).with_refcount_bits(64);
    clusters_of_512_with_a_growing_refcount_table: 2,
        Layout::new(9, 3600, Kind::Plain).with_refcount_bits(64);
    clusters_of_4_kib: 8, Layout::new(12, 900, Kind::Plain);
    clusters_of_4_kib_with_counts_of_four_bits: 8,
        Layout::new(12, 900, Kind::Snapshots).with_refcount_bits(4);
    clusters_of_64_kib: 3, Layout::new(16, 2048, Kind::Snapshots);
    version_2: 8, Layout::new(9, 300, Kind::Snapshots).version_2();
    compressed: 8, Layout::new(12, 900, Kind::Compressed("zlib"));
    over_a_longer_raw_file: 10, Layout::new(9, 300, Kind::OverRaw(700));
    over_a_shorter_raw_file: 6, Layout::new(12, 900, Kind::OverRaw(500));
    subclusters: 6, Layout::new(14, 1500, Kind::Snapshots).extended();
    subclusters_over_a_longer_raw_file: 6, Layout::new(14, 1500, Kind::OverRaw(2900)).extended();
    late_refcounts: 6, Layout::new(9, 300, Kind::Snapshots).lazy();
    chain: 6, Layout::new(12, 900, Kind::Chain);
}
