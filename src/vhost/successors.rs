//! Whoever wants to take the disk over, until it is sure that they do.
//!
//! A successor says hello and is told what guests see of the disk, so that one which would show
//! them another disk, or does not know this version, can go again; guests notice nothing of that.
//! Only when it says that it wants the disk is it worth to stop a ring.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::vhost::listen::Listener;
use crate::worker::poller::{Poller, Trigger, peek, send_now};

/// What a successor says first, whatever its version is.
pub const HELLO: [u8; 16] = *b"vhost-qcow2 take";
/// What it says when it wants the disk.
pub const TAKE: u8 = b'T';
/// How long the next word of a successor keeps others from trying.
const PATIENCE: Duration = Duration::from_secs(10);

const LISTENER: u64 = 0;
const CANDIDATE: u64 = 1;

/// One who may become the successor.
#[derive(Debug)]
struct Candidate {
    socket: UnixStream,
    /// It was told about the disk.
    greeted: bool,
    since: Instant,
}

/// What one is told who says hello, from the number of worker threads that run.
pub type Greeting<'a> = Box<dyn Fn(usize) -> io::Result<Vec<u8>> + 'a>;

/// Who wants to take the disk over.
pub struct Successors<'a> {
    listener: &'a Listener,
    greeting: Greeting<'a>,
    poller: Poller,
    /// One at a time: the next who comes takes its place if it has been silent for long.
    candidate: Option<Candidate>,
}

impl std::fmt::Debug for Successors<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Successors").field("candidate", &self.candidate).finish_non_exhaustive()
    }
}

impl AsRawFd for Successors<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }
}

impl<'a> Successors<'a> {
    /// Those who connect to `listener`, and what they are told.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(listener: &'a Listener, greeting: Greeting<'a>) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(listener, LISTENER, Trigger::Level)?;
        Ok(Self { listener, greeting, poller, candidate: None })
    }

    /// One who wants the disk now, of which so many threads work. Nobody is waited for.
    pub(super) fn look(&mut self, workers: usize) -> Option<UnixStream> {
        let ready: Vec<u64> = self.poller.wait(0).ok()?.collect();
        // One who has gone is not in the way of the next.
        let wanted = self.attend(workers);
        if wanted.is_some() || !ready.contains(&LISTENER) {
            return wanted;
        }
        if let Err(error) = self.accept() {
            tracing::error!("a successor cannot be accepted: {error}");
        }
        self.attend(workers)
    }

    /// Serves the candidate; gives it if it wants the disk.
    fn attend(&mut self, workers: usize) -> Option<UnixStream> {
        let mut candidate = self.candidate.take()?;
        match self.hear(&mut candidate, workers) {
            Ok(None) => self.candidate = Some(candidate),
            Ok(Some(true)) => {
                self.poller.remove(&candidate.socket);
                return Some(candidate.socket);
            }
            // It has gone.
            Ok(Some(false)) => self.poller.remove(&candidate.socket),
            Err(error) => {
                self.poller.remove(&candidate.socket);
                tracing::warn!("somebody who may have wanted to take over is let go: {error}");
            }
        }
        None
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(socket) = self.listener.accept()? else { return Ok(()) };
        if let Some(old) = &self.candidate {
            if old.since.elapsed() < PATIENCE && old.greeted {
                tracing::warn!("two successors at a time: the second one is sent away");
                return Ok(());
            }
            self.poller.remove(&old.socket);
        }
        self.poller.add(&socket, CANDIDATE, Trigger::Edge)?;
        self.candidate = Some(Candidate { socket, greeted: false, since: Instant::now() });
        Ok(())
    }

    /// Whether a candidate wants the disk, if it has said so.
    fn hear(&self, candidate: &mut Candidate, workers: usize) -> io::Result<Option<bool>> {
        loop {
            let socket = &candidate.socket;
            let length = if candidate.greeted { 1 } else { HELLO.len() };
            let mut bytes = [0; HELLO.len()];
            let seen = match peek(socket, &mut bytes[..length]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                seen => seen?.len,
            };
            let strange = || io::Error::other("it is no daemon");
            if seen == 0 {
                return Ok(Some(false));
            }
            let wanted: &[u8] = if candidate.greeted { &[TAKE] } else { &HELLO };
            if !wanted.starts_with(&bytes[..seen]) {
                return Err(strange());
            }
            if seen < length {
                return Ok(None);
            }
            io::Read::read_exact(&mut &candidate.socket, &mut bytes[..length])?;
            if candidate.greeted {
                return Ok(Some(true));
            }
            let greeting = (self.greeting)(workers)?;
            if send_now(socket, &greeting)? < greeting.len() {
                return Err(strange());
            }
            candidate.greeted = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn wait(successors: &mut Successors<'_>) -> Option<UnixStream> {
        (0..10).find_map(|_| successors.look(7))
    }

    #[test]
    fn only_who_knows_the_words_gets_the_disk() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).expect("listen");
        let greeting = Box::new(|workers| Ok(format!("greeting {workers}").into_bytes()));
        let mut successors = Successors::new(&listener, greeting).expect("wait");
        assert!(wait(&mut successors).is_none());
        let connect = || UnixStream::connect(&path).expect("connect");
        for words in [&b""[..], b"x", b"vhost-qcow2 take!", b"vhost-qcow2 tale"] {
            let mut stranger = connect();
            stranger.write_all(words).expect("write");
            assert!(wait(&mut successors).is_none(), "{words:?}");
        }
        let mut gone = connect();
        gone.write_all(&HELLO).expect("write");
        assert!(wait(&mut successors).is_none());
        gone.read_exact(&mut [0; 10]).expect("the greeting");
        drop(gone);
        // It has gone when the next one comes.
        let mut next = connect();
        next.write_all(&HELLO[..5]).expect("write");
        assert!(wait(&mut successors).is_none());
        next.write_all(&HELLO[5..]).expect("write");
        assert!(wait(&mut successors).is_none());
        let mut told = [0; 10];
        next.read_exact(&mut told).expect("the greeting");
        assert_eq!(&told, b"greeting 7");
        // Another one does not get in between.
        let mut late = connect();
        late.write_all(&HELLO).expect("write");
        assert!(wait(&mut successors).is_none());
        // What it has said was not read.
        let end = late.read(&mut told).expect_err("it is sent away");
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        next.write_all(&[TAKE]).expect("write");
        assert!(wait(&mut successors).is_some());
        assert!(wait(&mut successors).is_none());
    }
}
