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
pub const KVM_IOREGION_ABI_VERSION: i32 = 2;
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

/// What a region's program is called with: twelve `u64` arguments, of which these are used.
pub mod prog_arg {
    /// The vCPU's id.
    pub const VCPU: usize = 0;
    /// The region's `user_data`.
    pub const USER_DATA: usize = 1;
    /// Offset of the access in the region.
    pub const OFFSET: usize = 2;
    /// Length in bytes (1, 2, 4 or 8) in bits 7..0, and the two bits below.
    pub const WHAT: usize = 3;
    /// The value written, 0 for a read.
    pub const DATA: usize = 4;
    /// Guest physical address, or port.
    pub const ADDR: usize = 5;
    /// The last one. No tracepoint has so many, so a program that reads it can be attached to none.
    pub const LAST: usize = 11;

    /// Bit of [`WHAT`]: the access is a write.
    pub const WRITE: u64 = 1 << 8;
    /// Bit of [`WHAT`]: the access is on the port I/O bus.
    pub const PIO: u64 = 1 << 9;
}

/// What a region's program returns: an action in bits 7..0, its argument in bits 31..8. A verdict
/// that makes no sense is taken for [`PASS`](verdict::PASS), and counted.
pub mod verdict {
    /// Ask the device.
    pub const PASS: u32 = 0;
    /// The write is done.
    pub const CONSUME: u32 = 1;
    /// The write is done; the eventfd with this index is signalled.
    pub const SIGNAL: u32 = 2;
    /// The read is done; its value is the register with this index.
    pub const ANSWER: u32 = 3;

    /// Bits of the action.
    pub const ACTION_MASK: u32 = 0xff;
    /// Where the argument begins.
    pub const ARG_SHIFT: u32 = 8;
    /// Arguments are smaller than this.
    pub const ARGS: u32 = 1 << (u32::BITS - ARG_SHIFT);

    /// The verdict of an action with an argument below [`ARGS`].
    #[must_use]
    #[inline(always)]
    pub const fn with(action: u32, arg: u32) -> u32 {
        action | arg << ARG_SHIFT
    }
}

/// Number of an ioctl of KVM's.
const fn ioctl(direction: u64, nr: u64, size: usize) -> u64 {
    crate::ioctl::number(direction, KVMIO, nr, size)
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
    assert!(KVM_SET_IOREGION_PROG == 0x4040_aef1);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of `include/uapi/linux/ioregion.h`, which the kernel and programs agree on.
    #[test]
    fn verdicts_and_arguments_have_the_values_of_the_header() {
        let actions = [
            verdict::PASS,
            verdict::CONSUME,
            verdict::SIGNAL,
            verdict::ANSWER,
        ];
        assert_eq!(actions, [0, 1, 2, 3]);
        assert_eq!((verdict::ACTION_MASK, verdict::ARG_SHIFT), (0xff, 8));
        assert_eq!((prog_arg::WRITE, prog_arg::PIO), (0x100, 0x200));
        assert_eq!(verdict::with(verdict::ANSWER, 0x00ab_cdef), 0xabcd_ef03);
        let largest = verdict::with(verdict::SIGNAL, verdict::ARGS - 1);
        assert_eq!(largest >> verdict::ARG_SHIFT, verdict::ARGS - 1);
        assert_eq!(largest & verdict::ACTION_MASK, verdict::SIGNAL);
        use prog_arg::{ADDR, DATA, LAST, OFFSET, USER_DATA, VCPU, WHAT};
        let places = [VCPU, USER_DATA, OFFSET, WHAT, DATA, ADDR, LAST];
        assert_eq!(places, [0, 1, 2, 3, 4, 5, 11]);
    }
}
