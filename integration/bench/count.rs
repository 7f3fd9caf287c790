//! System calls of a server, counted from outside in a run of their own: counting slows down.

use std::fs;
use std::io::{Error, Result};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// How long a counter takes to attach itself; neither program says when it has.
const ATTACH: Duration = Duration::from_millis(400);

/// What counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Tracepoints of the kernel.
    Perf,
    /// For machines whose kernel keeps tracepoints from us.
    Strace,
}

/// What a server has asked of the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) calls: f64,
    /// fsync and fdatasync, whether called or put into an io_uring.
    pub(crate) syncs: f64,
}

/// A counter that is attached to a process.
pub(crate) struct Counter {
    tool: Tool,
    child: Child,
}

impl Tool {
    /// The best that works here.
    pub(crate) fn find(scratch: &Path) -> Option<Self> {
        let works = |tool: Self| {
            let file = scratch.join("counter-probe");
            let mut command = tool.command(&file);
            let quiet = command.arg("true").stdout(Stdio::null()).stderr(Stdio::null()).status();
            quiet.is_ok_and(|status| status.success()) && tool.read(&file).is_ok()
        };
        [Self::Perf, Self::Strace].into_iter().find(|tool| works(*tool))
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Perf => "`perf stat -e raw_syscalls:sys_enter`",
            Self::Strace => "`strace -c -f`, which does not see what goes through io_uring",
        }
    }

    fn command(self, file: &Path) -> Command {
        match self {
            Self::Perf => {
                let mut command = Command::new("perf");
                command.args(["stat", "-x,", "-e", "raw_syscalls:sys_enter"]);
                command.args(["-e", "syscalls:sys_enter_fsync"]);
                command.args(["-e", "syscalls:sys_enter_fdatasync"]);
                // IORING_OP_FSYNC is number 3.
                command.args(["-e", "io_uring:io_uring_submit_req", "--filter", "opcode == 3"]);
                command.arg("-o").arg(file);
                command
            }
            Self::Strace => {
                let mut command = Command::new("strace");
                command.args(["-c", "-f", "-o"]).arg(file);
                command
            }
        }
    }

    pub(crate) fn attach(self, process: u32, file: &Path) -> Result<Counter> {
        let mut command = self.command(file);
        command.args(["-p", &process.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = child.spawn()?;
        std::thread::sleep(ATTACH);
        Ok(Counter { tool: self, child })
    }

    fn read(self, file: &Path) -> Result<Counts> {
        let text = fs::read_to_string(file)?;
        let mut counts = Counts::default();
        let mut seen = false;
        for line in text.lines() {
            let Some((number, name)) = self.parse(line) else { continue };
            match name {
                "raw_syscalls:sys_enter" | "total" => (counts.calls, seen) = (number, true),
                _ if name.contains("sync") || name.starts_with("io_uring:") => {
                    counts.syncs += number;
                }
                _ => {}
            }
        }
        if seen { Ok(counts) } else { Err(Error::other(format!("nothing was counted: {text}"))) }
    }

    /// A count and what was counted.
    fn parse(self, line: &str) -> Option<(f64, &str)> {
        match self {
            Self::Perf => {
                let mut fields = line.split(',');
                let number = fields.next()?.parse().ok()?;
                Some((number, fields.nth(1)?))
            }
            // Share, seconds, microseconds for each, calls, errors if there were any, name.
            Self::Strace => {
                let fields: Vec<&str> = line.split_whitespace().collect();
                Some((fields.get(3)?.parse().ok()?, fields.last()?))
            }
        }
    }
}

impl Counter {
    /// Ends counting.
    pub(crate) fn end(mut self, file: &Path) -> Result<Counts> {
        kill_process(Pid::from_child(&self.child), Signal::Int)?;
        self.child.wait()?;
        self.tool.read(file)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_tools_are_understood() {
        let perf = "29,,raw_syscalls:sys_enter,918465,100.00,,";
        assert_eq!(Tool::Perf.parse(perf), Some((29.0, "raw_syscalls:sys_enter")));
        assert_eq!(Tool::Perf.parse("# started on Sat Nov 21"), None);
        let strace = " 12.00    0.000120          12        10         2 openat";
        assert_eq!(Tool::Strace.parse(strace), Some((10.0, "openat")));
        let total = "100.00    0.000512          10        48         2 total";
        assert_eq!(Tool::Strace.parse(total), Some((48.0, "total")));
    }
}
