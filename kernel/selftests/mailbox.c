// SPDX-License-Identifier: GPL-2.0-only
/* The file that is made for the purpose, its page, and posted writes without an exit */
#include <linux/io_uring.h>
#include <sys/epoll.h>

#include "tests.h"

#define POSTED KVM_IOREGION_POSTED_WRITES
#define PIO KVM_IOREGION_PIO

static struct code code[2];
static void *volatile nowhere = (void *)8;

static struct ioregionfd_mailbox *map_box(int fd)
{
	void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	MUST(p != MAP_FAILED);
	return p;
}

static int try_read(int fd, void *buf, size_t len)
{
	int n = read(fd, buf, len);

	return n < 0 ? -errno : n;
}

static int try_write(int fd, const void *buf, size_t len)
{
	int n = write(fd, buf, len);

	return n < 0 ? -errno : n;
}

static int revents(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };

	MUST(poll(&p, 1, 0) >= 0);
	return p.revents;
}

static void nonblocking(int fd, bool on)
{
	MUST(!fcntl(fd, F_SETFL, O_RDWR | (on ? O_NONBLOCK : 0)));
}

/* System calls on both ends: what they refuse, and how they end */
void test_mailbox_file(void)
{
	struct vm vm;
	struct wire w, w2, s;
	struct ioregionfd_cmd cmd[3];
	struct ioregionfd_resp resp = { .data = 0x1234 };
	struct ioregionfd_mailbox *box;
	struct runner r;
	int fds[2];

	vm_open(&vm);
	CHECK_EQ(ioctl(vm.fd, KVM_CREATE_IOREGIONFD, (void *)8), -1);
	CHECK_EQ(errno, EFAULT);
	MUST(!ioctl(vm.fd, KVM_CREATE_IOREGIONFD, fds));
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(fcntl(fds[i], F_GETFD), FD_CLOEXEC);
		close(fds[i]);
	}
	wire_open(&vm, &w, MAILBOX);
	wire_open(&vm, &w2, MAILBOX);
	wire_open(&vm, &s, STREAM);
	int kvm = w.kvm_read, dev = w.dev_read;

	/* KVM's end belongs to itself; the other one is not for KVM. */
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, dev, dev, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, kvm, dev, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, dev, kvm, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, kvm, w2.kvm_read, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, kvm, s.kvm_write, 0), -EINVAL);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, s.kvm_read, kvm, 0), -EINVAL);
	CHECK_EQ(try_read(kvm, cmd, 32), -EINVAL);
	CHECK_EQ(try_write(kvm, &resp, 32), -EINVAL);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, kvm, 0) == MAP_FAILED);

	CHECK_EQ(try_read(dev, cmd, 31), -EINVAL);
	CHECK_EQ(try_write(dev, &resp, 31), -EINVAL);
	CHECK_EQ(try_write(dev, &resp, 32), -EPROTO);
	CHECK_EQ(try_write(dev, &resp, 0), 0);
	nonblocking(dev, true);
	CHECK_EQ(try_read(dev, cmd, 32), -EAGAIN);
	CHECK_EQ(revents(dev), POLLOUT);
	CHECK_EQ(revents(kvm), 0);

	CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, dev, 0) == MAP_FAILED);
	CHECK(mmap(NULL, 8192, PROT_READ, MAP_SHARED, dev, 0) == MAP_FAILED);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, dev, 4096) == MAP_FAILED);
	box = map_box(dev);
	CHECK_EQ(box->head, 0);
	CHECK_EQ(box->closed, 0);

	CHECK_EQ(set_region(&vm, MMIO, 16, 1, kvm, kvm, POSTED), 0);
	code_init(&code[0], 0);
	mmio_write(&code[0], MMIO, 4, 1);
	mmio_write(&code[0], MMIO, 4, 2);
	mmio_read(&code[0], MMIO + 4, 4);
	mmio_write(&code[0], MMIO, 4, 3);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	runner_start(&r, &vm, 0);
	WAIT_FOR(*(volatile __u64 *)&box->head == 3);
	CHECK_EQ(revents(dev), POLLIN | POLLOUT);
	/* A response to what has not been read yet */
	CHECK_EQ(try_write(dev, &resp, 32), -EPROTO);
	/* A read that fails loses nothing. */
	CHECK_EQ(try_read(dev, nowhere, 32), -EFAULT);
	/* Whole commands only, as many as fit */
	CHECK_EQ(try_read(dev, cmd, 70), 64);
	CHECK_EQ(cmd[0].data, 1);
	CHECK_EQ(cmd[1].data, 2);
	CHECK_EQ(try_write(dev, &resp, 32), -EPROTO);
	CHECK_EQ(try_read(dev, cmd, sizeof(cmd)), 32);
	CHECK_EQ(cmd[0].info, 0x60);
	CHECK(!runner_done_within(&r, 3));
	CHECK_EQ(try_write(dev, nowhere, 32), -EFAULT);
	CHECK_EQ(try_write(dev, &resp, 32), 32);
	CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
	CHECK_EQ(vm_log(&vm, 0, 0), 0x1234);
	CHECK_EQ(try_write(dev, &resp, 32), -EPROTO);

	/* The end of KVM's side: what has been posted is still there. */
	close(kvm);
	CHECK_EQ(revents(dev), POLLIN | POLLOUT);
	CHECK_EQ(del_region(&vm, MMIO, 16, 0), 0);
	CHECK_EQ(revents(dev), POLLIN | POLLOUT | POLLHUP);
	CHECK_EQ(*(volatile __u32 *)&box->closed, 1);
	CHECK_EQ(try_read(dev, cmd, sizeof(cmd)), 32);
	CHECK_EQ(cmd[0].data, 3);
	CHECK_EQ(try_read(dev, cmd, 32), 0);
	CHECK_EQ(try_write(dev, &resp, 32), -EPIPE);
	close(dev);
	/* The page outlives its descriptor. */
	CHECK_EQ(box->head, 4);
	munmap(box, 4096);

	/* The end of the device's side */
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, w2.kvm_read, w2.kvm_read, 0), 0);
	CHECK_EQ(revents(w2.kvm_read), 0);
	close(w2.dev_read);
	CHECK_EQ(revents(w2.kvm_read) & POLLHUP, POLLHUP);
	CHECK_EQ(set_region(&vm, MMIO + 32, 16, 1, w2.kvm_read, w2.kvm_read, 0), -EBADF);
	close(w2.kvm_read);
	wire_close_kvm(&s);
	wire_close_dev(&s);
	vm_close(&vm);
}

/* A device that lives in the page, and now and then makes system calls instead */
struct polled {
	struct wire *w;
	struct ioregionfd_mailbox *box;
	pthread_t thread;
	int mix;		/* of a thousand commands, those with a system call */
	unsigned int nr, disorder, reads;
	uint32_t due[2], value[2];
	volatile bool stop;
};

static uint64_t polled_handle(struct polled *p, const struct ioregionfd_cmd *cmd)
{
	unsigned int i = cmd->offset / 4 & 1;

	p->nr++;
	if (cmd_op(cmd) == 0) {
		p->reads++;
		return p->value[i];
	}
	if (p->due[i] != cmd->data)
		p->disorder++;
	p->due[i] = cmd->data - 1;
	p->value[i] = cmd->data;
	return 0;
}

static void polled_wake(struct polled *p)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&p->box->sleeping, __ATOMIC_RELAXED))
		MUST(write(p->w->dev_write, "", 0) == 0);
}

static void *polled_loop(void *arg)
{
	struct polled *p = arg;
	unsigned int seed = 1;
	uint64_t tail = 0;

	for (;;) {
		struct ioregionfd_resp resp = { };
		struct ioregionfd_cmd cmd;

		while (__atomic_load_n(&p->box->head, __ATOMIC_ACQUIRE) == tail) {
			if (__atomic_load_n(&p->box->closed, __ATOMIC_ACQUIRE))
				return NULL;
			sched_yield();
		}
		if (rand_r(&seed) % 1000 < p->mix) {
			MUST(read(p->w->dev_read, &cmd, 32) == 32);
		} else {
			cmd = p->box->cmds[tail % MAILBOX_CMDS];
			__atomic_store_n(&p->box->tail, tail + 1, __ATOMIC_RELEASE);
			polled_wake(p);
		}
		tail++;
		resp.data = polled_handle(p, &cmd);
		if (!cmd_resp(&cmd))
			continue;
		if (rand_r(&seed) % 1000 < p->mix) {
			MUST(write(p->w->dev_write, &resp, 32) == 32);
		} else {
			p->box->data = resp.data;
			__atomic_store_n(&p->box->answered, tail, __ATOMIC_RELEASE);
			polled_wake(p);
		}
	}
}

void test_mailbox_polled(void)
{
	static const int mixes[] = { 0, 500 };
	const unsigned int rounds = scaled(1500);

	for (unsigned int m = 0; m < 4; m++) {
		bool posted = m & 1;
		struct polled p = { .mix = mixes[m / 2] };
		struct vm vm;
		struct wire w;
		struct runner r[2];

		vm_open(&vm);
		wire_open(&vm, &w, MAILBOX);
		p.w = &w;
		p.box = map_box(w.dev_read);
		p.due[0] = p.due[1] = rounds;
		CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, posted ? POSTED : 0), 0);
		for (int i = 0; i < 2; i++) {
			code_init(&code[i], i);
			mmio_loop(&code[i], MMIO + 4 * i, MMIO + 4 * i, rounds);
			halt(&code[i]);
			vm_load(&vm, &code[i]);
		}
		MUST(!pthread_create(&p.thread, NULL, polled_loop, &p));
		for (int i = 0; i < 2; i++)
			runner_start(&r[i], &vm, i);
		for (int i = 0; i < 2; i++) {
			CHECK_EQ(runner_join(&r[i]), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, i, 0), 0);
			CHECK_EQ(vm_stat(&vm, i, "ioregion_lost"), 0);
			CHECK_EQ(vm_stat(&vm, i, "ioregion_fast") +
				 vm_stat(&vm, i, "ioregion_accesses"), 2 * rounds);
			/* Only posted writes are for the fast stage, and most of them get there. */
			if (posted)
				CHECK(vm_stat(&vm, i, "ioregion_fast") > rounds / 2 &&
				      vm_stat(&vm, i, "ioregion_fast") <= rounds);
			else
				CHECK_EQ(vm_stat(&vm, i, "ioregion_fast"), 0);
		}
		vm_close(&vm);
		wire_close_kvm(&w);
		MUST(!pthread_join(p.thread, NULL));
		CHECK_EQ(p.nr, 4 * rounds);
		CHECK_EQ(p.reads, 2 * rounds);
		CHECK_EQ(p.disorder, 0);
		munmap(p.box, 4096);
		wire_close_dev(&w);
		if (failures)
			printf("  posted %d, mix %d\n", posted, p.mix);
	}
}

/* Whatever stands in the page, only this channel suffers. */
void test_mailbox_hostile(void)
{
	for (int kind = 0; kind < 4; kind++) {
		struct vm vm;
		struct wire w, good;
		struct device g = { };
		struct ioregionfd_mailbox *box;
		struct ioregionfd_cmd cmd;
		struct ioregionfd_resp resp = { .data = 5 };
		struct runner r;

		vm_open(&vm);
		wire_open(&vm, &w, MAILBOX);
		wire_open(&vm, &good, MAILBOX);
		device_start(&g, &good, 16);
		box = map_box(w.dev_read);
		CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, kind & 1 ? POSTED : 0), 0);
		CHECK_EQ(set_region(&vm, MMIO + 16, 16, 1, good.kvm_read, good.kvm_write, 0), 0);
		code_init(&code[0], 0);
		mmio_write(&code[0], MMIO, 4, 1);
		mmio_read(&code[0], MMIO + 4, 4);
		mmio_read(&code[0], MMIO + 16, 4);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		if (kind < 2) {
			/* More was taken out than was ever put in. */
			box->tail = kind ? 1 : ~0ull >> 1;
			CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 0xffffffff);
			CHECK_EQ(revents(w.kvm_read) & POLLERR, POLLERR);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 2);
			CHECK_EQ(try_write(w.dev_read, &resp, 32), -EPIPE);
			CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), -EBADF);
		} else {
			/* Nonsense everywhere else does nothing. */
			memset(box->cmds, 0xee, sizeof(box->cmds));
			box->head = 0x123456789;
			box->sleeping = 77;
			box->closed = 77;
			box->answered = 0x77777777;
			box->data = 0xbad;
			runner_start(&r, &vm, 0);
			if (kind == 2) {
				MUST(read(w.dev_read, &cmd, 32) == 32);
				CHECK_EQ(cmd.info, 0x61);
				MUST(write(w.dev_read, &resp, 32) == 32);
			} else {
				MUST(read(w.dev_read, &cmd, 32) == 32);
				CHECK_EQ(cmd.info, 0x21);
			}
			box->answered = 0;
			MUST(read(w.dev_read, &cmd, 32) == 32);
			CHECK_EQ(cmd.info, 0x60);
			memset(box->cmds, 0xee, sizeof(box->cmds));
			box->head = ~0ull;
			CHECK(!runner_done_within(&r, 3));
			MUST(write(w.dev_read, &resp, 32) == 32);
			CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, 0, 0), 5);
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 0);
		}
		CHECK_EQ(vm_log(&vm, 0, 1), 0);
		CHECK_EQ(g.nr, 1);
		munmap(box, 4096);
		vm_close(&vm);
		wire_close_kvm(&w);
		wire_close_dev(&w);
		wire_close_kvm(&good);
		device_join(&g);
		wire_close_dev(&good);
		if (failures)
			printf("  kind %d\n", kind);
	}
}

struct uring {
	int fd;
	char *ring;
	struct io_uring_sqe *sqes;
	struct io_uring_params p;
};

static void uring_open(struct uring *u)
{
	memset(&u->p, 0, sizeof(u->p));
	u->fd = syscall(SYS_io_uring_setup, 4, &u->p);
	MUST(u->fd >= 0 && u->p.features & IORING_FEAT_SINGLE_MMAP);
	u->ring = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, u->fd, IORING_OFF_SQ_RING);
	u->sqes = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, u->fd, IORING_OFF_SQES);
	MUST(u->ring != MAP_FAILED && u->sqes != MAP_FAILED);
}

static void uring_submit(struct uring *u, int op, int fd, void *buf)
{
	uint32_t *tail = (uint32_t *)(u->ring + u->p.sq_off.tail), i = *tail % u->p.sq_entries;

	u->sqes[i] = (struct io_uring_sqe) { .opcode = op, .fd = fd, .addr = (uintptr_t)buf,
					     .len = 32, .off = -1 };
	((uint32_t *)(u->ring + u->p.sq_off.array))[i] = i;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	MUST(syscall(SYS_io_uring_enter, u->fd, 1, 0, 0, NULL, 0) == 1);
}

/* The result of the next completion, or INT32_MIN if there is none */
static int uring_result(struct uring *u, bool wait)
{
	uint32_t *head = (uint32_t *)(u->ring + u->p.cq_off.head);
	struct io_uring_cqe *cqes = (struct io_uring_cqe *)(u->ring + u->p.cq_off.cqes);
	int r;

	syscall(SYS_io_uring_enter, u->fd, 0, wait, IORING_ENTER_GETEVENTS, NULL, 0);
	if (*head == __atomic_load_n((uint32_t *)(u->ring + u->p.cq_off.tail), __ATOMIC_ACQUIRE))
		return INT32_MIN;
	r = cqes[*head % u->p.cq_entries].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return r;
}

/* A device that does nothing but io_uring, and one that does epoll */
static void *uring_and_epoll(void *unused)
{
	struct ioregionfd_cmd cmd = { };
	struct ioregionfd_resp resp = { .data = 0x77 };
	struct epoll_event event = { .events = EPOLLIN };
	struct uring u;
	struct vm vm;
	struct wire w;
	struct runner r;
	int ep = epoll_create1(0);

	vm_open(&vm);
	wire_open(&vm, &w, MAILBOX);
	uring_open(&u);
	CHECK_EQ(set_region(&vm, MMIO, 16, 1, w.kvm_read, w.kvm_write, 0), 0);
	code_init(&code[0], 0);
	mmio_read(&code[0], MMIO + 4, 4);
	mmio_read(&code[0], MMIO + 8, 4);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	uring_submit(&u, IORING_OP_READ, w.dev_read, &cmd);
	CHECK_EQ(uring_result(&u, false), INT32_MIN);
	runner_start(&r, &vm, 0);
	CHECK_EQ(uring_result(&u, true), 32);
	CHECK_EQ(cmd.info, 0x60);
	CHECK_EQ(cmd.offset, 4);
	uring_submit(&u, IORING_OP_WRITE, w.dev_write, &resp);
	CHECK_EQ(uring_result(&u, true), 32);

	MUST(!epoll_ctl(ep, EPOLL_CTL_ADD, w.dev_read, &event));
	MUST(epoll_wait(ep, &event, 1, 60000) == 1);
	MUST(read(w.dev_read, &cmd, 32) == 32);
	CHECK_EQ(cmd.offset, 8);
	CHECK_EQ(epoll_wait(ep, &event, 1, 0), 0);
	MUST(write(w.dev_write, &resp, 32) == 32);
	CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
	CHECK_EQ(vm_log(&vm, 0, 0), 0x77);
	CHECK_EQ(vm_log(&vm, 0, 1), 0x77);

	/* The end reaches both. */
	uring_submit(&u, IORING_OP_READ, w.dev_read, &cmd);
	vm_close(&vm);
	wire_close_kvm(&w);
	CHECK_EQ(uring_result(&u, true), 0);
	CHECK_EQ(epoll_wait(ep, &event, 1, 60000), 1);
	CHECK(event.events & EPOLLHUP);
	munmap(u.ring, 4096);
	munmap(u.sqes, 4096);
	close(u.fd);
	close(ep);
	wire_close_dev(&w);
	return unused;
}

/* In a thread of its own, as io_uring's work for its task interrupts KVM_RUN. */
void test_mailbox_uring(void)
{
	pthread_t thread;

	MUST(!pthread_create(&thread, NULL, uring_and_epoll, NULL));
	MUST(!pthread_join(thread, NULL));
}

/* Posted writes without an exit: how many, in which order, and past whom */
void test_fast(void)
{
	struct vm vm;
	struct wire w;
	struct ioregionfd_cmd cmd;
	struct ioregionfd_resp resp = { .data = 9 };
	struct runner r, r2;

	vm_open(&vm);
	wire_open(&vm, &w, MAILBOX);
	CHECK_EQ(set_region(&vm, MMIO, 0x2000, 1, w.kvm_read, w.kvm_write, POSTED), 0);
	CHECK_EQ(set_region(&vm, 0x300, 8, 2, w.kvm_read, w.kvm_write, PIO | POSTED), 0);

	/* As many as there is room for, while nobody looks */
	code_init(&code[0], 0);
	mmio_write_loop(&code[0], MMIO, MAILBOX_CMDS - 3);
	pio_write(&code[0], 0x302, 2, 0xabcd);
	mmio_write(&code[0], MMIO + 8, 8, 0x1122334455667788);
	mmio_write(&code[0], MMIO + 8, 1, 0x99);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	CHECK_EQ(vm_run(&vm, 0), KVM_EXIT_HLT);
	CHECK_EQ(vm_stat(&vm, 0, "ioregion_fast"), MAILBOX_CMDS);
	CHECK_EQ(vm_stat(&vm, 0, "ioregion_accesses"), 0);
	for (unsigned int i = 0; i < MAILBOX_CMDS; i++) {
		MUST(read(w.dev_read, &cmd, 32) == 32);
		if (i < MAILBOX_CMDS - 3) {
			CHECK_EQ(cmd.info, 0x21);
			CHECK_EQ(cmd.data, MAILBOX_CMDS - 3 - i);
		}
		if (i == MAILBOX_CMDS - 3) {
			CHECK_EQ(cmd.info, 0x11);
			CHECK_EQ(cmd.user_data, 2);
			CHECK_EQ(cmd.offset, 2);
			CHECK_EQ(cmd.data, 0xabcd);
		}
		if (i == MAILBOX_CMDS - 2)
			CHECK_EQ(cmd.data, 0x1122334455667788);
	}
	CHECK_EQ(cmd.data, 0x99);

	/* More than that, with a string in between: the slow stage takes over, in order. */
	code_init(&code[0], 0);
	for (int i = 0; i < 5; i++)
		vm.ram[0x300000 + i] = 0x80 + i;
	mmio_write(&code[0], MMIO, 4, 0);
	pio_outs(&code[0], 0x300, 1, 0x300000, 5);
	mmio_write(&code[0], MMIO + 0xffe, 4, 0x44332211);
	mmio_write_loop(&code[0], MMIO, MAILBOX_CMDS);
	halt(&code[0]);
	vm_load(&vm, &code[0]);
	runner_start(&r, &vm, 0);
	while (!r.done && !runner_is_asleep(&r))
		sleep_ms(1);
	CHECK(!r.done);
	for (unsigned int i = 0; i < MAILBOX_CMDS + 8; i++) {
		MUST(read(w.dev_read, &cmd, 32) == 32);
		if (!i)
			CHECK_EQ(cmd.data, 0);
		else if (i < 6)
			CHECK_EQ(cmd.data, 0x7f + i);
		else if (i < 8)
			CHECK_EQ(cmd.data, i == 6 ? 0x2211 : 0x4433);
		else
			CHECK_EQ(cmd.data, MAILBOX_CMDS + 8 - i);
	}
	CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
	uint64_t fast = vm_stat(&vm, 0, "ioregion_fast");
	uint64_t slow = vm_stat(&vm, 0, "ioregion_accesses");

	CHECK(slow > 0);
	CHECK_EQ(fast + slow, 2 * MAILBOX_CMDS + 8);
	CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 0);

	/* Past another vCPU that waits for a response, which is still its own */
	code_init(&code[0], 0);
	mmio_read(&code[0], MMIO + 4, 4);
	halt(&code[0]);
	code_init(&code[1], 1);
	mmio_write(&code[1], MMIO, 4, 1);
	mmio_write(&code[1], MMIO, 4, 2);
	halt(&code[1]);
	vm_load(&vm, &code[0]);
	vm_load(&vm, &code[1]);
	runner_start(&r, &vm, 0);
	MUST(read(w.dev_read, &cmd, 32) == 32);
	CHECK_EQ(cmd.info, 0x60);
	runner_start(&r2, &vm, 1);
	CHECK_EQ(runner_join(&r2), KVM_EXIT_HLT);
	CHECK_EQ(vm_stat(&vm, 1, "ioregion_fast"), 2);
	CHECK(!runner_done_within(&r, 3));
	for (int i = 1; i < 3; i++) {
		MUST(read(w.dev_read, &cmd, 32) == 32);
		CHECK_EQ(cmd.data, i);
	}
	MUST(write(w.dev_read, &resp, 32) == 32);
	CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
	CHECK_EQ(vm_log(&vm, 0, 0), 9);

	/* Files of others are not for the fast stage. */
	struct wire p;
	struct device d = { };

	wire_open(&vm, &p, PIPES);
	device_start(&d, &p, 8);
	CHECK_EQ(set_region(&vm, MMIO, 0x2000, 1, p.kvm_read, p.kvm_write, POSTED), 0);
	fast = vm_stat(&vm, 1, "ioregion_fast");
	vm_load(&vm, &code[1]);
	CHECK_EQ(vm_run(&vm, 1), KVM_EXIT_HLT);
	CHECK_EQ(vm_stat(&vm, 1, "ioregion_fast"), fast);
	vm_close(&vm);
	wire_close_kvm(&w);
	wire_close_dev(&w);
	wire_close_kvm(&p);
	device_join(&d);
	CHECK_EQ(d.nr, 2);
	wire_close_dev(&p);
}
