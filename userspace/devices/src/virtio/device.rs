//! What a virtio device is to whoever carries requests to it.

use super::chain::Chain;
use super::memory::Memory;
use super::queue::Broken;

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

    /// Carries a request out and returns how many bytes of the writable part, from its start, it
    /// has written. Called by one thread per queue at most; `features` are those that the driver
    /// took.
    ///
    /// What goes wrong with a well-formed request is told to the driver in the request.
    ///
    /// # Errors
    ///
    /// A request that the device cannot even answer: the queue is broken.
    fn serve(
        &self,
        queue: u16,
        features: u64,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<u32, Broken>;
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
