//! Packets of the driver's, on their way out.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MTU;

use super::header::{self, BadPacket, MAX_PACKET};
use super::traffic::Fate;
use super::{HEADER_BYTES, Net};
use crate::virtio::{Broken, Chain, Done, Lane, Memory};

pub(super) struct Sender {
    net: Arc<Net>,
    features: u64,
    mtu: Option<u16>,
    /// Header and packet.
    buffer: Vec<u8>,
    /// Why there is no link any more.
    failed: Option<io::Error>,
}

impl Sender {
    pub(super) fn new(net: Arc<Net>, features: u64) -> Self {
        let told = features & 1 << VIRTIO_NET_F_MTU != 0;
        Self {
            mtu: told.then(|| net.link.mtu()),
            features,
            buffer: vec![0; HEADER_BYTES + MAX_PACKET],
            failed: None,
            net,
        }
    }

    /// The packet as the link gets it.
    fn packet(
        &mut self,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<Result<&[u8], BadPacket>, Broken> {
        let len = chain.readable_len() as usize;
        let Some(bytes) = self.buffer.get_mut(..len) else {
            return Ok(Err(BadPacket::Length(len - HEADER_BYTES)));
        };
        // Once: the driver may change it after it was checked.
        chain.read(memory, 0, bytes)?;
        let Some((head, packet)) = bytes.split_first_chunk_mut() else {
            return Err(Broken::Request("a packet to send without a header"));
        };
        match header::of_driver(head, self.features, self.mtu, packet) {
            Ok(checked) => *head = checked,
            Err(bad) => return Ok(Err(bad)),
        }
        Ok(Ok(bytes))
    }
}

impl Lane for Sender {
    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if chain.writable_len() > 0 {
            return Err(Broken::Request("a packet to send with room to be written"));
        }
        if (chain.readable_len() as usize) < HEADER_BYTES {
            return Err(Broken::Request("a packet to send without a header"));
        }
        let net = Arc::clone(&self.net);
        match self.packet(&chain, memory)? {
            Err(bad) => net.traffic.lost(Fate::Malformed, &bad),
            Ok(packet) => match send(&net, packet) {
                Ok(()) => {
                    net.traffic.count(Fate::Sent);
                }
                Err(error) => {
                    net.traffic.lost(Fate::Refused, &error);
                    if error.kind() == ErrorKind::NotConnected {
                        self.failed = Some(error);
                    }
                }
            },
        }
        // The driver is not told: networks lose packets, and what uses them knows.
        Ok(Some(Done { chain, written: 0 }))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

fn send(net: &Net, packet: &[u8]) -> io::Result<()> {
    loop {
        match net.link.send(packet) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            sent => return sent,
        }
    }
}
