use super::*;
use proptest::prelude::*;

const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_USO
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

const PLAIN: Header = Header {
    flags: 0,
    gso_type: NONE,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
};

/// What Linux sends for a TCP connection.
const SEGMENTS: Header = Header {
    flags: NEEDS_CSUM,
    gso_type: TCPV4,
    hdr_len: 66,
    gso_size: 1448,
    csum_start: 34,
    csum_offset: 16,
};

/// The same for UDP.
const DATAGRAMS: Header = Header {
    gso_type: UDP,
    hdr_len: 42,
    csum_offset: 6,
    ..SEGMENTS
};

fn sent(header: Header, features: u64, len: usize) -> Result<Header, BadPacket> {
    let out = of_driver(&header.encode(7), features, None, &vec![0; len])?;
    assert_eq!(out[10..], [0, 0]);
    Ok(Header::decode(&out))
}

fn received(header: Header, features: u64, len: usize) -> Result<Header, BadPacket> {
    let out = to_driver(&header.encode(7), features, len, 3)?;
    assert_eq!(out[10..], [3, 0]);
    Ok(Header::decode(&out))
}

#[test]
fn fields_lie_where_the_kernel_header_has_them() {
    use std::mem::offset_of;
    use virtio_bindings::virtio_net::virtio_net_hdr as H;
    let bytes: [u8; BYTES] = std::array::from_fn(|at| at as u8);
    let word = |at: usize| u16::from_le_bytes([at as u8, at as u8 + 1]);
    let expected = Header {
        flags: offset_of!(H, flags) as u8,
        gso_type: offset_of!(H, gso_type) as u8,
        hdr_len: word(offset_of!(H, hdr_len)),
        gso_size: word(offset_of!(H, gso_size)),
        csum_start: word(offset_of!(H, csum_start)),
        csum_offset: word(offset_of!(H, csum_offset)),
    };
    assert_eq!(Header::decode(&bytes), expected);
    assert_eq!(expected.encode(word(10)), bytes);
    assert_eq!(size_of::<H>(), BYTES - 2);
}

#[test]
fn honest_headers_pass_as_they_are() {
    for header in [PLAIN, SEGMENTS, DATAGRAMS] {
        assert_eq!(sent(header, ALL, 9000), Ok(header));
        assert_eq!(received(header, ALL, 9000), Ok(header));
    }
    assert_eq!(sent(PLAIN, 0, 60), Ok(PLAIN));
    assert_eq!(received(PLAIN, 0, 60), Ok(PLAIN));
}

#[test]
fn lengths_that_no_packet_has_are_refused() {
    for len in [0, 13, MAX_PACKET + 1, 1 << 20] {
        assert_eq!(sent(PLAIN, ALL, len), Err(BadPacket::Length(len)));
        assert_eq!(received(PLAIN, ALL, len), Err(BadPacket::Length(len)));
    }
    for len in [14, MAX_PACKET] {
        assert_eq!(sent(PLAIN, ALL, len), Ok(PLAIN));
    }
}

#[test]
fn offloads_that_were_not_agreed_upon_are_refused() {
    let without = |bit: u32| ALL & !(1 << bit);
    let v6 = Header {
        gso_type: TCPV6,
        ..SEGMENTS
    };
    let ecn = Header {
        gso_type: TCPV4 | ECN,
        ..SEGMENTS
    };
    let gso = |header: Header| Err(BadPacket::GsoNotNegotiated(header.gso_type));
    let checksum = Err(BadPacket::ChecksumNotNegotiated);
    for (header, to, from, refusal) in [
        (
            SEGMENTS,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_GUEST_TSO4,
            gso(SEGMENTS),
        ),
        (v6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6, gso(v6)),
        (ecn, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN, gso(ecn)),
        (
            DATAGRAMS,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO4,
            gso(DATAGRAMS),
        ),
        (
            DATAGRAMS,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO6,
            gso(DATAGRAMS),
        ),
        (
            SEGMENTS,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            checksum,
        ),
    ] {
        assert_eq!(sent(header, without(to), 9000), refusal);
        assert_eq!(received(header, without(from), 9000), refusal);
        // The other direction's do not count.
        assert_eq!(sent(header, without(from), 9000), Ok(header));
        assert_eq!(received(header, without(to), 9000), Ok(header));
    }
    // Fragments of UDP (3), unknown ones, nothing but a flag, and a flag where it means nothing.
    for gso_type in [2, 3, 0x7f, ECN, UDP | ECN] {
        let header = Header {
            gso_type,
            ..SEGMENTS
        };
        assert_eq!(sent(header, !0, 9000), gso(header));
        assert_eq!(received(header, !0, 9000), gso(header));
    }
}

#[test]
fn checksums_outside_of_the_packet_are_refused() {
    let header = |csum_start, csum_offset| Header {
        csum_start,
        csum_offset,
        flags: NEEDS_CSUM,
        ..PLAIN
    };
    for (start, offset) in [
        (0, 16),
        (13, 16),
        (34, 65),
        (99, 0),
        (u16::MAX, u16::MAX),
        (14, u16::MAX),
    ] {
        let header = header(start, offset);
        assert_eq!(sent(header, ALL, 100), Err(BadPacket::ChecksumOutside));
        assert_eq!(received(header, ALL, 100), Err(BadPacket::ChecksumOutside));
    }
    for (start, offset) in [(14, 0), (34, 64), (98, 0)] {
        assert!(sent(header(start, offset), ALL, 100).is_ok());
    }
}

#[test]
fn segments_that_cannot_be_made_are_refused() {
    for gso_size in [0, GSO_BY_FRAGS] {
        let header = Header {
            gso_size,
            ..SEGMENTS
        };
        assert_eq!(sent(header, ALL, 9000), Err(BadPacket::GsoSize(gso_size)));
    }
    let complete = Header {
        flags: DATA_VALID,
        ..SEGMENTS
    };
    let other_place = Header {
        csum_offset: 6,
        ..SEGMENTS
    };
    let like_tcp = Header {
        csum_offset: 16,
        ..DATAGRAMS
    };
    let none = Header {
        flags: 0,
        ..SEGMENTS
    };
    for header in [complete, other_place, like_tcp, none] {
        let refused = Err(BadPacket::GsoWithoutChecksum);
        assert_eq!(sent(header, ALL, 9000), refused);
    }
    // Linux may have verified the checksums of what it merged.
    let merged = received(complete, ALL, 9000).unwrap();
    assert_eq!((merged.flags, merged.gso_size), (DATA_VALID, 1448));
}

#[test]
fn what_nobody_may_rely_on_is_not_passed_on() {
    // That a checksum was verified only the device may say, and only to drivers that ask for it.
    let verified = Header {
        flags: 0xfe,
        hdr_len: 9,
        gso_size: 9,
        csum_start: 9,
        csum_offset: 9,
        ..PLAIN
    };
    assert_eq!(sent(verified, ALL, 100), Ok(PLAIN));
    assert_eq!(received(verified, 0, 100), Ok(PLAIN));
    let flags = DATA_VALID;
    assert_eq!(received(verified, ALL, 100), Ok(Header { flags, ..PLAIN }));
    let hint = Header {
        hdr_len: u16::MAX,
        ..SEGMENTS
    };
    assert_eq!(sent(hint, ALL, 2000).unwrap().hdr_len, 2000);
}

#[test]
fn mtu_counts_behind_the_link_header_and_for_whole_packets_only() {
    let try_to_send = |len: usize, tags: &[[u8; 2]], header: Header| {
        let mut packet = vec![0; len];
        for (number, tag) in tags.iter().enumerate() {
            packet[12 + 4 * number..][..2].copy_from_slice(tag);
        }
        of_driver(&header.encode(0), ALL, Some(1500), &packet).map(drop)
    };
    let (vlan, outer) = ([0x81, 0x00], [0x88, 0xa8]);
    for (room, tags) in [
        (1514, &[][..]),
        (1518, &[vlan]),
        (1522, &[outer, vlan]),
        (1522, &[vlan, vlan, vlan]),
    ] {
        let (len, mtu) = (room + 1, 1500);
        assert_eq!(try_to_send(room, tags, PLAIN), Ok(()));
        let refused = Err(BadPacket::Mtu { len, mtu });
        assert_eq!(try_to_send(len, tags, PLAIN), refused);
    }
    assert_eq!(try_to_send(9000, &[], SEGMENTS), Ok(()));
}

proptest! {
    #[test]
    fn any_header_is_refused_or_keeps_to_what_was_agreed_upon(
        bytes: [u8; BYTES],
        likely in 0..5u8,
        features: u64,
        len in 0..=MAX_PACKET + 16,
    ) {
        let mut bytes = bytes;
        // Random bytes alone hardly ever ask for anything that could be granted.
        if likely > 0 {
            bytes[0] &= 3;
            bytes[1] = [0, 1, 4, 0x81, 5][usize::from(likely)];
            bytes[7] = 0;
            bytes[9] = 0;
            bytes[8] = [0, 16, bytes[8], 16, 6][usize::from(likely)];
        }
        let packet = vec![0; len];
        let both = [
            (of_driver(&bytes, features, None, &packet), BY_DRIVER),
            (to_driver(&bytes, features, len, 1), TO_DRIVER),
        ];
        for (out, allowed) in both {
            let Ok(out) = out else { continue };
            let header = Header::decode(&out);
            let has = |bit: u32| features & 1 << bit != 0;
            prop_assert!((ETHERNET..=MAX_PACKET).contains(&len));
            prop_assert!(usize::from(header.hdr_len) <= len);
            prop_assert!(header.flags & !(NEEDS_CSUM | DATA_VALID) == 0);
            prop_assert!(header.flags == 0 || has(allowed.checksum));
            prop_assert!(header.flags & DATA_VALID == 0 || allowed.verified);
            let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
            prop_assert!(header.flags & NEEDS_CSUM == 0 || end <= len);
            match header.gso_type {
                NONE => prop_assert_eq!(header.gso_size, 0),
                kind => {
                    let needed = match kind & !ECN {
                        TCPV4 => vec![allowed.tso4],
                        TCPV6 => vec![allowed.tso6],
                        UDP => allowed.uso.to_vec(),
                        _ => return Err(TestCaseError::fail("a type that nobody knows")),
                    };
                    prop_assert!(needed.iter().all(|&bit| has(bit)));
                    prop_assert!(has(allowed.checksum) && header.gso_size > 0);
                    prop_assert!(kind & ECN == 0 || has(allowed.ecn) && kind & !ECN != UDP);
                }
            }
        }
    }
}
