//! Rate limits of the daemon, measured from the guest's side.
//!
//! The machine may be busy, so a rate may be missed by much but never exceeded. Longer: MEASURE=30.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use integration::client::{Client, Request};
use integration::control::Operator;
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::{Scratch, number_from_environment};
use serde_json::json;

const DEPTH: usize = 16;
const MIB: usize = 1 << 20;
/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(60);

fn disk(name: &str) -> (Scratch, PathBuf) {
    let scratch = Scratch::new(name);
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", 64 * MIB);
    (scratch, image)
}

/// Seconds that one measurement takes.
fn measure() -> Duration {
    Duration::from_secs(number_from_environment("MEASURE", 3))
}

/// Keeps the queues full for a while; gives how many requests were answered and in how long, from
/// the first one on to the last answer.
fn load(client: &mut Client, time: Duration, request: impl Fn(u64) -> Request) -> (u64, f64) {
    let (start, mut last, mut next, mut answered) = (Instant::now(), 0.0, 0, 0);
    while start.elapsed() < time || client.in_flight() > 0 {
        while start.elapsed() < time
            && let Some(slot) = client.free_slot()
        {
            let queue = slot % client.queue_count();
            client.submit(queue, slot, request(next), &[]).expect("submit");
            next += 1;
        }
        client.kick().expect("kick");
        let answers = client.wait(PATIENCE).expect("wait");
        assert!(!answers.is_empty(), "no answer came");
        assert!(answers.iter().all(|answer| answer.result == 0), "{answers:?}");
        answered += answers.len() as u64;
        last = start.elapsed().as_secs_f64();
    }
    (answered, last)
}

/// That `amount` passed in so many seconds is what `rate` and what may come at once allow.
fn assert_rate(what: &str, amount: f64, seconds: f64, rate: f64, at_once: f64) {
    let share = (amount - at_once) / (rate * seconds);
    println!("{what}: {amount} in {seconds:.3} s, {share:.3} of the rate");
    assert!(share <= 1.0, "{what}: {share:.3} of the rate");
    assert!(share >= 0.5, "{what}: only {share:.3} of the rate");
}

fn read(length: usize) -> impl Fn(u64) -> Request {
    move |number| Request::Read { offset: number * length as u64 % (64 << 20), length }
}

fn write(length: usize) -> impl Fn(u64) -> Request {
    move |number| Request::Write { offset: number * length as u64 % (64 << 20), length }
}

#[test]
fn bytes_and_requests_come_at_their_rate_on_all_queues_together() {
    let (scratch, image) = disk("rates");
    // 16 MiB/s, a tenth of it at once.
    let arguments = ["--rate-limit", "bw_size=1677721,bw_refill_time=100", "--threads", "2"];
    let daemon = Daemon::start(&scratch, &image, &arguments);
    let mut client = Client::connect(&scratch.socket(), 3, DEPTH).expect("connect");
    let rate = 16_777_210.0;
    for (what, length) in [("reads of 64 KiB", 65536), ("reads of 4 KiB", 4096)] {
        let (answered, seconds) = load(&mut client, measure(), read(length));
        let at_once = 1_677_721.0 + length as f64;
        assert_rate(what, answered as f64 * length as f64, seconds, rate, at_once);
    }
    let (answered, seconds) = load(&mut client, measure(), write(262_144));
    let at_once = 1_677_721.0 + 262_144.0;
    assert_rate("writes of 256 KiB", answered as f64 * 262_144.0, seconds, rate, at_once);
    // Flushes have no bytes, so they are not slowed.
    let (answered, seconds) = load(&mut client, Duration::from_millis(300), |_| Request::Flush);
    println!("flushes: {answered} in {seconds:.3} s");
    drop(client);
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn operations_are_limited_and_the_extra_comes_once() {
    let (scratch, image) = disk("operations");
    let rates = "ops_size=100,ops_refill_time=200,ops_one_time_burst=400";
    let daemon = Daemon::start(&scratch, &image, &["--rate-limit", rates]);
    let mut client = Client::connect(&scratch.socket(), 2, DEPTH).expect("connect");
    let (answered, seconds) = load(&mut client, measure(), read(512));
    assert_rate("with the extra", answered as f64, seconds, 500.0, 500.0);
    std::thread::sleep(Duration::from_millis(500));
    let (answered, seconds) = load(&mut client, measure(), read(512));
    assert_rate("without", answered as f64, seconds, 500.0, 100.0);
    drop(client);
    daemon.terminate();
}

#[test]
fn an_operator_changes_the_rates_of_a_guest_that_runs() {
    let (scratch, image) = disk("changed");
    let control = scratch.control();
    // A request is paid for in an hour.
    let rates = "bw_size=4096,bw_refill_time=3600000";
    let control = ["--control", control.to_str().expect("a plain name"), "--rate-limit", rates];
    let daemon = Daemon::start(&scratch, &image, &control);
    let mut operator = Operator::connect(&scratch);
    let mut client = Client::connect(&scratch.socket(), 2, DEPTH).expect("connect");
    for slot in 0..8 {
        client.submit(slot % 2, slot, read(4096)(slot as u64), &[]).expect("submit");
    }
    client.kick().expect("kick");
    assert_eq!(client.wait(PATIENCE).expect("wait").len(), 1, "one has tokens");
    assert!(client.wait(Duration::from_millis(300)).expect("wait").is_empty());
    // Who sleeps for an hour is woken.
    operator.call("qos", json!({ "off": true })).expect("no limits");
    while client.in_flight() > 0 {
        assert!(!client.wait(PATIENCE).expect("wait").is_empty(), "no answer came");
    }
    let rates = json!({ "ops_size": 50, "ops_refill_time": 100 });
    let told = operator.call("qos", rates).expect("others");
    assert_eq!((&told["ops_size"], &told["bw_size"]), (&json!(50), &json!(0)));
    let (answered, seconds) = load(&mut client, measure(), read(512));
    assert_rate("after the change", answered as f64, seconds, 500.0, 50.0);
    drop(client);
    daemon.terminate();
}

#[test]
fn a_throttled_guest_is_let_go_at_once() {
    let (scratch, image) = disk("let-go");
    // A request is paid for in an hour.
    let rates = "bw_size=4096,bw_refill_time=3600000";
    let daemon = Daemon::start(&scratch, &image, &["--rate-limit", rates]);
    let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
    for slot in 0..8 {
        client.submit(0, slot, read(4096)(slot as u64), &[]).expect("submit");
    }
    client.kick().expect("kick");
    let answers = client.wait(PATIENCE).expect("wait");
    assert_eq!(answers.len(), 1, "one has tokens");
    assert!(client.wait(Duration::from_millis(300)).expect("wait").is_empty());
    let start = Instant::now();
    drop(client);
    daemon.terminate();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_limit_that_is_never_reached_costs_next_to_nothing() {
    let run = |name: &str, arguments: &[&str]| {
        let (scratch, image) = disk(name);
        let daemon = Daemon::start(&scratch, &image, arguments);
        let mut client = Client::connect(&scratch.socket(), 1, DEPTH).expect("connect");
        let (answered, seconds) = load(&mut client, measure() / 3, read(4096));
        drop(client);
        daemon.terminate();
        answered as f64 / seconds
    };
    let free = run("free", &[]);
    let limited = run("far", &["--rate-limit", "bw_size=1T,ops_size=1000000000"]);
    println!("{free:.0} requests a second without limits, {limited:.0} with");
    assert!(limited > free / 4.0, "{limited:.0} of {free:.0}");
}
