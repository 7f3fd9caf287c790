#![expect(unsafe_code, reason = "hands the kernel addresses of buffers")]
//! What the host itself can do: the same requests on the raw file, without a server between.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types::Fd};
use memmap2::MmapMut;

use crate::client::Kind;

/// The flag of open(2) that goes around the page cache.
const O_DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits() as i32;

/// Requests a second of pread or pwrite on a file that is in the page cache, one after the other:
/// the kernel copies at once, so more in flight would gain nothing.
pub(crate) fn cached(path: &Path, kind: Kind, block: usize, time: Duration) -> Result<f64> {
    let file = OpenOptions::new().read(true).write(kind == Kind::Write).open(path)?;
    let blocks = file.metadata()?.len() / block as u64;
    let mut buffer = vec![1; block];
    let mut random = fastrand::Rng::with_seed(3);
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < time {
        for _ in 0..64 {
            let at = random.u64(0..blocks) * block as u64;
            match kind {
                Kind::Write => file.write_all_at(&buffer, at)?,
                _ => file.read_exact_at(&mut buffer, at)?,
            }
        }
        count += 64;
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

/// Requests a second of pwrite into a file that is new, from its start to `span`.
pub(crate) fn fill(path: &Path, block: usize, span: u64) -> Result<f64> {
    let file = File::create(path)?;
    let buffer = vec![1; block];
    let (begun, count) = (Instant::now(), span / block as u64);
    for index in 0..count {
        file.write_all_at(&buffer, index * block as u64)?;
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

/// Writes a second where each group of so many, anywhere in the file, is followed by one fdatasync.
pub(crate) fn synced(path: &Path, block: usize, group: u32, time: Duration) -> Result<f64> {
    let file = OpenOptions::new().write(true).open(path)?;
    let blocks = file.metadata()?.len() / block as u64;
    let buffer = vec![1; block];
    let mut random = fastrand::Rng::with_seed(3);
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < time {
        for _ in 0..group {
            file.write_all_at(&buffer, random.u64(0..blocks) * block as u64)?;
        }
        file.sync_data()?;
        count += group;
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

/// Requests a second of an io_uring that reads around the page cache with so many in flight.
pub(crate) fn direct(path: &Path, block: usize, depth: usize, time: Duration) -> Result<f64> {
    let file: File = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(path)?;
    let blocks = file.metadata()?.len() / block as u64;
    let mut buffers = MmapMut::map_anon(depth * block)?;
    let first = buffers.as_mut_ptr();
    let entries = u32::try_from(depth.next_power_of_two()).expect("a small depth");
    let mut ring: IoUring =
        IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(entries)?;
    let mut random = fastrand::Rng::with_seed(3);
    let mut read = |slot: usize| {
        let at = random.u64(0..blocks) * block as u64;
        let buffer = first.wrapping_add(slot * block);
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), buffer, block as u32).offset(at);
        entry.build().user_data(slot as u64)
    };
    let (begun, mut count, mut in_flight) = (Instant::now(), 0, 0);
    let mut free: Vec<usize> = (0..depth).collect();
    loop {
        let over = begun.elapsed() >= time;
        for slot in free.drain(..) {
            if !over {
                // SAFETY: the buffer is the slot's own, nobody else looks at it, and both it and
                // the file live until everything in flight has been answered.
                unsafe { ring.submission().push(&read(slot)) }.expect("room for every slot");
                in_flight += 1;
            }
        }
        if in_flight == 0 {
            return Ok(f64::from(count) / begun.elapsed().as_secs_f64());
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            if entry.result() != block as i32 {
                return Err(Error::from_raw_os_error(-entry.result().min(-5)));
            }
            free.push(entry.user_data() as usize);
        }
        in_flight -= free.len();
        count += free.len() as u32;
    }
}
