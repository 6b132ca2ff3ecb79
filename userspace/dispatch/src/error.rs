//! Errors of the library. Each names the region it concerns and carries an errno where the
//! kernel's ioregionfd interface defines one, so that both implementations fail alike.

use std::io;

use ioregion_abi::Bus;
use nix::errno::Errno;

use crate::ebpf::LoadError;

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
#[error("{bus:?} region {base:#x}+{size:#x}: {kind}")]
pub struct RegionError {
    /// The region's bus.
    pub bus: Bus,
    /// The region's first address.
    pub base: u64,
    /// The region's size in bytes.
    pub size: u64,
    /// The cause.
    #[source]
    pub kind: RegionErrorKind,
}

impl RegionError {
    /// The errno by which `KVM_SET_IOREGION` reports this.
    #[must_use]
    pub fn errno(&self) -> Errno {
        use RegionErrorKind as Kind;
        match &self.kind {
            Kind::Overlap { .. } => Errno::EEXIST,
            Kind::Unknown => Errno::ENOENT,
            Kind::BadDescriptor(_) => Errno::EBADF,
            Kind::TableFull(_) => Errno::ENOSPC,
            Kind::Kvm { error, .. } | Kind::Bpf { error, .. } => {
                Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
            }
            Kind::Unavailable { .. } => Errno::EOPNOTSUPP,
            Kind::Tracepoints(error) => error.errno(),
            _ => Errno::EINVAL,
        }
    }
}

/// The cause of a [`RegionError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionErrorKind {
    /// A region of size 0.
    #[error("the region is empty")]
    Empty,
    /// The region reaches past the end of its bus.
    #[error("the region reaches outside the address space of its bus")]
    OutsideAddressSpace,
    /// Another region covers part of the range.
    #[error("it overlaps the region {base:#x}+{size:#x}")]
    Overlap {
        /// The other region's first address.
        base: u64,
        /// The other region's size in bytes.
        size: u64,
    },
    /// The range lies inside an existing region, which would be split.
    #[error("it would split the region {base:#x}+{size:#x}")]
    Split {
        /// The other region's first address.
        base: u64,
        /// The other region's size in bytes.
        size: u64,
    },
    /// No region with this address and size.
    #[error("no such region is assigned")]
    Unknown,
    /// A doorbell reaches outside the region.
    #[error("the doorbell at offset {0:#x} reaches outside the region")]
    DoorbellOutside(u64),
    /// Ports have no 8-byte accesses.
    #[error("the doorbell at offset {0:#x} has a size that its bus does not know")]
    DoorbellSize(u64),
    /// A match value with bits outside its mask, or a mask wider than the doorbell.
    #[error("the doorbell at offset {0:#x} matches bits that it does not have")]
    DoorbellValue(u64),
    /// Doorbells at one address must share one mask.
    #[error("doorbells of one size at offset {0:#x} have different masks")]
    DoorbellMasks(u64),
    /// Doorbells whose ranges overlap without sharing their first byte.
    #[error("the doorbell at offset {0:#x} straddles another one")]
    DoorbellOverlap(u64),
    /// Two doorbells that ring for the same write.
    #[error("two doorbells at offset {0:#x} ring for the same value")]
    DoorbellTwice(u64),
    /// Only a coalesced zone can carry this doorbell, but the ioeventfd sink was asked for.
    #[error("the doorbell at offset {0:#x} needs the coalesced sink: {1}")]
    DoorbellSink(u64, &'static str),
    /// A register that is to be answered reaches outside the region.
    #[error("the answered register at offset {0:#x} reaches outside the region")]
    AnsweredOutside(u64),
    /// Ports have no 8-byte accesses.
    #[error("the answered register at offset {0:#x} has a size that its bus does not know")]
    AnsweredSize(u64),
    /// Two answers for the same read.
    #[error("two registers answer reads of the same size at offset {0:#x}")]
    AnsweredTwice(u64),
    /// The register file is too short.
    #[error(
        "the answered register at offset {offset:#x} has index {index} in a register file of {len}"
    )]
    AnsweredIndex {
        /// The register's offset in the region.
        offset: u64,
        /// Its index.
        index: u32,
        /// How many registers the file has.
        len: u32,
    },
    /// A register is to be answered, but the region has no register file.
    #[error("the answered register at offset {0:#x} needs a register file (Region::registers)")]
    NoRegisterFile(u64),
    /// KVM cannot read the register file.
    #[error(
        "KVM cannot read this register file: make it with Vm::registers of a VM that has a program"
    )]
    RegisterFileKind,
    /// The channel's descriptors are closed or of the wrong kind.
    #[error("bad descriptor: {0}")]
    BadDescriptor(#[source] io::Error),
    /// One of the kernel's or the program's tables is full.
    #[error("{0} is full")]
    TableFull(&'static str),
    /// The mechanism needs something that was not given.
    #[error("the mechanism {mechanism} needs {what}")]
    Missing {
        /// Name of the mechanism.
        mechanism: &'static str,
        /// What it needs.
        what: &'static str,
    },
    /// The host does not offer the mechanism.
    #[error("the mechanism {mechanism} is not available here: {reason}")]
    Unavailable {
        /// Name of the mechanism.
        mechanism: &'static str,
        /// Why, and what would enable it.
        reason: String,
    },
    /// The eBPF program cannot be attached to KVM's tracepoints.
    #[error("attaching the eBPF program to KVM's tracepoints: {0}")]
    Tracepoints(#[source] LoadError),
    /// KVM refused.
    #[error("{what}: {error}")]
    Kvm {
        /// The request.
        what: &'static str,
        /// What KVM said.
        error: io::Error,
    },
    /// The BPF system call or the loader refused.
    #[error("{what}: {error}")]
    Bpf {
        /// The request.
        what: &'static str,
        /// What was said.
        error: io::Error,
    },
}
