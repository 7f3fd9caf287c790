//! Large ranges, written and read back with many requests under way.

use std::ops::Range;
use std::time::Duration;

use crate::client::{Answer, Client, MAX_REQUEST, Request};

/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of one discard or write-zeroes request.
const ERASE: u64 = 16 << 20;

/// What a range of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zeros,
    /// Words that are different at every place and for every number; none is zero.
    Numbered(u64),
}

impl Content {
    /// Fills `bytes`, which lie at `offset`, a multiple of eight.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        for (place, word) in (offset / 8..).zip(bytes.chunks_mut(8)) {
            word.copy_from_slice(&self.word(place).to_le_bytes()[..word.len()]);
        }
    }

    fn word(self, place: u64) -> u64 {
        match self {
            Self::Zeros => 0,
            // An odd factor permutes the words, so that no two places have the same one.
            Self::Numbered(number) => {
                ((number << 40) + place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            }
        }
    }
}

/// Writes `content` to a range.
///
/// # Errors
/// Tells the first answer that is wrong or does not come.
pub fn write(client: &mut Client, range: Range<u64>, content: Content) -> Result<(), String> {
    let request = |offset, length: u64| Request::Write { offset, length: small(length) };
    let prepare = |offset, bytes: &mut [u8]| content.fill(offset, bytes);
    drive(client, range, MAX_REQUEST as u64, request, prepare, |_, _| Ok(()))
}

/// Reads a range and compares it.
///
/// # Errors
/// As [`write`], and tells the first place with other content.
pub fn verify(client: &mut Client, range: Range<u64>, content: Content) -> Result<(), String> {
    let request = |offset, length: u64| Request::Read { offset, length: small(length) };
    let mut expected = vec![0; MAX_REQUEST];
    let check = |offset: u64, bytes: &[u8]| {
        content.fill(offset, &mut expected[..bytes.len()]);
        let wrong = bytes.iter().zip(&expected).position(|(is, should)| is != should);
        wrong.map_or(Ok(()), |at| Err(format!("byte {} is not {content:?}", offset + at as u64)))
    };
    drive(client, range, MAX_REQUEST as u64, request, |_, bytes| bytes.fill(0xa5), check)
}

/// Discards a range.
///
/// # Errors
/// As [`write`].
pub fn discard(client: &mut Client, range: Range<u64>) -> Result<(), String> {
    let request = |offset, length| Request::Discard { offset, length };
    drive(client, range, ERASE, request, |_, _| {}, |_, _| Ok(()))
}

/// Makes a range read as zeros.
///
/// # Errors
/// As [`write`].
pub fn write_zeroes(client: &mut Client, range: Range<u64>, unmap: bool) -> Result<(), String> {
    let request = |offset, length| Request::WriteZeroes { offset, length, unmap };
    drive(client, range, ERASE, request, |_, _| {}, |_, _| Ok(()))
}

/// Asks for pieces of a range in order, as many at a time as the client has slots.
fn drive(
    client: &mut Client,
    range: Range<u64>,
    piece: u64,
    request: impl Fn(u64, u64) -> Request,
    mut prepare: impl FnMut(u64, &mut [u8]),
    mut finish: impl FnMut(u64, &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let mut flights: Vec<Option<Request>> = Vec::new();
    let mut next = range.start;
    while next < range.end || client.in_flight() > 0 {
        while next < range.end
            && let Some(slot) = client.free_slot()
        {
            let length = piece.min(range.end - next);
            let request = request(next, length);
            prepare(next, &mut client.buffer(slot)[..data(request)]);
            let queue = slot % client.queue_count();
            client.submit(queue, slot, request, &[]).map_err(|error| error.to_string())?;
            flights.resize(flights.len().max(slot + 1), None);
            flights[slot] = Some(request);
            next += length;
        }
        client.kick().map_err(|error| error.to_string())?;
        let answers = client.wait(PATIENCE).map_err(|error| error.to_string())?;
        if answers.is_empty() {
            return Err(format!("no answer to any of {:?}", flights.iter().flatten()));
        }
        for Answer { slot, result } in answers {
            let request = flights[slot].take().expect("answers come to requests in flight");
            if result != 0 {
                return Err(format!("{request:?} was answered with error {}", -result));
            }
            finish(offset(request), &client.buffer(slot)[..data(request)])?;
        }
    }
    Ok(())
}

fn offset(request: Request) -> u64 {
    match request {
        Request::Read { offset, .. }
        | Request::Write { offset, .. }
        | Request::Discard { offset, .. }
        | Request::WriteZeroes { offset, .. } => offset,
        Request::Flush => 0,
    }
}

/// How many bytes of its slot's buffer a request uses.
fn data(request: Request) -> usize {
    match request {
        Request::Read { length, .. } | Request::Write { length, .. } => length,
        _ => 0,
    }
}

fn small(length: u64) -> usize {
    usize::try_from(length).expect("no longer than a buffer")
}
