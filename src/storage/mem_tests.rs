//! The simulated host keeps its promises.

use super::*;
use crate::storage::{Buf, block_on};

fn write(engine: &MemEngine, file: FileId, at: u64, byte: u8) -> Pending {
    let buf = Buf::copy_of(&[byte; 1024]);
    engine.submit(file, Purpose::GuestWrite, Op::Write { at: HostOffset(at), buf })
}

#[test]
fn a_synced_write_survives_every_crash_and_an_unsynced_one_some() {
    let disk = MemDisk::new();
    let file = disk.add("disk", vec![0; 4096]);
    let engine = disk.engine(0, 1);
    block_on(&engine, write(&engine, file, 0, 1)).expect("write");
    block_on(&engine, engine.submit(file, Purpose::SyncData, Op::Sync)).expect("sync");
    block_on(&engine, write(&engine, file, 1024, 2)).expect("write");
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let bytes = disk.crash(seed).content(file);
        assert!(bytes[..1024].iter().all(|&byte| byte == 1), "seed {seed}");
        match (bytes[1024], bytes[1536]) {
            (2, 2) => kept += 1,
            (0, 0) => lost += 1,
            _ => torn += 1,
        }
    }
    assert!(kept > 10 && lost > 10 && torn > 10, "{kept} {lost} {torn}");
}

#[test]
fn a_write_that_finishes_after_a_sync_was_submitted_is_not_durable() {
    let disk = MemDisk::new();
    let file = disk.add("disk", vec![0; 2048]);
    let engine = disk.engine(0, 3);
    let sync = engine.submit(file, Purpose::SyncData, Op::Sync);
    let late = write(&engine, file, 0, 9);
    block_on(&engine, async {
        late.await.expect("write");
        sync.await.expect("sync");
    });
    assert_eq!(disk.crash_exactly(0).content(file)[0], 0);
    assert_eq!(disk.unsynced_sectors(), 2);
    assert_eq!(disk.crash_exactly(0b10).content(file)[512], 9);
}

#[test]
fn reads_past_the_end_give_zeros() {
    let disk = MemDisk::new();
    let file = disk.add("disk", vec![5; 100]);
    let engine = disk.engine(0, 0);
    let buf = Buf::copy_of(&[1; 200]);
    let op = Op::Read { at: HostOffset(50), buf: buf.clone() };
    block_on(&engine, engine.submit(file, Purpose::GuestRead, op)).expect("read");
    assert_eq!(buf.to_vec(), [vec![5; 50], vec![0; 150]].concat());
}
