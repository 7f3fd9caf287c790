//! Every scenario in every execution that the memory orders allow, with few enough switches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::model::Builder;
use memory_order::qcow2::looking;

/// Switches away from a thread that could go on; what takes more of them is not found.
/// `PREEMPTIONS` sets another bound.
const PREEMPTIONS: usize = 3;

fn explore(name: &str, scenario: fn()) {
    let text = std::env::var("PREEMPTIONS").ok();
    let bound = text.map_or(PREEMPTIONS, |text| text.parse().expect("PREEMPTIONS is a number"));
    let mut builder = Builder::new();
    builder.preemption_bound = Some(bound);
    builder.max_branches = 100_000;
    let begun = std::time::Instant::now();
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        scenario();
    });
    let count = count.load(Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: {count} executions with {bound} preemptions at most, {seconds:.1} s");
    assert!(count > 1, "one execution is no exploration");
}

macro_rules! scenarios {
    ($($module:ident::$name:ident;)*) => {
        $(#[test]
        fn $name() {
            explore(stringify!($name), $module::$name);
        })*
    };
}

scenarios! {
    looking::a_look_at_a_slice_never_shows_another;
    looking::a_look_at_a_slice_never_shows_two_stays;
    looking::a_look_at_a_slice_shows_all_of_a_change_or_none;
}
