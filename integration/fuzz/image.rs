//! Spoiled images, used as guests would: see `harness::image`.

#![no_main]

use std::time::Duration;

use common::memory::Counting;
use common::processor::within;

/// What one input may take of the processor's time; most take some milliseconds.
const MOST_TIME: Duration = Duration::from_secs(5);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    within(MOST_TIME, || harness::image::run(input));
});
