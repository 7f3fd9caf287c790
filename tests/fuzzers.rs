//! What the fuzzers do, for a moment and with inputs drawn from a seed: their harness cannot rot,
//! and what they find at once is found here.

use common::memory::Counting;
use common::seeds::{Repeat, number, seeds};
use harness::{chain, examples, image, messages};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An input: one of the examples, changed as a fuzzer would.
fn draw(examples: &[(String, Vec<u8>)], random: &mut fastrand::Rng) -> Vec<u8> {
    let (_, example) = &examples[random.usize(0..examples.len())];
    let mut input = example.clone();
    for _ in 0..random.usize(0..8) {
        let at = random.usize(0..=input.len());
        match random.u8(0..5) {
            0 => input.insert(at, random.u8(..)),
            1 => drop(input.splice(at.., [])),
            2 => {
                let (_, other) = &examples[random.usize(0..examples.len())];
                let from = random.usize(0..=other.len());
                input.splice(at.., other[from..].iter().copied());
            }
            3 => input.extend((0..random.usize(0..24)).map(|_| random.u8(..))),
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.u8(..);
                }
            }
        }
    }
    input
}

#[test]
fn images() {
    let examples = examples::images();
    let (mut opened, mut succeeded) = (0, 0);
    let count = number("INPUTS").unwrap_or(1000);
    for seed in seeds(count) {
        let _repeat = Repeat::new("fuzzers", "images", seed);
        let outcome = image::run(&draw(&examples, &mut fastrand::Rng::with_seed(seed)));
        opened += u64::from(outcome.opened > 0);
        succeeded += u64::from(outcome.succeeded);
    }
    println!("{opened} of {count} images were opened, {succeeded} requests were done");
}

#[test]
fn chains() {
    let examples = examples::chains();
    let (mut used, mut succeeded) = (0, 0);
    let count = number("INPUTS").unwrap_or(1000);
    for seed in seeds(count) {
        let _repeat = Repeat::new("fuzzers", "chains", seed);
        let outcome = chain::run(&draw(&examples, &mut fastrand::Rng::with_seed(seed)));
        used += u64::from(outcome.used);
        succeeded += outcome.succeeded;
    }
    println!("{used} chains came back, {succeeded} requests were done");
}

#[test]
fn messages() {
    let examples = examples::messages();
    let mut service = messages::Service::start();
    let (mut sent, mut answered, mut served) = (0, 0, 0);
    let count = number("INPUTS").unwrap_or(500);
    for seed in seeds(count) {
        let _repeat = Repeat::new("fuzzers", "messages", seed);
        let outcome = service.run(&draw(&examples, &mut fastrand::Rng::with_seed(seed)));
        sent += u64::from(outcome.sent);
        answered += outcome.answered;
        served += u64::from(outcome.served);
    }
    println!("{sent} messages had {answered} bytes of answers, {served} requests were done");
}
