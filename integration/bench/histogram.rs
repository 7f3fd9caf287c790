//! Latencies: counted in buckets whose width grows with the value, each within a thirtieth of it.

use std::time::Duration;

/// Buckets for each doubling of the value.
const STEPS: u64 = 32;
const BUCKETS: usize = 60 * STEPS as usize;

/// How many requests took how long.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0 }
    }
}

impl Histogram {
    pub(crate) fn add(&mut self, time: Duration) {
        self.buckets[bucket(time.as_nanos() as u64)] += 1;
        self.count += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (own, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *own += more;
        }
        self.count += other.count;
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The time in microseconds that so many parts in a thousand of the requests did not exceed.
    pub(crate) fn permille(&self, part: u64) -> f64 {
        let wanted = (self.count * part).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper(index) as f64 / 1000.0;
            }
        }
        0.0
    }
}

fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < STEPS {
        return nanoseconds as usize;
    }
    let exponent = u64::from(nanoseconds.ilog2());
    let step = (nanoseconds >> (exponent - 5)) % STEPS;
    (((exponent - 4) * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The largest value that lies in a bucket.
fn upper(index: usize) -> u64 {
    let (octave, step) = (index as u64 / STEPS, index as u64 % STEPS);
    if octave == 0 { step } else { ((STEPS + step + 1) << (octave - 1)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_lies_in_its_bucket() {
        for value in (0..2000).chain([4095, 4096, 4097, 1 << 20, (1 << 40) + 12345]) {
            let index = bucket(value);
            assert!(value <= upper(index), "{value}");
            assert!(index == 0 || value > upper(index - 1), "{value}");
        }
    }

    #[test]
    fn permilles_of_a_thousand_values() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|us| histogram.add(Duration::from_micros(us)));
        for (part, expected) in [(500, 500.0), (990, 990.0), (1000, 1000.0)] {
            let found = histogram.permille(part);
            assert!((expected..expected * 1.04).contains(&found), "{part}: {found}");
        }
    }
}
