/* SPDX-License-Identifier: GPL-2.0-only */
/* A 32-bit guest made of a few bytes, and device tasks for its accesses. */
#ifndef HARNESS_H
#define HARNESS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "uapi.h"

#define MMIO 0xd0000000u
#define RAM_SIZE (4u << 20)
#define CODE_AT 0x10000u
#define CODE_STRIDE 0x40000u
#define LOG_AT 0x200000u
#define LOG_STRIDE 0x40000u
#define NR_VCPUS 4

extern const char *current_test;
extern int failures;

#define FAIL(...) do { \
	failures++; \
	printf("FAIL %s (%s:%d): ", current_test, __FILE__, __LINE__); \
	printf(__VA_ARGS__); \
	printf("\n"); \
} while (0)

#define CHECK(cond) do { \
	if (!(cond)) \
		FAIL("%s", #cond); \
} while (0)

#define CHECK_EQ(a, b) do { \
	unsigned long long a_ = (unsigned long long)(a), b_ = (unsigned long long)(b); \
	if (a_ != b_) \
		FAIL("%s is %#llx, not %s = %#llx", #a, a_, #b, b_); \
} while (0)

/* For what the machine must be able to do */
#define MUST(cond) do { \
	if (!(cond)) { \
		printf("ABORT %s (%s:%d): %s: %s\n", current_test, __FILE__, __LINE__, \
		       #cond, strerror(errno)); \
		fflush(stdout); \
		_exit(2); \
	} \
} while (0)

struct code {
	uint8_t bytes[0x3f000];
	unsigned int len;
	unsigned int logs;	/* 8 bytes each */
	unsigned int vcpu;
};

struct vm {
	int kvm, fd;
	uint8_t *ram;
	int vcpu[NR_VCPUS];
	struct kvm_run *run[NR_VCPUS];
};

/* Code: every read appends 8 bytes to the vCPU's log */
void code_init(struct code *c, unsigned int vcpu);
void mmio_write(struct code *c, uint32_t addr, unsigned int size, uint64_t value);
void mmio_read(struct code *c, uint32_t addr, unsigned int size);
void pio_write(struct code *c, uint16_t port, unsigned int size, uint32_t value);
void pio_read(struct code *c, uint16_t port, unsigned int size);
void pio_outs(struct code *c, uint16_t port, unsigned int size, uint32_t from, uint32_t count);
void pio_ins(struct code *c, uint16_t port, unsigned int size, uint32_t to, uint32_t count);
/* Writes count, count - 1, ... 1 */
void mmio_write_loop(struct code *c, uint32_t addr, uint32_t count);
/* Reads, and forgets */
void mmio_read_loop(struct code *c, uint32_t addr, uint32_t count);
/* Writes count ... 1, after each of which it reads another address and compares */
void mmio_loop(struct code *c, uint32_t waddr, uint32_t raddr, uint32_t count);
void halt(struct code *c);

void vm_open(struct vm *vm);
void vm_close(struct vm *vm);
void vm_load(struct vm *vm, const struct code *c);
uint64_t vm_log(const struct vm *vm, unsigned int vcpu, unsigned int index);
/* Returns the exit reason, or -errno. */
int vm_run(struct vm *vm, unsigned int vcpu);
uint64_t vm_stat(const struct vm *vm, unsigned int vcpu, const char *name);

/* Returns 0 or -errno */
int set_region(struct vm *vm, uint64_t addr, uint64_t size, uint64_t user_data, int rfd, int wfd,
	       uint32_t flags);
int del_region(struct vm *vm, uint64_t addr, uint64_t size, uint32_t flags);

/* Ways to a device */
enum transport { STREAM, SEQPACKET, PIPES, FIFOS, TCP, MAILBOX, NR_TRANSPORTS };
extern const char *transport_names[];
extern int nr_transports;	/* without MAILBOX where the kernel lacks it */
struct wire {
	enum transport transport;
	int kvm_read, kvm_write;	/* KVM's ends */
	int dev_read, dev_write;	/* the device's */
};
void wire_open(struct vm *vm, struct wire *w, enum transport t);
void wire_close_kvm(struct wire *w);
void wire_close_dev(struct wire *w);

/* A device that records what it is told; reads answer with the number of the command | offset << 32 */
struct told {
	struct ioregionfd_cmd cmd;
};
struct device {
	struct wire *wire;
	pthread_t thread;
	bool running;
	volatile unsigned int nr, answered;
	unsigned int max;
	struct told *told;
	uint64_t (*answer)(struct device *d, const struct ioregionfd_cmd *cmd);
	/* If not NULL the device does not answer a command before a post */
	volatile int *gate;
	int error;
};
void device_start(struct device *d, struct wire *w, unsigned int max);
void device_join(struct device *d);
unsigned int cmd_op(const struct ioregionfd_cmd *cmd);
unsigned int cmd_size(const struct ioregionfd_cmd *cmd);
bool cmd_resp(const struct ioregionfd_cmd *cmd);

/* A vCPU in a thread of its own */
struct runner {
	struct vm *vm;
	unsigned int vcpu;
	pthread_t thread;
	int exit;
	volatile bool done;
	volatile pid_t tid;
};
void runner_start(struct runner *r, struct vm *vm, unsigned int vcpu);
int runner_join(struct runner *r);
void runner_signal(struct runner *r);
bool runner_done_within(struct runner *r, unsigned int ms);
bool runner_is_asleep(const struct runner *r);

void sleep_ms(unsigned int ms);
/* n divided by ROUNDS_DIV, which is 8 on a debug kernel if it is not set */
unsigned int scaled(unsigned int n);
/* Waits for up to a minute */
#define WAIT_FOR(cond) do { \
	int i_; \
	for (i_ = 0; i_ < 60000 && !(cond); i_++) \
		sleep_ms(1); \
	if (!(cond)) \
		FAIL("timeout: %s", #cond); \
} while (0)

#endif
