//! Real images with random bytes changed: whatever happens, no panic, no hang, bounded memory.

use super::*;
use common::memory::peak;
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::bytes::GuestOffset;
use vhost_user_qcow2::storage::Buf;

/// Most memory in bytes that an image of a few hundred KiB may make us take, the simulated disk's
/// own copies of it included.
const MOST_MEMORY: u64 = 32 << 20;

/// Changes bytes of the header, of tables, or of anything.
fn spoil(bytes: &mut [u8], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..6) {
        let at = match random.u8(0..4) {
            0 => random.usize(0..112),
            1 => random.usize(0..bytes.len().min(5 * 4096)),
            2 => random.usize(0..bytes.len()) & !7,
            _ => random.usize(0..bytes.len()),
        };
        match random.u8(0..4) {
            0 => bytes[at] ^= 1 << random.u8(0..8),
            1 => bytes[at] = random.u8(..),
            2 => bytes[at] = random.choice([0, 1, 0x7f, 0x80, 0xff]).expect("not empty"),
            _ => {
                let end = (at + 8).min(bytes.len());
                random.fill(&mut bytes[at..end]);
            }
        }
    }
}

/// Everything that a guest can do, with every answer allowed; returns how much succeeded.
fn use_it(engine: &MemEngine, image: &Image, random: &mut fastrand::Rng) -> u32 {
    let size = image.size();
    let mut succeeded = 0;
    block_on(engine, async {
        for step in 0..40 {
            let len = random.u64(1..=64) * 512;
            let near = size.min(1 << 20);
            let at = GuestOffset(random.u64(0..=near.saturating_sub(len) / 512) * 512);
            let buf = Buf::zeroed(usize::try_from(len).expect("small"));
            let done = match step % 6 {
                0 | 1 => image.read(engine, at, buf).await,
                2 => image.write(engine, at, buf).await,
                3 => image.write_zeroes(engine, at, len, random.bool()).await,
                4 => image.discard(engine, at, len).await,
                _ => image.flush(engine).await,
            };
            succeeded += u32::from(done.is_ok());
        }
        succeeded += u32::from(image.close(engine).await.is_ok());
    });
    succeeded
}

fn flip(test: &str, layout: Layout, count: u64) {
    let template = Victim::new(layout);
    let (mut opened, mut succeeded, mut memory) = (0, 0, 0);
    for seed in seeds(count) {
        let _repeat = Repeat::new("hostile", &format!("random::{test}"), seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut victim = Victim { bytes: template.bytes.clone(), others: template.others.clone() };
        spoil(&mut victim.bytes, &mut random);
        let ((), used) = peak(|| {
            let (_disk, engine, image) = victim.open(random.u8(0..4) == 0);
            if let Ok(image) = image {
                opened += 1;
                succeeded += use_it(&engine, &image, &mut random);
            }
        });
        assert!(used < MOST_MEMORY, "{used} bytes of memory");
        memory = memory.max(used);
    }
    println!(
        "{test}: {opened} of {count} opened, {succeeded} requests succeeded, \
         at most {} KiB of memory",
        memory >> 10
    );
}

macro_rules! layouts {
    ($($name:ident: $count:literal, $layout:expr;)*) => {
        $(#[test]
        fn $name() {
            flip(stringify!($name), $layout, $count);
        })*
    };
}

layouts! {
    clusters_of_512: 4000, Layout::new(9, 300, Kind::Plain);
    clusters_of_4_kib: 4000, Layout::new(12, 320, Kind::Plain);
    version_2: 2000, Layout::new(12, 320, Kind::Plain).version_2();
    zlib: 3000, Layout::new(12, 320, Kind::Compressed("zlib"));
    zstd: 3000, Layout::new(12, 320, Kind::Compressed("zstd"));
    snapshots: 3000, Layout::new(12, 320, Kind::Snapshots);
    chain: 2000, Layout::new(12, 320, Kind::Chain);
    data_file: 2000, Layout::new(12, 320, Kind::DataFile { raw: true });
    wide_counts: 2000, Layout::new(9, 300, Kind::Plain).with_refcount_bits(64);
}
