//! Front-ends that stop half-way, and those that come after them.

use std::io::Write;
use std::time::{Duration, Instant};

use vhost_user_qcow2::vhost::terms::Terms;

use super::front_end::{FrontEnd, features, request as R};
use super::guest::Guest;
use super::server::{Options, Server};

const MESSAGE: Duration = Duration::from_millis(150);
const HANDSHAKE: Duration = Duration::from_millis(400);

fn server() -> Server {
    let terms = Terms { message: MESSAGE, handshake: HANDSHAKE, ..Terms::default() };
    Server::start(Options { terms, ..Options::default() })
}

/// The beginning of a message whose rest never comes.
fn begin(front_end: &mut FrontEnd) {
    let message = [R::SET_VRING_NUM, 9, 8, 0].map(u32::to_ne_bytes).concat();
    front_end.socket.write_all(&message).expect("send");
}

#[test]
fn who_stops_in_the_middle_of_a_message_is_given_up() {
    let server = server();
    let start = Instant::now();
    let mut late = server.connect();
    let mut attached = server.connect();
    attached.negotiate();
    attached.ask_u64(R::GET_FEATURES);
    [&mut late, &mut attached].into_iter().for_each(begin);
    // A byte now and then is no progress either.
    std::thread::sleep(MESSAGE / 2);
    late.socket.write_all(&[0]).expect("send");
    let (_front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    late.assert_closed();
    attached.assert_closed();
    let time = start.elapsed();
    assert!(time >= MESSAGE && time < HANDSHAKE * 10, "{time:?}");
    guest.assert_reads(0);
    server.end();
}

#[test]
fn who_never_attaches_is_given_up_and_who_did_may_be_silent() {
    let server = server();
    let mut silent = server.connect();
    let mut curious = server.connect();
    curious.ask_u64(R::GET_FEATURES);
    let mut destination = server.connect();
    destination.negotiate();
    let (mut paused, guest) = server.attached(1);
    assert_eq!(paused.base(0), 0);
    let (mut source, mut other) = server.attached(1);
    silent.assert_closed();
    curious.assert_closed();
    std::thread::sleep(2 * HANDSHAKE);
    other.assert_reads(0);
    source.base(0);
    // The one that was paused goes on, and so does the one that had only done its handshake.
    let mut guest = guest;
    paused.set_up(&guest, 0);
    guest.assert_reads(0);
    paused.base(0);
    let mut guest = Guest::new(1);
    destination.tell(R::SET_FEATURES, &features().to_ne_bytes());
    destination.add_memory(&guest);
    destination.set_up(&guest, 0);
    guest.assert_reads(0);
    server.end();
}

#[test]
fn a_guest_that_is_served_keeps_its_disk_whatever_its_front_end_does() {
    let server = server();
    let (mut front_end, mut guest) = server.attached(1);
    begin(&mut front_end);
    std::thread::sleep(2 * HANDSHAKE);
    guest.assert_reads(0);
    // The rest of the message comes at last.
    front_end.socket.write_all(&64u32.to_ne_bytes()).expect("send");
    assert_eq!(front_end.reply(R::SET_VRING_NUM), 0u64.to_ne_bytes());
    guest.assert_reads(0);
    server.end();
}

#[test]
fn any_number_of_silent_connections_keeps_nobody_out() {
    let server = Server::start(Options::default());
    let (_front_end, mut guest) = server.attached(1);
    let mut silent = Vec::new();
    for _ in 0..60 {
        silent.push(server.connect());
        silent.push(server.connect());
        begin(silent.last_mut().expect("a connection"));
    }
    let mut front_end = server.connect();
    front_end.negotiate();
    front_end.ask_u64(R::GET_FEATURES);
    guest.assert_reads(0);
    // The first were given up for the last.
    silent[0].assert_closed();
    server.end();
}

/// Asks questions until the back-end takes no more; returns how many it were.
fn ask_without_listening(front_end: &mut FrontEnd) -> usize {
    let question = [R::GET_QUEUE_NUM, 1, 0].map(u32::to_ne_bytes).concat();
    front_end.socket.set_nonblocking(true).expect("a socket");
    let (mut asked, start) = (0, Instant::now());
    while start.elapsed() < MESSAGE / 2 {
        match front_end.socket.write(&question) {
            Ok(len) => {
                assert_eq!(len, question.len(), "a socket takes all of a dozen bytes or none");
                asked += 1;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    front_end.socket.set_nonblocking(false).expect("a socket");
    asked
}

#[test]
fn who_does_not_read_answers_keeps_nobody_waiting() {
    let server = server();
    let mut deaf = server.connect();
    deaf.negotiate();
    let asked = ask_without_listening(&mut deaf);
    assert!(asked > 200, "only {asked} questions fit into the socket");
    let (mut front_end, mut guest) = server.attached(1);
    guest.assert_reads(0);
    // Whoever reads after all gets every answer.
    for _ in 0..asked {
        deaf.reply(R::GET_QUEUE_NUM);
    }
    // Whoever does not is given up, unless a guest of his is served.
    ask_without_listening(&mut deaf);
    let asked = ask_without_listening(&mut front_end);
    std::thread::sleep(3 * MESSAGE);
    guest.assert_reads(0);
    for _ in 0..asked {
        front_end.reply(R::GET_QUEUE_NUM);
    }
    let mut left = Vec::new();
    // What was answered before is still to be read, and then there is the end.
    let end = std::io::Read::read_to_end(&mut deaf.socket, &mut left);
    assert!(end.is_ok() || end.is_err_and(|error| error.raw_os_error() == Some(104)));
    server.end();
}
