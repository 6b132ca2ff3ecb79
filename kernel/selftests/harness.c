// SPDX-License-Identifier: GPL-2.0-only
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include "harness.h"

const char *current_test = "setup";
int failures;
int nr_transports = NR_TRANSPORTS;
const char *transport_names[] = { "stream", "seqpacket", "pipes", "fifos", "tcp", "mailbox" };

static void emit(struct code *c, const void *bytes, unsigned int len)
{
	MUST(c->len + len <= sizeof(c->bytes));
	memcpy(c->bytes + c->len, bytes, len);
	c->len += len;
}

static void emit8(struct code *c, uint8_t b)
{
	emit(c, &b, 1);
}

static void emit32(struct code *c, uint32_t v)
{
	emit(c, &v, 4);
}

static void log_eax(struct code *c)
{
	emit8(c, 0xa3);
	emit32(c, LOG_AT + c->vcpu * LOG_STRIDE + 8 * c->logs++);
}

void code_init(struct code *c, unsigned int vcpu)
{
	memset(c, 0, sizeof(*c));
	c->vcpu = vcpu;
}

void mmio_write(struct code *c, uint32_t addr, unsigned int size, uint64_t value)
{
	if (size == 8) {
		/* The constant goes behind a jump. */
		uint32_t at = CODE_AT + c->vcpu * CODE_STRIDE + c->len + 2;

		emit8(c, 0xeb);
		emit8(c, 8);
		emit(c, &value, 8);
		emit(c, "\x0f\x6f\x05", 3);	/* movq mm0, [at] */
		emit32(c, at);
		emit(c, "\x0f\x7f\x05", 3);	/* movq [addr], mm0 */
		emit32(c, addr);
		return;
	}
	if (size == 2)
		emit8(c, 0x66);
	emit8(c, size == 1 ? 0xc6 : 0xc7);
	emit8(c, 0x05);
	emit32(c, addr);
	emit(c, &value, size);
}

void mmio_read(struct code *c, uint32_t addr, unsigned int size)
{
	if (size == 8) {
		emit(c, "\x0f\x6f\x05", 3);
		emit32(c, addr);
		emit(c, "\x0f\x7f\x05", 3);
		emit32(c, LOG_AT + c->vcpu * LOG_STRIDE + 8 * c->logs++);
		return;
	}
	emit(c, "\x31\xc0", 2);		/* xor eax, eax */
	if (size == 2)
		emit8(c, 0x66);
	emit8(c, size == 1 ? 0xa0 : 0xa1);
	emit32(c, addr);
	log_eax(c);
}

void pio_write(struct code *c, uint16_t port, unsigned int size, uint32_t value)
{
	emit8(c, 0xba);			/* mov edx, port */
	emit32(c, port);
	emit8(c, 0xb8);			/* mov eax, value */
	emit32(c, value);
	if (size == 2)
		emit8(c, 0x66);
	emit8(c, size == 1 ? 0xee : 0xef);
}

void pio_read(struct code *c, uint16_t port, unsigned int size)
{
	emit8(c, 0xba);
	emit32(c, port);
	emit(c, "\x31\xc0", 2);
	if (size == 2)
		emit8(c, 0x66);
	emit8(c, size == 1 ? 0xec : 0xed);
	log_eax(c);
}

static void string(struct code *c, uint8_t op, uint16_t port, unsigned int size, uint8_t mov,
		   uint32_t mem, uint32_t count)
{
	emit8(c, 0xba);
	emit32(c, port);
	emit8(c, mov);
	emit32(c, mem);
	emit8(c, 0xb9);			/* mov ecx, count */
	emit32(c, count);
	emit8(c, 0xfc);			/* cld */
	emit8(c, 0xf3);
	if (size == 2)
		emit8(c, 0x66);
	emit8(c, op + (size != 1));
}

void pio_outs(struct code *c, uint16_t port, unsigned int size, uint32_t from, uint32_t count)
{
	string(c, 0x6e, port, size, 0xbe, from, count);
}

void pio_ins(struct code *c, uint16_t port, unsigned int size, uint32_t to, uint32_t count)
{
	string(c, 0x6c, port, size, 0xbf, to, count);
}

static void loop_end(struct code *c, unsigned int top)
{
	emit8(c, 0x49);			/* dec ecx */
	emit(c, "\x0f\x85", 2);		/* jnz top */
	emit32(c, top - (c->len + 4));
}

void mmio_write_loop(struct code *c, uint32_t addr, uint32_t count)
{
	unsigned int top;

	emit8(c, 0xb9);
	emit32(c, count);
	top = c->len;
	emit(c, "\x89\x0d", 2);		/* mov [addr], ecx */
	emit32(c, addr);
	loop_end(c, top);
}

void mmio_read_loop(struct code *c, uint32_t addr, uint32_t count)
{
	unsigned int top;

	emit8(c, 0xb9);
	emit32(c, count);
	top = c->len;
	emit8(c, 0xa1);			/* mov eax, [addr] */
	emit32(c, addr);
	loop_end(c, top);
}

void mmio_loop(struct code *c, uint32_t waddr, uint32_t raddr, uint32_t count)
{
	unsigned int top;

	emit8(c, 0xb9);
	emit32(c, count);
	emit(c, "\x31\xf6", 2);		/* xor esi, esi: mismatches */
	top = c->len;
	emit(c, "\x89\x0d", 2);
	emit32(c, waddr);
	emit8(c, 0xa1);			/* mov eax, [raddr] */
	emit32(c, raddr);
	emit(c, "\x39\xc8", 2);		/* cmp eax, ecx */
	emit(c, "\x74\x01", 2);		/* je +1 */
	emit8(c, 0x46);			/* inc esi */
	loop_end(c, top);
	emit(c, "\x89\xf0", 2);		/* mov eax, esi */
	log_eax(c);
}

void halt(struct code *c)
{
	emit8(c, 0xf4);
}

void vm_open(struct vm *vm)
{
	int i, size;

	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	MUST(vm->kvm >= 0);
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	MUST(vm->fd >= 0);
	vm->ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(vm->ram != MAP_FAILED);
	struct kvm_userspace_memory_region mem = {
		.memory_size = RAM_SIZE, .userspace_addr = (uintptr_t)vm->ram,
	};
	MUST(!ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &mem));
	size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	for (i = 0; i < NR_VCPUS; i++) {
		vm->vcpu[i] = ioctl(vm->fd, KVM_CREATE_VCPU, i);
		MUST(vm->vcpu[i] >= 0);
		vm->run[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu[i], 0);
		MUST(vm->run[i] != MAP_FAILED);
	}
}

void vm_close(struct vm *vm)
{
	int i, size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	for (i = 0; i < NR_VCPUS; i++) {
		munmap(vm->run[i], size);
		close(vm->vcpu[i]);
	}
	close(vm->fd);
	close(vm->kvm);
	munmap(vm->ram, RAM_SIZE);
}

void vm_load(struct vm *vm, const struct code *c)
{
	struct kvm_segment seg = {
		.limit = 0xffffffff, .type = 3, .present = 1, .s = 1, .g = 1, .db = 1, .selector = 16,
	};
	uint32_t at = CODE_AT + c->vcpu * CODE_STRIDE;
	struct kvm_regs regs = { .rip = at, .rflags = 2 };
	struct kvm_sregs sregs;

	memcpy(vm->ram + at, c->bytes, c->len);
	memset(vm->ram + LOG_AT + c->vcpu * LOG_STRIDE, 0x5a, LOG_STRIDE);
	for (unsigned int i = 0; i < c->logs; i++)
		memset(vm->ram + LOG_AT + c->vcpu * LOG_STRIDE + 8 * i, 0, 8);
	MUST(!ioctl(vm->vcpu[c->vcpu], KVM_GET_SREGS, &sregs));
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = seg;
	seg.type = 11;
	seg.selector = 8;
	sregs.cs = seg;
	sregs.cr0 = 0x11;
	MUST(!ioctl(vm->vcpu[c->vcpu], KVM_SET_SREGS, &sregs));
	MUST(!ioctl(vm->vcpu[c->vcpu], KVM_SET_REGS, &regs));
}

uint64_t vm_log(const struct vm *vm, unsigned int vcpu, unsigned int index)
{
	uint64_t v;

	memcpy(&v, vm->ram + LOG_AT + vcpu * LOG_STRIDE + 8 * index, 8);
	return v;
}

int vm_run(struct vm *vm, unsigned int vcpu)
{
	if (ioctl(vm->vcpu[vcpu], KVM_RUN, 0) < 0)
		return -errno;
	return vm->run[vcpu]->exit_reason;
}

uint64_t vm_stat(const struct vm *vm, unsigned int vcpu, const char *name)
{
	struct kvm_stats_header header;
	int fd = ioctl(vm->vcpu[vcpu], KVM_GET_STATS_FD, 0);
	uint64_t value = ~0ull;

	MUST(fd >= 0);
	MUST(pread(fd, &header, sizeof(header), 0) == sizeof(header));
	size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
	struct kvm_stats_desc *desc = malloc(size);

	for (uint32_t i = 0; i < header.num_desc; i++) {
		MUST(pread(fd, desc, size, header.desc_offset + i * size) == (ssize_t)size);
		if (!strcmp(desc->name, name))
			MUST(pread(fd, &value, 8, header.data_offset + desc->offset) == 8);
	}
	free(desc);
	close(fd);
	return value;
}

int set_region(struct vm *vm, uint64_t addr, uint64_t size, uint64_t user_data, int rfd, int wfd,
	       uint32_t flags)
{
	struct kvm_ioregion r = {
		.guest_paddr = addr, .memory_size = size, .user_data = user_data,
		.read_fd = rfd, .write_fd = wfd, .flags = flags,
	};

	return ioctl(vm->fd, KVM_SET_IOREGION, &r) ? -errno : 0;
}

int del_region(struct vm *vm, uint64_t addr, uint64_t size, uint32_t flags)
{
	return set_region(vm, addr, size, 0, -1, -1, flags | KVM_IOREGION_DEASSIGN);
}

/* A connection over the loopback interface, with buffers that fill up */
static void tcp_pair(int sv[2])
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001) };
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	socklen_t len = sizeof(addr);
	int listener = socket(AF_INET, SOCK_STREAM, 0), small = 4096, on = 1;

	MUST(listener >= 0 && !ioctl(listener, SIOCSIFFLAGS, &lo));
	MUST(!setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small)));
	MUST(!bind(listener, (struct sockaddr *)&addr, sizeof(addr)) && !listen(listener, 1));
	MUST(!getsockname(listener, (struct sockaddr *)&addr, &len));
	sv[0] = socket(AF_INET, SOCK_STREAM, 0);
	MUST(!setsockopt(sv[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)));
	MUST(!connect(sv[0], (struct sockaddr *)&addr, sizeof(addr)));
	sv[1] = accept(listener, NULL, NULL);
	MUST(sv[1] >= 0);
	/* A read behind a posted write would wait for an acknowledgement. */
	MUST(!setsockopt(sv[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	close(listener);
}

void wire_open(struct vm *vm, struct wire *w, enum transport t)
{
	int sv[2], a[2], b[2];

	w->transport = t;
	switch (t) {
	case STREAM:
	case SEQPACKET:
		MUST(!socketpair(AF_UNIX, t == STREAM ? SOCK_STREAM : SOCK_SEQPACKET, 0, sv));
		w->kvm_read = w->kvm_write = sv[0];
		w->dev_read = w->dev_write = sv[1];
		break;
	case TCP:
		tcp_pair(sv);
		w->kvm_read = w->kvm_write = sv[0];
		w->dev_read = w->dev_write = sv[1];
		break;
	case PIPES:
		MUST(!pipe(a) && !pipe(b));
		w->kvm_read = a[0];
		w->dev_write = a[1];
		w->dev_read = b[0];
		w->kvm_write = b[1];
		break;
	case FIFOS: {
		char name[2][64];

		for (int i = 0; i < 2; i++) {
			snprintf(name[i], sizeof(name[i]), "/tmp/ioregion-%d-%d", getpid(), i);
			unlink(name[i]);
			MUST(!mkfifo(name[i], 0600));
		}
		/* O_RDWR only so that nobody has to wait for the other end */
		int hold0 = open(name[0], O_RDWR), hold1 = open(name[1], O_RDWR);

		w->kvm_read = open(name[0], O_RDONLY);
		w->dev_write = open(name[0], O_WRONLY);
		w->dev_read = open(name[1], O_RDONLY);
		w->kvm_write = open(name[1], O_WRONLY);
		MUST(w->kvm_read >= 0 && w->kvm_write >= 0 && w->dev_read >= 0 && w->dev_write >= 0);
		close(hold0);
		close(hold1);
		break;
	}
	default: {
		int fds[2];

		MUST(!ioctl(vm->fd, KVM_CREATE_IOREGIONFD, fds));
		w->kvm_read = w->kvm_write = fds[0];
		w->dev_read = w->dev_write = fds[1];
	}
	}
}

void wire_close_kvm(struct wire *w)
{
	if (w->kvm_write != w->kvm_read)
		close(w->kvm_write);
	close(w->kvm_read);
}

void wire_close_dev(struct wire *w)
{
	if (w->dev_write != w->dev_read)
		close(w->dev_write);
	close(w->dev_read);
}

unsigned int cmd_op(const struct ioregionfd_cmd *cmd)
{
	return cmd->info & 15;
}

unsigned int cmd_size(const struct ioregionfd_cmd *cmd)
{
	return 1u << (cmd->info >> 4 & 3);
}

bool cmd_resp(const struct ioregionfd_cmd *cmd)
{
	return cmd->info >> 6 & 1;
}

static void *device_loop(void *arg)
{
	struct device *d = arg;

	for (;;) {
		struct ioregionfd_cmd cmd;
		struct ioregionfd_resp resp = { };
		unsigned int got = 0;

		while (got < sizeof(cmd)) {
			ssize_t n = read(d->wire->dev_read, (char *)&cmd + got, sizeof(cmd) - got);

			if (n == 0 || (n < 0 && errno != EINTR)) {
				d->error = n ? errno : 0;
				return NULL;
			}
			if (n > 0)
				got += n;
		}
		if (cmd.padding || cmd.info & ~0x7fu)
			FAIL("bad command %#x", cmd.info);
		if (d->nr < d->max)
			d->told[d->nr].cmd = cmd;
		__atomic_add_fetch(&d->nr, 1, __ATOMIC_SEQ_CST);
		if (!cmd_resp(&cmd))
			continue;
		while (d->gate && !__atomic_load_n(d->gate, __ATOMIC_SEQ_CST))
			sleep_ms(1);
		resp.data = d->answer ? d->answer(d, &cmd) : d->nr - 1;
		if (write(d->wire->dev_write, &resp, sizeof(resp)) != sizeof(resp)) {
			d->error = errno;
			return NULL;
		}
		__atomic_add_fetch(&d->answered, 1, __ATOMIC_SEQ_CST);
	}
}

void device_start(struct device *d, struct wire *w, unsigned int max)
{
	d->wire = w;
	d->max = max;
	d->told = calloc(max, sizeof(*d->told));
	MUST(d->told);
	MUST(!pthread_create(&d->thread, NULL, device_loop, d));
	d->running = true;
}

/* The device ends when KVM's end is closed */
void device_join(struct device *d)
{
	MUST(!pthread_join(d->thread, NULL));
	free(d->told);
	d->told = NULL;
	d->running = false;
}

static void *run_loop(void *arg)
{
	struct runner *r = arg;

	r->tid = syscall(SYS_gettid);
	r->exit = vm_run(r->vm, r->vcpu);
	__atomic_store_n(&r->done, true, __ATOMIC_SEQ_CST);
	return NULL;
}

void runner_start(struct runner *r, struct vm *vm, unsigned int vcpu)
{
	memset(r, 0, sizeof(*r));
	r->vm = vm;
	r->vcpu = vcpu;
	MUST(!pthread_create(&r->thread, NULL, run_loop, r));
}

int runner_join(struct runner *r)
{
	MUST(!pthread_join(r->thread, NULL));
	return r->exit;
}

/* Until it is noticed */
void runner_signal(struct runner *r)
{
	for (int i = 0; i < 60000 && !__atomic_load_n(&r->done, __ATOMIC_SEQ_CST); i++) {
		pthread_kill(r->thread, SIGUSR1);
		sleep_ms(1);
	}
	CHECK(r->done);
}

bool runner_done_within(struct runner *r, unsigned int ms)
{
	for (unsigned int i = 0; i < ms && !__atomic_load_n(&r->done, __ATOMIC_SEQ_CST); i++)
		sleep_ms(1);
	return __atomic_load_n(&r->done, __ATOMIC_SEQ_CST);
}

void sleep_ms(unsigned int ms)
{
	struct timespec t = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000l };

	nanosleep(&t, NULL);
}

unsigned int scaled(unsigned int n)
{
	const char *div = getenv("ROUNDS_DIV");

	if (div && atoi(div) > 0)
		return n / atoi(div);
	/* The locks are being checked, and more than that. */
	return access("/proc/lockdep", F_OK) ? n : n / 8;
}

/* Whether the vCPU's thread sleeps each time that it is looked at */
bool runner_is_asleep(const struct runner *r)
{
	char name[64], line[256];
	int looks = 20;

	snprintf(name, sizeof(name), "/proc/self/task/%d/stat", r->tid);
	while (looks--) {
		FILE *stat = fopen(name, "r");
		const char *state = stat && fgets(line, sizeof(line), stat) ? strrchr(line, ')') : NULL;
		bool asleep = state && state[1] && state[2] == 'S';

		if (stat)
			fclose(stat);
		if (!asleep)
			return false;
		sleep_ms(20);
	}
	return true;
}
