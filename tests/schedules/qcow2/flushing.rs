//! Whose turn it is to flush.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use shuttle::future::block_on;
use shuttle::thread;

use crate::flush_gate::{FlushGate, Role};
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// A disk that counts its changes.
#[derive(Default)]
struct Disk {
    gate: FlushGate,
    changes: AtomicU64,
    durable: AtomicU64,
    flushing: AtomicBool,
}

impl Disk {
    fn flush(&self) {
        let ticket = self.gate.ticket();
        let Role::Lead(lead) = block_on(self.gate.role(ticket)) else { return };
        assert!(!self.flushing.swap(true, Ordering::SeqCst), "two flushes at once");
        let copied = self.changes.load(Ordering::SeqCst);
        self.durable.store(copied, Ordering::SeqCst);
        self.flushing.store(false, Ordering::SeqCst);
        lead.finish();
    }

    fn change_and_flush(&self) {
        let own = self.changes.fetch_add(1, Ordering::SeqCst) + 1;
        self.flush();
        let durable = self.durable.load(Ordering::SeqCst);
        assert!(durable >= own, "change {own} was flushed, but {durable} are durable");
    }
}

/// Three threads change the disk and flush it, twice each.
///
/// # Panics
/// When a flush returns that does not cover what came before its call, or two run at once.
pub fn a_flush_covers_what_came_before_its_call() {
    let disk = Disk::default();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                disk.change_and_flush();
                disk.change_and_flush();
            });
        }
    });
}

/// Two threads flush while others give up: waiting, about to flush, or with the right to do so in
/// their hands.
///
/// # Panics
/// As [`a_flush_covers_what_came_before_its_call`], or when one waits for ever.
pub fn a_flush_given_up_lets_the_next_begin() {
    let disk = Disk::default();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| disk.change_and_flush());
        }
        for polls in 1..=2 {
            let gate = &disk.gate;
            scope.spawn(move || {
                let mut role = pin!(gate.role(gate.ticket()));
                let mut left = polls;
                block_on(poll_fn(|context| {
                    let role = role.as_mut().poll(context);
                    left -= 1;
                    if left == 0 || role.is_ready() { Poll::Ready(()) } else { Poll::Pending }
                }));
            });
        }
    });
}
