//! How much of the processor's time something takes: a clock on the wall says little on a machine
//! that has other things to do.

use std::time::Duration;

/// What this thread has had of processors so far.
fn used() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells");
    let first = text.split(' ').next().and_then(|number| number.parse().ok());
    Duration::from_nanos(first.expect("nanoseconds"))
}

/// Runs `work`, which may take so much of this thread's processor time.
///
/// # Panics
/// When it has taken more.
pub fn within<R>(most: Duration, work: impl FnOnce() -> R) -> R {
    let before = used();
    let result = work();
    let took = used().saturating_sub(before);
    assert!(took <= most, "{took:?} of the processor's time");
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_is_no_work() {
        within(Duration::from_millis(10), || std::thread::sleep(Duration::from_millis(30)));
    }

    #[test]
    #[should_panic(expected = "of the processor's time")]
    fn work_is() {
        within(Duration::from_millis(10), || {
            let before = used();
            while used() - before < Duration::from_millis(20) {}
        });
    }
}
