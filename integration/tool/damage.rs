//! Damage that `check` finds and repairs.

/// What is done to the bytes of an image.
type Damage = fn(&mut Vec<u8>);

/// Damage for `check`: a name and what is done to a written image with clusters of 64 KiB.
pub(crate) const DAMAGES: [(&str, Damage); 5] = [
    ("a cluster that nothing refers to", |image| {
        let entry = l2_entry(image, 0);
        put(image, entry, 0);
    }),
    ("a cluster that counts as free", |image| {
        let data = word(image, l2_entry(image, 0)) & 0x00ff_ffff_ffff_fe00;
        let count = refcount(image, data >> 16);
        image[count..count + 2].fill(0);
    }),
    ("a cluster that is counted twice", |image| {
        let data = word(image, l2_entry(image, 1)) & 0x00ff_ffff_ffff_fe00;
        let count = refcount(image, data >> 16);
        image[count + 1] = 2;
    }),
    ("a COPIED flag that is missing", |image| {
        let entry = l2_entry(image, 2);
        let value = word(image, entry) & !(1 << 63);
        put(image, entry, value);
    }),
    ("two entries for one cluster", |image| {
        let value = word(image, l2_entry(image, 0));
        let other = l2_entry(image, 1);
        put(image, other, value);
    }),
];

fn word(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"))
}

fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn place(value: u64) -> usize {
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).expect("a small file")
}

/// Where the L2 entry of a guest cluster lies.
fn l2_entry(image: &[u8], cluster: usize) -> usize {
    place(word(image, place(word(image, 40)))) + cluster * 8
}

/// Where the refcount of a host cluster lies.
fn refcount(image: &[u8], cluster: u64) -> usize {
    let block = place(word(image, place(word(image, 48))));
    block + usize::try_from(cluster).expect("a small file") * 2
}
