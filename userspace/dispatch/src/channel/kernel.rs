//! Channels whose VMM's end KVM has, for the mechanism `ioregionfd`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ioregion_abi::wire::Layout;
use kvm_ioctls::VmFd;

use super::{Channel, Inner, Patience};
use crate::wire::{self, Wire};

impl Channel {
    /// Makes a channel of the purpose-made kind, for the mechanism
    /// [`Ioregionfd`](crate::mechanism::Ioregionfd) only, and the device's end of its wire.
    ///
    /// # Errors
    ///
    /// KVM's: `ENOTTY` where the kernel has no ioregionfd.
    pub fn purpose_made(vm: &VmFd) -> io::Result<(Arc<Self>, Box<dyn Wire>)> {
        let (kernel, device) = wire::ioregionfd::pair(vm)?;
        let channel = Self::new(Box::new(kernel), Layout::default(), Patience::default());
        Ok((Arc::new(channel), Box::new(device)))
    }

    /// Gives the VMM's end to KVM: the files to read responses from and to write commands to. From
    /// now on no region but KVM's can be assigned to the channel, unless
    /// [`take_back`](Self::take_back) is called. Returns whether KVM did not have it before, too.
    ///
    /// # Errors
    ///
    /// Why the channel is broken, that KVM cannot use its transport or layout, or that other
    /// regions use it.
    pub(crate) fn give_to_kernel(&self) -> io::Result<([OwnedFd; 2], bool)> {
        self.check_open()?;
        let mut inner = self.lock();
        if let Some(what) = inner.unfit_for_kernel(self.layout) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let files = inner
            .wire
            .kernel_files()
            .ok_or(io::ErrorKind::InvalidInput)?;
        let [read, write] = files.map(|fd| fd.try_clone_to_owned());
        let files = [read?, write?];
        let first = !std::mem::replace(&mut inner.kernel, true);
        Ok((files, first))
    }

    /// KVM has refused the VMM's end.
    pub(crate) fn take_back(&self) {
        self.lock().kernel = false;
    }

    /// Why KVM cannot use the VMM's end; `None` if it can.
    pub(crate) fn unfit_for_kernel(&self) -> Option<&'static str> {
        self.lock().unfit_for_kernel(self.layout)
    }
}

impl Inner {
    fn unfit_for_kernel(&self, layout: Layout) -> Option<&'static str> {
        if layout != Layout::default() {
            Some("KVM speaks the layout `info` only")
        } else if self.wire.kernel_files().is_none() {
            Some("KVM cannot use the channel's transport")
        } else if self.kernel {
            None
        } else if !self.on_break.is_empty() {
            Some("regions outside of KVM use the channel")
        } else if self.unflushed || !self.queue.is_idle() {
            Some("the device still owes a response to a region outside of KVM")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::state::New;
    use crate::wire::{Transport, Try};

    #[test]
    fn kernel_gets_no_channel_on_which_a_response_is_owed() {
        let (channel, mut device) = Channel::pair(Transport::Stream).unwrap();
        assert_eq!(channel.unfit_for_kernel(), None);
        let read = New {
            region: 1,
            message: [0; wire::MESSAGE_LEN],
            write: false,
            response: true,
            detached: true,
        };
        channel.request(read, || true);
        assert!(channel.unfit_for_kernel().is_some());
        channel.advance();
        assert!(matches!(device.try_recv(), Ok(Try::Done(_))));
        assert!(channel.unfit_for_kernel().is_some());
        channel.settle(1, true, || ());
        assert!(channel.unfit_for_kernel().is_some());
        assert!(channel.give_to_kernel().is_err());
        device.try_send(&[0; wire::MESSAGE_LEN]).unwrap();
        channel.advance();
        assert_eq!(channel.unfit_for_kernel(), None);
        assert!(channel.give_to_kernel().unwrap().1);
        assert!(!channel.give_to_kernel().unwrap().1);
        assert!(channel.check().is_err());
        // What KVM waits for is left alone.
        device.try_send(&[0; wire::MESSAGE_LEN]).unwrap();
        channel.advance();
        assert_eq!(channel.cause(), None);
    }
}
