/* SPDX-License-Identifier: GPL-2.0-only */
/* The interface under test, written down a second time so that a change shows. */
#ifndef UAPI_H
#define UAPI_H

#include <linux/kvm.h>
#include <linux/types.h>

#ifndef KVM_CAP_IOREGIONFD
#define KVM_CAP_IOREGIONFD 0xf0f0

#define KVM_IOREGION_PIO 1u
#define KVM_IOREGION_POSTED_WRITES 2u
#define KVM_IOREGION_DEASSIGN 4u

struct kvm_ioregion {
	__u64 guest_paddr, memory_size, user_data;
	__s32 read_fd, write_fd;
	__u32 flags;
	__u8 pad[28];
};

struct kvm_ioregion_prog {
	__u64 guest_paddr, memory_size, eventfds;
	__u32 flags;
	__s32 prog_fd, regs_fd;
	__u32 nr_eventfds;
	__u8 pad[24];
};

/* What KVM_IOEVENTFD takes with the last patch */
struct kvm_ioeventfd_post {
	__u64 datamatch, addr;
	__u32 len;
	__s32 fd;
	__u32 flags, pad0;
	__u64 post_addr;
	__u8 pad[24];
};

#define KVM_CAP_IOEVENTFD_POST_WRITE 0xf0f1
#define KVM_IOEVENTFD_FLAG_POST_WRITE (1u << 5)

#define KVM_SET_IOREGION 0x4040aef0ul
#define KVM_SET_IOREGION_PROG 0x4040aef1ul
#define KVM_CREATE_IOREGIONFD 0x8008aef2ul
#endif

struct ioregionfd_cmd {
	__u32 info, padding;
	__u64 user_data, offset, data;
};

struct ioregionfd_resp {
	__u64 data;
	__u8 pad[24];
};

#define MAILBOX_CMDS 64
struct ioregionfd_mailbox {
	__u64 head;
	__u32 sleeping, closed;
	__u8 pad0[48];
	__u64 tail, answered, data;
	__u8 pad1[40];
	struct ioregionfd_cmd cmds[MAILBOX_CMDS];
};

_Static_assert(sizeof(struct kvm_ioregion) == 64, "size");
_Static_assert(sizeof(struct kvm_ioregion_prog) == 64, "size");
_Static_assert(sizeof(struct kvm_ioeventfd_post) == sizeof(struct kvm_ioeventfd), "size");
_Static_assert(sizeof(struct ioregionfd_cmd) == 32, "size");
_Static_assert(sizeof(struct ioregionfd_resp) == 32, "size");
_Static_assert(sizeof(struct ioregionfd_mailbox) == 2176, "size");

#endif
