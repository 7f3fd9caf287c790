//! Chains laid out by hand on a simulated disk: what a guest may do, and what it must not get away
//! with. Nothing here has threads, so every failure repeats.

#[path = "requests/bench.rs"]
mod bench;
#[path = "common/driver.rs"]
mod driver;
#[path = "requests/limits.rs"]
mod limits;
#[path = "requests/logs.rs"]
mod logs;
#[path = "requests/rings.rs"]
mod rings;

use bench::{
    BORDER, DATA, DISCARD, DISK, GET_ID, HEADER, HOLE, INDIRECT, Options, RINGS, STATUS, TABLE,
    WRITE_ZEROES, bench, pattern, segment,
};
use driver::{Driver, FLUSH, IN, NEXT, OUT, Piece, UNTOUCHED, WRITE, header, was_signalled};
use vhost_user_qcow2::blk::MAX_ERASE_SECTORS;
use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::fault::Rule;

/// Cuts a run of bytes into pieces of random lengths.
fn cut(random: &mut fastrand::Rng, at: u64, len: u32, writable: bool) -> Vec<Piece> {
    let (mut pieces, mut done) = (Vec::new(), 0);
    while done < len {
        let most = if random.bool() { len - done } else { (len - done).min(9) };
        let run = random.u32(1..=most);
        pieces.push((at + u64::from(done), run, writable));
        done += run;
    }
    pieces
}

#[test]
fn every_layout_of_header_data_and_status_is_one_request() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bench = bench(Options { seed, size: 256, ..Options::default() });
        let mut model: Vec<u8> = (0..DISK).map(pattern).collect();
        for _ in 0..20 {
            let sectors = random.u64(1..=8);
            let len = sectors as u32 * 512;
            let sector = random.u64(0..=DISK / 512 - sectors);
            let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
            let write = random.bool();
            // The data lies across the border of two regions now and then.
            let at = if random.bool() { BORDER - 700 } else { DATA + random.u64(0..4096) };
            let bytes: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
            bench.driver.write(at, &bytes);
            bench.driver.write(HEADER, &header(if write { OUT } else { IN }, sector));
            bench.driver.write(STATUS, &[UNTOUCHED]);
            let mut pieces = cut(&mut random, HEADER, 16, false);
            pieces.extend(cut(&mut random, at, len, !write));
            // Half of the time the status byte follows the data in the same descriptor.
            if !write && random.bool() {
                bench.driver.write(at + u64::from(len), &[UNTOUCHED]);
                pieces.last_mut().expect("some data").1 += 1;
            } else {
                pieces.push((STATUS, 1, true));
            }
            pieces.truncate(255);
            if pieces.last().is_none_or(|piece| !piece.2) {
                continue;
            }
            let whole: u32 = pieces.iter().map(|piece| piece.1).sum();
            if whole != 16 + len + 1 {
                continue;
            }
            match random.bool() {
                true => bench.driver.send_indirect(TABLE, &pieces),
                false => bench.driver.send(&pieces),
            };
            bench.run();
            let used = bench.driver.used();
            assert_eq!(used.len(), 1, "seed {seed}");
            let (end, last, _) = *pieces.last().expect("a status byte");
            let status = bench.driver.read(end + u64::from(last) - 1, 1);
            assert_eq!(status, [0], "seed {seed}");
            if write {
                assert_eq!(used[0].1, 1, "seed {seed}");
                model[range].copy_from_slice(&bytes);
            } else {
                assert_eq!(used[0].1, len + 1, "seed {seed}");
                assert!(bench.driver.read(at, len as usize) == model[range], "seed {seed}");
            }
        }
        assert!(bench.disk.content(bench.file) == model, "seed {seed}");
    }
}

#[test]
fn requests_that_cannot_be_done_say_so() {
    let mut bench = bench(Options::default());
    let end = DISK / 512;
    let read = [(DATA, 1024, true)];
    let write = [(DATA, 1024, false)];
    assert_eq!(bench.request(IN, end - 2, &read), 0);
    for sector in [end - 1, end, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(bench.request(IN, sector, &read), 1, "{sector}");
        assert_eq!(bench.request(OUT, sector, &write), 1, "{sector}");
    }
    for len in [1, 511, 513] {
        assert_eq!(bench.request(IN, 0, &[(DATA, len, true)]), 1, "{len}");
        assert_eq!(bench.request(OUT, 0, &[(DATA, len, false)]), 1, "{len}");
    }
    assert_eq!(bench.request(IN, end, &[]), 0, "nothing fits at the end");
    assert_eq!(bench.request(IN, end + 1, &[]), 1, "but not beyond it");
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 1 << 31, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &read), 2, "{kind}");
    }
    let content: Vec<u8> = (0..DISK).map(pattern).collect();
    assert!(bench.disk.content(bench.file) == content, "nothing was written");
    assert_eq!(bench.worker.context().stats.errors.get(), 10 + 6 + 1 + 12);
}

#[test]
fn the_serial_number_is_twenty_bytes_and_no_more() {
    let mut bench = bench(Options::default());
    let expected = *b"vhost-user-qcow2\0\0\0\0";
    for len in [0, 1, 19, 20, 21, 100] {
        bench.driver.write(DATA, &[9; 100]);
        let data: &[Piece] = &[(DATA, len, true)];
        assert_eq!(bench.request(GET_ID, 0, if len == 0 { &[] } else { data }), 0);
        let seen = bench.driver.read(DATA, 100);
        let known = 20.min(len as usize);
        assert_eq!(seen[..known], expected[..known]);
        assert!(seen[known..].iter().all(|byte| *byte == 9));
    }
}

#[test]
fn segments_are_checked_one_by_one() {
    let mut bench = bench(Options::default());
    let end = DISK / 512;
    let over = MAX_ERASE_SECTORS + 1;
    for (kind, sector, sectors, flags, status) in [
        (WRITE_ZEROES, 8, 8, 0, 0),
        (WRITE_ZEROES, 8, 8, 1, 0),
        (WRITE_ZEROES, 8, 0, 0, 0),
        (WRITE_ZEROES, 8, 8, 2, 2),
        (WRITE_ZEROES, 8, 8, u32::MAX, 2),
        (WRITE_ZEROES, end - 1, 1, 0, 0),
        (WRITE_ZEROES, end - 1, 2, 0, 1),
        (WRITE_ZEROES, u64::MAX, 1, 0, 1),
        (WRITE_ZEROES, 0, over, 0, 1),
        (DISCARD, 0, 8, 0, 0),
        (DISCARD, 0, 8, 1, 2),
        (DISCARD, end, 1, 0, 1),
        (DISCARD, 0, over, 0, 1),
        (DISCARD, 0, u32::MAX, 0, 1),
    ] {
        bench.driver.write(DATA, &segment(sector, sectors, flags));
        let answer = bench.request(kind, 0, &[(DATA, 16, false)]);
        assert_eq!(answer, status, "{kind} {sector} {sectors} {flags}");
    }
    let zeros = [8 * 512..16 * 512, (end as usize - 1) * 512..end as usize * 512];
    let content = bench.disk.content(bench.file);
    for range in zeros {
        assert!(content[range].iter().all(|byte| *byte == 0));
    }
    assert_eq!(content[16 * 512], pattern(16 * 512));
}

#[test]
fn many_segments_are_one_request() {
    let mut bench = bench(Options::default());
    for (count, status) in [(1, 0), (32, 0), (33, 2), (2000, 2)] {
        let list: Vec<u8> = (0..count).flat_map(|n| segment(100 + 2 * (n % 100), 1, 0)).collect();
        bench.driver.write(DATA, &list);
        // The list begins in the header's descriptor and is cut in the middle of a segment.
        bench.driver.write(DATA - 16, &header(WRITE_ZEROES, 0));
        bench.driver.write(STATUS, &[UNTOUCHED]);
        let rest = list.len() as u32 - 3;
        bench.carry(&[(DATA - 16, 19, false), (DATA + 3, rest, false), (STATUS, 1, true)]);
        assert_eq!(bench.driver.read(STATUS, 1), [status], "{count} segments");
    }
    let content = bench.disk.content(bench.file);
    for sector in 100..164 {
        let erased = content[sector * 512..][..512].iter().all(|byte| *byte == 0);
        assert_eq!(erased, sector % 2 == 0, "{sector}");
    }
    for len in [0, 1, 15, 17, 31] {
        bench.driver.write(HEADER, &header(DISCARD, 0));
        bench.driver.write(STATUS, &[UNTOUCHED]);
        bench.carry(&[(HEADER, 16, false), (DATA, len, false), (STATUS, 1, true)]);
        assert_eq!(bench.driver.read(STATUS, 1), [1], "{len} bytes");
    }
}

#[test]
fn a_read_only_disk_is_read_and_nothing_else() {
    let mut bench = bench(Options { read_only: true, ..Options::default() });
    bench.driver.write(DATA, &segment(0, 1, 0));
    assert_eq!(bench.request(OUT, 0, &[(DATA, 512, false)]), 1);
    assert_eq!(bench.request(DISCARD, 0, &[(DATA, 16, false)]), 1);
    assert_eq!(bench.request(WRITE_ZEROES, 0, &[(DATA, 16, false)]), 1);
    assert_eq!(bench.request(FLUSH, 0, &[]), 0);
    bench.assert_serves();
    let content: Vec<u8> = (0..DISK).map(pattern).collect();
    assert!(bench.disk.content(bench.file) == content);
}

/// Writes one malformed chain; returns its head and where its status byte is, if it has one.
type Malformed = fn(&mut Driver) -> (u16, Option<u64>);

const MALFORMED: [(&str, Malformed); 16] = [
    ("a loop", |driver| {
        driver.put(RINGS, 40, HEADER, 16, NEXT, 41);
        driver.put(RINGS, 41, STATUS, 1, NEXT | WRITE, 40);
        (40, None)
    }),
    ("a descriptor that follows itself", |driver| {
        driver.put(RINGS, 40, STATUS, 1, NEXT | WRITE, 40);
        (40, None)
    }),
    ("a next descriptor outside the table", |driver| {
        driver.put(RINGS, 40, HEADER, 16, NEXT, 64);
        (40, None)
    }),
    ("data outside memory", |driver| {
        let pieces = [(HEADER, 16, false), (HOLE, 512, true), (STATUS, 1, true)];
        driver.put_chain(RINGS, 64, 40, &pieces);
        (40, Some(STATUS))
    }),
    ("data that runs out of memory", |driver| {
        let pieces = [(HEADER, 16, false), ((8 << 20) - 256, 512, true), (STATUS, 1, true)];
        driver.put_chain(RINGS, 64, 40, &pieces);
        (40, Some(STATUS))
    }),
    ("data that wraps around the address space", |driver| {
        let pieces = [(HEADER, 16, false), (u64::MAX - 100, 512, true), (STATUS, 1, true)];
        driver.put_chain(RINGS, 64, 40, &pieces);
        (40, Some(STATUS))
    }),
    ("a header outside memory", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(HOLE, 16, false), (STATUS, 1, true)]);
        (40, Some(STATUS))
    }),
    ("a status byte outside memory", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(HEADER, 16, false), (HOLE, 1, true)]);
        (40, None)
    }),
    ("no status byte", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(HEADER, 16, false), (DATA, 512, false)]);
        (40, None)
    }),
    ("a status descriptor without bytes", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(HEADER, 16, false), (STATUS, 0, true)]);
        (40, None)
    }),
    ("a short header", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(HEADER, 15, false), (STATUS, 1, true)]);
        (40, Some(STATUS))
    }),
    ("a header after the status byte", |driver| {
        driver.put_chain(RINGS, 64, 40, &[(STATUS, 1, true), (HEADER, 16, false)]);
        (40, Some(STATUS))
    }),
    ("an indirect table in an indirect table", |driver| {
        driver.put(RINGS, 40, TABLE, 32, INDIRECT, 0);
        driver.put(TABLE, 0, HEADER, 16, NEXT, 1);
        driver.put(TABLE, 1, TABLE, 32, INDIRECT, 0);
        (40, None)
    }),
    ("an indirect table of a length that fits no descriptors", |driver| {
        driver.put(RINGS, 40, TABLE, 33, INDIRECT, 0);
        driver.put_chain(TABLE, 64, 0, &[(HEADER, 16, false), (STATUS, 1, true)]);
        (40, None)
    }),
    ("an empty indirect table", |driver| {
        driver.put(RINGS, 40, TABLE, 0, INDIRECT, 0);
        (40, None)
    }),
    ("more than 4 GiB", |driver| {
        let pieces =
            [(HEADER, 16, false), (0, u32::MAX, true), (0, u32::MAX, true), (STATUS, 1, true)];
        driver.put_chain(RINGS, 64, 40, &pieces);
        (40, None)
    }),
];

#[test]
fn every_malformed_chain_comes_back_and_the_next_request_is_served() {
    for (what, make) in MALFORMED {
        let mut bench = bench(Options::default());
        bench.driver.write(HEADER, &header(IN, 0));
        bench.driver.write(STATUS, &[UNTOUCHED]);
        let (head, status) = make(&mut bench.driver);
        bench.driver.offer(head);
        bench.run();
        assert_eq!(bench.driver.used(), [(head, 0)], "{what}");
        let expected = if status.is_some() { 1 } else { UNTOUCHED };
        assert_eq!(bench.driver.read(STATUS, 1), [expected], "{what}");
        assert!(!was_signalled(&bench.error), "{what}: the ring itself is sound");
        bench.assert_serves();
    }
}

#[test]
fn a_chain_longer_than_the_kernels_limit_is_served() {
    let mut bench = bench(Options::default());
    let pieces = 2504;
    bench.driver.write(HEADER, &header(IN, 0));
    bench.driver.write(STATUS, &[UNTOUCHED]);
    let mut chain = vec![(HEADER, 16, false)];
    // Every piece an eighth of a sector, in reverse order in memory.
    chain.extend((0..pieces).map(|n| (DATA + (pieces - 1 - n) * 64, 64, true)));
    chain.push((STATUS, 1, true));
    bench.driver.send_indirect(TABLE, &chain);
    bench.run();
    assert_eq!(bench.driver.used(), [(0, pieces as u32 * 64 + 1)]);
    assert_eq!(bench.driver.read(STATUS, 1), [0]);
    for n in 0..pieces {
        assert_eq!(bench.driver.read(DATA + (pieces - 1 - n) * 64, 1), [pattern(n * 64)]);
    }
}

#[test]
fn writes_are_durable_before_they_are_answered_where_nobody_flushes() {
    for (has_flush, write_back, through) in
        [(true, true, false), (true, false, true), (false, true, true), (false, false, true)]
    {
        let mut bench = bench(Options { has_flush, ..Options::default() });
        bench.device.set_write_back(write_back);
        bench.disk.start_trace();
        bench.driver.write(DATA, &segment(40, 8, 0));
        for (kind, len) in [(OUT, 512), (WRITE_ZEROES, 16), (DISCARD, 16)] {
            assert_eq!(bench.request(kind, 0, &[(DATA, len, false)]), 0);
            let unsynced = bench.disk.unsynced_sectors();
            assert_eq!(unsynced == 0, through, "{kind} {has_flush} {write_back}");
        }
        assert_eq!(bench.submitted(Purpose::SyncData), if through { 3 } else { 0 });
        assert_eq!(bench.request(IN, 0, &[(DATA, 512, true)]), 0);
        assert_eq!(bench.submitted(Purpose::SyncData), 0, "reading changes nothing");
        assert_eq!(bench.request(FLUSH, 0, &[]), 0);
        assert_eq!(bench.disk.unsynced_sectors(), 0, "a flush is a flush");
    }
}

#[test]
fn a_failing_disk_fails_requests_and_no_more() {
    let mut bench = bench(Options::default());
    let enospc = 28;
    bench.driver.write(DATA, &[1; 512]);
    for (kind, data) in [
        (IN, (DATA, 512, true)),
        (OUT, (DATA, 512, false)),
        (WRITE_ZEROES, (DATA + 4096, 16, false)),
    ] {
        bench.driver.write(DATA + 4096, &segment(1, 1, 0));
        bench.faults.add(Rule::fail(bench.faults.count() + 1, enospc));
        assert_eq!(bench.request(kind, 0, &[data]), 1, "{kind}");
        bench.faults.clear();
        assert_eq!(bench.request(kind, 0, &[data]), 0, "{kind}");
    }
    bench.assert_serves();
    assert_eq!(bench.worker.context().stats.errors.get(), 3);
}

#[test]
fn flushes_that_come_together_are_one_and_are_answered_together() {
    for fails in [false, true] {
        let mut bench = bench(Options::default());
        bench.disk.start_trace();
        if fails {
            bench.faults.add(Rule::fail(bench.faults.count() + 1, 5));
        }
        bench.driver.write(HEADER, &header(FLUSH, 0));
        bench.driver.write(STATUS, &[UNTOUCHED; 8]);
        for n in 0..8 {
            bench.driver.send(&[(HEADER, 16, false), (STATUS + n, 1, true)]);
        }
        let mut answers = Vec::new();
        while bench.worker.turn().any() {
            answers.extend(Some(bench.driver.used().len()).filter(|&answered| answered > 0));
        }
        assert_eq!(answers.iter().sum::<usize>(), 8, "failing: {fails}");
        assert_eq!(bench.driver.read(STATUS, 8), [u8::from(fails); 8]);
        if !fails {
            assert_eq!(bench.submitted(Purpose::SyncData), 1);
            assert_eq!(answers, [8], "the guest is told once");
        }
    }
}
