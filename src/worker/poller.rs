#![expect(unsafe_code, reason = "recvmsg, ioctl, poll and dup3 on borrowed descriptors")]
//! An epoll set that closes itself, and the questions about a socket that std cannot ask.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use epoll::{ControlOptions, Event, Events};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most events taken in one call; the others come with the next.
const BATCH: usize = 32;

/// Reads what is there, at most as many bytes as fit, and gives the first of the descriptors that
/// come with it; others are closed. The kernel fills the room up to a whole word: two descriptors
/// come where there was to be one.
///
/// # Errors
/// What the kernel answered.
pub fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut parts = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    let mut descriptors: [RawFd; 2] = [-1; 2];
    // SAFETY: the one part is all of `bytes`, which is borrowed for the whole call.
    let (taken, count) = unsafe { socket.recv_with_fds(&mut parts, &mut descriptors)? };
    // SAFETY: the kernel has just made these descriptors for us, and nobody else knows of them.
    let own = |fd: &RawFd| unsafe { File::from_raw_fd(*fd) };
    let files: Vec<File> = descriptors.iter().take(count).map(own).collect();
    Ok((taken, files.into_iter().next()))
}

/// An epoll set of descriptors, each with a number of the owner's choice.
#[derive(Debug)]
pub struct Poller {
    epoll: RawFd,
    events: Vec<Event>,
}

/// When a descriptor is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// As long as it is readable.
    Level,
    /// Once for each time that something arrives. An eventfd then needs no reading.
    Edge,
    /// As long as there is room to write; what arrives is not reported.
    Room,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let none = Event::new(Events::empty(), 0);
        Ok(Self { epoll: epoll::create(true)?, events: vec![none; BATCH] })
    }

    /// Watches a descriptor for something to read.
    ///
    /// # Errors
    /// When it cannot be watched, as a regular file cannot.
    pub fn add(&self, fd: &impl AsRawFd, number: u64, trigger: Trigger) -> io::Result<()> {
        let events = match trigger {
            Trigger::Level => Events::EPOLLIN,
            Trigger::Edge => Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLET,
            Trigger::Room => Events::EPOLLOUT,
        };
        let event = Event::new(events, number);
        epoll::ctl(self.epoll, ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    /// Stops watching a descriptor. Closing it is not enough when it was passed by another process,
    /// which still has it open.
    pub fn remove(&self, fd: &impl AsRawFd) {
        let none = Event::new(Events::empty(), 0);
        // The only failure is that it is not in the set.
        let _ = epoll::ctl(self.epoll, ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), none);
    }

    /// Sleeps until something is readable, at most `timeout_ms` milliseconds (-1: for ever), and
    /// tells the numbers of what is. A signal ends the sleep early.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<impl Iterator<Item = u64>> {
        let count = match epoll::wait(self.epoll, timeout_ms, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        Ok(self.events[..count].iter().map(|event| event.data))
    }
}

/// A set is readable while one of its descriptors is to be reported, so sets can be nested.
impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and there is no reason for one.
        let _ = epoll::close(self.epoll);
    }
}

/// What a look at the front of a stream socket's queue has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peeked {
    /// Bytes that were copied; 0 means that the peer has closed its end.
    pub len: usize,
    /// Whether descriptors come along with these bytes, or with those right behind them: the kernel
    /// looks one message too far when the first ends where the look does.
    pub descriptors: bool,
}

/// Copies what waits at the front of a socket's queue into `target` without taking it, and without
/// waiting.
///
/// # Errors
/// `WouldBlock` when there is nothing; else what the kernel answered.
pub fn peek(socket: &impl AsFd, target: &mut [u8]) -> io::Result<Peeked> {
    let mut part = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
    // SAFETY: a message header without name and control buffer is a valid one, and so are zeros in
    // its padding.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to one part, which is `target`; both outlive the call.
    let len = unsafe { libc::recvmsg(raw(&socket.as_fd()), &raw mut message, flags) };
    match usize::try_from(len) {
        // Without a control buffer the kernel says that it had to cut something off, and makes no
        // descriptors.
        Ok(len) => Ok(Peeked { len, descriptors: message.msg_flags & libc::MSG_CTRUNC != 0 }),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Sends what there is room for, without waiting, whatever the socket's own mode is: its file
/// description may be shared with somebody who changes it.
///
/// # Errors
/// `WouldBlock` when there is no room; else what the kernel answered.
pub fn send_now(socket: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (start, len) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: the range is that of `bytes`, which outlives the call.
    let sent = unsafe { libc::send(raw(&socket.as_fd()), start, len, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Makes the descriptor `old` one for what `new` is open on, and closes what it was.
///
/// # Errors
/// What the kernel answered.
pub fn replace(old: &impl AsRawFd, new: &impl AsFd) -> io::Result<()> {
    // SAFETY: both descriptors are open and stay so; the number of the old one goes on being its
    // owner's to close.
    let result = unsafe { libc::dup3(raw(&new.as_fd()), old.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many bytes wait in a socket's queue.
///
/// # Errors
/// What the kernel answered.
pub fn unread(socket: &impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the given address.
    let result = unsafe { libc::ioctl(raw(&socket.as_fd()), libc::FIONREAD, &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Whether the peer of a socket will say nothing more than what waits already.
pub fn is_hung_up(socket: &impl AsFd) -> bool {
    let (fd, events) = (raw(&socket.as_fd()), libc::POLLRDHUP);
    let mut question = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: there is one question, which lives across the call; it does not wait.
    let answers = unsafe { libc::poll(&raw mut question, 1, 0) };
    answers > 0
}

/// Whether something can be read, or the other end is closed, within so many milliseconds.
pub fn is_readable(source: &impl AsFd, timeout_ms: i32) -> bool {
    let (fd, events) = (raw(&source.as_fd()), libc::POLLIN);
    let mut question = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: there is one question, which lives across the call.
    let answers = unsafe { libc::poll(&raw mut question, 1, timeout_ms) };
    answers > 0
}

/// Lets nobody wait who reads from a descriptor or writes to it.
///
/// # Errors
/// What the kernel answered.
pub fn set_nonblocking(target: &impl AsFd) -> io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: FIONBIO reads one int from the given address.
    let result = unsafe { libc::ioctl(raw(&target.as_fd()), libc::FIONBIO, &raw const yes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn raw(fd: &BorrowedFd<'_>) -> RawFd {
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::eventfd::EventFd;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    #[test]
    fn an_eventfd_that_is_never_read_ends_every_sleep() {
        let mut poller = Poller::new().expect("a poller");
        let event = EventFd::new(0).expect("an eventfd");
        poller.add(&event, 7, Trigger::Edge).expect("watch it");
        for _ in 0..3 {
            event.write(1).expect("signal it");
            assert_eq!(poller.wait(-1).expect("wait").collect::<Vec<_>>(), [7]);
            assert_eq!(poller.wait(0).expect("wait").count(), 0);
        }
        poller.remove(&event);
        event.write(1).expect("signal it");
        assert_eq!(poller.wait(0).expect("wait").count(), 0);
    }

    #[test]
    fn peeking_takes_nothing_and_tells_of_descriptors() {
        let (mut left, right) = UnixStream::pair().expect("a pair");
        let mut bytes = [0; 4];
        let nothing = peek(&right, &mut bytes).expect_err("nothing there");
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        left.write_all(b"plain!").expect("write");
        let seen = Peeked { len: 4, descriptors: false };
        assert_eq!(peek(&right, &mut bytes).expect("peek"), seen);
        assert_eq!((&bytes, unread(&right).expect("count")), (b"plai", 6));

        let (left, right) = UnixStream::pair().expect("a pair");
        let null = File::open("/dev/null").expect("open");
        left.send_with_fd(&b"fd!"[..], null.as_raw_fd()).expect("send");
        let seen = Peeked { len: 3, descriptors: true };
        assert_eq!(peek(&right, &mut bytes).expect("peek"), seen);
        let (len, file) = right.recv_with_fd(&mut bytes).expect("receive");
        assert!(len == 3 && file.is_some(), "the descriptor is still there");
        assert!(!is_hung_up(&right));
        drop(left);
        assert!(is_hung_up(&right));
        assert_eq!(peek(&right, &mut bytes).expect("peek").len, 0);
    }
}
