//! Submission queue entries (section 4.2).

use super::spec::{SQE, Status};

/// A command, as the driver wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) opcode: u8,
    flags: u8,
    /// The driver's name for it.
    pub(super) id: u16,
    /// Namespace.
    pub(super) nsid: u32,
    /// Where its data are.
    pub(super) prp: [u64; 2],
    /// Dwords 10 to 15.
    dwords: [u32; 6],
}

impl Command {
    pub(super) fn decode(entry: &[u8; SQE as usize]) -> Self {
        let dword = |at: usize| {
            let bytes = &entry[at * 4..at * 4 + 4];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let long = |at: usize| u64::from(dword(at)) | u64::from(dword(at + 1)) << 32;
        Self {
            opcode: entry[0],
            flags: entry[1],
            id: u16::from_le_bytes([entry[2], entry[3]]),
            nsid: dword(1),
            prp: [long(6), long(8)],
            dwords: [10, 11, 12, 13, 14, 15].map(dword),
        }
    }

    /// Whether what all commands share is as it is supported: neither fused nor with an SGL.
    pub(super) fn check(&self) -> Result<(), Status> {
        match self.flags & 0xc3 {
            0 => Ok(()),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Dword 10 to 15; 0 for others.
    pub(super) fn dword(&self, number: usize) -> u32 {
        let index = number.checked_sub(10);
        let dword = index.and_then(|index| self.dwords.get(index));
        dword.copied().unwrap_or(0)
    }

    /// The low half of a dword.
    pub(super) fn low(&self, number: usize) -> u16 {
        (self.dword(number) & 0xffff) as u16
    }

    /// The high half of a dword.
    pub(super) fn high(&self, number: usize) -> u16 {
        (self.dword(number) >> 16) as u16
    }

    /// Two dwords.
    pub(super) fn long(&self, number: usize) -> u64 {
        u64::from(self.dword(number)) | u64::from(self.dword(number + 1)) << 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let mut entry = [0; 64];
        for (at, byte) in (0..).zip(&mut entry) {
            *byte = at;
        }
        let command = Command::decode(&entry);
        assert_eq!((command.opcode, command.id), (0, 0x0302));
        assert_eq!(command.nsid, 0x0706_0504);
        assert_eq!(command.prp[0], 0x1f1e_1d1c_1b1a_1918);
        assert_eq!(command.prp[1], 0x2726_2524_2322_2120);
        assert_eq!(command.dword(10), 0x2b2a_2928);
        assert_eq!((command.low(15), command.high(15)), (0x3d3c, 0x3f3e));
        assert_eq!(command.long(10), 0x2f2e_2d2c_2b2a_2928);
        assert_eq!((command.dword(9), command.dword(16)), (0, 0));
    }

    #[test]
    fn fused_commands_and_scatter_lists_are_refused() {
        for (flags, ok) in [
            (0, true),
            (1, false),
            (2, false),
            (0x40, false),
            (0x80, false),
        ] {
            let mut entry = [0; 64];
            entry[1] = flags;
            assert_eq!(Command::decode(&entry).check().is_ok(), ok, "{flags:#x}");
        }
    }
}
