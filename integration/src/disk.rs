//! What a load needs of a front-end.

use std::io::{Error, Result};
use std::time::Duration;

use crate::client::{Answer, Client, Request};

/// An answer that takes longer than this will never come.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the device says about itself.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The disk's size in bytes.
    pub size: u64,
    /// The unit of requests in bytes.
    pub block: usize,
    /// The longest discard in sectors of 512 bytes.
    pub discard: usize,
    /// The longest write-zeroes in sectors of 512 bytes.
    pub write_zeroes: usize,
}

/// A disk with a fixed number of slots, each with a data buffer and at most one request in flight.
pub trait Disk {
    /// What the device says about itself.
    ///
    /// # Errors
    ///
    /// Fails when it does not answer or does not offer what a load needs.
    fn limits(&mut self) -> Result<Limits>;

    /// How many queues there are.
    fn queue_count(&self) -> usize;

    /// How many slots there are.
    fn slot_count(&self) -> usize;

    /// A slot with no request in flight.
    fn free_slot(&self) -> Option<usize>;

    /// How many requests are in flight.
    fn in_flight(&self) -> usize;

    /// The data buffer of a slot that has no request in flight.
    fn buffer(&mut self, slot: usize) -> &mut [u8];

    /// Queues a request. Its data is cut into pieces at `cuts`, each a descriptor of its own.
    ///
    /// # Errors
    ///
    /// Fails when the queue is full.
    fn submit(&mut self, queue: usize, slot: usize, request: Request, cuts: &[usize])
    -> Result<()>;

    /// Tells the daemon about queued requests where it wants to be told.
    ///
    /// # Errors
    ///
    /// Fails when the descriptor for it does not work.
    fn kick(&mut self) -> Result<()>;

    /// Waits until something has been answered. The list is empty if nothing was in time.
    ///
    /// # Errors
    ///
    /// Fails when waiting does, or when the daemon has answered what it was not asked.
    fn wait(&mut self, time: Duration) -> Result<Vec<Answer>>;

    /// Submits one request on the first queue and waits for its answer, with nothing else in
    /// flight. The data is in the buffer of slot 0.
    ///
    /// # Errors
    ///
    /// Fails with the error the daemon answered, or when it does not answer at all.
    fn execute(&mut self, request: Request) -> Result<()> {
        assert_eq!(self.in_flight(), 0, "execute is for a quiet disk");
        self.submit(0, 0, request, &[])?;
        self.kick()?;
        match self.wait(PATIENCE)?.first() {
            Some(answer) if answer.result == 0 => Ok(()),
            Some(answer) => Err(Error::from_raw_os_error(-answer.result)),
            None => Err(Error::other(format!("no answer to {request:?}"))),
        }
    }
}

impl Disk for Client {
    fn limits(&mut self) -> Result<Limits> {
        use virtio_driver::VirtioBlkFeatureFlags as Features;
        let wanted = Features::FLUSH | Features::DISCARD | Features::WRITE_ZEROES;
        let features = self.features();
        if !features.contains(wanted) {
            return Err(Error::other(format!("the device offers only {features:?}")));
        }
        let config = self.config()?;
        Ok(Limits {
            size: u64::from(config.capacity) * 512,
            block: u32::from(config.blk_size) as usize,
            discard: u32::from(config.max_discard_sectors) as usize,
            write_zeroes: u32::from(config.max_write_zeroes_sectors) as usize,
        })
    }

    fn queue_count(&self) -> usize {
        Client::queue_count(self)
    }

    fn slot_count(&self) -> usize {
        Client::slot_count(self)
    }

    fn free_slot(&self) -> Option<usize> {
        Client::free_slot(self)
    }

    fn in_flight(&self) -> usize {
        Client::in_flight(self)
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        Client::buffer(self, slot)
    }

    fn submit(
        &mut self,
        queue: usize,
        slot: usize,
        request: Request,
        cuts: &[usize],
    ) -> Result<()> {
        Client::submit(self, queue, slot, request, cuts)
    }

    fn kick(&mut self) -> Result<()> {
        Client::kick(self)
    }

    fn wait(&mut self, time: Duration) -> Result<Vec<Answer>> {
        Client::wait(self, time)
    }
}
