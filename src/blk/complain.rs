//! Log lines that a guest can cause, so many in a while and no more.

use std::cell::Cell;
use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long a budget of lines lasts.
const PERIOD: Duration = Duration::from_secs(10);
/// Lines in a period.
const BUDGET: u32 = 10;

/// A budget of log lines; each worker has its own.
#[derive(Debug, Default)]
pub struct Complaints {
    since: Cell<Option<Instant>>,
    said: Cell<u32>,
    withheld: Cell<u64>,
}

impl Complaints {
    /// Whether a line may be written now; how many were withheld since the last one.
    fn admit(&self, now: Instant) -> Option<u64> {
        let fresh = self.since.get().is_none_or(|since| now.duration_since(since) >= PERIOD);
        if fresh {
            self.since.set(Some(now));
            self.said.set(0);
        }
        if self.said.get() == BUDGET {
            self.withheld.set(self.withheld.get() + 1);
            return None;
        }
        self.said.set(self.said.get() + 1);
        Some(self.withheld.take())
    }

    /// Logs why something that the guest asked for was not done.
    pub fn warn(&self, what: &str, why: impl Display) {
        match self.admit(Instant::now()) {
            None => {}
            Some(0) => tracing::warn!("{what}: {why}"),
            Some(withheld) => tracing::warn!("{what}: {why} ({withheld} such lines withheld)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_errors_gives_ten_lines_in_ten_seconds() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let said = (0..1000).filter(|_| complaints.admit(start).is_some()).count();
        assert_eq!(said, 10);
        assert_eq!(complaints.admit(start + PERIOD), Some(990));
        assert_eq!(complaints.admit(start + PERIOD), Some(0));
    }
}
