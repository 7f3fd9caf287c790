//! Headers and their extensions.

use super::*;

/// One spoiled field, and the check that must fire.
macro_rules! checks {
    ($($name:ident: |$victim:ident| $spoil:expr => $expected:pat,)*) => {
        $(#[test]
        fn $name() {
            let mut victim = Victim::plain();
            let $victim = &mut victim;
            $spoil;
            let kind = victim.corruption();
            assert!(matches!(kind, $expected), "{kind:?}");
        })*
    };
}

checks! {
    clusters_too_small: |it| it.put32(20, 8) => CorruptKind::ClusterBits(8),
    clusters_too_large: |it| it.put32(20, 22) => CorruptKind::ClusterBits(22),
    clusters_without_sense: |it| it.put32(20, u32::MAX) => CorruptKind::ClusterBits(u32::MAX),
    counts_too_wide: |it| it.put32(96, 7) => CorruptKind::RefcountOrder(7),
    header_too_short: |it| it.put32(100, 96) => CorruptKind::HeaderLength(96),
    header_unaligned: |it| it.put32(100, 108) => CorruptKind::HeaderLength(108),
    header_beyond_its_cluster: |it| it.put32(100, 4104) => CorruptKind::HeaderLength(4104),
    extension_beyond_its_area: |it| it.put32(112, 1).put32(116, u32::MAX) =>
        CorruptKind::ExtensionLength { kind: 1, len: u32::MAX },
    extension_one_byte_too_long: |it| it.put32(112, 1).put32(116, 4096 - 120 + 1) =>
        CorruptKind::ExtensionLength { kind: 1, len: 3977 },
    extensions_without_end: |it| {
        for at in (112..4096 - 8).step_by(8) {
            it.put32(at, 7).put32(at + 4, 0);
        }
    } => CorruptKind::ExtensionCount(_),
    backing_name_beyond_the_cluster: |it| it.put64(8, 4000).put32(16, 97) =>
        CorruptKind::BackingName { offset: 4000, len: 97 },
    backing_name_far_away: |it| it.put64(8, u64::MAX).put32(16, 5) =>
        CorruptKind::BackingName { offset: u64::MAX, len: 5 },
    backing_name_too_long: |it| it.put64(8, 200).put32(16, 1024) =>
        CorruptKind::BackingName { offset: 200, len: 1024 },
    backing_name_over_the_header: |it| it.put64(8, 16).put32(16, 5) =>
        CorruptKind::BackingName { offset: 16, len: 5 },
    backing_name_with_a_zero: |it| it.put64(8, 1000).put32(16, 4).put(1000, b"ab\0d") =>
        CorruptKind::Name("backing file name"),
    backing_name_no_text: |it| it.put64(8, 1000).put32(16, 4).put(1000, b"ab\xff\xfe") =>
        CorruptKind::Name("backing file name"),
    backing_format_no_text: |it|
        it.put32(112, 0xe279_2aca).put32(116, 3).put(120, b"\xffaw") =>
        CorruptKind::Name("backing file format"),
    size_beyond_reason: |it| it.put64(24, 1 << 61) => CorruptKind::VirtualSize(_),
    size_without_end: |it| it.put64(24, u64::MAX) => CorruptKind::VirtualSize(u64::MAX),
    size_beyond_every_table: |it| it.put64(24, 1 << 50) => CorruptKind::VirtualSize(_),
    table_smaller_than_the_disk: |it| it.put64(24, 1 << 40) =>
        CorruptKind::TableSize { table: "L1 table", .. },
    table_without_entries: |it| it.put32(36, 0) =>
        CorruptKind::TableSize { table: "L1 table", entries: 0, .. },
    table_too_large: |it| it.put32(36, (32 << 17) + 1) =>
        CorruptKind::TableSize { table: "L1 table", .. },
    table_unaligned: |it| it.put64(40, 0x3001) =>
        CorruptKind::TableAlignment { table: "L1 table", offset: 0x3001 },
    table_far_away: |it| it.put64(40, 1 << 56) =>
        CorruptKind::TableAlignment { table: "L1 table", .. },
    table_beyond_the_end: |it| it.put64(40, 1 << 40) =>
        CorruptKind::TableBeyondEnd { table: "L1 table", .. },
    table_partly_beyond_the_end: |it| it.put32(36, 4 << 17) =>
        CorruptKind::TableBeyondEnd { table: "L1 table", .. },
    table_over_the_header: |it| it.put64(40, 0) =>
        CorruptKind::TableOverlap { table: "L1 table", offset: 0 },
    reftable_unaligned: |it| it.put64(48, 0x1010) =>
        CorruptKind::TableAlignment { table: "refcount table", .. },
    reftable_missing: |it| it.put64(48, 0) =>
        CorruptKind::TableSize { table: "refcount table", entries: 0, .. },
    reftable_without_clusters: |it| it.put32(56, 0) =>
        CorruptKind::TableSize { table: "refcount table", entries: 0, .. },
    reftable_too_large: |it| it.put32(56, (8 << 8) + 1) =>
        CorruptKind::TableSize { table: "refcount table", .. },
    reftable_largest_number: |it| it.put32(56, u32::MAX) =>
        CorruptKind::TableSize { table: "refcount table", .. },
    reftable_beyond_the_end: |it| it.put64(48, 1 << 40) =>
        CorruptKind::TableBeyondEnd { table: "refcount table", .. },
    reftable_over_the_l1_table: |it| { let l1 = it.word(40); it.put64(48, l1); } =>
        CorruptKind::TableOverlap { .. },
    snapshots_too_many: |it| it.put32(60, 65_537) =>
        CorruptKind::TableSize { table: "snapshot table", .. },
    snapshots_unaligned: |it| it.put32(60, 1).put64(64, 0x1008) =>
        CorruptKind::TableAlignment { table: "snapshot table", .. },
    snapshots_over_the_header: |it| it.put32(60, 1).put64(64, 0) => CorruptKind::Snapshot(_)
        | CorruptKind::TableOverlap { .. } | CorruptKind::TableBeyondEnd { .. },
    compression_without_its_bit: |it| it.put(104, &[1]) => CorruptKind::CompressionType(1),
    bit_without_its_compression: |it| it.put64(72, 8) => CorruptKind::CompressionType(0),
    compression_unknown: |it| it.put64(72, 8).put(104, &[2]) => CorruptKind::CompressionType(2),
    raw_data_without_a_data_file: |it| it.put64(88, 2) => CorruptKind::RawWithoutDataFile,
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let mut victim = Victim::new(Layout::new(9, 300, Kind::Plain));
    let whole = std::mem::take(&mut victim.bytes);
    for len in 0..=600 {
        victim.bytes = whole[..len].to_vec();
        let error = victim.refusal();
        let fits = match error.kind() {
            ErrorKind::Corrupt(CorruptKind::HeaderTruncated { have, need }) => have < need,
            ErrorKind::Corrupt(
                CorruptKind::TableBeyondEnd { .. }
                | CorruptKind::HeaderLength(_)
                | CorruptKind::L1Entry { .. }
                | CorruptKind::ReftableEntry { .. },
            ) => true,
            ErrorKind::Refused(_) => len < 4,
            _ => false,
        };
        assert!(fits, "{len} bytes: {error}");
    }
}

#[test]
fn other_versions_are_refused_by_number() {
    for version in [0, 1, 4, u32::MAX] {
        let error = Victim::plain().put32(4, version).refusal();
        assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
        assert_says(&error, &[&format!("version {version}")]);
    }
}

#[test]
fn foreign_formats_are_refused_with_the_flag_to_pass() {
    let magics: [&[u8]; 6] =
        [b"KDMV", b"vhdxfile", b"conectix", b"LUKS\xba\xbe", b"\0\0\0\0", b"QED\0"];
    for magic in magics {
        let error = Victim::plain().put(0, magic).refusal();
        assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{error}");
        assert_says(&error, &["qcow2", "--format raw"]);
    }
}

#[test]
fn encryption_is_refused_by_name() {
    for (method, name) in [(1, "AES"), (2, "LUKS"), (3, "encrypted")] {
        let error = Victim::plain().put32(32, method).refusal();
        assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
        assert_says(&error, &[name, "encrypted"]);
    }
}

#[test]
fn subclusters_of_less_than_a_sector_are_refused() {
    // Clusters of 4 KiB would have subclusters of 128 bytes.
    let error = Victim::plain().put64(72, 1 << 4).refusal();
    let expected = CorruptKind::SubclusterSize(12);
    assert!(matches!(error.kind(), ErrorKind::Corrupt(kind) if *kind == expected), "{error}");
}

#[test]
fn unknown_features_are_refused_by_name_or_number() {
    let error = Victim::plain().put64(72, 1 << 63 | 1 << 5).refusal();
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
    assert_says(&error, &["bit 63", "bit 5"]);
    // A table that names the bit.
    let mut victim = Victim::plain();
    victim.put64(72, 1 << 40).put(112, &[0; 200]);
    victim.put32(112, 0x6803_f857).put32(116, 48).put(120, &[0, 40]).put(122, b"teleportation");
    assert_says(&victim.refusal(), &["teleportation"]);
    // A name that would forge a line of the log.
    victim.put(122, b"telep\nrtation");
    assert_says(&victim.refusal(), &["40"]);
}

#[test]
fn marked_images_are_read_but_not_written() {
    // Also when it was not closed: a repair could make it worse.
    for bits in [2, 3] {
        let mut victim = Victim::plain();
        victim.put64(72, bits);
        let error = victim.refusal();
        assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{error}");
        assert_says(&error, &["corrupt", "qemu-img check -r all", "--read-only"]);
        let (_, _, image) = victim.open(true);
        image.expect("for reading");
    }
}

#[test]
fn version_2_ignores_the_fields_of_version_3() {
    // In version 2 the bytes from 72 on are extensions; these say where they end.
    let mut victim = Victim::new(Layout::new(12, 800, Kind::Plain).version_2());
    victim.put(72, &[0; 8]).put(80, &[0xff; 32]);
    let (_, _, image) = victim.open(false);
    image.expect("nothing is wrong with it");
}
