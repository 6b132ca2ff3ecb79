//! Packets from outside, on their way to the driver.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::header::{self, MAX_PACKET};
use super::traffic::Fate;
use super::{HEADER_BYTES, Net};
use crate::virtio::{Broken, Chain, Done, Lane, Memory};

/// How many packets are looked at for one that the driver can take, before others get a turn.
const TRIES: usize = 64;

pub(super) struct Receiver {
    net: Arc<Net>,
    features: u64,
    /// Header and packet.
    buffer: Vec<u8>,
    /// How much of the buffer waits for room.
    packet: Option<usize>,
    /// Buffers of the driver's for the packet that waits, and their bytes.
    held: Vec<Chain>,
    room: usize,
    /// Buffers with the packet that the driver gets next.
    done: VecDeque<Done>,
    /// Why there is no link any more.
    failed: Option<io::Error>,
}

impl Receiver {
    pub(super) fn new(net: Arc<Net>, features: u64) -> io::Result<Self> {
        net.link.set_offloads(features)?;
        Ok(Self {
            net,
            features,
            buffer: vec![0; HEADER_BYTES + MAX_PACKET],
            packet: None,
            held: Vec::new(),
            room: 0,
            done: VecDeque::new(),
            failed: None,
        })
    }

    /// Takes a packet that the driver can take off the link.
    fn receive(&mut self) -> Option<usize> {
        for _ in 0..TRIES {
            let len = match self.net.link.receive(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => {
                    self.failed = Some(error);
                    return None;
                }
            };
            let bytes = self.buffer.get(..len).unwrap_or_default();
            let Some((head, packet)) = bytes.split_first_chunk() else {
                self.failed = Some(io::Error::other("the link gives packets without a header"));
                return None;
            };
            match header::to_driver(head, self.features, packet.len(), 1) {
                Ok(checked) => {
                    self.buffer[..HEADER_BYTES].copy_from_slice(&checked);
                    return Some(len);
                }
                Err(bad) => self.net.traffic.lost(Fate::Unsuited, &bad),
            }
        }
        None
    }

    /// Puts the packet into the buffers that are held, which have room for it.
    fn deliver(&mut self, len: usize, memory: &dyn Memory) -> Result<(), Broken> {
        // A queue has at most 2^15 buffers.
        let buffers = u16::try_from(self.held.len()).unwrap_or(u16::MAX);
        let (_, count) = self.buffer.split_at_mut(HEADER_BYTES - 2);
        count[..2].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.buffer[..len];
        for chain in self.held.drain(..) {
            let here = rest.len().min(chain.writable_len() as usize);
            let (part, behind) = rest.split_at(here);
            chain.write(memory, 0, part)?;
            rest = behind;
            // A part of a chain's length, which is 32 bits.
            let written = u32::try_from(here).unwrap_or(u32::MAX);
            self.done.push_back(Done { chain, written });
        }
        self.room = 0;
        self.packet = None;
        self.net.traffic.count(Fate::Received);
        Ok(())
    }
}

impl Lane for Receiver {
    fn wants(&mut self) -> bool {
        // The driver gets one packet's buffers after the other's.
        if self.failed.is_some() || !self.done.is_empty() {
            return false;
        }
        if self.packet.is_none() {
            self.packet = self.receive();
        }
        self.packet.is_some()
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if chain.readable_len() > 0 {
            return Err(Broken::Request(
                "a buffer for packets with something to read",
            ));
        }
        if (chain.writable_len() as usize) < HEADER_BYTES {
            return Err(Broken::Request(
                "a buffer for packets without room for a header",
            ));
        }
        let Some(len) = self.packet else {
            // Nobody asked for it.
            return Ok(Some(Done { chain, written: 0 }));
        };
        let mergeable = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        if !mergeable && (chain.writable_len() as usize) < len {
            let room = chain.writable_len();
            let why = format_args!("it has {len} bytes, the driver's buffer {room}");
            self.net.traffic.lost(Fate::TooLarge, &why);
            self.packet = None;
            return Ok(Some(Done { chain, written: 0 }));
        }
        self.room = self.room.saturating_add(chain.writable_len() as usize);
        self.held.push(chain);
        if self.room >= len {
            self.deliver(len, memory)?;
        }
        Ok(match self.done.len() {
            1 => self.done.pop_front(),
            _ => None,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn finished(&mut self, _: &dyn Memory) -> Result<Option<Done>, Broken> {
        Ok(self.done.pop_front())
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        // With a packet only the driver can help.
        self.packet.is_none().then(|| self.net.link.as_fd())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // What waits until the next driver comes should suit any.
        if let Err(error) = self.net.link.set_offloads(0) {
            tracing::debug!(%error, "the link keeps its offloads");
        }
    }
}
