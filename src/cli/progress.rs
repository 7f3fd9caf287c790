//! Telling how far a long piece of work is: a bar for people, lines for programs. Everything goes
//! to standard error, but for what `-p` writes where there is no terminal: that is qemu-img's, on
//! standard output, for those who parse it.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Lines are not printed more often than this.
const INTERVAL: Duration = Duration::from_millis(500);

/// What the bar looks like; it has a rate and the time that is left.
const TEMPLATE: &str = "{msg} {bar:30} {percent:>3}% {binary_bytes}/{binary_total_bytes} \
                        {binary_bytes_per_sec} {eta} left";

/// How progress is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Style {
    /// A bar on a terminal, else nothing
    Auto,
    /// A bar; without a terminal qemu-img's percentages
    Bar,
    /// A line of JSON on standard error twice a second, and one at the end
    Json,
    /// Nothing
    None,
}

/// The options of verbs that take long.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Reporting {
    /// Tell how far it is, as with --progress=bar
    #[arg(short = 'p')]
    bar: bool,

    /// How to tell how far it is
    #[arg(long, value_enum, value_name = "STYLE", default_value_t = Style::Auto)]
    progress: Style,
}

impl Reporting {
    /// Begins to tell of `verb`, which has `total` bytes to do; `quiet` verbs tell nothing unless
    /// told to. With `streams` standard output is not for words.
    pub(super) fn start(&self, verb: &'static str, total: u64, quiet: bool, streams: bool) -> Told {
        let style = match self.progress {
            Style::Auto if self.bar => Style::Bar,
            Style::Auto if quiet => Style::None,
            style => style,
        };
        let terminal = std::io::stderr().is_terminal();
        let how = match style {
            Style::Auto | Style::Bar if terminal => How::Bar(bar(verb, total)),
            Style::Bar => How::Percent { streams },
            Style::Json => How::Json,
            Style::Auto | Style::None => How::Nothing,
        };
        let mut told = Told { verb, total, how, begun: Instant::now(), last: None };
        told.set(0);
        told
    }

    /// What is told of `verb`, as it says how far it is.
    pub(super) fn steps(&self, verb: &'static str, quiet: bool) -> Steps {
        Steps { reporting: *self, verb, quiet, streams: false, told: None }
    }
}

/// What is told of work that says itself how much there is.
#[derive(Debug)]
pub(super) struct Steps {
    reporting: Reporting,
    verb: &'static str,
    quiet: bool,
    streams: bool,
    told: Option<Told>,
}

impl Steps {
    /// Standard output is not for words.
    pub(super) fn streaming(self, streams: bool) -> Self {
        Self { streams, ..self }
    }

    /// So many bytes of `total` are done. Where the total is another one than before, this is the
    /// beginning of other work.
    pub(super) fn set(&mut self, done: u64, total: u64) {
        if let Some(told) = self.told.as_mut().filter(|told| told.total == total) {
            return told.set(done);
        }
        // A bar that is there goes before the next one comes.
        self.told = None;
        let mut told = self.reporting.start(self.verb, total, self.quiet, self.streams);
        if done > 0 {
            told.set(done);
        }
        self.told = Some(told);
    }

    /// Everything is done. That there was nothing to do is told to those only who asked.
    pub(super) fn finish(self) {
        let asked =
            self.reporting.bar || matches!(self.reporting.progress, Style::Bar | Style::Json);
        let start = || self.reporting.start(self.verb, 0, self.quiet, self.streams);
        if let Some(told) = self.told.or_else(|| asked.then(start)) {
            told.finish();
        }
    }
}

fn bar(verb: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(TEMPLATE).expect("a good template");
    ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(verb)
}

/// How a verb's progress is told.
#[derive(Debug)]
enum How {
    Bar(ProgressBar),
    Percent { streams: bool },
    Json,
    Nothing,
}

/// What is told of one piece of work. Dropped before its end, it leaves the terminal clean.
#[derive(Debug)]
pub(super) struct Told {
    verb: &'static str,
    total: u64,
    how: How,
    begun: Instant,
    /// When the last line was printed.
    last: Option<Instant>,
}

impl Told {
    /// So many bytes are done. Cheap enough to be called every few milliseconds.
    pub(super) fn set(&mut self, done: u64) {
        if let How::Bar(bar) = &self.how {
            return bar.set_position(done);
        }
        if self.last.is_none_or(|last| last.elapsed() >= INTERVAL) {
            self.last = Some(Instant::now());
            self.line(done);
        }
    }

    /// Everything is done.
    pub(super) fn finish(self) {
        match &self.how {
            How::Bar(bar) => {
                bar.set_position(self.total);
                bar.finish();
            }
            How::Percent { streams } => {
                self.line(self.total);
                say(*streams, "\n");
            }
            _ => self.line(self.total),
        }
    }

    /// One line of those that are not a bar. Nobody has to read it.
    fn line(&self, done: u64) {
        match self.how {
            How::Percent { streams } => {
                say(streams, &format!("    ({:.2}/100%)\r", percent(done, self.total)));
            }
            How::Json => say(true, &json_line(self.verb, (done, self.total), self.begun.elapsed())),
            How::Bar(_) | How::Nothing => {}
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let How::Bar(bar) = &self.how
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}

/// Writes to standard error, or to standard output.
fn say(error: bool, text: &str) {
    let _ = if error {
        std::io::stderr().write_all(text.as_bytes())
    } else {
        let mut output = std::io::stdout();
        output.write_all(text.as_bytes()).and_then(|()| output.flush())
    };
}

#[expect(clippy::cast_precision_loss, reason = "a percentage needs no more")]
fn percent(done: u64, total: u64) -> f64 {
    if total == 0 { 100.0 } else { done.min(total) as f64 * 100.0 / total as f64 }
}

#[expect(clippy::cast_precision_loss, reason = "a rate needs no more")]
fn json_line(verb: &str, (done, total): (u64, u64), elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
    let round = |number: f64| (number * 100.0).round() / 100.0;
    let remaining = (rate > 0.0).then(|| round(total.saturating_sub(done) as f64 / rate));
    let line = json!({
        "verb": verb,
        "done-bytes": done,
        "total-bytes": total,
        "percent": round(percent(done, total)),
        "elapsed-seconds": round(seconds),
        "bytes-per-second": rate.round(),
        "remaining-seconds": remaining,
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_hold_rate_and_time_left() {
        let line = json_line("convert", (1 << 20, 4 << 20), Duration::from_secs(2));
        assert!(line.ends_with("}\n") && line.lines().count() == 1, "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["percent"], json!(25.0));
        assert_eq!(value["bytes-per-second"], json!(524_288.0));
        assert_eq!(value["remaining-seconds"], json!(6.0));
        let line = json_line("convert", (0, 0), Duration::ZERO);
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&value["percent"], &value["remaining-seconds"]), (&json!(100.0), &json!(null)));
    }

    #[test]
    fn the_bar_has_a_good_template() {
        let bar = bar("convert", 10);
        bar.set_position(5);
        assert_eq!(bar.position(), 5);
    }
}
