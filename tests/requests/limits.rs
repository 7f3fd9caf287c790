//! Rings of a device with rate limits, in simulated time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_user_qcow2::blk::limit::Limiter;

use super::bench::{Bench, DATA, HEADER, Options, STATUS, bench};
use super::driver::{FLUSH, IN, Piece, header};
use vhost_user_qcow2::worker::queue::RingSetup;

const MILLISECOND: u64 = 1_000_000;
const READ: [Piece; 3] = [(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)];

/// A device with limits, and its time in nanoseconds.
fn limited(rates: &str) -> (Options, Arc<Limiter>, Arc<AtomicU64>) {
    let time = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&time);
    let limiter = Arc::new(Limiter::with_clock(move || clock.load(Ordering::Relaxed)));
    limiter.set(rates.parse().expect("rates")).expect("good rates");
    (Options { limiter: Arc::clone(&limiter), ..Options::default() }, limiter, time)
}

/// Sleeps as the worker's thread would, if it may; returns whether it slept.
fn sleep<F: Future<Output = ()>>(bench: &mut Bench<F>, time: &AtomicU64) -> bool {
    let quiet = bench.worker.park();
    let wait = bench.worker.throttled_ms();
    bench.worker.unpark();
    if let Some(wait) = wait.filter(|_| quiet) {
        time.fetch_add(wait as u64 * MILLISECOND, Ordering::Relaxed);
    }
    quiet && wait.is_some()
}

#[test]
fn a_ring_out_of_tokens_is_served_at_its_rate() {
    // 64 KiB in 100 ms, 16 reads at once.
    let (options, _, time) = limited("bw_size=64K,bw_refill_time=100");
    let mut bench = bench(options);
    bench.driver.write(HEADER, &header(IN, 0));
    for _ in 0..40 {
        bench.driver.send_indirect(super::TABLE, &READ);
    }
    bench.run();
    assert_eq!(bench.driver.used().len(), 16, "a full bucket");
    let mut done = 16;
    while done < 40 {
        assert!(sleep(&mut bench, &time), "it waits for tokens and for nothing else");
        bench.run();
        done += bench.driver.used().len();
    }
    // 24 reads of 6.25 ms, the last of which need not be paid for yet.
    let taken = time.load(Ordering::Relaxed) / MILLISECOND;
    assert!((143..=150).contains(&taken), "{taken} ms");
    assert!(!sleep(&mut bench, &time), "nothing is left");
}

#[test]
fn every_request_is_an_operation_and_only_data_is_bytes() {
    let (options, limiter, _) = limited("ops_size=3");
    let mut bench = bench(options);
    bench.driver.write(HEADER, &header(FLUSH, 0));
    let flush = [(HEADER, 16, false), (STATUS, 1, true)];
    // A chain that makes no sense is a request too.
    for pieces in [&flush[..], &flush[..1], &flush[..], &flush[..]] {
        bench.driver.send(pieces);
    }
    bench.run();
    assert_eq!(bench.driver.used().len(), 3);
    limiter.set("bw_size=1".parse().expect("rates")).expect("good rates");
    for _ in 0..20 {
        bench.driver.send(&flush);
    }
    bench.run();
    assert_eq!(bench.driver.used().len(), 21, "flushes have no bytes");
}

#[test]
fn a_throttled_ring_stops_at_once_and_goes_on_where_it_was() {
    let (options, limiter, time) = limited("bw_size=4096,bw_refill_time=4000000");
    let mut bench = bench(options);
    bench.driver.write(HEADER, &header(IN, 0));
    for _ in 0..5 {
        bench.driver.send(&READ);
    }
    bench.run();
    assert_eq!(bench.driver.used().len(), 1);
    assert!(bench.worker.park(), "no tokens for an hour");
    assert!(bench.worker.throttled_ms().expect("it waits") > 900);
    bench.worker.unpark();
    bench.worker.stop(0);
    bench.worker.turn();
    let stopped = bench.worker.take_stopped().expect("nothing that was taken waits");
    assert_eq!(stopped.next_available, 1);
    assert_eq!(bench.worker.throttled_ms(), None, "nobody waits for tokens");
    assert_eq!(time.load(Ordering::Relaxed), 0);
    drop(stopped);
    limiter.set("bw_size=0".parse().expect("rates")).expect("no limits");
    let mut state = bench.driver.state(false);
    state.next_avail = 1;
    let setup = super::rings::setup(state);
    bench.worker.start(0, setup).expect("it is served again");
    bench.run();
    assert_eq!(bench.driver.used().len(), 4);
}

#[test]
fn chains_that_a_predecessor_had_taken_wait_for_tokens_like_others() {
    let (options, _, time) = limited("ops_size=1,ops_refill_time=10");
    let mut bench = bench(options);
    bench.worker.stop(0);
    bench.worker.turn();
    drop(bench.worker.take_stopped().expect("nothing is under way"));
    bench.driver.write(HEADER, &header(IN, 0));
    for head in 0..3 {
        assert_eq!(bench.driver.send_indirect(super::TABLE, &READ), head);
    }
    let state = bench.driver.state(false);
    let inflight = Some(super::rings::left(3, state.size));
    let setup = RingSetup { inflight, ..super::rings::setup(state) };
    bench.worker.start(0, setup).expect("it is served");
    // Nothing but what is taken again is there to wait for.
    for turn in 1..=3 {
        bench.run();
        assert_eq!(bench.driver.used().len(), 1, "turn {turn}");
        assert_eq!(sleep(&mut bench, &time), turn < 3, "turn {turn}");
    }
}

#[test]
fn two_rings_of_one_worker_share_what_there_is() {
    let (options, _, time) = limited("ops_size=1,ops_refill_time=10");
    let mut bench = bench(options);
    let (mut other, _call) = super::rings::second_ring(&mut bench);
    bench.driver.write(HEADER, &header(IN, 0));
    let mut counts = [0, 0];
    for _ in 0..200 {
        if other.available.wrapping_sub(other.seen) < 4 {
            other.send_indirect(super::TABLE, &READ);
        }
        if bench.driver.available.wrapping_sub(bench.driver.seen) < 4 {
            bench.driver.send_indirect(super::TABLE, &READ);
        }
        bench.run();
        counts[0] += bench.driver.used().len();
        counts[1] += other.used().len();
        sleep(&mut bench, &time);
    }
    let [first, second] = counts;
    assert!(first + second >= 190, "{counts:?}");
    assert!(first.abs_diff(second) <= 2, "{counts:?}");
}
