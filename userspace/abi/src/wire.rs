//! The ioregionfd wire protocol.
//!
//! The device reads a 32-byte command for each access and writes a 32-byte response where one is
//! asked for. Two layouts of the command are in the wild, with the same size and meaning:
//!
//! * [`Layout::Info`]: `u32 info, u32 padding, u64 user_data, u64 offset, u64 data`, where `info`
//!   holds `cmd` in bits 3..0, the size exponent in bits 5..4 and `resp` in bit 6. This is the
//!   layout of "MMIO/PIO dispatch file descriptors (ioregionfd) design discussion" (2020-11).
//! * [`Layout::V3`]: `u8 cmd, u8 {size_exponent: 4, resp: 1}, u8 padding[6]`, then the same three
//!   words. This is the layout of the third public RFC (2021-02).
//!
//! Integers are host-endian; both ends are on one host.
//!
//! Decoding is total: each string of 32 bytes is a command or a [`DecodeError`].

use core::fmt;

use crate::Size;

/// Length of a command, in bytes.
pub const COMMAND_LEN: usize = 32;
/// Length of a response, in bytes.
pub const RESPONSE_LEN: usize = 32;

/// The command's byte layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// The design document's layout, with an `info` word; the default.
    #[default]
    Info,
    /// The layout of the third public RFC.
    V3,
}

/// What the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// `IOREGIONFD_CMD_READ`
    Read = 0,
    /// `IOREGIONFD_CMD_WRITE`
    Write = 1,
}

/// `struct ioregionfd_cmd`: one guest access on its way to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    /// Read or write.
    pub operation: Operation,
    /// Size of the access.
    pub size: Size,
    /// Whether the sender waits for a response. Always true for reads.
    pub response: bool,
    /// The region's opaque value.
    pub user_data: u64,
    /// Byte offset of the access in its region.
    pub offset: u64,
    /// The value written; zero for reads.
    pub data: u64,
}

/// `struct ioregionfd_resp`: the answer to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Response {
    /// The value read; ignored for writes.
    pub data: u64,
}

/// Why 32 bytes are not a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeError {
    /// The operation is neither read nor write.
    Operation(u8),
    /// The size exponent exceeds 3 (only [`Layout::V3`] can express that).
    Size(u8),
    /// A reserved bit or byte is set.
    Reserved,
    /// A read that asks for no response.
    ReadWithoutResponse,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operation(op) => write!(f, "unknown operation {op}"),
            Self::Size(exponent) => write!(f, "size exponent {exponent} exceeds 3"),
            Self::Reserved => write!(f, "a reserved field is not zero"),
            Self::ReadWithoutResponse => write!(f, "a read that asks for no response"),
        }
    }
}

impl core::error::Error for DecodeError {}

const INFO_SIZE_SHIFT: u32 = 4;
const INFO_RESPONSE: u32 = 1 << 6;
const INFO_RESERVED: u32 = !0x7f;
const V3_RESPONSE: u8 = 1 << 4;
const V3_RESERVED: u8 = 0xe0;

impl Command {
    /// Encodes the command in the given layout.
    #[must_use]
    pub fn encode(&self, layout: Layout) -> [u8; COMMAND_LEN] {
        let mut out = [0; COMMAND_LEN];
        match layout {
            Layout::Info => {
                let mut info = self.operation as u32 | (self.size as u32) << INFO_SIZE_SHIFT;
                if self.response {
                    info |= INFO_RESPONSE;
                }
                out[..4].copy_from_slice(&info.to_ne_bytes());
            }
            Layout::V3 => {
                out[0] = self.operation as u8;
                out[1] = self.size as u8 | if self.response { V3_RESPONSE } else { 0 };
            }
        }
        out[8..16].copy_from_slice(&self.user_data.to_ne_bytes());
        out[16..24].copy_from_slice(&self.offset.to_ne_bytes());
        out[24..32].copy_from_slice(&self.data.to_ne_bytes());
        out
    }

    /// Decodes a command.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] where the bytes are no command of this layout. Reads always wait, so a
    /// read without the response bit is accepted from senders of the design document's layout,
    /// which defines the bit for writes only.
    pub fn decode(bytes: &[u8; COMMAND_LEN], layout: Layout) -> Result<Self, DecodeError> {
        let (operation, exponent, response) = match layout {
            Layout::Info => {
                let info = u32_at(bytes, 0);
                if info & INFO_RESERVED != 0 || u32_at(bytes, 4) != 0 {
                    return Err(DecodeError::Reserved);
                }
                (
                    (info & 0xf) as u8,
                    (info >> INFO_SIZE_SHIFT & 3) as u8,
                    info & INFO_RESPONSE != 0,
                )
            }
            Layout::V3 => {
                if bytes[1] & V3_RESERVED != 0 || bytes[2..8] != [0; 6] {
                    return Err(DecodeError::Reserved);
                }
                (bytes[0], bytes[1] & 0xf, bytes[1] & V3_RESPONSE != 0)
            }
        };
        let operation = match operation {
            0 => Operation::Read,
            1 => Operation::Write,
            other => return Err(DecodeError::Operation(other)),
        };
        let size = *Size::ALL
            .get(usize::from(exponent))
            .ok_or(DecodeError::Size(exponent))?;
        let response = match (operation, response, layout) {
            (Operation::Read, false, Layout::V3) => return Err(DecodeError::ReadWithoutResponse),
            (Operation::Read, ..) => true,
            (Operation::Write, response, _) => response,
        };
        Ok(Self {
            operation,
            size,
            response,
            user_data: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            data: u64_at(bytes, 24),
        })
    }
}

impl Response {
    /// Encodes the response; the padding is zero.
    #[must_use]
    pub fn encode(&self) -> [u8; RESPONSE_LEN] {
        let mut out = [0; RESPONSE_LEN];
        out[..8].copy_from_slice(&self.data.to_ne_bytes());
        out
    }

    /// Decodes a response. Each string of 32 bytes is one: the padding is ignored.
    #[must_use]
    pub fn decode(bytes: &[u8; RESPONSE_LEN]) -> Self {
        Self {
            data: u64_at(bytes, 0),
        }
    }
}

fn u32_at(bytes: &[u8; 32], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8; 32], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn command() -> impl Strategy<Value = Command> {
        (
            any::<bool>(),
            prop::sample::select(&Size::ALL[..]),
            any::<bool>(),
            any::<[u64; 3]>(),
        )
            .prop_map(
                |(write, size, response, [user_data, offset, data])| Command {
                    operation: if write {
                        Operation::Write
                    } else {
                        Operation::Read
                    },
                    size,
                    response: response || !write,
                    user_data,
                    offset,
                    data,
                },
            )
    }

    #[test]
    fn sixty_four_bit_write_with_response_has_the_published_bytes() {
        let command = Command {
            operation: Operation::Write,
            size: Size::B8,
            response: true,
            user_data: 1,
            offset: 2,
            data: 3,
        };
        assert_eq!(command.encode(Layout::Info)[..8], 0x71_u64.to_ne_bytes());
        assert_eq!(command.encode(Layout::V3)[..3], [0x01, 0x13, 0x00]);
        for layout in [Layout::Info, Layout::V3] {
            let bytes = command.encode(layout);
            assert_eq!(bytes[8..16], 1_u64.to_ne_bytes());
            assert_eq!(bytes[16..24], 2_u64.to_ne_bytes());
            assert_eq!(bytes[24..], 3_u64.to_ne_bytes());
        }
    }

    #[test]
    fn bad_fields_are_told_apart() {
        let mut bytes = [0; COMMAND_LEN];
        bytes[0] = 2;
        assert_eq!(
            Command::decode(&bytes, Layout::Info),
            Err(DecodeError::Operation(2))
        );
        assert_eq!(
            Command::decode(&bytes, Layout::V3),
            Err(DecodeError::Operation(2))
        );
        bytes[0] = 1;
        bytes[1] = 4;
        assert_eq!(
            Command::decode(&bytes, Layout::V3),
            Err(DecodeError::Size(4))
        );
        assert_eq!(
            Command::decode(&bytes, Layout::Info),
            Err(DecodeError::Reserved)
        );
        assert_eq!(
            Command::decode(&[0; COMMAND_LEN], Layout::V3),
            Err(DecodeError::ReadWithoutResponse)
        );
    }

    proptest! {
        #[test]
        fn commands_survive_the_wire(command in command(), v3: bool) {
            let layout = if v3 { Layout::V3 } else { Layout::Info };
            prop_assert_eq!(Command::decode(&command.encode(layout), layout), Ok(command));
        }

        #[test]
        fn decoding_is_total_and_what_decodes_encodes_back(bytes: [u8; 32], v3: bool) {
            let layout = if v3 { Layout::V3 } else { Layout::Info };
            if let Ok(command) = Command::decode(&bytes, layout) {
                let again = Command::decode(&command.encode(layout), layout);
                prop_assert_eq!(again, Ok(command));
            }
        }

        #[test]
        fn headers_decode_in_every_combination(head: [u8; 2], rest: [u64; 3], v3: bool) {
            let layout = if v3 { Layout::V3 } else { Layout::Info };
            let mut bytes = [0; 32];
            bytes[..2].copy_from_slice(&head);
            for (chunk, word) in bytes[8..].chunks_exact_mut(8).zip(rest) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            if let Ok(command) = Command::decode(&bytes, layout) {
                prop_assert_eq!([command.user_data, command.offset, command.data], rest);
            }
        }

        #[test]
        fn responses_survive_the_wire(data: u64, pad: [u8; 24]) {
            let mut bytes = Response { data }.encode();
            prop_assert_eq!(Response::decode(&bytes), Response { data });
            bytes[8..].copy_from_slice(&pad);
            prop_assert_eq!(Response::decode(&bytes), Response { data });
        }
    }
}
