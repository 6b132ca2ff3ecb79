// SPDX-License-Identifier: GPL-2.0-only
/* ioregionfd selftests: runs those that are named, or all of them. */
#include "tests.h"

static const struct { const char *name; void (*run)(void); } tests[] = {
#define T(name) { #name, test_ ## name }
	T(errnos), T(many), T(sizes), T(string), T(unclaimed), T(half), T(ioeventfd), T(signal),
	T(sigmask), T(remove_pending), T(remove_lets_go), T(modify_pending), T(death), T(sigpipe),
	T(hostile), T(two_vcpus), T(abandoned_vm), T(load), T(storm), T(backpressure),
	T(full_file), T(mailbox_file), T(mailbox_polled), T(mailbox_hostile), T(mailbox_uring), T(fast),
	T(prog_errnos), T(prog_verdicts), T(prog_args), T(prog_slow), T(prog_load), T(post_write),
	T(fuzz), T(perf),
};

static void noop(int signal)
{
	(void)signal;
}

int main(int argc, char **argv)
{
	struct sigaction act = { .sa_handler = noop };
	unsigned int ran = 0, failed = 0;
	struct vm vm;
	int fds[2];

	setvbuf(stdout, NULL, _IONBF, 0);
	sigaction(SIGUSR1, &act, NULL);
	signal(SIGPIPE, SIG_IGN);
	vm_open(&vm);
	if (ioctl(vm.fd, KVM_CREATE_IOREGIONFD, fds)) {
		printf("note: no KVM_CREATE_IOREGIONFD (%s)\n", strerror(errno));
		nr_transports = MAILBOX;
	} else {
		close(fds[0]);
		close(fds[1]);
	}
	vm_close(&vm);
	for (unsigned int i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
		/* The last one is no test. */
		bool wanted = argc < 2 && tests[i].run != test_perf;
		struct timespec a, b;

		for (int j = 1; j < argc; j++)
			wanted |= !strcmp(argv[j], tests[i].name);
		if (!wanted)
			continue;
		current_test = tests[i].name;
		failures = 0;
		/* A test that hangs is a test that fails. */
		alarm(getenv("FUZZ_SECONDS") ? 3600 : 600);
		clock_gettime(CLOCK_MONOTONIC, &a);
		tests[i].run();
		clock_gettime(CLOCK_MONOTONIC, &b);
		printf("%s %s (%ld ms)\n", failures ? "FAILED" : "ok", tests[i].name,
		       (b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000);
		failed += !!failures;
		ran++;
	}
	printf("VERDICT %s: %u tests, %u failed\n", failed || !ran ? "FAIL" : "PASS", ran, failed);
	return failed || !ran;
}
