//! How long a front-end that does not go on is borne with.
//!
//! Anybody who may connect can stop in the middle of a message, say nothing at all, or never read
//! an answer, and none of that may keep the next one from its disk. A front-end that has attached
//! itself (it has said SET_OWNER, or a ring of it was served) is another matter: a paused guest or
//! the destination of a migration may be silent for hours, and is never given up for that. Neither
//! is one whose rings are served, whatever its socket looks like.

use std::time::{Duration, Instant};

/// When a front-end is given up, and when the service ends by itself.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How long the rest of a message may take that has begun, or the reading of answers.
    pub message: Duration,
    /// How long the next message of a front-end may take that has not attached itself.
    pub handshake: Duration,
    /// End when a front-end that was attached has gone, and no other one is.
    pub until_disconnect: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            message: Duration::from_secs(5),
            handshake: Duration::from_secs(30),
            until_disconnect: false,
        }
    }
}

/// What is known of a front-end when its clock is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct State {
    /// Messages served so far.
    pub(super) messages: u64,
    /// A message has begun and is not whole, or answers are not read.
    pub(super) is_midway: bool,
    /// It has attached itself.
    pub(super) is_attached: bool,
    /// A ring is served.
    pub(super) is_serving: bool,
}

/// The time since a front-end has last done something.
#[derive(Debug)]
pub(super) struct Clock {
    state: State,
    /// When the last message was served, or the front-end connected.
    message: Instant,
    /// Since when it is in the middle of something.
    midway: Option<Instant>,
}

impl Clock {
    pub(super) fn start(now: Instant) -> Self {
        Self { state: State::default(), message: now, midway: None }
    }

    /// Takes a look at the front-end.
    pub(super) fn look(&mut self, state: State, now: Instant) {
        if state.messages != self.state.messages {
            (self.message, self.midway) = (now, None);
        }
        self.midway = state.is_midway.then(|| self.midway.unwrap_or(now));
        self.state = state;
    }

    /// When the front-end is given up if it goes on like this, and why.
    pub(super) fn deadline(&self, terms: &Terms) -> Option<(Instant, &'static str)> {
        if self.state.is_serving {
            return None;
        }
        let midway =
            || Some((self.midway? + terms.message, "it stopped in the middle of a message"));
        let silent = (!self.state.is_attached)
            .then(|| (self.message + terms.handshake, "it did not go on with its handshake"));
        match (midway(), silent) {
            (Some(midway), Some(silent)) => Some(midway.min(silent)),
            (midway, silent) => midway.or(silent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn wait(state: State) -> Option<u64> {
        let (terms, start) = (Terms::default(), Instant::now());
        let mut clock = Clock::start(start);
        clock.look(State { is_midway: false, ..state }, start);
        clock.look(state, start + SECOND);
        // More bytes of the same message are no progress.
        clock.look(state, start + 2 * SECOND);
        clock.deadline(&terms).map(|(when, _)| (when - start).as_secs())
    }

    #[test]
    fn only_who_has_not_attached_itself_must_go_on_and_who_is_served_must_nothing() {
        let state = State { messages: 3, ..State::default() };
        assert_eq!(wait(state), Some(30));
        assert_eq!(wait(State { is_midway: true, ..state }), Some(6));
        assert_eq!(wait(State { is_attached: true, ..state }), None);
        assert_eq!(wait(State { is_attached: true, is_midway: true, ..state }), Some(6));
        let served = State { is_attached: true, is_serving: true, ..state };
        assert_eq!(wait(served), None);
        assert_eq!(wait(State { is_midway: true, ..served }), None);
    }

    #[test]
    fn each_message_starts_the_clock_anew() {
        let (terms, start) = (Terms::default(), Instant::now());
        let mut clock = Clock::start(start);
        for number in 1..=10u32 {
            let state = State { messages: number.into(), is_midway: true, ..State::default() };
            clock.look(state, start + number * 4 * SECOND);
        }
        let (deadline, _) = clock.deadline(&terms).expect("a deadline");
        assert_eq!((deadline - start).as_secs(), 45);
    }
}
