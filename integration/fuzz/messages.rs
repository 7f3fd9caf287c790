//! A front-end that says anything: see `harness::messages`.

#![no_main]

use common::memory::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    harness::messages::run(input);
});
