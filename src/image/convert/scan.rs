//! What is to be done, found out piece by piece from the source's tables: nothing is read.

use crate::error::Result;
use crate::image::convert::source::{Kind, Map};
use crate::storage::Storage;

/// What is done with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// It is read and written.
    Copy,
    /// Zeros are written.
    Zero,
}

/// A run of bytes with something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) work: Work,
}

/// Pieces of one chunk, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// Jobs are counted from 0.
    pub(super) number: u64,
    pub(super) pieces: Vec<Piece>,
    /// How many bytes of the disk are done with it, those that need nothing included.
    pub(super) covers: u64,
}

/// How the disk is cut into jobs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// The most bytes that a job reads, a multiple of the unit; jobs begin and end with chunks.
    pub(super) chunk: u64,
    /// What is copied is whole units of so many bytes.
    pub(super) unit: u64,
    /// Whether zeros must be written.
    pub(super) zeros: bool,
}

/// Cuts a disk into jobs.
pub(super) struct Scanner<'a> {
    map: Map<'a>,
    cut: Cut,
    at: u64,
    /// Where the last job ended.
    told: u64,
    number: u64,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(map: Map<'a>, cut: Cut) -> Self {
        Self { map, cut, at: 0, told: 0, number: 0 }
    }

    /// The next job; `None` at the disk's end.
    pub(super) async fn next(&mut self, st: &dyn Storage) -> Result<Option<Job>> {
        let size = self.map.size();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut window = size;
        while self.at < window {
            let (kind, len) = self.map.units(st, self.at, self.cut.unit).await?;
            let (at, end) = (self.at, self.at + len);
            match kind {
                Kind::Data => {
                    if pieces.is_empty() {
                        let chunk = self.cut.chunk;
                        window = window.min((at / chunk + 1).saturating_mul(chunk));
                    }
                    let len = end.min(window) - at;
                    self.at += len;
                    match pieces.last_mut() {
                        Some(last) if last.at + last.len == at => last.len += len,
                        _ => pieces.push(Piece { at, len, work: Work::Copy }),
                    }
                }
                Kind::Zero if self.cut.zeros => {
                    if pieces.is_empty() {
                        self.at = end;
                        pieces.push(Piece { at, len, work: Work::Zero });
                    }
                    break;
                }
                Kind::Zero | Kind::Below => self.at = end,
            }
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        let covers = self.at - self.told;
        self.told = self.at;
        self.number += 1;
        Ok(Some(Job { number: self.number - 1, pieces, covers }))
    }
}
