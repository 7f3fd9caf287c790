//! Rate limits of a device: token buckets for bytes and for requests.
//!
//! A request is charged when it is taken from its ring, and never held back afterwards: while
//! there is no token, no more are taken. Every request costs one operation; reads and writes cost
//! their bytes too, flushes, discards and write-zeroes none. How long a request is shows only once
//! it was taken, so one token lets a request of any length through and its bucket goes into debt:
//! over any time `t` no more than `size + burst + rate * t` and one request's bytes pass, over a
//! long time no more than `rate * t`, and a request that is larger than the bucket passes too.
//!
//! Workers that have run out stand in line. The first of them sleeps until there is a token, takes
//! what it can and goes to the end of the line; the others sleep until it is their turn.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use crate::blk::bucket::Bucket;
use crate::blk::rates::RateLimits;
use crate::blk::request::Action;
use crate::error::Result;
use crate::sync::{Arc, AtomicBool, Mutex, MutexGuard, Ordering, lock};

/// Ends the sleep of one worker; may be called on any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Tells nanoseconds since some moment.
type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

/// The limits of a device, shared by all of its workers.
pub struct Limiter {
    /// Whether there are any. Workers look at nothing else while there are none.
    limited: AtomicBool,
    clock: Clock,
    state: Mutex<State>,
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Limiter({})", self.get())
    }
}

#[derive(Default)]
struct State {
    rates: RateLimits,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// Whom to wake, by the number of their seat.
    wakes: Vec<Option<Wake>>,
    /// Who waits for tokens, in order.
    line: VecDeque<usize>,
}

impl State {
    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.bytes.iter_mut().chain(&mut self.operations)
    }

    fn refill(&mut self, now: u64) {
        self.buckets().for_each(|bucket| bucket.refill(now));
    }

    fn has_token(&self) -> bool {
        self.bytes.iter().chain(&self.operations).all(Bucket::has_token)
    }

    fn wait(&self) -> u64 {
        self.bytes.iter().chain(&self.operations).map(Bucket::wait).max().unwrap_or(0)
    }

    fn leave(&mut self, seat: usize) {
        self.line.retain(|other| *other != seat);
    }

    /// Who is to be woken because it is their turn now, unless that is `seat` itself.
    fn next(&self, seat: usize) -> Option<Wake> {
        let first = self.line.front().filter(|first| **first != seat)?;
        self.wakes.get(*first).cloned().flatten()
    }
}

impl Default for Limiter {
    fn default() -> Self {
        let start = Instant::now();
        let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Self::with_clock(clock)
    }
}

impl Limiter {
    /// A limiter without limits.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A limiter whose time is `clock`, in nanoseconds since any moment.
    pub fn with_clock(clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let (limited, state) = (AtomicBool::new(false), Mutex::default());
        Self { limited, clock: Box::new(clock), state }
    }

    /// The rates in force.
    pub fn get(&self) -> RateLimits {
        lock(&self.state).rates
    }

    /// Puts other rates in force, at once. A limit that changes begins with a full bucket; one that
    /// does not goes on as it is.
    ///
    /// # Errors
    /// When they contradict themselves; the old ones stay.
    pub fn set(&self, rates: RateLimits) -> Result<()> {
        let rates = rates.check()?;
        let now = (self.clock)();
        let mut state = lock(&self.state);
        let old = std::mem::replace(&mut state.rates, rates);
        let bytes = |r: &RateLimits| (r.bw_size, r.bw_refill_time, r.bw_one_time_burst);
        let operations = |r: &RateLimits| (r.ops_size, r.ops_refill_time, r.ops_one_time_burst);
        let make = |(size, refill_ms, burst): (u64, u64, u64)| {
            (size != 0).then(|| Bucket::new(size, refill_ms, burst, now))
        };
        if bytes(&old) != bytes(&rates) {
            state.bytes = make(bytes(&rates));
        }
        if operations(&old) != operations(&rates) {
            state.operations = make(operations(&rates));
        }
        self.limited.store(rates.any(), Ordering::Relaxed);
        // Whoever sleeps has been told a time that is right no longer.
        let wakes: Vec<Wake> = state.wakes.iter().flatten().cloned().collect();
        drop(state);
        wakes.iter().for_each(|wake| wake());
        Ok(())
    }

    /// A place in line for one worker.
    pub fn seat(self: &Arc<Self>, wake: Wake) -> Seat {
        let mut state = lock(&self.state);
        let free = state.wakes.iter().position(Option::is_none);
        let number = free.unwrap_or(state.wakes.len());
        if free.is_none() {
            state.wakes.push(None);
        }
        state.wakes[number] = Some(wake);
        Seat { limiter: Arc::clone(self), number, waits: false }
    }
}

/// One worker's place.
pub struct Seat {
    limiter: Arc<Limiter>,
    number: usize,
    /// Whether it stands in line.
    waits: bool,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seat({}, waits: {})", self.number, self.waits)
    }
}

impl Seat {
    /// Whether requests may be taken without asking.
    pub fn is_free(&self) -> bool {
        !self.waits && !self.limiter.limited.load(Ordering::Relaxed)
    }

    /// Whether it waits for tokens, or for its turn.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// The limiter, for as long as requests are taken.
    pub fn limiter(&self) -> Arc<Limiter> {
        Arc::clone(&self.limiter)
    }

    /// Asks for admission; `None` when there are no tokens or others come first. Then, and after
    /// an admission, [`Seat::settle`] must say whether this worker has requests left.
    pub fn enter<'a>(&self, limiter: &'a Limiter) -> Option<Admission<'a>> {
        let mut state = lock(&limiter.state);
        state.refill((limiter.clock)());
        let turn = state.line.front().is_none_or(|first| *first == self.number);
        let open = state.has_token();
        (turn && open).then_some(Admission { state, open })
    }

    /// Says whether requests are left that could not be taken: then this worker stands in line.
    /// After an admission, `served`, it goes to the end.
    pub fn settle(&mut self, served: bool, left: bool) {
        let mut state = lock(&self.limiter.state);
        let leaves = self.waits && (served || !left);
        if leaves {
            state.leave(self.number);
        }
        if left && (served || !self.waits) {
            state.line.push_back(self.number);
        }
        self.waits = left;
        let next = if served || leaves { state.next(self.number) } else { None };
        drop(state);
        if let Some(wake) = next {
            wake();
        }
    }

    /// Nanoseconds until this worker should look again; `None` when somebody will wake it.
    pub fn wait(&self) -> Option<u64> {
        if !self.waits {
            return None;
        }
        let mut state = lock(&self.limiter.state);
        if state.line.front() != Some(&self.number) {
            return None;
        }
        state.refill((self.limiter.clock)());
        Some(state.wait())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = lock(&self.limiter.state);
        state.leave(self.number);
        state.wakes[self.number] = None;
        let next = state.next(self.number);
        drop(state);
        if let Some(wake) = next {
            wake();
        }
    }
}

/// The right to take requests as long as there are tokens. Nobody else takes any meanwhile.
pub struct Admission<'a> {
    state: MutexGuard<'a, State>,
    open: bool,
}

impl fmt::Debug for Admission<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Admission(open: {})", self.open)
    }
}

impl Admission<'_> {
    /// Whether one more request may be taken.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Pays for a request that was taken.
    pub fn charge(&mut self, action: &Action) {
        let bytes = match action {
            Action::Read { data, .. } | Action::Write { data, .. } => data.len(),
            _ => 0,
        };
        self.pay(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    fn pay(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.state.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.state.operations {
            bucket.take(1);
        }
        self.open = self.state.has_token();
    }
}

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
