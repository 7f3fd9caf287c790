//! Numbers and times as people read them, in qemu-img's words.

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use crate::qcow2::snapshot::Snapshot;

/// Units of 1024 of the one before.
const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// So many bytes with three digits and a unit, such as `3.31 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    let (mut unit, mut scale) = (0, 1_u64);
    while unit + 1 < UNITS.len() && bytes / scale >= 1000 {
        scale <<= 10;
        unit += 1;
    }
    let value = bytes as f64 / scale as f64;
    let digits = match value {
        value if value < 1.0 => 3,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let text =
        if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { text.as_str() };
    format!("{text} {}", UNITS[unit])
}

/// So many bytes, short and in full.
pub(super) fn size(size: u64) -> String {
    format!("{} ({size} bytes)", bytes(size))
}

/// A point in time as the bytes of an image say it, in UTC.
fn date(seconds: u32) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(seconds.into());
    humantime::format_rfc3339_seconds(time).to_string()
}

/// A running time in nanoseconds.
fn clock(nanoseconds: u64) -> String {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:04}:{minutes:02}:{:02}.{:03}", seconds % 60, rest / 1_000_000)
}

/// A table of snapshots; empty when there are none.
pub(super) fn snapshots(list: &[Snapshot]) -> String {
    let mut text = String::new();
    if list.is_empty() {
        return text;
    }
    let line = |columns: [&str; 6]| {
        let [id, tag, state, date, clock, icount] = columns;
        format!("{id:<8}{tag:<18}{state:>7}{date:>22}{clock:>16}{icount:>11}\n")
    };
    text.push_str("Snapshot list:\n");
    text.push_str(&line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]));
    for one in list {
        let state = bytes(one.vm_state_size);
        let (date, clock) = (date(one.date_seconds), clock(one.vm_clock_nanoseconds));
        let icount = one.icount.map_or_else(|| "--".to_owned(), |count| count.to_string());
        // A long name keeps a space behind it.
        let name = format!("{} ", one.name);
        let _ = write!(text, "{}", line([&one.id, &name, &state, &date, &clock, &icount]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (number, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (590_336, "576 KiB"),
            (3_473_408, "3.31 MiB"),
            (10 << 30, "10 GiB"),
            (1 << 60, "1 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(number), text, "{number}");
        }
    }

    #[test]
    fn times_are_read_as_they_are_kept() {
        assert_eq!(date(1_795_285_093), "2026-11-21T18:18:13Z");
        assert_eq!(clock(3_723_004_000_000), "0001:02:03.004");
    }
}
