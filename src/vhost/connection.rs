//! One front-end's connection: which messages are there, and what an error means for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as Failure};

use crate::sync::{Arc, Mutex, lock};
use crate::vhost::message::{self, Header, Next, look};
use crate::vhost::session::Session;
use crate::worker::poller::{replace, unread};

/// Most messages served before other events are looked at.
const BATCH: usize = 64;

/// How serving a connection has gone on.
#[derive(Debug)]
pub(super) enum Pumped {
    /// Everything that has arrived was served.
    Quiet,
    /// There is more.
    Busy,
    /// There is more, and the front-end must read its answers first.
    Blocked,
    /// The front-end has gone, or must.
    Over(Option<String>),
}

/// A connected front-end.
pub(super) struct Connection {
    handler: BackendReqHandler<Mutex<Session>>,
    socket: UnixStream,
    session: Arc<Mutex<Session>>,
    /// Messages served.
    pub(super) messages: u64,
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Connection {
    pub(super) fn new(socket: UnixStream, session: &Arc<Mutex<Session>>) -> io::Result<Self> {
        // Whole messages are waited for by looking; what is read then is there.
        socket.set_nonblocking(false)?;
        let handler = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(session));
        Ok(Self { handler, socket, session: Arc::clone(session), messages: 0 })
    }

    /// A connection that a predecessor has served: the crate must know what was negotiated. It is
    /// told by the same messages, through a socket that is replaced afterwards.
    pub(super) fn resume(
        socket: UnixStream,
        session: &Arc<Mutex<Session>>,
        negotiated: &[(FrontendReq, Option<u64>)],
    ) -> io::Result<Self> {
        let (mut left, right) = UnixStream::pair()?;
        let mut connection = Self::new(right, session)?;
        for (request, value) in negotiated {
            message::send(&mut left, *request, *value)?;
            connection.handler.handle_request().map_err(io::Error::other)?;
        }
        socket.set_nonblocking(false)?;
        replace(&connection.handler, &socket)?;
        connection.socket = socket;
        Ok(connection)
    }

    /// Serves messages that have arrived, without waiting for any.
    pub(super) fn pump(&mut self) -> Pumped {
        for _ in 0..BATCH {
            // An answer is written without waiting for anybody. A front-end that reads none is not
            // listened to either.
            if !has_room(&self.socket) {
                return Pumped::Blocked;
            }
            let result = match look(&self.socket) {
                Err(error) => Err(error.to_string()),
                Ok(Next::Wait) => return Pumped::Quiet,
                Ok(Next::End) => return Pumped::Over(None),
                Ok(Next::Lost(why)) => Err(why.to_owned()),
                Ok(Next::Refuse(header, why)) => self.refuse(header, why),
                Ok(Next::Serve(header)) => match header.known() {
                    Some(FrontendReq::SET_BACKEND_REQ_FD) => self.take_channel(header),
                    _ => self.serve(header),
                },
            };
            if let Err(why) = result {
                return Pumped::Over(Some(why));
            }
            self.messages += 1;
        }
        Pumped::Busy
    }

    /// Whether a part of a message waits for the rest.
    pub(super) fn is_midway(&self) -> bool {
        unread(&self.socket).is_ok_and(|bytes| bytes != 0)
    }

    fn refuse(&self, header: Header, why: &str) -> Result<(), String> {
        header.discard(&self.socket).map_err(|error| error.to_string())?;
        self.deny(header, why)
    }

    /// Takes the descriptor for messages of our own (SET_BACKEND_REQ_FD): the crate would hide it.
    fn take_channel(&self, header: Header) -> Result<(), String> {
        let file = header.take_descriptor(&self.socket).map_err(|error| error.to_string())?;
        let taken = lock(&self.session).set_channel(file);
        match taken {
            Ok(()) => self.acknowledge(header, 0),
            Err(why) => self.deny(header, why),
        }
    }

    /// Lets the crate take the message apart and call the session. An error of one message is no
    /// reason to leave the guest without its disk, unless the front-end waits for an answer that
    /// nobody can give.
    fn serve(&mut self, header: Header) -> Result<(), String> {
        if header.known() == Some(FrontendReq::SET_LOG_FD) {
            return self.take_log_descriptor(header);
        }
        lock(&self.session).take_entered();
        let Err(failure) = self.handler.handle_request() else { return Ok(()) };
        match failure {
            Failure::Disconnected
            | Failure::PartialMessage
            | Failure::SocketBroken(_)
            | Failure::SocketError(_) => return Err(failure.to_string()),
            _ => {}
        }
        let entered = lock(&self.session).take_entered();
        if !header.has_own_reply() && is_answered(header, entered, &failure) {
            tracing::warn!("{}: {failure}", name(header));
            return Ok(());
        }
        let unread = matches!(failure, Failure::InvalidMessage) && !entered;
        if unread && header.may_be_cut(&self.socket).map_err(|error| error.to_string())? {
            return Err(format!("a descriptor came with {}, which takes none", name(header)));
        }
        self.deny(header, &failure.to_string())
    }

    /// Tells the front-end that a message was not served, if it waits for that.
    fn deny(&self, header: Header, why: &str) -> Result<(), String> {
        if header.known() == Some(FrontendReq::GET_CONFIG) {
            return header.reply_empty(&self.socket).map_err(|error| error.to_string());
        }
        if header.has_own_reply() {
            return Err(format!("{} cannot be answered: {why}", name(header)));
        }
        tracing::warn!("{} is refused: {why}", name(header));
        self.acknowledge(header, 1)
    }

    /// Answers a request that has no answer of its own, if the front-end waits for that.
    fn acknowledge(&self, header: Header, failure: u64) -> Result<(), String> {
        if header.needs_acknowledgement() && lock(&self.session).acknowledges() {
            return header.acknowledge(&self.socket, failure).map_err(|error| error.to_string());
        }
        Ok(())
    }

    /// SET_LOG_FD, which the crate does not know. The descriptor is closed: nobody has to be told
    /// of pages in the log, because front-ends look at it whenever they copy memory.
    fn take_log_descriptor(&self, header: Header) -> Result<(), String> {
        header.discard(&self.socket).map_err(|error| error.to_string())?;
        self.acknowledge(header, 0)
    }
}

/// Whether an answer can be written at once. The kernel says so as long as no more than a quarter
/// of the socket's buffer is full, and no answer takes a quarter.
fn has_room(socket: &UnixStream) -> bool {
    let mut question = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    // A connection that is over has room too: writing says so.
    !matches!(poll(&mut question, PollTimeout::ZERO), Ok(0))
}

/// Whether the crate has sent the acknowledgement of a failed request, if one was due. It has when
/// the session was asked, and for requests whose payload it checks where it also answers.
fn is_answered(header: Header, entered: bool, failure: &Failure) -> bool {
    use FrontendReq as R;
    let checked_late =
        matches!(header.known(), Some(R::SET_MEM_TABLE | R::SET_CONFIG | R::GPU_SET_SOCKET));
    entered || checked_late && !matches!(failure, Failure::InactiveOperation(_))
}

fn name(header: Header) -> String {
    match header.known() {
        Some(request) => format!("{request:?}"),
        None => format!("request {}", header.request),
    }
}
