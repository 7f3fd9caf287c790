//! Compressing and inflating one cluster.
//!
//! What is read is hostile: the output is bounded by the cluster, the input by what the entry
//! states, no window is allocated beside them, and both decoders check their data. What is written
//! must be readable by everybody: QEMU inflates with a window of 4 KiB, so nothing may refer to
//! bytes further back than that.
//!
//! A thread keeps its encoders and decoders, which are larger than most clusters.

use std::cell::RefCell;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use libdeflater::Decompressor;
use zstd::zstd_safe::{CCtx, DCtx, find_frame_compressed_size};

use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::format::Compressed;
use crate::qcow2::header::Compression;

/// log2 of the window in bytes that readers of raw deflate provide.
const WINDOW_BITS: u8 = 12;

thread_local! {
    static INFLATE_WHOLE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static DEFLATE: RefCell<Compress> = RefCell::new(deflater());
    static FROM_ZSTD: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    static TO_ZSTD: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
}

/// The bytes of one cluster of `size` bytes, from what lies at `place`.
///
/// # Errors
/// `Corrupt` when the data does not give exactly one cluster. Bytes after the compressed stream
/// are ignored, since the entry counts whole sectors.
pub(crate) fn inflate(
    kind: Compression,
    place: Compressed,
    source: &[u8],
    size: usize,
) -> Result<Vec<u8>> {
    let mut cluster = vec![0; size];
    let filled = match kind {
        Compression::Zlib => inflate_zlib(source, &mut cluster),
        Compression::Zstd => inflate_zstd(source, &mut cluster),
    };
    if filled == Some(size) {
        return Ok(cluster);
    }
    let kind = CorruptKind::Compressed { at: place.at.0, bytes: place.bytes };
    Err(Error::corrupt("reading a compressed cluster", kind))
}

/// Raw deflate without header or checksum.
///
/// A decoder that knows where all of its input and output are is faster, but demands that the
/// stream ends with the cluster. QEMU reads streams that are cut off or go on behind it, so others
/// are decoded step by step.
fn inflate_zlib(source: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let whole = INFLATE_WHOLE.with_borrow_mut(|all| all.deflate_decompress(source, cluster));
    whole.ok().or_else(|| inflate_steps(source, cluster))
}

fn inflate_steps(source: &[u8], cluster: &mut [u8]) -> Option<usize> {
    INFLATE.with_borrow_mut(|stream| {
        stream.reset(false);
        let status = stream.decompress(source, cluster, FlushDecompress::Finish).ok()?;
        match status {
            Status::Ok | Status::StreamEnd | Status::BufError => {
                usize::try_from(stream.total_out()).ok()
            }
        }
    })
}

/// One whole frame. Decoding it in one step needs no window, however large a one it asks for.
fn inflate_zstd(source: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let frame = source.get(..find_frame_compressed_size(source).ok()?)?;
    FROM_ZSTD.with_borrow_mut(|stream| stream.decompress(cluster, frame).ok())
}

/// The bytes of one cluster, compressed; `None` when that saves nothing.
pub(crate) fn deflate(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut target = vec![0; cluster.len().checked_sub(1)?];
    let len = match kind {
        Compression::Zlib => deflate_zlib(cluster, &mut target),
        Compression::Zstd => TO_ZSTD.with_borrow_mut(|stream| {
            // An error says that the target is too small.
            stream.compress(&mut target[..], cluster, zstd::DEFAULT_COMPRESSION_LEVEL).ok()
        }),
    };
    target.truncate(len?);
    Some(target)
}

fn deflater() -> Compress {
    Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS)
}

fn deflate_zlib(cluster: &[u8], target: &mut [u8]) -> Option<usize> {
    DEFLATE.with_borrow_mut(|stream| {
        stream.reset();
        let status = stream.compress(cluster, target, FlushCompress::Finish);
        if !matches!(status, Ok(Status::StreamEnd)) {
            // A reset of an encoder that holds bytes back loses the part of its buffer that lies
            // before them; after some such resets it panics for want of room.
            *stream = deflater();
            return None;
        }
        usize::try_from(stream.total_out()).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;

    const PLACE: Compressed = Compressed { at: HostOffset(0x5_0000), bytes: 512 };
    const KINDS: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    fn noise(len: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(7);
        std::iter::repeat_with(|| random.u8(..)).take(len).collect()
    }

    #[test]
    fn both_kinds_ignore_padding_and_refuse_other_sizes() {
        let cluster = b"0123456789abcdef".repeat(256);
        for kind in KINDS {
            let mut bytes = deflate(kind, &cluster).expect("it repeats itself");
            assert!(inflate(kind, PLACE, &bytes[..bytes.len() / 2], 4096).is_err(), "{kind:?}");
            bytes.extend([0xee; 300]);
            assert_eq!(inflate(kind, PLACE, &bytes, 4096).expect("inflates"), cluster);
            assert!(inflate(kind, PLACE, &bytes, 8192).is_err(), "{kind:?} gives half a cluster");
            assert!(inflate(kind, PLACE, &[0xff; 512], 4096).is_err(), "{kind:?} takes garbage");
            // An encoder or decoder that has failed goes on.
            assert_eq!(inflate(kind, PLACE, &bytes, 4096).expect("inflates"), cluster);
        }
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        for kind in KINDS {
            for len in [512, 4096, 65536] {
                assert_eq!(deflate(kind, &noise(len)), None, "{kind:?}");
                assert!(deflate(kind, &vec![0; len]).is_some(), "{kind:?}");
            }
        }
    }

    #[test]
    fn streams_that_do_not_end_with_the_cluster_are_read() {
        let cluster = b"0123456789abcdef".repeat(256);
        let two = deflate(Compression::Zlib, &cluster.repeat(2)).expect("it repeats itself");
        assert_eq!(inflate(Compression::Zlib, PLACE, &two, 4096).expect("inflates"), cluster);
        let mut open = vec![0; 4096];
        let mut stream = deflater();
        stream.compress(&cluster, &mut open, FlushCompress::Sync).expect("compresses");
        open.truncate(usize::try_from(stream.total_out()).expect("few bytes"));
        assert_eq!(inflate(Compression::Zlib, PLACE, &open, 4096).expect("inflates"), cluster);
    }

    #[test]
    fn an_encoder_that_ran_out_of_room_often_still_works() {
        let mut half = noise(1 << 15);
        half.resize(1 << 16, 0);
        for kind in KINDS {
            for len in [4096, 1 << 14, 1 << 16].repeat(60) {
                assert_eq!(deflate(kind, &noise(len)), None, "{kind:?}");
            }
            let bytes = deflate(kind, &half).expect("half of it is zeros");
            assert!(inflate(kind, PLACE, &bytes, 1 << 16).expect("inflates") == half);
        }
    }

    #[test]
    fn raw_deflate_refers_no_further_back_than_readers_remember() {
        let mut cluster = noise(8192);
        cluster.extend_from_within(..);
        assert_eq!(deflate(Compression::Zlib, &cluster), None, "the copy lies 8 KiB back");
        let mut near = noise(2048);
        near.extend_from_within(..);
        let bytes = deflate(Compression::Zlib, &near).expect("the copy lies 2 KiB back");
        let mut reader = Decompress::new_with_window_bits(false, WINDOW_BITS);
        let mut found = vec![0; near.len()];
        reader.decompress(&bytes, &mut found, FlushDecompress::Finish).expect("inflates");
        assert!(found == near);
    }

    #[test]
    fn a_frame_that_asks_for_a_huge_window_gets_none() {
        // Magic, a descriptor without a content size, a window of 2^41 bytes, and one last block
        // that repeats a byte 4096 times: valid but for the window.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x03, 0x80, 0x00, 0x55];
        let outcome = inflate(Compression::Zstd, PLACE, &frame, 4096);
        outcome.expect_err("more than any window a decoder takes");
        // 2^27 bytes: a decoder that allocates what the frame asks for would take it all.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3, 0x03, 0x80, 0x00, 0x55];
        let cluster = inflate(Compression::Zstd, PLACE, &frame, 4096).expect("inflates");
        assert_eq!(cluster, [0x55; 4096]);
    }
}
