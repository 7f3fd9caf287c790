//! A reader of persistent bitmaps of its own: from an image's bytes to the bits that are set.

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const BITMAPS: u64 = 0x2385_2875;

fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn place(bytes: &[u8], at: usize, len: usize) -> usize {
    usize::try_from(word(bytes, at, len)).expect("a small file")
}

/// The bytes of the extension that says where the bitmap directory lies.
fn extension(image: &[u8]) -> &[u8] {
    let mut at = place(image, 100, 4);
    loop {
        let (kind, len) = (word(image, at, 4), place(image, at + 4, 4));
        assert_ne!(kind, 0, "there are no bitmaps");
        if kind == BITMAPS {
            return &image[at + 8..at + 8 + len];
        }
        at = (at + 8 + len).next_multiple_of(8);
    }
}

/// Where the entry of the bitmap called `name` lies in the file.
pub(crate) fn entry(image: &[u8], name: &str) -> usize {
    let extension = extension(image);
    let mut at = place(extension, 16, 8);
    for _ in 0..word(extension, 0, 4) {
        let (name_len, extra) = (place(image, at + 18, 2), place(image, at + 20, 4));
        let start = at + 24 + extra;
        if &image[start..start + name_len] == name.as_bytes() {
            return at;
        }
        at = (start + name_len).next_multiple_of(8);
    }
    panic!("there is no bitmap {name:?}");
}

/// The ranges of bits that are set in the bitmap called `name`: first, and behind the last.
pub(crate) fn set_bits(image: &[u8], name: &str) -> Vec<(u64, u64)> {
    let at = entry(image, name);
    ranges(image, place(image, at, 8), place(image, at + 8, 4))
}

fn ranges(image: &[u8], table: usize, entries: usize) -> Vec<(u64, u64)> {
    let cluster = 1_usize << word(image, 20, 4);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut number = 0;
    for entry in (0..entries).map(|index| word(image, table + index * 8, 8)) {
        let at = usize::try_from(entry & OFFSET_MASK).expect("a small file");
        if at == 0 && entry & 1 == 0 {
            number += 8 * cluster as u64;
            continue;
        }
        for step in 0..cluster {
            let byte = match (at, entry & 1) {
                (0, 0) => 0,
                (0, _) => 0xff,
                // The file may end inside its last cluster.
                _ => image.get(at + step).copied().unwrap_or(0),
            };
            if byte == 0 {
                number += 8;
                continue;
            }
            for bit in 0..8 {
                if byte >> bit & 1 == 1 {
                    match ranges.last_mut() {
                        Some(last) if last.1 == number => last.1 += 1,
                        _ => ranges.push((number, number + 1)),
                    }
                }
                number += 1;
            }
        }
    }
    ranges
}
