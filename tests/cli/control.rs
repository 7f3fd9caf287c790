//! The control socket of the built program, and `ctl`, which calls it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::{fs, thread};

use serde_json::{Value, json};

use super::{Bench, Daemon, PATIENCE, program, run};

const SIZE: u64 = 1 << 20;

fn serve(bench: &Bench, image: &Path, arguments: &[&str]) -> Daemon {
    let socket = bench.path("control");
    let control = ["--control", socket.to_str().expect("a plain name")];
    bench.start(image, &[&control, arguments].concat())
}

/// Calls a method by `ctl`; gives the status, and what it printed.
fn ctl(bench: &Bench, words: &[&str]) -> (i32, String) {
    let mut command = program();
    command.arg("ctl").arg("--control").arg(bench.path("control")).args(words);
    let output = run(command);
    let text = [output.stdout, output.stderr].concat();
    let status = output.status.code().expect("a status");
    (status, String::from_utf8(text).expect("plain text"))
}

fn call(bench: &Bench, words: &[&str]) -> Value {
    let (status, text) = ctl(bench, words);
    assert_eq!(status, 0, "{words:?}: {text}");
    serde_json::from_str(&text).expect("JSON")
}

fn assert_refused(bench: &Bench, words: &[&str], why: &str) {
    let (status, text) = ctl(bench, words);
    assert_eq!((status, text.lines().count()), (1, 1), "{words:?}: {text}");
    assert!(text.starts_with("vhost-user-qcow2: ") && text.contains(why), "{words:?}: {text}");
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn new(bench: &Bench) -> Self {
        let socket = UnixStream::connect(bench.path("control")).expect("connect");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Self(BufReader::new(socket))
    }

    fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("write");
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

const VERSION: &str = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"version\"}\n";

#[test]
fn every_method_answers_without_a_guest() {
    let bench = Bench::new();
    let image = bench.path("disk.qcow2");
    let mut daemon = serve(&bench, &image, &["--create", "1M"]);
    assert_eq!(call(&bench, &["version"])["name"], json!("vhost-user-qcow2"));
    let info = call(&bench, &["info"]);
    for (key, value) in [
        ("filename", json!(image.to_str())),
        ("format", json!("qcow2")),
        ("compat", json!("1.1")),
        ("virtual-size", json!(SIZE)),
        ("cluster-size", json!(65536)),
        ("read-only", json!(false)),
        ("backing-chain", json!([])),
        ("front-ends", json!([])),
        ("queues", json!(64)),
        ("snapshots", json!(0)),
        ("pid", json!(daemon.0.id())),
    ] {
        assert_eq!(info[key], value, "{key}");
    }
    let stats = call(&bench, &["stats"]);
    assert_eq!((&stats["total"]["reads"], &stats["workers"]), (&json!(0), &json!([])));
    assert_eq!(call(&bench, &["inflight"]), json!({ "in-flight": 0, "queues": [] }));
    assert_eq!(call(&bench, &["flush"]), json!({}));
    let resized = json!({ "virtual-size": 5 * SIZE, "was": SIZE });
    assert_eq!(call(&bench, &["resize", "size=5M"]), resized);
    let (status, line) = ctl(&bench, &["--raw", "resize", "size=2M", "shrink=true"]);
    assert_eq!((status, line.as_str()), (0, "{\"virtual-size\":2097152,\"was\":5242880}\n"));
    assert_eq!(call(&bench, &["info"])["virtual-size"], json!(2 * SIZE));
    assert_eq!(call(&bench, &["shutdown"]), json!({}));
    assert_eq!(daemon.wait(), 0);
    assert!(!bench.path("control").exists() && !bench.path("socket").exists());
    let header = fs::read(&image).expect("the image");
    assert_eq!(header[24..32], (2 * SIZE).to_be_bytes(), "the size is in the header");
    assert_refused(&bench, &["info"], "start the daemon with --control");
}

#[test]
fn a_disk_does_not_shrink_while_a_guest_may_come_back_to_it() {
    let bench = Bench::new();
    let image = bench.path("disk.qcow2");
    let mut daemon = serve(&bench, &image, &["--create", "1M"]);
    assert_eq!(call(&bench, &["shutdown"]), json!({}));
    assert_eq!(daemon.wait(), 0);
    let _daemon = serve(&bench, &image, &[]);
    assert_refused(&bench, &["resize", "size=512K", "shrink=true"], "a guest may come back");
    let resized = json!({ "virtual-size": 2 * SIZE, "was": SIZE });
    assert_eq!(call(&bench, &["resize", "size=2M"]), resized);
}

#[test]
fn rate_limits_are_shown_changed_and_taken_away() {
    let bench = Bench::new();
    let image = bench.path("disk.qcow2");
    let _daemon = serve(&bench, &image, &["--create", "1M", "--rate-limit", "ops_size=100"]);
    let rates = |bandwidth: u64, burst: u64, operations: u64, refill: u64| {
        json!({ "bw_size": bandwidth, "bw_refill_time": 1000, "bw_one_time_burst": burst,
            "ops_size": operations, "ops_refill_time": refill, "ops_one_time_burst": 0 })
    };
    assert_eq!(call(&bench, &["qos"]), rates(0, 0, 100, 1000));
    let changed = call(&bench, &["qos", "bw_size=10M", "bw_one_time_burst=4096"]);
    assert_eq!(changed, rates(10 << 20, 4096, 100, 1000));
    for (words, why) in [
        (&["qos", "size=1"][..], "it takes bw_size"),
        (&["qos", "ops_size=1K"], "key=number"),
        (&["qos", "ops_size=-1"], "key=number"),
        (&["qos", "ops_size"], "key=number"),
        (&["qos", "bw_size=1,ops_size=5"], "key=number"),
        (&["qos", "bw_refill_time=0"], "bw_refill_time=0"),
        (&["qos", "bw_size=0"], "without bw_size"),
        (&["qos", "off=1"], "true or false"),
    ] {
        assert_refused(&bench, words, why);
    }
    assert_eq!(call(&bench, &["qos"]), changed, "what was refused has changed nothing");
    let fewer = call(&bench, &["qos", "off", "ops_size=7", "ops_refill_time=10"]);
    assert_eq!(fewer, rates(0, 0, 7, 10));
    assert_eq!(call(&bench, &["qos", "off"]), rates(0, 0, 0, 1000));
}

#[test]
fn refusals_say_what_to_do() {
    let bench = Bench::new();
    let daemon = serve(&bench, &bench.raw("disk.raw"), &["--format", "raw"]);
    for (words, why) in [
        (&["vanish"][..], "there are version, info, stats"),
        (&["version", "x=1"], "takes no arguments"),
        (&["resize"], "20G"),
        (&["resize", "bytes=1"], "it takes size, shrink"),
        (&["resize", "size=1000"], "512"),
        (&["resize", "size=0"], "512"),
        (&["resize", "size=-1"], "-1"),
        (&["resize", "size=10GB"], "10GB"),
        (&["resize", "size=true"], "20G"),
        (&["resize", "size=512", "shrink=1"], "true or false"),
        (&["resize", "size=512K"], "shrink=true"),
    ] {
        assert_refused(&bench, words, why);
    }
    assert_eq!(call(&bench, &["info"])["virtual-size"], json!(SIZE));
    assert_eq!(call(&bench, &["resize", "size=2M"])["virtual-size"], json!(2 * SIZE));
    assert_eq!(fs::metadata(bench.path("disk.raw")).expect("the image").len(), 2 * SIZE);
    drop(daemon);
    let bench = Bench::new();
    let _daemon = serve(&bench, &bench.raw("disk.raw"), &["--format", "raw", "--read-only"]);
    assert_refused(&bench, &["resize", "size=2M"], "--read-only");
    assert_eq!(call(&bench, &["info"])["read-only"], json!(true));
}

#[test]
fn control_sockets_that_cannot_be_made_are_refused_before_anything_is() {
    let bench = Bench::new();
    let image = bench.path("new.qcow2");
    let path = |name: &str| bench.path(name).to_str().expect("a plain name").to_owned();
    let refuse = |control: &str, subject: &str, why: &str| {
        bench.assert_refused(&image, &["--create", "1M", "--control", control], subject, why);
    };
    refuse(&path("socket"), "socket", "a path of its own");
    bench.file("text", b"precious");
    refuse(&path("text"), "text", "no socket");
    let live = std::os::unix::net::UnixListener::bind(bench.path("live")).expect("a socket");
    refuse(&path("live"), "live", "answers");
    drop(live);
}

#[test]
fn only_the_owner_may_use_the_socket() {
    let bench = Bench::new();
    let _daemon = serve(&bench, &bench.raw("disk.raw"), &["--format", "raw"]);
    let mode = fs::metadata(bench.path("control")).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn hostile_and_silent_clients_keep_nobody_out() {
    let bench = Bench::new();
    let mut daemon = serve(&bench, &bench.raw("disk.raw"), &["--format", "raw"]);
    // Half a line, no line, lines whose answers are not read, and connections that say nothing.
    let mut half = Client::new(&bench);
    half.say("{\"jsonrpc\"");
    let mut deaf = Client::new(&bench);
    deaf.0.get_mut().set_write_timeout(Some(PATIENCE / 100)).expect("a time-out");
    while deaf.0.get_mut().write_all(VERSION.repeat(100).as_bytes()).is_ok() {}
    assert_eq!(call(&bench, &["version"])["name"], json!("vhost-user-qcow2"));
    let mut endless = Client::new(&bench);
    endless.0.get_mut().set_write_timeout(Some(PATIENCE)).expect("a time-out");
    while endless.0.get_mut().write_all(&[b'x'; 4096]).is_ok() {}
    let mut silent: Vec<Client> = (0..40).map(|_| Client::new(&bench)).collect();
    let mut last = Client::new(&bench);
    last.say(VERSION);
    assert_eq!(last.hear()["id"], json!(1));
    // Those that came last are still there; the first ones had to go.
    let newest = silent.last_mut().expect("forty");
    newest.say(VERSION);
    assert_eq!(newest.hear()["id"], json!(1));
    let mut rest = Vec::new();
    let gone = silent[0].0.read_to_end(&mut rest);
    assert!(gone.is_err() || rest.is_empty(), "the most silent one is let go");
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn lines_in_pieces_batches_notifications_and_mistakes() {
    let bench = Bench::new();
    let _daemon = serve(&bench, &bench.raw("disk.raw"), &["--format", "raw"]);
    let mut client = Client::new(&bench);
    for byte in VERSION.as_bytes().chunks(7) {
        client.0.get_mut().write_all(byte).expect("write");
        thread::sleep(PATIENCE / 10_000);
    }
    assert_eq!(client.hear()["result"]["name"], json!("vhost-user-qcow2"));
    client.say("nonsense\n");
    assert_eq!(client.hear()["error"]["code"], json!(-32700));
    client.say("{\"jsonrpc\":\"2.0\",\"method\":\"resize\",\"params\":{\"size\":2097152}}\n");
    client.say("[{\"jsonrpc\":\"2.0\",\"id\":\"a\",\"method\":\"info\"},7]\n");
    let answers = client.hear();
    assert_eq!(answers[0]["result"]["virtual-size"], json!(2 * SIZE), "carried out, unanswered");
    assert_eq!((&answers[0]["id"], &answers[1]["error"]["code"]), (&json!("a"), &json!(-32600)));
    client.0.get_mut().shutdown(std::net::Shutdown::Write).expect("the last word");
    assert_eq!(client.0.read_to_end(&mut Vec::new()).expect("the end"), 0);
}
