//! R21 of `src/qcow2/ORDERING.md`, held against traces of changes of the header.

use common::check::check_interrupted;
use common::images::{IMAGE, Kind, Layout};
use common::replay::{Replay, apply};
use common::seeds::{Repeat, seeds};
use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::mem::{Effect, Event};

use crate::cuts::copy;
use crate::edits::{Edit, OTHER, headers, long_name, names, run, said};

const SECTOR: u64 = 512;

/// How often each part of the rule was looked at.
#[derive(Debug, Default)]
struct Looks {
    first: usize,
    behind: usize,
    freed: usize,
}

/// The durable image with the first sectors of a write.
fn torn(replay: &Replay, event: &Event, sectors: u64) -> Vec<u8> {
    let Effect::Write(bytes) = &event.effect else { panic!("a header is written: {event:?}") };
    let len = (SECTOR * sectors - event.at % SECTOR).min(event.len);
    let part = bytes[..usize::try_from(len).expect("small")].to_vec();
    let mut durable = replay.durable.clone();
    apply(&mut durable, &Event { len, effect: Effect::Write(part), ..event.clone() });
    durable
}

/// Holds one change against the rule; `states` are what the header says before and after all.
fn look(replay: &Replay, event: &Event, states: [&str; 2], looks: &mut Looks) {
    match event.why {
        Purpose::HeaderWrite if event.at < SECTOR => {
            looks.first += 1;
            assert!(event.at + event.len <= SECTOR, "{event:?} does not end in the first sector");
            let now = torn(replay, event, 1);
            let word = said(&now);
            assert!(states.contains(&word.as_str()), "{word} is neither of {states:?}");
            let report = check_interrupted(&now);
            assert!(report.corruptions.is_empty(), "what it names: {:?}", report.corruptions);
        }
        Purpose::HeaderWrite => {
            looks.behind += 1;
            for sectors in 1..=(event.at % SECTOR + event.len).div_ceil(SECTOR) {
                let now = torn(replay, event, sectors);
                assert_eq!(said(&now), said(&replay.durable), "the old header looks there");
            }
        }
        Purpose::RefblockWrite | Purpose::ReftableWrite | Purpose::GuestDiscard => {
            looks.freed += 1;
            let mut now = replay.durable.clone();
            apply(&mut now, event);
            let report = check_interrupted(&now);
            assert!(report.corruptions.is_empty(), "{:?}: {:?}", event.why, report.corruptions);
        }
        _ => {}
    }
}

fn hold(layout: Layout, edits: &[Edit], looks: &mut Looks) {
    let mut made = layout.make(5);
    for seed in seeds(2) {
        let test = "headers::r21_a_header_changes_one_sector_at_a_time";
        let _repeat = Repeat::new("offline", test, seed);
        let disk = made.disk();
        disk.add(OTHER, vec![0; layout.sectors * 512]);
        disk.add(long_name(), Vec::new());
        let files = disk.files();
        let place = files.iter().position(|(name, _)| name.as_os_str() == IMAGE);
        let file = u32::try_from(place.expect("the image")).expect("few files");
        let mut replay = Replay::new(&mut made);
        for what in edits {
            let whole = copy(&disk);
            run(&whole, what);
            let state = |disk: &vhost_user_qcow2::storage::mem::MemDisk| {
                disk.look(IMAGE, said).expect("the image")
            };
            let (before, after) = (state(&disk), state(&whole));
            disk.start_trace();
            run(&disk, what);
            for event in disk.take_trace().into_iter().filter(|event| event.file.0 == file) {
                replay.take(event, &mut |replay, event| {
                    look(replay, event, [&before, &after], looks);
                });
            }
            assert_eq!(said(&replay.durable), after, "all is durable at the end");
        }
    }
}

#[test]
fn r21_a_header_changes_one_sector_at_a_time() {
    let mut looks = Looks::default();
    for bits in [10, 12, 16] {
        hold(Layout::new(bits, 150, Kind::Preallocated("full")), &names(), &mut looks);
    }
    hold(Layout::new(9, 150, Kind::Plain), &headers(), &mut looks);
    hold(Layout::new(12, 150, Kind::Snapshots), &headers(), &mut looks);
    println!("{looks:?}");
    let Looks { first, behind, freed } = looks;
    assert!(first > 50 && behind > 5 && freed > 20, "the rule was hardly ever tried: {looks:?}");
}
