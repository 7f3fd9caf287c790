//! Inflating compressed clusters. Hostile input: the output is bounded by the cluster, the input
//! by what the entry states, and both decoders check their data.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::error::{CorruptKind, Error, Result};
use crate::qcow2::format::Compressed;
use crate::qcow2::header::Compression;

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
fn inflate_zlib(source: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let mut stream = Decompress::new(false);
    let status = stream.decompress(source, cluster, FlushDecompress::Finish).ok()?;
    match status {
        Status::Ok | Status::StreamEnd | Status::BufError => {
            usize::try_from(stream.total_out()).ok()
        }
    }
}

fn inflate_zstd(source: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let mut stream = Decoder::new().ok()?;
    let mut input = InBuffer::around(source);
    let mut output = OutBuffer::around(cluster);
    // One frame may need several steps; a step that moves nothing has hit the end of the input.
    loop {
        let before = (input.pos(), output.pos());
        let hint = stream.run(&mut input, &mut output).ok()?;
        if hint == 0 || output.pos() == output.capacity() || (input.pos(), output.pos()) == before {
            return Some(output.pos());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use std::io::Write;

    const PLACE: Compressed = Compressed { at: HostOffset(0x5_0000), bytes: 512 };

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let level = flate2::Compression::default();
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
        encoder.write_all(bytes).expect("to memory");
        encoder.finish().expect("to memory")
    }

    #[test]
    fn both_kinds_ignore_padding_and_refuse_short_output() {
        let cluster = b"0123456789abcdef".repeat(256);
        let zstd = zstd::bulk::compress(&cluster, 3).expect("to memory");
        for (kind, mut bytes) in
            [(Compression::Zlib, deflated(&cluster)), (Compression::Zstd, zstd)]
        {
            bytes.extend([0xee; 300]);
            assert_eq!(inflate(kind, PLACE, &bytes, 4096).expect("inflates"), cluster);
            assert!(inflate(kind, PLACE, &bytes, 8192).is_err(), "{kind:?} gives half a cluster");
            assert!(inflate(kind, PLACE, &[0xff; 512], 4096).is_err(), "{kind:?} takes garbage");
        }
    }
}
