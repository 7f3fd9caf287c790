//! Disks that become larger or smaller, with and without a backing file.

use std::path::Path;

use common::images::IMAGE;
use common::qemu::Dir;
use common::workers::options;
use vhost_user_qcow2::error::{Kind, Result};
use vhost_user_qcow2::image::resize;
use vhost_user_qcow2::storage::block_on;

use crate::stage::Act::{Discard, Write};
use crate::stage::{BACKED, KIB, MIB, Stage, base, index};

impl Stage {
    /// We give the disk another size, smaller only when `shrink` says so.
    fn our_resize(&mut self, size: u64, shrink: bool) -> Result<()> {
        let disk = self.host();
        let engine = disk.engine(0, 0);
        let options = options(self.tiny);
        let how = (size, shrink);
        block_on(&engine, resize(&engine, &disk, Path::new(IMAGE), &options, how))?;
        self.put_back(&disk);
        self.bytes.resize(index(size), 0);
        Ok(())
    }

    fn their_resize(&mut self, size: u64) {
        self.img(&["resize", "-q", "-f", "qcow2", "--shrink", IMAGE, &size.to_string()]);
        self.bytes.resize(index(size), 0);
    }
}

#[test]
fn what_a_longer_backing_file_holds_never_shows_in_what_was_added() {
    for (old, new) in [
        (KIB * 64, MIB),
        (100 * KIB, MIB),
        (100 * KIB + 512, 101 * KIB),
        (512 * KIB, 513 * KIB),
        (300 * KIB, 2 * MIB),
    ] {
        for more in ["", ",cluster_size=4k", ",extended_l2=on"] {
            let dir = base(MIB, &[Write(0, MIB, 50)]);
            let options = format!("{BACKED}{more}");
            let mut stage = Stage::windowed(dir, &options, old, 0..old);
            stage.our_resize(new, false).expect("growing");
            stage.judge();
            stage.ours(&[Write(new - 512, 512, 1), Write(old - 512, 1024.min(new - old + 512), 2)]);
            stage.judge();
            // Smaller and larger again: what was cut off does not come back either.
            stage.our_resize(old, true).expect("shrinking");
            stage.judge();
            stage.their_resize(new);
            stage.judge();
            stage.their_resize(old);
            stage.our_resize(new, false).expect("growing");
            stage.judge();
        }
    }
}

#[test]
fn a_version_2_image_cannot_hide_a_longer_backing_file() {
    let dir = base(MIB, &[Write(0, MIB, 50)]);
    let mut stage = Stage::windowed(dir, &format!("compat=0.10,{BACKED}"), 512 * KIB, 0..512 * KIB);
    let before = stage.dir.read(IMAGE);
    match stage.our_resize(MIB, false) {
        Ok(()) => {}
        Err(error) => {
            assert!(matches!(error.kind(), Kind::Refused(_) | Kind::Unsupported(_)), "{error}");
            assert!(stage.dir.read(IMAGE) == before, "it has changed");
        }
    }
    stage.judge();
}

#[test]
fn shrinking_needs_to_be_said_and_gives_tables_back() {
    for cluster in [512, 4 * KIB, 64 * KIB] {
        for width in [1, 16, 64] {
            let options = format!("cluster_size={cluster},refcount_bits={width}");
            let mut stage = Stage::new(&options, 8 * MIB);
            stage.ours(&[
                Write(0, 512, 1),
                Write(3 * MIB, 3 * MIB, 2),
                Write(8 * MIB - KIB, KIB, 3),
            ]);
            let length = stage.file_length();
            let error = stage.our_resize(MIB, false).expect_err("nobody said so");
            assert!(error.to_string().contains("--shrink"), "{error}");
            stage.judge();
            for size in [8 * MIB - 512, 5 * MIB + 512, 3 * MIB + 64 * KIB, MIB, 512, 0] {
                stage.our_resize(size, true).expect("shrinking");
                stage.judge();
                assert_eq!(stage.word(24), size);
            }
            let report = stage.report();
            assert!(report.is_clean() && report.mapped == 0, "{report:?}");
            stage.our_resize(4 * MIB, false).expect("growing");
            stage.judge();
            stage.ours(&[Write(0, 2 * MIB, 4)]);
            assert!(stage.file_length() <= length, "what was given back is not used");
            stage.judge();
        }
    }
}

#[test]
fn what_a_shrink_leaves_in_the_last_cluster_does_not_come_back_when_qemu_grows_the_disk() {
    for options in ["cluster_size=64k", "extended_l2=on", "cluster_size=512"] {
        let mut stage = Stage::new(options, MIB);
        stage.ours(&[Write(0, MIB, 7)]);
        stage.our_resize(300 * KIB + 512, true).expect("shrinking");
        stage.judge();
        stage.their_resize(MIB);
        stage.judge();
    }
}

#[test]
fn random_sizes_in_turns() {
    for seed in common::seeds::seeds(3) {
        let _repeat = common::seeds::Repeat::new("scenarios", "random_sizes_in_turns", seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let options = ["cluster_size=512,refcount_bits=64", "cluster_size=4k", "extended_l2=on"]
            [index(seed % 3)];
        let mut stage = Stage::new(options, MIB);
        for step in 1..10 {
            let size = 512 * random.u64(1..8000);
            if step % 2 == 0 {
                let shrink = size < stage.bytes.len() as u64;
                stage.our_resize(size, shrink).expect("another size");
            } else {
                stage.their_resize(size);
            }
            let len = 512 * random.u64(1..=(size / 512).min(700));
            let at = 512 * random.u64(0..=(size - len) / 512);
            stage.ours(&[Write(at, len, step)]);
            stage.judge();
        }
    }
}

#[test]
fn a_shrink_whose_data_lies_in_the_reverse_order() {
    // What stays of the disk lies at the end of the file: the file cannot just be cut off, and
    // what is dropped before it is more than two gigabytes of the host's.
    let size = 2100 * MIB;
    let layout = "cluster_size=1M,preallocation=metadata";
    let mut stage = Stage::windowed(Dir::new(), layout, size, 0..5 * MIB).on_host();
    stage.theirs(&[Discard(0, 10 * MIB), Discard(size - 10 * MIB, 10 * MIB)]);
    stage.ours(&[Write(size - 10 * MIB, 10 * MIB, 1), Write(0, 10 * MIB, 2)]);
    let used = |stage: &Stage| {
        use std::os::unix::fs::MetadataExt;
        stage.dir.path().join(IMAGE).metadata().expect("the image").blocks() * 512
    };
    let before = used(&stage);
    let session = vhost_user_qcow2::storage::files::Files::new(
        vhost_user_qcow2::storage::files::Options::default(),
    );
    let engine = vhost_user_qcow2::storage::threads::Threads::new(&session, 0).expect("an engine");
    let path = stage.dir.path().join(IMAGE);
    let options = options(false);
    let done = resize(&engine, session.as_ref(), &path, &options, (5 * MIB, true));
    block_on(&engine, done).expect("shrinking");
    drop(engine);
    drop(session);
    let after = used(&stage);
    assert!(after + 14 * MIB <= before, "{before} bytes before, {after} after");
    stage.judge();
}
