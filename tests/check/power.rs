//! Power cuts during a repair leave an image that the next repair finishes.

use vhost_user_qcow2::storage::Limits;

use super::*;

/// Repairs, cuts the power between operations, and repairs what that leaves.
fn cut(base: &Base, content: &[u8], seed: u64) -> u64 {
    let mut damage = Damage::new(base.image().to_vec(), seed);
    (0..3).for_each(|_| damage.once());
    let context = format!("{}: {:?}", base.name, damage.story);
    let mut bytes = damage.bytes.clone();
    // Every third one is on a device, which does not grow, but has some room.
    let room = if seed.is_multiple_of(3) { 1 << 20 } else { 0 };
    bytes.resize(bytes.len() + room, 0);
    let disk = base.disk(bytes);
    disk.set_limits(FILE, Limits { grows: room == 0, ..Limits::default() });
    let engine = disk.engine(0, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut crashed = Vec::new();
    let mut step = || {
        if disk.unsynced_sectors() > 0 && random.u8(0..3) == 0 {
            crashed.push(disk.crash(random.u64(..)));
        }
        engine.is_busy() && engine.wait().is_ok()
    };
    let report = exec::block_on(check(&engine, IMAGE, FILE, Repair::All), &mut step);
    let first = report.unwrap_or_else(|error| panic!("{context}: {error}"));
    let cuts = crashed.len() as u64;
    for disk in crashed {
        same_content(&disk, content, &damage.touched, &context);
        let report = run(&disk, Repair::All);
        assert_eq!(report.is_clean(), first.is_clean(), "{context}: {report:?}");
        same_content(&disk, content, &damage.touched, &context);
        if first.is_clean() {
            let seen = disk.look(IMAGE, oracle).expect("the image");
            assert!(seen.is_clean(), "{context}: {seen:?}");
        }
    }
    cuts
}

#[test]
fn a_power_cut_during_a_repair_leaves_what_the_next_one_repairs() {
    let test = "a_power_cut_during_a_repair_leaves_what_the_next_one_repairs";
    // Large clusters make large files and no other story.
    let bases: Vec<Base> =
        bases_of(|bits, options| bits <= 12 && !options.contains("refcount_bits=1")).collect();
    let contents: Vec<Vec<u8>> = bases.iter().map(Base::content).collect();
    let mut cuts = 0;
    for seed in seeds(100) {
        let _repeat = Repeat::new("check", test, seed);
        let number = usize::try_from(seed).expect("small") % bases.len();
        cuts += cut(&bases[number], &contents[number], seed);
    }
    println!("{cuts} power cuts");
    assert!(cuts > 200 || seeds(100).count() < 100, "only {cuts} power cuts");
}
