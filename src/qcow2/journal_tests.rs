//! A journal that is killed at every store, wraps around, is full, or lies.

use super::*;
use crate::sync::Mutex;

/// Words in this process's memory, and what they were before each store.
#[derive(Debug)]
struct Words {
    words: Vec<AtomicU64>,
    history: Mutex<Option<Vec<Vec<u64>>>>,
}

impl Words {
    fn of(records: usize) -> Arc<Self> {
        Self::with(&vec![0; HEADER_WORDS + records * RECORD_WORDS])
    }

    fn with(words: &[u64]) -> Arc<Self> {
        let words = words.iter().map(|word| AtomicU64::new(*word)).collect();
        Arc::new(Self { words, history: Mutex::new(None) })
    }

    fn copy(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// What a kill at any store of `work` may leave, the last one being all of it.
    fn kills(&self, work: impl FnOnce()) -> Vec<Vec<u64>> {
        *crate::sync::lock(&self.history) = Some(Vec::new());
        work();
        let mut kills = crate::sync::lock(&self.history).take().expect("it was begun");
        kills.push(self.copy());
        kills
    }
}

impl SharedWords for Words {
    fn len(&self) -> usize {
        self.words.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    fn store(&self, index: usize, value: u64) {
        if let Some(history) = &mut *crate::sync::lock(&self.history) {
            history.push(self.copy());
        }
        self.words[index].store(value, Ordering::Release);
    }
}

const IMAGE: Identity = [1, 2, 3];

fn change(number: u64) -> Change {
    let entry = |word| L2Entry { word, bitmap: word ^ 5 };
    Change { guest: number, old: entry(number * 2), new: entry(number * 2 + 1) }
}

/// A journal that was attached for the first time.
fn fresh(words: &Arc<Words>) -> Journal {
    let left = read(&**words, IMAGE).expect("zeros");
    assert_eq!(left, Left { changes: Vec::new(), next: 1 });
    Journal::begin(Arc::<Words>::clone(words), IMAGE, &left).expect("room")
}

/// The numbers of the changes that a successor finds.
fn found(words: &[u64]) -> Vec<u64> {
    let left = read(&*Words::with(words), IMAGE).expect("a journal");
    for change in &left.changes {
        assert_eq!(*change, self::change(change.guest), "a torn record");
    }
    left.changes.iter().map(|change| change.guest).collect()
}

#[test]
fn a_kill_leaves_what_was_noted_and_nothing_else() {
    let words = Words::of(1024);
    let journal = fresh(&words);
    for number in 0..3000 {
        // So that the array wraps around, with a few records at a time that are not covered.
        let first = u64::saturating_sub(number, 5);
        let before: Vec<u64> = (first..number).collect();
        let after: Vec<u64> = (first..=number).collect();
        let check = number % 97 == 0 || (1020..1030).contains(&number);
        let kills = words.kills(|| journal.append(&change(number)));
        for (step, kill) in kills.iter().enumerate().filter(|_| check) {
            let whole = step == kills.len() - 1;
            assert_eq!(found(kill), if whole { after.clone() } else { before.clone() });
        }
        let mark = journal.tail().saturating_sub(5);
        let kills = words.kills(|| journal.trim(mark));
        if check {
            let left: Vec<u64> = after[after.len().saturating_sub(5)..].to_vec();
            assert_eq!(found(&kills[0]), after);
            assert_eq!(found(kills.last().expect("one")), left);
        }
    }
}

#[test]
fn a_kill_while_a_successor_begins_leaves_the_old_changes_or_none() {
    for old in [IMAGE, [7, 8, 9]] {
        for count in [0, 1, 1024] {
            let words = Words::of(1024);
            let left = read(&*words, old).expect("zeros");
            let journal = Journal::begin(Arc::<Words>::clone(&words), old, &left).expect("room");
            (0..count).for_each(|number| journal.append(&change(number)));
            if old != IMAGE && count > 0 {
                let error = read(&*words, IMAGE).expect_err("another image's");
                assert!(error.to_string().contains("another image"), "{error}");
                continue;
            }
            let left = read(&*words, IMAGE).expect("a journal");
            let begin = || {
                let next = Journal::begin(Arc::<Words>::clone(&words), IMAGE, &left);
                assert_eq!(next.expect("room").tail(), count + 1);
            };
            for kill in words.kills(begin) {
                let found = found(&kill);
                assert!(found.is_empty() || found.len() as u64 == count, "{found:?}");
            }
            assert!(found(&words.copy()).is_empty());
        }
    }
    let words = Words::of(1024);
    for kill in words.kills(|| drop(fresh(&words))) {
        assert!(found(&kill).is_empty());
    }
}

#[test]
fn a_full_journal_has_room_when_it_was_trimmed() {
    let words = Words::of(1500);
    let journal = fresh(&words);
    for round in 0..3 {
        let mark = journal.tail();
        assert!(journal.has_room(1500) && !journal.has_room(1501));
        (0..1500).for_each(|number| journal.append(&change(round * 1500 + number)));
        assert!(!journal.has_room(1) && journal.has_room(0));
        let all: Vec<u64> = (round * 1500..(round + 1) * 1500).collect();
        assert_eq!(found(&words.copy()), all);
        journal.trim(mark + 10);
        journal.trim(mark);
        assert!(journal.has_room(10) && !journal.has_room(11));
        journal.trim(journal.tail());
        assert!(found(&words.copy()).is_empty());
    }
}

#[test]
fn whatever_the_memory_holds_is_read_in_bounds() {
    let mut random = fastrand::Rng::with_seed(7);
    let words = Words::of(1024);
    let journal = fresh(&words);
    (0..1500).for_each(|number| {
        journal.append(&change(number));
        journal.trim(number.saturating_sub(700));
    });
    let good = words.copy();
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..random.usize(1..4) {
            let at =
                if random.bool() { random.usize(..HEADER_WORDS) } else { random.usize(..4096) };
            let values = [0, 1, u64::MAX, u64::MAX >> 1, random.u64(..), random.u64(..2000)];
            bad[at] = random.choice(values).expect("some");
        }
        if let Ok(left) = read(&*Words::with(&bad), IMAGE) {
            assert!(left.changes.len() <= 1024 && left.next > 0 && left.next < u64::MAX);
            let journal = Journal::begin(Words::with(&bad), IMAGE, &left).expect("room");
            (0..1024).for_each(|number| journal.append(&change(number)));
            assert!(!journal.has_room(1));
        }
    }
    for length in [0, 1, HEADER_WORDS, HEADER_WORDS + 1023 * RECORD_WORDS] {
        read(&*Words::with(&good[..length]), IMAGE).expect_err("too short");
    }
    read(&*Words::of(1500), [0; 3]).expect("another size of nothing");
}

#[test]
fn a_journal_that_was_forgotten_holds_nothing() {
    let words = Words::of(1024);
    let journal = fresh(&words);
    (0..10).for_each(|number| journal.append(&change(number)));
    forget(&*words);
    let left = read(&*words, IMAGE).expect("nobody's");
    assert_eq!(left, Left { changes: Vec::new(), next: 1 });
    for kill in words.kills(|| drop(fresh(&words))) {
        assert!(found(&kill).is_empty());
    }
    assert!(found(&words.copy()).is_empty());
}
