//! QEMU's monitor: commands as JSON over a socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long QEMU may take to answer, or to get anywhere.
const PATIENCE: Duration = Duration::from_secs(180);

/// A connection to a monitor that was started with `-qmp unix:PATH,server=on,wait=off`.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects as soon as QEMU listens.
    ///
    /// # Panics
    ///
    /// Panics when it never does.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let socket = loop {
            match UnixStream::connect(path) {
                Ok(socket) => break socket,
                Err(error) => assert!(Instant::now() < deadline, "no monitor: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        socket.set_read_timeout(Some(PATIENCE)).expect("set a time-out");
        let mut monitor = Self { reader: BufReader::new(socket) };
        monitor.read();
        monitor.execute("qmp_capabilities", &json!({}));
        monitor
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).expect("the monitor answers");
        assert!(count != 0, "QEMU has closed its monitor");
        serde_json::from_str(&line).expect("the monitor speaks JSON")
    }

    /// Carries a command out and gives its answer; events that come before it are skipped.
    ///
    /// # Panics
    ///
    /// Panics when QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}").expect("the monitor reads");
        loop {
            let mut answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(result) = answer.get_mut("return") {
                return result.take();
            }
        }
    }

    /// Carries out a command without arguments.
    pub fn run(&mut self, command: &str) -> Value {
        self.execute(command, &json!({}))
    }

    /// What the machine does: "running", "paused", "postmigrate" and so on.
    ///
    /// # Panics
    ///
    /// Panics when QEMU does not say.
    pub fn status(&mut self) -> String {
        let status = self.run("query-status");
        status["status"].as_str().expect("a status").to_owned()
    }

    /// Waits until the machine does `wanted`.
    ///
    /// # Panics
    ///
    /// Panics when it never does.
    pub fn wait_for_status(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if status == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "the machine is {status}, not {wanted}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a migration is `wanted`, and gives everything that QEMU says about it.
    ///
    /// # Panics
    ///
    /// Panics when the migration ends in another way.
    pub fn wait_for_migration(&mut self, wanted: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let migration = self.run("query-migrate");
            let status = migration["status"].as_str().unwrap_or("none").to_owned();
            if status == wanted {
                return migration;
            }
            let over = ["completed", "failed", "cancelled"].contains(&status.as_str());
            assert!(!over && Instant::now() < deadline, "not {wanted}: {migration}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
