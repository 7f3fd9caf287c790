//! Several front-ends at once, as in a migration on one host: one guest is served at a time.

use std::time::Duration;

use super::driver::OUT;
use super::front_end::{FrontEnd, features, request as R};
use super::guest::{DATA, Guest};
use super::server::{Options, Server};

/// Long enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(60);

/// A front-end whose guest is ready to go on, if it may.
fn destination(server: &Server) -> (FrontEnd, Guest) {
    let (mut front_end, guest) = (server.connect(), Guest::new(1));
    front_end.negotiate();
    assert_eq!(front_end.config(0, 57, 0).len(), 57);
    front_end.tell(R::SET_FEATURES, &features().to_ne_bytes());
    front_end.add_memory(&guest);
    (front_end, guest)
}

/// Makes a request available that is not served yet.
fn assert_waits(guest: &mut Guest) {
    guest.send(0, OUT, 8, &[(DATA, 512, false)]);
    guest.kick(0);
    std::thread::sleep(MOMENT);
    assert!(guest.rings[0].used().is_empty(), "two guests are served at once");
}

#[test]
fn a_guest_moves_to_another_front_end_that_was_there_before_it_stopped() {
    let server = Server::start(Options::default());
    let (mut source, mut old) = server.attached(2);
    let (mut target, mut new) = destination(&server);
    old.assert_reads(0);
    // The order is the front-ends' affair; nothing is refused, the ring only waits.
    target.set_up(&new, 0);
    assert_waits(&mut new);
    old.assert_reads(1);
    source.base(0);
    assert!(new.rings[0].used().is_empty(), "the other queue is still served");
    source.base(1);
    assert_eq!(new.poll(0), [0]);
    new.assert_reads(0);
    // Coming back works in the same way, and so does going away altogether.
    source.set_up(&old, 0);
    assert_waits(&mut old);
    drop(target);
    assert_eq!(old.poll(0), [0]);
    old.assert_reads(0);
    server.end();
}

#[test]
fn front_ends_that_wait_are_served_in_the_order_in_which_they_came() {
    let server = Server::start(Options::default());
    let (first, mut guest) = server.attached(1);
    guest.assert_reads(0);
    let mut waiting: Vec<(FrontEnd, Guest)> = (0..3).map(|_| destination(&server)).collect();
    for (front_end, guest) in &mut waiting {
        front_end.set_up(guest, 0);
        assert_waits(guest);
    }
    drop(first);
    for (front_end, mut guest) in waiting {
        assert_eq!(guest.poll(0), [0]);
        guest.assert_reads(0);
        drop(front_end);
    }
    server.end();
}

#[test]
fn a_front_end_that_waits_does_not_change_the_other_ones_write_cache() {
    let server = Server::start(Options::default());
    let (mut source, mut old) = server.attached(1);
    let (mut target, mut new) = destination(&server);
    assert_eq!(source.set_config(32, 0, &[0]), 0);
    assert_eq!((source.config(32, 1, 0), target.config(32, 1, 0)), (vec![0], vec![0]));
    let write = |guest: &mut Guest| {
        let before = server.syncs();
        guest.send(0, OUT, 8, &[(DATA, 512, false)]);
        guest.kick(0);
        assert_eq!(guest.poll(0), [0]);
        server.syncs() - before
    };
    assert_eq!(write(&mut old), 1, "without a cache what is answered is durable");
    target.set_up(&new, 0);
    target.tell(R::RESET_DEVICE, &[]);
    target.set_up(&new, 0);
    assert_eq!(target.config(32, 1, 0), [1]);
    assert_eq!(write(&mut old), 1);
    drop(source);
    assert_eq!(write(&mut new), 0);
    server.end();
}

#[test]
fn more_front_ends_than_there_is_room_for_wait_outside() {
    let server = Server::start(Options::default());
    let mut inside: Vec<FrontEnd> = (0..16).map(|_| server.connect()).collect();
    for front_end in &mut inside {
        front_end.negotiate();
        front_end.ask_u64(R::GET_FEATURES);
    }
    let mut outside = server.connect();
    outside.send(R::GET_FEATURES, 1, &[], &[]);
    outside.assert_silent(MOMENT);
    drop(inside.pop());
    outside.any_reply();
    server.end();
}

#[test]
fn a_guest_that_moves_keeps_its_write_cache_and_a_region_remembers_it() {
    let server = Server::start(Options::default());
    let (mut source, mut old) = server.attached(1);
    assert_eq!(source.set_config(32, 0, &[0]), 0);
    old.assert_reads(0);
    let (mut target, new) = destination(&server);
    drop(source);
    target.set_up(&new, 0);
    assert_eq!(target.config(32, 1, 0), [0]);
    // Its region says so to a daemon that has not seen the guest before.
    let (payload, file) = target.get_inflight(1);
    assert_eq!(target.set_inflight(&payload, &file), 0);
    let other = Server::start(Options::default());
    let mut again = other.connect();
    again.negotiate();
    assert_eq!(again.config(32, 1, 0), [1]);
    assert_eq!(again.set_inflight(&payload, &file), 0);
    assert_eq!(again.config(32, 1, 0), [0]);
    assert_eq!(again.acknowledged(R::RESET_DEVICE, &[], &[]), 0);
    assert_eq!(again.config(32, 1, 0), [1]);
    server.end();
    other.end();
}
