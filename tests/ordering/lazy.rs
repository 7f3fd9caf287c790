//! Lazy refcounts: R1 and R4 hold by the dirty bit instead.

use super::*;

/// The incompatible features in a durable image.
fn features(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[72..80].try_into().expect("eight bytes"))
}

#[test]
fn r14_an_image_with_late_refcounts_is_marked_dirty_first_and_clean_last() {
    let name = "r14_an_image_with_late_refcounts_is_marked_dirty_first_and_clean_last";
    let mut made = Layout::new(9, 300, Kind::Plain).lazy().make(1);
    let mut late = 0;
    for seed in seeds(12) {
        let _repeat = Repeat::new("ordering", name, seed);
        let disk = made.disk();
        disk.start_trace();
        let engine = Rc::new(disk.engine(0, seed));
        let image = open(engine.as_ref(), &disk, false).expect("open");
        let engines: Vec<Rc<dyn Engine>> = vec![engine];
        let sectors = Sectors::new(&made.tags);
        let mut run = Run::new(image, engines, sectors, (seed, Mix::default()), (80, 6));
        run.finish();
        let served = disk.take_trace();
        disk.start_trace();
        run.start_close();
        run.finish();
        let closed = disk.take_trace();
        let mut replay = Replay::new(&mut made);
        for event in served {
            replay.take(event, &mut |replay, event| {
                assert_ne!(event.why, Purpose::RefblockWrite, "refcounts have time");
                if matches!(event.why, Purpose::L2Write | Purpose::L1Write) {
                    assert_eq!(features(&replay.durable) & 1, 1, "not marked before {event:?}");
                    late += 1;
                }
            });
        }
        let changes = |why: Purpose| closed.iter().rposition(move |event| event.why == why);
        let cleared = closed.iter().position(|event| event.why == Purpose::HeaderWrite);
        let cleared = cleared.expect("the mark is taken away");
        assert!(changes(Purpose::RefblockWrite).expect("refcounts at last") < cleared);
        assert!(changes(Purpose::SyncData).expect("and durable") < cleared);
        assert_eq!(closed.last().map(|event| event.why), Some(Purpose::SyncHeader));
        assert_eq!(features(&disk.content(FILE)) & 1, 0, "marked after a clean close");
    }
    assert!(late > 50, "the rule was hardly ever tried: {late} times");
}
