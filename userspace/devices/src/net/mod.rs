//! A network device: virtio-net with one pair of queues.

mod config;
mod header;
mod receive;
mod send;
mod sys;
mod tap;
mod traffic;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use crate::virtio::{Device, Lane, Refusal};
pub use config::{Mac, MacError};
pub use tap::{TAP_REQUESTS, Tap, TapError};
pub use traffic::Traffic;

/// Bytes of the header in front of each packet (`struct virtio_net_hdr_v1`, little-endian), here
/// as between driver and device.
pub const HEADER_BYTES: usize = header::BYTES;

/// The queue of buffers for packets to the driver.
pub const RECEIVE: u16 = 0;
/// The queue of packets of the driver's.
pub const SEND: u16 = 1;

/// The fewest descriptors with which queues cannot get stuck: drivers that take large packets in
/// several buffers give buffers of at least 1.5 KiB, and 64 KiB must fit.
pub const MIN_QUEUE_SIZE: u16 = 64;

/// What a network device is plugged into. Packets have a header of [`HEADER_BYTES`] bytes in
/// front, which says what was left undone: checksums, and segmentation.
///
/// The descriptor is readable when there is a packet to receive.
pub trait Link: AsFd + Send + Sync {
    /// Takes the next packet, of which what does not fit is lost: how many bytes. Does not block.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where there is none; any other ends the device's queue.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;

    /// Lets a packet go, whole. Does not block.
    ///
    /// # Errors
    ///
    /// Why the packet is lost; `NotConnected` where there will never be a place for packets again.
    fn send(&self, packet: &[u8]) -> io::Result<()>;

    /// Says with what undone packets may be received: `features` has the `VIRTIO_NET_F_GUEST_*`
    /// that the driver took. Packets that wait already may not keep to it.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_offloads(&self, features: u64) -> io::Result<()>;

    /// Bytes that a packet can have behind its Ethernet header.
    fn mtu(&self) -> u16;

    /// Whether it knows datagrams that are to be cut into segments (UDP segmentation).
    fn has_uso(&self) -> bool;
}

/// What a network device is besides its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The interface's address; without one the driver makes one up.
    pub mac: Option<Mac>,
    /// Checksums and segmentation may be left to the other side.
    pub offloads: bool,
    /// A packet may reach the driver in several buffers.
    pub mergeable: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mac: None,
            offloads: true,
            mergeable: true,
        }
    }
}

/// A network device.
pub struct Net {
    link: Box<dyn Link>,
    options: Options,
    traffic: traffic::Counters,
}

impl Net {
    /// A device with this end of a link.
    #[must_use]
    pub fn new(link: impl Link + 'static, options: &Options) -> Self {
        Self {
            link: Box::new(link),
            options: *options,
            traffic: traffic::Counters::default(),
        }
    }

    /// The packets so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic.read()
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Net")
            .field("options", &self.options)
            .field("traffic", &self.traffic())
            .finish_non_exhaustive()
    }
}

/// UDP segmentation, which a link need not know.
const USO: [u32; 3] = [
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// Features that mean nothing without one of others.
const NEEDS: [(u32, &[u32]); 9] = [
    (VIRTIO_NET_F_GUEST_TSO4, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_GUEST_TSO6, &[VIRTIO_NET_F_GUEST_CSUM]),
    (
        VIRTIO_NET_F_GUEST_ECN,
        &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6],
    ),
    (VIRTIO_NET_F_HOST_TSO4, &[VIRTIO_NET_F_CSUM]),
    (VIRTIO_NET_F_HOST_TSO6, &[VIRTIO_NET_F_CSUM]),
    (
        VIRTIO_NET_F_HOST_ECN,
        &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6],
    ),
    (VIRTIO_NET_F_GUEST_USO4, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_GUEST_USO6, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_HOST_USO, &[VIRTIO_NET_F_CSUM]),
];

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS];
        if self.options.mac.is_some() {
            bits.push(VIRTIO_NET_F_MAC);
        }
        if self.options.mergeable {
            bits.push(VIRTIO_NET_F_MRG_RXBUF);
        }
        if self.options.offloads {
            bits.extend([VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
            let known = |bit: &u32| self.link.has_uso() || !USO.contains(bit);
            bits.extend(NEEDS.map(|(bit, _)| bit).iter().filter(|bit| known(bit)));
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn check_features(&self, features: u64) -> Result<(), Refusal> {
        for (bit, needs) in NEEDS {
            let needs = needs.iter().fold(0, |all, bit| all | 1 << bit);
            if features & 1 << bit != 0 && features & needs == 0 {
                return Err(Refusal::Missing(needs));
            }
        }
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        config::space(self.options.mac, self.link.mtu())
    }

    fn queues(&self) -> u16 {
        2
    }

    fn lane(self: Arc<Self>, queue: u16, features: u64) -> io::Result<Box<dyn Lane>> {
        match queue {
            RECEIVE => Ok(Box::new(receive::Receiver::new(self, features)?)),
            SEND => Ok(Box::new(send::Sender::new(self, features))),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}
