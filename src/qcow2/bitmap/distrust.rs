//! A repair is about to change what the guest reads: bitmaps do not know of it.

use crate::error::{Error, Result};
use crate::qcow2::bitmap::directory;
use crate::qcow2::bitmap::{Tracker, write_sectors};
use crate::qcow2::header::Header;
use crate::storage::{Buf, FileId, Op, Purpose, Storage};
use crate::sync::Mutex;

/// Marks every enabled bitmap of the image in `file`, which nobody has open, as in use, durably, so
/// that each counts as inconsistent; says whether that can be done: else the directory contradicts
/// itself, and nothing was changed.
///
/// # Errors
/// When the host cannot read or write.
pub(in crate::qcow2) async fn distrust(
    st: &dyn Storage,
    file: FileId,
    header: &Header,
) -> Result<bool> {
    let cluster = header.geometry.cluster_size();
    let Ok(place) = directory::place(&header.bitmaps, cluster) else { return Ok(false) };
    let buf = Buf::zeroed(usize::try_from(place.len).expect("directories are bounded"));
    let read = Op::Read { at: place.at, buf: buf.clone() };
    let failed = |source| Error::io("marking bitmaps as inconsistent", source);
    st.submit(file, Purpose::BitmapLoad, read).await.map_err(failed)?;
    let bytes = buf.to_vec();
    let Ok(entries) = directory::parse(&bytes, place) else { return Ok(false) };
    let tracker = Tracker { at: place.at, directory: Mutex::new(bytes), live: Vec::new() };
    let sectors = tracker.change(|directory| {
        for entry in entries.iter().filter(|entry| entry.is_live()) {
            directory::set_in_use(directory, entry.start, true);
        }
    });
    write_sectors(st, file, sectors).await.map_err(failed)?;
    Ok(true)
}
