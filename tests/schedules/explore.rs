//! Running a scenario under many schedules.

use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

/// Schedules for each scheduler in an ordinary run: a second or so for each scenario.
const SCHEDULES: usize = 5000;
/// How many of a schedule's switches the second scheduler chooses on purpose; most faults need two
/// or three.
const DEPTH: usize = 3;
/// A scenario that takes more steps than this goes round in circles.
const STEPS: usize = 200_000;

fn number(name: &str) -> Option<usize> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

fn config() -> Config {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(STEPS);
    // The library would warn that it knows one memory order; the crate's documentation says so.
    config.silence_warnings = true;
    config
}

/// Runs a scenario under `SCHEDULES` schedules of three kinds each: drawn from a seed, with a few
/// switches at places drawn from a seed, and all in order as far as they go. `SEED` picks other
/// seeds, and `REPLAY` holds one schedule as a failure has printed it.
///
/// # Panics
/// When the scenario does, or when its threads wait for each other for ever.
pub fn explore(name: &str, scenario: fn()) {
    if let Ok(schedule) = std::env::var("REPLAY") {
        return shuttle::replay(scenario, &schedule);
    }
    let (count, seed) = (number("SCHEDULES").unwrap_or(SCHEDULES), number("SEED").unwrap_or(1));
    let begun = std::time::Instant::now();
    Runner::new(RandomScheduler::new_from_seed(seed as u64, count), config()).run(scenario);
    Runner::new(PctScheduler::new_from_seed(seed as u64, DEPTH, count), config()).run(scenario);
    let in_order = Runner::new(DfsScheduler::new(Some(count), false), config()).run(scenario);
    let all = if in_order < count { " (there are no more)" } else { "" };
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: {count} + {count} + {in_order} schedules{all}, {seconds:.1} s");
}
