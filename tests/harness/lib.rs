//! What the fuzzers do with an input: no panic, no hang, bounded memory, and what each module says.
//!
//! The same functions are called by the fuzzers of `integration/fuzz`, whose inputs come from
//! libFuzzer, and by `tests/fuzzers.rs`, whose inputs are drawn from a seed. An input is a string
//! of bytes from which numbers are taken until it ends, so that every string means something and a
//! changed byte changes one choice.
//!
//! [`image`] spoils an image and uses it as a guest would; [`chain`] lays descriptors and garbage
//! out in a guest's memory and lets a worker serve them; [`messages`] is a front-end that says
//! anything, and [`handshakes`] are several that begin as real ones do. [`examples`] has inputs to
//! start from.

pub mod chain;
#[path = "../common/driver.rs"]
mod driver;
pub mod examples;
mod front_end;
pub mod handshakes;
pub mod image;
pub mod messages;
mod places;
mod repair;
mod seeds;
mod watch;

pub use seeds::{Seed, seeds};
