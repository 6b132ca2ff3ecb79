//! What can go wrong when a micro-guest is built or loaded.

use crate::Bus;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a micro-guest could not be built, loaded or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: {0}; load the kvm_intel or kvm_amd module (or enable nested \
         virtualisation) and run as root or as a member of the group kvm"
    )]
    NoKvm(kvm_ioctls::Error),
    /// A KVM ioctl failed.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was asked of KVM.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Guest RAM could not be mapped.
    #[error("cannot map {bytes} bytes of guest RAM: {reason}")]
    Ram {
        /// Size asked for.
        bytes: usize,
        /// The memory library's or the operating system's reason.
        reason: String,
    },
    /// Guest RAM could not be read or written.
    #[error("guest RAM access failed: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// An access size that the bus does not have.
    #[error("{bus:?} has no access of {size} bytes")]
    BadSize {
        /// The bus of the access.
        bus: Bus,
        /// The size asked for, in bytes.
        size: u8,
    },
    /// An MMIO access that would hit guest RAM and never leave the guest.
    #[error("MMIO address {addr:#x} lies in guest RAM (RAM ends at {ram_end:#x})")]
    AddressInRam {
        /// First address of the access.
        addr: u64,
        /// First address behind RAM.
        ram_end: u64,
    },
    /// An access beyond 4 GiB (MMIO) or beyond port 0xffff (PIO).
    #[error("{bus:?} address {addr:#x} is not reachable from a 32-bit guest")]
    AddressOutOfRange {
        /// The bus of the access.
        bus: Bus,
        /// Last address of the access.
        addr: u64,
    },
    /// A cell number beyond [`CELLS`](crate::CELLS).
    #[error("cell {0} does not exist, there are {max}", max = crate::CELLS)]
    BadCell(u32),
    /// The program does not fit into the vCPU's area.
    #[error("program too large: {needed} bytes of {section}, {limit} fit")]
    TooLarge {
        /// What overflows: code, constants, log or timings.
        section: &'static str,
        /// Bytes that the program needs.
        needed: usize,
        /// Bytes that there are.
        limit: usize,
    },
    /// Loops or timed sections nested too deeply.
    #[error("more than {max} nested loops or timed sections", max = crate::MAX_NESTING)]
    TooDeep,
    /// The VM's RAM has no area for this vCPU.
    #[error("RAM of {ram} bytes has no room for vCPU {index}: each needs {need} bytes", need = crate::AREA_BYTES)]
    NoArea {
        /// The vCPU's index.
        index: u64,
        /// RAM size in bytes.
        ram: u64,
    },
    /// The assembler refused an instruction.
    #[error("assembler: {0}")]
    Assemble(#[from] iced_x86::IcedError),
}

impl Error {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}
