//! Long pieces of work tell how far they are, and ask whether to go on.

/// Told how many bytes of how many are done, every few milliseconds; says whether to go on.
pub type Watch<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Told how many bytes of how many are done, of work that is not to be stopped.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Whether everything was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was.
    Complete,
    /// The caller wanted to stop before.
    Stopped,
}
