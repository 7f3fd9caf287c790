//! Front-ends that begin as QEMU, cloud-hypervisor or the virtio-driver crate do, and go wrong.
//!
//! Ordinarily some hundreds of inputs; the long forms are `HANDSHAKES=10000` for the first test and
//! `SECONDS=600` for the second. `SEED=n` repeats one input of either.

use std::time::{Duration, Instant};

use common::seeds::{Repeat, number, seeds};
use harness::messages::{Outcome, Service};

/// What all inputs of a test have come to.
#[derive(Default)]
struct Sum {
    inputs: u64,
    sent: u64,
    answered: usize,
    served: u64,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        self.inputs += 1;
        self.sent += u64::from(outcome.sent);
        self.answered += outcome.answered;
        self.served += u64::from(outcome.served);
    }

    /// Prints the sum, and sees to it that more was done than to refuse.
    fn tell(&self, start: Instant) {
        let Self { inputs, sent, answered, served } = self;
        println!(
            "{inputs} inputs in {:?}: {sent} messages or pieces, {answered} bytes of answers, \
             {served} requests of disturbed guests done",
            start.elapsed()
        );
        assert!(*inputs < 50 || *sent > 8 * inputs && served * 8 > *inputs, "most is refused");
    }
}

#[test]
fn handshakes_in_any_order_leave_the_next_front_end_its_disk() {
    let (mut service, mut sum, start) = (Service::start(), Sum::default(), Instant::now());
    let count = number("HANDSHAKES").unwrap_or(300);
    let seeds = if number("SEED").is_some() { seeds(1) } else { 0..count };
    for seed in seeds {
        let _repeat = Repeat::new("handshakes", "handshakes_in_any_order", seed);
        sum.add(service.handshake(seed));
    }
    sum.tell(start);
}

#[test]
fn streams_of_spoiled_bytes_leave_the_next_front_end_its_disk() {
    let (mut service, mut sum, start) = (Service::start(), Sum::default(), Instant::now());
    let time = number("SECONDS").map(Duration::from_secs);
    let mut seeds = if number("SEED").is_some() { seeds(1) } else { 0..u64::MAX };
    let goes_on = |count: u64| time.map_or(count < 300, |time| start.elapsed() < time);
    while goes_on(sum.inputs)
        && let Some(seed) = seeds.next()
    {
        let _repeat = Repeat::new("handshakes", "streams_of_spoiled_bytes", seed);
        sum.add(service.stream(seed));
    }
    sum.tell(start);
}
