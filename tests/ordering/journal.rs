//! R20: what the redo journal has noted, held against the file after every step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_user_qcow2::qcow2::journal::{JOURNAL_WORDS, SharedWords};

use super::*;

/// Words of the header, those of them that matter here, and words of a record.
const HEADER_WORDS: usize = 8;
const CAPACITY: usize = 1;
const HEAD: usize = 5;
const RECORD_WORDS: usize = 6;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

#[derive(Debug)]
struct Words(Vec<AtomicU64>);

impl SharedWords for Words {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Acquire)
    }

    fn store(&self, index: usize, value: u64) {
        self.0[index].store(value, Ordering::Release);
    }
}

/// Where a guest cluster's bytes were and where they are.
#[derive(Debug)]
struct Note {
    sequence: u64,
    old: Option<u64>,
    new: Option<u64>,
}

/// Everything that was ever noted, by guest cluster.
struct Notes {
    words: Arc<Words>,
    next: u64,
    of: BTreeMap<u64, Vec<Note>>,
}

impl Notes {
    fn new(words: &Arc<Words>) -> Self {
        Self { words: Arc::clone(words), next: words.load(HEAD), of: BTreeMap::new() }
    }

    /// Reads what is new.
    fn read(&mut self) {
        loop {
            let slot = self.next % self.words.load(CAPACITY);
            let at = HEADER_WORDS + index(slot) * RECORD_WORDS;
            let [sequence, guest, new, _, old, _] =
                [0, 1, 2, 3, 4, 5].map(|word| self.words.load(at + word));
            if sequence != self.next {
                return;
            }
            let place = |entry: u64| Some(entry & OFFSET_MASK).filter(|at| *at != 0);
            let note = Note { sequence, old: place(old), new: place(new) };
            self.of.entry(guest).or_default().push(note);
            self.next += 1;
        }
    }

    /// Holds the rule against a file; returns how many changes were forgotten so far.
    fn hold(&self, replay: &Replay) -> usize {
        let (head, mut forgotten) = (self.words.load(HEAD), 0);
        let (durable, file) = (replay.map(), map(&replay.volatile));
        let found = |map: &[Option<u64>], guest: u64| map.get(index(guest)).copied().flatten();
        for (guest, notes) in &self.of {
            let kept = notes.partition_point(|note| note.sequence < head);
            forgotten += kept;
            let Some(first) = notes.get(kept) else {
                let last = notes.last().and_then(|note| note.new);
                let found = found(&durable.guest, *guest);
                assert_eq!(
                    found, last,
                    "of guest cluster {guest} a change was forgotten too early"
                );
                continue;
            };
            let found = found(&file.guest, *guest);
            let known = notes[kept..].iter().any(|note| note.new == found) || first.old == found;
            assert!(known, "guest cluster {guest} is at {found:x?}: {:x?}", &notes[kept..]);
        }
        let mut owners = BTreeMap::new();
        for (host, guest) in self.named(head) {
            let other = owners.insert(host, guest);
            assert_eq!(other, None, "guest cluster {guest} was given {host:#x}");
        }
        forgotten
    }

    /// The host clusters that the last records of guest clusters name, and whose they are.
    fn named(&self, head: u64) -> impl Iterator<Item = (u64, u64)> {
        let last = self.of.iter().filter_map(|(guest, notes)| Some((*guest, notes.last()?)));
        let left = last.filter(move |(_, note)| note.sequence >= head);
        left.filter_map(|(guest, note)| Some((note.new?, guest)))
    }

    /// An operation may not take what a record that is left names.
    fn spare(&self, replay: &Replay, event: &Event) {
        use Purpose as P;
        if !matches!(event.why, P::GuestDiscard | P::L2Init | P::RefblockInit) {
            return;
        }
        for (host, guest) in self.named(self.words.load(HEAD)) {
            let touches = event.at < host + replay.cluster && host < event.at + event.len;
            assert!(!touches, "{event:?} takes {host:#x} from guest cluster {guest}");
        }
    }
}

#[test]
fn r20_changes_are_noted_until_they_are_durable() {
    let name = "r20_changes_are_noted_until_they_are_durable";
    let mix = Mix { read: 1, write: 8, zero: 3, discard: 4, flush: 2, longest: 60 };
    let layouts = [
        Layout::new(9, 192, Kind::Plain),
        Layout::new(12, 320, Kind::Plain),
        Layout::new(9, 192, Kind::Empty),
    ];
    let (mut forgotten, mut looks) = (0, 0);
    for (number, layout) in (0..).zip(layouts) {
        let mut made = layout.make(1);
        for seed in seeds(8) {
            let _repeat = Repeat::new("ordering", name, seed);
            let disk = made.disk();
            disk.start_trace();
            let engine = disk.engine(0, seed);
            engine.set_hold(3);
            let engine: Rc<dyn Engine> = Rc::new(engine);
            let image = open(engine.as_ref(), &disk, false).expect("open");
            let words = Arc::new(Words((0..JOURNAL_WORDS).map(|_| AtomicU64::new(0)).collect()));
            let attached = image.attach_journal(engine.as_ref(), Arc::<Words>::clone(&words));
            assert_eq!(block_on(engine.as_ref(), attached).expect("nothing is left"), 0);
            let (mut notes, mut replay) = (Notes::new(&words), Replay::new(&mut made));
            let sectors = Sectors::new(&made.tags);
            let engines = vec![Rc::clone(&engine)];
            let mut run = Run::new(image, engines, sectors, (seed + number, mix), (80, 6));
            loop {
                let goes_on = run.step();
                notes.read();
                for event in disk.take_trace().into_iter().filter(|event| event.file == FILE) {
                    replay.take(event, &mut |replay, event| notes.spare(replay, event));
                }
                forgotten += notes.hold(&replay);
                looks += 1;
                if !goes_on {
                    break;
                }
            }
            let detached = run.image().detach_journal(engine.as_ref());
            block_on(engine.as_ref(), detached).expect("a flush");
            for event in disk.take_trace().into_iter().filter(|event| event.file == FILE) {
                replay.take(event, &mut |_, _| {});
            }
            assert!(replay.volatile == disk.content(FILE), "the replay is the disk");
            assert_eq!(words.load(HEAD), notes.next, "nothing is left");
            notes.hold(&replay);
        }
    }
    println!("{name}: {forgotten} forgotten changes in {looks} looks");
    assert!(forgotten > 1000, "hardly anything was forgotten: {forgotten}");
}
