//! R13: an image has a header only when everything else of it is durable.

use std::path::Path;

use common::images::IMAGE;
use vhost_user_qcow2::image::make::{NewImage, make};
use vhost_user_qcow2::image::{self, Format, OpenOptions};
use vhost_user_qcow2::qcow2::create::{CreateOptions, Preallocation};
use vhost_user_qcow2::storage::block_on;
use vhost_user_qcow2::storage::mem::{Effect, MemDisk, Stage};

#[test]
fn r13_a_new_image_gets_its_header_last() {
    for preallocation in
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
    {
        let disk = MemDisk::new();
        let options = CreateOptions { preallocation, ..CreateOptions::new(3 << 20) };
        header_is_last(&disk, &options, false);
        // Once more, over the image that is there now.
        header_is_last(&disk, &options, true);
    }
}

fn header_is_last(disk: &MemDisk, options: &CreateOptions, replace: bool) {
    disk.start_trace();
    let engine = disk.engine(0, 0);
    let new = NewImage {
        format: Format::Qcow2,
        size: Some(options.size),
        layout: options.clone(),
        replace,
        trust_backing: false,
    };
    let gate = OpenOptions::default();
    block_on(&engine, make(&engine, disk, Path::new(IMAGE), &new, &gate)).expect("create");
    let trace = disk.take_trace();
    let changes: Vec<_> = trace.iter().filter(|event| event.effect != Effect::None).collect();
    if replace {
        let finished = changes.iter().filter(|event| event.stage == Stage::Finished);
        let first: Vec<_> = finished.take(2).map(|event| &event.effect).collect();
        let expected = [&Effect::Length, &Effect::Sync];
        assert_eq!(first, expected, "the old image is gone before the new tables are there");
    }
    let header = changes.iter().position(|e| e.at == 0 && matches!(e.effect, Effect::Write(_)));
    let header = header.expect("a header");
    assert_eq!(changes[header - 1].stage, Stage::Finished, "a sync ends before the header");
    assert_eq!(changes[header - 1].effect, Effect::Sync, "a sync ends before the header");
    let later = &changes[header + 1..];
    let other = later.iter().any(|e| e.at != 0 || matches!(e.effect, Effect::Zeros));
    assert!(!other, "something is written after the header");
    assert!(disk.crash_exactly(0).files() == disk.files(), "all is durable");
}

#[test]
fn what_cannot_be_made_leaves_no_empty_file() {
    let disk = MemDisk::new();
    let engine = disk.engine(0, 0);
    let too_large = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 50) };
    let old = CreateOptions { version: 2, lazy_refcounts: true, ..CreateOptions::new(1 << 20) };
    let data_file = Some("data.raw".to_owned());
    let split = CreateOptions { data_file, ..CreateOptions::new(1 << 20) };
    for options in [too_large, old, split] {
        let made = block_on(&engine, image::create(&engine, &disk, Path::new(IMAGE), &options));
        made.expect_err("such an image cannot be made");
        assert_eq!(disk.files(), [], "a refusal has left something behind");
    }
}
