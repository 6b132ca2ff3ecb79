//! VDUSE, `include/uapi/linux/vduse.h`: devices of the vDPA bus that live in user space.
//!
//! API version 0 is in Linux since 5.15 (the user memory of the IOTLB since 6.0), version 1
//! (groups of queues, address spaces) and the features that are negotiated with
//! [`VDUSE_SET_FEATURES`] are in Linux 7.x. Everything is in host byte order, and whatever is
//! called reserved must be zero.

use core::mem::offset_of;

use crate::ioctl::{NONE, READ, WRITE, number};

/// The ioctl type of VDUSE.
pub const VDUSE_BASE: u32 = 0x81;

/// The first version of the interface.
pub const VDUSE_API_VERSION: u64 = 0;
/// The version with groups of queues and address spaces.
pub const VDUSE_API_VERSION_1: u64 = 1;

/// Bit number: the kernel asks by [`VDUSE_SET_VQ_READY`] before a queue counts as ready.
pub const VDUSE_F_QUEUE_READY: u32 = 0;
/// Bit number: the kernel asks by [`VDUSE_SUSPEND`] for the device to stand still.
pub const VDUSE_F_SUSPEND: u32 = 1;

/// Bytes of a device's name with the zero that ends it.
pub const VDUSE_NAME_MAX: usize = 256;

// Of the control device, /dev/vduse/control.

/// The version of the interface in force on this descriptor.
pub const VDUSE_GET_API_VERSION: u64 = ioctl(READ, 0x00, size_of::<u64>());
/// Sets the version; `EINVAL` where the kernel does not have it.
pub const VDUSE_SET_API_VERSION: u64 = ioctl(WRITE, 0x01, size_of::<u64>());
/// Makes a device: [`DevConfig`], followed by its configuration space.
pub const VDUSE_CREATE_DEV: u64 = ioctl(WRITE, 0x02, size_of::<DevConfig>());
/// Unmakes a device; `EBUSY` while it is on the bus or its file is open.
pub const VDUSE_DESTROY_DEV: u64 = ioctl(WRITE, 0x03, VDUSE_NAME_MAX);
/// The `VDUSE_F_*` that the kernel has.
pub const VDUSE_GET_FEATURES: u64 = ioctl(READ, 0x04, size_of::<u64>());
/// The `VDUSE_F_*` that devices made over this descriptor have.
pub const VDUSE_SET_FEATURES: u64 = ioctl(WRITE, 0x05, size_of::<u64>());

// Of a device's file, /dev/vduse/NAME.

/// The region that overlaps a range, as a file to map; `EINVAL` where there is none.
pub const VDUSE_IOTLB_GET_FD: u64 = ioctl(READ | WRITE, 0x10, size_of::<IotlbEntry>());
/// The virtio features that the driver took; valid with `FEATURES_OK`.
pub const VDUSE_DEV_GET_FEATURES: u64 = ioctl(READ, 0x11, size_of::<u64>());
/// Changes the configuration space: [`ConfigData`], followed by the bytes.
pub const VDUSE_DEV_SET_CONFIG: u64 = ioctl(WRITE, 0x12, size_of::<ConfigData>());
/// Tells the driver that the configuration space has changed.
pub const VDUSE_DEV_INJECT_CONFIG_IRQ: u64 = ioctl(NONE, 0x13, 0);
/// Sets the largest size of a queue; every queue needs it before the device gets on the bus.
pub const VDUSE_VQ_SETUP: u64 = ioctl(WRITE, 0x14, size_of::<VqConfig>());
/// What the driver set up of a queue.
pub const VDUSE_VQ_GET_INFO: u64 = ioctl(READ | WRITE, 0x15, size_of::<VqInfo>());
/// The eventfd by which the driver notifies about a queue; forgotten at every reset.
pub const VDUSE_VQ_SETUP_KICKFD: u64 = ioctl(WRITE, 0x16, size_of::<VqEventfd>());
/// Interrupts the driver for a queue (a `u32`); `EINVAL` before `DRIVER_OK`.
pub const VDUSE_VQ_INJECT_IRQ: u64 = ioctl(WRITE, 0x17, size_of::<u32>());
/// Has the kernel bounce through memory of this process.
pub const VDUSE_IOTLB_REG_UMEM: u64 = ioctl(WRITE, 0x18, size_of::<IovaUmem>());
/// Ends that.
pub const VDUSE_IOTLB_DEREG_UMEM: u64 = ioctl(WRITE, 0x19, size_of::<IovaUmem>());
/// What can be done with the region that overlaps a range.
pub const VDUSE_IOTLB_GET_INFO: u64 = ioctl(READ | WRITE, 0x1a, size_of::<IovaInfo>());
/// [`VDUSE_IOTLB_GET_FD`] in an address space (API version 1).
pub const VDUSE_IOTLB_GET_FD2: u64 = ioctl(READ | WRITE, 0x1b, size_of::<IotlbEntryV2>());
/// The number that the same request had while its argument was [`IotlbEntryV2Early`].
pub const VDUSE_IOTLB_GET_FD2_EARLY: u64 =
    ioctl(READ | WRITE, 0x1b, size_of::<IotlbEntryV2Early>());

/// The device may only read the region.
pub const VDUSE_ACCESS_RO: u8 = 1;
/// The device may only write the region.
pub const VDUSE_ACCESS_WO: u8 = 2;
/// The device may do both.
pub const VDUSE_ACCESS_RW: u8 = 3;

/// The region can be backed by user memory.
pub const VDUSE_IOVA_CAP_UMEM: u64 = 1 << 0;

/// [`VqEventfd::fd`] that takes the eventfd away.
pub const VDUSE_EVENTFD_DEASSIGN: i32 = -1;

/// Request: where the queue stands.
pub const VDUSE_GET_VQ_STATE: u32 = 0;
/// Request: the driver writes the device status.
pub const VDUSE_SET_STATUS: u32 = 1;
/// Request: let go of mappings.
pub const VDUSE_UPDATE_IOTLB: u32 = 2;
/// Request: a group of queues moves to another address space (API version 1).
pub const VDUSE_SET_VQ_GROUP_ASID: u32 = 3;
/// Request: the driver starts or stops a queue ([`VDUSE_F_QUEUE_READY`]).
pub const VDUSE_SET_VQ_READY: u32 = 4;
/// Request: stand still ([`VDUSE_F_SUSPEND`]).
pub const VDUSE_SUSPEND: u32 = 5;

/// The request was carried out.
pub const VDUSE_REQ_RESULT_OK: u32 = 0;
/// The request was refused.
pub const VDUSE_REQ_RESULT_FAILED: u32 = 1;

/// `struct vduse_dev_config`; the configuration space follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DevConfig {
    /// Ended by a zero.
    pub name: [u8; VDUSE_NAME_MAX],
    /// virtio vendor.
    pub vendor_id: u32,
    /// virtio device type.
    pub device_id: u32,
    /// virtio features.
    pub features: u64,
    /// Number of queues.
    pub vq_num: u32,
    /// Alignment of the queues' parts, a power of two from 4 to the page size.
    pub vq_align: u32,
    /// Groups of queues (API version 1; before: zero).
    pub ngroups: u32,
    /// Address spaces (API version 1; before: zero).
    pub nas: u32,
    /// Zero.
    pub reserved: [u32; 11],
    /// Bytes of configuration space, at most a page.
    pub config_size: u32,
}

/// `struct vduse_iotlb_entry`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IotlbEntry {
    /// Where the region begins in the file.
    pub offset: u64,
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
    /// `VDUSE_ACCESS_*`.
    pub perm: u8,
    /// The compiler's, in the C header.
    pub padding: [u8; 7],
}

/// `struct vduse_iotlb_entry_v2`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IotlbEntryV2 {
    /// As in the first version.
    pub v1: IotlbEntry,
    /// Address space.
    pub asid: u32,
    /// Zero.
    pub reserved: [u32; 11],
}

/// `struct vduse_iotlb_entry_v2` of kernels before its layout was settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IotlbEntryV2Early {
    /// As in the first version.
    pub v1: IotlbEntry,
    /// Address space.
    pub asid: u32,
    /// Zero.
    pub reserved: [u32; 12],
    /// The compiler's, in the C header.
    pub padding: [u8; 4],
}

/// `struct vduse_config_data`; the bytes follow it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ConfigData {
    /// Where in the configuration space.
    pub offset: u32,
    /// How many bytes.
    pub length: u32,
}

/// `struct vduse_vq_config`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VqConfig {
    /// Which queue.
    pub index: u32,
    /// Largest size.
    pub max_size: u16,
    /// Zero.
    pub reserved1: u16,
    /// Group of the queue (API version 1; before: zero).
    pub group: u32,
    /// Zero.
    pub reserved2: [u16; 10],
}

/// `struct vduse_vq_state_packed`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VqStatePacked {
    /// The driver's wrap counter as the device saw it last.
    pub last_avail_counter: u16,
    /// Where the next available descriptor stands.
    pub last_avail_idx: u16,
    /// The device's wrap counter.
    pub last_used_counter: u16,
    /// Where the next used descriptor goes.
    pub last_used_idx: u16,
}

/// `struct vduse_vq_info`. Of a split queue [`state`](Self::state) holds `avail_index` in its
/// first field ([`VqInfo::avail_index`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VqInfo {
    /// Which queue.
    pub index: u32,
    /// Size.
    pub num: u32,
    /// Descriptors.
    pub desc_addr: u64,
    /// The driver's part.
    pub driver_addr: u64,
    /// The device's part.
    pub device_addr: u64,
    /// Where it starts.
    pub state: VqStatePacked,
    /// Not zero: the driver has set it up.
    pub ready: u8,
    /// The compiler's, in the C header.
    pub padding: [u8; 7],
}

impl VqInfo {
    /// Where a split queue starts.
    #[must_use]
    pub const fn avail_index(&self) -> u16 {
        self.state.last_avail_counter
    }
}

/// `struct vduse_vq_eventfd`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VqEventfd {
    /// Which queue.
    pub index: u32,
    /// The eventfd, or [`VDUSE_EVENTFD_DEASSIGN`].
    pub fd: i32,
}

/// `struct vduse_iova_umem`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IovaUmem {
    /// Where the memory begins, at a page.
    pub uaddr: u64,
    /// First address of the region.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address space (API version 1; before: zero).
    pub asid: u32,
    /// Zero.
    pub reserved: [u32; 5],
}

/// `struct vduse_iova_info`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IovaInfo {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
    /// `VDUSE_IOVA_CAP_*`.
    pub capability: u64,
    /// Address space (API version 1; before: zero).
    pub asid: u32,
    /// Zero.
    pub reserved: [u32; 5],
}

/// Bytes of the part of requests and responses that depends on the type.
pub const PAYLOAD_BYTES: usize = 128;

/// `struct vduse_dev_request`, the type's own part as bytes: see [`payload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DevRequest {
    /// `VDUSE_GET_VQ_STATE` and so on.
    pub kind: u32,
    /// Comes back in the response.
    pub request_id: u32,
    /// Of no meaning yet.
    pub reserved: [u32; 4],
    /// The type's own part.
    pub payload: [u8; PAYLOAD_BYTES],
}

/// `struct vduse_dev_response`, the type's own part as bytes: see [`payload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DevResponse {
    /// The request's.
    pub request_id: u32,
    /// `VDUSE_REQ_RESULT_*`.
    pub result: u32,
    /// Zero: the kernel refuses the response otherwise.
    pub reserved: [u32; 4],
    /// The type's own part.
    pub payload: [u8; PAYLOAD_BYTES],
}

/// Bytes of a request and of a response.
pub const MESSAGE_BYTES: usize = size_of::<DevRequest>();

/// Offsets of fields in the part of requests and responses that depends on the type.
pub mod payload {
    /// `u32`: the queue of [`VDUSE_GET_VQ_STATE`](super::VDUSE_GET_VQ_STATE).
    pub const VQ_STATE_INDEX: usize = 0;
    /// `u16` (split) or [`VqStatePacked`](super::VqStatePacked): its state, in the response.
    pub const VQ_STATE_STATE: usize = 4;
    /// `u8`: the status of [`VDUSE_SET_STATUS`](super::VDUSE_SET_STATUS).
    pub const STATUS: usize = 0;
    /// `u64`: first address of [`VDUSE_UPDATE_IOTLB`](super::VDUSE_UPDATE_IOTLB).
    pub const IOVA_START: usize = 0;
    /// `u64`: its last address.
    pub const IOVA_LAST: usize = 8;
    /// `u32`: its address space (API version 1).
    pub const IOVA_ASID: usize = 16;
    /// `u32`: the group of [`VDUSE_SET_VQ_GROUP_ASID`](super::VDUSE_SET_VQ_GROUP_ASID).
    pub const GROUP: usize = 0;
    /// `u32`: its address space.
    pub const GROUP_ASID: usize = 4;
    /// `u32`: the queue of [`VDUSE_SET_VQ_READY`](super::VDUSE_SET_VQ_READY).
    pub const READY_INDEX: usize = 0;
    /// `u32`: whether it starts.
    pub const READY: usize = 4;
}

/// Number of an ioctl of VDUSE's.
const fn ioctl(direction: u64, nr: u64, size: usize) -> u64 {
    number(direction, VDUSE_BASE, nr, size)
}

const _: () = {
    assert!(size_of::<DevConfig>() == 336);
    assert!(offset_of!(DevConfig, vendor_id) == 256);
    assert!(offset_of!(DevConfig, device_id) == 260);
    assert!(offset_of!(DevConfig, features) == 264);
    assert!(offset_of!(DevConfig, vq_num) == 272);
    assert!(offset_of!(DevConfig, vq_align) == 276);
    assert!(offset_of!(DevConfig, ngroups) == 280);
    assert!(offset_of!(DevConfig, nas) == 284);
    assert!(offset_of!(DevConfig, reserved) == 288);
    assert!(offset_of!(DevConfig, config_size) == 332);
    assert!(size_of::<IotlbEntry>() == 32);
    assert!(offset_of!(IotlbEntry, start) == 8);
    assert!(offset_of!(IotlbEntry, last) == 16);
    assert!(offset_of!(IotlbEntry, perm) == 24);
    assert!(size_of::<IotlbEntryV2>() == 80);
    assert!(offset_of!(IotlbEntryV2, asid) == 32);
    assert!(size_of::<IotlbEntryV2Early>() == 88);
    assert!(offset_of!(IotlbEntryV2Early, asid) == 32);
    assert!(size_of::<ConfigData>() == 8);
    assert!(size_of::<VqConfig>() == 32);
    assert!(offset_of!(VqConfig, max_size) == 4);
    assert!(offset_of!(VqConfig, group) == 8);
    assert!(offset_of!(VqConfig, reserved2) == 12);
    assert!(size_of::<VqStatePacked>() == 8);
    assert!(size_of::<VqInfo>() == 48);
    assert!(offset_of!(VqInfo, num) == 4);
    assert!(offset_of!(VqInfo, desc_addr) == 8);
    assert!(offset_of!(VqInfo, driver_addr) == 16);
    assert!(offset_of!(VqInfo, device_addr) == 24);
    assert!(offset_of!(VqInfo, state) == 32);
    assert!(offset_of!(VqInfo, ready) == 40);
    assert!(size_of::<VqEventfd>() == 8);
    assert!(size_of::<IovaUmem>() == 48);
    assert!(offset_of!(IovaUmem, asid) == 24);
    assert!(size_of::<IovaInfo>() == 48);
    assert!(offset_of!(IovaInfo, capability) == 16);
    assert!(offset_of!(IovaInfo, asid) == 24);
    assert!(size_of::<DevRequest>() == 152);
    assert!(offset_of!(DevRequest, request_id) == 4);
    assert!(offset_of!(DevRequest, payload) == 24);
    assert!(size_of::<DevResponse>() == 152);
    assert!(offset_of!(DevResponse, result) == 4);
    assert!(offset_of!(DevResponse, payload) == 24);
    assert!(VDUSE_GET_API_VERSION == 0x8008_8100);
    assert!(VDUSE_SET_API_VERSION == 0x4008_8101);
    assert!(VDUSE_CREATE_DEV == 0x4150_8102);
    assert!(VDUSE_DESTROY_DEV == 0x4100_8103);
    assert!(VDUSE_GET_FEATURES == 0x8008_8104);
    assert!(VDUSE_SET_FEATURES == 0x4008_8105);
    assert!(VDUSE_IOTLB_GET_FD == 0xc020_8110);
    assert!(VDUSE_DEV_GET_FEATURES == 0x8008_8111);
    assert!(VDUSE_DEV_SET_CONFIG == 0x4008_8112);
    assert!(VDUSE_DEV_INJECT_CONFIG_IRQ == 0x8113);
    assert!(VDUSE_VQ_SETUP == 0x4020_8114);
    assert!(VDUSE_VQ_GET_INFO == 0xc030_8115);
    assert!(VDUSE_VQ_SETUP_KICKFD == 0x4008_8116);
    assert!(VDUSE_VQ_INJECT_IRQ == 0x4004_8117);
    assert!(VDUSE_IOTLB_REG_UMEM == 0x4030_8118);
    assert!(VDUSE_IOTLB_DEREG_UMEM == 0x4030_8119);
    assert!(VDUSE_IOTLB_GET_INFO == 0xc030_811a);
    assert!(VDUSE_IOTLB_GET_FD2 == 0xc050_811b);
    assert!(VDUSE_IOTLB_GET_FD2_EARLY == 0xc058_811b);
};
