//! Sizes as people write them.

/// The largest offset in a file.
const LIMIT: u64 = i64::MAX.unsigned_abs();
/// The suffixes, each 1024 times the one before.
const SUFFIXES: &str = "KMGTPE";

/// A disk's size that `text` stands for: as [`number`], rounded up to whole sectors of 512 bytes.
///
/// # Errors
/// When it is no such text, or too large.
pub fn parse(text: &str) -> Result<u64, String> {
    let bytes = number(text)?.checked_next_multiple_of(512).filter(|bytes| *bytes <= LIMIT);
    bytes.ok_or_else(|| format!("{text} is too large"))
}

/// The number that `text` stands for: digits with an optional suffix K, M, G, T, P or E, as
/// qemu-img takes it.
///
/// # Errors
/// When it is no such text, or too large.
pub fn number(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write bytes, or a number with K, M, G or T");
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let mut letters = suffix.chars();
    let shift = match (letters.next(), letters.next()) {
        (None, _) | (Some('B' | 'b'), None) => 0,
        (Some(letter), None) => {
            let place = SUFFIXES.find(letter.to_ascii_uppercase()).ok_or_else(wrong)?;
            10 * (place + 1)
        }
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes <= LIMIT);
    bytes.ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_not_rounded() {
        assert_eq!((number("3"), number("3k")), (Ok(3), Ok(3072)));
        number("3x").expect_err("no number");
    }

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 512),
            ("512", 512),
            ("4096B", 4096),
            ("1k", 1024),
            ("3M", 3 << 20),
            ("10G", 10 << 30),
            ("2t", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "10GB", "10 G", "-1", "1.5G", "8E", "99999999999999999999", "1X"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
