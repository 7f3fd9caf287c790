//! The control socket of a daemon under load: what it tells is true, what it changes does not fail
//! a request, and operators who do not behave cost the guest nothing.
//!
//! `SECONDS` says how long the load lasts in each test, 4 unless it is set.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use integration::bulk::{self, Content};
use integration::client::{Client, Request};
use integration::control::Operator;
use integration::daemon::Daemon;
use integration::images;
use integration::scratch::{Scratch, number_from_environment};
use integration::workload::DEPTH;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// A daemon with a control socket over a new image.
fn start(name: &str, size: u64) -> (Scratch, PathBuf, Daemon) {
    let scratch = Scratch::new(name);
    let image = scratch.file("disk.qcow2");
    images::create(&image, "qcow2", "", usize::try_from(size).expect("a size"));
    let control = scratch.control();
    let control = control.to_str().expect("a plain name");
    let daemon = Daemon::start(&scratch, &image, &["--format", "qcow2", "--control", control]);
    (scratch, image, daemon)
}

/// What a client has asked for and was answered.
#[derive(Default)]
struct Done {
    reads: u64,
    writes: u64,
    flushes: u64,
}

impl Done {
    fn total(&self) -> u64 {
        self.reads + self.writes + self.flushes
    }
}

/// Keeps every slot of a client busy until `stop` says so; every answer must be good.
fn load(client: &mut Client, size: u64, mut stop: impl FnMut() -> bool) -> Done {
    let mut done = Done::default();
    let mut random = fastrand::Rng::new();
    let mut kinds = [None; DEPTH];
    let mut take = |client: &mut Client, kinds: &mut [Option<Request>; DEPTH]| {
        let answers = client.wait(Duration::from_secs(60)).expect("wait");
        assert!(!answers.is_empty(), "the daemon does not answer");
        for answer in answers {
            let request = kinds[answer.slot].take().expect("a request");
            assert_eq!(answer.result, 0, "{request:?}");
            match request {
                Request::Read { .. } => done.reads += 1,
                Request::Write { .. } => done.writes += 1,
                _ => done.flushes += 1,
            }
        }
    };
    while !stop() {
        while let Some(slot) = client.free_slot() {
            let offset = random.u64(0..size / BLOCK as u64) * BLOCK as u64;
            let request = match random.u8(0..20) {
                0 => Request::Flush,
                1..10 => Request::Write { offset, length: BLOCK },
                _ => Request::Read { offset, length: BLOCK },
            };
            kinds[slot] = Some(request);
            client.submit(slot % client.queue_count(), slot, request, &[]).expect("submit");
        }
        client.kick().expect("kick");
        take(client, &mut kinds);
    }
    while client.in_flight() > 0 {
        take(client, &mut kinds);
    }
    done
}

/// Runs `act` while a client of its own keeps the daemon busy.
fn under_load(scratch: &Scratch, size: u64, act: impl FnOnce()) -> Done {
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut client = Client::connect(&scratch.socket(), 2, DEPTH).expect("connect");
            let done = load(&mut client, size, || over.load(std::sync::atomic::Ordering::SeqCst));
            (client, done)
        });
        // Whatever happens, the other thread must end.
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        over.store(true, std::sync::atomic::Ordering::SeqCst);
        let (_client, done) = busy.join().expect("the load");
        acted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done
    })
}

fn seconds() -> Duration {
    Duration::from_secs(number_from_environment("SECONDS", 4))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn requests(counters: &Value) -> u64 {
    ["reads", "writes", "flushes"].iter().map(|kind| number(&counters[*kind])).sum()
}

#[test]
fn statistics_agree_with_what_the_guest_has_done() {
    let size = 64 * MIB;
    let (scratch, image, mut daemon) = start("control-stats", size);
    let mut operator = Operator::connect(&scratch);
    let mut most = (0, 0);
    let done = under_load(&scratch, size, || {
        let end = Instant::now() + seconds();
        let mut before = 0;
        while Instant::now() < end {
            let stats = operator.call("stats", json!({})).expect("statistics");
            let now = requests(&stats["total"]);
            assert!(now >= before, "{now} requests after {before}");
            before = now;
            let inflight = operator.call("inflight", json!({})).expect("what is under way");
            most.0 = most.0.max(number(&inflight["in-flight"]));
            for queue in inflight["queues"].as_array().expect("a list") {
                let idle = number(&queue["in-flight"]) == 0;
                assert_eq!(queue["oldest-us"].is_null(), idle, "{queue}");
                most.1 = most.1.max(queue["oldest-us"].as_u64().unwrap_or(0));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert!(most.0 > 0 && most.0 <= DEPTH as u64, "{} under way", most.0);
    assert!(most.1 < 60_000_000, "the oldest has {} us", most.1);
    let stats = operator.call("stats", json!({})).expect("statistics");
    let total = &stats["total"];
    println!("{} requests, {} at once at most: {total}", done.total(), most.0);
    assert_eq!(number(&total["reads"]), done.reads);
    assert_eq!(number(&total["writes"]), done.writes);
    assert_eq!(number(&total["flushes"]), done.flushes);
    assert_eq!(number(&total["read-bytes"]), done.reads * BLOCK as u64);
    assert_eq!(number(&total["written-bytes"]), done.writes * BLOCK as u64);
    assert_eq!((&total["errors"], &total["in-flight"]), (&json!(0), &json!(0)));
    let workers = stats["workers"].as_array().expect("a list");
    assert_eq!(workers.iter().map(requests).sum::<u64>(), done.total());
    for (kind, count) in [("read", done.reads), ("write", done.writes), ("flush", done.flushes)] {
        let buckets = total["latency"][kind].as_array().expect("a list");
        assert_eq!(buckets.iter().map(number).sum::<u64>(), count, "{kind}");
    }
    daemon.assert_alive();
    daemon.terminate();
    images::assert_clean(&image);
}

#[test]
fn a_busy_disk_is_resized_without_a_request_failing() {
    let size = 64 * MIB;
    let (scratch, image, mut daemon) = start("control-resize", size);
    let mut operator = Operator::connect(&scratch);
    let mut now = size;
    let mut slowest = Duration::ZERO;
    let mut count = 0;
    let done = under_load(&scratch, size, || {
        let end = Instant::now() + seconds();
        while Instant::now() < end {
            // Larger and smaller, but never so small that the load is cut off.
            let wanted = size + 512 * fastrand::u64(0..2 * size / 512);
            let call = json!({ "size": wanted, "shrink": true });
            let begun = Instant::now();
            let result = operator.call("resize", call).expect("a size");
            slowest = slowest.max(begun.elapsed());
            assert_eq!(result, json!({ "virtual-size": wanted, "was": now }));
            now = wanted;
            count += 1;
            operator.call("flush", json!({})).expect("a flush");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    println!("{count} sizes under {} requests, the slowest in {slowest:?}", done.total());
    assert!(count > 3 && done.total() > 100);
    let target = 4 * size + 512;
    operator.call("resize", json!({ "size": target })).expect("a size");
    // The new end is there for whoever asks now, and holds zeros, then what is written.
    let mut client = Client::connect(&scratch.socket(), 2, DEPTH).expect("connect");
    assert_eq!(u64::from(client.config().expect("the configuration").capacity) * 512, target);
    bulk::verify(&mut client, 3 * size..target, Content::Zeros).expect("zeros");
    bulk::write(&mut client, target - MIB..target, Content::Numbered(1)).expect("the new end");
    bulk::verify(&mut client, target - MIB..target, Content::Numbered(1)).expect("the new end");
    let info = operator.call("info", json!({})).expect("information");
    assert_eq!(info["virtual-size"], json!(target));
    assert_eq!(info["front-ends"][0]["queues-served"], json!([0, 1]));
    drop(client);
    daemon.assert_alive();
    operator.call("shutdown", json!({})).expect("the end");
    assert!(daemon.wait().success());
    images::assert_clean(&image);
    assert_eq!(images::info(&image)["virtual-size"], json!(target));
}

#[test]
fn operators_who_do_not_behave_cost_the_guest_nothing() {
    let size = 16 * MIB;
    let (scratch, image, mut daemon) = start("control-hostile", size);
    let deep = format!("{}\n", "[".repeat(60_000));
    let call = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stats\"}\n".repeat(200);
    let mut slowest = Duration::ZERO;
    let done = under_load(&scratch, size, || {
        // One never reads what it asks for, one sends half a line, one sends nonsense.
        let mut deaf = Operator::connect(&scratch);
        deaf.set_patience(Duration::from_millis(200));
        while deaf.say(&call).is_ok() {}
        let mut half = Operator::connect(&scratch);
        half.say("{\"jsonrpc\":").expect("half a line");
        let mut good = Operator::connect(&scratch);
        let end = Instant::now() + seconds();
        while Instant::now() < end {
            let mut wrong = Operator::connect(&scratch);
            wrong.say(&deep).expect("nonsense");
            let begun = Instant::now();
            good.call("version", json!({})).expect("an answer");
            slowest = slowest.max(begun.elapsed());
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    println!("{} requests; an honest call took {slowest:?} at most", done.total());
    assert!(done.total() > 100);
    daemon.assert_alive();
    daemon.terminate();
    images::assert_clean(&image);
}
