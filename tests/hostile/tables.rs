//! Tables whose entries point where they must not.

use super::*;
use common::memory::peak;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::storage::{Buf, Engine};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

impl Victim {
    fn table(&self, field: u64) -> u64 {
        self.word(field) & OFFSET_MASK
    }

    fn l1(&self) -> u64 {
        self.table(40)
    }

    fn reftable(&self) -> u64 {
        self.table(48)
    }

    fn refblock(&self) -> u64 {
        self.word(self.reftable()) & OFFSET_MASK
    }

    fn l2(&self) -> u64 {
        self.word(self.l1()) & OFFSET_MASK
    }
}

fn write(engine: &dyn Engine, image: &Image, at: u64, len: usize) -> Result<()> {
    block_on(engine, image.write(engine, GuestOffset(at), Buf::copy_of(&vec![0x5a; len])))
}

fn read(engine: &dyn Engine, image: &Image, at: u64, len: usize) -> Result<Vec<u8>> {
    let buf = Buf::zeroed(len);
    block_on(engine, image.read(engine, GuestOffset(at), buf.clone()))?;
    Ok(buf.to_vec())
}

fn kind(error: &Error) -> CorruptKind {
    match error.kind() {
        ErrorKind::Corrupt(kind) => *kind,
        _ => panic!("another error: {error}"),
    }
}

/// The clusters that hold metadata, each with its name.
fn metadata(victim: &Victim) -> Vec<(&'static str, u64)> {
    let mut places = vec![
        ("refcount table", victim.reftable()),
        ("refcount block", victim.refblock()),
        ("L1 table", victim.l1()),
        ("L2 table", victim.l2()),
    ];
    if victim.word(60) >> 32 > 0 {
        let snapshots = victim.table(64);
        places.push(("snapshot table", snapshots));
        places.push(("snapshot's L1 table", victim.word(snapshots)));
    }
    places
}

/// What a guest may try on a cluster.
const ATTEMPTS: [&str; 5] = ["write", "part", "zero", "unmap", "discard"];

/// A request on the guest's first cluster, a flush, and many new clusters after it.
fn attempt(what: &str, engine: &dyn Engine, image: &Image) -> Result<()> {
    let start = GuestOffset(0);
    match what {
        "write" => write(engine, image, 0, 4096)?,
        "part" => write(engine, image, 512, 512)?,
        "zero" => block_on(engine, image.write_zeroes(engine, start, 4096, false))?,
        "unmap" => block_on(engine, image.write_zeroes(engine, start, 4096, true))?,
        _ => block_on(engine, image.discard(engine, start, 4096))?,
    }
    for step in 1..60 {
        block_on(engine, image.flush(engine))?;
        write(engine, image, step * 4096, 4096)?;
        block_on(engine, image.discard(engine, GuestOffset(step * 4096), 4096))?;
    }
    Ok(())
}

/// No request of the guest may change the cluster at `place`, nor free it, although the guest's
/// first cluster is mapped onto it by `entry`.
fn assert_out_of_reach(layout: Layout, name: &str, entry: impl Fn(&Victim, u64) -> u64) {
    let template = Victim::new(layout);
    let mut places = metadata(&template);
    places.push(("header", 0));
    for (table, place) in places {
        let entry = entry(&template, place);
        if entry & (COMPRESSED | OFFSET_MASK) == 0 {
            // No reference to cluster 0 can be written in this way.
            continue;
        }
        for what in ATTEMPTS {
            let mut victim = Victim::new(layout);
            let slot = victim.l2();
            victim.put64(slot, entry);
            let (disk, engine, image) = victim.open(false);
            let image = image.expect("the tables themselves are fine");
            let result = attempt(what, &engine, &image);
            // Every guest byte is 0x5a or zero: neither may appear in place of a table.
            let size = if matches!(table, "L2 table" | "refcount block") { 0 } else { 64 };
            let at = usize::try_from(place).expect("small");
            let now = disk.look(IMAGE, |now| now[at..at + size].to_vec()).expect("the image");
            assert!(now == victim.bytes[at..at + size], "{name}: {what} has changed the {table}");
            let what = format!("{layout:?}, {name}: {what} on the {table}");
            let Err(error) = result else { panic!("{what} succeeds") };
            assert!(matches!(error.kind(), ErrorKind::Corrupt(_)), "{what}: {error}");
            write(&engine, &image, 9 * 4096, 512).expect_err("writes are refused from then on");
        }
    }
}

#[test]
fn a_guest_cannot_reach_tables_by_plain_clusters() {
    let plain = Layout::new(12, 800, Kind::Plain);
    let snapshots = Layout::new(12, 800, Kind::Snapshots);
    for layout in [plain, snapshots, plain.version_2()] {
        assert_out_of_reach(layout, "private", |_, place| place | COPIED);
        assert_out_of_reach(layout, "shared", |_, place| place);
        if layout.version == 3 {
            assert_out_of_reach(layout, "zeros", |_, place| place | COPIED | 1);
        }
    }
}

#[test]
fn a_guest_cannot_free_tables_by_compressed_clusters() {
    let plain = Layout::new(12, 800, Kind::Plain);
    for layout in [plain, Layout::new(12, 800, Kind::Snapshots)] {
        assert_out_of_reach(layout, "compressed", |_, place| place | COMPRESSED);
        // One that begins in the cluster before, and ends in the table.
        assert_out_of_reach(layout, "compressed, the end", |_, place| {
            if place == 0 { 0 } else { (place - 512) | COMPRESSED | 1 << 58 }
        });
    }
}

#[test]
fn tables_over_other_metadata_are_refused() {
    let template = Victim::plain();
    for (name, place) in metadata(&template) {
        let mut victim = Victim::plain();
        let (l1, reftable) = (victim.l1(), victim.reftable());
        if name != "L2 table" {
            victim.put64(l1, place | COPIED);
            let kind = victim.corruption();
            assert!(matches!(kind, CorruptKind::TableOverlap { .. }), "{name}: {kind:?}");
        }
        if name != "refcount block" {
            let mut victim = Victim::plain();
            victim.put64(reftable, place);
            let kind = victim.corruption();
            assert!(matches!(kind, CorruptKind::TableOverlap { .. }), "{name}: {kind:?}");
        }
    }
}

#[test]
fn an_l1_entry_that_leads_nowhere_fails_on_use_and_is_never_written_with() {
    // The file must not grow up to a table that lies behind its end: it would consist of the
    // guest's bytes.
    for (entry, aligned) in [(1 << 19, true), (1 << 50, true), (4608, false)] {
        let mut victim = Victim::plain();
        let (l1, end) = (victim.l1(), victim.bytes.len() as u64);
        let offset = if aligned { end.next_multiple_of(4096) + entry } else { entry };
        victim.put64(l1, offset | COPIED);
        let (_, engine, image) = victim.open(true);
        let image = image.expect("for reading");
        let error = read(&engine, &image, 0, 512).expect_err("no table");
        assert!(matches!(kind(&error), CorruptKind::L1Entry { index: 0, .. }), "{error}");
        match victim.corruption() {
            CorruptKind::TableBeyondEnd { table: "L2 table", .. } if aligned => {}
            CorruptKind::TableAlignment { table: "L2 table", .. } if !aligned => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn malformed_entries_fail_on_use_with_their_guest_offset() {
    let plain = Layout::new(12, 800, Kind::Plain);
    let data = Layout::new(12, 800, Kind::DataFile { raw: false });
    let cases = [
        ("unaligned", plain, COPIED | 0x5200),
        ("a zero flag in version 2", plain.version_2(), 1),
        ("another place in the data file", data, COPIED | 0x5000),
        ("compressed in a data file", data, COMPRESSED | 0x5000),
    ];
    for (name, layout, entry) in cases {
        let mut victim = Victim::new(layout);
        if victim.l2() == 0 {
            continue;
        }
        let slot = victim.l2();
        victim.put64(slot + 8, entry);
        // Each on an image of its own: the first contradiction stops all later writes.
        let open = || victim.open(false);
        let (_, engine, image) = open();
        let image = image.expect("entries are looked at when they are used");
        let read = read(&engine, &image, 4096, 512).expect_err(name);
        let (_, engine, image) = open();
        let write = write(&engine, &image.expect("again"), 4096 + 512, 512).expect_err(name);
        for error in [read, write] {
            let expected = CorruptKind::L2Entry { guest: 4096, entry };
            assert_eq!(kind(&error), expected, "{name}");
        }
    }
}

#[test]
fn data_beyond_the_end_of_the_file_is_no_way_to_a_huge_file() {
    for offset in [4 << 20, 1 << 40, 1 << 54, OFFSET_MASK & !0xfff] {
        let mut victim = Victim::plain();
        let slot = victim.l2();
        let entry = offset | COPIED;
        victim.put64(slot, entry);
        let (_, engine, image) = victim.open(false);
        let read = read(&engine, &image.expect("opens"), 0, 4096).expect_err("a read beyond");
        let (disk, engine, image) = victim.open(false);
        let write = write(&engine, &image.expect("opens"), 0, 4096).expect_err("a write beyond");
        for error in [read, write] {
            assert_eq!(kind(&error), CorruptKind::L2Entry { guest: 0, entry });
        }
        let length = disk.look(IMAGE, <[u8]>::len).expect("the image");
        assert!(length < 2 * victim.bytes.len(), "the file has {length} bytes now");
    }
}

#[test]
fn garbage_and_bombs_do_not_inflate() {
    let mut bomb = flate(&vec![0; 1 << 26]);
    bomb.truncate(512);
    for (name, bytes) in [("garbage", vec![0xa5; 512]), ("a bomb", bomb), ("nothing", vec![0; 512])]
    {
        for at in [None, Some(1 << 40)] {
            let mut victim = Victim::plain();
            let place = (victim.bytes.len() as u64).next_multiple_of(4096);
            victim.bytes.resize(usize::try_from(place).expect("small"), 0);
            victim.bytes.extend(&bytes);
            let slot = victim.l2();
            victim.put64(slot, at.unwrap_or(place) | COMPRESSED | 1 << 58);
            let (_, engine, image) = victim.open(false);
            let image = image.expect("opens");
            let (result, memory) = peak(|| read(&engine, &image, 0, 4096));
            assert!(memory < 1 << 20, "{name}: {memory} bytes of memory for one cluster");
            // A bomb's first cluster is a cluster of zeros like any other.
            match result {
                Ok(bytes) => assert!(name == "a bomb" && bytes == [0; 4096], "{name} inflates"),
                Err(error) => assert!(matches!(kind(&error), CorruptKind::Compressed { .. })),
            }
        }
    }
}

/// A deflate stream of stored blocks would be larger than its content; this one is not needed to
/// be small, only to go on and on.
fn flate(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let level = flate2::Compression::best();
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
    encoder.write_all(bytes).expect("to memory");
    encoder.finish().expect("to memory")
}

#[test]
fn clusters_in_use_with_refcount_zero_are_not_given_to_others() {
    // Every refcount is zero: whatever the search for holes finds first is in use.
    let mut victim = Victim::plain();
    let (block, before) = (victim.refblock(), victim.bytes.clone());
    victim.put(block, &[0; 4096]);
    let (disk, engine, image) = victim.open(false);
    let image = image.expect("opens");
    let mut failed = false;
    for step in 0..100 {
        failed |=
            block_on(&engine, image.discard(&engine, GuestOffset(step * 4096), 4096)).is_err();
        failed |= write(&engine, &image, step * 4096, 4096).is_err();
        failed |= block_on(&engine, image.flush(&engine)).is_err();
    }
    assert!(failed, "nothing was noticed");
    let tables = [0, victim.l1(), victim.reftable()];
    for at in tables.map(|at| usize::try_from(at).expect("small")) {
        let same = disk.look(IMAGE, |now| now[at..at + 64] == before[at..at + 64]);
        assert!(same.expect("the image"), "the table at {at:#x} was overwritten");
    }
}

#[test]
fn refcount_blocks_that_are_nowhere_are_refused() {
    for entry in [0x1200, 1 << 55, 0x00ff_ffff_ffff_f000, 0x5000_0000] {
        let mut victim = Victim::plain();
        let reftable = victim.reftable();
        victim.put64(reftable, entry);
        let kind = victim.corruption();
        let fits = matches!(
            kind,
            CorruptKind::TableBeyondEnd { table: "refcount block", .. }
                | CorruptKind::TableAlignment { table: "refcount block", .. }
        );
        assert!(fits, "{kind:?}");
    }
}
