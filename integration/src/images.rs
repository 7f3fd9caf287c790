//! Images: made, converted and checked by `qemu-img`, the judge from outside.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::model::{Mismatch, Model, SECTOR, Tag};

/// What `qemu-img check` says about an image by its exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to find.
    Clean,
    /// Clusters are counted as used that nothing refers to. Space is lost, data is not.
    Leaks,
}

/// Runs `qemu-img` and returns what it printed.
///
/// # Panics
///
/// Panics when it fails.
pub fn qemu_img<Argument: AsRef<OsStr>>(arguments: &[Argument]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "qemu-img failed: {}", describe(arguments, &output));
    String::from_utf8(output.stdout).expect("qemu-img prints text")
}

/// Makes an empty image; `options` are those of `qemu-img create -o`, or empty.
pub fn create(path: &Path, format: &str, options: &str, size: usize) {
    let size = size.to_string();
    let mut arguments = vec![OsStr::new("create"), "-q".as_ref(), "-f".as_ref(), format.as_ref()];
    if !options.is_empty() {
        arguments.extend([OsStr::new("-o"), options.as_ref()]);
    }
    arguments.extend([path.as_os_str(), size.as_ref()]);
    qemu_img(&arguments);
}

/// Makes an empty overlay of `backing`, which lies in the same directory.
pub fn create_overlay(path: &Path, backing: &str, backing_format: &str, size: usize) {
    let options = format!("backing_file={backing},backing_fmt={backing_format}");
    create(path, "qcow2", &options, size);
}

/// Copies a raw image into a new image; `options` as for [`create`].
pub fn convert_from_raw(source: &Path, target: &Path, options: &str, compress: bool) {
    let mut arguments = vec![OsStr::new("convert"), "-f".as_ref(), "raw".as_ref()];
    arguments.extend([OsStr::new("-O"), "qcow2".as_ref()]);
    if !options.is_empty() {
        arguments.extend([OsStr::new("-o"), options.as_ref()]);
    }
    if compress {
        arguments.push("-c".as_ref());
    }
    arguments.extend([source.as_os_str(), target.as_os_str()]);
    qemu_img(&arguments);
}

/// Makes a raw file out of an image, or of its internal snapshot of that name.
pub fn convert_to_raw(source: &Path, format: &str, snapshot: Option<&str>, target: &Path) {
    let mut arguments = vec![OsStr::new("convert"), "-f".as_ref(), format.as_ref()];
    arguments.extend([OsStr::new("-O"), "raw".as_ref()]);
    if let Some(snapshot) = snapshot {
        arguments.extend([OsStr::new("-l"), snapshot.as_ref()]);
    }
    arguments.extend([source.as_os_str(), target.as_os_str()]);
    qemu_img(&arguments);
}

/// What `qemu-img check` finds in a qcow2 image that is not in use.
///
/// # Panics
///
/// Panics when it finds corruption or cannot check the image.
#[must_use]
pub fn check(path: &Path) -> Verdict {
    let arguments = [OsStr::new("check"), "-f".as_ref(), "qcow2".as_ref(), path.as_os_str()];
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut output = run(&arguments);
    while is_locked(&output) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
        output = run(&arguments);
    }
    match output.status.code() {
        Some(0) => Verdict::Clean,
        Some(3) => Verdict::Leaks,
        _ => panic!("the image is corrupt: {}", describe(&arguments, &output)),
    }
}

/// How long the kernel may take to let go of the files of a daemon that was killed with requests
/// in its io_uring: it ends them first, after the process has gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

fn is_locked(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("Is another process using the image")
}

/// Fails the test unless `qemu-img check` finds neither corruption nor leaks.
pub fn assert_clean(path: &Path) {
    assert_eq!(check(path), Verdict::Clean, "{} has leaked clusters", path.display());
}

/// What `qemu-img info` says about an image.
#[must_use]
pub fn info(path: &Path) -> serde_json::Value {
    let text = qemu_img(&[OsStr::new("info"), "--output=json".as_ref(), path.as_os_str()]);
    serde_json::from_str(&text).expect("qemu-img prints JSON")
}

/// The space that a file takes on the host's disk.
#[must_use]
pub fn allocated_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    /// The unit of `st_blocks`, whatever the filesystem's own blocks are.
    const UNIT: u64 = 512;
    path.metadata().expect("look at the image").blocks() * UNIT
}

/// Makes a raw file of so many sectors and lays its content down in the model as well: runs of
/// content of its own in `ranges`, holes elsewhere.
pub fn write_raw(path: &Path, model: &mut Model, sectors: usize, ranges: &[Range<usize>]) {
    let file = File::create_new(path).expect("make a raw image");
    file.set_len((sectors * SECTOR) as u64).expect("size a raw image");
    for range in ranges {
        let tag = model.fresh_tag();
        model.lay_down(range.clone(), tag);
        write_content(&file, range, tag);
    }
}

fn write_content(file: &File, range: &Range<usize>, tag: Tag) {
    use std::io::{Seek, SeekFrom};
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    writer.seek(SeekFrom::Start((range.start * SECTOR) as u64)).expect("seek in a raw image");
    let mut content = [0; SECTOR];
    for sector in range.clone() {
        tag.fill(sector, &mut content);
        writer.write_all(&content).expect("write a raw image");
    }
    writer.flush().expect("write a raw image");
}

/// Holds a raw file against the model. `after_crash` says how, see [`Model`].
///
/// # Panics
///
/// Panics when the file is not as long as the disk.
///
/// # Errors
///
/// Tells the first sector that is wrong.
pub fn verify_raw(path: &Path, model: &mut Model, after_crash: bool) -> Result<(), Mismatch> {
    let mut file = File::open(path).expect("open the converted image");
    let length = file.metadata().expect("look at the converted image").len();
    assert_eq!(length, (model.len() * SECTOR) as u64, "the length of {}", path.display());
    let mut bytes = vec![0; 1 << 20];
    let mut first = 0;
    while first < model.len() {
        let count = (model.len() - first).min(bytes.len() / SECTOR);
        let bytes = &mut bytes[..count * SECTOR];
        file.read_exact(bytes).expect("read the converted image");
        if after_crash {
            model.check_after_crash(first, bytes)?;
        } else {
            model.check_read(first, bytes)?;
        }
        first += count;
    }
    Ok(())
}

fn run<Argument: AsRef<OsStr>>(arguments: &[Argument]) -> Output {
    Command::new("qemu-img")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot start qemu-img ({error}): run .ci/setup first"))
}

fn describe<Argument: AsRef<OsStr>>(arguments: &[Argument], output: &Output) -> String {
    let arguments: Vec<_> = arguments.iter().map(|text| text.as_ref().to_string_lossy()).collect();
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    let lines: Vec<&str> = said.lines().take(20).collect();
    format!("{} ({})\n{}", arguments.join(" "), output.status, lines.join("\n"))
}
