//! The kernel's requests and the answers to them: bytes to values and back, no I/O.

use ioregion_abi::vduse::{
    MESSAGE_BYTES, VDUSE_GET_VQ_STATE, VDUSE_REQ_RESULT_FAILED, VDUSE_REQ_RESULT_OK,
    VDUSE_SET_STATUS, VDUSE_SET_VQ_GROUP_ASID, VDUSE_SET_VQ_READY, VDUSE_SUSPEND,
    VDUSE_UPDATE_IOTLB, payload,
};
use ioregion_devices::virtio::Position;

/// Offset of the part that depends on the type.
const PAYLOAD: usize = 24;

/// What the kernel asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Where a queue stands.
    GetVqState {
        /// Which queue.
        queue: u32,
    },
    /// The driver writes the device status.
    SetStatus {
        /// The status; 0 is a reset.
        status: u8,
    },
    /// Mappings of these addresses are no longer valid once this is answered.
    UpdateIotlb {
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// Address space; 0 before API version 1.
        asid: u32,
    },
    /// A group of queues moves to another address space (API version 1).
    SetVqGroupAsid {
        /// Which group.
        group: u32,
        /// Where to.
        asid: u32,
    },
    /// The driver starts or stops a queue (`VDUSE_F_QUEUE_READY`).
    SetVqReady {
        /// Which queue.
        queue: u32,
        /// Whether it starts.
        ready: bool,
    },
    /// The device is to stand still (`VDUSE_F_SUSPEND`).
    Suspend,
}

/// A request that cannot be understood; it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRequest {
    /// A type that this library does not know.
    #[error("the kernel sent a request of the unknown type {0}")]
    Unknown(u32),
    /// Addresses whose last comes before the first.
    #[error("the kernel takes back addresses from {first:#x} to {last:#x}")]
    Range {
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
    },
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Carried out.
    Done,
    /// Refused.
    Refused,
    /// Carried out: the queue stands here.
    State {
        /// Which queue.
        queue: u32,
        /// Where.
        position: Position,
    },
}

/// Reads a request of a device of API version `version`: its number, which the answer repeats,
/// and the request.
///
/// # Errors
///
/// What is wrong with it, besides the number.
pub fn decode(bytes: &[u8; MESSAGE_BYTES], version: u64) -> (u32, Result<Request, BadRequest>) {
    let word = |at: usize| {
        let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
        u32::from_ne_bytes(*word.unwrap_or(&[0; 4]))
    };
    let long = |at: usize| {
        let long = bytes.get(at..).and_then(|rest| rest.first_chunk());
        u64::from_ne_bytes(*long.unwrap_or(&[0; 8]))
    };
    let request = match word(0) {
        VDUSE_GET_VQ_STATE => Ok(Request::GetVqState {
            queue: word(PAYLOAD + payload::VQ_STATE_INDEX),
        }),
        VDUSE_SET_STATUS => Ok(Request::SetStatus {
            status: bytes[PAYLOAD + payload::STATUS],
        }),
        VDUSE_UPDATE_IOTLB => {
            let first = long(PAYLOAD + payload::IOVA_START);
            let last = long(PAYLOAD + payload::IOVA_LAST);
            let asid = match version {
                0 => 0,
                _ => word(PAYLOAD + payload::IOVA_ASID),
            };
            match first <= last {
                true => Ok(Request::UpdateIotlb { first, last, asid }),
                false => Err(BadRequest::Range { first, last }),
            }
        }
        VDUSE_SET_VQ_GROUP_ASID => Ok(Request::SetVqGroupAsid {
            group: word(PAYLOAD + payload::GROUP),
            asid: word(PAYLOAD + payload::GROUP_ASID),
        }),
        VDUSE_SET_VQ_READY => Ok(Request::SetVqReady {
            queue: word(PAYLOAD + payload::READY_INDEX),
            ready: word(PAYLOAD + payload::READY) != 0,
        }),
        VDUSE_SUSPEND => Ok(Request::Suspend),
        kind => Err(BadRequest::Unknown(kind)),
    };
    (word(4), request)
}

/// Writes the answer to the request of this number. Whatever is reserved is zero.
#[must_use]
pub fn encode(id: u32, answer: &Answer) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let result = match answer {
        Answer::Refused => VDUSE_REQ_RESULT_FAILED,
        Answer::Done | Answer::State { .. } => VDUSE_REQ_RESULT_OK,
    };
    put(0, &id.to_ne_bytes());
    put(4, &result.to_ne_bytes());
    if let Answer::State { queue, position } = *answer {
        put(PAYLOAD + payload::VQ_STATE_INDEX, &queue.to_ne_bytes());
        let state = match position {
            Position::Split { avail } => [avail, 0, 0, 0],
            Position::Packed {
                avail_wrap,
                avail,
                used_wrap,
                used,
            } => [avail_wrap.into(), avail, used_wrap.into(), used],
        };
        for (number, half) in state.into_iter().enumerate() {
            let at = PAYLOAD + payload::VQ_STATE_STATE + 2 * number;
            put(at, &half.to_ne_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(kind: u32, id: u32, payload: &[u8]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[4..8].copy_from_slice(&id.to_ne_bytes());
        bytes[24..24 + payload.len()].copy_from_slice(payload);
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn requests_are_read_as_the_header_lays_them_out() {
        let range = words(&[1, 0, 2, 0, 7]);
        let update = |asid| Request::UpdateIotlb {
            first: 1,
            last: 2,
            asid,
        };
        for (kind, payload, version, expected) in [
            (0, words(&[3]), 0, Request::GetVqState { queue: 3 }),
            (1, vec![0x8f], 0, Request::SetStatus { status: 0x8f }),
            (2, range.clone(), 0, update(0)),
            (2, range, 1, update(7)),
            (
                3,
                words(&[1, 2]),
                1,
                Request::SetVqGroupAsid { group: 1, asid: 2 },
            ),
            (
                4,
                words(&[5, 1]),
                1,
                Request::SetVqReady {
                    queue: 5,
                    ready: true,
                },
            ),
            (5, vec![], 1, Request::Suspend),
        ] {
            let read = decode(&request(kind, 77, &payload), version);
            assert_eq!(read, (77, Ok(expected)));
        }
        let unknown = decode(&request(6, 1, &[]), 0);
        assert_eq!(unknown, (1, Err(BadRequest::Unknown(6))));
        let (first, last) = (2, 1);
        let range = decode(&request(2, 1, &words(&[2, 0, 1, 0])), 0);
        assert_eq!(range, (1, Err(BadRequest::Range { first, last })));
    }

    #[test]
    fn answers_are_written_as_the_header_lays_them_out() {
        let refused = encode(9, &Answer::Refused);
        assert_eq!(refused[..8], words(&[9, 1]));
        assert!(refused[8..].iter().all(|&byte| byte == 0));
        let position = Position::Split { avail: 0x1234 };
        let split = encode(9, &Answer::State { queue: 2, position });
        assert_eq!(split[..8], words(&[9, 0]));
        assert_eq!(split[24..32], words(&[2, 0x1234]));
        let position = Position::Packed {
            avail_wrap: true,
            avail: 5,
            used_wrap: false,
            used: 6,
        };
        let packed = encode(9, &Answer::State { queue: 2, position });
        assert_eq!(packed[24..36], words(&[2, 5 << 16 | 1, 6 << 16]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(head in any::<[u8; 32]>(), kind in 0..8u32, version in 0..2u64) {
            let mut bytes = request(kind, 1, &head);
            bytes[40..].fill(head[0]);
            let (id, _) = decode(&bytes, version);
            prop_assert_eq!(id, 1);
        }

        #[test]
        fn reserved_words_of_answers_are_zero(id: u32, queue: u32, avail: u16) {
            let position = Position::Split { avail };
            let bytes = encode(id, &Answer::State { queue, position });
            prop_assert!(bytes[8..24].iter().all(|&byte| byte == 0));
            prop_assert!(bytes[36..].iter().all(|&byte| byte == 0));
        }
    }
}
