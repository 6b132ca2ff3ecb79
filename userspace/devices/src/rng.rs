//! A source of random bytes: virtio-rng over the system's own.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::virtio::{Broken, Chain, Device, Done, Lane, Memory, Refusal};

/// The most random bytes of one request; a driver that wants more asks again.
pub const MAX_BYTES: usize = 1 << 16;

/// A source of random bytes (`getrandom`), as good as those that the system gives its own
/// programs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queues(&self) -> u16 {
        1
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(Source::default()))
    }
}

#[derive(Debug, Default)]
struct Source {
    /// Why there are no random bytes.
    failed: Option<io::Error>,
}

impl Lane for Source {
    fn wants(&mut self) -> bool {
        self.failed.is_none()
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if chain.readable_len() > 0 {
            return Err(Broken::Request(
                "a buffer for random bytes with something to read",
            ));
        }
        let len = (chain.writable_len() as usize).min(MAX_BYTES);
        let mut bytes = vec![0; len];
        let mut written = 0;
        match getrandom::fill(&mut bytes) {
            Ok(()) => {
                chain.write(memory, 0, &bytes)?;
                // At most `MAX_BYTES`.
                written = u32::try_from(len).unwrap_or(0);
            }
            Err(error) => self.failed = Some(error.into()),
        }
        Ok(Some(Done { chain, written }))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}
