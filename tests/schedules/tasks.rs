//! Tasks, their wakers on other threads, and the sleep of their owner.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use shuttle::sync::Condvar;
use shuttle::thread;

use crate::exec::TaskSet;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// What a worker sleeps on: an eventfd, which remembers that it was written to.
#[derive(Default)]
struct Event {
    written: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn write(&self) {
        *lock(&self.written) = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut written = lock(&self.written);
        while !std::mem::take(&mut *written) {
            written = self.changed.wait(written).expect("nobody panics with the lock");
        }
    }
}

/// A number of things that have arrived, and who waits for the next.
#[derive(Default)]
struct Letterbox(Mutex<(u32, Option<Waker>)>);

impl Letterbox {
    fn post(&self) {
        let waker = {
            let mut state = lock(&self.0);
            state.0 += 1;
            state.1.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    async fn take(&self) {
        std::future::poll_fn(|context| {
            let mut state = lock(&self.0);
            if state.0 > 0 {
                state.0 -= 1;
                return Poll::Ready(());
            }
            state.1 = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Polls and sleeps as a worker does, until every task has ended.
fn work(tasks: &mut TaskSet<Task>, event: &Event) {
    while !tasks.is_idle() {
        if tasks.run_ready() > 0 {
            continue;
        }
        tasks.ready().park();
        if !tasks.has_ready() {
            event.wait();
        }
        tasks.ready().unparked();
    }
}

fn task_set(slots: usize) -> (TaskSet<Task>, Arc<Event>) {
    let event = Arc::new(Event::default());
    let write = Arc::clone(&event);
    (TaskSet::new(slots, move || write.write()), event)
}

/// Two threads wake two tasks, each twice, while the owner falls asleep and wakes up.
///
/// # Panics
/// When a task is left asleep.
pub fn a_wake_is_never_lost() {
    let (mut tasks, event) = task_set(2);
    let boxes = [Arc::new(Letterbox::default()), Arc::new(Letterbox::default())];
    let ended = Arc::new(AtomicU64::new(0));
    for letters in &boxes {
        let (letters, ended) = (Arc::clone(letters), Arc::clone(&ended));
        tasks.spawn(Box::pin(async move {
            letters.take().await;
            letters.take().await;
            ended.fetch_add(1, Ordering::SeqCst);
        }));
    }
    let post = |letters: Arc<Letterbox>| {
        thread::spawn(move || {
            letters.post();
            letters.post();
        })
    };
    let threads = boxes.map(post);
    work(&mut tasks, &event);
    for thread in threads {
        thread.join().expect("a thread that posts");
    }
    assert_eq!(ended.load(Ordering::SeqCst), 2);
}

/// A waker outlives its task and wakes whoever has the slot now: that task is polled once more than
/// it needs, and neither ends early nor misses its own wake.
///
/// # Panics
/// When one of the tasks does not run to its end.
pub fn a_late_wake_finds_another_task() {
    let (mut tasks, event) = task_set(1);
    let (first, second) = (Arc::new(Letterbox::default()), Arc::new(Letterbox::default()));
    let stale = Arc::new(Mutex::new(None));
    let (letters, keep) = (Arc::clone(&first), Arc::clone(&stale));
    tasks.spawn(Box::pin(async move {
        std::future::poll_fn(|context| {
            *lock(&keep) = Some(context.waker().clone());
            Poll::Ready(())
        })
        .await;
        letters.take().await;
    }));
    let posting = Arc::clone(&first);
    let one = thread::spawn(move || posting.post());
    work(&mut tasks, &event);
    let letters = Arc::clone(&second);
    tasks.spawn(Box::pin(async move { letters.take().await }));
    let late = lock(&stale).take().expect("the first task has run");
    let two = thread::spawn(move || late.wake());
    let three = thread::spawn(move || second.post());
    work(&mut tasks, &event);
    for thread in [one, two, three] {
        thread.join().expect("a thread that wakes");
    }
}
