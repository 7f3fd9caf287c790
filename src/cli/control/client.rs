//! One operator's connection: lines in, lines out, and neither is waited for.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::worker::poller::send_now;

/// Most bytes of a line, its end included.
pub(super) const MAX_LINE: usize = 64 << 10;
/// Most bytes taken at once, so that one operator's calls do not keep front-ends waiting for long.
const CHUNK: usize = 4 << 10;

/// What an operator's connection is good for after it was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// More calls.
    Calls,
    /// Nothing before it has read what it was answered.
    Room,
    /// Nothing: it has gone, or must.
    End,
}

/// A connected operator.
pub(super) struct Client {
    socket: UnixStream,
    /// What it has said and was not served yet.
    inbox: Vec<u8>,
    /// What it was answered and has not read yet.
    outbox: Vec<u8>,
    /// It says nothing more.
    finished: bool,
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Client {
    pub(super) fn new(socket: UnixStream) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, inbox: Vec::new(), outbox: Vec::new(), finished: false })
    }

    /// Serves what can be served now; `answer` gives the line that answers a line. While the client
    /// does not read its answers no further call of it is served.
    pub(super) fn pump(
        &mut self,
        answer: &mut dyn FnMut(&[u8]) -> Option<Vec<u8>>,
        too_long: &dyn Fn() -> Vec<u8>,
    ) -> Next {
        if let Some(next) = self.serve_lines(answer) {
            return next;
        }
        if !self.finished && !self.read() {
            return Next::End;
        }
        if let Some(next) = self.serve_lines(answer) {
            return next;
        }
        if self.inbox.len() >= MAX_LINE {
            // Where the next call begins is not known. Whoever reads the answer learns why.
            self.outbox = too_long();
            self.send();
            return Next::End;
        }
        if self.finished { Next::End } else { Next::Calls }
    }

    /// Takes a chunk of what has arrived; returns whether the connection is sound.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        match self.socket.read(&mut chunk) {
            Ok(0) => {
                self.finished = true;
                // A last line need not have an end.
                if !self.inbox.is_empty() {
                    self.inbox.push(b'\n');
                }
                true
            }
            Ok(len) => {
                self.inbox.extend_from_slice(&chunk[..len]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Serves whole lines as long as their answers are taken.
    fn serve_lines(&mut self, answer: &mut dyn FnMut(&[u8]) -> Option<Vec<u8>>) -> Option<Next> {
        loop {
            if !self.send() {
                return Some(Next::End);
            }
            if !self.outbox.is_empty() {
                return Some(Next::Room);
            }
            let end = self.inbox.iter().position(|byte| *byte == b'\n')?;
            let line: Vec<u8> = self.inbox.drain(..=end).collect();
            let line = line.trim_ascii();
            if !line.is_empty() {
                self.outbox = answer(line).unwrap_or_default();
            }
        }
    }

    /// Sends what there is room for; returns whether the connection is sound.
    fn send(&mut self) -> bool {
        while !self.outbox.is_empty() {
            match send_now(&self.socket, &self.outbox) {
                Ok(sent) => drop(self.outbox.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A client that echoes each line twice.
    fn pump(client: &mut Client) -> Next {
        let mut twice = |line: &[u8]| Some([line, line, b"\n"].concat());
        client.pump(&mut twice, &|| b"too long\n".to_vec())
    }

    fn pair() -> (UnixStream, Client) {
        let (left, right) = UnixStream::pair().expect("a pair");
        left.set_nonblocking(true).expect("not to wait");
        (left, Client::new(right).expect("a client"))
    }

    fn read_all(socket: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 1 << 16];
        while let Ok(len) = socket.read(&mut chunk) {
            if len == 0 {
                break;
            }
            bytes.extend_from_slice(&chunk[..len]);
        }
        bytes
    }

    #[test]
    fn lines_may_come_in_pieces_and_many_at_once() {
        let (mut peer, mut client) = pair();
        for piece in [&b"on"[..], b"e\r\n\n  \ntwo\nth", b"ree"] {
            peer.write_all(piece).expect("write");
            assert_eq!(pump(&mut client), Next::Calls);
        }
        assert_eq!(read_all(&mut peer), b"oneone\ntwotwo\n");
        peer.shutdown(std::net::Shutdown::Write).expect("the last word");
        assert_eq!(pump(&mut client), Next::End);
        drop(client);
        assert_eq!(read_all(&mut peer), b"threethree\n", "the end ends a line too");
    }

    #[test]
    fn a_client_that_does_not_read_is_not_served_and_loses_nothing() {
        let (mut peer, mut client) = pair();
        let line = [vec![b'x'; 999], vec![b'\n']].concat();
        let mut sent = 0;
        let next = loop {
            if peer.write_all(&line).is_ok() {
                sent += 1;
            }
            let next = pump(&mut client);
            if next != Next::Calls {
                break next;
            }
            assert!(sent < 100_000, "it is served without end");
        };
        assert_eq!(next, Next::Room);
        assert!(client.inbox.len() <= MAX_LINE && client.outbox.len() <= 2 * MAX_LINE);
        assert_eq!(pump(&mut client), Next::Room);
        let mut read = read_all(&mut peer).len();
        while read < sent * 1999 {
            assert_ne!(pump(&mut client), Next::End);
            read += read_all(&mut peer).len();
        }
        assert_eq!(read, sent * 1999);
    }

    #[test]
    fn a_line_without_end_is_cut_off() {
        let (mut peer, mut client) = pair();
        let mut next = Next::Calls;
        let mut sent = 0;
        while next == Next::Calls {
            sent += peer.write(&[b'x'; 4096]).expect("write");
            next = pump(&mut client);
            assert!(sent <= MAX_LINE + 8192, "it is read for ever");
        }
        drop(client);
        assert_eq!(read_all(&mut peer), b"too long\n");
    }

    #[test]
    fn a_client_that_has_gone_is_done_with() {
        let (peer, mut client) = pair();
        drop(peer);
        assert_eq!(pump(&mut client), Next::End);
    }
}
