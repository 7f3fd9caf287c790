#![deny(clippy::as_conversions, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
//! From a descriptor chain to a request that cannot be wrong.
//!
//! A hostile guest stops here. It may lay the header and the status byte over any descriptors
//! (VERSION_1 allows every layout, 2.7.4), point anywhere, make loops, and change its memory while
//! we look: so the chain is walked once, the header and the segment lists are copied once, and only
//! checked copies and addresses inside guest memory leave this module.

use std::any::Any;
use std::fmt;
use std::rc::Rc;

use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::VolatileSlice;

use crate::blk::chain::{Chain, Descriptor};
use crate::blk::memory::Finder;
use crate::blk::token::Status;
use crate::blk::{MAX_ERASE_SECTORS, MAX_ERASE_SEGMENTS, SECTOR};
use crate::bytes::GuestOffset;
use crate::storage::Buf;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of one discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT_BYTES: usize = 16;

/// A list of address ranges in guest memory.
type Slices<'a> = SmallVec<[VolatileSlice<'a, ()>; 8]>;

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The disk's size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a change must be durable before it is answered.
    pub write_through: bool,
    /// Whether the guest lives on when this process dies: then a change must outlive it, too,
    /// before it is answered.
    pub outlives: bool,
}

/// A range that is erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub at: GuestOffset,
    /// Length in bytes, perhaps zero.
    pub len: u64,
    /// Whether the space may be given back.
    pub unmap: bool,
}

/// The ranges of one discard or write-zeroes request, in the guest's order.
pub type Segments = SmallVec<[Segment; 1]>;

/// What a guest asks for. Ranges lie on the disk and are whole sectors.
#[derive(Debug)]
pub enum Action {
    /// Fill the buffer from the disk.
    Read {
        /// First byte.
        at: GuestOffset,
        /// Guest memory to fill.
        data: Buf,
    },
    /// Write the buffer to the disk.
    Write {
        /// First byte.
        at: GuestOffset,
        /// Guest memory to write.
        data: Buf,
    },
    /// Make everything that was answered before durable.
    Flush,
    /// Give ranges up.
    Discard(Segments),
    /// Make ranges read as zeros.
    WriteZeroes(Segments),
    /// Tell the disk's serial number.
    GetId {
        /// Guest memory to fill.
        data: Buf,
    },
    /// Nothing is done.
    Refuse(Refusal),
}

impl Action {
    /// Whether the disk is another one afterwards.
    pub fn is_change(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard(_) | Self::WriteZeroes(_))
    }
}

/// A request, ready to be served.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// Whether the change must be durable before it is answered.
    pub write_through: bool,
    /// Whether the change must outlive this process before it is answered.
    pub outlives: bool,
}

/// A chain that was taken apart.
#[derive(Debug)]
pub struct Parsed {
    /// The request.
    pub request: Request,
    /// Its status byte, the last byte the device may write; none when the chain has none or is so
    /// broken that nobody knows where it ends.
    pub status: Option<Buf>,
    /// Bytes of the writable part, which is what the used ring says was written; 0 for a malformed
    /// chain.
    pub writable: u32,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The chain is not made as the specification says.
    Malformed(&'static str),
    /// The range does not lie on the disk.
    BeyondEnd {
        /// First sector.
        sector: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Data that is no multiple of 512 bytes.
    PartialSector {
        /// Length in bytes.
        len: u64,
    },
    /// A change of a read-only disk.
    ReadOnly,
    /// An erased range longer than the configuration space allows.
    TooLong {
        /// Its sectors.
        sectors: u32,
    },
    /// A request type or a flag the device does not know, or more segments than it takes.
    Unsupported {
        /// What is unsupported.
        what: &'static str,
        /// Its value.
        value: u32,
    },
}

impl Refusal {
    /// What the guest is told.
    pub fn status(&self) -> Status {
        match self {
            Self::Unsupported { .. } => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(why) => write!(f, "malformed chain: {why}"),
            Self::BeyondEnd { sector, len } => {
                write!(f, "{len} bytes from sector {sector} on lie beyond the end of the disk")
            }
            Self::PartialSector { len } => write!(f, "{len} bytes are not whole sectors"),
            Self::ReadOnly => write!(f, "the disk is read-only"),
            Self::TooLong { sectors } => {
                write!(f, "{sectors} sectors to erase, at most {MAX_ERASE_SECTORS} are offered")
            }
            Self::Unsupported { what, value } => write!(f, "unsupported {what} {value:#x}"),
        }
    }
}

/// Takes a chain apart. Whatever the guest put there, there is an answer.
///
/// `keep` must keep the chain's memory mapped: the buffers of the request point into it.
pub fn parse(chain: Chain<'_>, keep: &Rc<dyn Any>, rules: &Rules) -> Parsed {
    let mut walk = Walk::new(chain);
    let status = walk.status_byte().map(|byte| Buf::guest(Rc::clone(keep), [byte].into_iter()));
    let (action, writable) = match walk.action(status.is_some(), keep, rules) {
        Ok(action) => (action, walk.writable_bytes),
        Err(refusal @ Refusal::Malformed(_)) => (Action::Refuse(refusal), 0),
        Err(refusal) => (Action::Refuse(refusal), walk.writable_bytes),
    };
    let request = Request { action, write_through: rules.write_through, outlives: rules.outlives };
    Parsed { request, status, writable }
}

/// The two halves of a chain, and what is wrong with it.
struct Walk<'a> {
    readable: Slices<'a>,
    writable: Slices<'a>,
    /// Bytes of all writable descriptors.
    writable_bytes: u32,
    fault: Option<&'static str>,
    /// Whether the last writable byte is known and lies in guest memory.
    has_tail: bool,
}

impl<'a> Walk<'a> {
    fn new(chain: Chain<'a>) -> Self {
        let mut walk = Self {
            readable: Slices::new(),
            writable: Slices::new(),
            writable_bytes: 0,
            fault: None,
            has_tail: false,
        };
        // A chain that is broken ends without a word: then its last descriptor names another one.
        let (mut more, memory) = (true, chain.memory());
        for descriptor in chain {
            more = descriptor.has_next();
            walk.add(descriptor, memory);
        }
        if more {
            walk.fault = Some("it does not end, or leaves its table");
            walk.has_tail = false;
        }
        walk
    }

    fn add(&mut self, descriptor: Descriptor, memory: &Finder<'a>) {
        let writable = descriptor.is_writable();
        if !writable && self.has_tail {
            self.fault = Some("a readable descriptor follows a writable one");
        }
        let Ok(len) = usize::try_from(descriptor.len) else {
            self.fault = Some("a descriptor is longer than the address space");
            return;
        };
        let list = if writable { &mut self.writable } else { &mut self.readable };
        let mapped = memory.slices(descriptor.at, len, |slice| list.push(slice));
        if !mapped {
            self.fault = Some("a descriptor lies outside guest memory");
        }
        if writable {
            self.writable_bytes = self.writable_bytes.saturating_add(descriptor.len);
            self.has_tail = mapped && !list.is_empty();
        }
    }

    /// Cuts the status byte off the writable half.
    fn status_byte(&mut self) -> Option<VolatileSlice<'a, ()>> {
        if !self.has_tail {
            return None;
        }
        let last = self.writable.last_mut()?;
        let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
        if rest.is_empty() {
            self.writable.pop();
        } else {
            *last = rest;
        }
        Some(byte)
    }

    fn action(
        &mut self,
        has_status: bool,
        keep: &Rc<dyn Any>,
        rules: &Rules,
    ) -> Result<Action, Refusal> {
        if let Some(fault) = self.fault {
            return Err(Refusal::Malformed(fault));
        }
        if !has_status {
            return Err(Refusal::Malformed("it has no status byte"));
        }
        let header = self.take_front::<HEADER_BYTES>();
        let [kind, _, sector @ ..] = words(header.ok_or(Refusal::Malformed("a short header"))?);
        let [low, high] = sector;
        let sector = u64::from(high) << 32 | u64::from(low);
        let guest = |slices: &mut Slices<'a>| Buf::guest(Rc::clone(keep), slices.drain(..));
        match kind {
            VIRTIO_BLK_T_IN => {
                let data = guest(&mut self.writable);
                Ok(Action::Read { at: transfer(sector, &data, rules)?, data })
            }
            VIRTIO_BLK_T_OUT if rules.read_only => Err(Refusal::ReadOnly),
            VIRTIO_BLK_T_OUT => {
                let data = guest(&mut self.readable);
                Ok(Action::Write { at: transfer(sector, &data, rules)?, data })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            VIRTIO_BLK_T_DISCARD => Ok(Action::Discard(self.segments(0, rules)?)),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                Ok(Action::WriteZeroes(self.segments(unmap, rules)?))
            }
            VIRTIO_BLK_T_GET_ID => Ok(Action::GetId { data: guest(&mut self.writable) }),
            value => Err(Refusal::Unsupported { what: "request type", value }),
        }
    }

    /// Reads the segments of a discard or write-zeroes request (5.2.6.2); `flags` are those that
    /// the request may have.
    fn segments(&mut self, flags: u32, rules: &Rules) -> Result<Segments, Refusal> {
        if rules.read_only {
            return Err(Refusal::ReadOnly);
        }
        let bytes = self.readable.iter().fold(0usize, |sum, run| sum.saturating_add(run.len()));
        let count = bytes.checked_div(SEGMENT_BYTES).unwrap_or(0);
        if count == 0 || count.checked_mul(SEGMENT_BYTES) != Some(bytes) {
            return Err(Refusal::Malformed("its segments are cut off"));
        }
        let value = u32::try_from(count).unwrap_or(u32::MAX);
        if value > MAX_ERASE_SEGMENTS {
            return Err(Refusal::Unsupported { what: "number of segments", value });
        }
        (0..count).map(|_| self.segment(flags, rules)).collect()
    }

    fn segment(&mut self, flags: u32, rules: &Rules) -> Result<Segment, Refusal> {
        let bytes = self.take_front::<SEGMENT_BYTES>();
        let [low, high, sectors, value] =
            words(bytes.ok_or(Refusal::Malformed("its segments are cut off"))?);
        if value & !flags != 0 {
            return Err(Refusal::Unsupported { what: "segment flags", value });
        }
        if sectors > MAX_ERASE_SECTORS {
            return Err(Refusal::TooLong { sectors });
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        let len = u64::from(sectors).saturating_mul(SECTOR);
        Ok(Segment { at: range(sector, len, rules)?, len, unmap: value != 0 })
    }

    /// Takes `N` bytes from the front of the readable half, copying them once.
    fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        while !rest.is_empty() {
            let first = self.readable.first_mut()?;
            let (run, later) = rest.split_at_mut(first.len().min(rest.len()));
            let (taken, left) = first.split_at(run.len()).ok()?;
            taken.copy_to(run);
            rest = later;
            if left.is_empty() {
                self.readable.remove(0);
            } else {
                *first = left;
            }
        }
        Some(bytes)
    }
}

/// Where a transfer of whole sectors begins.
fn transfer(sector: u64, data: &Buf, rules: &Rules) -> Result<GuestOffset, Refusal> {
    let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
    if len & SECTOR.saturating_sub(1) != 0 {
        return Err(Refusal::PartialSector { len });
    }
    range(sector, len, rules)
}

/// Where a range on the disk begins.
fn range(sector: u64, len: u64, rules: &Rules) -> Result<GuestOffset, Refusal> {
    let at = sector.checked_mul(SECTOR);
    let end = at.and_then(|at| at.checked_add(len)).filter(|end| *end <= rules.size);
    match (at, end) {
        (Some(at), Some(_)) => Ok(GuestOffset(at)),
        _ => Err(Refusal::BeyondEnd { sector, len }),
    }
}

/// Four little-endian words.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    let mut target = [0; 4];
    for (target, word) in target.iter_mut().zip(words) {
        *target = u32::from_le_bytes(*word);
    }
    target
}
