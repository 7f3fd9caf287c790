#![expect(clippy::indexing_slicing, reason = "a panic fails the test")]

use super::*;

const CLUSTER: u64 = 65536;

fn extension() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 2, 0, 0, 0, 0];
    bytes.extend(72_u64.to_be_bytes());
    bytes.extend(0x5_0000_u64.to_be_bytes());
    bytes
}

/// Two enabled bitmaps of granularity 64 KiB: entries of 32 and of 40 bytes.
fn directory() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (table, name) in [(0x6_0000_u64, "a"), (0x7_0000, "a longer one")] {
        bytes.extend(table.to_be_bytes());
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 1, 16, 0]);
        bytes.push(u8::try_from(name.len()).expect("short"));
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn parsed(bytes: &[u8]) -> Result<Vec<Entry>, CorruptKind> {
    let place = place(&[extension()], CLUSTER).expect("a good extension");
    parse(bytes, place)
}

#[test]
fn a_good_directory_is_read() {
    let found = place(&[extension()], CLUSTER).expect("a good extension");
    assert_eq!((found.at, found.len, found.count), (HostOffset(0x5_0000), 72, 2));
    let entries = parsed(&directory()).expect("two entries");
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["a", "a longer one"]);
    assert_eq!((entries[1].start, entries[1].table_at), (32, HostOffset(0x7_0000)));
    assert!(entries.iter().all(|entry| entry.is_live() && entry.obstacle().is_none()));
}

#[test]
fn each_field_of_the_extension_is_checked() {
    let changes: [(usize, &[u8]); 6] = [
        (0, &[0, 0, 0, 0]),
        (0, &[0, 1, 0, 0]),
        (7, &[1]),
        (8, &[0, 0, 0, 0, 4, 0, 0, 8]),
        (16, &[0; 8]),
        (22, &[2, 0]),
    ];
    for (at, field) in changes {
        let mut bytes = extension();
        bytes[at..at + field.len()].copy_from_slice(field);
        let error = place(&[bytes], CLUSTER).expect_err("a wrong field");
        assert!(matches!(error, CorruptKind::BitmapsExtension(_)), "{field:?} at {at}");
    }
    assert!(place(&[extension(), extension()], CLUSTER).is_err(), "two extensions");
    let long = [extension(), vec![0; 8]].concat();
    assert!(place(&[long], CLUSTER).is_err(), "too long");
    assert!(place(&[extension()[..16].to_vec()], CLUSTER).is_err(), "too short");
}

#[test]
fn malformed_entries_are_refused() {
    let bytes = directory();
    for len in 0..bytes.len() {
        assert!(parsed(&bytes[..len]).is_err(), "cut off at {len}");
    }
    assert!(parsed(&[bytes.clone(), vec![0; 8]].concat()).is_err(), "longer than its entries");
    let changes: [(usize, &[u8]); 6] = [
        (17, &[64]),
        (18, &[0, 0]),
        (18, &[4, 0]),
        (20, &[0xff; 4]),
        (20, &[0, 0, 0, 200]),
        (18, &[0xff, 0xff]),
    ];
    for (at, field) in changes {
        let mut bytes = directory();
        bytes[at..at + field.len()].copy_from_slice(field);
        let error = parsed(&bytes).expect_err("a wrong field");
        assert!(matches!(error, CorruptKind::Bitmap { .. }), "{field:?} at {at}: {error}");
    }
    let twice = [&bytes[..32], &bytes[..32]].concat();
    assert!(matches!(parsed(&twice), Err(CorruptKind::Bitmap { number: 1, .. })), "one name");
}

#[test]
fn what_is_not_known_cannot_be_kept() {
    for (at, value) in [(15, 2 | 8), (12, 0x80), (16, 2), (16, 0)] {
        let mut bytes = directory();
        bytes[at] = value;
        let entries = parsed(&bytes).expect("well-formed");
        assert!(entries[0].is_live() && entries[0].obstacle().is_some(), "{value} at {at}");
    }
    for flags in [0, 1, 3] {
        let mut bytes = directory();
        bytes[15] = flags;
        assert!(!parsed(&bytes).expect("well-formed")[0].is_live(), "flags {flags}");
    }
}

#[test]
fn unknown_extra_data_needs_the_flag_that_allows_it() {
    let mut bytes = directory();
    // Eight bytes of extra data before the name.
    bytes[23] = 8;
    bytes.splice(24..24, [7; 8]);
    assert!(parsed(&bytes).expect("well-formed")[0].obstacle().is_some());
    bytes[15] |= 4;
    let entries = parsed(&bytes).expect("well-formed");
    assert_eq!((entries[0].obstacle(), entries[0].name.as_str()), (None, "a"));
    assert_eq!(entries[1].start, 40);
}

#[test]
fn a_change_of_an_entry_leaves_the_rest_alone() {
    let mut bytes = directory();
    let entries = parsed(&bytes).expect("two entries");
    set_in_use(&mut bytes, entries[1].start, true);
    set_table(&mut bytes, entries[1].start, HostOffset(0x9_0000));
    let now = parsed(&bytes).expect("two entries");
    assert_eq!(now[0], entries[0]);
    let expected =
        Entry { table_at: HostOffset(0x9_0000), flags: IN_USE | AUTO, ..entries[1].clone() };
    assert_eq!(now[1], expected);
    set_in_use(&mut bytes, entries[1].start, false);
    set_table(&mut bytes, entries[1].start, entries[1].table_at);
    assert_eq!(bytes, directory());
}

#[test]
fn table_entries_with_reserved_bits_are_refused() {
    let part = |entry| Part::parse(entry, 0, CLUSTER);
    assert_eq!((part(0), part(1)), (Ok(Part::Zeros), Ok(Part::Ones)));
    assert_eq!(part(0x5_0000), Ok(Part::At(HostOffset(0x5_0000))));
    for entry in [2, 0x100, 1 << 56, 1 << 63, 0x5_0001, 0x5_0200, 0x8000] {
        assert!(part(entry).is_err(), "{entry:#x}");
    }
    for entry in [0, 1, 0x5_0000] {
        assert_eq!(part(entry).map(Part::entry), Ok(entry));
    }
}
