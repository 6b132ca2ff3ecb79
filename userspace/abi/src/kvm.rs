//! The ioregionfd control interface: `KVM_SET_IOREGION` and what belongs to it.
//!
//! No released kernel has it. Numbers are out-of-tree ones: those of the 2021 RFC (ioctl 0x49,
//! capability 191) have since been given to others, so the capability of the RFC must not be used
//! as a probe.

/// KVM's ioctl type.
pub const KVMIO: u32 = 0xae;

/// `_IOW(KVMIO, 0xf0, struct kvm_ioregion)`: assign, modify or remove a region (VM ioctl).
pub const KVM_SET_IOREGION: u64 = ioctl(1, 0xf0, size_of::<KvmIoregion>());
/// `_IOW(KVMIO, 0xf1, struct kvm_ioregion_prog)`: attach, replace or detach a region's program
/// (VM ioctl).
pub const KVM_SET_IOREGION_PROG: u64 = ioctl(1, 0xf1, size_of::<KvmIoregionProg>());
/// `_IOR(KVMIO, 0xf2, struct kvm_ioregionfd)`: make a channel, KVM's end and the device's end
/// (VM ioctl).
pub const KVM_CREATE_IOREGIONFD: u64 = ioctl(2, 0xf2, size_of::<KvmIoregionfd>());
/// `_IO(KVMIO, 0x03)`: mainline's probe for capabilities, for numbers that kvm-ioctls has no name
/// for.
pub const KVM_CHECK_EXTENSION: u64 = ioctl(0, 0x03, 0);
/// The capability; `KVM_CHECK_EXTENSION` returns the revision of the interface.
pub const KVM_CAP_IOREGIONFD: u64 = 0xf0f0;
/// The revision that this module describes.
pub const KVM_IOREGION_ABI_VERSION: i32 = 1;
/// `_IOW(KVMIO, 0x79, struct kvm_ioeventfd)`: mainline's ioeventfd, issued directly because a
/// wildcard with an explicit length cannot be expressed by kvm-ioctls.
pub const KVM_IOEVENTFD: u64 = ioctl(1, 0x79, 64);

/// The region is on the port I/O bus.
pub const KVM_IOREGION_PIO: u32 = 1 << 0;
/// Writes are posted: KVM does not wait for a response.
pub const KVM_IOREGION_POSTED_WRITES: u32 = 1 << 1;
/// Remove the region.
pub const KVM_IOREGION_DEASSIGN: u32 = 1 << 2;
/// All flags that are defined.
pub const KVM_IOREGION_VALID_MASK: u32 =
    KVM_IOREGION_PIO | KVM_IOREGION_POSTED_WRITES | KVM_IOREGION_DEASSIGN;

/// `struct kvm_ioregion`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KvmIoregion {
    /// First guest physical address, or first port.
    pub guest_paddr: u64,
    /// Size in bytes.
    pub memory_size: u64,
    /// Opaque value that comes back in each command.
    pub user_data: u64,
    /// KVM reads responses here.
    pub read_fd: i32,
    /// KVM writes commands here; may be the same file.
    pub write_fd: i32,
    /// `KVM_IOREGION_*`.
    pub flags: u32,
    /// Must be zero.
    pub pad: [u8; 28],
}

/// `struct kvm_ioregionfd`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KvmIoregionfd {
    /// For `read_fd` and `write_fd` of a region.
    pub kvm_fd: i32,
    /// For the device task.
    pub device_fd: i32,
}

/// Commands that a [`Mailbox`] holds.
pub const MAILBOX_CMDS: usize = 64;

/// `struct ioregionfd_mailbox`, at the start of the page that a device task can map of its end of
/// a purpose-made channel. Positions count commands from 0 and never wrap.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Mailbox {
    /// Commands that KVM has put in.
    pub head: u64,
    /// Not zero: KVM sleeps, and a `write` of no bytes wakes it.
    pub sleeping: u32,
    /// Not zero: no command will follow.
    pub closed: u32,
    /// Zero.
    pub pad0: [u8; 48],
    /// Commands that the device has taken out.
    pub tail: u64,
    /// 1 + position of the last command that the device has answered.
    pub answered: u64,
    /// The answer, stored before `answered`.
    pub data: u64,
    /// Zero.
    pub pad1: [u8; 40],
    /// The command at position `p` stands at `p % MAILBOX_CMDS`.
    pub cmds: [[u8; 32]; MAILBOX_CMDS],
}

/// `struct kvm_ioregion_prog`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KvmIoregionProg {
    /// The region's address.
    pub guest_paddr: u64,
    /// The region's size, in bytes.
    pub memory_size: u64,
    /// Pointer to an array of `__s32` eventfds.
    pub eventfds: u64,
    /// [`KVM_IOREGION_PIO`] or zero.
    pub flags: u32,
    /// The loaded program; -1 detaches.
    pub prog_fd: i32,
    /// Array map of `u64` registers; -1: none.
    pub regs_fd: i32,
    /// Number of eventfds.
    pub nr_eventfds: u32,
    /// Must be zero.
    pub pad: [u8; 24],
}

/// Number of an ioctl, as `include/uapi/asm-generic/ioctl.h` makes it.
const fn ioctl(direction: u64, nr: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | (KVMIO as u64) << 8 | nr
}

const _: () = {
    assert!(size_of::<KvmIoregion>() == 64);
    assert!(core::mem::offset_of!(KvmIoregion, read_fd) == 24);
    assert!(core::mem::offset_of!(KvmIoregion, write_fd) == 28);
    assert!(core::mem::offset_of!(KvmIoregion, flags) == 32);
    assert!(core::mem::offset_of!(KvmIoregion, pad) == 36);
    assert!(size_of::<KvmIoregionProg>() == 64);
    assert!(core::mem::offset_of!(KvmIoregionProg, flags) == 24);
    assert!(core::mem::offset_of!(KvmIoregionProg, pad) == 40);
    assert!(KVM_SET_IOREGION == 0x4040_aef0);
    assert!(KVM_CREATE_IOREGIONFD == 0x8008_aef2);
    assert!(KVM_IOEVENTFD == 0x4040_ae79);
    assert!(KVM_CHECK_EXTENSION == 0xae03);
    assert!(core::mem::offset_of!(Mailbox, sleeping) == 8);
    assert!(core::mem::offset_of!(Mailbox, tail) == 64);
    assert!(core::mem::offset_of!(Mailbox, answered) == 72);
    assert!(core::mem::offset_of!(Mailbox, data) == 80);
    assert!(core::mem::offset_of!(Mailbox, cmds) == 128);
    assert!(size_of::<Mailbox>() == 2176);
};
