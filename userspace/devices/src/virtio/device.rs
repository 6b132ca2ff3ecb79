//! What a virtio device is to whoever carries requests to it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::chain::Chain;
use super::queue::Broken;
use crate::memory::Memory;

/// A virtio device of any type. Shared by the threads that serve its queues.
pub trait Device: Send + Sync {
    /// The device type, `VIRTIO_ID_*`.
    fn kind(&self) -> u32;

    /// The features of its type that it offers. Those of the transport and of queues are offered
    /// by whoever carries requests.
    fn features(&self) -> u64;

    /// Whether it can work with these features, a part of those that were offered.
    ///
    /// # Errors
    ///
    /// Why not.
    fn check_features(&self, features: u64) -> Result<(), Refusal>;

    /// Its configuration space.
    fn config(&self) -> Vec<u8>;

    /// How many queues it has.
    fn queues(&self) -> u16;

    /// What serves a queue for a driver that has set the device up; `features` are those that it
    /// took. Called by the thread that serves the queue.
    ///
    /// # Errors
    ///
    /// Where the system refuses what it needs: the queue is not served.
    fn lane(self: Arc<Self>, queue: u16, features: u64) -> io::Result<Box<dyn Lane>>;
}

/// A request that the device is done with.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is not given back to its queue is lost"]
pub struct Done {
    /// The request.
    pub chain: Chain,
    /// How many bytes of its writable part were written, from the start.
    pub written: u32,
}

/// What serves one queue for one driver. Whoever runs the queue asks in turn
/// [`wants`](Self::wants) and [`submit`](Self::submit)s requests, [`flush`](Self::flush)es them,
/// and takes what is [`finished`](Self::finished), in whatever order; then it waits for the driver
/// and for [`event`](Self::event).
///
/// What goes wrong with a well-formed request is told to the driver in the request. Where a lane
/// is dropped with requests that are not finished, the drop waits until nothing of them touches
/// the driver's memory any more.
pub trait Lane {
    /// Whether it has a use for another request now: a receiver without a packet has none.
    fn wants(&mut self) -> bool {
        true
    }

    /// Takes a request, and gives it back where it is done at once.
    ///
    /// # Errors
    ///
    /// A request that the device cannot even answer: the queue is broken.
    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken>;

    /// Sets about what was submitted.
    ///
    /// # Errors
    ///
    /// Where the system fails it: the queue is no longer served.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// A request that was finished since it was submitted. The driver sees at once all that are
    /// returned in a row, up to `None`.
    ///
    /// # Errors
    ///
    /// A request that the device cannot even answer: the queue is broken.
    fn finished(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let _ = memory;
        Ok(None)
    }

    /// Readable when [`finished`](Self::finished) or [`wants`](Self::wants) may have something to
    /// say.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A lane that carries each request out while it is submitted.
#[derive(Debug)]
pub struct AtOnce<F>(
    /// Carries a request out and returns how many bytes it has written.
    pub F,
);

impl<F> Lane for AtOnce<F>
where
    F: FnMut(&Chain, &dyn Memory) -> Result<u32, Broken>,
{
    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let written = (self.0)(&chain, memory)?;
        Ok(Some(Done { chain, written }))
    }
}

/// Why a device does not work with the features that a driver took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Features that nobody offered.
    #[error("the driver took features that were not offered: {0:#x}")]
    NotOffered(u64),
    /// Features without which the device does not work.
    #[error("the driver did not take features that the device needs: {0:#x}")]
    Missing(u64),
}
