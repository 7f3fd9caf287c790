//! Images whose clusters were all allocated beforehand: nothing is allocated twice.

use std::os::unix::fs::MetadataExt;

use common::images::IMAGE;

use crate::stage::Act::{Discard, Write};
use crate::stage::{KIB, MIB, Stage, index};

/// Bytes that the host has given to a file, and the file's length.
fn sizes(stage: &Stage, name: &str) -> (u64, u64) {
    let metadata = stage.dir.path().join(name).metadata().expect("a file");
    (metadata.blocks() * 512, metadata.len())
}

#[test]
fn preallocated_images_of_every_cluster_size() {
    for cluster in [KIB, 2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, MIB] {
        let size = 4 * MIB;
        let mut stage = Stage::new(&format!("cluster_size={cluster},preallocation=metadata"), size);
        stage.judge();
        let length = stage.file_length();
        let clusters = stage.report().mapped;
        assert_eq!(clusters, size / cluster, "everything is allocated");
        stage.ours(&[
            Write(512, 512, 1),
            Write(MIB + 3 * KIB, 2 * MIB, 2),
            Write(size - 512, 512, 3),
        ]);
        assert!(stage.file_length() <= length.max(size + length % size), "the file has grown");
        assert_eq!(stage.report().mapped, clusters);
        stage.judge();
    }
}

#[test]
fn every_way_of_preallocation_with_and_without_a_data_file() {
    let size = 2 * MIB;
    for data_file in [false, true] {
        for how in ["off", "metadata", "falloc", "full"] {
            let name = if data_file { ",data_file=guest.data" } else { "" };
            let options = format!("preallocation={how}{name}");
            let mut stage = Stage::new(&options, size).on_host();
            let file = if data_file { "guest.data" } else { IMAGE };
            let before = sizes(&stage, file);
            stage.judge();
            stage.ours(&[
                Write(0, MIB, 1),
                Write(MIB + 5 * KIB, 512, 2),
                Write(size - KIB, KIB, 3),
            ]);
            stage.judge();
            let after = sizes(&stage, file);
            let context = format!("{options}: {before:?} {after:?}");
            match how {
                "off" => assert!(after.0 > before.0, "{context}"),
                "metadata" => assert!(after.1 <= before.1, "{context}"),
                _ => assert!(after.0 <= before.0 && after.1 <= before.1, "{context}"),
            }
            let mapped = stage.report().mapped;
            assert!(how == "off" || mapped == size / (64 * KIB), "{context}: {mapped}");
        }
    }
}

#[test]
fn growth_that_qemu_has_preallocated() {
    // 48 KiB below two megabytes: growing needs no table, an L2 table, or a longer L1 table.
    let size = 2 * MIB - 48 * KIB;
    for cluster in [512, 64 * KIB] {
        for growth in [16 * KIB, 48 * KIB, 80 * KIB] {
            for (before, after) in
                [("off", "metadata"), ("metadata", "falloc"), ("falloc", "full"), ("full", "off")]
            {
                let options = format!("preallocation={before},cluster_size={cluster}");
                let mut stage = Stage::new(&options, size).on_host();
                let (how, by) = (format!("--preallocation={after}"), format!("+{growth}"));
                stage.img(&["resize", "-q", "-f", "qcow2", &how, IMAGE, &by]);
                stage.bytes.resize(index(size + growth), 0);
                let start = sizes(&stage, IMAGE);
                stage.ours(&[Write(0, size, 1)]);
                let middle = sizes(&stage, IMAGE);
                stage.ours(&[Write(size, growth, 2)]);
                let end = sizes(&stage, IMAGE);
                stage.judge();
                let context = format!("{cluster} {growth} {before} {after}");
                for (how, was, is) in [(before, start, middle), (after, middle, end)] {
                    let (length, space) = (is.1 <= was.1, is.0 <= was.0);
                    assert!(how == "off" || length, "{context}: {was:?} {is:?}");
                    assert!(
                        matches!(how, "off" | "metadata") || space,
                        "{context}: {was:?} {is:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_preallocated_image_that_was_emptied_fills_its_holes() {
    let mut stage = Stage::new("preallocation=falloc,cluster_size=4k", 2 * MIB);
    let length = stage.file_length();
    stage.ours(&[Write(0, 2 * MIB, 1), Discard(0, 2 * MIB)]);
    stage.judge();
    stage.ours(&[Write(MIB, MIB, 2), Write(0, MIB, 3)]);
    assert!(stage.file_length() <= length, "the file has grown");
    stage.judge();
}
