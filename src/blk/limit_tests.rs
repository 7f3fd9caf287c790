//! Random traffic of several workers over simulated time, held against what the limits promise.

use super::*;
use crate::sync::AtomicU64;

const SECOND: u64 = 1_000_000_000;
const MILLISECOND: u64 = 1_000_000;

/// A limiter and its time in nanoseconds.
fn limiter(rates: RateLimits) -> (Arc<Limiter>, Arc<AtomicU64>) {
    let time = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&time);
    let limiter = Arc::new(Limiter::with_clock(move || clock.load(Ordering::Relaxed)));
    limiter.set(rates).expect("good rates");
    (limiter, time)
}

/// A worker as the limiter sees it: a seat and the lengths of requests that wait in its rings.
struct Worker {
    seat: Seat,
    waiting: VecDeque<u64>,
    woken: Arc<AtomicBool>,
    /// When it wakes by itself.
    alarm: Option<u64>,
    taken: u64,
}

impl Worker {
    fn new(limiter: &Arc<Limiter>) -> Self {
        let woken = Arc::new(AtomicBool::new(true));
        let bell = Arc::clone(&woken);
        let seat = limiter.seat(Arc::new(move || bell.store(true, Ordering::Relaxed)));
        Self { seat, waiting: VecDeque::new(), woken, alarm: None, taken: 0 }
    }

    /// Looks at the rings if anything has woken it; gives the lengths of what it took.
    fn turn(&mut self, limiter: &Arc<Limiter>, now: u64, late: u64) -> Vec<u64> {
        let rung = self.woken.swap(false, Ordering::Relaxed);
        if !rung && self.alarm.is_none_or(|alarm| alarm > now) {
            return Vec::new();
        }
        let mut taken = Vec::new();
        let mut admission = self.seat.enter(limiter);
        let served = admission.is_some();
        while let Some(limit) = admission.as_mut().filter(|limit| limit.is_open())
            && let Some(bytes) = self.waiting.pop_front()
        {
            limit.pay(bytes);
            taken.push(bytes);
        }
        drop(admission);
        self.seat.settle(served, !self.waiting.is_empty());
        self.taken += taken.len() as u64;
        self.alarm = self.seat.wait().map(|wait| now + wait + late);
        taken
    }
}

/// What passed: when, and how many bytes.
type Passed = Vec<(u64, u64)>;

/// That no window of time saw more than is allowed of one kind: `amounts` at their times.
fn assert_bounded(amounts: &Passed, bucket: (u64, u64, u64), slack: u64, what: &str) {
    let (size, refill_ms, burst) = bucket;
    // The largest excess of any window ending here: what passed less what came in, as in a bucket
    // that may grow.
    let (mut excess, mut last) = (0i128, 0);
    let unit = i128::from(refill_ms * MILLISECOND);
    for (at, amount) in amounts {
        excess = (excess - i128::from(at - last) * i128::from(size)).max(0);
        excess += i128::from(*amount) * unit;
        last = *at;
        let most = i128::from(size + burst + slack) * unit;
        assert!(excess <= most, "{what}: at {at} ns a window has too much");
    }
}

#[test]
fn no_window_sees_more_than_bucket_burst_and_rate_and_demand_gets_the_rate() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut draw = |least, most| random.u64(least..=most);
        let rates = RateLimits {
            bw_size: draw(1, 3 << 20),
            bw_refill_time: draw(20, 2000),
            bw_one_time_burst: draw(0, 1) * draw(0, 8 << 20),
            ops_size: draw(1, 200),
            ops_refill_time: draw(20, 2000),
            ops_one_time_burst: draw(0, 1) * draw(0, 500),
        };
        let (limiter, time) = limiter(rates);
        let mut workers: Vec<Worker> = (0..4).map(|_| Worker::new(&limiter)).collect();
        let (mut passed, mut now) = (Passed::new(), 0);
        let end = 20 * SECOND;
        while now < end {
            now += random.u64(1..2 * MILLISECOND);
            time.store(now, Ordering::Relaxed);
            for worker in &mut workers {
                // All of them always want more than they get.
                while worker.waiting.len() < 8 {
                    worker.waiting.push_back(random.u64(0..64) * 4096);
                    // Who waits for tokens asks for no kicks, and may be woken all the same.
                    worker.woken.fetch_or(!worker.seat.waits() || random.bool(), Ordering::Relaxed);
                }
                let late = random.u64(0..2 * MILLISECOND);
                let taken = worker.turn(&limiter, now, late);
                passed.extend(taken.iter().map(|bytes| (now, *bytes)));
            }
        }
        let what = format!("seed {seed}: {rates}");
        let bytes = (rates.bw_size, rates.bw_refill_time, rates.bw_one_time_burst);
        assert_bounded(&passed, bytes, 63 * 4096, &what);
        let counts: Passed = passed.iter().map(|(at, _)| (*at, 1)).collect();
        let operations = (rates.ops_size, rates.ops_refill_time, rates.ops_one_time_burst);
        assert_bounded(&counts, operations, 0, &what);
        // One of the two limits was used up, but for what the late wake-ups of four workers cost.
        let used = |amounts: &Passed, (size, refill_ms, burst): (u64, u64, u64)| {
            let sum: u64 = amounts.iter().map(|(_, amount)| amount).sum();
            let allowed = burst + size * (end / MILLISECOND) / refill_ms;
            sum as f64 / allowed as f64
        };
        let share = used(&passed, bytes).max(used(&counts, operations));
        assert!(share > 0.9, "{what}: only {share:.3} of the rate was reached");
        let least = workers.iter().map(|worker| worker.taken).min().unwrap_or(0);
        assert!(least as usize * 8 >= passed.len(), "{what}: one of four got {least}");
    }
}

#[test]
fn a_request_larger_than_the_bucket_passes_and_is_paid_for() {
    let (limiter, time) = limiter("bw_size=1000,bw_refill_time=1000".parse().expect("rates"));
    let mut worker = Worker::new(&limiter);
    worker.waiting.extend([10_000; 3]);
    assert_eq!(worker.turn(&limiter, 0, 0), [10_000]);
    // The debt is paid after nine seconds, and one token is there a millisecond later.
    assert_eq!(worker.alarm, Some(9 * SECOND + MILLISECOND));
    time.store(9 * SECOND + MILLISECOND, Ordering::Relaxed);
    assert_eq!(worker.turn(&limiter, 9 * SECOND + MILLISECOND, 0), [10_000]);
    assert!(worker.seat.waits());
}

#[test]
fn new_rates_are_in_force_at_once_and_wake_everybody() {
    let (limiter, _time) = limiter("bw_size=1,ops_size=1000".parse().expect("rates"));
    let mut workers: Vec<Worker> = (0..3).map(|_| Worker::new(&limiter)).collect();
    for worker in &mut workers {
        worker.waiting.extend([1 << 30; 10]);
        worker.turn(&limiter, 0, 0);
    }
    assert!(workers.iter().all(|worker| worker.seat.waits()));
    let rates = limiter.get().with("bw_size=0").expect("rates");
    limiter.set(rates).expect("good rates");
    assert!(workers.iter().all(|worker| worker.woken.load(Ordering::Relaxed)));
    // Each that was served wakes the next in line.
    for _ in 0..3 {
        for worker in &mut workers {
            worker.turn(&limiter, 0, 0);
        }
    }
    assert!(workers.iter().all(|worker| worker.waiting.is_empty() && !worker.seat.waits()));
    let wrong = RateLimits { bw_refill_time: 0, ..rates };
    limiter.set(wrong).expect_err("no time to refill");
    assert_eq!(limiter.get(), rates);
}

#[test]
fn a_limit_that_does_not_change_is_not_filled_up() {
    let (limiter, _time) = limiter("ops_size=5".parse().expect("rates"));
    let mut worker = Worker::new(&limiter);
    worker.waiting.extend([1; 20]);
    assert_eq!(worker.turn(&limiter, 0, 0).len(), 5);
    limiter.set(limiter.get().with("bw_size=1T").expect("rates")).expect("good rates");
    assert_eq!(worker.turn(&limiter, 0, 0).len(), 0);
}

#[test]
fn a_worker_that_goes_or_has_nothing_left_keeps_nobody_waiting() {
    let (limiter, time) = limiter("ops_size=1".parse().expect("rates"));
    let mut workers: Vec<Worker> = (0..3).map(|_| Worker::new(&limiter)).collect();
    for worker in &mut workers {
        worker.waiting.extend([1; 5]);
        worker.turn(&limiter, 0, 0);
    }
    // The first has the token, and stands at the front because nobody else was there.
    assert!(workers[1].alarm.is_none() && workers[2].alarm.is_none());
    drop(workers.remove(0));
    assert!(workers[0].woken.load(Ordering::Relaxed));
    workers[0].turn(&limiter, 0, 0);
    assert_eq!(workers[0].alarm, Some(SECOND));
    // Its ring is stopped meanwhile.
    workers[0].waiting.clear();
    workers[0].woken.store(true, Ordering::Relaxed);
    time.store(SECOND, Ordering::Relaxed);
    workers[0].turn(&limiter, SECOND, 0);
    assert!(!workers[0].seat.waits());
    assert_eq!(workers[1].turn(&limiter, SECOND, 0).len(), 1);
    // The place that became free is given to the next.
    let seat = limiter.seat(Arc::new(|| {}));
    assert_eq!(seat.number, 0);
}

#[test]
fn without_limits_nobody_asks() {
    let (limiter, _time) = limiter(RateLimits::default());
    let mut worker = Worker::new(&limiter);
    assert!(worker.seat.is_free());
    limiter.set("ops_size=1".parse().expect("rates")).expect("good rates");
    assert!(!worker.seat.is_free());
    worker.waiting.extend([1; 2]);
    worker.turn(&limiter, 0, 0);
    limiter.set(RateLimits::default()).expect("good rates");
    assert!(!worker.seat.is_free(), "it must leave the line first");
    worker.turn(&limiter, 0, 0);
    assert!(worker.seat.is_free());
}
