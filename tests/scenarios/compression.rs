//! Compressed clusters: what `qemu-img convert` makes, descriptors that state too much or too
//! little, and places beyond four gigabytes.

use common::images::IMAGE;
use common::qemu::Dir;
use vhost_user_qcow2::error::{CorruptKind, Kind};

use crate::stage::Act::{Discard, Unmap, Write};
use crate::stage::{Act, BACKED, KIB, MIB, Stage, base, index};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Compressed writes of whole clusters by `qemu-io`.
fn compressed(stage: &mut Stage, writes: &[(u64, u64, u8)]) {
    let mut commands = Vec::new();
    for &(at, len, byte) in writes {
        commands.push(format!("write -q -c -P {byte} {at} {len}"));
        stage.expect(&[Write(at, len, byte)]);
    }
    stage.dir.io(IMAGE, &commands);
}

/// Where the entry of a cluster lies in the file.
fn slot(stage: &Stage, number: u64) -> u64 {
    (stage.word(stage.word(40)) & OFFSET_MASK) + number * 8
}

/// Has QEMU count what the descriptors now state, in a file that is long enough for it.
fn count_again(stage: &Stage) {
    let path = stage.dir.path().join(IMAGE);
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("the image");
    file.set_len(stage.file_length() + 8 * MIB).expect("a longer file");
    stage.img(&["check", "-q", "-f", "qcow2", "-r", "all", IMAGE]);
}

/// Content that shrinks to about half: seeded noise and runs.
fn half_noise(len: u64, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; index(len)];
    for piece in bytes.chunks_mut(1024) {
        if random.bool() {
            random.fill(piece);
        } else {
            piece.fill(random.u8(..));
        }
    }
    bytes
}

#[test]
fn images_that_were_converted_with_compression() {
    for how in ["zlib", "zstd"] {
        for cluster in [4 * KIB, 2 * MIB] {
            // The disk ends inside a cluster, and holds a hole.
            let size = 5 * MIB + 3 * 512;
            let mut content = half_noise(size, cluster);
            content[index(MIB)..index(2 * MIB)].fill(0);
            let dir = Dir::new();
            dir.write("content.raw", &content);
            let options = format!("cluster_size={cluster},compression_type={how}");
            dir.img(&[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                "content.raw",
                IMAGE,
            ]);
            std::fs::remove_file(dir.path().join("content.raw")).expect("removing a copy");
            let mut stage = Stage::of(dir);
            assert!(stage.bytes == content);
            stage.judge();
            stage.ours(&[
                Write(512, 512, 1),
                Write(MIB - KIB, 2 * KIB, 2),
                Write(3 * MIB, MIB, 3),
                Unmap(4 * MIB, 300 * KIB),
                Discard(2 * MIB, 128 * KIB),
                Write(size - 512, 512, 4),
            ]);
            stage.judge();
            // And back: qemu-img converts what we have written, compressed and not.
            stage.img(&["convert", "-c", "-f", "qcow2", "-O", "qcow2", IMAGE, "again.qcow2"]);
            stage.dir.write(IMAGE, &stage.dir.read("again.qcow2"));
            stage.judge();
        }
    }
}

#[test]
fn a_compressed_overlay_and_a_compressed_backing_file() {
    let size = MIB;
    let dir = Dir::new();
    dir.img(&["create", "-q", "-f", "qcow2", "base.qcow2", &size.to_string()]);
    dir.io("base.qcow2", &["write -q -c -P 50 0 512k".to_owned()]);
    let mut stage = Stage::windowed(dir, BACKED, size, 0..size);
    compressed(&mut stage, &[(64 * KIB, 64 * KIB, 1), (256 * KIB, 128 * KIB, 2)]);
    stage.judge();
    stage.ours(&[
        // Parts of one of ours, one of theirs, and of both; zeros over half of one.
        Write(70 * KIB, KIB, 3),
        Write(200 * KIB, KIB, 4),
        Write(250 * KIB, 12 * KIB, 5),
        Unmap(384 * KIB - 512, 40 * KIB),
        Write(600 * KIB, KIB, 6),
    ]);
    stage.judge();
    // All into one image without a backing file.
    stage.img(&["rebase", "-c", "-f", "qcow2", "-b", "", IMAGE]);
    std::fs::remove_file(stage.dir.path().join("base.qcow2")).expect("removing the base");
    stage.judge();
    stage.ours(&[Write(KIB, KIB, 7), Write(100 * KIB, 64 * KIB, 8)]);
    stage.judge();
}

#[test]
fn a_chain_that_qemu_img_has_rebased_with_compression() {
    let third = 512 * KIB;
    let size = 3 * third;
    let dir = Dir::new();
    let create = |name: &str, more: &[&str]| {
        let size = size.to_string();
        dir.img(&[&["create", "-q", "-f", "qcow2"][..], more, &[name, &size]].concat());
    };
    create("base.qcow2", &[]);
    create("middle.qcow2", &["-F", "qcow2", "-b", "base.qcow2"]);
    dir.io("base.qcow2", &[format!("write -q -c -P 1 0 {third}")]);
    dir.io("middle.qcow2", &[format!("write -q -c -P 2 {third} {third}")]);
    let options = "backing_file=middle.qcow2,backing_fmt=qcow2";
    let mut stage = Stage::windowed(dir, options, size, 0..size);
    // The top layer's data is ours, some of it inside of clusters of both others.
    stage.ours(&[Write(2 * third, third, 3), Write(1024, 512, 4), Write(third + 512, 512, 5)]);
    stage.judge();
    stage.img(&["rebase", "-c", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", IMAGE]);
    std::fs::remove_file(stage.dir.path().join("middle.qcow2")).expect("removing the middle");
    stage.judge();
    stage.ours(&[Write(third - 512, 1024, 6), Unmap(third + 64 * KIB, 128 * KIB)]);
    stage.judge();
    stage.img(&["rebase", "-c", "-f", "qcow2", "-b", "", IMAGE]);
    std::fs::remove_file(stage.dir.path().join("base.qcow2")).expect("removing the base");
    stage.judge();
    stage.ours(&[Write(0, size, 7)]);
    stage.judge();
}

#[test]
fn a_cluster_whose_backing_file_ends_inside_a_sector() {
    let dir = Dir::new();
    dir.write("base.raw", &vec![0xaa; index(32 * KIB - 1)]);
    let options = "backing_file=base.raw,backing_fmt=raw";
    let mut stage = Stage::windowed(dir, options, 64 * KIB, 0..64 * KIB);
    stage.judge_content();
    stage.img(&["rebase", "-c", "-f", "qcow2", "-b", "", IMAGE]);
    stage.judge();
    stage.ours(&[Write(4 * KIB, 512, 1)]);
    stage.judge();
}

#[test]
fn descriptors_that_state_too_many_or_too_few_sectors() {
    let cluster = 64 * KIB;
    let mut stage = Stage::new("compat=1.1", 8 * cluster);
    let noise = half_noise(2 * cluster, 3);
    stage.dir.write("noise", &noise);
    let commands =
        ["write -q -c -s noise 0 128k".to_owned(), "write -q -c -P 7 128k 64k".to_owned()];
    stage.dir.io(IMAGE, &commands);
    std::fs::remove_file(stage.dir.path().join("noise")).expect("removing a copy");
    stage.bytes[..noise.len()].copy_from_slice(&noise);
    stage.expect(&[Write(128 * KIB, cluster, 7)]);
    stage.judge();
    // With clusters of 64 KiB the number of further sectors is in bits 54 to 61.
    let sectors = 0xff_u64 << 54;
    // As many as the field can say: the stream ends where it ends, the file even before that.
    for number in [0, 2] {
        let slot = slot(&stage, number);
        stage.poke(slot, &(stage.word(slot) | sectors).to_be_bytes());
    }
    stage.judge_content();
    // What the descriptors claim is counted now, and given back with them.
    count_again(&stage);
    stage.ours(&[Write(150 * KIB, 512, 8), Discard(0, cluster)]);
    stage.judge();
    // Two sectors less than the stream needs: this cluster fails, by itself.
    let original = stage.word(slot(&stage, 1));
    let count = original >> 54 & 0xff;
    assert!(count > 2, "noise of {count} sectors");
    let short = original & !sectors | (count - 2) << 54;
    stage.poke(slot(&stage, 1), &short.to_be_bytes());
    count_again(&stage);
    stage.session(|session| {
        let error = session.read(cluster, 512).expect_err("half a stream");
        assert!(matches!(error.kind(), Kind::Corrupt(CorruptKind::Compressed { .. })), "{error}");
        session.act(Write(cluster, 512, 1)).expect_err("nothing to copy the rest from");
        assert!(session.read(0, cluster).is_ok() && session.read(2 * cluster, cluster).is_ok());
    });
    // Overwritten as a whole it is well again.
    stage.ours(&[Write(0, 3 * cluster, 9)]);
    stage.judge();
}

#[test]
fn the_largest_stream_that_a_descriptor_can_state() {
    // With clusters of 2 MiB the stream may be stated to take two clusters.
    let cluster = 2 * MIB;
    for how in ["zlib", "zstd"] {
        let options = format!("cluster_size=2M,compression_type={how}");
        let mut stage = Stage::new(&options, 3 * cluster);
        compressed(&mut stage, &[(0, cluster, 5), (cluster, cluster, 6)]);
        for number in [0, 1] {
            let slot = slot(&stage, number);
            stage.poke(slot, &(stage.word(slot) | 0x1fff << 49).to_be_bytes());
        }
        stage.judge_content();
        count_again(&stage);
        stage.judge();
        // Copied out of it, and QEMU still reads the other.
        stage.ours(&[Write(KIB, KIB, 7)]);
        stage.judge();
        stage.ours(&[Discard(cluster, cluster), Write(2 * cluster, KIB, 8)]);
        stage.judge();
    }
}

#[test]
fn compressed_clusters_beyond_four_gigabytes_of_the_file() {
    // The file is long because all of the disk up to there has a place in it.
    let (low, size) = (5 << 30, (5 << 30) + MIB);
    for how in ["zlib", "zstd"] {
        let options = format!("preallocation=metadata,compression_type={how}");
        let dir = Dir::new();
        dir.img(&["create", "-q", "-f", "qcow2", "-o", &options, IMAGE, &low.to_string()]);
        dir.img(&["resize", "-q", "-f", "qcow2", IMAGE, &size.to_string()]);
        let mut stage = Stage::around(dir, low - MIB..size).on_host();
        compressed(&mut stage, &[(low, 256 * KIB, 5), (low + 512 * KIB, 64 * KIB, 6)]);
        stage.judge();
        let acts: [Act; 4] = [
            Write(low + KIB, KIB, 7),
            Discard(low + 64 * KIB, 64 * KIB),
            Unmap(low + 140 * KIB, 8 * KIB),
            Write(low - 512, 1024, 8),
        ];
        stage.ours(&acts);
        stage.judge();
        compressed(&mut stage, &[(low + 640 * KIB, 64 * KIB, 9)]);
        stage.judge();
    }
}

#[test]
fn qemu_compresses_into_what_we_have_left_over() {
    // The places of compressed clusters are not aligned: what we free beside them is used again.
    let dir = base(MIB, &[Write(0, MIB, 50)]);
    let mut stage = Stage::windowed(dir, BACKED, MIB, 0..MIB);
    compressed(&mut stage, &[(0, 512 * KIB, 1)]);
    stage.ours(&[Discard(128 * KIB, 128 * KIB), Write(0, 64 * KIB, 2)]);
    stage.judge();
    compressed(&mut stage, &[(512 * KIB, 256 * KIB, 3)]);
    stage.ours(&[Write(600 * KIB, 512, 4), Discard(256 * KIB, 256 * KIB)]);
    stage.judge();
    compressed(&mut stage, &[(768 * KIB, 256 * KIB, 5)]);
    stage.judge();
}
