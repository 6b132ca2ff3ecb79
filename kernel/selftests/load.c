// SPDX-License-Identifier: GPL-2.0-only
/* Regions that change, signals that hit, and full files, all under load */
#include "tests.h"

#define POSTED KVM_IOREGION_POSTED_WRITES
#define ROUNDS scaled(1000)

static struct code code[2];
/* By offset / 4, of all devices of a test: the last value, and how many there were */
static volatile uint32_t last[8];
static volatile uint32_t writes[8];
static volatile unsigned int disorder;

static uint64_t remember(struct device *d, const struct ioregionfd_cmd *cmd)
{
	unsigned int i = cmd->offset / 4 % 8;

	(void)d;
	if (cmd_op(cmd) == 0)
		return last[i];
	if (writes[i] && cmd->data != last[i] - 1)
		disorder++;
	last[i] = cmd->data;
	writes[i]++;
	return 0;
}

static void start_counting(void)
{
	memset((void *)last, 0, sizeof(last));
	memset((void *)writes, 0, sizeof(writes));
	disorder = 0;
}

/* Also posted writes have to be counted. */
static void *counting_loop(void *arg)
{
	struct device *d = arg;
	struct ioregionfd_cmd cmd;
	struct ioregionfd_resp resp = { };

	for (;;) {
		unsigned int got = 0;

		while (got < sizeof(cmd)) {
			ssize_t n = read(d->wire->dev_read, (char *)&cmd + got, sizeof(cmd) - got);

			if (n <= 0)
				return NULL;
			got += n;
		}
		resp.data = remember(d, &cmd);
		d->nr++;
		if (cmd_resp(&cmd) && write(d->wire->dev_write, &resp, sizeof(resp)) != sizeof(resp))
			return NULL;
	}
}

static void counting_start(struct device *d, struct wire *w)
{
	d->wire = w;
	MUST(!pthread_create(&d->thread, NULL, counting_loop, d));
}

/* Runs until the guest halts; accesses that no region takes are kept waiting. */
static void *run_to_halt(void *arg)
{
	struct runner *r = arg;
	int exit;

	for (;;) {
		exit = vm_run(r->vm, r->vcpu);
		if (exit == -EINTR || exit == -EAGAIN)
			continue;
		if (exit == KVM_EXIT_MMIO) {
			/* Serve it from here, as a VMM would. */
			struct kvm_run *run = r->vm->run[r->vcpu];
			struct ioregionfd_cmd cmd = { .info = run->mmio.is_write,
						      .offset = run->mmio.phys_addr - MMIO };
			uint64_t data;

			memcpy(&cmd.data, run->mmio.data, run->mmio.len);
			data = remember(NULL, &cmd);
			memcpy(run->mmio.data, &data, run->mmio.len);
			continue;
		}
		r->exit = exit;
		__atomic_store_n(&r->done, true, __ATOMIC_SEQ_CST);
		return NULL;
	}
}

static void loop_start(struct runner *r, struct vm *vm, unsigned int vcpu)
{
	memset(r, 0, sizeof(*r));
	r->vm = vm;
	r->vcpu = vcpu;
	MUST(!pthread_create(&r->thread, NULL, run_to_halt, r));
}

/* Modified while vCPUs use it: no access is lost, doubled or out of order. */
void test_load(void)
{
	for (int t = 0; t < nr_transports; t++) {
		for (int posted = 0; posted < 2; posted++) {
			struct vm vm;
			struct wire w[2];
			struct device d[2] = { };
			struct runner r[2];
			unsigned int changes = 0;

			start_counting();
			vm_open(&vm);
			for (int i = 0; i < 2; i++) {
				wire_open(&vm, &w[i], t);
				counting_start(&d[i], &w[i]);
			}
			CHECK_EQ(set_region(&vm, MMIO, 32, 0, w[0].kvm_read, w[0].kvm_write, 0), 0);
			for (int i = 0; i < 2; i++) {
				code_init(&code[i], i);
				mmio_loop(&code[i], MMIO + 4 * i, MMIO + 4 * i, ROUNDS);
				halt(&code[i]);
				vm_load(&vm, &code[i]);
				loop_start(&r[i], &vm, i);
			}
			while (!r[0].done || !r[1].done) {
				/*
				 * Posted writes that are on their way to one device are
				 * not ordered with accesses to the other, so that with
				 * them only the flags change.
				 */
				int to = posted ? 0 : changes & 1;

				CHECK_EQ(set_region(&vm, MMIO, 32, changes, w[to].kvm_read,
						    w[to].kvm_write,
						    posted && changes & 2 ? POSTED : 0), 0);
				changes++;
				sleep_ms(1);
			}
			for (int i = 0; i < 2; i++) {
				CHECK_EQ(runner_join(&r[i]), KVM_EXIT_HLT);
				CHECK_EQ(vm_log(&vm, i, 0), 0);
				CHECK_EQ(writes[i], ROUNDS);
				CHECK_EQ(last[i], 1);
			}
			CHECK_EQ(disorder, 0);
			if (!posted)
				CHECK(d[0].nr && d[1].nr);
			CHECK(changes > 10);
			vm_close(&vm);
			for (int i = 0; i < 2; i++) {
				wire_close_kvm(&w[i]);
				MUST(!pthread_join(d[i].thread, NULL));
				wire_close_dev(&w[i]);
			}
			if (failures)
				printf("  with %s, posted %d\n", transport_names[t], posted);
		}
	}
}

/* Removed and added while vCPUs use it: each write arrives once at most. */
static void add_remove(int t)
{
	struct vm vm;
	struct wire w;
	struct device d = { };
	struct runner r[2];
	unsigned int changes = 0;

	start_counting();
	vm_open(&vm);
	wire_open(&vm, &w, t);
	counting_start(&d, &w);
	for (int i = 0; i < 2; i++) {
		code_init(&code[i], i);
		mmio_write_loop(&code[i], MMIO + 4 * i, ROUNDS);
		halt(&code[i]);
		vm_load(&vm, &code[i]);
		loop_start(&r[i], &vm, i);
	}
	while (!r[0].done || !r[1].done) {
		CHECK_EQ(set_region(&vm, MMIO, 32, 0, w.kvm_read, w.kvm_write, 0), 0);
		sleep_ms(1);
		CHECK_EQ(del_region(&vm, MMIO, 32, 0), 0);
		if (++changes % 8 == 0)
			sleep_ms(1);
	}
	for (int i = 0; i < 2; i++)
		CHECK_EQ(runner_join(&r[i]), KVM_EXIT_HLT);
	vm_close(&vm);
	wire_close_kvm(&w);
	MUST(!pthread_join(d.thread, NULL));
	wire_close_dev(&w);
	CHECK_EQ(writes[0], ROUNDS);
	CHECK_EQ(writes[1], ROUNDS);
	CHECK(d.nr && d.nr < 2 * ROUNDS);
	if (failures)
		printf("  with %s\n", transport_names[t]);
}

/* Signals as fast as can be */
void test_storm(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		struct device d = { };
		struct runner r[2];

		add_remove(t);

		start_counting();
		vm_open(&vm);
		wire_open(&vm, &w, t);
		counting_start(&d, &w);
		CHECK_EQ(set_region(&vm, MMIO, 32, 0, w.kvm_read, w.kvm_write, POSTED), 0);
		for (int i = 0; i < 2; i++) {
			code_init(&code[i], i);
			mmio_loop(&code[i], MMIO + 4 * i, MMIO + 4 * i, ROUNDS);
			halt(&code[i]);
			vm_load(&vm, &code[i]);
			loop_start(&r[i], &vm, i);
		}
		for (unsigned int i = 0; !r[0].done || !r[1].done; i++) {
			struct timespec pause = { .tv_nsec = 50000 };

			if (!r[i & 1].done)
				pthread_kill(r[i & 1].thread, SIGUSR1);
			nanosleep(&pause, NULL);
		}
		for (int i = 0; i < 2; i++) {
			CHECK_EQ(runner_join(&r[i]), KVM_EXIT_HLT);
			CHECK_EQ(vm_log(&vm, i, 0), 0);
			CHECK_EQ(writes[i], ROUNDS);
		}
		CHECK_EQ(disorder, 0);
		CHECK_EQ(d.nr, 4 * ROUNDS);
		CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), 0);
		vm_close(&vm);
		wire_close_kvm(&w);
		MUST(!pthread_join(d.thread, NULL));
		wire_close_dev(&w);
		if (failures)
			printf("  with %s\n", transport_names[t]);
	}
}

/* Posted writes wait for room, can be interrupted, and arrive in order. */
void test_backpressure(void)
{
	for (int t = 0; t < nr_transports; t++) {
		struct vm vm;
		struct wire w;
		struct runner r;
		unsigned int nr = 0, interrupted = 0;
		const unsigned int total = scaled(20000) < 6000 ? 6000 : scaled(20000);
		uint32_t due = total;

		vm_open(&vm);
		wire_open(&vm, &w, t);
		CHECK_EQ(set_region(&vm, MMIO, 32, 0, w.kvm_read, w.kvm_write, POSTED), 0);
		code_init(&code[0], 0);
		mmio_write_loop(&code[0], MMIO + 4, total);
		mmio_read(&code[0], MMIO + 8, 4);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		loop_start(&r, &vm, 0);
		/* Nobody reads: KVM has to stop at some point. */
		for (int i = 0; i < 30; i++) {
			sleep_ms(2);
			pthread_kill(r.thread, SIGUSR1);
			interrupted++;
		}
		CHECK(!r.done);
		/* Odd lengths from a stream */
		while (due) {
			static char buf[32 * 33];
			static unsigned int have;
			ssize_t n = read(w.dev_read, buf + have, t == STREAM ? 100 : 32 * 32);

			MUST(n > 0);
			have += n;
			unsigned int used = 0;

			for (; have - used >= 32 && due; used += 32) {
				struct ioregionfd_cmd cmd;

				memcpy(&cmd, buf + used, 32);
				if (cmd.info != 0x21 || cmd.data != due)
					FAIL("%s: %u came as %#x %llu", transport_names[t], due,
					     cmd.info, cmd.data);
				due--;
				nr++;
			}
			memmove(buf, buf + used, have - used);
			have -= used;
			if (!due && have) {
				/* A part of the read that follows */
				char rest[32];
				struct ioregionfd_resp resp = { .data = 77 };

				while (have < 32) {
					n = read(w.dev_read, rest, 32 - have);
					MUST(n > 0);
					have += n;
				}
				have = 0;
				MUST(write(w.dev_write, &resp, 32) == 32);
				nr++;
			}
		}
		if (nr == total) {
			struct ioregionfd_cmd cmd;
			struct ioregionfd_resp resp = { .data = 77 };

			MUST(read(w.dev_read, &cmd, 32) == 32);
			MUST(write(w.dev_write, &resp, 32) == 32);
		}
		CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
		CHECK_EQ(vm_log(&vm, 0, 0), 77);
		vm_close(&vm);
		wire_close_kvm(&w);
		wire_close_dev(&w);
	}
}

/*
 * Reads commands until the last one that is due, or until none has come for some time; returns
 * how many, and how many bytes are left over.
 */
static unsigned int count_down(struct wire *w, uint32_t *due, unsigned int *partial, int ms)
{
	struct pollfd p = { .fd = w->dev_read, .events = POLLIN };
	struct ioregionfd_cmd cmd;
	unsigned int nr = 0, have = 0;

	while (*due && poll(&p, 1, ms) > 0 && p.revents & POLLIN) {
		ssize_t n = read(w->dev_read, (char *)&cmd + have, sizeof(cmd) - have);

		if (n <= 0)
			break;
		have += n;
		if (have < sizeof(cmd))
			continue;
		have = 0;
		CHECK_EQ(cmd.data, *due);
		--*due;
		nr++;
	}
	*partial = have;
	return nr;
}

/*
 * A write that a full file has taken nothing of is not lost: without its region
 * it makes an exit, and with other files it takes those.
 */
void test_full_file(void)
{
	for (int i = 0; i < 2 * nr_transports; i++) {
		const uint32_t total = 8000;
		uint32_t due = total;
		unsigned int partial;
		bool modify = i & 1;
		int t = i / 2;
		struct wire w, other;
		struct runner r;
		struct vm vm;

		vm_open(&vm);
		wire_open(&vm, &w, t);
		wire_open(&vm, &other, t);
		CHECK_EQ(set_region(&vm, MMIO, 32, 0, w.kvm_read, w.kvm_write, POSTED), 0);
		code_init(&code[0], 0);
		mmio_write_loop(&code[0], MMIO + 4, total);
		halt(&code[0]);
		vm_load(&vm, &code[0]);
		runner_start(&r, &vm, 0);
		while (!r.done && !runner_is_asleep(&r))
			sleep_ms(1);
		CHECK(!r.done);
		if (modify)
			CHECK_EQ(set_region(&vm, MMIO, 32, 0, other.kvm_read, other.kvm_write,
					    POSTED), 0);
		else
			CHECK_EQ(del_region(&vm, MMIO, 32, 0), 0);
		if (modify) {
			/* What has left in part goes on where it began. */
			CHECK(count_down(&w, &due, &partial, 200) > 1);
			CHECK_EQ(partial, 0);
			CHECK(count_down(&other, &due, &partial, 60000) > 1);
			CHECK_EQ(due, 0);
			CHECK_EQ(runner_join(&r), KVM_EXIT_HLT);
		} else {
			CHECK_EQ(runner_join(&r), KVM_EXIT_MMIO);
			CHECK(count_down(&w, &due, &partial, 200) > 1);
			/* The rest of a command is lost with its region, and counted. */
			CHECK_EQ(vm_stat(&vm, 0, "ioregion_lost"), !!partial);
			due -= !!partial;
			CHECK_EQ(*(uint32_t *)vm.run[0]->mmio.data, due);
		}
		vm_close(&vm);
		wire_close_kvm(&w);
		wire_close_kvm(&other);
		wire_close_dev(&w);
		wire_close_dev(&other);
		if (failures)
			printf("  with %s, %s\n", transport_names[t], modify ? "modified" : "removed");
	}
}

/* A guest that never gets anywhere: its exits are nobody's business. */
static void *run_until_stopped(void *arg)
{
	struct runner *r = arg;

	while (!__atomic_load_n(&r->exit, __ATOMIC_SEQ_CST))
		vm_run(r->vm, r->vcpu);
	__atomic_store_n(&r->done, true, __ATOMIC_SEQ_CST);
	return NULL;
}

/* Random structs: an errno or success, and nothing else */
void test_fuzz(void)
{
	unsigned int seconds = getenv("FUZZ_SECONDS") ? atoi(getenv("FUZZ_SECONDS")) : 2;
	time_t end = time(NULL) + seconds;
	unsigned int seed = time(NULL), n = 0, ok = 0;
	int event;
	struct vm vm;
	struct wire w[NR_TRANSPORTS];
	int fds[2 * NR_TRANSPORTS + 10], nr_fds = 0, progs[6], nr_progs = 0;
	struct runner r[2] = { };

	printf("  seed %u\n", seed);
	srand(seed);
	vm_open(&vm);
	for (int t = 0; t < nr_transports; t++) {
		wire_open(&vm, &w[t], t);
		fds[nr_fds++] = w[t].kvm_read;
		fds[nr_fds++] = t & 1 ? w[t].dev_read : w[t].kvm_write;
	}
	fds[nr_fds++] = -1;
	fds[nr_fds++] = vm.fd;
	fds[nr_fds++] = event = eventfd(0, 0);
	fds[nr_fds++] = open("/dev/null", O_RDWR);
	fds[nr_fds++] = vm.vcpu[0];
	fds[nr_fds++] = 12345;
	progs[nr_progs++] = fds[nr_fds++] = constant_prog(1);
	progs[nr_progs++] = fds[nr_fds++] = constant_prog(2);
	progs[nr_progs++] = fds[nr_fds++] = constant_prog(3);
	progs[nr_progs++] = -1;
	fds[nr_fds++] = register_map();
	for (int i = 0; i < 2; i++) {
		code_init(&code[i], i);
		mmio_loop(&code[i], MMIO + 4 * i, MMIO + 8 + 4 * i, ~0u);
		vm_load(&vm, &code[i]);
		r[i].vm = &vm;
		r[i].vcpu = i;
		MUST(!pthread_create(&r[i].thread, NULL, run_until_stopped, &r[i]));
	}
	while (time(NULL) < end) {
		struct kvm_ioregion r = { };
		struct kvm_ioregion_prog p = { };
		int eventfds[4] = { fds[rand() % nr_fds], fds[rand() % nr_fds], -1, 0 };

		/* Half of it is not random enough to be refused at once. */
		bool likely = rand() % 2;

		r.guest_paddr = likely ? MMIO + rand() % 4 * 16 : rand() % 8 ? MMIO + rand() % 64 : (uint64_t)rand() * rand() * 4;
		r.memory_size = likely ? 16 : rand() % 8 ? (uint64_t)rand() % 16 : (uint64_t)rand() * rand() * 4;
		r.user_data = rand();
		r.read_fd = likely ? w[rand() % nr_transports].kvm_read : fds[rand() % nr_fds];
		r.write_fd = rand() % 2 || likely ? r.read_fd : fds[rand() % nr_fds];
		r.flags = likely ? rand() % 2 * 2 | (rand() % 4 ? 0 : 4) :
			  rand() % 16 ? rand() % 8 : rand();
		if (rand() % 32 == 0 && !likely)
			r.pad[rand() % 28] = rand();
		if (rand() % 16 == 0 && !likely)
			for (unsigned int i = 0; i < sizeof(r); i++)
				((char *)&r)[i] = rand();
		ok += !ioctl(vm.fd, KVM_SET_IOREGION, &r);

		p.guest_paddr = r.guest_paddr;
		p.memory_size = r.memory_size;
		p.flags = r.flags & 1;
		p.prog_fd = rand() % 4 ? progs[rand() % nr_progs] : fds[rand() % nr_fds];
		p.regs_fd = rand() % 2 ? fds[rand() % nr_fds] : rand() % 2 ? -1 : fds[nr_fds - 1];
		p.nr_eventfds = rand() % 8 ? rand() % 4 : rand();
		if (rand() % 4) {
			for (int i = 0; i < 4; i++)
				eventfds[i] = event;
		}
		p.eventfds = rand() % 16 ? (uintptr_t)eventfds : (uint64_t)rand() * rand();
		if (rand() % 16 == 0)
			for (unsigned int i = 0; i < sizeof(p); i++)
				((char *)&p)[i] = rand();
		ok += !ioctl(vm.fd, KVM_SET_IOREGION_PROG, &p);
		n++;
	}
	printf("  %u rounds, %u accepted\n", n, ok);
	CHECK(ok > 0 && ok < 2 * n);
	for (int i = 0; i < 2; i++) {
		__atomic_store_n(&r[i].exit, 1, __ATOMIC_SEQ_CST);
		runner_signal(&r[i]);
		MUST(!pthread_join(r[i].thread, NULL));
	}
	for (int i = 0; i < nr_progs; i++)
		close(progs[i]);
	close(fds[nr_fds - 1]);
	close(event);
	vm_close(&vm);
	for (int t = 0; t < nr_transports; t++) {
		wire_close_kvm(&w[t]);
		wire_close_dev(&w[t]);
	}
}
