#![expect(unsafe_code, reason = "guest and owned memory are reached through raw addresses")]
//! Buffers as lists of address ranges with a handle on the memory they lie in.
//!
//! A [`Buf`] is cheap to clone and to cut, whether its memory is the guest's or ours. Its bytes are
//! like a guest's memory: somebody else (the guest, the kernel) may change them at any time, so
//! they are only ever copied in and out, never borrowed.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::rc::Rc;

use smallvec::SmallVec;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The alignment of owned memory in bytes: enough for O_DIRECT on every device known.
pub const OWNED_ALIGNMENT: usize = 4096;

/// A run of bytes at one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    address: *mut u8,
    len: usize,
}

impl Segment {
    /// The address of the first byte; valid as long as the buffer it came from lives.
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Length in bytes; never zero.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty, which it never is inside a [`Buf`].
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A list of byte runs and what keeps their memory alive.
pub struct Buf {
    segments: SmallVec<[Segment; 4]>,
    len: usize,
    keep: SmallVec<[Rc<dyn Any>; 1]>,
}

impl Clone for Buf {
    // Every transfer has a copy; most hold on to one thing.
    fn clone(&self) -> Self {
        let keep = match &self.keep[..] {
            [one] => SmallVec::from_buf([Rc::clone(one)]),
            many => many.iter().cloned().collect(),
        };
        Self { segments: SmallVec::from_slice(&self.segments), len: self.len, keep }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes in {} segments)", self.len, self.segments.len())
    }
}

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "reached by address")] [u8; OWNED_ALIGNMENT]);

impl Buf {
    /// Zeroed memory of our own, aligned to [`OWNED_ALIGNMENT`].
    pub fn zeroed(len: usize) -> Self {
        let pages = len.div_ceil(OWNED_ALIGNMENT).max(1);
        let page = || UnsafeCell::new(Page([0; OWNED_ALIGNMENT]));
        let owned: Box<[_]> = std::iter::repeat_with(page).take(pages).collect();
        let address = owned.as_ptr().cast_mut().cast::<u8>();
        Self::new([Segment { address, len }].into_iter(), Rc::new(owned))
    }

    /// A copy of `bytes` in memory of our own.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let buf = Self::zeroed(bytes.len());
        buf.copy_from(0, bytes);
        buf
    }

    /// Guest memory; `keep` must keep the mapping that `slices` point into alive.
    pub fn guest<'a, B: BitmapSlice + 'a>(
        keep: Rc<dyn Any>,
        slices: impl Iterator<Item = VolatileSlice<'a, B>>,
    ) -> Self {
        let segment = |slice: VolatileSlice<'a, B>| Segment {
            address: slice.ptr_guard_mut().as_ptr(),
            len: slice.len(),
        };
        Self::new(slices.map(segment), keep)
    }

    fn new(segments: impl Iterator<Item = Segment>, keep: Rc<dyn Any>) -> Self {
        let segments: SmallVec<[Segment; 4]> = segments.filter(|part| part.len != 0).collect();
        let len = segments.iter().map(|part| part.len).sum();
        Self { segments, len, keep: SmallVec::from_buf([keep]) }
    }

    /// One buffer that is its parts one after the other; nothing is copied.
    pub fn concat(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut whole = Self { segments: SmallVec::new(), len: 0, keep: SmallVec::new() };
        for part in parts {
            whole.segments.extend_from_slice(&part.segments);
            whole.keep.extend(part.keep);
            whole.len += part.len;
        }
        whole
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The runs of bytes, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The `len` bytes from `offset` on, in the same memory.
    ///
    /// # Panics
    /// When the range does not lie inside the buffer.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let segments = self.range(offset, len).collect();
        Self { segments, len, keep: self.keep.clone() }
    }

    /// Whether every run starts and ends at a multiple of `alignment` bytes (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.segments.iter().all(|part| (part.address.addr() | part.len) & mask == 0)
    }

    /// Copies bytes from `offset` on out of the buffer.
    ///
    /// # Panics
    /// When the range does not lie inside the buffer.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) {
        let mut done = 0;
        for part in self.range(offset, target.len()) {
            let run = &mut target[done..done + part.len];
            // SAFETY: the segment lies in memory that `keep` holds, and `run` is `part.len` bytes
            // of ours. The guest may write meanwhile; then it sees its own mixture of bytes, as
            // with a device.
            unsafe { std::ptr::copy_nonoverlapping(part.address, run.as_mut_ptr(), part.len) };
            done += part.len;
        }
    }

    /// Copies `source` into the buffer from `offset` on.
    ///
    /// # Panics
    /// When the range does not lie inside the buffer.
    pub fn copy_from(&self, offset: usize, source: &[u8]) {
        let mut done = 0;
        for part in self.range(offset, source.len()) {
            let run = &source[done..done + part.len];
            // SAFETY: as in `copy_to`; no reference to the segment's bytes exists.
            unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), part.address, part.len) };
            done += part.len;
        }
    }

    /// Sets `len` bytes from `offset` on to zero.
    ///
    /// # Panics
    /// When the range does not lie inside the buffer.
    pub fn fill_zero(&self, offset: usize, len: usize) {
        for part in self.range(offset, len) {
            // SAFETY: as in `copy_from`.
            unsafe { std::ptr::write_bytes(part.address, 0, part.len) };
        }
    }

    /// Whether `len` bytes from `offset` on are all zero, or were one after the other: somebody
    /// else may change them meanwhile. Ends with the first that is not.
    ///
    /// # Panics
    /// When the range does not lie inside the buffer.
    pub fn is_zero(&self, offset: usize, len: usize) -> bool {
        // SAFETY: the segment lies in memory that `keep` holds.
        self.range(offset, len).all(|part| unsafe { is_zero(part) })
    }

    /// Copies all of `source` into this buffer from `offset` on.
    ///
    /// # Panics
    /// When this buffer is too short.
    pub fn copy_from_buf(&self, offset: usize, source: &Self) {
        let mut done = 0;
        for part in &source.segments {
            for target in self.range(offset + done, part.len) {
                // SAFETY: both runs lie in memory their buffers hold; `copy` allows them to
                // overlap, which two buffers of one guest may.
                unsafe {
                    std::ptr::copy(source.address_at(done), target.address, target.len);
                }
                done += target.len;
            }
        }
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    fn address_at(&self, mut offset: usize) -> *const u8 {
        for part in &self.segments {
            if offset < part.len {
                return part.address.wrapping_add(offset);
            }
            offset -= part.len;
        }
        panic!("offset beyond the buffer");
    }

    fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = Segment> {
        let end = offset.checked_add(len).expect("a range inside the buffer");
        assert!(end <= self.len, "bytes {offset}..{end} of a buffer of {}", self.len);
        let mut start = 0;
        self.segments.iter().filter_map(move |part| {
            let (first, last) = (start.max(offset), (start + part.len).min(end));
            let skip = first - start.min(first);
            start += part.len;
            (first < last)
                .then(|| Segment { address: part.address.wrapping_add(skip), len: last - first })
        })
    }
}

/// Whether a segment is all zeros.
///
/// # Safety
/// Its memory must be mapped and readable.
unsafe fn is_zero(part: Segment) -> bool {
    const WORD: usize = size_of::<u64>();
    /// Words that are looked at between two decisions.
    const GROUP: usize = 8;
    let at = |offset: usize| part.address.wrapping_add(offset);
    // SAFETY: by this function's contract; volatile, since the guest may write meanwhile.
    let byte = |offset: usize| unsafe { at(offset).read_volatile() } == 0;
    // SAFETY: as for bytes, and the callers below ask for aligned words inside the segment only.
    let word = |offset: usize| unsafe { at(offset).cast::<u64>().read_volatile() };
    let head = part.address.align_offset(WORD).min(part.len);
    let words_end = head + (part.len - head) / WORD * WORD;
    let groups_end = head + (part.len - head) / (WORD * GROUP) * (WORD * GROUP);
    let group = |first: usize| (0..GROUP).fold(0, |any, step| any | word(first + step * WORD)) == 0;
    (0..head).all(byte)
        && (head..groups_end).step_by(WORD * GROUP).all(group)
        && (groups_end..words_end).step_by(WORD).all(|offset| word(offset) == 0)
        && (words_end..part.len).all(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_and_joins_share_the_memory() {
        let left = Buf::copy_of(b"abcdef");
        let right = Buf::copy_of(b"ghij");
        let whole = Buf::concat([left.clone(), right.clone()]);
        assert_eq!(whole.slice(4, 4).to_vec(), b"efgh");
        whole.slice(4, 4).copy_from(0, b"EFGH");
        assert_eq!(left.to_vec(), b"abcdEF");
        assert_eq!(right.to_vec(), b"GHij");
        whole.fill_zero(5, 2);
        assert_eq!(whole.to_vec(), b"abcdE\0\0Hij");
    }

    #[test]
    fn copying_between_buffers_crosses_segments() {
        let source = Buf::concat([Buf::copy_of(b"12"), Buf::copy_of(b"345"), Buf::copy_of(b"6")]);
        let target = Buf::concat([Buf::zeroed(4), Buf::zeroed(4)]);
        target.copy_from_buf(1, &source);
        assert_eq!(target.to_vec(), b"\x00123456\0");
    }

    #[test]
    fn a_slice_keeps_memory_alive_after_its_parent() {
        let slice = Buf::copy_of(&[7; 9000]).slice(8000, 1000);
        assert_eq!(slice.to_vec(), [7; 1000]);
        assert!(Buf::zeroed(8192).is_aligned(4096));
        assert!(!Buf::zeroed(8192).slice(1, 512).is_aligned(512));
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let len = 300;
        let whole = Buf::concat([Buf::zeroed(101), Buf::zeroed(3), Buf::zeroed(196)]);
        assert!(whole.is_zero(0, len) && whole.is_zero(17, 0));
        for place in 0..len {
            whole.copy_from(place, &[0x80]);
            assert!(!whole.is_zero(0, len), "a bit in byte {place} was missed");
            assert!(!whole.is_zero(place, 1) && !whole.is_zero(place / 2, len - place / 2));
            assert!(whole.is_zero(0, place) && whole.is_zero(place + 1, len - place - 1));
            whole.fill_zero(place, 1);
        }
    }

    #[test]
    #[should_panic(expected = "of a buffer of 10")]
    fn a_range_beyond_the_end_panics() {
        let _ = Buf::zeroed(10).slice(8, 3);
    }
}
