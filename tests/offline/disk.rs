//! What the offline tests share: operations by name, and a reader of its own for the disk and every
//! snapshot in an image's bytes.

use std::path::Path;

use common::check::{Report, check};
use common::images::IMAGE;
use common::sectors::SECTOR;
use common::workers::options;
use vhost_user_qcow2::error::Result;
use vhost_user_qcow2::image::{
    apply_snapshot, create_snapshot, delete_snapshot, resize, snapshots,
};
use vhost_user_qcow2::qcow2::snapshot::{NewSnapshot, Snapshot};
use vhost_user_qcow2::storage::mem::MemDisk;
use vhost_user_qcow2::storage::{Storage, block_on};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// One operation on the image of a simulated host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act {
    /// A snapshot of that name is taken.
    Create(String),
    /// The disk becomes what a snapshot holds.
    Apply(String),
    /// A snapshot is deleted.
    Delete(String),
    /// The disk gets so many sectors.
    Resize(usize),
}

impl Act {
    /// Carries it out.
    pub(crate) async fn run(&self, st: &dyn Storage, disk: &MemDisk, tiny: bool) -> Result<()> {
        let (path, options) = (Path::new(IMAGE), options(tiny));
        match self {
            Self::Create(name) => {
                let new = NewSnapshot {
                    name: name.clone(),
                    date_seconds: 1_700_000_000,
                    date_nanoseconds: 5,
                    vm_clock_nanoseconds: 7,
                    icount: Some(9),
                };
                create_snapshot(st, disk, path, &options, &new).await.map(|_| ())
            }
            Self::Apply(name) => apply_snapshot(st, disk, path, &options, name).await,
            Self::Delete(name) => delete_snapshot(st, disk, path, &options, name).await,
            Self::Resize(sectors) => {
                let size = (*sectors * SECTOR) as u64;
                resize(st, disk, path, &options, (size, true)).await
            }
        }
    }
}

/// Carries an operation out with nothing else under way.
pub(crate) fn act(disk: &MemDisk, act: &Act) -> Result<()> {
    let engine = disk.engine(0, 0);
    block_on(&engine, act.run(&engine, disk, false))
}

/// The snapshots as our code lists them.
pub(crate) fn list(disk: &MemDisk) -> Vec<Snapshot> {
    let engine = disk.engine(0, 0);
    let options = options(false);
    let listed = snapshots(&engine, disk, Path::new(IMAGE), &options);
    block_on(&engine, listed).expect("listing snapshots")
}

/// What the checker says of the image.
pub(crate) fn report(disk: &MemDisk) -> Report {
    disk.look(IMAGE, check).expect("the image")
}

/// The content of the disk, and of each snapshot by name, in the order of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    /// The bytes of the disk.
    pub(crate) disk: Vec<u8>,
    /// The bytes of the snapshots.
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
}

fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    let word = bytes.get(at..at + len).unwrap_or(&[]);
    word.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("a small file")
}

/// Reads an image that has neither a backing file nor compressed clusters.
pub(crate) fn contents(bytes: &[u8]) -> Contents {
    let l1 = (word(bytes, 40, 8), word(bytes, 36, 4));
    let disk = content(bytes, l1, word(bytes, 24, 8));
    let mut at = index(word(bytes, 64, 8));
    let mut snapshots = Vec::new();
    for _ in 0..word(bytes, 60, 4) {
        let [id, name] = [12, 14].map(|field| index(word(bytes, at + field, 2)));
        let extra = index(word(bytes, at + 36, 4));
        let (l1, size) = ((word(bytes, at, 8), word(bytes, at + 8, 4)), word(bytes, at + 48, 8));
        let start = at + 40 + extra + id;
        let text = String::from_utf8(bytes[start..start + name].to_vec()).expect("a name");
        snapshots.push((text, content(bytes, l1, size)));
        at = (start + name).next_multiple_of(8);
    }
    Contents { disk, snapshots }
}

/// The bytes that an L1 table leads to.
fn content(bytes: &[u8], (l1, entries): (u64, u64), size: u64) -> Vec<u8> {
    let cluster = 1 << word(bytes, 20, 4);
    let is_extended = word(bytes, 4, 4) == 3 && word(bytes, 72, 8) & 16 != 0;
    let (entry_size, units) = if is_extended { (16, 32) } else { (8, 1) };
    let per_table = cluster / entry_size;
    let mut found = vec![0; index(size)];
    for (number, target) in found.chunks_mut(cluster).enumerate() {
        assert!(((number / per_table) as u64) < entries, "the L1 table is too short");
        let table = word(bytes, index(l1) + number / per_table * 8, 8) & OFFSET_MASK;
        if table == 0 {
            continue;
        }
        let place = index(table) + number % per_table * entry_size;
        let entry = word(bytes, place, 8);
        assert_eq!(entry & COMPRESSED, 0, "this reader inflates nothing");
        let at = index(entry & OFFSET_MASK);
        let zero = entry & 1 != 0;
        let allocated = if is_extended { word(bytes, place + 8, 8) } else { u64::from(!zero) };
        for (unit, target) in target.chunks_mut(cluster / units).enumerate() {
            let start = (at + unit * (cluster / units)).min(bytes.len());
            let have = &bytes[start..(start + target.len()).min(bytes.len())];
            if at != 0 && allocated >> unit & 1 == 1 {
                target[..have.len()].copy_from_slice(have);
            }
        }
    }
    found
}
