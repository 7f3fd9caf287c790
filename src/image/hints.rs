//! Which layer holds a piece of the disk, remembered for deep chains.
//!
//! Only the top layer is written to, so what is below it never changes: once it is known in which
//! layer a piece of the disk is found, nobody has to ask those in between again. The memory is a
//! table of fixed size, in which a piece has one place and drives out whoever had it. A place is
//! one word, so that a reader never sees half of a change, and an old answer is as true as a new
//! one.

use crate::bytes::GuestOffset;
use crate::sync::{AtomicU64, Ordering};

/// Most places: 512 KiB of memory, and pieces for 4 GiB of a disk with 64 KiB clusters.
const MOST_PLACES: u64 = 1 << 16;
/// log2 of the bytes of a piece: between a page and a cluster of the default size.
const PIECE_BITS: std::ops::RangeInclusive<u32> = 12..=16;
/// The bits of a word that say which layer; the others say which piece.
const LAYER_BITS: u32 = 16;

/// What is remembered.
#[derive(Debug)]
pub(super) struct Hints {
    /// The number of a piece above that of a layer; zero is nothing, since the top layer's number
    /// is zero and it is never remembered.
    places: Box<[AtomicU64]>,
    piece_bits: u32,
}

impl Hints {
    /// A memory for `layers` layers of a disk of so many bytes, whose smallest cluster has
    /// 2^`cluster_bits` bytes. A chain with no layers to skip needs none.
    pub(super) fn new(layers: usize, size: u64, cluster_bits: u32) -> Self {
        let piece_bits = cluster_bits.clamp(*PIECE_BITS.start(), *PIECE_BITS.end());
        let wanted = layers > 2 && layers < 1 << LAYER_BITS;
        let pieces = if wanted { (size >> piece_bits) + 1 } else { 0 };
        let places = (0..pieces.min(MOST_PLACES)).map(|_| AtomicU64::new(0)).collect();
        Self { places, piece_bits }
    }

    /// Whether anything is remembered at all.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The piece that holds a byte: its first byte, and its length in bytes.
    pub(super) fn piece(&self, at: GuestOffset) -> (GuestOffset, u64) {
        let bytes = 1 << self.piece_bits;
        (GuestOffset(at.0 & !(bytes - 1)), bytes)
    }

    fn place(&self, at: GuestOffset) -> (&AtomicU64, u64) {
        let piece = at.0 >> self.piece_bits;
        let index = piece % self.places.len() as u64;
        (&self.places[usize::try_from(index).expect("inside the table")], piece)
    }

    /// The layer that holds all of a byte's piece, or the number of layers if none does; `None`
    /// when that is not remembered.
    pub(super) fn layer(&self, at: GuestOffset) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        let (place, piece) = self.place(at);
        let word = place.load(Ordering::Relaxed);
        let layer = word & ((1 << LAYER_BITS) - 1);
        (layer != 0 && word >> LAYER_BITS == piece)
            .then(|| usize::try_from(layer).expect("a small number"))
    }

    /// Remembers that `layer` holds all of a byte's piece.
    pub(super) fn remember(&self, at: GuestOffset, layer: usize) {
        let (place, piece) = self.place(at);
        // What does not fit is not remembered: the first bit of the number would be lost.
        if piece < 1 << (64 - LAYER_BITS) {
            place.store(piece << LAYER_BITS | layer as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_remembered_until_another_one_needs_its_place() {
        let hints = Hints::new(32, 1 << 40, 21);
        let (at, bytes) = hints.piece(GuestOffset(0x12_3456));
        assert_eq!((at, bytes), (GuestOffset(0x12_0000), 65536));
        assert_eq!(hints.layer(at), None);
        hints.remember(at, 7);
        assert_eq!(hints.layer(GuestOffset(0x12_ffff)), Some(7));
        assert_eq!(hints.layer(GuestOffset(0x13_0000)), None);
        let other = GuestOffset(at.0 + (MOST_PLACES << 16));
        assert_eq!(hints.layer(other), None, "the same place, another piece");
        hints.remember(other, 32);
        assert_eq!((hints.layer(other), hints.layer(at)), (Some(32), None));
    }

    #[test]
    fn the_first_piece_is_a_piece_too() {
        let hints = Hints::new(3, 4096, 9);
        assert_eq!(hints.layer(GuestOffset(0)), None, "nothing was remembered");
        hints.remember(GuestOffset(0), 1);
        assert_eq!(hints.layer(GuestOffset(4095)), Some(1));
    }

    #[test]
    fn short_chains_need_no_memory() {
        assert!(Hints::new(2, 1 << 40, 16).is_empty());
        assert_eq!(Hints::new(1, 1 << 40, 16).layer(GuestOffset(0)), None);
    }
}
