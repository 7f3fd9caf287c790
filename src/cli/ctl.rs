//! `vhost-user-qcow2 ctl`: one call to a daemon's control socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Asks a running daemon something, or changes its disk.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Methods:
  version                      the daemon's name and version
  info                         the image, its backing chain, and who is connected
  stats                        what was read, written and flushed, and how long it took
  inflight                     requests under way in each queue
  resize size=20G              make the disk larger while guests run
  resize size=5G shrink=true   make it smaller, losing what lies behind
  flush                        make everything that was completed durable
  qos                          the rate limits
  qos bw_size=10M ops_size=0   change some of them: --rate-limit's keys
  qos off                      no limits
  shutdown                     end the daemon as SIGTERM does")]
pub struct Arguments {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,

    /// Print the result on one line
    #[arg(long)]
    pub raw: bool,

    /// The method
    pub method: String,

    /// Its arguments: numbers, true, false, or text; a name alone is true
    #[arg(value_name = "NAME[=VALUE]", value_parser = parameter)]
    pub parameters: Vec<(String, Value)>,
}

/// One argument of a method. What is no number, nor true or false, is text.
fn parameter(text: &str) -> std::result::Result<(String, Value), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, "true"));
    if name.is_empty() {
        return Err("write it as NAME=VALUE, or NAME for NAME=true".to_owned());
    }
    let parsed = serde_json::from_str(value).ok();
    let plain = |value: &Value| matches!(value, Value::Number(_) | Value::Bool(_));
    Ok((name.to_owned(), parsed.filter(plain).unwrap_or_else(|| value.into())))
}

/// Makes the call; gives what to print.
///
/// # Errors
/// When nobody answers, and when the daemon answers with an error, whose sentence it is.
pub fn run(arguments: &Arguments) -> Result<String> {
    let path = arguments.control.display().to_string();
    let mut socket =
        UnixStream::connect(&arguments.control).map_err(|error| unreachable(&path, error))?;
    let parameters: Map<String, Value> = arguments.parameters.iter().cloned().collect();
    let (method, failed) = (&arguments.method, |error| Error::io(path.clone(), error));
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": parameters });
    socket.write_all(format!("{call}\n").as_bytes()).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).map_err(failed)?;
    let strange = || Error::refused(path.clone(), "the answer is not that of a control socket");
    if line.is_empty() {
        let why = "the daemon has closed the connection without an answer; look at its log";
        return Err(Error::refused(path.clone(), why));
    }
    let answer: Value = serde_json::from_str(&line).map_err(|_| strange())?;
    if let Some(message) = answer["error"]["message"].as_str() {
        return Err(Error::refused(method.clone(), message));
    }
    let result = answer.get("result").ok_or_else(strange)?;
    Ok(if arguments.raw { result.to_string() } else { format!("{result:#}") })
}

/// Why nobody answers, and what to do.
fn unreachable(path: &str, error: std::io::Error) -> Error {
    let why = match error.kind() {
        ErrorKind::NotFound => {
            "there is no such socket; start the daemon with --control and this path"
        }
        ErrorKind::ConnectionRefused => {
            "no daemon listens on this socket any more; start it with --control and this path"
        }
        ErrorKind::PermissionDenied => {
            "only the user whom the daemon runs as may use its control socket"
        }
        _ => return Error::io(path, error),
    };
    Error::refused(path, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_numbers_truth_values_or_text() {
        for (text, name, value) in [
            ("size=20G", "size", json!("20G")),
            ("size=1024", "size", json!(1024)),
            ("shrink=true", "shrink", json!(true)),
            ("off", "off", json!(true)),
            ("a==", "a", json!("=")),
            ("a=", "a", json!("")),
            ("a=[1]", "a", json!("[1]")),
            ("a=null", "a", json!("null")),
            ("a=\"1\"", "a", json!("\"1\"")),
            ("a=007", "a", json!("007")),
        ] {
            assert_eq!(parameter(text), Ok((name.to_owned(), value)), "{text}");
        }
        for text in ["=1", "=", ""] {
            assert!(parameter(text).is_err(), "{text}");
        }
    }
}
