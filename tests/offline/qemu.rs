//! `qemu-img` makes what we change and list, and the other way round.

use common::images::{IMAGE, Kind, Layout};
use common::qemu::{Dir, Verdict};
use common::sectors::{SECTOR, Tag, bytes_of, tags_of};
use common::workers::{open, read_all, write_some};
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::disk::{Act, act, list};

/// The image in a directory for `qemu-img` and on a simulated host for us, in turns.
struct Pair {
    dir: Dir,
    tags: Vec<Tag>,
    snapshots: Vec<(String, Vec<Tag>)>,
}

impl Pair {
    fn host(&self) -> MemDisk {
        let disk = MemDisk::new();
        let mut files = self.dir.files();
        files.sort_by_key(|(name, _)| name != std::path::Path::new(IMAGE));
        files.into_iter().for_each(|(name, content)| {
            disk.add(name, content);
        });
        disk
    }

    /// We do something; then `qemu-img` looks at it.
    fn ours(&mut self, what: &Act) {
        let disk = self.host();
        act(&disk, what).unwrap_or_else(|error| panic!("{what:?}: {error}"));
        self.dir = Dir::of(&disk);
        self.model(what);
        self.judge(&format!("we: {what:?}"));
    }

    /// `qemu-img` does something; then we look at it.
    fn theirs(&mut self, what: &Act) {
        match what {
            Act::Create(name) => self.dir.img(&["snapshot", "-c", name, IMAGE]),
            Act::Apply(name) => self.dir.img(&["snapshot", "-a", name, IMAGE]),
            Act::Delete(name) => self.dir.img(&["snapshot", "-d", name, IMAGE]),
            Act::Resize(sectors) => {
                let size = (sectors * SECTOR).to_string();
                self.dir.img(&["resize", "-q", "--shrink", "-f", "qcow2", IMAGE, &size])
            }
        };
        self.model(what);
        let disk = self.host();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, false).expect("opening");
        let bytes = read_all(&engine, &image).expect("reading");
        assert!(tags_of(0, &bytes).as_ref() == Some(&self.tags), "they: {what:?}: other bytes");
        let names: Vec<String> = list(&disk).into_iter().map(|one| one.name).collect();
        let expected: Vec<_> = self.snapshots.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, expected, "they: {what:?}");
    }

    /// A guest writes something.
    fn write(&mut self, seed: u64) {
        let disk = self.host();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, false).expect("opening");
        let mut random = fastrand::Rng::with_seed(seed);
        write_some(&engine, &image, &mut self.tags, &mut random).expect("writing");
        block_on(&engine, image.close(&engine)).expect("close");
        self.dir = Dir::of(&disk);
    }

    fn model(&mut self, what: &Act) {
        match what {
            Act::Create(name) => self.snapshots.push((name.clone(), self.tags.clone())),
            Act::Apply(name) => {
                let held = self.snapshots.iter().find(|(one, _)| one == name);
                self.tags.clone_from(&held.expect("it exists").1);
            }
            Act::Delete(name) => self.snapshots.retain(|(one, _)| one != name),
            Act::Resize(sectors) => self.tags.resize(*sectors, 0),
        }
    }

    fn judge(&self, what: &str) {
        let (verdict, printed) = self.dir.check(IMAGE);
        assert_eq!(verdict, Verdict::Clean, "{what}: {printed}");
        self.dir.write("expected", &bytes_of(0, &self.tags));
        self.dir.img(&["compare", "-q", "-f", "raw", "-F", "qcow2", "expected", IMAGE]);
        std::fs::remove_file(self.dir.path().join("expected")).expect("removing a copy");
        for (name, tags) in &self.snapshots {
            let bytes = self.dir.snapshot_bytes(IMAGE, &format!("snapshot.name={name}"));
            // It reads as many bytes as the disk has now, not as many as the snapshot has.
            let both = bytes.len().min(tags.len() * SECTOR);
            let expected = bytes_of(0, &tags[..both / SECTOR]);
            assert!(bytes[..both] == expected, "{what}: snapshot {name} differs");
        }
        let printed = self.dir.img(&["snapshot", "-l", IMAGE]);
        for snapshot in list(&self.host()) {
            let line = printed.lines().find(|line| {
                let mut words = line.split_whitespace();
                words.next() == Some(&snapshot.id) && words.next() == Some(&snapshot.name)
            });
            let line = line.unwrap_or_else(|| panic!("{what}: no {snapshot:?} in {printed}"));
            let icount = snapshot.icount.map(|count| count.to_string());
            assert!(icount.is_none_or(|count| line.ends_with(&count)), "{what}: {line}");
        }
    }
}

fn named(name: &str) -> String {
    name.to_owned()
}

/// Both take turns on one image.
fn turns(layout: Layout) {
    let mut made = layout.make(5);
    let snapshots = made.snapshots.iter().map(|(name, tags)| ((*name).to_owned(), tags.clone()));
    let snapshots = snapshots.collect();
    made.image();
    let mut pair = Pair { dir: Dir::of(&made.disk()), tags: made.tags, snapshots };
    pair.ours(&Act::Create(named("ours")));
    pair.write(1);
    if layout.cluster_bits > 16 {
        // Large clusters make large files, so these are copied less often.
        pair.ours(&Act::Apply(named("one")));
        pair.theirs(&Act::Apply(named("ours")));
        pair.theirs(&Act::Delete(named("one")));
        return pair.ours(&Act::Delete(named("ours")));
    }
    pair.theirs(&Act::Create(named("theirs")));
    pair.write(2);
    pair.ours(&Act::Apply(named("theirs")));
    pair.theirs(&Act::Apply(named("ours")));
    pair.write(3);
    pair.ours(&Act::Delete(named("theirs")));
    if layout.version == 3 {
        pair.ours(&Act::Resize(layout.sectors * 2));
        pair.theirs(&Act::Resize(layout.sectors + 16));
        pair.ours(&Act::Resize(layout.sectors / 2));
    }
    pair.ours(&Act::Create(named("last")));
    pair.theirs(&Act::Delete(named("ours")));
    pair.ours(&Act::Apply(named("last")));
    pair.theirs(&Act::Delete(named("last")));
    for (name, _) in pair.snapshots.clone() {
        pair.ours(&Act::Delete(name));
    }
    if layout.version == 2 {
        pair.ours(&Act::Resize(layout.sectors * 2));
        pair.ours(&Act::Resize(layout.sectors / 2));
    }
}

macro_rules! layouts {
    ($($name:ident: $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            turns($layout);
        })*
    };
}

layouts! {
    clusters_of_512: Layout::new(9, 300, Kind::Snapshots);
    clusters_of_4_kib_with_counts_of_four_bits:
        Layout::new(12, 800, Kind::Snapshots).with_refcount_bits(4);
    clusters_of_4_kib_with_wide_counts:
        Layout::new(12, 800, Kind::Snapshots).with_refcount_bits(64);
    clusters_of_64_kib: Layout::new(16, 4096, Kind::Snapshots);
    clusters_of_64_kib_with_counts_of_eight_bits:
        Layout::new(16, 4096, Kind::Plain).with_refcount_bits(8);
    clusters_of_2_mib: Layout::new(21, 5000, Kind::Snapshots);
    version_2_with_clusters_of_512: Layout::new(9, 300, Kind::Snapshots).version_2();
    version_2_with_clusters_of_64_kib: Layout::new(16, 4096, Kind::Snapshots).version_2();
    subclusters: Layout::new(16, 4096, Kind::Snapshots).extended();
    late_refcounts: Layout::new(16, 4096, Kind::Snapshots).lazy();
    compressed_by_zlib: Layout::new(12, 800, Kind::Compressed("zlib"));
    compressed_by_zstd: Layout::new(16, 4096, Kind::Compressed("zstd"));
}
