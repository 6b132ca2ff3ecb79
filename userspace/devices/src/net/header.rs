//! The header in front of each packet: what either side may ask of the other.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of the header, `struct virtio_net_hdr_v1`.
pub(super) const BYTES: usize = 12;
/// Bytes of an Ethernet header, which every packet has.
pub(super) const ETHERNET: usize = 14;
/// Bytes of a packet at most: a whole IPv6 packet behind an Ethernet header with two VLAN tags.
pub(super) const MAX_PACKET: usize = ETHERNET + 2 * VLAN_TAG + 40 + 65_535;

const VLAN_TAG: usize = 4;
/// Where TCP and UDP headers have their checksums.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;
/// A size that means something else to Linux.
const GSO_BY_FRAGS: u16 = 0xffff;

// All of them lie within one byte.
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const UDP: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// What is wrong with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadPacket {
    #[error("{0} bytes make no packet")]
    Length(usize),
    #[error("{len} bytes are more than the MTU of {mtu} allows without segmentation")]
    Mtu { len: usize, mtu: u16 },
    #[error("it lacks a checksum, which was not agreed upon")]
    ChecksumNotNegotiated,
    #[error("its checksum would lie outside of it")]
    ChecksumOutside,
    #[error("segmentation of type {0:#x} was not agreed upon")]
    GsoNotNegotiated(u8),
    #[error("it is to be cut into segments of {0} bytes")]
    GsoSize(u16),
    #[error("it is to be cut into segments without anybody computing their checksums")]
    GsoWithoutChecksum,
}

/// What one side may ask of the other, and the features that it takes.
#[derive(Debug, Clone, Copy)]
struct Direction {
    /// The sender may say that it has verified the checksum.
    verified: bool,
    checksum: u32,
    tso4: u32,
    tso6: u32,
    ecn: u32,
    /// The header does not say which version of IP it is about: all of these are needed.
    uso: &'static [u32],
}

const BY_DRIVER: Direction = Direction {
    verified: false,
    checksum: VIRTIO_NET_F_CSUM,
    tso4: VIRTIO_NET_F_HOST_TSO4,
    tso6: VIRTIO_NET_F_HOST_TSO6,
    ecn: VIRTIO_NET_F_HOST_ECN,
    uso: &[VIRTIO_NET_F_HOST_USO],
};

const TO_DRIVER: Direction = Direction {
    verified: true,
    checksum: VIRTIO_NET_F_GUEST_CSUM,
    tso4: VIRTIO_NET_F_GUEST_TSO4,
    tso6: VIRTIO_NET_F_GUEST_TSO6,
    ecn: VIRTIO_NET_F_GUEST_ECN,
    uso: &[VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6],
};

/// The header's fields, but for the number of buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    fn decode(bytes: &[u8; BYTES]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    fn encode(self, buffers: u16) -> [u8; BYTES] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [b0, b1] = buffers.to_le_bytes();
        let (flags, gso_type) = (self.flags, self.gso_type);
        [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, b0, b1]
    }

    /// Refuses what was not agreed upon or makes no sense; forgets what nobody may rely on.
    fn check(self, allowed: Direction, features: u64, len: usize) -> Result<Self, BadPacket> {
        if !(ETHERNET..=MAX_PACKET).contains(&len) {
            return Err(BadPacket::Length(len));
        }
        let has = |bit: u32| features & 1 << bit != 0;
        let mut checked = Self {
            flags: 0,
            gso_type: NONE,
            hdr_len: 0,
            gso_size: 0,
            csum_start: 0,
            csum_offset: 0,
        };
        if self.flags & DATA_VALID != 0 && allowed.verified && has(allowed.checksum) {
            checked.flags |= DATA_VALID;
        }
        if self.flags & NEEDS_CSUM != 0 {
            if !has(allowed.checksum) {
                return Err(BadPacket::ChecksumNotNegotiated);
            }
            let start = usize::from(self.csum_start);
            if start < ETHERNET || start + usize::from(self.csum_offset) + 2 > len {
                return Err(BadPacket::ChecksumOutside);
            }
            checked.flags |= NEEDS_CSUM;
            checked.csum_start = self.csum_start;
            checked.csum_offset = self.csum_offset;
        }
        if self.gso_type != NONE {
            // ECN is a matter of TCP.
            let ecn = self.gso_type & ECN == 0 || has(allowed.ecn);
            let (negotiated, checksum) = match self.gso_type & !ECN {
                TCPV4 => (ecn && has(allowed.tso4), TCP_CHECKSUM),
                TCPV6 => (ecn && has(allowed.tso6), TCP_CHECKSUM),
                _ if self.gso_type == UDP => {
                    (allowed.uso.iter().all(|&bit| has(bit)), UDP_CHECKSUM)
                }
                _ => (false, 0),
            };
            if !negotiated {
                return Err(BadPacket::GsoNotNegotiated(self.gso_type));
            }
            let partial = checked.flags & NEEDS_CSUM != 0 && self.csum_offset == checksum;
            if !partial && checked.flags & DATA_VALID == 0 {
                return Err(BadPacket::GsoWithoutChecksum);
            }
            if matches!(self.gso_size, 0 | GSO_BY_FRAGS) {
                return Err(BadPacket::GsoSize(self.gso_size));
            }
            checked.gso_type = self.gso_type;
            checked.gso_size = self.gso_size;
            // A hint, which is wrong at most by being too long.
            checked.hdr_len = self.hdr_len.min(u16::try_from(len).unwrap_or(u16::MAX));
        }
        Ok(checked)
    }
}

/// The header with which a packet of the driver's goes out. `features` are those that the driver
/// took; `mtu` is the one that it was told, if it was.
pub(super) fn of_driver(
    bytes: &[u8; BYTES],
    features: u64,
    mtu: Option<u16>,
    packet: &[u8],
) -> Result<[u8; BYTES], BadPacket> {
    let header = Header::decode(bytes).check(BY_DRIVER, features, packet.len())?;
    if let Some(mtu) = mtu
        && header.gso_type == NONE
        && packet.len() > usize::from(mtu) + link_header(packet)
    {
        let len = packet.len();
        return Err(BadPacket::Mtu { len, mtu });
    }
    Ok(header.encode(0))
}

/// The header with which a packet from outside goes to the driver, in as many buffers.
pub(super) fn to_driver(
    bytes: &[u8; BYTES],
    features: u64,
    len: usize,
    buffers: u16,
) -> Result<[u8; BYTES], BadPacket> {
    let header = Header::decode(bytes).check(TO_DRIVER, features, len)?;
    Ok(header.encode(buffers))
}

/// Bytes in front of what the MTU counts.
fn link_header(packet: &[u8]) -> usize {
    let tagged = |at: usize| matches!(packet.get(at..at + 2), Some([0x81, 0x00] | [0x88, 0xa8]));
    let mut len = ETHERNET;
    while len < ETHERNET + 2 * VLAN_TAG && tagged(len - 2) {
        len += VLAN_TAG;
    }
    len
}

#[cfg(test)]
mod tests;
