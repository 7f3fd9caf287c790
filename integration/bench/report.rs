//! What was found, as a table and as a picture.

use std::fmt::Write;

use crate::count::{Counts, Tool};
use crate::measure::{Bench, Comparison, Sample, typical};

/// One promise of a row, and whether it was kept.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    /// What was measured, with its value and its bar.
    pub(crate) text: String,
    pub(crate) met: bool,
    pub(crate) value: f64,
    pub(crate) bar: f64,
}

impl Check {
    pub(crate) fn at_least(what: &str, value: f64, bar: f64) -> Self {
        let text = format!("{what} {} (≥ {bar})", short(value));
        Self { text, met: value >= bar, value, bar }
    }

    pub(crate) fn at_most(what: &str, value: f64, bar: f64) -> Self {
        let text = format!("{what} {} (≤ {bar})", short(value));
        Self { text, met: value <= bar, value, bar }
    }

    /// Kept when this or `other` is.
    pub(crate) fn or(self, other: &Self) -> Self {
        let text = format!("{} or {}", self.text, other.text);
        Self { text, met: self.met || other.met, ..self }
    }
}

/// What a row has shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finding {
    pub(crate) number: String,
    pub(crate) title: String,
    pub(crate) ours: String,
    /// The best that the other server did, or what else ours is held against.
    pub(crate) theirs: String,
    pub(crate) ratio: Option<f64>,
    /// Processor time for each request, as a part of theirs.
    pub(crate) processor: Option<f64>,
    pub(crate) calls: String,
    pub(crate) latency: String,
    /// Part of what the host and the ring allow.
    pub(crate) limit: Option<f64>,
    pub(crate) checks: Vec<Check>,
    pub(crate) notes: Vec<String>,
}

impl Finding {
    pub(crate) fn new(number: &str, title: &str) -> Self {
        Self { number: number.to_owned(), title: title.to_owned(), ..Self::default() }
    }

    /// Takes over what two servers did.
    pub(crate) fn with(mut self, comparison: &Comparison) -> Self {
        let Comparison { ours, theirs, mode, modes, counts } = comparison;
        self.ours = describe(ours);
        self.theirs = format!("{}, {}", describe(theirs), mode.name());
        self.ratio = Some(comparison.ratio(|sample| sample.rate));
        self.processor = Some(comparison.ratio(|sample| sample.processor));
        if let Some((ours, theirs)) = counts {
            let per_request = |counts: &Counts| short(counts.calls);
            self.calls = format!("{} / {}", per_request(ours), per_request(theirs));
        }
        self.latency = format!("{} / {}", latencies(ours), latencies(theirs));
        let modes: Vec<String> = modes
            .iter()
            .map(|(mode, rate)| format!("{} {}", mode.name(), rate_text(*rate)))
            .collect();
        self.notes.push(format!("modes of theirs: {}", modes.join(", ")));
        self
    }

    /// Takes over two cases of our server, the second of which sets the measure.
    pub(crate) fn with_own(
        mut self,
        (left, right): &(Vec<Sample>, Vec<Sample>),
        what: &str,
    ) -> Self {
        self.ours = describe(left);
        self.theirs = format!("{what}: {}", describe(right));
        self.latency = format!("{} / {}", latencies(left), latencies(right));
        self
    }

    /// Promises a part or a multiple of the other server's rate.
    pub(crate) fn ratio_at_least(mut self, bar: f64) -> Self {
        self.checks.push(Check::at_least("ratio", self.ratio.unwrap_or(f64::NAN), bar));
        self
    }

    /// Promises a part of the other server's processor time.
    pub(crate) fn processor_at_most(mut self, bar: f64) -> Self {
        self.checks.push(Check::at_most("CPU ratio", self.processor.unwrap_or(f64::NAN), bar));
        self
    }

    pub(crate) fn check(mut self, check: Check) -> Self {
        self.checks.push(check);
        self
    }

    pub(crate) fn note(mut self, note: String) -> Self {
        self.notes.push(note);
        self
    }

    fn is_met(&self) -> bool {
        self.checks.iter().all(|check| check.met)
    }

    /// One line of the table.
    pub(crate) fn line(&self) -> String {
        let number = |value: Option<f64>| value.map_or("–".to_owned(), short);
        let bars: Vec<String> = self
            .checks
            .iter()
            .map(|check| format!("{}{}", if check.met { "" } else { "**missed:** " }, check.text))
            .collect();
        let text = |text: &str| if text.is_empty() { "–".to_owned() } else { text.to_owned() };
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.number,
            self.title,
            bars.join("; "),
            text(&self.ours),
            text(&self.theirs),
            number(self.ratio),
            number(self.processor),
            text(&self.calls),
            text(&self.latency),
            self.limit.map_or("–".to_owned(), |part| format!("{:.0} %", part * 100.0)),
            if self.is_met() { "met" } else { "missed" }
        )
    }
}

/// Three digits are as much as a measurement is worth.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "?".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Requests a second.
pub(crate) fn rate_text(rate: f64) -> String {
    if rate >= 10_000.0 { format!("{:.0}k", rate / 1000.0) } else { short(rate) }
}

fn describe(samples: &[Sample]) -> String {
    let rate = rate_text(typical(samples, |sample| sample.rate));
    let processor = typical(samples, |sample| sample.processor);
    format!("{rate}/s, {} µs", short(processor))
}

fn latencies(samples: &[Sample]) -> String {
    let [p50, p99] =
        [|sample: &Sample| sample.p50, |sample: &Sample| sample.p99].map(|of| typical(samples, of));
    format!("{}, {}", short(p50), short(p99))
}

/// The whole report.
pub(crate) fn markdown(bench: &Bench, facts: &[(&str, String)], findings: &[Finding]) -> String {
    let mut text = String::from("# Measured against qemu-storage-daemon\n\n");
    for (name, value) in facts {
        let _ = writeln!(text, "- {name}: {value}");
    }
    let tool = bench.tool.map_or("nothing that works here", Tool::describe);
    let _ = write!(
        text,
        "- runs: {} of {:.1} s for each server and row, in turn\n\
         - system calls: counted by {tool}\n\n\
         The rate is requests a second, followed by the server's processor time for each request, \
         the kernel's part included. Ratios are medians over neighbouring runs. Latencies are p50 \
         and p99 in microseconds. Pairs are ours / theirs. The limit is 1 / (t_bare + t_ring): the \
         time of the same request on the raw file without a server, and that of our server without \
         a disk. `native` needs cache.direct=on and goes around the page cache in every row.\n\n\
         | Row | What | Bars | Ours | Best of theirs | Ratio | CPU ratio | \
         System calls a request | Latency | Of the limit | |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
        bench.rounds,
        bench.time.as_secs_f64(),
    );
    for finding in findings {
        text += &finding.line();
        text.push('\n');
    }
    text.push('\n');
    for finding in findings {
        for note in &finding.notes {
            let _ = writeln!(text, "- Row {}: {note}.", finding.number);
        }
    }
    text
}

/// Bars of the ratios on a logarithmic scale, each with a mark where its promise begins.
pub(crate) fn picture(findings: &[Finding]) -> String {
    const LEFT: f64 = 330.0;
    const WIDTH: f64 = 520.0;
    const LINE: f64 = 24.0;
    /// A quarter to sixteen times.
    const LOWEST: f64 = -2.0;
    const OCTAVES: f64 = 6.0;
    let place = |value: f64| LEFT + (value.log2() - LOWEST).clamp(0.0, OCTAVES) / OCTAVES * WIDTH;
    let drawn: Vec<&Finding> =
        findings.iter().filter(|finding| !finding.checks.is_empty()).collect();
    let height = LINE * (drawn.len() as f64 + 2.0);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"930\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"930\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for exponent in [-2, -1, 0, 1, 2, 3, 4] {
        let (value, x) = (2f64.powi(exponent), place(2f64.powi(exponent)));
        let _ = write!(
            text,
            "<line x1=\"{x}\" y1=\"{LINE}\" x2=\"{x}\" y2=\"{height}\" stroke=\"#ddd\"/>\n\
             <text x=\"{x}\" y=\"16\" text-anchor=\"middle\">{value}×</text>\n"
        );
    }
    for (index, finding) in drawn.iter().enumerate() {
        let (check, y) = (&finding.checks[0], LINE * (index as f64 + 1.3));
        let (from, to) = (place(1.0).min(place(check.value)), place(1.0).max(place(check.value)));
        let colour = if check.met { "#2a7" } else { "#c43" };
        let _ = write!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} {}</text>\n\
             <rect x=\"{from}\" y=\"{y}\" width=\"{}\" height=\"14\" fill=\"{colour}\"/>\n\
             <line x1=\"{bar}\" y1=\"{}\" x2=\"{bar}\" y2=\"{}\" stroke=\"black\" \
             stroke-width=\"2\"/>\n<text x=\"{}\" y=\"{}\">{}</text>\n",
            LEFT - 10.0,
            y + 11.0,
            finding.number,
            finding.title,
            (to - from).max(1.0),
            y - 3.0,
            y + 17.0,
            LEFT + WIDTH + 12.0,
            y + 11.0,
            short(check.value),
            bar = place(check.bar),
        );
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_say_whether_they_are_kept() {
        assert!(Check::at_least("ratio", 1.8, 1.8).met);
        assert!(!Check::at_least("ratio", f64::NAN, 1.8).met);
        assert!(!Check::at_most("CPU ratio", 0.51, 0.5).met);
        let either = Check::at_least("ratio", 1.0, 1.15).or(&Check::at_least("limit", 0.96, 0.95));
        assert!(either.met);
        assert_eq!(either.text, "ratio 1.00 (≥ 1.15) or limit 0.96 (≥ 0.95)");
    }

    #[test]
    fn a_missed_row_is_seen_in_its_line() {
        let mut finding = Finding::new("1", "reads");
        finding.ratio = Some(1.234);
        let finding = finding.ratio_at_least(1.8);
        assert!(finding.line().contains("**missed:** ratio 1.23 (≥ 1.8)"), "{}", finding.line());
        assert!(finding.line().ends_with("| missed |"));
        assert!(picture(&[finding]).contains("#c43"));
    }
}
