//! SIGINT, SIGTERM and SIGHUP ask a verb to end; what it has begun is its own to tidy up. A second
//! one ends the program at once.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering};

/// Whether somebody wants the program to end.
#[derive(Debug)]
pub(super) struct Interrupts(Arc<AtomicUsize>);

impl Interrupts {
    /// Looks for signals from now on.
    ///
    /// # Errors
    /// When the kernel does not let us.
    pub(super) fn watch() -> Result<Self> {
        let (first, again) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let number = usize::try_from(signal).expect("signals have small numbers");
            // In this order: the first signal finds that it is not the second one.
            let registered = flag::register_conditional_default(signal, Arc::clone(&again))
                .and_then(|_| flag::register(signal, Arc::clone(&again)))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&first), number));
            registered.map_err(|error| Error::io("watching for signals", error))?;
        }
        Ok(Self(first))
    }

    /// The exit status of a program that a signal has ended, once one has come.
    pub(super) fn status(&self) -> Option<u8> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => u8::try_from(128 + signal).ok(),
        }
    }
}
