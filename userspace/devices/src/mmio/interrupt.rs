//! How a device interrupts its driver.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

/// The interrupt line of a device: an eventfd that the VMM has made an irqfd of.
///
/// By the specification the line is up while the driver has something to acknowledge, and an
/// irqfd cannot take a line down. There are two ways around that, and which one it is must be
/// what the VMM tells the guest of the interrupt.
///
/// * [`edge`](Self::edge): each write to the eventfd is an edge. One comes whenever there is
///   something new, and again where the driver acknowledges less than there was. An edge
///   while the interrupt is masked or handled is kept by the interrupt controller, so none is
///   lost.
/// * [`level`](Self::level): the irqfd has a second eventfd (`KVM_IRQFD_FLAG_RESAMPLE`), by which
///   KVM says that the guest is through with the interrupt and that it has taken the line down;
///   where there is still something to acknowledge, the line goes up again. A line that devices
///   share must be one of these.
#[derive(Debug)]
pub struct Interrupt {
    irq: OwnedFd,
    resample: Option<OwnedFd>,
}

impl Interrupt {
    /// An interrupt that the guest was told to be edge-triggered.
    #[must_use]
    pub fn edge(irq: OwnedFd) -> Self {
        Self {
            irq,
            resample: None,
        }
    }

    /// An interrupt that the guest was told to be level-triggered, with the eventfd by which KVM
    /// has the device look at it again.
    #[must_use]
    pub fn level(irq: OwnedFd, resample: OwnedFd) -> Self {
        Self {
            irq,
            resample: Some(resample),
        }
    }

    pub(super) fn is_level(&self) -> bool {
        self.resample.is_some()
    }

    /// Interrupts the driver.
    pub(super) fn raise(&self) -> io::Result<()> {
        match nix::unistd::write(&self.irq, &1u64.to_ne_bytes()) {
            // Full is as good.
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until KVM has taken the line down, or for `stop`: whether to look at it again.
    pub(super) fn wait(&self, stop: &EventFd) -> io::Result<bool> {
        let Some(resample) = &self.resample else {
            return Ok(false);
        };
        let fds = [stop.as_fd(), resample.as_fd()];
        let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => return Ok(true),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        let [stopped, down] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if !stopped.is_empty() {
            return Ok(false);
        }
        if !down.contains(PollFlags::POLLIN) {
            return Err(io::Error::other("the resample eventfd is none"));
        }
        // Readable, so that it does not block.
        nix::unistd::read(resample, &mut [0; 8])?;
        Ok(true)
    }
}
