//! The twelve bytes before each message, looked at before the message is taken.
//!
//! The `vhost` crate reads a message and calls the session. What it would take for the end of the
//! connection although it is none (a request that it does not know, a descriptor where none
//! belongs) is found here first; requests that this daemon serves by itself belong here too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use crate::worker::poller::{is_hung_up, peek, receive, unread};

/// Bytes of a header: request, flags, size of the payload; all in the machine's byte order.
const HEADER_BYTES: usize = 12;
/// The version of the protocol, in the two lowest bits of the flags.
const VERSION: u32 = 1;
/// The flag of a reply.
const REPLY: u32 = 4;
/// The flag of a request whose sender waits for an answer.
const NEED_REPLY: u32 = 8;

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The request's number.
    pub(super) request: u32,
    flags: u32,
    size: u32,
    /// Descriptors that it does not take come with it, or with the message behind it.
    suspect: bool,
    /// Bytes that waited in the socket, this message and later ones.
    waiting: usize,
}

/// What to do with what waits in the socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: a whole message is not there yet.
    Wait,
    /// The peer has closed its end.
    End,
    /// Let the crate read the message and call the session.
    Serve(Header),
    /// Throw the message away and refuse it.
    Refuse(Header, &'static str),
    /// Give the connection up: where the next message begins is not known.
    Lost(&'static str),
}

/// Looks at the front of a socket's queue.
///
/// # Errors
/// What the kernel answered.
pub(super) fn look(socket: &UnixStream) -> io::Result<Next> {
    let mut bytes = [0; HEADER_BYTES];
    let seen = match peek(socket, &mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Next::Wait),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Next::End),
        seen => seen?,
    };
    match seen.len {
        0 => return Ok(Next::End),
        HEADER_BYTES => {}
        _ => return Ok(more(socket)),
    }
    let mut header = Header::parse(&bytes);
    if header.flags & !NEED_REPLY != VERSION || header.size as usize > MAX_MSG_SIZE {
        return Ok(Next::Lost("it sent something that is no vhost-user message"));
    }
    let unread = unread(socket)?;
    if unread < header.len() {
        return Ok(more(socket));
    }
    header.waiting = unread;
    let Some(request) = header.known() else {
        return Ok(Next::Refuse(header, "the request is unknown"));
    };
    header.suspect = seen.descriptors && !takes_descriptors(request);
    // A look that ends where a message does shows the descriptors of the next one too.
    if header.suspect && unread == header.len() {
        return Ok(Next::Refuse(header, "a descriptor came with a request that takes none"));
    }
    Ok(Next::Serve(header))
}

/// Sends a request without payload, or with one of a single word, as a front-end does.
pub(super) fn send(
    socket: &mut UnixStream,
    request: FrontendReq,
    value: Option<u64>,
) -> io::Result<()> {
    let payload = value.map(u64::to_ne_bytes);
    let size = if payload.is_some() { 8 } else { 0 };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 8);
    for word in [request as u32, VERSION, size] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload.iter().flatten());
    socket.write_all(&bytes)
}

/// The rest of a message will come, unless there is nobody to send it.
fn more(socket: &UnixStream) -> Next {
    if is_hung_up(socket) { Next::End } else { Next::Wait }
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        let [request, flags, size] = [0, 1, 2].map(|word| u32::from_ne_bytes(words[word]));
        Self { request, flags, size, suspect: false, waiting: 0 }
    }

    /// Bytes of the whole message.
    fn len(&self) -> usize {
        HEADER_BYTES + self.size as usize
    }

    /// The request, if it is one that has a name.
    pub(super) fn known(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.request).ok()
    }

    /// Whether the front-end waits for an answer although the request has none of its own.
    pub(super) fn needs_acknowledgement(&self) -> bool {
        self.flags & NEED_REPLY != 0 && !self.known().is_some_and(has_own_reply)
    }

    /// Whether the request has an answer of its own, which only the one who serves it can give.
    pub(super) fn has_own_reply(&self) -> bool {
        self.known().is_some_and(has_own_reply)
    }

    /// Whether the crate may have left the payload of an invalid message in the socket, so that it
    /// is not known where the next one begins. It does that when descriptors come with a message
    /// that takes none. With a front-end that waits for an acknowledgement there is no doubt,
    /// because nothing follows its message.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn may_be_cut(&self, socket: &UnixStream) -> io::Result<bool> {
        // What arrives meanwhile can only make it look worse than it is.
        Ok(self.suspect && self.size != 0 && unread(socket)? + HEADER_BYTES >= self.waiting)
    }

    /// Answers that there is nothing: how a failure to read the configuration space is told.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn reply_empty(&self, mut socket: &UnixStream) -> io::Result<()> {
        let words = [self.request, VERSION | REPLY, 0];
        socket.write_all(&words.map(u32::to_ne_bytes).concat())
    }

    /// Takes the message out of the socket; descriptors that come with it are closed.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn discard(&self, mut socket: &UnixStream) -> io::Result<()> {
        socket.read_exact(&mut vec![0; self.len()])
    }

    /// Takes the message out of the socket, with the descriptor that came with it; its payload
    /// means nothing. Further descriptors are closed.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn take_descriptor(&self, mut socket: &UnixStream) -> io::Result<Option<File>> {
        let mut bytes = vec![0; self.len()];
        let (taken, file) = receive(socket, &mut bytes)?;
        // What was sent in several pieces may be read in several pieces only.
        socket.read_exact(&mut bytes[taken..])?;
        Ok(file)
    }

    /// Answers whether the request was carried out: 0 is success.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn acknowledge(&self, mut socket: &UnixStream, failure: u64) -> io::Result<()> {
        let mut reply = Vec::with_capacity(HEADER_BYTES + 8);
        for word in [self.request, VERSION | REPLY, 8] {
            reply.extend(word.to_ne_bytes());
        }
        reply.extend(failure.to_ne_bytes());
        socket.write_all(&reply)
    }
}

fn takes_descriptors(request: FrontendReq) -> bool {
    use FrontendReq as R;
    matches!(
        request,
        R::SET_MEM_TABLE
            | R::SET_LOG_BASE
            | R::SET_LOG_FD
            | R::SET_VRING_KICK
            | R::SET_VRING_CALL
            | R::SET_VRING_ERR
            | R::SET_BACKEND_REQ_FD
            | R::SET_INFLIGHT_FD
            | R::ADD_MEM_REG
            | R::REM_MEM_REG
            | R::SET_DEVICE_STATE_FD
            | R::GPU_SET_SOCKET
    )
}

fn has_own_reply(request: FrontendReq) -> bool {
    use FrontendReq as R;
    matches!(
        request,
        R::GET_FEATURES
            | R::GET_PROTOCOL_FEATURES
            | R::GET_QUEUE_NUM
            | R::GET_VRING_BASE
            | R::GET_CONFIG
            | R::GET_MAX_MEM_SLOTS
            | R::GET_INFLIGHT_FD
            | R::GET_STATUS
            | R::GET_SHARED_OBJECT
            | R::GET_SHMEM_CONFIG
            | R::SET_LOG_BASE
            | R::SET_DEVICE_STATE_FD
            | R::CHECK_DEVICE_STATE
            | R::CREATE_CRYPTO_SESSION
            | R::POSTCOPY_ADVISE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [request, flags, payload.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn half_a_message_waits_for_the_rest() {
        let (mut left, right) = UnixStream::pair().expect("a pair");
        let bytes = message(10, 9, &[1; 8]);
        for byte in &bytes {
            assert_eq!(look(&right).expect("look"), Next::Wait);
            left.write_all(&[*byte]).expect("write");
        }
        let next = look(&right).expect("look");
        let Next::Serve(header) = next else { panic!("{next:?}") };
        assert_eq!((header.request, header.flags, header.size), (10, 9, 8));
        assert!(header.needs_acknowledgement());
        header.discard(&right).expect("discard");
        left.write_all(&bytes[..19]).expect("write");
        assert_eq!(look(&right).expect("look"), Next::Wait);
        drop(left);
        assert_eq!(look(&right).expect("look"), Next::End, "the rest never comes");
    }

    #[test]
    fn what_is_no_message_ends_the_connection_and_an_unknown_request_does_not() {
        for (bytes, lost) in [
            (message(1, 0, &[]), true),
            (message(1, 2, &[]), true),
            (message(1, 5, &[]), true),
            (message(1, 0x11, &[]), true),
            ([&message(1, 1, &[])[..8], &4097u32.to_ne_bytes()].concat(), true),
            (message(45, 1, &[0; 8]), false),
            (message(0, 9, &[]), false),
        ] {
            let (mut left, right) = UnixStream::pair().expect("a pair");
            left.write_all(&bytes).expect("write");
            let next = look(&right).expect("look");
            assert_eq!(matches!(next, Next::Lost(_)), lost, "{next:?}");
            assert_eq!(matches!(next, Next::Refuse(..)), !lost, "{next:?}");
        }
    }
}
