//! What an operator says of a device's rates: the keys of cloud-hypervisor's `--disk`.

use std::fmt;

use crate::error::{Error, Result};

/// The longest time to refill a bucket in milliseconds: 49 days.
const LONGEST_REFILL_MS: u64 = u32::MAX as u64;

/// The rates of a device. A size of zero means that there is no limit.
///
/// A bucket of `size` tokens is filled evenly in `refill_time`, so that the rate over a long time
/// is one divided by the other and `size` is what may come at once. The one-time burst is an extra
/// that is spent first and never refilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes that reads and writes may move at once.
    pub bw_size: u64,
    /// Milliseconds in which they are refilled.
    pub bw_refill_time: u64,
    /// Bytes once more, never refilled.
    pub bw_one_time_burst: u64,
    /// Requests that may be taken at once, of whatever kind.
    pub ops_size: u64,
    /// Milliseconds in which they are refilled.
    pub ops_refill_time: u64,
    /// Requests once more, never refilled.
    pub ops_one_time_burst: u64,
}

impl Default for RateLimits {
    /// No limits; a size that is set alone is that of one second.
    fn default() -> Self {
        Self {
            bw_size: 0,
            bw_refill_time: 1000,
            bw_one_time_burst: 0,
            ops_size: 0,
            ops_refill_time: 1000,
            ops_one_time_burst: 0,
        }
    }
}

impl RateLimits {
    /// Whether anything is limited.
    pub fn any(&self) -> bool {
        self.bw_size != 0 || self.ops_size != 0
    }

    /// Every key with its value, in the order in which they are written.
    pub fn fields(&self) -> [(&'static str, u64); 6] {
        [
            ("bw_size", self.bw_size),
            ("bw_refill_time", self.bw_refill_time),
            ("bw_one_time_burst", self.bw_one_time_burst),
            ("ops_size", self.ops_size),
            ("ops_refill_time", self.ops_refill_time),
            ("ops_one_time_burst", self.ops_one_time_burst),
        ]
    }

    /// Sets the value of a key. [`RateLimits::check`] says whether all of them agree.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn set(&mut self, key: &str, value: u64) -> Result<()> {
        let field = match key {
            "bw_size" => &mut self.bw_size,
            "bw_refill_time" => &mut self.bw_refill_time,
            "bw_one_time_burst" => &mut self.bw_one_time_burst,
            "ops_size" => &mut self.ops_size,
            "ops_refill_time" => &mut self.ops_refill_time,
            "ops_one_time_burst" => &mut self.ops_one_time_burst,
            _ => {
                let keys = Self::default().fields().map(|(key, _)| key).join(", ");
                return Err(Error::refused(key, format!("it is no rate; there are {keys}")));
            }
        };
        *field = value;
        Ok(())
    }

    /// These rates changed by `text`: keys and values as in `bw_size=10M,bw_refill_time=1000`.
    /// Sizes in bytes may have one of the suffixes K, M, G and T.
    ///
    /// # Errors
    /// When it is no such text, or what comes out contradicts itself.
    pub fn with(mut self, text: &str) -> Result<Self> {
        for part in text.split([',', ' ']).filter(|part| !part.is_empty()) {
            let wrong = || Error::refused(part, "write it as key=number, such as ops_size=1000");
            let (key, value) = part.split_once('=').ok_or_else(wrong)?;
            let bytes = matches!(key, "bw_size" | "bw_one_time_burst");
            self.set(key, number(value, bytes).ok_or_else(wrong)?)?;
        }
        self.check()
    }

    /// The same rates, if they make sense.
    ///
    /// # Errors
    /// Names the key that does not.
    pub fn check(self) -> Result<Self> {
        for (name, size, refill, burst) in [
            ("bw", self.bw_size, self.bw_refill_time, self.bw_one_time_burst),
            ("ops", self.ops_size, self.ops_refill_time, self.ops_one_time_burst),
        ] {
            if !(1..=LONGEST_REFILL_MS).contains(&refill) {
                let why = format!("it must be from 1 to {LONGEST_REFILL_MS} milliseconds");
                return Err(Error::refused(format!("{name}_refill_time={refill}"), why));
            }
            if size == 0 && burst != 0 {
                let why = format!("it does nothing without {name}_size");
                return Err(Error::refused(format!("{name}_one_time_burst={burst}"), why));
            }
        }
        Ok(self)
    }
}

impl std::str::FromStr for RateLimits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::default().with(text)
    }
}

impl fmt::Display for RateLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = self.fields().map(|(key, value)| format!("{key}={value}"));
        f.write_str(&fields.join(","))
    }
}

/// A number, if `bytes` with an optional suffix.
fn number(text: &str, bytes: bool) -> Option<u64> {
    let shift = match text.chars().last()?.to_ascii_uppercase() {
        'K' if bytes => 10,
        'M' if bytes => 20,
        'G' if bytes => 30,
        'T' if bytes => 40,
        _ => return text.parse().ok(),
    };
    let number: u64 = text[..text.len() - 1].parse().ok()?;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_read_and_written() {
        let text = "bw_size=10M,bw_refill_time=500,bw_one_time_burst=1g,ops_size=100";
        let rates: RateLimits = text.parse().expect("good rates");
        assert_eq!((rates.bw_size, rates.bw_one_time_burst), (10 << 20, 1 << 30));
        assert_eq!((rates.ops_size, rates.ops_refill_time), (100, 1000));
        assert_eq!(rates.to_string().parse::<RateLimits>().expect("the same"), rates);
        let changed = rates.with("ops_size=0 bw_size=5").expect("a change");
        assert_eq!((changed.ops_size, changed.bw_size, changed.bw_refill_time), (0, 5, 500));
        assert!(changed.any() && !RateLimits::default().any());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (text, what) in [
            ("size=1", "there are bw_size"),
            ("bw_size", "key=number"),
            ("bw_size=", "key=number"),
            ("bw_size=M", "key=number"),
            ("bw_size=-1", "key=number"),
            ("ops_size=1K", "key=number"),
            ("bw_size=99999999999999999999", "key=number"),
            ("bw_size=99999999999T", "key=number"),
            ("bw_size=1,bw_refill_time=0", "bw_refill_time=0"),
            ("bw_size=1,bw_refill_time=4294967296", "milliseconds"),
            ("ops_one_time_burst=1", "without ops_size"),
        ] {
            let error = text.parse::<RateLimits>().expect_err(text).to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
