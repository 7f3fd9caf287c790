//! Inputs to start from: some made by hand, and those that the fuzzers have found to reach more.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

use crate::seeds;

/// An input and its name.
pub type Input = (String, Vec<u8>);

/// The fuzzers by name.
pub const TARGETS: [&str; 3] = ["image", "chain", "messages"];

/// All inputs of one of [`TARGETS`].
///
/// # Panics
/// When there is no such target.
pub fn of(target: &str) -> Vec<Input> {
    let (mut inputs, kept): (_, &[u8]) = match target {
        "image" => (images(), include_bytes!("../../integration/fuzz/corpus/image.gz")),
        "chain" => (chains(), include_bytes!("../../integration/fuzz/corpus/chain.gz")),
        "messages" => (messages(), include_bytes!("../../integration/fuzz/corpus/messages.gz")),
        _ => panic!("there is no target {target}"),
    };
    let named = |(number, input)| (format!("kept-{number}"), input);
    inputs.extend(unpack(kept).into_iter().enumerate().map(named));
    inputs
}

/// Many inputs as one file: each one's length in two bytes before it, all compressed.
///
/// # Panics
/// When an input has 64 KiB or more.
pub fn pack(inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    for input in inputs {
        let len = u16::try_from(input.len()).expect("inputs are short");
        packed.write_all(&len.to_be_bytes()).expect("memory takes everything");
        packed.write_all(input).expect("memory takes everything");
    }
    packed.finish().expect("memory takes everything")
}

fn unpack(packed: &[u8]) -> Vec<Vec<u8>> {
    let mut bytes = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut bytes).expect("a file that was packed");
    let (mut rest, mut inputs) = (bytes.as_slice(), Vec::new());
    while let Some((len, after)) = rest.split_first_chunk() {
        let (input, after) = after.split_at(usize::from(u16::from_be_bytes(*len)));
        inputs.push(input.to_vec());
        rest = after;
    }
    inputs
}

/// Inputs for [`crate::image`]: every seed, unspoiled and spoiled a little, with some of all
/// requests.
fn images() -> Vec<Input> {
    // One at a time and three at a time; kinds and places as the input has them.
    let steps = [
        0, 0x12, 0, 0, 0x32, 20, 0, 0x10, 0, 0, 0x25, 2, 0, 0x46, 64, 0, 7, 0, 0xff, 0xa0, 0x12,
        70, 0x53, 30, 0x20, 8, 0, 0x44, 0xf4, 0x81, 0x16, 1, 0x22, 3, 0xff, 0, 0x60, 0,
    ];
    let mut inputs = Vec::new();
    for (index, seed) in seeds().iter().enumerate() {
        let start = [index as u8, 0, 0];
        inputs.push((format!("{}-whole", seed.name), [&start[..], &steps].concat()));
        let start = [index as u8, 64, 0];
        inputs.push((format!("{}-compressing", seed.name), [&start[..], &steps].concat()));
        let start = [index as u8, 8, 2, 2, 0, 0, 9, 0x80, 30, 5, 3, 62];
        inputs.push((format!("{}-spoiled", seed.name), [&start[..], &steps].concat()));
        let start = [index as u8, 32, 2, 2, 0, 3, 62, 3, 0, 3, 63, 4];
        inputs.push((format!("{}-repaired", seed.name), [&start[..], &steps].concat()));
        let start = [index as u8, 16, 0];
        inputs.push((format!("{}-cut", seed.name), [&start[..], &steps[..20]].concat()));
        let start = [index as u8, 4 | 2, 0x11, 40, 0];
        inputs.push((format!("{}-failing", seed.name), [&start[..], &steps].concat()));
    }
    inputs
}

/// Inputs for [`crate::chain`]: requests of each kind, whole and in pieces, and chains by hand.
fn chains() -> Vec<Input> {
    // Data lies at 0x3000, across the border of two regions, and in memory far away.
    let requests = [
        7, 1, 0, 1, 2, 0, 0x20, // read 512 bytes
        7, 2, 1, 4, 3, 0, 0x10, 7, 64, 0x30, // write two pieces
        6,    // let the worker run
        8, 0, 2, 0, // flush
        2, 2, 0, 9, 0x10, 0xff, 9, 1, 5, 0, 2, 0, 1, // a segment at 0x3000, and write-zeroes
        7, 5, 3, 0, 9, 0, 0x81, // the serial number, by an indirect table
        6, 9, 7, 0, 3, 10, 0, 0x20, 2, 8, 0x20, 6,
    ];
    let by_hand = [
        1, 3, 0, 0, 8, // a header at 0x4000
        0, 0, 5, 3, 0, 1, 1, 6, // descriptors 5 and 6 of the ring
        0, 0, 6, 1, 8, 0x81, 2, 0, // a status byte
        4, 5, 6, // available; run
        0, 1, 0, 3, 0, 1, 1, 1, // the same in a table of its own
        0, 1, 1, 1, 8, 0x81, 2, 0, //
        0, 0, 7, 4, 0, 2, 4, 0, // which the ring refers to
        4, 7, 6, 4, 0xf3, 6, // and a head that is none
    ];
    let mut inputs = Vec::new();
    for choices in [0, 2, 4, 8, 16, 32, 64, 4 | 8 | 32] {
        inputs.push((format!("requests-{choices}"), [&[choices][..], &requests].concat()));
        inputs.push((format!("by-hand-{choices}"), [&[choices][..], &by_hand].concat()));
    }
    inputs.push(("failing".to_owned(), [&[1, 1][..], &requests].concat()));
    inputs
}

/// Inputs for [`crate::messages`]: what front-ends say, and what they should not.
fn messages() -> Vec<Input> {
    let attach: &[u8] = &[0, 0x10, 0x20, 0x21, 0x40, 0x41];
    let mut inputs = vec![("attach".to_owned(), attach.to_vec())];
    // Each request by its number, with a payload of its form and the usual descriptors, asking for
    // an acknowledgement, in the middle of a session.
    for request in 1..46 {
        let message = [0x80, request, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        inputs.push((format!("request-{request}"), [attach, &message, attach].concat()));
    }
    inputs.push(("memory".to_owned(), [attach, &[0x80, 37, 0, 0, 0x80, 1, 0x40]].concat()));
    inputs.push(("garbage".to_owned(), [attach, &[0x5f, 1, 2, 3, 4, 5, 6, 7, 8, 9]].concat()));
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let inputs = vec![vec![1, 2, 3], Vec::new(), vec![0; 70], vec![9]];
        assert_eq!(unpack(&pack(&inputs)), inputs);
        assert_eq!(unpack(&pack(&[])), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn every_target_has_inputs_under_names_of_their_own() {
        for target in TARGETS {
            let inputs = of(target);
            let names: std::collections::BTreeSet<_> = inputs.iter().map(|one| &one.0).collect();
            assert!(!inputs.is_empty() && names.len() == inputs.len(), "{target}");
        }
    }
}
