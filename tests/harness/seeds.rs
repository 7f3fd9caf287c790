//! The images that inputs start from; `integration/fuzz/make-images` made them with `qemu-img`.

use std::io::Read;
use std::sync::OnceLock;

/// One image.
#[derive(Debug)]
pub struct Seed {
    /// What is special about it.
    pub name: &'static str,
    /// The image.
    pub bytes: Vec<u8>,
}

impl Seed {
    /// The seed of that name.
    ///
    /// # Panics
    /// When there is none.
    pub fn of(name: &str) -> &'static Self {
        let seed = seeds().iter().find(|seed| seed.name == name);
        seed.unwrap_or_else(|| panic!("there is no seed {name}"))
    }
}

/// All images.
///
/// # Panics
/// When what was committed is no gzip file.
pub fn seeds() -> &'static [Seed] {
    static UNPACKED: OnceLock<Vec<Seed>> = OnceLock::new();
    UNPACKED.get_or_init(|| {
        let unpack = |(name, packed): &(&'static str, &[u8])| {
            let mut bytes = Vec::new();
            let mut unpacked = flate2::read::GzDecoder::new(*packed);
            unpacked.read_to_end(&mut bytes).expect("an image that was packed by gzip");
            Seed { name, bytes }
        };
        PACKED.iter().map(unpack).collect()
    })
}

macro_rules! packed {
    ($($name:literal,)*) => {
        /// By name; an input names one by its number, so new ones go to the end.
        const PACKED: &[(&str, &[u8])] = &[
            $((
                $name,
                include_bytes!(concat!("../../integration/fuzz/images/", $name, ".qcow2.gz")),
            ),)*
        ];
    };
}

packed! {
    "plain",
    "version_2",
    "wide_counts",
    "narrow_counts",
    "lazy",
    "allocated",
    "snapshots",
    "over_raw",
    "over_qcow2",
    "data_file",
    "raw_data_file",
    "bitmaps",
    "subclusters",
    "zlib",
    "zstd",
    "zlib_4k",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_an_image() {
        for seed in seeds() {
            assert_eq!(seed.bytes[..4], *b"QFI\xfb", "{}", seed.name);
            assert!(seed.bytes.len() < 160 << 10, "{} is small", seed.name);
        }
    }
}
