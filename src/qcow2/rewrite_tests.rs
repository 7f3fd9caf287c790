//! Every state that a power cut may leave between and within the writes of a header.

use super::*;
use crate::qcow2::create::{CreateOptions, header as first_header};
use crate::qcow2::header::{Header, parse};

/// The first cluster of a new image, with some bytes behind what is used.
fn first_cluster(options: &CreateOptions) -> Vec<u8> {
    let mut bytes = first_header(options, None).expect("it fits");
    bytes.resize(1 << options.cluster_bits, 0);
    // The tables' places are not known here, and a header without a refcount table is refused.
    put(&mut bytes, 40, &(1_u64 << 22).to_be_bytes()).expect("inside");
    put(&mut bytes, 36, &1_u32.to_be_bytes()).expect("inside");
    put(&mut bytes, 48, &(1_u64 << 21).to_be_bytes()).expect("inside");
    put(&mut bytes, 56, &1_u32.to_be_bytes()).expect("inside");
    bytes
}

/// What a header says, in a form that can be compared.
fn said(header: &Header) -> String {
    format!("{header:?}")
}

fn apply(cluster: &mut [u8], step: &Step, kept: u64) {
    for (number, chunk) in sectors(step) {
        if kept >> number & 1 == 1 {
            put(cluster, chunk.0, chunk.1).expect("inside the cluster");
        }
    }
}

/// The parts of a step by the sectors they lie in.
fn sectors(step: &Step) -> impl Iterator<Item = (u32, (usize, &[u8]))> {
    let mut at = step.at;
    let mut rest = step.bytes.as_slice();
    let mut number = 0;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let here = rest.len().min(SECTOR - at % SECTOR);
        let (now, later) = rest.split_at(here);
        let part = (number, (at, now));
        (at, rest, number) = (at + here, later, number + 1);
        Some(part)
    })
}

/// Makes a change, looks at every state on the way; returns the new cluster.
fn change(cluster: &[u8], change: &HeaderChange) -> Vec<u8> {
    let old = said(&parse("old", cluster).expect("the old header"));
    let steps = plan(cluster, change).expect("there is room");
    let mut whole = cluster.to_vec();
    steps.iter().for_each(|step| apply(&mut whole, step, u64::MAX));
    let new = said(&parse("new", &whole).expect("the new header"));
    let mut now = cluster.to_vec();
    for step in &steps {
        let count = sectors(step).count();
        assert!(count <= 8, "a header of many sectors");
        for kept in 0..1_u64 << count {
            let mut torn = now.clone();
            apply(&mut torn, step, kept);
            let between = said(&parse("torn", &torn).expect("a header"));
            assert!(between == old || between == new, "{step:?} {kept:b}: {between}");
        }
        apply(&mut now, step, u64::MAX);
    }
    assert_eq!(now, whole);
    whole
}

fn backing(name: &str, format: &str) -> HeaderChange {
    let some = |text: &str| Some((!text.is_empty()).then(|| text.to_owned()));
    HeaderChange { backing: some(name), backing_format: some(format), ..HeaderChange::default() }
}

fn options(cluster_bits: u32, version: u32) -> CreateOptions {
    CreateOptions { cluster_bits, version, ..CreateOptions::new(1 << 14) }
}

#[test]
fn a_power_cut_leaves_the_old_header_or_the_new_one() {
    let long = "long/".repeat(60);
    for (cluster_bits, version) in [(9, 3), (10, 3), (11, 3), (12, 3), (16, 3), (9, 2), (16, 2)] {
        let mut cluster = first_cluster(&options(cluster_bits, version));
        let names = ["a.qcow2", "", "another.qcow2", long.as_str(), "b", "", long.as_str()];
        for name in names.into_iter().filter(|name| cluster_bits > 10 || name.len() < 100) {
            let format = if name.is_empty() { "" } else { "qcow2" };
            cluster = change(&cluster, &backing(name, format));
            let header = parse("changed", &cluster).expect("a header");
            assert_eq!(header.backing.unwrap_or_default(), name, "{cluster_bits} {version}");
            assert_eq!(header.backing_format.unwrap_or_default(), format);
        }
    }
}

#[test]
fn unknown_fields_and_extensions_survive() {
    let mut cluster = first_cluster(&options(16, 3));
    let parts = Parts::parse(&cluster).expect("a header");
    let mut strange = parts.clone();
    strange.fields.extend([7; 8]);
    put(&mut strange.fields, 100, &120_u32.to_be_bytes()).expect("inside");
    strange.extensions.push((0x1234_5678, b"thirteen bytes".to_vec()));
    let bytes = strange.compose(strange.features.as_ref(), 0).expect("it fits");
    put(&mut cluster, 0, &bytes).expect("inside");
    let cluster = change(&cluster, &backing("base.raw", "raw"));
    let after = Parts::parse(&cluster).expect("a header");
    assert_eq!(after.fields[112..], [7; 8]);
    assert!(after.extensions.contains(&(0x1234_5678, b"thirteen bytes".to_vec())));
    assert_eq!(after.features, parts.features, "the names of features are there again");
}

#[test]
fn a_version_can_be_changed_and_bits_be_set() {
    let mut old = first_cluster(&options(16, 2));
    old = change(&old, &backing("base.raw", "raw"));
    let up = HeaderChange { version: Some(3), ..HeaderChange::default() };
    let new = change(&old, &up);
    let header = parse("new", &new).expect("a header");
    assert_eq!((header.version, header.geometry.refcount_order), (3, 4));
    assert_eq!(header.backing.as_deref(), Some("base.raw"));
    let lazy = HeaderChange {
        compatible: Bits { set: 1, clear: 0 },
        autoclear: Bits { set: 1, clear: 0 },
        bitmaps: Some(Some(vec![5; 24])),
        ..HeaderChange::default()
    };
    let new = change(&new, &lazy);
    let header = parse("new", &new).expect("a header");
    assert_eq!((header.compatible, header.autoclear), (1, 1));
    assert_eq!(header.bitmaps, [vec![5; 24]]);
    let down = HeaderChange {
        version: Some(2),
        bitmaps: Some(None),
        compatible: Bits { set: 0, clear: u64::MAX },
        autoclear: Bits { set: 0, clear: u64::MAX },
        ..HeaderChange::default()
    };
    let new = change(&new, &down);
    assert_eq!(parse("new", &new).expect("a header").version, 2);
}

#[test]
fn what_has_no_room_is_refused() {
    let cluster = first_cluster(&options(9, 3));
    plan(&cluster, &backing(&"x".repeat(400), "raw")).expect_err("512 bytes are too few");
    let cluster = first_cluster(&options(16, 3));
    plan(&cluster, &backing(&"x".repeat(1024), "raw")).expect_err("too long a name");
    let data_file = Some("x".repeat(500));
    let change = HeaderChange { data_file, ..HeaderChange::default() };
    plan(&cluster, &change).expect_err("more than a sector");
    assert_eq!(plan(&cluster, &HeaderChange::default()).expect("nothing to do"), []);
}
