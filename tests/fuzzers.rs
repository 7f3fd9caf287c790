//! What the fuzzers do, for a moment and with inputs drawn from a seed: their harness cannot rot,
//! and what they find at once is found here.

use common::memory::Counting;
use common::seeds::{Repeat, number, seeds};
use harness::examples::Input;
use harness::{chain, examples, image, messages};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs all inputs that are kept, and then `count` that are made of them as a fuzzer would.
fn run(test: &str, target: &str, count: u64, mut each: impl FnMut(&[u8])) {
    let examples = examples::of(target);
    for (name, input) in &examples {
        println!("{target}: {name}");
        each(input);
    }
    for seed in seeds(number("INPUTS").unwrap_or(count)) {
        let _repeat = Repeat::new("fuzzers", test, seed);
        each(&draw(&examples, &mut fastrand::Rng::with_seed(seed)));
    }
}

fn draw(examples: &[Input], random: &mut fastrand::Rng) -> Vec<u8> {
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
    let (mut count, mut opened, mut succeeded) = (0, 0, 0);
    run("images", "image", 800, |input| {
        let outcome = image::run(input);
        count += 1;
        opened += u32::from(outcome.opened > 0);
        succeeded += outcome.succeeded;
    });
    println!("{opened} of {count} images were opened, {succeeded} requests were done");
    assert!(opened > count / 2 && succeeded > count, "most inputs are refused");
}

#[test]
fn chains() {
    let (mut count, mut used, mut succeeded) = (0, 0, 0);
    run("chains", "chain", 800, |input| {
        let outcome = chain::run(input);
        count += 1;
        used += outcome.used;
        succeeded += outcome.succeeded;
    });
    println!("{count} inputs: {used} chains came back, {succeeded} requests were done");
    assert!(used > count && succeeded > u64::from(count), "most inputs are refused");
}

#[test]
fn messages() {
    let mut service = messages::Service::start();
    let (mut count, mut sent, mut answered, mut served) = (0, 0, 0, 0);
    run("messages", "messages", 400, |input| {
        let outcome = service.run(input);
        count += 1;
        sent += outcome.sent;
        answered += outcome.answered;
        served += outcome.served;
    });
    println!("{count} inputs: {sent} messages, {answered} bytes of answers, {served} requests");
    assert!(sent > 5 * count && served > count, "most inputs are refused");
}
