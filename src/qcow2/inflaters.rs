//! Threads that inflate clusters beside the workers.
//!
//! Inflating a cluster takes as long as answering some hundred requests that find everything in
//! memory. A worker that does it itself keeps all of its rings waiting meanwhile, and inflates one
//! cluster after the other while other processors idle. So it goes on, and is woken when a thread
//! has done it. A cluster that nobody else waits behind is an exception: handing it over and being
//! woken would only make its reader wait longer.
//!
//! Threads are started when there is work for them, on the processors of the worker that has it.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::mem;
use std::sync::Condvar;
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};

use crate::error::Result;
use crate::exec::yield_now;
use crate::qcow2::compress::inflate;
use crate::qcow2::format::Compressed;
use crate::qcow2::header::Compression;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering, lock};

/// Larger clusters are handed over even if they are alone: nobody knows what comes next, and it
/// would wait for milliseconds.
const MOST_INLINE: usize = 128 << 10;

/// One compressed cluster.
#[derive(Debug)]
pub(crate) struct Packed {
    /// How it is compressed.
    pub(crate) kind: Compression,
    /// Where it lies, for errors.
    pub(crate) place: Compressed,
    /// What lies there.
    pub(crate) source: Vec<u8>,
    /// Bytes of the cluster.
    pub(crate) size: usize,
}

impl Packed {
    fn inflate(&self) -> Result<Vec<u8>> {
        inflate(self.kind, self.place, &self.source, self.size)
    }
}

/// What becomes of a cluster that was handed over.
enum Answer {
    /// Nothing yet; whom to wake.
    Awaited(Option<Waker>),
    /// It was inflated, or could not be.
    Done(Result<Vec<u8>>),
    /// Its thread has died.
    Lost,
}

/// A cluster on its way through a thread.
struct Job {
    packed: Packed,
    answer: Arc<Mutex<Answer>>,
}

impl Job {
    /// Answers, unless that was done.
    fn answer(&self, with: Answer) {
        let mut answer = lock(&self.answer);
        let Answer::Awaited(waker) = &mut *answer else { return };
        let waker = waker.take();
        *answer = with;
        drop(answer);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.answer(Answer::Lost);
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

impl Shared {
    /// A thread's life. It was counted as idle when it was started.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.idle -= 1;
                drop(queue);
                job.answer(Answer::Done(job.packed.inflate()));
                drop(job);
                queue = lock(&self.queue);
                queue.idle += 1;
            } else if queue.closed {
                return;
            } else {
                queue = self.work.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
    }
}

/// A bounded set of threads, for all layers of a disk and all workers.
pub(crate) struct Inflaters {
    shared: Arc<Shared>,
    most: usize,
    /// Clusters that somebody waits for.
    awaited: AtomicUsize,
}

impl fmt::Debug for Inflaters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Inflaters(at most {} threads)", self.most)
    }
}

impl Inflaters {
    /// At most so many threads, none of which runs yet. With none, all is done by the caller.
    pub(crate) fn new(most: usize) -> Self {
        Self { shared: Arc::default(), most, awaited: AtomicUsize::new(0) }
    }

    /// The bytes of a cluster.
    ///
    /// # Errors
    /// `Corrupt` when the data does not give exactly one cluster.
    ///
    /// # Panics
    /// When the thread that had it has panicked.
    pub(crate) async fn inflate(&self, packed: Packed) -> Result<Vec<u8>> {
        if self.most == 0 {
            return packed.inflate();
        }
        let _counted = Counted::new(&self.awaited);
        if packed.size <= MOST_INLINE {
            // Whoever came at the same time gets here meanwhile.
            yield_now().await;
            if self.awaited.load(Ordering::Relaxed) == 1 {
                return packed.inflate();
            }
        }
        let answer = Arc::new(Mutex::new(Answer::Awaited(None)));
        let job = Job { packed, answer: Arc::clone(&answer) };
        if let Err(job) = self.hand_over(job) {
            return job.packed.inflate();
        }
        poll_fn(|context| poll(&answer, context)).await
    }

    /// Gives a job to the threads; back to the caller when there is none and none can be started.
    fn hand_over(&self, job: Job) -> Result<(), Job> {
        let mut queue = lock(&self.shared.queue);
        if queue.idle <= queue.jobs.len() && queue.threads.len() < self.most {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name("inflate".to_owned());
            match thread.spawn(move || shared.serve()) {
                Ok(thread) => {
                    queue.threads.push(thread);
                    queue.idle += 1;
                }
                Err(_) if queue.threads.is_empty() => return Err(job),
                Err(_) => {}
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.shared.work.notify_one();
        Ok(())
    }
}

fn poll(answer: &Mutex<Answer>, context: &Context<'_>) -> Poll<Result<Vec<u8>>> {
    let mut answer = lock(answer);
    match &mut *answer {
        Answer::Awaited(waker) => {
            *waker = Some(context.waker().clone());
            Poll::Pending
        }
        done => match mem::replace(done, Answer::Lost) {
            Answer::Done(result) => Poll::Ready(result),
            _ => panic!("a thread that inflates has died"),
        },
    }
}

impl Drop for Inflaters {
    fn drop(&mut self) {
        let threads = {
            let mut queue = lock(&self.shared.queue);
            queue.closed = true;
            mem::take(&mut queue.threads)
        };
        self.shared.work.notify_all();
        for thread in threads {
            // A thread that panicked has told so itself.
            let _ = thread.join();
        }
    }
}

/// One more, as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::HostOffset;
    use crate::exec::block_on;
    use crate::qcow2::compress::deflate;

    fn packed(kind: Compression, byte: u8, size: usize) -> Packed {
        let mut source = deflate(kind, &vec![byte; size]).expect("it repeats itself");
        source.extend([0x55; 100]);
        Packed { kind, place: Compressed { at: HostOffset(512), bytes: 512 }, source, size }
    }

    fn threads(inflaters: &Inflaters) -> usize {
        lock(&inflaters.shared.queue).threads.len()
    }

    /// Polls all of `futures` until each has its answer.
    fn all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
        let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
        let mut answers: Vec<Option<T>> = futures.iter().map(|_| None).collect();
        let everything = poll_fn(|context| {
            for (future, answer) in futures.iter_mut().zip(&mut answers) {
                if answer.is_none()
                    && let Poll::Ready(output) = future.as_mut().poll(context)
                {
                    *answer = Some(output);
                }
            }
            if answers.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
        });
        block_on(everything, || false);
        answers.into_iter().flatten().collect()
    }

    #[test]
    fn what_comes_together_is_inflated_by_threads() {
        for kind in [Compression::Zlib, Compression::Zstd] {
            let inflaters = Inflaters::new(3);
            for round in 0..20 {
                let wanted = (0..50).map(|byte| packed(kind, byte, 1 << 16));
                let answers = all(wanted.map(|packed| inflaters.inflate(packed)).collect());
                for (byte, answer) in answers.into_iter().enumerate() {
                    let cluster = answer.unwrap_or_else(|error| panic!("round {round}: {error}"));
                    assert!(cluster == vec![byte as u8; 1 << 16], "round {round}");
                }
            }
            assert!((1..=3).contains(&threads(&inflaters)));
            assert_eq!(inflaters.awaited.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn a_cluster_that_is_alone_needs_no_thread_unless_it_is_large() {
        let inflaters = Inflaters::new(2);
        for _ in 0..5 {
            let small = inflaters.inflate(packed(Compression::Zlib, 1, MOST_INLINE));
            assert_eq!(block_on(small, || false).expect("inflates"), vec![1; MOST_INLINE]);
        }
        assert_eq!(threads(&inflaters), 0);
        let large = inflaters.inflate(packed(Compression::Zlib, 2, 2 * MOST_INLINE));
        assert_eq!(block_on(large, || false).expect("inflates"), vec![2; 2 * MOST_INLINE]);
        assert_eq!(threads(&inflaters), 1);
        let none = Inflaters::new(0);
        let large = none.inflate(packed(Compression::Zstd, 3, 2 * MOST_INLINE));
        assert_eq!(block_on(large, || false).expect("inflates"), vec![3; 2 * MOST_INLINE]);
    }

    #[test]
    fn garbage_is_an_error_and_its_thread_goes_on() {
        let inflaters = Inflaters::new(1);
        for _ in 0..3 {
            let mut wanted: Vec<_> =
                (0..8).map(|byte| packed(Compression::Zlib, byte, 4096)).collect();
            wanted[3].source = vec![0xff; 512];
            let answers = all(wanted.into_iter().map(|one| inflaters.inflate(one)).collect());
            let failed: Vec<bool> = answers.iter().map(Result::is_err).collect();
            assert_eq!(failed, [false, false, false, true, false, false, false, false]);
        }
    }

    #[test]
    fn who_gives_up_leaves_the_others_alone() {
        let inflaters = Inflaters::new(1);
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..20 {
            let mut gone = Box::pin(inflaters.inflate(packed(Compression::Zlib, 1, 1 << 18)));
            // The thread may have been faster than we.
            let _ = gone.as_mut().poll(&mut context);
            drop(gone);
        }
        let answer = block_on(inflaters.inflate(packed(Compression::Zlib, 2, 1 << 18)), || false);
        assert_eq!(answer.expect("inflates"), vec![2; 1 << 18]);
    }

    #[test]
    #[should_panic(expected = "has died")]
    fn a_job_that_is_lost_is_noticed() {
        let answer = Arc::new(Mutex::new(Answer::Awaited(None)));
        let job = Job { packed: packed(Compression::Zlib, 1, 4096), answer: Arc::clone(&answer) };
        drop(job);
        block_on(poll_fn(|context| poll(&answer, context)), || false).expect("nothing");
    }
}
