// SPDX-License-Identifier: GPL-2.0-only
/* BPF programs that look at accesses first */
#include <linux/bpf.h>

#include "tests.h"

#define POSTED KVM_IOREGION_POSTED_WRITES
#define PIO KVM_IOREGION_PIO
#define MAX_EVENTFDS 4096

enum { PASS, CONSUME, SIGNAL, ANSWER };

static struct code code[2];
static char log_buf[65536];

static long bpf(int cmd, union bpf_attr *attr)
{
	return syscall(SYS_bpf, cmd, attr, sizeof(*attr));
}

#define INSN(c, d, s, o, i) \
	((struct bpf_insn) { .code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i) })
#define MOV_IMM(d, i)		INSN(BPF_ALU64 | BPF_MOV | BPF_K, d, 0, 0, i)
#define MOV_REG(d, s)		INSN(BPF_ALU64 | BPF_MOV | BPF_X, d, s, 0, 0)
#define ADD_IMM(d, i)		INSN(BPF_ALU64 | BPF_ADD | BPF_K, d, 0, 0, i)
#define LOAD(d, s, o)		INSN(BPF_LDX | BPF_MEM | BPF_DW, d, s, o, 0)
#define STORE(d, s, o)		INSN(BPF_STX | BPF_MEM | BPF_DW, d, s, o, 0)
#define STORE_W_IMM(d, o, i)	INSN(BPF_ST | BPF_MEM | BPF_W, d, 0, o, i)
#define JNE_IMM(d, i, o)	INSN(BPF_JMP | BPF_JNE | BPF_K, d, 0, o, i)
#define CALL(f)			INSN(BPF_JMP | BPF_CALL, 0, 0, 0, f)
#define EXIT()			INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
#define LOAD_MAP(d, fd)		INSN(BPF_LD | BPF_DW | BPF_IMM, d, BPF_PSEUDO_MAP_FD, 0, fd), \
				INSN(0, 0, 0, 0, 0)

static int load(int type, const struct bpf_insn *insns, unsigned int nr)
{
	union bpf_attr attr = {
		.prog_type = type, .insns = (uintptr_t)insns, .insn_cnt = nr,
		.license = (uintptr_t)"GPL", .log_buf = (uintptr_t)log_buf,
		.log_size = sizeof(log_buf), .log_level = 1,
	};
	int fd = bpf(BPF_PROG_LOAD, &attr);

	if (fd < 0)
		printf("%s\n", log_buf);
	MUST(fd >= 0);
	return fd;
}

static int new_map(int type, unsigned int value_size, unsigned int entries, unsigned int flags)
{
	union bpf_attr attr = {
		.map_type = type, .key_size = 4, .value_size = value_size,
		.max_entries = entries, .map_flags = flags,
	};
	int fd = bpf(BPF_MAP_CREATE, &attr);

	MUST(fd >= 0);
	return fd;
}

static volatile uint64_t *map_memory(int fd)
{
	void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	MUST(p != MAP_FAILED);
	return p;
}

int constant_prog(int32_t verdict)
{
	struct bpf_insn insns[] = { MOV_IMM(BPF_REG_0, verdict), EXIT() };

	return load(BPF_PROG_TYPE_RAW_TRACEPOINT, insns, 2);
}

struct by_offset { int offset; int32_t verdict; };

int register_map(void)
{
	return new_map(BPF_MAP_TYPE_ARRAY, 8, 4, BPF_F_MMAPABLE);
}

/* A verdict for each offset, PASS elsewhere */
static int table(const struct by_offset *v, unsigned int nr)
{
	struct bpf_insn insns[64];
	unsigned int n = 0;

	insns[n++] = LOAD(BPF_REG_2, BPF_REG_1, 16);
	for (unsigned int i = 0; i < nr; i++) {
		insns[n++] = JNE_IMM(BPF_REG_2, v[i].offset, 2);
		insns[n++] = MOV_IMM(BPF_REG_0, v[i].verdict);
		insns[n++] = EXIT();
	}
	insns[n++] = MOV_IMM(BPF_REG_0, PASS);
	insns[n++] = EXIT();
	return load(BPF_PROG_TYPE_RAW_TRACEPOINT, insns, n);
}

/*
 * Stores its twelve arguments, how often it ran, and the cookie that it has
 * not, in an array's only element.
 */
static int recorder(int map)
{
	struct bpf_insn insns[64] = {
		MOV_REG(BPF_REG_6, BPF_REG_1),
		STORE_W_IMM(BPF_REG_10, -4, 0),
		MOV_REG(BPF_REG_2, BPF_REG_10),
		ADD_IMM(BPF_REG_2, -4),
		LOAD_MAP(BPF_REG_1, map),
		CALL(BPF_FUNC_map_lookup_elem),
		JNE_IMM(BPF_REG_0, 0, 2),
		MOV_IMM(BPF_REG_0, PASS),
		EXIT(),
	};
	unsigned int n = 10;

	for (int i = 0; i < 12; i++) {
		insns[n++] = LOAD(BPF_REG_1, BPF_REG_6, 8 * i);
		insns[n++] = STORE(BPF_REG_0, BPF_REG_1, 8 * i);
	}
	insns[n++] = LOAD(BPF_REG_1, BPF_REG_0, 96);
	insns[n++] = ADD_IMM(BPF_REG_1, 1);
	insns[n++] = STORE(BPF_REG_0, BPF_REG_1, 96);
	/* What tracepoint programs may ask for */
	insns[n++] = MOV_REG(BPF_REG_7, BPF_REG_0);
	insns[n++] = MOV_REG(BPF_REG_1, BPF_REG_6);
	insns[n++] = CALL(BPF_FUNC_get_attach_cookie);
	insns[n++] = STORE(BPF_REG_7, BPF_REG_0, 104);
	insns[n++] = MOV_IMM(BPF_REG_0, PASS);
	insns[n++] = EXIT();
	return load(BPF_PROG_TYPE_RAW_TRACEPOINT, insns, n);
}

static int set_prog(struct vm *vm, uint64_t addr, uint64_t size, uint32_t flags, int prog, int regs,
		    const int *eventfds, unsigned int nr)
{
	struct kvm_ioregion_prog p = {
		.guest_paddr = addr, .memory_size = size, .eventfds = (uintptr_t)eventfds,
		.flags = flags, .prog_fd = prog, .regs_fd = regs, .nr_eventfds = nr,
	};

	return ioctl(vm->fd, KVM_SET_IOREGION_PROG, &p) ? -errno : 0;
}

static uint64_t count_of(int eventfd)
{
	uint64_t n;

	return read(eventfd, &n, 8) == 8 ? n : 0;
}

void test_prog_errnos(void)
{
	struct vm vm;
	struct wire w;
	struct bpf_insn ret[] = { MOV_IMM(BPF_REG_0, 0), EXIT() };
	int good = constant_prog(PASS), other = load(BPF_PROG_TYPE_SOCKET_FILTER, ret, 2);
	int regs = register_map();
	int e[MAX_EVENTFDS], null = open("/dev/null", O_RDWR), bad[2];

	for (int i = 0; i < MAX_EVENTFDS; i++)
		e[i] = 0;
	e[0] = eventfd(0, EFD_NONBLOCK);
	for (int i = 1; i < MAX_EVENTFDS; i++)
		e[i] = e[0];
	vm_open(&vm);
	wire_open(&vm, &w, STREAM);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
	CHECK_EQ(set_region(&vm, 0x300, 16, 1, w.kvm_read, w.kvm_write, PIO), 0);

	CHECK_EQ(ioctl(vm.fd, KVM_SET_IOREGION_PROG, (void *)8), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(set_prog(&vm, MMIO, 16, POSTED, good, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, KVM_IOREGION_DEASSIGN, good, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, ~0u, good, -1, NULL, 0), -EINVAL);
	for (unsigned int i = 0; i < 24; i++) {
		struct kvm_ioregion_prog p = { .guest_paddr = MMIO, .memory_size = 16,
					       .prog_fd = good, .regs_fd = -1 };

		p.pad[i] = 1;
		CHECK_EQ(ioctl(vm.fd, KVM_SET_IOREGION_PROG, &p), -1);
		CHECK_EQ(errno, EINVAL);
	}
	CHECK_EQ(set_prog(&vm, MMIO, 0, 0, good, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, ~0ull, 2, 0, good, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, 0xffff, 2, PIO, good, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 8, 0, good, -1, NULL, 0), -ENOENT);
	CHECK_EQ(set_prog(&vm, MMIO + 1, 15, 0, good, -1, NULL, 0), -ENOENT);
	CHECK_EQ(set_prog(&vm, 0x300, 16, 0, good, -1, NULL, 0), -ENOENT);
	CHECK_EQ(set_prog(&vm, 0x100, 16, PIO, good, -1, NULL, 0), -ENOENT);
	CHECK_EQ(set_prog(&vm, MMIO, 8, 0, -1, -1, NULL, 0), -ENOENT);
	/* Programs */
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, other, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, regs, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, null, -1, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, 9999, -1, NULL, 0), -EBADF);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, -2, -1, NULL, 0), -EBADF);
	/* Register files */
	static const struct { int type, size, flags; } maps[] = {
		{ BPF_MAP_TYPE_ARRAY, 8, 0 }, { BPF_MAP_TYPE_ARRAY, 4, BPF_F_MMAPABLE },
		{ BPF_MAP_TYPE_ARRAY, 16, BPF_F_MMAPABLE }, { BPF_MAP_TYPE_HASH, 8, 0 },
		{ BPF_MAP_TYPE_PERCPU_ARRAY, 8, 0 },
	};

	for (unsigned int i = 0; i < sizeof(maps) / sizeof(maps[0]); i++) {
		int m = new_map(maps[i].type, maps[i].size, 4, maps[i].flags);

		CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, m, NULL, 0), -EINVAL);
		close(m);
	}
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, good, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, 9999, NULL, 0), -EBADF);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -2, NULL, 0), -EBADF);
	/* Eventfds */
	bad[0] = e[0];
	bad[1] = null;
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -1, bad, 2), -EINVAL);
	bad[1] = -1;
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -1, bad, 2), -EBADF);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -1, (void *)8, 1), -EFAULT);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -1, e, MAX_EVENTFDS + 1), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, -1, e, ~0u), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, good, regs, e, MAX_EVENTFDS), 0);
	/* Nothing comes with a program that is none. */
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, -1, regs, NULL, 0), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, -1, -1, e, 1), -EINVAL);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, -1, -1, NULL, 0), 0);
	CHECK_EQ(set_prog(&vm, MMIO, 16, 0, -1, -1, NULL, 0), 0);
	CHECK_EQ(set_prog(&vm, 0x300, 16, PIO, good, -1, NULL, 0), 0);
	vm_close(&vm);
	wire_close_kvm(&w);
	wire_close_dev(&w);
	close(e[0]);
	close(good);
	close(other);
	close(regs);
	close(null);
}

/* Each verdict, those that make no sense, and where they apply */
void test_prog_verdicts(void)
{
	static const struct by_offset verdicts[] = {
		{ 0, SIGNAL | 1 << 8 }, { 4, CONSUME }, { 8, ANSWER | 3 << 8 },
		{ 16, SIGNAL | 2 << 8 }, { 20, ANSWER | 4 << 8 }, { 24, ANSWER | 0xffffffu << 8 },
		{ 28, 4 }, { 32, 0xff }, { 36, PASS | 1 << 8 }, { 40, CONSUME | 1 << 8 },
		{ 44, SIGNAL | 0xffffffu << 8 },
	};

	for (int t = 0; t < nr_transports; t++) {
		for (int pio = 0; pio < 2; pio++) {
			struct vm vm;
			struct wire w;
			struct device d = { };
			int prog = table(verdicts, sizeof(verdicts) / sizeof(verdicts[0]));
			int regs = register_map();
			volatile uint64_t *reg = map_memory(regs);
			int e[2] = { eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK) };
			uint64_t base = pio ? 0x300 : MMIO, bad = 0;
			unsigned int reads = 0, n;

			vm_open(&vm);
			wire_open(&vm, &w, t);
			device_start(&d, &w, 64);
			CHECK_EQ(set_region(&vm, base, 64, 1, w.kvm_read, w.kvm_write, pio ? PIO : 0), 0);
			CHECK_EQ(set_prog(&vm, base, 64, pio ? PIO : 0, prog, regs, e, 2), 0);
			/* The region holds what it needs. */
			close(prog);
			close(regs);
			int e1 = dup(e[1]);

			close(e[1]);
			e[1] = e1;
			reg[3] = 0x8877665544332211;
			code_init(&code[0], 0);
#define W(off) (pio ? pio_write(&code[0], base + (off), 4, 0xabc) : \
		      mmio_write(&code[0], base + (off), 4, 0xabc))
#define R(off, size) (reads++, pio ? pio_read(&code[0], base + (off), size) : \
		      mmio_read(&code[0], base + (off), size))
			W(0);
			W(0);
			W(4);
			R(8, 4);
			R(8, 1);
			R(8, 2);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, 0);
			CHECK_EQ(count_of(e[1]), 2);
			CHECK_EQ(count_of(e[0]), 0);
			CHECK_EQ(vm_log(&vm, 0, 0), 0x44332211);
			CHECK_EQ(vm_log(&vm, 0, 1), 0x11);
			CHECK_EQ(vm_log(&vm, 0, 2), 0x2211);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_fast"), 6);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_accesses"), 0);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_bad_verdicts"), 0);

			/* Bad ones: the device gets the access, and they are counted. */
			reads = 0;
			code_init(&code[0], 0);
			W(12); n = 1;		/* no verdict for it: good */
			R(12, 4); n++;
			R(0, 4); n++; bad++;	/* SIGNAL of a read */
			R(4, 4); n++; bad++;	/* CONSUME of a read */
			W(8); n++; bad++;	/* ANSWER of a write */
			W(16); n++; bad++;	/* no such eventfd */
			R(20, 4); n++; bad++;	/* no such register */
			R(24, 4); n++; bad++;
			W(28); n++; bad++;	/* no such action */
			R(32, 4); n++; bad++;
			W(36); n++; bad++;	/* arguments where there are none */
			W(40); n++; bad++;
			W(44); n++; bad++;
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, n);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_bad_verdicts"), bad);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_accesses"), n);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 0);
			for (unsigned int i = 0; i < reads; i++)
				CHECK(vm_log(&vm, 0, i) < n);

			/* No registers, no eventfds: nothing to answer or to signal with */
			prog = table(verdicts, sizeof(verdicts) / sizeof(verdicts[0]));
			CHECK_EQ(set_prog(&vm, base, 64, pio ? PIO : 0, prog, -1, NULL, 0), 0);
			close(prog);
			code_init(&code[0], 0);
			W(0); n++; bad++;
			R(8, 4); n++; bad++;
			W(4);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, n);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_bad_verdicts"), bad);

			/* It stays when the region is modified, and goes when it goes. */
			CHECK_EQ(set_region(&vm, base, 64, 2, w.kvm_read, w.kvm_write,
					    (pio ? PIO : 0) | POSTED), 0);
			code_init(&code[0], 0);
			W(4);
			halt(&code[0]);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, n);
			CHECK_EQ(del_region(&vm, base, 64, pio ? PIO : 0), 0);
			CHECK_EQ(set_region(&vm, base, 64, 2, w.kvm_read, w.kvm_write, pio ? PIO : 0), 0);
			vm_load(&vm, &code[0]);
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(d.nr, ++n);

			vm_close(&vm);
			wire_close_kvm(&w);
			device_join(&d);
			wire_close_dev(&w);
			munmap((void *)reg, 4096);
			close(e[0]);
			close(e[1]);
			if (failures)
				printf("  with %s, pio %d\n", transport_names[t], pio);
		}
	}
}

/* What a program is told, and that it is told once */
void test_prog_args(void)
{
	struct vm vm;
	struct wire w;
	struct device d = { };
	int map = new_map(BPF_MAP_TYPE_ARRAY, 112, 1, BPF_F_MMAPABLE);
	volatile uint64_t *a = map_memory(map);
	int prog = recorder(map);

	a[13] = 1;
	vm_open(&vm);
	wire_open(&vm, &w, PIPES);
	device_start(&d, &w, 64);
	CHECK_EQ(set_region(&vm, MMIO, 0x2000, 0x1122334455667788, w.kvm_read, w.kvm_write, 0), 0);
	CHECK_EQ(set_region(&vm, 0x300, 16, 5, w.kvm_read, w.kvm_write, PIO), 0);
	CHECK_EQ(set_prog(&vm, MMIO, 0x2000, 0, prog, -1, NULL, 0), 0);
	CHECK_EQ(set_prog(&vm, 0x300, 16, PIO, prog, -1, NULL, 0), 0);
#define RUN() do { \
	halt(&code[1]); \
	vm_load(&vm, &code[1]); \
	CHECK_EQ(vm_run(&vm, 1), KVM_EXIT_HLT); \
	code_init(&code[1], 1); \
} while (0)
#define EXPECT(user, off, info, data, addr, runs) do { \
	CHECK_EQ(a[0], 1); \
	CHECK_EQ(a[1], user); \
	CHECK_EQ(a[2], off); \
	CHECK_EQ(a[3], info); \
	CHECK_EQ(a[4], data); \
	CHECK_EQ(a[5], addr); \
	for (int i_ = 6; i_ < 12; i_++) \
		CHECK_EQ(a[i_], 0); \
	CHECK_EQ(a[12], runs); \
	CHECK_EQ(a[13], 0); \
	a[12] = 0; \
} while (0)
	code_init(&code[1], 1);
	mmio_write(&code[1], MMIO + 0x18, 8, 0x8899aabbccddeeff);
	RUN();
	EXPECT(0x1122334455667788, 0x18, 8 | 1 << 8, 0x8899aabbccddeeff, MMIO + 0x18, 1);
	mmio_read(&code[1], MMIO + 0x1c, 2);
	RUN();
	EXPECT(0x1122334455667788, 0x1c, 2, 0, MMIO + 0x1c, 1);
	pio_write(&code[1], 0x304, 1, 0xee);
	RUN();
	EXPECT(5, 4, 1 | 1 << 8 | 1 << 9, 0xee, 0x304, 1);
	pio_read(&code[1], 0x308, 4);
	RUN();
	EXPECT(5, 8, 4 | 1 << 9, 0, 0x308, 1);
	/* Over the page: 2 + 2, and 2 + 1 + 1 */
	mmio_write(&code[1], MMIO + 0xffe, 4, 0x44332211);
	RUN();
	EXPECT(0x1122334455667788, 0x1000, 2 | 1 << 8, 0x4433, MMIO + 0x1000, 2);
	mmio_read(&code[1], MMIO + 0xffd, 4);
	RUN();
	EXPECT(0x1122334455667788, 0x1000, 1, 0, MMIO + 0x1000, 3);
	/* Strings: each element */
	pio_ins(&code[1], 0x300, 2, 0x310000, 5);
	RUN();
	EXPECT(5, 0, 2 | 1 << 9, 0, 0x300, 5);
	memset(vm.ram + 0x300000, 0x77, 16);
	pio_outs(&code[1], 0x302, 1, 0x300000, 6);
	RUN();
	EXPECT(5, 2, 1 | 1 << 8 | 1 << 9, 0x77, 0x302, 6);
	CHECK_EQ(d.nr, 4 + 2 + 3 + 5 + 6);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
	munmap((void *)a, 4096);
	close(map);
	close(prog);
}

/* Strings and second halves are settled by verdicts, too. */
void test_prog_slow(void)
{
	static const struct by_offset verdicts[] = {
		{ 0, ANSWER | 0 << 8 }, { 2, SIGNAL | 0 << 8 }, { 0xffe, CONSUME },
		{ 0x1000, SIGNAL | 0 << 8 },
	};
	struct vm vm;
	struct wire w;
	struct device d = { };
	int prog = table(verdicts, 4), regs = new_map(BPF_MAP_TYPE_ARRAY, 8, 1, BPF_F_MMAPABLE);
	volatile uint64_t *reg = map_memory(regs);
	int e = eventfd(0, EFD_NONBLOCK);

	reg[0] = 0x5566;
	vm_open(&vm);
	wire_open(&vm, &w, PIPES);
	device_start(&d, &w, 64);
	CHECK_EQ(set_region(&vm, MMIO, 0x2000, 1, w.kvm_read, w.kvm_write, 0), 0);
	CHECK_EQ(set_region(&vm, 0x300, 16, 5, w.kvm_read, w.kvm_write, PIO), 0);
	CHECK_EQ(set_prog(&vm, MMIO, 0x2000, 0, prog, regs, &e, 1), 0);
	CHECK_EQ(set_prog(&vm, 0x300, 16, PIO, prog, regs, &e, 1), 0);
	code_init(&code[0], 0);
	pio_ins(&code[0], 0x300, 2, 0x310000, 5);
	pio_outs(&code[0], 0x302, 1, 0x300000, 6);
	mmio_write(&code[0], MMIO + 0xffe, 4, 1);	/* CONSUME, SIGNAL */
	mmio_write(&code[0], MMIO + 0xfff, 2, 1);	/* PASS, SIGNAL */
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	for (int i = 0; i < 5; i++)
		CHECK_EQ(vm.ram[0x310000 + 2 * i] | vm.ram[0x310001 + 2 * i] << 8, 0x5566);
	CHECK_EQ(count_of(e), 6 + 1 + 1);
	CHECK_EQ(d.nr, 1);
	CHECK_EQ(d.told[0].cmd.offset, 0xfff);
	CHECK_EQ(vm_stat(&vm, 0, "ioregion_bad_verdicts"), 0);
	vm_close(&vm);
	wire_close_kvm(&w);
	device_join(&d);
	wire_close_dev(&w);
	munmap((void *)reg, 4096);
	close(regs);
	close(prog);
	close(e);
}

static void *to_halt(void *arg)
{
	struct runner *r = arg;

	r->exit = vm_run(r->vm, r->vcpu);
	__atomic_store_n(&r->done, true, __ATOMIC_SEQ_CST);
	return NULL;
}

/* Programs come and go under load: each write goes to one of the two. */
void test_prog_load(void)
{
	const unsigned int rounds = scaled(4000);
	struct vm vm;
	struct wire w;
	struct device d = { };
	struct runner r[2] = { };
	int e = eventfd(0, EFD_NONBLOCK), prog[2] = { constant_prog(SIGNAL), constant_prog(CONSUME | 1 << 8) };
	unsigned int changes = 0;

	vm_open(&vm);
	wire_open(&vm, &w, MAILBOX);
	device_start(&d, &w, 2 * rounds + 1);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, POSTED), 0);
	for (int i = 0; i < 2; i++) {
		code_init(&code[i], i);
		mmio_write_loop(&code[i], MMIO + 4 * i, rounds);
		halt(&code[i]);
		vm_load(&vm, &code[i]);
		r[i].vm = &vm;
		r[i].vcpu = i;
		MUST(!pthread_create(&r[i].thread, NULL, to_halt, &r[i]));
	}
	while (!r[0].done || !r[1].done) {
		CHECK_EQ(set_prog(&vm, MMIO, 16, 0, changes % 3 == 2 ? -1 : prog[changes % 3], -1, &e,
				  changes % 3 == 2 ? 0 : 1), 0);
		if (++changes % 4 == 0)
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, POSTED), 0);
		sleep_ms(1);
	}
	for (int i = 0; i < 2; i++)
		CHECK_EQ(runner_join(&r[i]), KVM_EXIT_HLT);
	uint64_t signals = count_of(e);

	vm_close(&vm);
	wire_close_kvm(&w);
	MUST(!pthread_join(d.thread, NULL));
	CHECK_EQ(d.nr + signals, 2 * rounds);
	CHECK(d.nr && signals);
	CHECK(changes > 6);
	free(d.told);
	wire_close_dev(&w);
	close(e);
	close(prog[0]);
	close(prog[1]);
}
