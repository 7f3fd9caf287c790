//! Reads and writes: patterns over edges of clusters and tables, copies from backing files, and
//! many requests at once.

use common::images::IMAGE;
use common::qemu::Dir;
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::storage::block_on;

use crate::stage::Act::{Discard, Unmap, Write, Zero};
use crate::stage::{Act, BACKED, KIB, MIB, Stage, base, index, word};

/// Requests of one length at even distances, each with its own byte.
fn stride(at: u64, len: u64, distance: u64, count: u64) -> Vec<Act> {
    let byte = |step: u64| u8::try_from(step % 250 + 1).expect("small");
    (0..count).map(|step| Write(at + step * distance, len, byte(step))).collect()
}

/// The patterns around one place: whole clusters, halves, ends, and runs over two and three.
fn patterns(at: u64, cluster: u64) -> Vec<Act> {
    let mut acts = stride(at, cluster, cluster, 8);
    acts.extend(stride(at + 8 * cluster, cluster / 2, cluster, 8));
    acts.extend(stride(at + 17 * cluster - 512, 1024.min(cluster), cluster, 8));
    acts.extend(stride(at + 26 * cluster + cluster / 2, 2 * cluster, 3 * cluster, 4));
    acts
}

/// The patterns at the start, over the edge of an L2 table, and beyond four gigabytes.
fn everywhere(options: &str, cluster: u64, backed: bool) {
    let table = cluster * (cluster / 8);
    let far = (4 << 30) + table - 16 * cluster;
    let size = 4 * (MIB << 10) + table + 64 * cluster.max(KIB);
    for start in [0, table - 16 * cluster, far] {
        let window = start..start + 48 * cluster;
        let (dir, options) = if backed {
            let under =
                [Write(start, 13 * cluster + 512, 200), Write(start + 20 * cluster, 512, 201)];
            (base(size, &under), format!("{options},{BACKED}"))
        } else {
            (Dir::new(), options.to_owned())
        };
        let mut stage = Stage::windowed(dir, &options, size, window);
        stage.ours(&patterns(start, cluster));
        stage.judge();
        // Over what is there, from the end to the start, by both.
        let mut again = stride(start + cluster / 2, cluster, cluster * 2, 16);
        again.reverse();
        stage.theirs(&again[..8]);
        stage.ours(&again[8..]);
        stage.judge();
    }
}

#[test]
fn patterns_at_every_edge_in_clusters_of_64_kib() {
    everywhere("compat=1.1", 64 * KIB, false);
}

#[test]
fn patterns_at_every_edge_in_clusters_of_512() {
    everywhere("cluster_size=512", 512, false);
}

#[test]
fn patterns_at_every_edge_in_clusters_of_1_and_4_kib() {
    everywhere("cluster_size=1k,compat=0.10", KIB, false);
    everywhere("cluster_size=4k", 4 * KIB, false);
}

#[test]
fn patterns_at_every_edge_over_a_backing_file() {
    everywhere("cluster_size=4k", 4 * KIB, true);
    everywhere("cluster_size=512,compat=0.10", 512, true);
}

#[test]
fn what_a_small_write_leaves_of_its_cluster_is_zeros_or_the_backing_files() {
    for backed in [false, true] {
        for cluster in [4 * KIB, 64 * KIB] {
            let size = 16 * cluster;
            let dir = if backed { base(size, &[Write(0, size, 7)]) } else { Dir::new() };
            let name = if backed { format!(",{BACKED}") } else { String::new() };
            let options = format!("cluster_size={cluster}{name}");
            let mut stage = Stage::windowed(dir, &options, size, 0..size);
            let small = [
                Write(0, 512, 1),
                Write(2 * cluster - 512, 512, 2),
                Write(3 * cluster + cluster / 2, 512, 3),
                Write(5 * cluster - 512, 1024, 4),
                Write(7 * cluster - 512, cluster + 1024, 5),
                Write(10 * cluster + 512, 3 * cluster, 6),
            ];
            stage.ours(&small);
            stage.judge();
        }
    }
}

#[test]
fn sectors_from_the_last_to_the_first() {
    for options in ["cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
        let mut stage = Stage::new(options, 256 * KIB);
        let mut acts = stride(16 * KIB, 512, 512, 96);
        acts.reverse();
        stage.ours(&acts);
        stage.judge();
        // The clusters lie in the file in the order in which they were begun: from the last on.
        let l2 = stage.word(stage.word(40)) & 0x00ff_ffff_ffff_fe00;
        let (cluster, entry) = if options.starts_with("ext") { (16, 16) } else { (4, 8) };
        let host = |guest: u64| stage.word(l2 + guest / cluster * entry) & 0x00ff_ffff_ffff_fe00;
        let places: Vec<u64> = (16..64).step_by(index(cluster)).map(host).collect();
        assert!(places.iter().all(|&place| place > 0), "{places:x?}");
    }
}

#[test]
fn requests_to_more_tables_than_the_cache_holds() {
    for seed in seeds(4) {
        let _repeat =
            Repeat::new("scenarios", "requests_to_more_tables_than_the_cache_holds", seed);
        let mut stage = Stage::new("cluster_size=512", 8 * MIB).tiny();
        stage.order = (3, seed);
        // An L2 table covers 32 KiB: every request has a table of its own.
        let mut acts = stride(512 * (seed % 8), 1024, 32 * KIB, 250);
        fastrand::Rng::with_seed(seed).shuffle(&mut acts);
        stage.ours_together(&acts);
        stage.judge();
        stage.ours_together(&stride(16 * KIB, 2048, 32 * KIB, 200));
        stage.judge();
    }
}

/// Pieces of the same clusters, cut at every sector, at once.
fn crowd(stage: &mut Stage, seed: u64, size: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    stage.order = (4, seed);
    let mut acts = Vec::new();
    let mut at = 512 * random.u64(0..8);
    while at < size {
        let len = (512 * random.u64(1..24)).min(size - at);
        acts.push(match random.u8(0..12) {
            0 => Zero(at, len),
            1 => Unmap(at, len),
            _ => Write(at, len, random.u8(1..)),
        });
        at += len + 512 * random.u64(0..3);
    }
    random.shuffle(&mut acts);
    stage.ours_together(&acts);
    stage.judge();
}

#[test]
fn many_at_once_in_the_same_new_clusters() {
    for seed in seeds(6) {
        let _repeat = Repeat::new("scenarios", "many_at_once_in_the_same_new_clusters", seed);
        crowd(&mut Stage::new("cluster_size=4k", 512 * KIB), seed, 512 * KIB);
        crowd(&mut Stage::new("cluster_size=64k", 512 * KIB), seed, 512 * KIB);
        crowd(&mut Stage::new("extended_l2=on", 512 * KIB), seed, 512 * KIB);
    }
}

#[test]
fn many_at_once_copied_from_a_backing_file() {
    for seed in seeds(4) {
        let _repeat = Repeat::new("scenarios", "many_at_once_copied_from_a_backing_file", seed);
        // Of another cluster size, shorter than the overlay, with holes.
        let below = stride(0, 24 * KIB, 40 * KIB, 9);
        for options in ["cluster_size=4k", "cluster_size=64k", "extended_l2=on"] {
            let dir = base(352 * KIB, &below);
            let options = format!("{options},{BACKED}");
            let mut stage = Stage::windowed(dir, &options, 512 * KIB, 0..512 * KIB);
            crowd(&mut stage, seed, 512 * KIB);
        }
    }
}

#[test]
fn one_at_a_time_copied_from_a_backing_file() {
    let below = stride(0, 24 * KIB, 40 * KIB, 12);
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M"] {
        let dir = base(500 * KIB, &below);
        let options = format!("{options},{BACKED}");
        let mut stage = Stage::windowed(dir, &options, 512 * KIB, 0..512 * KIB);
        stage.ours(&stride(2 * KIB + 512, 1536, 7 * KIB, 70));
        stage.judge();
        stage.theirs(&stride(512, 512, 9 * KIB, 50));
        stage.ours(&[Write(60 * KIB, 200 * KIB, 99)]);
        stage.judge();
    }
}

#[test]
fn one_read_over_clusters_of_every_kind() {
    let cluster = 64 * KIB;
    for backed in [false, true] {
        let size = 32 * cluster;
        let dir = if backed { base(size, &[Write(0, size, 77)]) } else { Dir::new() };
        let name = if backed { format!(",{BACKED}") } else { String::new() };
        let options = format!("cluster_size={cluster}{name}");
        let mut stage = Stage::windowed(dir, &options, size, 0..size);
        let commands: Vec<String> = [4, 5, 11, 20]
            .iter()
            .map(|number| format!("write -q -c -P {} {} {cluster}", number + 100, number * cluster))
            .collect();
        stage.dir.io("disk.qcow2", &commands);
        for number in [4, 5, 11, 20] {
            let byte = u8::try_from(number + 100).expect("small");
            stage.expect(&[Write(number * cluster, cluster, byte)]);
        }
        // Neighbours in the file, neighbours in the disk only, zeros with and without a place.
        stage.ours(&[
            Write(0, 2 * cluster, 1),
            Write(3 * cluster, cluster, 2),
            Write(2 * cluster, cluster, 3),
            Write(6 * cluster, 4 * cluster, 4),
            Zero(7 * cluster, cluster),
            Unmap(8 * cluster, cluster),
            Discard(9 * cluster, cluster),
            Write(12 * cluster, 3 * cluster, 5),
            Unmap(16 * cluster, 2 * cluster),
            Write(18 * cluster, 2 * cluster, 6),
        ]);
        stage.judge();
        for (at, len) in [(512, 3 * cluster), (3 * cluster + 1024, 9 * cluster), (0, size)] {
            let expected = stage.bytes[index(at)..index(at + len)].to_vec();
            let have = stage.session(|session| session.read(at, len)).expect("reading");
            assert!(have == expected, "{len} bytes at {at}");
        }
    }
}

#[test]
fn one_large_write_and_requests_of_more_than_32_bits() {
    let options = "cluster_size=2M,preallocation=metadata";
    let mut stage =
        Stage::windowed(Dir::new(), options, 6 << 30, (4 << 30) - 64 * MIB..(4 << 30) + 64 * MIB)
            .on_host();
    // One run of clusters in the file, and one request over all of it.
    stage.ours(&[Write((4 << 30) - 48 * MIB, 96 * MIB, 9)]);
    stage.judge();
    stage.ours(&[Discard(512, (5 << 30) + 512)]);
    stage.judge();
    stage.ours(&[Write((4 << 30) - MIB, 2 * MIB, 8), Unmap(MIB, (5 << 30) - 512)]);
    stage.judge();
    assert_eq!(word(&stage.dir, 24), 6 << 30);
}

#[test]
fn a_shorter_layer_of_a_deep_chain_ends_where_it_ends_each_time_it_is_read() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "base.qcow2", "4M"]);
    dir.io("base.qcow2", &["write -q -P 7 0 4M".to_owned()]);
    dir.img(&["resize", "-q", "--shrink", "base.qcow2", "3146240"]);
    for (name, below) in [("middle.qcow2", "base.qcow2"), (IMAGE, "middle.qcow2")] {
        dir.img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, name, "4M"]);
    }
    let stage = Stage::of(dir);
    let session = stage.open().expect("opening");
    // The base's table is in memory from here on.
    assert_eq!(session.read(2 * MIB, 64 * KIB).expect("reading"), [7; 64 << 10]);
    for turn in 0..3 {
        let bytes = session.read(3 * MIB + 64 * KIB, 64 * KIB).expect("reading");
        assert!(bytes.iter().all(|byte| *byte == 0), "turn {turn}: what was cut off is back");
    }
    drop(session.close());
}

#[test]
fn a_deep_chain_whose_top_grows_shows_nothing_that_a_shorter_layer_hid() {
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "base.qcow2", "11M"]);
    dir.io("base.qcow2", &["write -q -P 7 0 11M".to_owned()]);
    for (name, below) in [("middle.qcow2", "base.qcow2"), (IMAGE, "middle.qcow2")] {
        dir.img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, name, "10272K"]);
    }
    let stage = Stage::of(dir);
    let mut session = stage.open().expect("opening");
    let end = 10272 * KIB;
    assert_eq!(session.read(end - 32 * KIB, 32 * KIB).expect("reading"), [7; 32 << 10]);
    let engine = session.engine.as_ref();
    block_on(engine, session.image.resize(engine, 11 * MIB, false)).expect("growing");
    let bytes = session.read(end, 32 * KIB).expect("reading");
    assert!(bytes.iter().all(|byte| *byte == 0), "the base shows");
    drop(session.close());
}
