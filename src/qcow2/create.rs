//! Making a new image.

use crate::bytes::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::format::MAGIC;
use crate::qcow2::header::is_size_allowed;
use crate::storage::{Buf, Op, Opened, Purpose, Storage};

/// How a new image is laid out; version 3, 64 KiB clusters and 16-bit refcounts unless said.
#[derive(Debug, Clone, Copy)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
}

impl CreateOptions {
    /// The default layout for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { size, cluster_bits: 16, refcount_order: 4 }
    }
}

/// Feature names that other programs show when they do not know a bit: kind, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Where things lie in a new image, in clusters.
struct Layout {
    cluster: u64,
    reftable: u64,
    reftable_clusters: u64,
    blocks: u64,
    block_count: u64,
    l1: u64,
    l1_entries: u64,
    end: u64,
}

impl Layout {
    /// Header, refcount table, refcount blocks, L1 table, in this order.
    fn new(options: &CreateOptions) -> Self {
        let cluster = 1 << options.cluster_bits;
        let coverage = cluster * (cluster / 8);
        let l1_entries = options.size.div_ceil(coverage);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster).max(1);
        let per_block = (cluster * 8) >> options.refcount_order;
        let (mut reftable_clusters, mut block_count) = (1, 1);
        loop {
            let end = 1 + reftable_clusters + block_count + l1_clusters;
            let blocks = end.div_ceil(per_block);
            let table = (blocks * 8).div_ceil(cluster).max(1);
            if (table, blocks) == (reftable_clusters, block_count) {
                let (reftable, blocks) = (1, 1 + reftable_clusters);
                let l1 = blocks + block_count;
                return Self {
                    cluster,
                    reftable,
                    reftable_clusters,
                    blocks,
                    block_count,
                    l1,
                    l1_entries,
                    end,
                };
            }
            (reftable_clusters, block_count) = (table, blocks);
        }
    }
}

/// Writes a new, empty image into `file`, which is empty, and makes it durable. The header is
/// written last, so that a file that was not finished is no image.
///
/// # Errors
/// `Refused` when the size or the layout is out of range, and I/O errors.
pub async fn create(st: &dyn Storage, file: Opened, options: &CreateOptions) -> Result<()> {
    let in_range = (9..=21).contains(&options.cluster_bits) && options.refcount_order <= 6;
    let layout = in_range.then(|| Layout::new(options));
    let Some(layout) = layout.filter(|layout| is_size_allowed(options.size, layout.l1_entries))
    else {
        let why = format!("{} bytes is too large for the cluster size", options.size);
        return Err(Error::refused("creating an image", why));
    };
    let end = layout.end * layout.cluster;
    step(st, file, Op::Resize { len: end }).await?;
    let tables = (layout.reftable * layout.cluster, tables(options, &layout));
    step(st, file, Op::Write { at: HostOffset(tables.0), buf: Buf::copy_of(&tables.1) }).await?;
    step(st, file, Op::Sync).await?;
    let header = Buf::copy_of(&header(options, &layout));
    step(st, file, Op::Write { at: HostOffset(0), buf: header }).await?;
    step(st, file, Op::Sync).await
}

async fn step(st: &dyn Storage, file: Opened, op: Op) -> Result<()> {
    let done = st.submit(file.id, Purpose::Create, op).await;
    done.map_err(|source| Error::io("creating an image", source))
}

/// The refcount table and the refcount blocks, as they follow each other in the file.
fn tables(options: &CreateOptions, layout: &Layout) -> Vec<u8> {
    let size = (layout.reftable_clusters + layout.block_count) * layout.cluster;
    let mut bytes = vec![0; usize::try_from(size).expect("a few clusters")];
    for block in 0..layout.block_count {
        let at = usize::try_from(block * 8).expect("a few blocks");
        let place = (layout.blocks + block) * layout.cluster;
        bytes[at..at + 8].copy_from_slice(&place.to_be_bytes());
    }
    let blocks = usize::try_from(layout.reftable_clusters * layout.cluster).expect("small");
    let order = options.refcount_order;
    for cluster in 0..usize::try_from(layout.end).expect("a few clusters") {
        if order < 3 {
            let bit = cluster << order;
            bytes[blocks + bit / 8] |= 1 << (bit % 8);
        } else {
            // Big-endian: the last byte holds the one.
            bytes[blocks + ((cluster + 1) << (order - 3)) - 1] = 1;
        }
    }
    bytes
}

fn header(options: &CreateOptions, layout: &Layout) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    let mut word = |value: u32| bytes.extend(value.to_be_bytes());
    word(MAGIC);
    word(3);
    // No backing file: offset and length.
    (0..3).for_each(|_| word(0));
    word(options.cluster_bits);
    let mut long = |value: u64| bytes.extend(value.to_be_bytes());
    long(options.size);
    // No encryption; the L1 table's entries.
    long(layout.l1_entries);
    long(layout.l1 * layout.cluster);
    long(layout.reftable * layout.cluster);
    // The refcount table's clusters; no snapshots.
    long(layout.reftable_clusters << 32);
    long(0);
    // No incompatible, compatible or autoclear features.
    (0..3).for_each(|_| long(0));
    bytes.extend(options.refcount_order.to_be_bytes());
    bytes.extend(112_u32.to_be_bytes());
    // Compression type zlib, and padding.
    bytes.extend([0; 8]);
    let names = FEATURE_NAMES.len() * 48;
    // The names and the end mark fit beside the header only in clusters of 1 KiB and more.
    if 112 + 8 + names + 8 <= 1 << options.cluster_bits {
        let length = u32::try_from(names).expect("a few names");
        bytes.extend(crate::qcow2::format::EXTENSION_FEATURE_NAMES.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        for (kind, bit, name) in FEATURE_NAMES {
            let start = bytes.len();
            bytes.extend([kind, bit]);
            bytes.extend(name.as_bytes());
            bytes.resize(start + 48, 0);
        }
    }
    bytes.extend([0; 8]);
    bytes
}
