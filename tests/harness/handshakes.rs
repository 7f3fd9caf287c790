//! Handshakes of real front-ends, disturbed; and streams of bytes that were such handshakes once.
//!
//! What must hold is what holds for [`messages`](crate::messages), and more: whatever a front-end
//! has said and however it went, no thread is lost, its descriptors are closed, another front-end
//! whose guest is served meanwhile does not notice, and the next one writes and reads.

use std::os::fd::{AsRawFd, RawFd};

use crate::front_end::{Guest, REGIONS, region};
use crate::messages as m;
use crate::messages::{FrontEnd, Outcome, Service};

/// Most things that a front-end says.
const MOST_STEPS: usize = 150;
/// Queues that front-ends know of; two of them have rings in memory.
const QUEUES: u32 = 4;
const NEED_REPLY: u32 = 8;

/// A descriptor that comes with a message.
#[derive(Debug, Clone, Copy)]
enum Passed {
    Memory,
    Kick(usize),
    Call(usize),
    Error,
    Other(u8),
}

/// Bytes, and the descriptors that come with the first of them.
#[derive(Debug, Clone, Default)]
struct Chunk {
    bytes: Vec<u8>,
    files: Vec<Passed>,
}

/// What a front-end or its guest does.
#[derive(Debug, Clone)]
enum Step {
    Say(Chunk),
    /// The guest rings a queue's bell.
    Kick(usize),
    /// The front-end reads what it was answered.
    Read,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing more is sent, and answers are read to the last.
    Orderly,
    /// It is gone, with answers unread.
    Abrupt,
    /// It is gone in the middle of a message.
    Midway,
}

fn say(request: u32, flags: u32, payload: Vec<u8>, files: Vec<Passed>) -> Step {
    let mut bytes = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
    bytes.extend(payload);
    Step::Say(Chunk { bytes, files })
}

/// A front-end that is imitated.
struct Script {
    /// The flags of messages without an answer of their own.
    flags: u32,
    steps: Vec<Step>,
}

impl Script {
    fn ask(&mut self, request: u32) {
        self.steps.push(say(request, 1, Vec::new(), Vec::new()));
    }

    fn word(&mut self, request: u32, value: u64) {
        self.steps.push(say(request, self.flags, value.to_ne_bytes().to_vec(), Vec::new()));
    }

    fn tell(&mut self, request: u32) {
        self.steps.push(say(request, self.flags, Vec::new(), Vec::new()));
    }

    fn state(&mut self, request: u32, queue: u32, value: u32) {
        let payload = [queue, value].map(u32::to_ne_bytes).concat();
        let flags = if request == m::GET_VRING_BASE { 1 } else { self.flags };
        self.steps.push(say(request, flags, payload, Vec::new()));
    }

    fn file(&mut self, request: u32, queue: u32, file: Passed) {
        let payload = u64::from(queue).to_ne_bytes().to_vec();
        self.steps.push(say(request, self.flags, payload, vec![file]));
    }

    fn config(&mut self, size: u32, flags: u32) {
        let mut payload = [0, size, flags].map(u32::to_ne_bytes).concat();
        payload.resize(12 + size as usize, 0);
        self.steps.push(say(m::GET_CONFIG, 1, payload, Vec::new()));
    }

    fn addresses(&mut self, guest: &Guest, queue: u32) {
        let mut payload = [queue, 0].map(u32::to_ne_bytes).concat();
        for address in guest.addresses(queue as usize % 2).into_iter().chain([0]) {
            payload.extend(address.to_ne_bytes());
        }
        self.steps.push(say(m::SET_VRING_ADDR, self.flags, payload, Vec::new()));
    }

    fn memory_table(&mut self) {
        let mut payload = [REGIONS.len() as u32, 0].map(u32::to_ne_bytes).concat();
        REGIONS.iter().for_each(|part| payload.extend(region(*part)));
        let files = vec![Passed::Memory; REGIONS.len()];
        self.steps.push(say(m::SET_MEM_TABLE, self.flags, payload, files));
    }

    fn add_regions(&mut self) {
        for part in REGIONS {
            let payload = [vec![0; 8], region(part)].concat();
            self.steps.push(say(m::ADD_MEM_REG, 1 | NEED_REPLY, payload, vec![Passed::Memory]));
        }
    }

    fn kicks(&mut self) {
        self.steps.extend([Step::Kick(0), Step::Kick(1), Step::Read]);
    }

    /// What QEMU says until its guest's kernel runs, and at the guest's end.
    fn qemu(guest: &Guest) -> Vec<Step> {
        let mut script = Self { flags: 1, steps: Vec::new() };
        script.ask(m::GET_FEATURES);
        script.ask(15);
        script.word(m::SET_PROTOCOL_FEATURES, m::PROTOCOL);
        [17, 36].into_iter().for_each(|request| script.ask(request));
        script.tell(3);
        script.ask(m::GET_FEATURES);
        for queue in 0..2 {
            script.file(m::SET_VRING_CALL, queue, Passed::Call(queue as usize));
            script.file(m::SET_VRING_ERR, queue, Passed::Error);
        }
        script.config(57, 0);
        script.tell(34);
        script.word(m::SET_FEATURES, m::FEATURES);
        script.add_regions();
        for queue in 0..2 {
            script.state(m::SET_VRING_NUM, queue, Guest::SIZE.into());
            script.state(m::SET_VRING_BASE, queue, 0);
            script.addresses(guest, queue);
            script.file(m::SET_VRING_KICK, queue, Passed::Kick(queue as usize));
        }
        script.flags = 1 | NEED_REPLY;
        (0..QUEUES).for_each(|queue| script.state(m::SET_VRING_ENABLE, queue, 1));
        script.kicks();
        script.flags = 1;
        (0..QUEUES).for_each(|queue| script.state(m::SET_VRING_ENABLE, queue, 0));
        (0..2).for_each(|queue| script.state(m::GET_VRING_BASE, queue, 0));
        script.steps
    }

    /// What cloud-hypervisor says; every message wants an answer once that is possible.
    fn cloud_hypervisor(guest: &Guest) -> Vec<Step> {
        let mut script = Self { flags: 1, steps: Vec::new() };
        script.tell(3);
        script.ask(m::GET_FEATURES);
        script.ask(15);
        script.word(m::SET_PROTOCOL_FEATURES, m::PROTOCOL);
        script.flags = 1 | NEED_REPLY;
        script.ask(17);
        script.config(60, 1);
        script.word(m::SET_FEATURES, m::FEATURES);
        script.memory_table();
        (0..2).for_each(|queue| script.state(m::SET_VRING_NUM, queue, Guest::SIZE.into()));
        for queue in 0..2 {
            script.addresses(guest, queue);
            script.state(m::SET_VRING_BASE, queue, 0);
            script.file(m::SET_VRING_CALL, queue, Passed::Call(queue as usize));
            script.file(m::SET_VRING_KICK, queue, Passed::Kick(queue as usize));
        }
        (0..2).for_each(|queue| script.state(m::SET_VRING_ENABLE, queue, 1));
        script.kicks();
        for enabled in [0, 1] {
            (0..2).for_each(|queue| script.state(m::SET_VRING_ENABLE, queue, enabled));
        }
        script.steps
    }

    /// What the virtio-driver crate says: features before protocol features, a base of zero.
    fn virtio_driver(guest: &Guest) -> Vec<Step> {
        let mut script = Self { flags: 1, steps: Vec::new() };
        script.tell(3);
        script.ask(m::GET_FEATURES);
        script.word(m::SET_FEATURES, m::FEATURES);
        script.ask(15);
        script.word(m::SET_PROTOCOL_FEATURES, m::PROTOCOL);
        [17, 36].into_iter().for_each(|request| script.ask(request));
        script.config(60, 0);
        script.add_regions();
        for queue in 0..2 {
            script.state(m::SET_VRING_NUM, queue, Guest::SIZE.into());
            script.state(m::SET_VRING_BASE, queue, 0);
            script.addresses(guest, queue);
            script.file(m::SET_VRING_KICK, queue, Passed::Kick(queue as usize));
            script.file(m::SET_VRING_CALL, queue, Passed::Call(queue as usize));
            script.state(m::SET_VRING_ENABLE, queue, 1);
        }
        script.kicks();
        script.steps
    }

    /// Messages that belong to none of them, or to front-ends with more features.
    fn strange(random: &mut fastrand::Rng) -> Step {
        let request = random.choice([4, 6, 7, 20, 21, 25, 31, 32, 34, 38, 39, 40, 41, 42, 43, 45]);
        let len = random.choice([0usize, 8, 12, 16, 20, 40]).expect("a length");
        let payload = (0..len).map(|_| if random.bool() { 0 } else { random.u8(0..9) }).collect();
        let files = (0..random.usize(0..3)).map(|_| Passed::Other(random.u8(..))).collect();
        let flags = if random.bool() { 1 } else { 1 | NEED_REPLY };
        say(request.expect("a request"), flags, payload, files)
    }
}

fn script(guest: &Guest, random: &mut fastrand::Rng) -> Vec<Step> {
    match random.u8(0..3) {
        0 => Script::qemu(guest),
        1 => Script::cloud_hypervisor(guest),
        _ => Script::virtio_driver(guest),
    }
}

/// Puts a script out of order: swaps, repetitions, omissions, strange messages.
fn disorder(steps: &mut Vec<Step>, random: &mut fastrand::Rng) {
    match random.u8(0..4) {
        0 => {}
        1 => random.shuffle(steps),
        2 => {
            let (from, to) = (random.usize(0..steps.len()), random.usize(0..=steps.len()));
            random.shuffle(&mut steps[from.min(to)..from.max(to)]);
        }
        _ => {
            for _ in 0..random.usize(0..6) {
                let place = random.usize(1..steps.len());
                steps.swap(place - 1, place);
            }
        }
    }
    for _ in 0..random.usize(0..8) {
        let (from, to) = (random.usize(0..steps.len()), random.usize(0..=steps.len()));
        match random.u8(0..4) {
            0 => drop(steps.remove(from)),
            1 => steps.insert(to, Script::strange(random)),
            2 => steps.insert(to, Step::Kick(random.usize(0..2))),
            _ => steps.insert(to, steps[from].clone()),
        }
        if steps.is_empty() {
            break;
        }
    }
    for step in steps.iter_mut() {
        if let Step::Say(chunk) = step
            && random.u8(0..16) == 0
        {
            spoil(chunk, random);
        }
    }
    if random.u8(0..3) == 0 {
        steps.truncate(random.usize(0..=steps.len()));
    }
    steps.truncate(MOST_STEPS);
}

/// Changes one thing of a message: a number, the wish for an answer, its length, a descriptor.
fn spoil(chunk: &mut Chunk, random: &mut fastrand::Rng) {
    let words = chunk.bytes.len() / 4;
    let odd = [0, 1, 2, 3, 4, 5, 63, 64, 255, 256, 1024, 65535, 65536, u32::MAX];
    match random.u8(0..8) {
        0..4 if words > 3 => {
            let at = random.usize(3..words) * 4;
            let value: u32 = random.choice(odd).expect("a number");
            chunk.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        4 => chunk.bytes[4] ^= NEED_REPLY as u8,
        5 => {
            let len = random.usize(0..64);
            chunk.bytes.resize(12 + len, 0);
            chunk.bytes[8..12].copy_from_slice(&(len as u32).to_ne_bytes());
        }
        6 => drop(chunk.files.pop()),
        _ => chunk.files.push(Passed::Other(random.u8(..))),
    }
}

/// Changes, cuts, repeats and inserts bytes, and adds descriptors.
fn mutate(bytes: &mut Vec<u8>, files: &mut Vec<(usize, Passed)>, random: &mut fastrand::Rng) {
    let most = random.choice([1, 4, 12]).expect("a number");
    for _ in 0..random.usize(0..most) {
        let at = random.usize(0..=bytes.len());
        let end = (at + random.usize(0..40)).min(bytes.len());
        match random.u8(0..6) {
            0 => drop(bytes.splice(at..end, [])),
            1 => drop(bytes.splice(at..at, (0..random.usize(0..24)).map(|_| random.u8(..)))),
            2 => {
                let copy = bytes[at..end].to_vec();
                let to = random.usize(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            3 => files.insert(0, (at, Passed::Other(random.u8(..)))),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte =
                        if random.bool() { random.u8(..) } else { *byte ^ (1 << random.u8(0..8)) };
                }
            }
        }
    }
}

/// Makes one stream of all messages, changes bytes, and cuts it up anew.
fn stream(steps: Vec<Step>, random: &mut fastrand::Rng) -> Vec<Step> {
    let (mut bytes, mut files, mut kicks) = (Vec::new(), Vec::new(), Vec::new());
    let mut starts = Vec::new();
    for step in steps {
        match step {
            Step::Say(chunk) => {
                starts.push(bytes.len());
                files.extend(chunk.files.into_iter().map(|file| (bytes.len(), file)));
                bytes.extend(chunk.bytes);
            }
            Step::Kick(queue) => kicks.push((bytes.len(), queue)),
            Step::Read => {}
        }
    }
    mutate(&mut bytes, &mut files, random);
    // Descriptors come with the first byte of what is sent at once, so whether pieces end where
    // messages do makes a difference.
    let is_cut_anywhere = random.u8(0..3) == 0;
    let (mut steps, mut at) = (Vec::new(), 0);
    while at < bytes.len() && steps.len() < MOST_STEPS {
        let most = random.choice([1, 12, 20, 64, 4096]).expect("a length");
        let next = starts.iter().copied().find(|start| *start > at).unwrap_or(bytes.len());
        let any = at + random.usize(1..=most);
        let end = if is_cut_anywhere { any } else { next }.min(bytes.len());
        let inside = |place: usize| (at..end).contains(&place);
        let files = files.iter().filter(|(place, _)| inside(*place)).map(|(_, file)| *file);
        let chunk = Chunk { bytes: bytes[at..end].to_vec(), files: files.take(60).collect() };
        steps.push(Step::Say(chunk));
        let rung = kicks.iter().filter(|(place, _)| inside(*place));
        steps.extend(rung.map(|(_, queue)| Step::Kick(*queue)));
        if random.u8(0..8) == 0 {
            steps.push(Step::Read);
        }
        at = end;
    }
    steps
}

impl Service {
    fn descriptor(&self, file: Passed) -> RawFd {
        match file {
            Passed::Memory => self.hostile.file.as_raw_fd(),
            Passed::Kick(queue) => self.hostile.kick_end(queue % 2),
            Passed::Call(queue) => self.hostile.call_end(queue % 2),
            Passed::Error => self.hostile.error_end(),
            Passed::Other(choice) => self.menu.pick(choice),
        }
    }

    fn play(&self, front_end: &mut FrontEnd, steps: &[Step]) {
        for step in steps {
            let goes_on = match step {
                Step::Say(chunk) => {
                    let files: Vec<RawFd> =
                        chunk.files.iter().map(|file| self.descriptor(*file)).collect();
                    front_end.sent += 1;
                    front_end.put(&chunk.bytes, &files)
                }
                Step::Kick(queue) => {
                    self.hostile.kick(*queue);
                    true
                }
                Step::Read => front_end.drain(),
            };
            if !goes_on {
                break;
            }
        }
    }

    /// A handshake with mistakes, drawn from a seed.
    ///
    /// # Panics
    /// When something that must hold does not.
    pub fn handshake(&mut self, seed: u64) -> Outcome {
        let mut random = fastrand::Rng::with_seed(seed);
        self.hostile.reset();
        let mut steps = script(&self.hostile, &mut random);
        if random.u8(0..4) == 0 {
            // The guest reboots, or another one follows on the same connection.
            steps.extend(script(&self.hostile, &mut random));
        }
        disorder(&mut steps, &mut random);
        self.judge(&steps, seed, &mut random)
    }

    /// The bytes of a handshake, changed, cut and glued together anew.
    ///
    /// # Panics
    /// When something that must hold does not.
    pub fn stream(&mut self, seed: u64) -> Outcome {
        let mut random = fastrand::Rng::with_seed(seed);
        self.hostile.reset();
        let mut steps = script(&self.hostile, &mut random);
        if random.bool() {
            disorder(&mut steps, &mut random);
        }
        let steps = stream(steps, &mut random);
        self.judge(&steps, seed, &mut random)
    }

    /// Lets a front-end do all that, with others before, beside and after it.
    fn judge(&mut self, steps: &[Step], seed: u64, random: &mut fastrand::Rng) -> Outcome {
        let byte = seed as u8;
        let before = (random.u8(0..4) == 0).then(|| self.attach());
        if before.is_some() {
            self.assert_keeps(byte);
        }
        let mut front_end = self.connect();
        self.play(&mut front_end, steps);
        if let Some(mut before) = before {
            assert_eq!(self.hostile.used(), 0, "two guests are served at once");
            self.assert_keeps(byte ^ 0x55);
            before.hang_up();
        }
        // It may still be there when the next one comes.
        let beside = (random.u8(0..4) == 0).then(|| self.attach());
        let ends = [End::Orderly, End::Orderly, End::Abrupt, End::Midway];
        match random.choice(ends).expect("an end") {
            End::Orderly => front_end.hang_up(),
            End::Abrupt => {}
            End::Midway => drop(front_end.put(&[8, 0, 0, 0, 1, 0, 0, 0, 8], &[])),
        }
        let (sent, answered) = (front_end.sent, front_end.answered);
        drop(front_end);
        let mut next = beside.unwrap_or_else(|| self.attach());
        self.assert_keeps(byte ^ 0xaa);
        next.hang_up();
        drop(next);
        let served = self.hostile.used();
        self.assert_all_closed();
        Outcome { sent, answered, served }
    }
}
