/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TESTS_H
#define TESTS_H

#include "harness.h"

void test_errnos(void);
void test_many(void);
void test_sizes(void);
void test_string(void);
void test_unclaimed(void);
void test_half(void);
void test_ioeventfd(void);
void test_signal(void);
void test_sigmask(void);
void test_remove_pending(void);
void test_remove_lets_go(void);
void test_modify_pending(void);
void test_death(void);
void test_sigpipe(void);
void test_hostile(void);
void test_two_vcpus(void);
void test_abandoned_vm(void);

void test_mailbox_file(void);
void test_mailbox_polled(void);
void test_mailbox_hostile(void);
void test_mailbox_uring(void);
void test_fast(void);

/* A program that always returns this verdict, and a register file */
int constant_prog(int32_t verdict);
int register_map(void);

void test_prog_errnos(void);
void test_prog_verdicts(void);
void test_prog_args(void);
void test_prog_slow(void);
void test_prog_load(void);
void test_post_write(void);

void test_perf(void);

void test_load(void);
void test_storm(void);
void test_backpressure(void);
void test_full_file(void);
void test_fuzz(void);

#endif
