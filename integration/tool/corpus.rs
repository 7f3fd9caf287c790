//! The corpus: images made by `qemu-img` and `qemu-io` over the matrix of options.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of most disks in bytes.
const SIZE: usize = 8 << 20;

/// One image of the corpus.
pub(crate) struct Picture {
    /// Its name in the directory, also told by a failing test.
    pub(crate) name: String,
    pub(crate) format: &'static str,
}

/// Layouts: a name, options of `qemu-img create`, and whether their images are written to.
const LAYOUTS: [(&str, &str); 29] = [
    ("plain", ""),
    ("c512", "cluster_size=512"),
    ("c1k", "cluster_size=1k"),
    ("c4k", "cluster_size=4k"),
    ("c32k", "cluster_size=32k"),
    ("c256k", "cluster_size=256k"),
    ("c2m", "cluster_size=2M"),
    ("r1", "refcount_bits=1"),
    ("r2", "refcount_bits=2"),
    ("r4", "refcount_bits=4,cluster_size=4k"),
    ("r8", "refcount_bits=8"),
    ("r32", "refcount_bits=32"),
    ("r64", "refcount_bits=64,cluster_size=512"),
    ("v2", "compat=0.10"),
    ("v2c4k", "compat=0.10,cluster_size=4k"),
    ("lazy", "lazy_refcounts=on"),
    ("ext", "extended_l2=on"),
    ("ext16k", "extended_l2=on,cluster_size=16k"),
    ("ext2m", "extended_l2=on,cluster_size=2M"),
    ("zstd", "compression_type=zstd"),
    ("data", "data_file=data.raw"),
    ("data4k", "data_file=data4k.raw,cluster_size=4k"),
    ("dataraw", "data_file=dataraw.raw,data_file_raw=on"),
    ("pmeta", "preallocation=metadata"),
    ("pmeta4k", "preallocation=metadata,cluster_size=4k"),
    ("pfalloc", "preallocation=falloc"),
    ("pfull", "preallocation=full,cluster_size=128k"),
    ("pext", "preallocation=metadata,extended_l2=on"),
    ("extlazy", "extended_l2=on,lazy_refcounts=on,cluster_size=32k"),
];

/// Runs one of QEMU's programs beside an image: it looks for data files in the current directory.
fn run(program: &str, path: &Path, arguments: &[OsString]) {
    let directory = path.parent().expect("an image lies in a directory");
    let output = Command::new(program).args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    let failed = !output.status.success() || said.contains("rror");
    assert!(!failed, "{program} {arguments:?}: {said}");
}

/// Runs commands of `qemu-io` on an image.
///
/// # Panics
///
/// Panics when one of them fails.
pub(crate) fn qemu_io(path: &Path, commands: &[&str]) {
    let raw = path.extension().is_some_and(|ending| ending == "raw");
    let format = if raw { "raw" } else { "qcow2" };
    let mut arguments: Vec<OsString> = ["-d", "unmap", "-f", format].map(OsString::from).into();
    for command in commands {
        arguments.extend(["-c".into(), (*command).into()]);
    }
    arguments.push(path.into());
    run("qemu-io", path, &arguments);
}

/// Has `qemu-img` make an empty image; `options` are those of `-o`, or empty.
///
/// # Panics
///
/// Panics when it fails.
pub(crate) fn create(path: &Path, format: &str, options: &str, size: usize) {
    let mut arguments: Vec<OsString> = ["create", "-q", "-f", format].map(OsString::from).into();
    if !options.is_empty() {
        arguments.extend(["-o".into(), options.into()]);
    }
    arguments.extend([path.into(), size.to_string().into()]);
    run("qemu-img", path, &arguments);
}

/// Data, zeros, parts of clusters, and data that was given back.
const WRITES: [&str; 7] = [
    "write -P 1 0 200k",
    "write -P 2 1M 4k",
    "write -z 1536k 300k",
    "write -P 3 2M 1M",
    "discard 2304k 256k",
    "write -P 4 5000k 512",
    "write -z -u 2M 128k",
];

struct Maker<'a> {
    directory: &'a Path,
    made: Vec<Picture>,
}

impl Maker<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Enters a qcow2 image; returns its path.
    fn enter(&mut self, name: &str) -> PathBuf {
        self.made.push(Picture { name: name.to_owned(), format: "qcow2" });
        self.path(name)
    }

    fn raw(&mut self, name: &str) -> PathBuf {
        self.made.push(Picture { name: name.to_owned(), format: "raw" });
        self.path(name)
    }

    fn layouts(&mut self) {
        for (name, options) in LAYOUTS {
            let path = self.enter(&format!("{name}-empty.qcow2"));
            let own = |options: &str, kind: &str| {
                options.replace("data_file=", &format!("data_file={kind}-"))
            };
            create(&path, "qcow2", &own(options, "empty"), SIZE);
            let path = self.enter(&format!("{name}-written.qcow2"));
            create(&path, "qcow2", &own(options, "written"), SIZE);
            qemu_io(&path, &WRITES);
        }
    }

    /// Raw images: sparse, of an odd length, full.
    fn raws(&mut self) {
        let path = self.raw("sparse.raw");
        create(&path, "raw", "", SIZE);
        qemu_io(&path, &["write -P 5 64k 64k", "write -P 6 4M 1M"]);
        let path = self.raw("odd.raw");
        fs::write(path, vec![7; 100_001]).expect("a raw image");
        let path = self.raw("empty.raw");
        create(&path, "raw", "", SIZE);
        let path = self.raw("full.raw");
        create(&path, "raw", "preallocation=full", 1 << 20);
    }

    fn overlay(&mut self, name: &str, backing: &str, format: &str, options: &str, size: usize) {
        let path = self.enter(name);
        let files = format!("backing_file={backing},backing_fmt={format}");
        let options = if options.is_empty() { files } else { format!("{files},{options}") };
        create(&path, "qcow2", &options, size);
        qemu_io(&path, &["write -P 8 128k 64k", "write -z 3M 64k", "write -P 9 2560k 3k"]);
    }

    fn chains(&mut self) {
        self.overlay("over-plain.qcow2", "plain-written.qcow2", "qcow2", "", SIZE);
        self.overlay("over-raw.qcow2", "sparse.raw", "raw", "", SIZE);
        self.overlay("over-longer.qcow2", "plain-written.qcow2", "qcow2", "", 2 * SIZE);
        self.overlay("over-shorter.qcow2", "plain-written.qcow2", "qcow2", "", SIZE / 2);
        self.overlay("over-ext.qcow2", "ext-written.qcow2", "qcow2", "extended_l2=on", SIZE);
        self.overlay("over-4k.qcow2", "sparse.raw", "raw", "cluster_size=4k", SIZE);
        self.overlay("over-v2.qcow2", "v2-written.qcow2", "qcow2", "compat=0.10", SIZE);
        self.overlay("over-three.qcow2", "over-longer.qcow2", "qcow2", "", 3 * SIZE);
        self.overlay("over-odd.qcow2", "odd.raw", "raw", "cluster_size=512", SIZE);
    }

    fn compressed(&mut self) {
        for (name, options) in [
            ("zlib-compressed.qcow2", ""),
            ("zstd-compressed.qcow2", "compression_type=zstd"),
            ("c4k-compressed.qcow2", "cluster_size=4k"),
            ("ext-compressed.qcow2", "extended_l2=on"),
        ] {
            let (from, to) = (self.path("plain-written.qcow2"), self.enter(name));
            let mut arguments: Vec<OsString> = vec!["convert".into(), "-c".into()];
            arguments.extend(["-O".into(), "qcow2".into()]);
            if !options.is_empty() {
                arguments.extend(["-o".into(), options.into()]);
            }
            arguments.extend([from.into(), to.clone().into()]);
            run("qemu-img", &to, &arguments);
            qemu_io(&to, &["write -P 10 2700k 8k"]);
        }
    }

    fn snapshots(&mut self) {
        for (name, options) in [
            ("snapshots.qcow2", ""),
            ("snapshots-v2.qcow2", "compat=0.10"),
            ("snapshots-ext.qcow2", "extended_l2=on,cluster_size=16k"),
        ] {
            let path = self.enter(name);
            create(&path, "qcow2", options, SIZE);
            let take = |name: &str| {
                let words = ["snapshot".into(), "-c".into(), name.into(), path.clone().into()];
                run("qemu-img", &path, &words);
            };
            qemu_io(&path, &WRITES);
            take("first");
            qemu_io(&path, &["write -P 11 100k 200k"]);
            take("a longer name, with spaces");
            qemu_io(&path, &["write -P 12 0 64k"]);
        }
    }

    fn bitmaps(&mut self) {
        let path = self.enter("bitmaps.qcow2");
        create(&path, "qcow2", "", SIZE);
        let bitmap = |arguments: &[&str], name: &str| {
            let mut all: Vec<OsString> = vec!["bitmap".into()];
            all.extend(arguments.iter().map(OsString::from));
            all.extend([path.clone().into(), name.into()]);
            run("qemu-img", &path, &all);
        };
        bitmap(&["--add"], "auto");
        bitmap(&["--add", "-g", "512"], "fine");
        bitmap(&["--add", "-g", "1M"], "disabled");
        bitmap(&["--disable"], "disabled");
        qemu_io(&path, &WRITES);
    }
}

/// Makes the corpus in `directory`.
pub(crate) fn make(directory: &Path) -> Vec<Picture> {
    let mut maker = Maker { directory, made: Vec::new() };
    maker.layouts();
    maker.raws();
    maker.chains();
    maker.compressed();
    maker.snapshots();
    maker.bitmaps();
    maker.made
}
