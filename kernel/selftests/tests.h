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

void test_load(void);
void test_storm(void);
void test_backpressure(void);
void test_fuzz(void);

#endif
