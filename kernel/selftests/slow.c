// SPDX-License-Identifier: GPL-2.0-only
/* Regions, the wire protocol, signals, removal, dead and hostile devices */
#include "tests.h"

#define POSTED KVM_IOREGION_POSTED_WRITES
#define PIO KVM_IOREGION_PIO

static struct code code[2];

static void expect(const struct device *d, unsigned int i, unsigned int op, unsigned int size,
		   uint64_t offset, uint64_t data, bool resp)
{
	const struct ioregionfd_cmd *c = &d->told[i].cmd;

	if (i >= d->nr) {
		FAIL("command %u is missing", i);
		return;
	}
	if (cmd_op(c) != op || cmd_size(c) != size || c->offset != offset || c->data != data ||
	    cmd_resp(c) != resp)
		FAIL("command %u: op %u size %u offset %#llx data %#llx resp %u, not %u %u %#llx %#llx %u",
		     i, cmd_op(c), cmd_size(c), (unsigned long long)c->offset,
		     (unsigned long long)c->data, cmd_resp(c), op, size,
		     (unsigned long long)offset, (unsigned long long)data, resp);
}

void test_errnos(void)
{
	struct vm vm;
	struct wire w, w2;
	struct device d = { };
	int fd, sv[2], ro;

	vm_open(&vm);
	CHECK_EQ(ioctl(vm.kvm, KVM_CHECK_EXTENSION, KVM_CAP_IOREGIONFD), 2);
	CHECK_EQ(ioctl(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_IOREGIONFD), 2);
	wire_open(&vm, &w, STREAM);
	wire_open(&vm, &w2, PIPES);
	fd = w.kvm_read;

	CHECK_EQ(ioctl(vm.fd, KVM_SET_IOREGION, (void *)8), -1);
	CHECK_EQ(errno, EFAULT);
	/* The arguments alone */
	CHECK_EQ(set_region(&vm, MMIO, 0, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, 0, 0, 0, fd, fd, PIO), -EINVAL);
	CHECK_EQ(set_region(&vm, ~0ull, 2, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, ~0xfffull, 0x1001, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, 0xffff, 2, 0, fd, fd, PIO), -EINVAL);
	CHECK_EQ(set_region(&vm, 0x10000, 1, 0, fd, fd, PIO), -EINVAL);
	CHECK_EQ(set_region(&vm, 0, 0x10001, 0, fd, fd, PIO), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, fd, fd, 8), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, fd, fd, ~0u), -EINVAL);
	for (unsigned int i = 0; i < 28; i++) {
		struct kvm_ioregion r = { .guest_paddr = MMIO, .memory_size = 8,
					  .read_fd = fd, .write_fd = fd };

		r.pad[i] = 1;
		CHECK_EQ(ioctl(vm.fd, KVM_SET_IOREGION, &r), -1);
		CHECK_EQ(errno, EINVAL);
	}
	/* Descriptors */
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, -1, fd, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, fd, -1, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, 9999, fd, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, -2, -2, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, w2.kvm_write, w2.kvm_write, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, w2.kvm_read, w2.kvm_read, 0), -EBADF);
	ro = open("/dev/null", O_RDWR);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, ro, ro, 0), -EINVAL);
	close(ro);
	ro = eventfd(0, 0);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, ro, ro, 0), -EINVAL);
	close(ro);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, vm.fd, vm.fd, 0), -EINVAL);
	MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, sv));
	close(sv[1]);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, sv[0], sv[0], 0), -EBADF);
	close(sv[0]);
	sv[0] = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK_EQ(set_region(&vm, MMIO, 8, 0, sv[0], sv[0], 0), -EBADF);
	close(sv[0]);
	/* Nothing of this has left anything behind */
	CHECK_EQ(del_region(&vm, MMIO, 8, 0), -ENOENT);

	/* Regions among each other: 1.3 (a) is the one that starts on the last byte */
	uint64_t base = MMIO + 0x1000;

	CHECK_EQ(set_region(&vm, base, 0x1000, 1, fd, fd, 0), 0);
	CHECK_EQ(set_region(&vm, base - 0x800, 0x1000, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base + 0x800, 0x1000, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base - 0x800, 0x2000, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base, 0x2000, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base - 1, 2, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base + 0xfff, 2, 0, fd, fd, 0), -EEXIST);
	CHECK_EQ(set_region(&vm, base, 0x800, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, base + 0x800, 0x800, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, base + 0xfff, 1, 0, fd, fd, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, base - 0x1000, 0x1000, 0, fd, fd, 0), 0);
	CHECK_EQ(set_region(&vm, base + 0x1000, 0x1000, 0, fd, fd, 0), 0);
	CHECK_EQ(set_region(&vm, 0x1000, 0x1000, 0, fd, fd, PIO), 0);
	/* One file belongs to one pair */
	CHECK_EQ(set_region(&vm, 0x100, 8, 0, fd, w2.kvm_write, PIO), -EINVAL);
	CHECK_EQ(set_region(&vm, 0x100, 8, 0, w2.kvm_read, fd, PIO), -EINVAL);
	/* A modification */
	CHECK_EQ(set_region(&vm, base, 0x1000, 2, w2.kvm_read, w2.kvm_write, POSTED), 0);
	CHECK_EQ(set_region(&vm, base, 0x1000, 2, -1, fd, POSTED), -EBADF);
	CHECK_EQ(del_region(&vm, base, 0x800, 0), -ENOENT);
	CHECK_EQ(del_region(&vm, base + 1, 0xfff, 0), -ENOENT);
	CHECK_EQ(del_region(&vm, base, 0x1000, PIO), -EINVAL);
	CHECK_EQ(del_region(&vm, 0x2000, 0x1000, PIO), -ENOENT);
	CHECK_EQ(set_region(&vm, base, 0x1000, 0, -1, -1, 0), 0);
	CHECK_EQ(del_region(&vm, base, 0x1000, 0), -ENOENT);
	CHECK_EQ(del_region(&vm, base - 0x1000, 0x1000, 0), 0);
	CHECK_EQ(del_region(&vm, base + 0x1000, 0x1000, 0), 0);
	CHECK_EQ(del_region(&vm, 0x1000, 0x1000, PIO), 0);
	/* All of a bus, and its last byte */
	CHECK_EQ(set_region(&vm, 0, ~0ull, 0, fd, fd, 0), 0);
	CHECK_EQ(set_region(&vm, ~0ull, 1, 0, fd, fd, 0), 0);
	CHECK_EQ(del_region(&vm, 0, ~0ull, 0), 0);
	CHECK_EQ(del_region(&vm, ~0ull, 1, 0), 0);
	CHECK_EQ(set_region(&vm, 0, 0x10000, 0, fd, fd, PIO), 0);
	CHECK_EQ(del_region(&vm, 0, 0x10000, PIO), 0);

	/* Refused changes change nothing: the first region still works. */
	CHECK_EQ(set_region(&vm, MMIO, 0x1000, 7, fd, fd, 0), 0);
	CHECK_EQ(set_region(&vm, MMIO, 0x1000, 8, -1, fd, 0), -EBADF);
	CHECK_EQ(set_region(&vm, MMIO + 0xfff, 2, 8, fd, fd, 0), -EEXIST);
	device_start(&d, &w, 8);
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO + 4, 4, 0x11);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(d.nr, 1);
	CHECK_EQ(d.told[0].cmd.user_data, 7);
	CHECK_EQ(d.told[0].cmd.info, 0x61);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_kvm(&w2);
	wire_close_dev(&w2);
	wire_close_dev(&w);
}

/* Thousands, found by bisection */
void test_many(void)
{
	struct vm vm;
	struct wire w;
	struct device d = { };
	unsigned int i;
	int r = 0;

	vm_open(&vm);
	wire_open(&vm, &w, STREAM);
	device_start(&d, &w, 16);
	for (i = 0; i < 9000 && !r; i++)
		r = set_region(&vm, MMIO + 0x20 * i, 0x10, i, w.kvm_read, w.kvm_write, 0);
	CHECK_EQ(r, -ENOSPC);
	CHECK_EQ(i - 1, 8192);
	code_init(&code[0], 0);
	for (i = 0; i < 8192; i += 1000)
		mmio_write(&code[0], MMIO + 0x20 * i + 8, 4, i);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(d.nr, 9);
	for (i = 0; i < d.nr; i++)
		CHECK_EQ(d.told[i].cmd.user_data, 1000 * i);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
}

static uint64_t answer_bytes(struct device *d, const struct ioregionfd_cmd *cmd)
{
	uint64_t v = 0;

	(void)d;
	for (unsigned int i = 0; i < 8; i++)
		v |= ((cmd->offset + i + 1) & 0xff) << 8 * i;
	return v;
}

void test_sizes(void)
{
	static const unsigned int sizes[] = { 1, 2, 4, 8 };

	for (int t = 0; t < nr_transports; t++) {
		for (int posted = 0; posted < 2; posted++) {
			struct vm vm;
			struct wire w;
			struct device d = { .answer = answer_bytes };
			unsigned int n = 0;

			vm_open(&vm);
			wire_open(&vm, &w, t);
			device_start(&d, &w, 256);
			CHECK_EQ(set_region(&vm, MMIO, 0x2000, 1, w.kvm_read, w.kvm_write,
					    posted ? POSTED : 0), 0);
			CHECK_EQ(set_region(&vm, 0x100, 0x10, 2, w.kvm_read, w.kvm_write,
					    PIO | (posted ? POSTED : 0)), 0);
			code_init(&code[0], 0);
			for (int i = 0; i < 4; i++) {
				/* aligned, unaligned, over the page */
				mmio_write(&code[0], MMIO + 0x10, sizes[i], 0x8877665544332211);
				mmio_write(&code[0], MMIO + 0x23, sizes[i], 0x8877665544332211);
				mmio_read(&code[0], MMIO + 0x10, sizes[i]);
				mmio_read(&code[0], MMIO + 0x25, sizes[i]);
				if (i < 3) {
					pio_write(&code[0], 0x104, sizes[i], 0x44332211);
					pio_read(&code[0], 0x108, sizes[i]);
				}
			}
			mmio_write(&code[0], MMIO + 0xffd, 4, 0x44332211);
			mmio_read(&code[0], MMIO + 0xffd, 4);
			mmio_write(&code[0], MMIO + 0xff9, 8, 0x8877665544332211);
			mmio_read(&code[0], MMIO + 0xfff, 8);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			for (int i = 0; i < 4; i++) {
				unsigned int s = sizes[i];
				uint64_t mask = s == 8 ? ~0ull : (1ull << 8 * s) - 1;
				uint64_t v = 0x8877665544332211 & mask;

				expect(&d, n++, 1, s, 0x10, v, !posted);
				expect(&d, n++, 1, s, 0x23, v, !posted);
				expect(&d, n++, 0, s, 0x10, 0, true);
				expect(&d, n++, 0, s, 0x25, 0, true);
				CHECK_EQ(vm_log(&vm, 0, i * 3), 0x1817161514131211 & mask);
				CHECK_EQ(vm_log(&vm, 0, i * 3 + 1), 0x2d2c2b2a29282726 & mask);
				if (i < 3) {
					expect(&d, n++, 1, s, 4, v, !posted);
					CHECK_EQ(d.told[n - 1].cmd.user_data, 2);
					expect(&d, n++, 0, s, 8, 0, true);
					CHECK_EQ(vm_log(&vm, 0, i * 3 + 2), 0x0c0b0a09 & mask);
				}
			}
			/* 3 + 1: the largest power of two first */
			expect(&d, n++, 1, 2, 0xffd, 0x2211, !posted);
			expect(&d, n++, 1, 1, 0xfff, 0x33, !posted);
			expect(&d, n++, 1, 1, 0x1000, 0x44, !posted);
			expect(&d, n++, 0, 2, 0xffd, 0, true);
			expect(&d, n++, 0, 1, 0xfff, 0, true);
			expect(&d, n++, 0, 1, 0x1000, 0, true);
			/* 7 + 1 */
			expect(&d, n++, 1, 4, 0xff9, 0x44332211, !posted);
			expect(&d, n++, 1, 2, 0xffd, 0x6655, !posted);
			expect(&d, n++, 1, 1, 0xfff, 0x77, !posted);
			expect(&d, n++, 1, 1, 0x1000, 0x88, !posted);
			/* 1 + 7 */
			expect(&d, n++, 0, 1, 0xfff, 0, true);
			expect(&d, n++, 0, 4, 0x1000, 0, true);
			expect(&d, n++, 0, 2, 0x1004, 0, true);
			expect(&d, n++, 0, 1, 0x1006, 0, true);
			CHECK_EQ(d.nr, n);
			CHECK_EQ(vm_log(&vm, 0, 11), 0x0100fffe);
			CHECK_EQ(vm_log(&vm, 0, 12), 0x0706050403020100);
			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&d);
			wire_close_dev(&w);
			if (failures)
				printf("  with %s, posted %d\n", transport_names[t], posted);
		}
	}
}

void test_string(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		struct device d = { };
		uint8_t *ram;

		vm_open(&vm);
		wire_open(&vm, &w, t);
		device_start(&d, &w, 4096);
		CHECK_EQ(set_region(&vm, 0x200, 8, 1, w.kvm_read, w.kvm_write, PIO | POSTED), 0);
		ram = vm.ram + 0x300000;
		for (int i = 0; i < 0x1000; i++)
			ram[i] = i * 7;
		code_init(&code[0], 0);
		pio_outs(&code[0], 0x202, 1, 0x300000, 300);
		pio_outs(&code[0], 0x204, 4, 0x300100, 300);
		pio_ins(&code[0], 0x200, 2, 0x310000, 700);
		pio_ins(&code[0], 0x200, 4, 0x320000, 5);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
		CHECK_EQ(d.nr, 1305);
		for (int i = 0; i < 300 && d.nr == 1305; i++) {
			uint32_t v;

			memcpy(&v, ram + 0x100 + 4 * i, 4);
			expect(&d, i, 1, 1, 2, ram[i], false);
			expect(&d, 300 + i, 1, 4, 4, v, false);
		}
		for (int i = 0; i < 700; i++) {
			uint16_t v;

			memcpy(&v, vm.ram + 0x310000 + 2 * i, 2);
			CHECK_EQ(v, 600 + i);
		}
		vm_close(&vm);
		wire_close_kvm(&w);
		device_join(&d);
		wire_close_dev(&w);
	}
}

/* What lies in no region, or only in part, comes out as before */
void test_unclaimed(void)
{
	struct vm vm;
	struct wire w;
	struct device d = { };

	vm_open(&vm);
	wire_open(&vm, &w, STREAM);
	device_start(&d, &w, 16);
	CHECK_EQ(set_region(&vm, MMIO + 0x100, 0x10, 1, w.kvm_read, w.kvm_write, 0), 0);
	CHECK_EQ(set_region(&vm, 0x100, 4, 1, w.kvm_read, w.kvm_write, PIO), 0);
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO, 4, 1);
	mmio_write(&code[0], MMIO + 0x10e, 4, 2);
	mmio_write(&code[0], MMIO + 0xfe, 4, 3);
	mmio_read(&code[0], MMIO + 0x110, 4);
	mmio_read(&code[0], MMIO + 0x10c, 4);
	pio_write(&code[0], 0x102, 4, 5);
	pio_outs(&code[0], 0x104, 1, 0x300000, 3);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	for (int i = 0; i < 3; i++) {
		static const uint32_t at[] = { MMIO, MMIO + 0x10e, MMIO + 0xfe };

		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
		CHECK_EQ(vm.run[0]->mmio.phys_addr, at[i]);
		CHECK_EQ(vm.run[0]->mmio.len, 4);
		CHECK_EQ(vm.run[0]->mmio.is_write, 1);
		CHECK_EQ(vm.run[0]->mmio.data[0], i + 1);
	}
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
	CHECK_EQ(vm.run[0]->mmio.is_write, 0);
	memcpy(vm.run[0]->mmio.data, "\x78\x56\x34\x12", 4);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_IO);
	CHECK_EQ(vm.run[0]->io.port, 0x102);
	/* x86 hands out the elements of OUTS one by one */
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_IO);
		CHECK_EQ(vm.run[0]->io.port, 0x104);
	}
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(vm_log(&vm, 0, 0), 0x12345678);
	CHECK_EQ(d.nr, 1);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
}

/* A page-crossing access between user space and a region, both ways */
void test_half(void)
{
	struct vm vm;
	struct wire w;
	struct device d = { .answer = answer_bytes };

	vm_open(&vm);
	wire_open(&vm, &w, STREAM);
	device_start(&d, &w, 16);
	CHECK_EQ(set_region(&vm, MMIO + 0x1000, 0x1000, 1, w.kvm_read, w.kvm_write, 0), 0);
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO + 0xffe, 4, 0x44332211);
	mmio_read(&code[0], MMIO + 0xffe, 4);
	mmio_write(&code[0], MMIO + 0x1ffe, 4, 0x44332211);
	mmio_read(&code[0], MMIO + 0x1ffe, 4);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
		CHECK_EQ(vm.run[0]->mmio.phys_addr, i < 2 ? MMIO + 0xffe : MMIO + 0x2000);
		CHECK_EQ(vm.run[0]->mmio.len, 2);
		if (i & 1)
			memcpy(vm.run[0]->mmio.data, "\xaa\xbb", 2);
		else
			CHECK_EQ(vm.run[0]->mmio.data[0], i ? 0x33 : 0x11);
	}
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	expect(&d, 0, 1, 2, 0, 0x4433, true);
	expect(&d, 1, 0, 2, 0, 0, true);
	expect(&d, 2, 1, 2, 0xffe, 0x2211, true);
	expect(&d, 3, 0, 2, 0xffe, 0, true);
	CHECK_EQ(vm_log(&vm, 0, 0), 0x0201bbaa);
	CHECK_EQ(vm_log(&vm, 0, 1), 0xbbaa00ff);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
}

/* An ioeventfd in a region wins for what it matches */
void test_ioeventfd(void)
{
	struct vm vm;
	struct wire w;
	struct device d = { };
	uint64_t n = 0;

	vm_open(&vm);
	wire_open(&vm, &w, STREAM);
	device_start(&d, &w, 16);
	struct kvm_ioeventfd e = { .datamatch = 5, .addr = MMIO + 0x10, .len = 4,
				   .fd = eventfd(0, EFD_NONBLOCK),
				   .flags = KVM_IOEVENTFD_FLAG_DATAMATCH };

	CHECK_EQ(set_region(&vm, MMIO, 0x1000, 1, w.kvm_read, w.kvm_write, POSTED), 0);
	MUST(!ioctl(vm.fd, KVM_IOEVENTFD, &e));
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO + 0xc, 4, 5);
	mmio_write(&code[0], MMIO + 0x10, 4, 5);
	mmio_write(&code[0], MMIO + 0x10, 4, 6);
	mmio_write(&code[0], MMIO + 0x10, 2, 5);
	mmio_write(&code[0], MMIO + 0x14, 4, 5);
	mmio_read(&code[0], MMIO + 0x10, 4);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(d.nr, 5);
	expect(&d, 1, 1, 4, 0x10, 6, false);
	expect(&d, 2, 1, 2, 0x10, 5, false);
	MUST(read(e.fd, &n, 8) == 8);
	CHECK_EQ(n, 1);
	close(e.fd);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
}

/* A signal in the middle of an access: nothing is sent twice, nothing lost */
void test_signal(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int kind = 0; kind < 4; kind++) {
			struct vm vm;
			struct wire w;
			volatile int gate = 0;
			struct device d = { .gate = &gate };
			struct runner r;
			bool write = kind & 1, pio = kind & 2;

			vm_open(&vm);
			wire_open(&vm, &w, t);
			device_start(&d, &w, 16);
			CHECK_EQ(set_region(&vm, pio ? 0x300 : MMIO, 16, 1, w.kvm_read, w.kvm_write,
					    pio ? PIO : 0), 0);
			code_init(&code[0], 0);
			if (pio && write)
				pio_outs(&code[0], 0x300, 2, 0x300000, 3);
			else if (pio)
				pio_ins(&code[0], 0x300, 2, 0x310000, 3);
			else if (write)
				mmio_write(&code[0], MMIO + 4, 4, 9);
			else
				mmio_read(&code[0], MMIO + 4, 4);
			mmio_read(&code[0], MMIO + 0x2000, 4);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			for (int i = 0; i < 3; i++) {
				runner_start(&r, &vm, 0);
				WAIT_FOR(d.nr == 1);
				CHECK(!runner_done_within(&r, 3));
				runner_signal(&r);
				CHECK_EQ(runner_join(&r), -EINTR);
				CHECK_EQ(vm.run[0]->exit_reason, KVM_EXIT_INTR);
			}
			/* The page belongs to user space now */
			memset((char *)vm.run[0] + 32, 0xee, 64);
			vm.run[0]->exit_reason = KVM_EXIT_MMIO;
			vm.run[0]->immediate_exit = 1;
			for (int i = 0; i < 3; i++)
				CHECK_EQ(vm_run(&vm, 0), -EINTR);
			CHECK_EQ(d.nr, 1);
			gate = 1;
			WAIT_FOR(d.answered == 1);
			if (!pio) {
				/* What is there is fetched also by a KVM_RUN that may not wait. */
				CHECK_EQ(vm_run(&vm, 0), -EINTR);
			}
			vm.run[0]->immediate_exit = 0;
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_MMIO);
			CHECK_EQ(vm.run[0]->mmio.phys_addr, MMIO + 0x2000);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, pio ? 3 : 1);
			if (!write && !pio)
				CHECK_EQ(vm_log(&vm, 0, 0), 0);
			if (!write && pio)
				CHECK_EQ(*(uint32_t *)(vm.ram + 0x310002), 0x00020001);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 0);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_accesses"), pio ? 3 : 1);
			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&d);
			wire_close_dev(&w);
			if (failures)
				printf("  with %s, kind %d\n", transport_names[t], kind);
		}
	}
}

/* The vCPU's signal mask counts, not the thread's */
void test_sigmask(void)
{
	struct vm vm;
	struct wire w;
	volatile int gate = 0;
	struct device d = { .gate = &gate };
	struct runner r;
	sigset_t set, old;
	struct { uint32_t len; uint8_t bits[8]; } mask = { .len = 8 };

	vm_open(&vm);
	wire_open(&vm, &w, PIPES);
	device_start(&d, &w, 16);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
	code_init(&code[0], 0);
	mmio_read(&code[0], MMIO, 4);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	/* Blocked in the thread, not in KVM_RUN */
	MUST(!ioctl(vm.vcpu[0], KVM_SET_SIGNAL_MASK, &mask));
	pthread_sigmask(SIG_BLOCK, &set, &old);
	runner_start(&r, &vm, 0);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	WAIT_FOR(d.nr == 1);
	pthread_kill(r.thread, SIGUSR1);
	CHECK_EQ(runner_join(&r), -EINTR);
	/* The other way round */
	memset(mask.bits, 0xff, 8);
	MUST(!ioctl(vm.vcpu[0], KVM_SET_SIGNAL_MASK, &mask));
	runner_start(&r, &vm, 0);
	WAIT_FOR(r.tid);
	for (int i = 0; i < 20; i++) {
		pthread_kill(r.thread, SIGUSR1);
		sleep_ms(1);
	}
	CHECK(!r.done);
	gate = 1;
	CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
	CHECK_EQ(d.nr, 1);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
}

/* Removal ends what is pending; a response that comes too late is nobody's */
void test_remove_pending(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int kind = 0; kind < 4; kind++) {
			struct vm vm;
			struct wire w;
			volatile int gate = 0;
			struct device d = { .gate = &gate };
			struct runner r;
			bool shared = kind & 1, parked = kind & 2;

			/* Nothing tells a FIFO that is opened anew from the old one. */
			if (t == FIFOS && !shared)
				continue;
			vm_open(&vm);
			wire_open(&vm, &w, t);
			device_start(&d, &w, 16);
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
			if (shared)
				CHECK_EQ(set_region(&vm, 0x300, 16, 1, w.kvm_read, w.kvm_write, PIO), 0);
			code_init(&code[0], 0);
			mmio_read(&code[0], MMIO + 4, 4);
			mmio_read(&code[0], MMIO + 8, 8);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			runner_start(&r, &vm, 0);
			WAIT_FOR(d.nr == 1);
			if (parked) {
				runner_signal(&r);
				CHECK_EQ(runner_join(&r), -EINTR);
			}
			CHECK_EQ(del_region(&vm, MMIO, 16, 0), 0);
			if (parked)
				runner_start(&r, &vm, 0);
			/* The second read finds no region */
			CHECK_EQ(runner_join(&r), KVM_EXIT_MMIO);
			CHECK_EQ(vm_log(&vm, 0, 0), 0xffffffff);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 1);
			CHECK_EQ(vm.run[0]->mmio.phys_addr, MMIO + 8);
			/* The same files again, while the device owes a response */
			CHECK_EQ(set_region(&vm, MMIO, 16, 2, w.kvm_read, w.kvm_write, 0), 0);
			code_init(&code[0], 0);
			mmio_read(&code[0], MMIO + 0xc, 4);
			halt(&code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			vm_load(&vm, &code[0]);
			runner_start(&r, &vm, 0);
			CHECK(!runner_done_within(&r, 5));
			gate = 1;
			CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 1);
			CHECK_EQ(d.nr, 2);
			expect(&d, 1, 0, 4, 0xc, 0, true);
			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&d);
			wire_close_dev(&w);
			if (failures)
				printf("  with %s, kind %d\n", transport_names[t], kind);
		}
	}
}

/* A read that the device has got, behind its gate, and that the vCPU has left with EINTR */
static void interrupted_read(struct vm *vm, struct wire *w, struct device *d, int transport)
{
	struct runner r;

	vm_open(vm);
	wire_open(vm, w, transport);
	device_start(d, w, 16);
	CHECK_EQ(set_region(vm, MMIO, 16, 1, w->kvm_read, w->kvm_write, 0), 0);
	code_init(&code[0], 0);
	mmio_read(&code[0], MMIO + 4, 4);
	halt(&code[0]);
	vm_load(vm, &code[0]);
	runner_start(&r, vm, 0);
	WAIT_FOR(d->nr == 1);
	runner_signal(&r);
	CHECK_EQ(runner_join(&r), -EINTR);
}

/* A removed region keeps no file open: the device sees the end of its file. */
void test_remove_lets_go(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		volatile int gate = 0;
		struct device d = { .gate = &gate };

		interrupted_read(&vm, &w, &d, t);
		CHECK_EQ(del_region(&vm, MMIO, 16, 0), 0);
		wire_close_kvm(&w);
		gate = 1;
		device_join(&d);
		/* The access is still pending in the vCPU */
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
		CHECK_EQ(vm_log(&vm, 0, 0), 0xffffffff);
		vm_close(&vm);
		wire_close_dev(&w);
	}
}

/* Modification: the old device answers what it has got, the new one the rest */
void test_modify_pending(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int remove = 0; remove < 2; remove++) {
			struct vm vm;
			struct wire w[2];
			volatile int gate = 0;
			struct device d[2] = { { .gate = &gate }, { } };
			struct runner r[2];

			vm_open(&vm);
			for (int i = 0; i < 2; i++) {
				wire_open(&vm, &w[i], t);
				device_start(&d[i], &w[i], 16);
			}
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w[0].kvm_read, w[0].kvm_write, 0), 0);
			for (int i = 0; i < 2; i++) {
				code_init(&code[i], i);
				mmio_read(&code[i], MMIO + 4, 4);
				mmio_read(&code[i], MMIO + 8, 4);
				halt(&code[i]);
				vm_load(&vm, &code[i]);
			}
			runner_start(&r[0], &vm, 0);
			WAIT_FOR(d[0].nr == 1);
			runner_start(&r[1], &vm, 1);
			CHECK(!runner_done_within(&r[1], 5));
			CHECK_EQ(set_region(&vm, MMIO, 16, 2, w[1].kvm_read, w[1].kvm_write, 0), 0);
			CHECK_EQ(runner_join(&r[1]), KVM_EXIT_HLT);
			CHECK_EQ(d[1].nr, 2);
			CHECK(!r[0].done);
			if (remove)
				CHECK_EQ(del_region(&vm, MMIO, 16, 0), 0);
			else
				gate = 1;
			CHECK_EQ(runner_join(&r[0]), remove ? KVM_EXIT_MMIO : KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), remove ? 0xffffffff : 0);
			CHECK_EQ(d[0].nr, 1);
			CHECK_EQ(d[1].nr, remove ? 2 : 3);
			gate = 1;
			vm_close(&vm);
			for (int i = 0; i < 2; i++) {
				wire_close_kvm(&w[i]);
				device_join(&d[i]);
				wire_close_dev(&w[i]);
			}
		}
	}
}

/* A device that dies in the middle of an access, and afterwards */
void test_death(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int ignore = 0; ignore < 2; ignore++) {
			struct vm vm;
			struct wire w, other;
			struct device o = { };
			struct runner r;
			struct ioregionfd_cmd cmd;

			signal(SIGPIPE, ignore ? SIG_IGN : SIG_DFL);
			vm_open(&vm);
			wire_open(&vm, &w, t);
			wire_open(&vm, &other, t);
			device_start(&o, &other, 16);
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, POSTED), 0);
			CHECK_EQ(set_region(&vm, MMIO + 16, 16, 1, other.kvm_read, other.kvm_write, 0), 0);
			code_init(&code[0], 0);
			mmio_read(&code[0], MMIO, 4);
			mmio_read(&code[0], MMIO + 16, 4);
			mmio_write(&code[0], MMIO, 4, 1);
			mmio_read(&code[0], MMIO, 1);
			mmio_read(&code[0], MMIO, 8);
			mmio_read(&code[0], MMIO + 16, 4);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			runner_start(&r, &vm, 0);
			MUST(read(w.dev_read, &cmd, sizeof(cmd)) == sizeof(cmd));
			wire_close_dev(&w);
			CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 0xffffffff);
			CHECK_EQ(vm_log(&vm, 0, 1), 0);
			CHECK_EQ(vm_log(&vm, 0, 2), 0xff);
			CHECK_EQ(vm_log(&vm, 0, 3), ~0ull);
			CHECK_EQ(vm_log(&vm, 0, 4), 1);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 4);
			CHECK_EQ(o.nr, 2);
			/* The VMM can tell, and the files are of no use any more. */
			struct pollfd p = { .fd = w.kvm_read, .events = POLLIN | POLLRDHUP };

			CHECK_EQ(poll(&p, 1, 0), 1);
			CHECK(p.revents & (POLLHUP | POLLRDHUP));
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), -EBADF);
			wire_close_kvm(&w);
			/* A new device revives the region. */
			struct device n = { };

			wire_open(&vm, &w, t);
			device_start(&n, &w, 16);
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, POSTED), 0);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 0);
			CHECK_EQ(vm_log(&vm, 0, 2), 2);
			CHECK_EQ(n.nr, 4);
			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&n);
			wire_close_dev(&w);
			wire_close_kvm(&other);
			device_join(&o);
			wire_close_dev(&other);
			if (failures)
				printf("  with %s\n", transport_names[t]);
		}
	}
	signal(SIGPIPE, SIG_IGN);
}

/* A write that finds nobody at the other end must not send SIGPIPE. */
void test_sigpipe(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		sigset_t pending;

		signal(SIGPIPE, SIG_DFL);
		vm_open(&vm);
		wire_open(&vm, &w, t);
		CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, POSTED), 0);
		wire_close_dev(&w);
		code_init(&code[0], 0);
		mmio_write(&code[0], MMIO, 4, 1);
		mmio_read(&code[0], MMIO, 4);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
		CHECK_EQ(vm_log(&vm, 0, 0), 0xffffffff);
		sigpending(&pending);
		CHECK(!sigismember(&pending, SIGPIPE));
		pthread_sigmask(SIG_SETMASK, NULL, &pending);
		CHECK(!sigismember(&pending, SIGPIPE));
		vm_close(&vm);
		wire_close_kvm(&w);
	}
	signal(SIGPIPE, SIG_IGN);
}

/* Responses of the wrong length, and more than one */
void test_hostile(void)
{
	static const struct { enum transport t; int len; uint64_t first; } cases[] = {
		{ SEQPACKET, 8, 0xffffffff }, { SEQPACKET, 100, 0xffffffff },
		{ SEQPACKET, 0, 0xffffffff }, { SEQPACKET, 31, 0xffffffff },
		{ STREAM, 64, 0x01010101 }, { PIPES, 64, 0x01010101 },
		{ STREAM, 8, 0xffffffff }, { PIPES, 8, 0xffffffff },
	};

	for (unsigned int i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct vm vm;
		struct wire w;
		struct runner r;
		struct ioregionfd_cmd cmd;
		char junk[100];

		memset(junk, 1, sizeof(junk));
		vm_open(&vm);
		wire_open(&vm, &w, cases[i].t);
		CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
		code_init(&code[0], 0);
		mmio_read(&code[0], MMIO, 4);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		runner_start(&r, &vm, 0);
		MUST(read(w.dev_read, &cmd, sizeof(cmd)) == sizeof(cmd));
		MUST((cases[i].t == PIPES ? write(w.dev_write, junk, cases[i].len) :
		      send(w.dev_write, junk, cases[i].len, 0)) == cases[i].len);
		if (cases[i].t != SEQPACKET && cases[i].len < 32) {
			/* The rest might come. */
			CHECK(!runner_done_within(&r, 5));
			wire_close_dev(&w);
		}
		CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
		CHECK_EQ(vm_log(&vm, 0, 0), cases[i].first);
		if (cases[i].t == SEQPACKET)
			CHECK_EQ(set_region(&vm, 0, 16, 1, w.kvm_read, w.kvm_write, 0), -EBADF);
		vm_close(&vm);
		wire_close_kvm(&w);
		if (cases[i].t == SEQPACKET || cases[i].len >= 32)
			wire_close_dev(&w);
		if (failures)
			printf("  case %u\n", i);
	}
}

/* One vCPU is stopped in the middle; the other one fetches its response. */
void test_two_vcpus(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int both = 0; both < 2; both++) {
			struct vm vm;
			struct wire w;
			volatile int gate = 0;
			struct device d = { .gate = &gate, .answer = answer_bytes };
			struct runner r[2];

			vm_open(&vm);
			wire_open(&vm, &w, t);
			device_start(&d, &w, 16);
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
			/* The same files on the other bus: one channel */
			CHECK_EQ(set_region(&vm, 0x300, 16, 1, w.kvm_read, w.kvm_write, PIO), 0);
			for (int i = 0; i < 2; i++)
				code_init(&code[i], i);
			mmio_read(&code[0], MMIO + 4, 1);
			for (int i = 0; i < 3; i++)
				pio_read(&code[1], 0x308 + i, 1);
			for (int i = 0; i < 2; i++) {
				halt(&code[i]);
				vm_load(&vm, &code[i]);
			}
			runner_start(&r[0], &vm, 0);
			WAIT_FOR(d.nr == 1);
			if (both) {
				runner_start(&r[1], &vm, 1);
				CHECK(!runner_done_within(&r[1], 5));
			}
			runner_signal(&r[0]);
			CHECK_EQ(runner_join(&r[0]), -EINTR);
			if (!both)
				runner_start(&r[1], &vm, 1);
			CHECK(!runner_done_within(&r[1], 5));
			CHECK_EQ(d.nr, 1);
			/* The second can be interrupted as well */
			runner_signal(&r[1]);
			CHECK_EQ(runner_join(&r[1]), -EINTR);
			runner_start(&r[1], &vm, 1);
			gate = 1;
			CHECK_EQ(runner_join(&r[1]), KVM_EXIT_HLT);
			for (int i = 0; i < 3; i++)
				CHECK_EQ(vm_log(&vm, 1, i), 9 + i);
			CHECK_EQ(d.nr, 4);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 5);
			CHECK_EQ(d.nr, 4);
			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&d);
			wire_close_dev(&w);
			if (failures)
				printf("  with %s, both %d\n", transport_names[t], both);
		}
	}
}

/* A VM that goes away with accesses pending on a channel that two VMs share */
void test_abandoned_vm(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		volatile int gate = 0;
		struct device d = { .gate = &gate };

		interrupted_read(&vm, &w, &d, t);
		vm_close(&vm);
		wire_close_kvm(&w);
		gate = 1;
		device_join(&d);
		wire_close_dev(&w);
	}
}
