//! Spoiled images, used as guests would: see `harness::image`.

#![no_main]

use common::memory::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    harness::image::run(input);
});
