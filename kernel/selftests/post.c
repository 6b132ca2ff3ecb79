// SPDX-License-Identifier: GPL-2.0-only
/* ioeventfds that store the value (the optional last patch) */
#include "tests.h"

static struct code code[1];

static int post_event(struct vm *vm, uint64_t addr, unsigned int len, int fd, uint64_t post,
		      uint32_t flags, uint64_t datamatch, uint32_t pad0)
{
	struct kvm_ioeventfd_post e = {
		.datamatch = datamatch, .addr = addr, .len = len, .fd = fd,
		.flags = flags | KVM_IOEVENTFD_FLAG_POST_WRITE, .pad0 = pad0, .post_addr = post,
	};

	return ioctl(vm->fd, KVM_IOEVENTFD, &e) ? -errno : 0;
}

static uint64_t count_of(int eventfd)
{
	uint64_t n;

	return read(eventfd, &n, 8) == 8 ? n : 0;
}

void test_post_write(void)
{
	static const unsigned int sizes[] = { 1, 2, 4, 8 };
	struct vm vm;
	int e = eventfd(0, EFD_NONBLOCK);
	uint8_t *mem = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t at = (uintptr_t)mem;

	MUST(mem != MAP_FAILED && e >= 0);
	vm_open(&vm);
	if (ioctl(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_IOEVENTFD_POST_WRITE) != 1) {
		printf("  no KVM_CAP_IOEVENTFD_POST_WRITE in this kernel\n");
		CHECK_EQ(post_event(&vm, MMIO, 4, e, at, 0, 0, 0), -EINVAL);
		goto out;
	}
	CHECK_EQ(post_event(&vm, MMIO, 0, e, at, 0, 0, 0), -EINVAL);
	CHECK_EQ(post_event(&vm, MMIO, 4, e, at + 2, 0, 0, 0), -EINVAL);
	CHECK_EQ(post_event(&vm, MMIO, 4, e, 1ull << 63, 0, 0, 0), -EINVAL);
	CHECK_EQ(post_event(&vm, MMIO, 4, e, at, 0, 0, 1), -EINVAL);
	CHECK_EQ(post_event(&vm, MMIO, 4, e, at, KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY, 0, 0), -EINVAL);
	CHECK_EQ(post_event(&vm, MMIO, 4, 9999, at, 0, 0, 0), -EBADF);

	/* Each width, its own bytes only; three writes are three events and the last value. */
	for (int i = 0; i < 4; i++) {
		unsigned int s = sizes[i];
		uint64_t value = 0x8877665544332211, got = 0;

		memset(mem, 0xee, 64);
		CHECK_EQ(post_event(&vm, MMIO, s, e, at + 16, 0, 0, 0), 0);
		CHECK_EQ(post_event(&vm, MMIO, s, e, at + 16, 0, 0, 0), -EEXIST);
		code_init(&code[0], 0);
		mmio_write(&code[0], MMIO, s, 0);
		mmio_write(&code[0], MMIO, s, 1);
		mmio_write(&code[0], MMIO, s, value);
		mmio_write(&code[0], MMIO, s == 4 ? 2 : 4, 5);	/* another width */
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
		CHECK_EQ(count_of(e), 3);
		memcpy(&got, mem + 16, s);
		CHECK_EQ(got, s == 8 ? value : value & ((1ull << 8 * s) - 1));
		CHECK_EQ(mem[15], 0xee);
		CHECK_EQ(mem[16 + s], 0xee);
		/* Detached by the same arguments only */
		CHECK_EQ(post_event(&vm, MMIO, s, e, at + 32, KVM_IOEVENTFD_FLAG_DEASSIGN, 0, 0), -ENOENT);
		CHECK_EQ(post_event(&vm, MMIO, s, e, at + 16, KVM_IOEVENTFD_FLAG_DEASSIGN, 0, 0), 0);
	}

	/* What does not match stores nothing. */
	CHECK_EQ(post_event(&vm, MMIO, 4, e, at + 16, KVM_IOEVENTFD_FLAG_DATAMATCH, 7, 0), 0);
	CHECK_EQ(post_event(&vm, 0x300, 2, e, at + 24, KVM_IOEVENTFD_FLAG_PIO, 0, 0), 0);
	memset(mem, 0xee, 64);
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO, 4, 6);
	mmio_write(&code[0], MMIO, 4, 7);
	pio_write(&code[0], 0x300, 2, 0xabcd);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
	CHECK_EQ(mem[16], 0xee);
	CHECK_EQ(count_of(e), 0);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(count_of(e), 2);
	CHECK_EQ(mem[16], 7);
	CHECK_EQ(mem[24] | mem[25] << 8, 0xabcd);

	/* Memory that has gone: an exit, and no event */
	MUST(!munmap(mem, 4096));
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_IO);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(count_of(e), 0);
out:
	vm_close(&vm);
	munmap(mem, 8192);
	close(e);
}
