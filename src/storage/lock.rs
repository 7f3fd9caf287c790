//! Locks on image files that QEMU understands and obeys.
//!
//! What a program does with an image is a set of permissions. For each one it uses it holds a
//! shared lock on byte 100 + p of the file, for each one it does not grant to others on byte
//! 200 + p. Having taken its own, it looks whether anybody holds the opposite byte of one of them.
//! Taking before looking means that of two programs at least one sees the other.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::sys;
use crate::error::{Error, Result};

const USES: i64 = 100;
const DENIES: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Nobody else may change an image while we hold it, whether we change it ourselves or not.
const DENIED: [i64; 2] = [WRITE, RESIZE];

/// How many entries of /proc a search for a lock's holder looks at before it gives up.
const SEARCH_LIMIT: usize = 50_000;

/// How long a lock that no living process seems to hold is waited for. The kernel finishes what a
/// killed process had under way, and keeps the file and its locks until then: each operation holds
/// on to the open file that it was begun on, and that one has the locks. So no write of a dead
/// predecessor can come after its locks are gone, and whoever has them may write.
const PATIENCE: Duration = Duration::from_secs(10);

/// A lock of somebody else that excludes ours.
struct Conflict {
    byte: i64,
    /// The holder, if the kernel named it.
    pid: Option<u32>,
}

/// Locks `file` for reading, or for reading and writing; the lock ends with the file's last
/// descriptor.
///
/// # Errors
/// Refused when another process uses the file in a way that excludes ours. A host without such
/// locks is no error: that is logged and the file used without.
pub(super) fn acquire(file: &File, path: &Path, read_only: bool) -> Result<()> {
    let start = Instant::now();
    loop {
        let conflict = match try_acquire(file, read_only) {
            Ok(None) => return Ok(()),
            Ok(Some(conflict)) => conflict,
            Err(error) if is_unsupported(&error) => {
                let name = path.display();
                tracing::warn!("{name}: cannot be locked ({error}): nothing keeps others away");
                return Ok(());
            }
            Err(error) => return Err(Error::io(format!("cannot lock {}", path.display()), error)),
        };
        let holder = conflict.pid.or_else(|| find_holder(file, conflict.byte));
        if holder.is_some_and(|pid| !is_dying(pid)) || start.elapsed() > PATIENCE {
            return Err(refusal(path, conflict.byte, holder));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Takes the locks and looks for others' once; taking them again changes nothing.
fn try_acquire(file: &File, read_only: bool) -> io::Result<Option<Conflict>> {
    let used: &[i64] =
        if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
    let own = used.iter().map(|permission| USES + permission);
    for byte in own.chain(DENIED.map(|permission| DENIES + permission)) {
        match sys::lock_byte_shared(file, byte) {
            Ok(()) => {}
            Err(error) if is_held(&error) => {
                let pid = sys::byte_is_locked(file, byte)?.flatten();
                return Ok(Some(Conflict { byte, pid }));
            }
            Err(error) => return Err(error),
        }
    }
    let opposite = DENIED.iter().map(|permission| USES + permission);
    for byte in opposite.chain(used.iter().map(|permission| DENIES + permission)) {
        if let Some(pid) = sys::byte_is_locked(file, byte)? {
            return Ok(Some(Conflict { byte, pid }));
        }
    }
    Ok(None)
}

fn is_held(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}

fn refusal(path: &Path, byte: i64, holder: Option<u32>) -> Error {
    let doing = match byte {
        byte if byte == USES + WRITE || byte == USES + RESIZE => "writes to it",
        byte if byte >= DENIES => "uses it and does not share it",
        _ => "has locked it",
    };
    let holder = match holder {
        Some(pid) if pid == std::process::id() => "this process has it open already and".to_owned(),
        Some(pid) => format!("process {pid}{}", command(pid)),
        None => "another process".to_owned(),
    };
    Error::refused(
        path.display().to_string(),
        format!("the image is in use: {holder} {doing}; stop that process first"),
    )
}

fn command(pid: u32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!(" ({})", name.trim_end()),
        Err(_) => String::new(),
    }
}

/// Looks for the process whose descriptor holds a lock on `byte` of `file`: the kernel does not
/// tell, but shows the locks of each descriptor. Best effort, since /proc may be hidden.
fn find_holder(file: &File, byte: i64) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    let mut budget = SEARCH_LIMIT;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            budget = budget.checked_sub(1)?;
            let Ok(found) = fs::metadata(descriptor.path()) else { continue };
            if (found.dev(), found.ino()) != (wanted.dev(), wanted.ino()) {
                continue;
            }
            // Our own new descriptor holds locks on the same bytes.
            let own = pid == std::process::id() && is_number(&descriptor, file.as_raw_fd());
            if own {
                continue;
            }
            let info = process.path().join("fdinfo").join(descriptor.file_name());
            let text = fs::read_to_string(info).unwrap_or_default();
            if text.lines().any(|line| holds(line, byte)) {
                return Some(pid);
            }
        }
    }
    None
}

/// Whether a process was killed and is only not gone yet: it is a zombie, is on its way out, or has
/// a SIGKILL that it has not noticed.
fn is_dying(pid: u32) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    const PF_EXITING: u64 = 4;
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    // The name in parentheses may hold anything, so fields are counted from behind it.
    let stat = read("stat");
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let mut fields = fields.split_whitespace();
    let state = fields.next().unwrap_or("X");
    let flags: u64 = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or_default();
    let status = read("status");
    let mut pending = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    matches!(state, "Z" | "X") || flags & PF_EXITING != 0 || pending.any(|set| set & SIGKILL != 0)
}

fn is_number(entry: &fs::DirEntry, number: RawFd) -> bool {
    entry.file_name().to_str().is_some_and(|name| name.parse() == Ok(number))
}

/// Whether a line of fdinfo tells of a lock that covers `byte`; such a line ends with the first and
/// the last byte of the lock, the latter a number or `EOF`.
fn holds(line: &str, byte: i64) -> bool {
    if !line.starts_with("lock:") {
        return false;
    }
    let mut words = line.split_whitespace().rev();
    let last = words.next().map(|word| word.parse().unwrap_or(i64::MAX));
    let first = words.next().and_then(|word| word.parse().ok());
    first.zip(last).is_some_and(|(first, last): (i64, i64)| (first..=last).contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn open(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).expect("the test's file")
    }

    #[test]
    fn readers_share_and_a_writer_excludes_everybody() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path();
        let (first, second) = (open(path), open(path));
        acquire(&first, path, true).expect("one reader");
        acquire(&second, path, true).expect("two readers");
        let error = acquire(&open(path), path, false).expect_err("a writer beside readers");
        assert!(error.to_string().contains("this process has it open already"), "{error}");
        drop((first, second));
        let writer = open(path);
        acquire(&writer, path, false).expect("a writer alone");
        let error = acquire(&open(path), path, true).expect_err("a reader beside a writer");
        assert!(error.to_string().contains("writes to it"), "{error}");
        acquire(&open(path), path, false).expect_err("two writers");
    }

    #[test]
    fn a_killed_process_is_dying_and_a_living_one_is_not() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        assert!(!is_dying(std::process::id()) && !is_dying(child.id()));
        child.kill().expect("kill it");
        // Nobody has waited for it yet, so its number is still its own.
        assert!(is_dying(child.id()), "whether it has noticed or not");
        child.wait().expect("its end");
        assert!(is_dying(child.id()), "nobody is there any more");
    }

    #[test]
    fn lines_about_locks_are_understood() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:2097 100 101";
        assert!(holds(line, 100) && holds(line, 101) && !holds(line, 102));
        let whole = "lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:2097 0 EOF";
        assert!(holds(whole, 203));
        assert!(!holds("flags:\t0100000 100 100", 100));
    }
}
