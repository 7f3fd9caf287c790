//! Checking and repairing a spoiled image.
//!
//! What must hold: a check changes nothing; repairs come to an end; an image without corruptions is
//! sound for the independent checker of `common` too.

use arbitrary::{Result, Unstructured};
use vhost_user_qcow2::qcow2::check::{MEMORY, Repair, Report, check_within};
use vhost_user_qcow2::storage::FileId;
use vhost_user_qcow2::storage::mem::MemDisk;

use crate::watch::{Watch, drive};

/// Most operations on the file that one check of an image of this size may take.
const MOST_OPERATIONS: u64 = 50_000;
/// A bound of memory that makes a check look at the file window by window.
const LITTLE: usize = 1024;

/// Checks the image that is the first file, and repairs it if the input says so. Returns whether
/// what was repaired is durable: a fault that a repair meets may leave some of it to a power cut.
pub(crate) fn run(
    disk: &MemDisk,
    name: &'static str,
    engine: &Watch,
    input: &mut Unstructured<'_>,
) -> Result<bool> {
    let choice: u8 = input.arbitrary()?;
    let memory = if choice & 1 == 0 { MEMORY } else { LITTLE };
    let content = || disk.content_of(name).expect("the image");
    let checked = |repair| {
        let report = drive(engine, check_within(engine, name, FileId(0), repair, memory));
        let operations = engine.take_operations();
        assert!(operations < MOST_OPERATIONS, "{operations} operations for a check");
        report
    };
    let before = content();
    let report = checked(Repair::None);
    assert!(content() == before, "a check has changed the image");
    let Ok(report) = report else { return Ok(true) };
    compare(&report, &before);
    let repair = match choice >> 1 & 3 {
        0 => return Ok(true),
        1 => Repair::Leaks,
        _ => Repair::All,
    };
    let fired = engine.faults().fired();
    let Ok(left) = checked(repair) else { return Ok(false) };
    if engine.faults().fired() != fired {
        return Ok(false);
    }
    compare(&left, &content());
    // A fault that has waited for its turn must not meet this.
    engine.faults().clear();
    let again = checked(repair).expect("it was repaired before");
    let counts = |report: &Report| (report.corruptions, report.leaks, report.check_errors);
    let settled = content();
    compare(&again, &settled);
    // New refcount structures make a file longer, so that a table which lay behind its end is
    // found by the second repair; a third has nothing to do.
    assert!(again.corruptions <= left.corruptions, "{left:?} was left, then {again:?}");
    let third = checked(repair).expect("it was repaired before");
    assert_eq!(counts(&third), counts(&again), "{again:?} was left, then {third:?}");
    let fixed = third.corruptions_fixed + third.leaks_fixed;
    assert_eq!(fixed, 0, "{again:?} was left, and the next repair did {third:?}");
    assert!(content() == settled, "a repair with nothing to do has changed the image");
    Ok(true)
}

/// What is consistent for the one checker is so for the other.
fn compare(report: &Report, bytes: &[u8]) {
    if report.is_consistent() {
        let other = common::check::check(bytes);
        assert!(other.corruptions.is_empty(), "{report:?} is {other:?}");
    }
}
