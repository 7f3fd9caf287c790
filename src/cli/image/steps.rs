//! How far a verb is, for those who ask: qemu-img's percentages on standard output.

use std::io::Write;

use clap::Args;

/// Whether it is told how far a verb is.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Steps {
    /// Tell how far it is, in percent
    #[arg(short = 'p')]
    percent: bool,
}

impl Steps {
    /// What is told how many bytes of how many are done.
    pub(super) fn teller(self) -> impl FnMut(u64, u64) {
        let mut told = None;
        move |done, of| {
            let step = hundredths(done, of);
            if self.percent && told != Some(step) {
                told = Some(step);
                say(&format!("    ({}.{:02}/100%)\r", step / 100, step % 100));
            }
        }
    }

    /// Says that everything is done.
    pub(super) fn finish(self) {
        if self.percent {
            say("    (100.00/100%)\r\n");
        }
    }
}

fn hundredths(done: u64, of: u64) -> u128 {
    (u128::from(done) * 10_000).checked_div(u128::from(of)).unwrap_or(10_000).min(10_000)
}

/// Nobody has to read it.
fn say(text: &str) {
    let mut output = std::io::stdout().lock();
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_do_is_done() {
        assert_eq!((hundredths(0, 0), hundredths(1, 3), hundredths(3, 3)), (10_000, 3333, 10_000));
        assert_eq!(hundredths(u64::MAX, u64::MAX), 10_000);
    }
}
