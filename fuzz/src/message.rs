//! Requests of the kernel, read and answered.

use arbitrary::{Arbitrary, Unstructured};
use ioregion_abi::vduse::MESSAGE_BYTES;
use ioregion_devices::virtio::{Position, Refusal};
use ioregion_vduse::{Answer, BadRequest, Request, Status, StatusError, Step, decode, encode};

/// Reads requests, follows what they do to the status, and answers them.
pub fn message(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut status = Status::default();
    let mut running = false;
    // As far as the input goes.
    while !input.is_empty() && one(&mut input, &mut status, &mut running).is_ok() {}
}

fn one(
    input: &mut Unstructured<'_>,
    status: &mut Status,
    running: &mut bool,
) -> arbitrary::Result<()> {
    let version = u64::from(bool::arbitrary(input)?);
    let mut bytes = [0; MESSAGE_BYTES];
    // Types that there are, most of the time.
    let kind = u32::from(input.int_in_range(0..=7u8)?);
    bytes[..4].copy_from_slice(&kind.to_ne_bytes());
    let rest = input.bytes(input.len().min(32))?;
    bytes[4..4 + rest.len()].copy_from_slice(rest);
    if kind == 7 {
        bytes.rotate_left(4);
    }
    // The part of the type, at the places that the header gives.
    bytes.copy_within(8..36, 24);

    let (id, request) = decode(&bytes, version);
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    assert_eq!(id, word(4));
    let expected = match word(0) {
        0 => Ok(Request::GetVqState { queue: word(24) }),
        1 => Ok(Request::SetStatus { status: bytes[24] }),
        2 if long(24) > long(32) => Err(BadRequest::Range {
            first: long(24),
            last: long(32),
        }),
        2 => Ok(Request::UpdateIotlb {
            first: long(24),
            last: long(32),
            asid: if version == 0 { 0 } else { word(40) },
        }),
        3 => Ok(Request::SetVqGroupAsid {
            group: word(24),
            asid: word(28),
        }),
        4 => Ok(Request::SetVqReady {
            queue: word(24),
            ready: word(28) != 0,
        }),
        5 => Ok(Request::Suspend),
        other => Err(BadRequest::Unknown(other)),
    };
    assert_eq!(request, expected);

    let answer = match request {
        Ok(Request::SetStatus { status: bits }) => write(input, status, running, bits)?,
        Ok(Request::GetVqState { queue }) => Answer::State {
            queue,
            position: position(input)?,
        },
        Ok(_) => Answer::Done,
        Err(_) => Answer::Refused,
    };
    check_answer(id, &answer);
    Ok(())
}

/// A write of the status, by a driver that took some features: those with bit 0 will not do.
fn write(
    input: &mut Unstructured<'_>,
    status: &mut Status,
    running: &mut bool,
    bits: u8,
) -> arbitrary::Result<Answer> {
    let features = u64::arbitrary(input)?;
    let before = *status;
    let mut checked = None;
    let check = |features: u64| {
        checked = Some(features);
        match features & 1 {
            0 => Ok(()),
            extra => Err(Refusal::NotOffered(extra)),
        }
    };
    let step = status.write(bits, features, check);
    match step {
        Ok(Step::Reset) => {
            assert!(bits == 0 && *status == Status::default());
            *running = false;
        }
        Ok(Step::Start(features)) => {
            assert!(!*running, "a device was started twice");
            assert_eq!(features & 1, 0, "with features that were refused");
            // Features settled and driver ready.
            assert_eq!(status.bits() & 12, 12);
            *running = true;
        }
        Ok(Step::Noted) => assert_eq!(status.bits(), bits),
        Err(error) => {
            assert_eq!(*status, before, "a refused status counts");
            let refused = checked.is_some_and(|features| features & 1 != 0);
            assert_eq!(refused, matches!(error, StatusError::Features(_)));
        }
    }
    Ok(match step {
        Ok(_) => Answer::Done,
        Err(_) => Answer::Refused,
    })
}

fn position(input: &mut Unstructured<'_>) -> arbitrary::Result<Position> {
    Ok(match bool::arbitrary(input)? {
        true => Position::Split {
            avail: u16::arbitrary(input)?,
        },
        false => Position::Packed {
            avail_wrap: bool::arbitrary(input)?,
            avail: u16::arbitrary(input)?,
            used_wrap: bool::arbitrary(input)?,
            used: u16::arbitrary(input)?,
        },
    })
}

fn check_answer(id: u32, answer: &Answer) {
    let bytes = encode(id, answer);
    assert_eq!(bytes[..4], id.to_ne_bytes());
    let failed = u32::from(*answer == Answer::Refused);
    assert_eq!(bytes[4..8], failed.to_ne_bytes());
    assert_eq!(bytes[8..24], [0; 16], "what is reserved is not zero");
    let used = match answer {
        Answer::State { queue, .. } => {
            assert_eq!(bytes[24..28], queue.to_ne_bytes());
            12
        }
        _ => 0,
    };
    assert!(bytes[24 + used..].iter().all(|&byte| byte == 0));
}
