//! `vhost-user-qcow2`: parse, log, run, exit status.
fn main() {}
