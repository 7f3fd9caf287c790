//! Feature bits of the header, changed in place: eight bytes inside the first sector, and a sync.
//!
//! The dirty bit is durable before refcounts may be behind, and is cleared after they have caught
//! up. The corrupt bit stops every writer, also those that come later.

use crate::bytes::{HostOffset, be64};
use crate::error::{Error, Result};
use crate::storage::{Buf, FileId, Op, Purpose, Storage};

/// Where the incompatible bits lie in the file, and where the autoclear bits.
const INCOMPATIBLE_AT: HostOffset = HostOffset(72);
const AUTOCLEAR_AT: HostOffset = HostOffset(88);

/// Sets and clears incompatible bits of a version 3 image; they are durable when this returns.
///
/// # Errors
/// When the host cannot read, write or sync.
pub(super) async fn change(st: &dyn Storage, file: FileId, set: u64, clear: u64) -> Result<()> {
    change_word(st, file, INCOMPATIBLE_AT, |word| word & !clear | set).await
}

/// Clears autoclear bits of a version 3 image; they are durable when this returns.
///
/// # Errors
/// As [`change`].
pub(super) async fn clear_autoclear(st: &dyn Storage, file: FileId, bits: u64) -> Result<()> {
    change_word(st, file, AUTOCLEAR_AT, |word| word & !bits).await
}

async fn change_word(
    st: &dyn Storage,
    file: FileId,
    at: HostOffset,
    change: impl FnOnce(u64) -> u64,
) -> Result<()> {
    let failed = |source| Error::io("changing feature bits of the header", source);
    let buf = Buf::zeroed(8);
    let read = Op::Read { at, buf: buf.clone() };
    st.submit(file, Purpose::HeaderRead, read).await.map_err(failed)?;
    let old = be64(&buf.to_vec(), 0).unwrap_or_default();
    let new = change(old);
    if new != old {
        let write = Op::Write { at, buf: Buf::copy_of(&new.to_be_bytes()) };
        st.submit(file, Purpose::HeaderWrite, write).await.map_err(failed)?;
    }
    st.submit(file, Purpose::SyncHeader, Op::Sync).await.map_err(failed)
}
