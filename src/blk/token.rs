//! The right to answer one request, and the duty to.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use crate::storage::Buf;

/// The last byte of a request: how it went (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Ok = 0,
    /// It was not done.
    IoError = 1,
    /// The device does not know such requests.
    Unsupported = 2,
}

/// A chain that is done with: an entry for the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The index of the chain's first descriptor.
    pub head: u16,
    /// Bytes written to the chain's writable part.
    pub len: u32,
}

/// The chains of one queue that are done with and wait for the used ring.
#[derive(Default)]
pub struct Completions {
    list: RefCell<Vec<Used>>,
    under_way: Cell<usize>,
    /// By first descriptor, when the request began, plus one; 0 when none is under way.
    began: RefCell<Vec<u64>>,
    abandoned: Cell<bool>,
}

impl fmt::Debug for Completions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Completions({} under way)", self.under_way.get())
    }
}

impl Completions {
    /// How many requests have a token that is not completed.
    pub fn under_way(&self) -> usize {
        self.under_way.get()
    }

    /// When the oldest request that is under way began, on the clock of [`Token::begin`].
    pub fn oldest(&self) -> Option<u64> {
        let began = self.began.borrow();
        began.iter().filter(|time| **time != 0).min().map(|time| time - 1)
    }

    /// Moves what is done with to the end of `target`.
    pub fn take(&self, target: &mut Vec<Used>) {
        target.append(&mut self.list.borrow_mut());
    }

    /// Whether nothing waits for the used ring.
    pub fn is_empty(&self) -> bool {
        self.list.borrow().is_empty()
    }

    /// Says that nobody will look here any more: the worker goes, with whatever is under way.
    pub fn abandon(&self) {
        self.abandoned.set(true);
    }
}

/// One request's place in its queue. It must be completed: a guest waits for every chain that it
/// made available, for ever.
#[must_use = "the guest waits for the answer"]
pub struct Token {
    to: Rc<Completions>,
    status: Option<Buf>,
    used: Used,
    done: bool,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:?})", self.used)
    }
}

impl Token {
    /// A token for a chain; `status` is its status byte, if it has one.
    pub fn new(to: &Rc<Completions>, used: Used, status: Option<Buf>) -> Self {
        to.under_way.set(to.under_way.get() + 1);
        Self { to: Rc::clone(to), status, used, done: false }
    }

    /// Remembers when the request began, on any clock of the caller's.
    pub fn begin(&self, time: u64) {
        let mut began = self.to.began.borrow_mut();
        let place = usize::from(self.used.head);
        if began.len() <= place {
            // It grows to the size of the ring and no further.
            began.resize(place + 1, 0);
        }
        began[place] = time.saturating_add(1);
    }

    /// Answers the request: the status byte now, the used ring when the worker publishes.
    pub fn complete(mut self, status: Status) {
        self.finish(status);
    }

    fn finish(&mut self, status: Status) {
        self.done = true;
        if let Some(byte) = &self.status {
            byte.copy_from(0, &[status as u8]);
        }
        self.to.list.borrow_mut().push(self.used);
        self.to.under_way.set(self.to.under_way.get() - 1);
        if let Some(began) = self.to.began.borrow_mut().get_mut(usize::from(self.used.head)) {
            *began = 0;
        }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if self.done || self.to.abandoned.get() {
            return;
        }
        self.finish(Status::IoError);
        if cfg!(debug_assertions) && !std::thread::panicking() {
            panic!("the request at descriptor {} was lost", self.used.head);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USED: Used = Used { head: 3, len: 513 };

    #[test]
    fn completing_writes_the_status_and_queues_the_chain() {
        let completions = Rc::new(Completions::default());
        let byte = Buf::copy_of(&[0xff]);
        let token = Token::new(&completions, USED, Some(byte.clone()));
        assert_eq!((completions.under_way(), completions.is_empty()), (1, true));
        token.complete(Status::Unsupported);
        assert_eq!(byte.to_vec(), [2]);
        let mut list = Vec::new();
        completions.take(&mut list);
        assert_eq!((list.as_slice(), completions.under_way()), (&[USED][..], 0));
    }

    #[test]
    fn the_oldest_request_under_way_is_known() {
        let completions = Rc::new(Completions::default());
        assert_eq!(completions.oldest(), None);
        let tokens = [(4, 30), (0, 10), (9, 20)].map(|(head, time)| {
            let token = Token::new(&completions, Used { head, len: 0 }, None);
            token.begin(time);
            token
        });
        let [late, early, middle] = tokens;
        assert_eq!(completions.oldest(), Some(10));
        early.complete(Status::Ok);
        assert_eq!(completions.oldest(), Some(20));
        middle.complete(Status::Ok);
        late.complete(Status::Ok);
        assert_eq!(completions.oldest(), None);
    }

    #[test]
    #[cfg_attr(debug_assertions, should_panic(expected = "was lost"))]
    fn a_lost_request_is_noticed() {
        let completions = Rc::new(Completions::default());
        drop(Token::new(&completions, USED, None));
        assert!(!completions.is_empty(), "the guest gets an answer all the same");
    }

    #[test]
    fn a_worker_that_goes_takes_its_requests_along() {
        let completions = Rc::new(Completions::default());
        let token = Token::new(&completions, USED, None);
        completions.abandon();
        drop(token);
        assert!(completions.is_empty());
    }
}
