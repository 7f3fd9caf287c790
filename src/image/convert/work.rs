//! The threads that do jobs, and the board on which they find them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Condvar;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::exec::TaskSet;
use crate::image::convert::copy::{Buffers, Copier};
use crate::image::convert::scan::Job;
use crate::image::convert::{MakeEngine, Options, Outcome};
use crate::storage::{Engine, Storage};
use crate::sync::{Mutex, lock};

/// How often the caller is asked whether to go on.
const WATCH: Duration = Duration::from_millis(20);
/// How long a thread sleeps whose tasks all wait for those of other threads, if nobody wakes it.
const NAP: Duration = Duration::from_millis(5);

type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// No more jobs come.
    closed: bool,
    /// Nobody needs to do what is not begun.
    stopped: bool,
    /// Bytes of the disk that are done.
    done: u64,
    failure: Option<Error>,
    /// Threads at work.
    threads: usize,
}

/// Where jobs are put up and taken down.
#[derive(Debug)]
pub(super) struct Board {
    state: Mutex<State>,
    /// There are jobs, or there will be none.
    filled: Condvar,
    /// There is room for jobs, or a thread has ended.
    taken: Condvar,
    threads: usize,
    /// Jobs that one thread works on at once.
    tasks: usize,
    room: usize,
}

impl Board {
    pub(super) fn new(options: &Options) -> Self {
        let parallel = options.parallel.max(1);
        let threads = options.threads.clamp(1, parallel);
        Self {
            state: Mutex::default(),
            filled: Condvar::new(),
            taken: Condvar::new(),
            threads,
            tasks: parallel.div_ceil(threads),
            room: 2 * parallel,
        }
    }

    /// Has everything done that `next` gives, until `watch` says no.
    pub(super) fn run(
        &self,
        copier: &Copier<'_>,
        make: &MakeEngine<'_>,
        next: &mut dyn FnMut() -> Result<Option<Job>>,
        watch: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Outcome> {
        lock(&self.state).threads = self.threads;
        thread::scope(|scope| {
            for lane in 1..=self.threads {
                let spawned = thread::Builder::new()
                    .name(format!("convert-{lane}"))
                    .spawn_scoped(scope, move || self.work(copier, make, lane));
                if let Err(error) = spawned {
                    lock(&self.state).threads -= 1;
                    self.fail(Error::io("cannot start a thread", error));
                }
            }
            self.hand_out(next, watch)
        });
        let state = &mut *lock(&self.state);
        match state.failure.take() {
            Some(error) => Err(error),
            None if state.stopped => Ok(Outcome::Stopped),
            None => Ok(Outcome::Complete),
        }
    }

    /// Puts jobs up until there are no more, and waits for the threads to end.
    fn hand_out(
        &self,
        next: &mut dyn FnMut() -> Result<Option<Job>>,
        watch: &mut dyn FnMut(u64) -> bool,
    ) {
        let mut asked = Instant::now();
        let mut more = true;
        loop {
            if asked.elapsed() >= WATCH {
                asked = Instant::now();
                let done = lock(&self.state).done;
                if !watch(done) {
                    self.stop();
                }
            }
            let mut state = lock(&self.state);
            if state.threads == 0 {
                return;
            }
            more &= !state.stopped;
            if !more || state.jobs.len() >= self.room {
                state.closed |= !more;
                self.filled.notify_all();
                drop(self.taken.wait_timeout(state, WATCH));
                continue;
            }
            drop(state);
            match next() {
                Ok(Some(job)) => {
                    lock(&self.state).jobs.push_back(job);
                    self.filled.notify_one();
                }
                Ok(None) => more = false,
                Err(error) => self.fail(error),
            }
        }
    }

    fn stop(&self) {
        let mut state = lock(&self.state);
        (state.stopped, state.closed) = (true, true);
        state.jobs.clear();
        drop(state);
        self.filled.notify_all();
    }

    fn fail(&self, error: Error) {
        lock(&self.state).failure.get_or_insert(error);
        self.stop();
    }

    fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Takes a job down. With `wait` there is none only when no more come.
    fn take(&self, wait: bool) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                if state.jobs.len() < self.room / 2 {
                    self.taken.notify_one();
                }
                return Some(job);
            }
            if !wait || state.closed {
                return None;
            }
            let woken = self.filled.wait(state);
            state = woken.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// The life of one thread.
    fn work(&self, copier: &Copier<'_>, make: &MakeEngine<'_>, lane: usize) {
        let _leave = Leave(self);
        match make(lane) {
            Ok(engine) => self.drive(copier, &*engine),
            Err(error) => self.fail(error),
        }
    }

    fn drive(&self, copier: &Copier<'_>, engine: &dyn Engine) {
        let (st, buffers): (&dyn Storage, _) = (engine, copier.buffers());
        let this = thread::current();
        let mut tasks: TaskSet<Task<'_>> = TaskSet::new(self.tasks, move || this.unpark());
        loop {
            // One at a time: the other threads want some too.
            if tasks.has_room()
                && let Some(job) = self.take(tasks.is_idle())
            {
                tasks.spawn(Box::pin(self.task(copier, st, &buffers, job)));
            } else if tasks.is_idle() {
                return;
            } else if !tasks.has_ready() {
                self.sleep(&tasks, engine);
            }
            tasks.run_ready();
            if let Err(error) = engine.submit_all() {
                self.fail(Error::io("handing requests to the kernel", error));
            }
            engine.reap();
        }
    }

    fn sleep(&self, tasks: &TaskSet<Task<'_>>, engine: &dyn Engine) {
        if engine.is_busy() {
            if let Err(error) = engine.wait() {
                self.fail(Error::io("waiting for requests", error));
            }
            return;
        }
        tasks.ready().park();
        if !tasks.ready().any() {
            thread::park_timeout(NAP);
        }
        tasks.ready().unparked();
    }

    async fn task(&self, copier: &Copier<'_>, st: &dyn Storage, buffers: &Buffers, job: Job) {
        let done = copier.run(st, buffers, &job, &|| self.is_stopped()).await;
        match done {
            Ok(()) => lock(&self.state).done += job.covers,
            Err(error) => self.fail(error),
        }
    }
}

/// Says that a thread has ended, however it does.
struct Leave<'a>(&'a Board);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).threads -= 1;
        if thread::panicking() {
            self.0.stop();
        }
        self.0.taken.notify_one();
    }
}
