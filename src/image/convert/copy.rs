//! One job: its bytes are read, looked at for zeros, compressed if need be, and written.

use std::cell::RefCell;
use std::ops::Range;

use crate::bytes::GuestOffset;
use crate::error::Result;
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::convert::Options;
use crate::image::convert::scan::{Job, Work};
use crate::image::convert::source::Disks;
use crate::image::convert::turn::Turns;
use crate::qcow2::header::Compression;
use crate::storage::{Buf, Storage};

/// Zeros in a target that may hold other bytes become holes in runs of at least so many bytes.
const HOLE: u64 = 64 << 10;

/// What becomes of zeros that are found in data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zeros {
    /// They are there already.
    Skipped,
    /// They are made known to the target.
    Told,
    /// They are bytes like others.
    Written,
}

/// What is written of a part of the disk to a stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    /// Zeros, where those are looked for.
    Zeros,
    /// The bytes of the disk.
    Plain(&'a Buf),
    /// What a cluster is compressed.
    Packed(&'a [u8]),
}

/// What takes parts of the disk in order.
pub(super) trait Drain: Sync {
    /// Takes the part that begins at `at`.
    ///
    /// # Errors
    /// When it cannot be written.
    fn take(&self, at: u64, content: Content<'_>) -> Result<()>;
}

/// How a stream is compressed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packing {
    pub(super) kind: Compression,
    /// Bytes of a cluster.
    pub(super) cluster: u64,
    /// Whether clusters of zeros are looked for.
    pub(super) finds_zeros: bool,
}

/// Where bytes go.
enum Target<'a> {
    Image(&'a Image),
    Stream(&'a dyn Drain),
}

/// Copies from disks to a target.
pub(super) struct Copier<'a> {
    disks: Disks<'a>,
    target: Target<'a>,
    zeros: Zeros,
    /// The unit in bytes in which zeros are looked for.
    grain: usize,
    compress: Option<Compression>,
    cluster: usize,
    /// The order in which jobs write, if there is one.
    turns: Option<Turns>,
    /// The most bytes that a job copies.
    chunk: usize,
}

/// Memory that jobs of one thread use one after the other.
#[derive(Debug)]
pub(super) struct Buffers {
    len: usize,
    free: RefCell<Vec<Buf>>,
}

impl Buffers {
    fn take(&self) -> Buf {
        self.free.borrow_mut().pop().unwrap_or_else(|| Buf::zeroed(self.len))
    }

    fn give_back(&self, buf: Buf) {
        self.free.borrow_mut().push(buf);
    }
}

impl<'a> Copier<'a> {
    pub(super) fn new(
        disks: Disks<'a>,
        target: &'a Image,
        options: &Options,
        chunk: u64,
        st: &dyn Storage,
    ) -> Result<Self> {
        let compress = match options.compress {
            true => Some(target.compressible()?.compression()),
            false => None,
        };
        let zeros = match options {
            Options { sparse: 0, .. } => Zeros::Written,
            Options { keep_backing: false, target_is_zero: true, .. } => Zeros::Skipped,
            _ => Zeros::Told,
        };
        // In a raw image every place is known from the start.
        let ordered = !options.out_of_order && matches!(target.chain.top(), Layer::Qcow2(_));
        let cluster = usize::try_from(target.discard_granularity()).expect("at most 2 MiB");
        let least = if zeros == Zeros::Told { HOLE } else { 512 };
        // Nobody finds zeros in a piece longer than what is read at once.
        let grain = options.sparse.next_power_of_two().clamp(least, chunk);
        let grain = grain.max(u64::from(st.limits(target_file(target)).request_alignment));
        let grain = usize::try_from(grain).expect("at most a chunk");
        let turns = ordered.then(Turns::default);
        let chunk = usize::try_from(chunk).expect("chunks fit into memory");
        let target = Target::Image(target);
        Ok(Self { disks, target, zeros, grain, compress, cluster, turns, chunk })
    }

    /// Copies into a stream, in order, everything that jobs tell of; what is compressed goes
    /// cluster by cluster.
    pub(super) fn streaming(
        disks: Disks<'a>,
        drain: &'a dyn Drain,
        chunk: u64,
        packing: Option<Packing>,
    ) -> Self {
        let size = |bytes: u64| usize::try_from(bytes).expect("chunks fit into memory");
        let finds_zeros = packing.is_some_and(|packing| packing.finds_zeros);
        let chunk = size(chunk);
        Self {
            disks,
            target: Target::Stream(drain),
            zeros: if finds_zeros { Zeros::Skipped } else { Zeros::Written },
            grain: chunk,
            compress: packing.map(|packing| packing.kind),
            cluster: packing.map_or(chunk, |packing| size(packing.cluster)),
            turns: Some(Turns::default()),
            chunk,
        }
    }

    pub(super) fn zeros(&self) -> Zeros {
        self.zeros
    }

    /// Memory for the jobs of one thread.
    pub(super) fn buffers(&self) -> Buffers {
        Buffers { len: self.chunk, free: RefCell::default() }
    }

    /// Does a job, unless `stop` says that there is no use in it any more.
    pub(super) async fn run(
        &self,
        st: &dyn Storage,
        buffers: &Buffers,
        job: &Job,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let done = if stop() { Ok(()) } else { self.work(st, buffers, job, stop).await };
        if let Some(turns) = &self.turns {
            turns.end(job.number);
        }
        done
    }

    async fn work(
        &self,
        st: &dyn Storage,
        buffers: &Buffers,
        job: &Job,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let mut done = Ok(());
        let start = job.pieces.first().map_or(0, |piece| piece.at);
        let copied = job.pieces.iter().filter(|piece| piece.work == Work::Copy);
        let end = copied.clone().map(|piece| piece.at + piece.len).max().unwrap_or(start);
        let size = |bytes: u64| usize::try_from(bytes).expect("at most a chunk");
        debug_assert!(size(end - start) <= buffers.len, "{job:?}");
        let buf = buffers.take();
        let mut parts = Vec::new();
        for piece in copied {
            let range = size(piece.at - start)..size(piece.at - start + piece.len);
            let part = buf.slice(range.start, range.len());
            done = done.and(self.disks.read(st, piece.at, &part).await);
            if done.is_err() {
                break;
            }
            self.split(&buf, start, range, &mut parts);
        }
        if done.is_ok() {
            self.deflate(&buf, &mut parts);
            self.wait(job).await;
        }
        if done.is_ok() && !stop() {
            done = match self.target {
                Target::Image(image) => self.write(st, image, (start, &buf, &parts), job).await,
                Target::Stream(drain) => parts.iter().try_for_each(|part| {
                    let bytes = buf.slice(part.range.start, part.range.len());
                    let content = match &part.bytes {
                        _ if part.zero => Content::Zeros,
                        Some(packed) => Content::Packed(packed),
                        None => Content::Plain(&bytes),
                    };
                    drain.take(start + part.range.start as u64, content)
                }),
            };
        }
        buffers.give_back(buf);
        done
    }

    async fn wait(&self, job: &Job) {
        if let Some(turns) = &self.turns {
            turns.wait(job.number).await;
        }
    }

    /// Cuts what was read into what is written in one go.
    fn split(&self, buf: &Buf, start: u64, range: Range<usize>, parts: &mut Vec<Part>) {
        let unit = if self.compress.is_some() { self.cluster } else { self.grain };
        let mut at = range.start;
        while at < range.end {
            // Units lie at multiples of their size on the disk.
            let within = usize::try_from(start % unit as u64).expect("less than a unit") + at;
            let len = (unit - within % unit).min(range.end - at);
            let zero = self.zeros != Zeros::Written && buf.is_zero(at, len);
            match parts.last_mut() {
                Some(last)
                    if self.compress.is_none() && last.zero == zero && last.range.end == at =>
                {
                    last.range.end += len;
                }
                _ => parts.push(Part { range: at..at + len, zero, bytes: None }),
            }
            at += len;
        }
    }

    fn deflate(&self, buf: &Buf, parts: &mut [Part]) {
        let Some(kind) = self.compress else { return };
        let mut cluster = vec![0; self.cluster];
        for part in parts.iter_mut().filter(|part| !part.zero) {
            buf.copy_to(part.range.start, &mut cluster[..part.range.len()]);
            cluster[part.range.len()..].fill(0);
            part.bytes = crate::qcow2::deflate(kind, &cluster);
        }
    }

    async fn write(
        &self,
        st: &dyn Storage,
        image: &Image,
        (start, buf, parts): (u64, &Buf, &[Part]),
        job: &Job,
    ) -> Result<()> {
        for part in parts {
            let (at, len) = (GuestOffset(start + part.range.start as u64), part.range.len());
            if part.zero {
                if self.zeros == Zeros::Told {
                    image.write_zeroes(st, at, len as u64, true).await?;
                }
                continue;
            }
            let bytes = buf.slice(part.range.start, len);
            if self.compress.is_some() {
                image.write_deflated(st, at, &bytes, part.bytes.as_deref()).await?;
            } else {
                image.write_from(st, at, &bytes).await?;
            }
        }
        for piece in job.pieces.iter().filter(|piece| piece.work == Work::Zero) {
            image.write_zeroes(st, GuestOffset(piece.at), piece.len, true).await?;
        }
        Ok(())
    }
}

/// A part of a job's buffer.
#[derive(Debug)]
struct Part {
    range: Range<usize>,
    zero: bool,
    /// What it is compressed, if it is to be and that saves something.
    bytes: Option<Vec<u8>>,
}

fn target_file(target: &Image) -> crate::storage::FileId {
    match target.chain.top() {
        Layer::Raw(raw) => raw.file(),
        Layer::Qcow2(image) => image.data_file(),
    }
}
