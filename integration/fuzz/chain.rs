//! Chains of descriptors and garbage in a guest's memory: see `harness::chain`.

#![no_main]

use common::memory::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    harness::chain::run(input);
});
