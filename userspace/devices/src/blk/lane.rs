//! What serves a queue of a disk.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Blk;
use super::request::{self, Job, Request, Work};
use crate::disk::Store;
use crate::memory::Memory;
use crate::virtio::{Broken, Chain, Done, Lane};

/// Serves a queue.
pub(super) struct BlkLane {
    disk: Arc<Blk>,
    /// The driver counts on every write being safe.
    settles: bool,
    store: Store<Job>,
}

impl BlkLane {
    pub(super) fn new(disk: Arc<Blk>, queue: u16, features: u64) -> Self {
        Self {
            store: Store::new(&disk.image, disk.io_uring, queue),
            settles: request::settles(features),
            disk,
        }
    }
}

impl Lane for BlkLane {
    fn wants(&mut self) -> bool {
        self.store.wants()
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let request = Request::parse(&chain, memory)?;
        let told = match request.work(&self.disk, self.settles, &chain, memory) {
            Ok(Work::Disk(work)) => {
                let job = Job {
                    writes: request.writes(&work),
                    chain,
                    request,
                };
                let done = self.store.submit(&self.disk.image, work, job, memory);
                return done.map(|(job, done)| job.finish(memory, done)).transpose();
            }
            Ok(Work::Serial) => request.serial(&self.disk, &chain, memory),
            Err(failure) => Err(failure),
        };
        let written = request.finish(&chain, memory, told)?;
        Ok(Some(Done { chain, written }))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.store.flush()
    }

    fn finished(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let done = self.store.finished(&self.disk.image, memory);
        done.map(|(job, done)| job.finish(memory, done)).transpose()
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.store.event()
    }
}
