// SPDX-License-Identifier: GPL-2.0-only
/*
 * What an access costs; run only if it is named. The times mean something with
 * instruction-counted time, or on a quiet machine.
 */
#include <sys/resource.h>

#include "tests.h"

#define POSTED KVM_IOREGION_POSTED_WRITES
#define COUNT 2000

static struct code code[1];
static struct vm vm;
static struct wire forward_wire;

static void *echo(void *arg)
{
	struct wire *w = arg;
	struct ioregionfd_resp resp = { .data = 1 };
	struct ioregionfd_cmd cmd;

	while (read(w->dev_read, &cmd, 32) == 32) {
		if (cmd_resp(&cmd))
			MUST(write(w->dev_write, &resp, 32) == 32);
	}
	return NULL;
}

/* Runs until the guest halts; exits are forwarded, or done with at once. */
static void run(bool forward)
{
	struct ioregionfd_cmd cmd = { .info = 0x60 };
	struct ioregionfd_resp resp;
	int exit;

	while ((exit = vm_run(&vm, 0)) != KVM_EXIT_HLT) {
		MUST(exit == KVM_EXIT_MMIO || exit == -EINTR);
		if (exit == KVM_EXIT_MMIO && forward) {
			MUST(write(forward_wire.kvm_write, &cmd, 32) == 32);
			MUST(read(forward_wire.kvm_read, &resp, 32) == 32);
		}
	}
}

static void measure(const char *what, bool write, bool forward)
{
	struct rusage before, after;
	long best = -1;

	getrusage(RUSAGE_SELF, &before);
	code_init(&code[0], 0);
	if (write)
		mmio_write_loop(&code[0], MMIO, COUNT);
	else
		mmio_read_loop(&code[0], MMIO, COUNT);
	halt(&code[0]);
	for (int i = 0; i < 3; i++) {
		struct timespec a, b;

		vm_load(&vm, &code[0]);
		clock_gettime(CLOCK_MONOTONIC, &a);
		run(forward);
		clock_gettime(CLOCK_MONOTONIC, &b);
		long ns = (b.tv_sec - a.tv_sec) * 1000000000l + b.tv_nsec - a.tv_nsec;

		if (best < 0 || ns < best)
			best = ns;
	}
	getrusage(RUSAGE_SELF, &after);
	printf("  %-30s %8ld ns, %.2f switches\n", what, best / COUNT,
	       (after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw) /
	       (3.0 * COUNT));
}

void test_perf(void)
{
	char name[64];
	int event = eventfd(0, EFD_NONBLOCK), regs = register_map();

	vm_open(&vm);
	measure("exit, write", true, false);
	measure("exit, read", false, false);
	for (int t = getenv("PERF_MAILBOX") ? MAILBOX : 0; t < nr_transports; t++) {
		pthread_t thread;
		struct wire w;

		wire_open(&vm, &w, t);
		MUST(!pthread_create(&thread, NULL, echo, &w));
		if (t != MAILBOX) {
			forward_wire = w;
			snprintf(name, sizeof(name), "forward, %s, read", transport_names[t]);
			measure(name, false, true);
		}
		CHECK_EQ(set_region(&vm, MMIO, 16, 0, w.kvm_read, w.kvm_write, 0), 0);
		snprintf(name, sizeof(name), "ioregionfd, %s, read", transport_names[t]);
		measure(name, false, false);
		snprintf(name, sizeof(name), "ioregionfd, %s, write", transport_names[t]);
		measure(name, true, false);
		CHECK_EQ(set_region(&vm, MMIO, 16, 0, w.kvm_read, w.kvm_write, POSTED), 0);
		snprintf(name, sizeof(name), "ioregionfd, %s, posted", transport_names[t]);
		measure(name, true, false);
		if (t == nr_transports - 1) {
			static const struct { const char *name; int verdict; bool write; } v[] = {
				{ "program, CONSUME", 1, true }, { "program, SIGNAL", 2, true },
				{ "program, ANSWER", 3, false }, { "program, PASS, read", 0, false },
			};

			for (unsigned int i = 0; i < sizeof(v) / sizeof(v[0]); i++) {
				int prog = constant_prog(v[i].verdict);
				struct kvm_ioregion_prog p = {
					.guest_paddr = MMIO, .memory_size = 16, .prog_fd = prog,
					.regs_fd = regs, .nr_eventfds = 1,
					.eventfds = (uintptr_t)&event,
				};

				MUST(!ioctl(vm.fd, KVM_SET_IOREGION_PROG, &p));
				measure(v[i].name, v[i].write, false);
				close(prog);
			}
		}
		CHECK_EQ(del_region(&vm, MMIO, 16, 0), 0);
		wire_close_kvm(&w);
		MUST(!pthread_join(thread, NULL));
		wire_close_dev(&w);
	}
	struct kvm_ioeventfd e = { .addr = MMIO, .len = 4, .fd = event };

	MUST(!ioctl(vm.fd, KVM_IOEVENTFD, &e));
	measure("ioeventfd, nobody waits", true, false);
	vm_close(&vm);
	close(event);
	close(regs);
}
