//! Inflated clusters in memory: how often a cluster is inflated, that nothing stale is served, and
//! compressed bytes of a hostile image.

use std::collections::BTreeSet;

use common::check::check;
use common::images::IMAGE;
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::error::Kind as Failure;
use vhost_user_qcow2::exec::TaskSet;
use vhost_user_qcow2::image::OpenOptions;
use vhost_user_qcow2::qcow2::InflatedBytes;
use vhost_user_qcow2::storage::mem::{MemDisk, MemEngine};
use vhost_user_qcow2::storage::{Buf, Engine, Limits, Purpose, block_on};

use crate::{FILE, Shape, filled, open, options, read, submitted, write_all};

#[test]
fn a_freed_and_reused_place_is_never_served_stale() {
    let shape = Shape::new("zlib", 16, 32 << 16);
    let disk = shape.disk();
    // Whole sectors, so that the same lengths come to lie in the same places.
    disk.set_limits(FILE, Limits { request_alignment: 512, ..Limits::default() });
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, &options(false));
    disk.start_trace();
    let mut places = BTreeSet::new();
    let (mut reused, mut loads) = (0, 0);
    for round in 0..8 {
        let bytes = filled(32, 20_100, round);
        write_all(&engine, &image, &bytes);
        for _ in 0..2 {
            assert!(read(&engine, &image, 0, bytes.len()) == bytes, "round {round}");
        }
        let trace = disk.take_trace();
        let written = submitted(&trace, Purpose::CompressedWrite);
        reused += written.into_iter().filter(|place| !places.insert(*place)).count();
        loads += submitted(&trace, Purpose::CompressedRead).len();
        block_on(&engine, image.discard(&engine, GuestOffset(0), 32 << 16)).expect("discard");
        block_on(&engine, image.flush(&engine)).expect("flush");
        assert!(read(&engine, &image, 0, bytes.len()).iter().all(|&byte| byte == 0));
    }
    assert!(reused > 20, "only {reused} places were used again");
    assert_eq!(loads, 8 * 32, "the second reads came from memory");
}

#[test]
fn small_reads_inflate_a_cluster_once() {
    let shape = Shape::new("zstd", 16, 16 << 16);
    let disk = shape.disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, &options(false));
    let bytes = filled(16, 5000, 1);
    write_all(&engine, &image, &bytes);
    block_on(&engine, image.close(&engine)).expect("close");
    disk.start_trace();
    let mut counts = Vec::new();
    // All, a quarter, none of the disk in memory.
    for budget in [1 << 20, 1 << 18, 0] {
        let options = OpenOptions { inflated: InflatedBytes(budget), ..options(false) };
        let image = open(&engine, &disk, &options);
        disk.take_trace();
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..1000 {
            let at = random.usize(0..bytes.len() / 4096) * 4096;
            assert!(read(&engine, &image, at, 4096) == bytes[at..at + 4096]);
        }
        counts.push(submitted(&disk.take_trace(), Purpose::CompressedRead).len());
    }
    println!("1000 reads of 4 KiB of 16 clusters: {counts:?} were inflated");
    assert_eq!((counts[0], counts[2]), (16, 1000));
    assert!((500..1000).contains(&counts[1]), "a quarter of them are hits: {counts:?}");
}

#[test]
fn readers_of_one_cluster_at_the_same_time_inflate_it_once() {
    let shape = Shape::new("zlib", 16, 1 << 16);
    let disk = shape.disk();
    let engine = disk.engine(0, 0);
    let image = open(&engine, &disk, &options(false));
    let bytes = filled(1, 5000, 1);
    write_all(&engine, &image, &bytes);
    disk.start_trace();
    let engines: Vec<MemEngine> = (1..4).map(|lane| disk.engine(lane, 9)).collect();
    let mut tasks = TaskSet::new(12, || {});
    for part in 0..12 {
        let (image, bytes, engine) = (&image, &bytes, &engines[part % 3]);
        tasks.spawn(async move {
            let buf = Buf::zeroed(4096);
            let at = GuestOffset(part as u64 * 4096);
            image.read(engine, at, buf.clone()).await.expect("read");
            assert!(buf.to_vec() == bytes[part * 4096..(part + 1) * 4096]);
        });
    }
    while !tasks.is_idle() {
        let moved = tasks.run_ready() + engines.iter().map(Engine::reap).sum::<usize>();
        assert!(moved > 0, "{} readers wait for nothing", tasks.len());
    }
    assert_eq!(submitted(&disk.take_trace(), Purpose::CompressedRead).len(), 1);
}

#[test]
fn many_readers_meet_threads_that_inflate() {
    const CLUSTERS: usize = 48;
    for kind in ["zlib", "zstd"] {
        let shape = Shape::new(kind, 16, CLUSTERS << 16);
        let disk = shape.disk();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, &options(false));
        let bytes = filled(CLUSTERS, 5000, 3);
        write_all(&engine, &image, &bytes);
        block_on(&engine, image.close(&engine)).expect("close");
        // A quarter of the disk in memory, so that most reads have to wait for a thread.
        let inflated = InflatedBytes(12 << 16);
        let options = OpenOptions { inflaters: 3, inflated, ..options(false) };
        let image = open(&engine, &disk, &options);
        let mut random = fastrand::Rng::with_seed(4);
        let mut tasks = TaskSet::new(32, || {});
        let mut left = 2000;
        while left > 0 || !tasks.is_idle() {
            while left > 0 && tasks.has_room() {
                left -= 1;
                let at = random.usize(0..bytes.len() / 4096) * 4096;
                let (image, bytes, engine) = (&image, &bytes, &engine);
                tasks.spawn(async move {
                    let buf = Buf::zeroed(4096);
                    let place = GuestOffset(at as u64);
                    image.read(engine, place, buf.clone()).await.expect("read");
                    assert!(buf.to_vec() == bytes[at..at + 4096], "{kind} at {at}");
                });
            }
            if tasks.run_ready() + engine.reap() == 0 {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn hostile_compressed_bytes_fail_alone() {
    let zeros = vec![0; 32 << 20];
    // A window of 2^41 bytes; what inflates to 32 MiB; a frame that ends early; noise.
    let window = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x03, 0x80, 0x00, 0x55];
    let bomb = zstd::bulk::compress(&zeros, 3).expect("to memory");
    let short = zstd::bulk::compress(&zeros[..100], 3).expect("to memory");
    let noise = vec![0xff; 3000];
    for (how, hostile) in [
        ("zstd", window),
        ("zstd", bomb),
        ("zstd", short),
        ("zstd", noise.clone()),
        ("zlib", noise),
        ("zlib", vec![0x03, 0x00]),
    ] {
        let shape = Shape::new(how, 16, 3 << 16);
        let disk = shape.disk();
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, &options(false));
        disk.start_trace();
        let bytes = filled(3, 3500, 1);
        write_all(&engine, &image, &bytes);
        let places = submitted(&disk.take_trace(), Purpose::CompressedWrite);
        block_on(&engine, image.close(&engine)).expect("close");
        let mut content = disk.content(FILE);
        let at = usize::try_from(places[1].0).expect("a small file");
        content[at..at + hostile.len()].copy_from_slice(&hostile);
        let disk = MemDisk::new();
        disk.add(IMAGE, content);
        let engine = disk.engine(0, 0);
        let image = open(&engine, &disk, &options(false));
        for _ in 0..2 {
            let buf = Buf::zeroed(512);
            let outcome = block_on(&engine, image.read(&engine, GuestOffset(1 << 16), buf));
            let error = outcome.expect_err("nothing that inflates to one cluster");
            assert!(matches!(error.kind(), Failure::Corrupt(_)), "{error}");
        }
        for whole in [0, 2 << 16] {
            assert!(read(&engine, &image, whole, 1 << 16) == bytes[whole..whole + (1 << 16)]);
        }
        // The guest can put something else there.
        let written = image.write(&engine, GuestOffset(1 << 16), Buf::copy_of(&bytes[..1 << 16]));
        block_on(&engine, written).expect("write");
        assert!(read(&engine, &image, 1 << 16, 1 << 16) == bytes[..1 << 16]);
        block_on(&engine, image.close(&engine)).expect("close");
        let report = disk.look(IMAGE, check).expect("the image");
        assert!(report.is_clean(), "{report:?}");
    }
}
