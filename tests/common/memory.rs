#![expect(unsafe_code, reason = "an allocator that counts can only be written with unsafe code")]
//! An allocator that counts: how much memory a hostile image makes us take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes in use and the most there were, of this thread.
    static USED: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator with a count for each thread.
pub struct Counting;

fn count(bytes: usize, sign: isize) {
    let bytes = isize::try_from(bytes).unwrap_or(isize::MAX);
    // A thread that is ending has no counter any more.
    let _ = USED.try_with(|used| {
        let (now, most) = used.get();
        let now = now + sign * bytes;
        used.set((now, most.max(now)));
    });
}

// SAFETY: every call is handed to the system's allocator as it is, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: as above.
        unsafe { System.dealloc(address, layout) }
    }
}

/// Runs `work` and returns the most bytes that this thread had in use above what it began with.
pub fn peak<R>(work: impl FnOnce() -> R) -> (R, u64) {
    let before = USED.get().0;
    USED.set((before, before));
    let result = work();
    let most = USED.get().1 - before;
    (result, u64::try_from(most).unwrap_or(0))
}
