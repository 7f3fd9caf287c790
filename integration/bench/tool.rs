//! The image tool against `qemu-img` in time: conversions, and `check` and `map` of an image with
//! 1 GiB of L2 tables. The two programs alternate, and what counts is the median of the ratios.
//!
//! `cargo run --release -p integration --bin bench-tool -- --directory DIR`; with a directory in
//! memory the disk has no part in it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Parser;
use fastrand::Rng;
use integration::daemon::program;

/// Compares the image tool with qemu-img.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the images lie; about six times their size is needed
    #[arg(long)]
    directory: PathBuf,

    /// MiB of the disk that is converted
    #[arg(long, default_value_t = 1024)]
    mib: usize,

    /// How often each program runs
    #[arg(long, default_value_t = 7)]
    rounds: usize,

    /// GiB of the disk that is checked and mapped; its L2 tables take a thousandth of that
    #[arg(long, default_value_t = 1024)]
    checked_gib: usize,

    /// Only rows whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

/// What is measured: a name, the words of both programs, and how much faster ours shall be.
struct Row {
    name: &'static str,
    words: &'static str,
    aim: f64,
}

const ROWS: [Row; 8] = [
    Row {
        name: "qcow2 -> raw",
        words: "convert -W -m 16 -t writeback -f qcow2 -O raw disk.qcow2 out",
        aim: 1.3,
    },
    Row {
        name: "raw -> qcow2",
        words: "convert -W -m 16 -t writeback -f raw -O qcow2 disk.raw out",
        aim: 1.3,
    },
    Row {
        name: "qcow2 -> zlib",
        words: "convert -c -W -m 16 -t writeback -f qcow2 -O qcow2 disk.qcow2 out",
        aim: 1.3,
    },
    Row {
        name: "qcow2 -> zstd",
        words: "convert -c -W -m 16 -t writeback -o compression_type=zstd -f qcow2 -O qcow2 \
                disk.qcow2 out",
        aim: 1.3,
    },
    Row {
        name: "zlib -> raw",
        words: "convert -W -m 16 -t writeback -f qcow2 -O raw zlib.qcow2 out",
        aim: 1.3,
    },
    Row {
        name: "zstd -> raw",
        words: "convert -W -m 16 -t writeback -f qcow2 -O raw zstd.qcow2 out",
        aim: 1.3,
    },
    Row { name: "check", words: "check -f qcow2 large.qcow2", aim: 2.0 },
    Row { name: "map", words: "map --output=json -f qcow2 large.qcow2", aim: 2.0 },
];

fn run(directory: &Path, program: &Path, words: &str) -> f64 {
    let words: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
    let _ = fs::remove_file(directory.join("out"));
    let begun = Instant::now();
    let status = Command::new(program)
        .args(&words)
        .current_dir(directory)
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    assert!(status.success(), "{} {words:?}: {status}", program.display());
    begun.elapsed().as_secs_f64()
}

/// A disk of text, binary data, noise and zeros, in runs of some hundred KiB.
fn make_disk(path: &Path, mib: usize) {
    let mut random = Rng::with_seed(1);
    let words: Vec<String> =
        (0..2000).map(|_| (0..random.usize(2..10)).map(|_| random.lowercase()).collect()).collect();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).expect("a disk"));
    let mut left = mib << 20;
    while left > 0 {
        let len = random.usize(4..128).saturating_mul(4096).min(left);
        let mut run = Vec::with_capacity(len + 16);
        match random.u8(..8) {
            0 | 1 => run.resize(len, 0),
            2 => run.extend(std::iter::repeat_with(|| random.u8(..)).take(len)),
            3 | 4 => run.extend(std::iter::repeat_with(|| random.u8(..16)).take(len)),
            _ => {
                while run.len() < len {
                    run.extend(words[random.usize(..words.len())].as_bytes());
                    run.push(b' ');
                }
            }
        }
        run.truncate(len);
        file.write_all(&run).expect("write the disk");
        left -= len;
    }
    file.flush().expect("write the disk");
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn main() {
    let arguments = Arguments::parse();
    let directory = arguments.directory.as_path();
    let (ours, theirs) = (program(), Path::new("qemu-img"));
    let rows: Vec<&Row> = ROWS.iter().filter(|row| row.name.contains(&arguments.only)).collect();
    let needs = |word: &str| rows.iter().any(|row| row.words.contains(word));
    make_disk(&directory.join("disk.raw"), arguments.mib);
    run(directory, theirs, "convert -f raw -O qcow2 disk.raw disk.qcow2");
    if needs("zlib.qcow2") {
        run(directory, theirs, "convert -c -f raw -O qcow2 disk.raw zlib.qcow2");
    }
    if needs("zstd.qcow2") {
        let words = "convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw zstd.qcow2";
        run(directory, theirs, words);
    }
    if needs("large.qcow2") {
        let words = "create -q -f qcow2 -o preallocation=metadata,cluster_size=8k large.qcow2";
        run(directory, theirs, &format!("{words} {}G", arguments.checked_gib));
    }
    println!("{:14} {:>9} {:>9} {:>7} {:>5}", "", "ours", "qemu-img", "ratio", "aim");
    for row in rows {
        let (mut mine, mut other, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=arguments.rounds {
            // Who is first takes turns; the first round fills caches and does not count.
            let (one, two) = if round % 2 == 0 {
                let one = run(directory, &ours, row.words);
                (one, run(directory, theirs, row.words))
            } else {
                let two = run(directory, theirs, row.words);
                (run(directory, &ours, row.words), two)
            };
            if round > 0 {
                mine.push(one);
                other.push(two);
                ratios.push(two / one);
            }
        }
        println!(
            "{:14} {:>8.3}s {:>8.3}s {:>6.2}x {:>4.1}x",
            row.name,
            median(mine),
            median(other),
            median(ratios),
            row.aim
        );
    }
    for name in ["disk.raw", "disk.qcow2", "zlib.qcow2", "zstd.qcow2", "large.qcow2", "out"] {
        let _ = fs::remove_file(directory.join(name));
    }
}
