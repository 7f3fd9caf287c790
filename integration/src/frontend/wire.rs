//! Messages on a vhost-user socket.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests by number.
pub mod request {
    /// Which virtio features there are.
    pub const GET_FEATURES: u32 = 1;
    /// Which of them are taken.
    pub const SET_FEATURES: u32 = 2;
    /// Begin a session.
    pub const SET_OWNER: u32 = 3;
    /// A ring's size.
    pub const SET_VRING_NUM: u32 = 8;
    /// A ring's addresses.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Where a ring begins.
    pub const SET_VRING_BASE: u32 = 10;
    /// Stop a ring.
    pub const GET_VRING_BASE: u32 = 11;
    /// The descriptor that tells the daemon.
    pub const SET_VRING_KICK: u32 = 12;
    /// The descriptor that tells the driver.
    pub const SET_VRING_CALL: u32 = 13;
    /// The descriptor that tells of a broken ring.
    pub const SET_VRING_ERR: u32 = 14;
    /// Which protocol features there are.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Which of them are taken.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// How many queues there are.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// Enable a ring.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// The configuration space.
    pub const GET_CONFIG: u32 = 24;
    /// Memory for notes of what is in flight.
    pub const GET_INFLIGHT_FD: u32 = 31;
    /// That memory, brought back.
    pub const SET_INFLIGHT_FD: u32 = 32;
    /// How many memory regions there may be.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// A memory region.
    pub const ADD_MEM_REG: u32 = 37;
}

/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection.
pub struct Wire(UnixStream);

impl Wire {
    /// Connects to a socket.
    ///
    /// # Errors
    ///
    /// Fails when nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Sends a message with flags of the caller's choice: 1, or 9 for an acknowledgement.
    ///
    /// # Errors
    ///
    /// Fails when the connection is broken.
    pub fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        let mut message = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        let sent = self.0.send_with_fds(&[&message[..]], fds);
        let sent = sent.map_err(|error| Error::from_raw_os_error(error.errno()))?;
        if sent == message.len() { Ok(()) } else { Err(Error::other("half a message was sent")) }
    }

    /// Sends a message that wants no answer.
    ///
    /// # Errors
    ///
    /// As [`Self::send`].
    pub fn tell(&mut self, request: u32, payload: &[u8]) -> Result<()> {
        self.send(request, 1, payload, &[])
    }

    /// Sends a message and waits until it was carried out.
    ///
    /// # Errors
    ///
    /// Fails when the daemon refuses it.
    pub fn acknowledged(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        self.send(request, 9, payload, fds)?;
        let (reply, _) = self.reply(request)?;
        if reply == [0; 8] { Ok(()) } else { Err(Error::other(format!("{request} is refused"))) }
    }

    /// Sends a message and gives its answer.
    ///
    /// # Errors
    ///
    /// Fails when there is none.
    pub fn ask(&mut self, request: u32, payload: &[u8]) -> Result<Vec<u8>> {
        self.tell(request, payload)?;
        Ok(self.reply(request)?.0)
    }

    /// Asks for a number.
    ///
    /// # Errors
    ///
    /// Fails when the answer is none.
    pub fn ask_u64(&mut self, request: u32) -> Result<u64> {
        let reply = self.ask(request, &[])?;
        let bytes = reply.try_into().map_err(|_| Error::other("the answer is no number"))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Asks for something that comes with a file.
    ///
    /// # Errors
    ///
    /// Fails when there is none.
    pub fn ask_with_file(&mut self, request: u32, payload: &[u8]) -> Result<(Vec<u8>, File)> {
        self.tell(request, payload)?;
        let (reply, file) = self.reply(request)?;
        Ok((reply, file.ok_or_else(|| Error::other("the answer has no file"))?))
    }

    /// So many bytes of the configuration space.
    ///
    /// # Errors
    ///
    /// Fails when they are refused.
    pub fn config(&mut self, length: u32) -> Result<Vec<u8>> {
        let mut payload = [0, length, 0].map(u32::to_ne_bytes).concat();
        payload.resize(12 + length as usize, 0);
        let mut reply = self.ask(request::GET_CONFIG, &payload)?;
        if reply.len() != payload.len() {
            return Err(Error::other("the configuration space is refused"));
        }
        reply.drain(..12);
        Ok(reply)
    }

    fn reply(&mut self, request: u32) -> Result<(Vec<u8>, Option<File>)> {
        let mut header = [0; 12];
        let received = self.0.recv_with_fd(&mut header);
        let (length, file) = received.map_err(|error| Error::from_raw_os_error(error.errno()))?;
        self.0.read_exact(&mut header[length..])?;
        let (words, _) = header.as_chunks::<4>();
        let [answered, flags, size] = [0, 1, 2].map(|word| u32::from_ne_bytes(words[word]));
        if length == 0 || answered != request || flags != 5 || size > 4096 {
            return Err(Error::other(format!("{request} was answered with {header:?}")));
        }
        let mut payload = vec![0; size as usize];
        self.0.read_exact(&mut payload)?;
        Ok((payload, file))
    }
}
