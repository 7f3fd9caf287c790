//! A client of the daemon's control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::scratch::Scratch;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the control socket.
#[derive(Debug)]
pub struct Operator {
    socket: BufReader<UnixStream>,
    calls: u64,
}

impl Operator {
    /// Connects to the control socket of the test's daemon.
    ///
    /// # Panics
    ///
    /// Panics when nobody listens.
    #[must_use]
    pub fn connect(scratch: &Scratch) -> Self {
        let socket = UnixStream::connect(scratch.control()).expect("connect to the control socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        socket.set_write_timeout(Some(PATIENCE)).expect("a time-out");
        Self { socket: BufReader::new(socket), calls: 0 }
    }

    /// Calls a method with named arguments.
    ///
    /// # Errors
    ///
    /// The daemon's sentence when it refuses.
    ///
    /// # Panics
    ///
    /// Panics when the answer does not come or is none.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value, String> {
        self.calls += 1;
        let id = self.calls;
        let call = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": parameters });
        self.say(&format!("{call}\n")).expect("make a call");
        let mut line = String::new();
        self.socket.read_line(&mut line).expect("an answer");
        let mut answer: Value = serde_json::from_str(&line).expect("an answer in JSON");
        assert_eq!(answer["id"], json!(id), "{line}");
        match answer["error"]["message"].as_str() {
            Some(message) => Err(message.to_owned()),
            None => Ok(answer["result"].take()),
        }
    }

    /// Sends text without reading what it is answered.
    ///
    /// # Errors
    ///
    /// When the daemon does not read it.
    pub fn say(&mut self, text: &str) -> std::io::Result<()> {
        self.socket.get_mut().write_all(text.as_bytes())
    }

    /// How long [`Operator::say`] waits for the daemon to read.
    ///
    /// # Panics
    ///
    /// Panics when the time is zero.
    pub fn set_patience(&mut self, time: Duration) {
        self.socket.get_mut().set_write_timeout(Some(time)).expect("a time-out");
    }
}
