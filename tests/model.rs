//! Random requests against a model of a few obvious lines, on the simulated disk.

use std::path::Path;

use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::image::{Image, OpenOptions, create};
use vhost_user_qcow2::qcow2::create::CreateOptions;
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Buf, block_on};

#[test]
fn random_requests_read_back_what_was_written() {
    for seed in 0..20 {
        for cluster_bits in [9, 12, 16, 21] {
            for refcount_order in [0, 4, 6] {
                run(seed, cluster_bits, refcount_order);
            }
        }
    }
}

fn run(seed: u64, cluster_bits: u32, refcount_order: u32) {
    let size: usize = 3 << 20;
    let disk = MemDisk::new();
    let engine = disk.engine(0, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let options = CreateOptions { cluster_bits, refcount_order, ..CreateOptions::new(size as u64) };
    let path = Path::new("disk.qcow2");
    let what = format!("seed {seed} cluster_bits {cluster_bits} order {refcount_order}");
    block_on(&engine, async {
        create(&engine, &disk, path, &options).await.expect("create");
        let mut model = vec![0_u8; size];
        for round in 0..3 {
            let options = OpenOptions::default();
            let image = Image::open(&engine, &disk, path, &options).await.expect("open");
            for step in 0..200 {
                let at = random.usize(0..size / 512) * 512;
                let len = (random.usize(1..=256) * 512).min(size - at);
                let guest = GuestOffset(at as u64);
                match random.u8(0..10) {
                    0..=3 => {
                        let byte = random.u8(..);
                        model[at..at + len].fill(byte);
                        let buf = Buf::copy_of(&vec![byte; len]);
                        image.write(&engine, guest, buf).await.expect("write");
                    }
                    4 => {
                        model[at..at + len].fill(0);
                        let unmap = random.bool();
                        let zero = image.write_zeroes(&engine, guest, len as u64, unmap);
                        zero.await.expect("zero");
                    }
                    5 => {
                        image.discard(&engine, guest, len as u64).await.expect("discard");
                        let buf = Buf::zeroed(len);
                        image.read(&engine, guest, buf.clone()).await.expect("read");
                        let now = buf.to_vec();
                        for (sector, old) in now.chunks(512).zip(model[at..].chunks_mut(512)) {
                            assert!(sector == old || sector.iter().all(|&byte| byte == 0));
                            old.copy_from_slice(sector);
                        }
                    }
                    6 => image.flush(&engine).await.expect("flush"),
                    _ => {
                        let buf = Buf::zeroed(len);
                        image.read(&engine, guest, buf.clone()).await.expect("read");
                        assert!(buf.to_vec() == model[at..at + len], "{what} {round} {step}");
                    }
                }
            }
            image.close(&engine).await.expect("close");
        }
    });
    if seed < 2 {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("disk.qcow2");
        std::fs::write(&file, disk.content_of("disk.qcow2").expect("file")).expect("write");
        let check = std::process::Command::new("qemu-img").arg("check").arg(&file).output();
        let check = check.expect("qemu-img");
        assert!(check.status.success(), "{what}: {}", String::from_utf8_lossy(&check.stdout));
    }
}
