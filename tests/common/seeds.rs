//! Which seeds a test runs, and how a failure is repeated.

use std::ops::Range;

/// A number from the environment.
///
/// # Panics
/// When the variable is set to something else.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

/// The seeds of a test: the one in `SEED`, else the first `SEEDS`, else the first `count`, times
/// `SEED_FACTOR` if set.
pub fn seeds(count: u64) -> Range<u64> {
    match (number("SEED"), number("SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(seeds)) => 0..seeds,
        (None, None) => 0..count.saturating_mul(number("SEED_FACTOR").unwrap_or(1)),
    }
}

/// Prints how to repeat a test when the test fails while this is alive.
pub struct Repeat {
    command: String,
}

impl Repeat {
    /// For a test of `file` (without its ending) and one seed.
    pub fn new(file: &str, test: &str, seed: u64) -> Self {
        Self::of(&format!("--test {file}"), test, seed)
    }

    /// For a test that these arguments select.
    pub fn of(arguments: &str, test: &str, seed: u64) -> Self {
        Self { command: format!("SEED={seed} cargo nextest run {arguments} -- {test}") }
    }
}

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("repeat with: {}", self.command);
        }
    }
}
