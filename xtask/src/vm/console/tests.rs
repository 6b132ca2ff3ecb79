use super::*;

#[test]
fn faults_of_every_kind_are_recognised() {
    let cases = [
        (
            "[    1.234567] Kernel panic - not syncing: VFS: Unable",
            "panic",
        ),
        (
            "[   12.345678][  T123] BUG: KASAN: slab-use-after-free in f+0x1/0x2",
            "memory error (KASAN)",
        ),
        (
            "[   60.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [x:1]",
            "soft lockup",
        ),
        (
            "[   60.0] watchdog: Watchdog detected hard LOCKUP on cpu 1",
            "hard lockup",
        ),
        (
            "[   60.0] NMI watchdog: Watchdog detected hard LOCKUP on cpu 1",
            "hard lockup",
        ),
        (
            "[   60.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "RCU stall",
        ),
        (
            "[   60.0] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            "RCU stall",
        ),
        (
            "[  200.0] INFO: task kvm:12 blocked for more than 120 seconds.",
            "hung task",
        ),
        (
            "[    3.0] BUG: sleeping function called from invalid context at mm.c:1",
            "sleep in atomic context",
        ),
        (
            "[    3.0] BUG: scheduling while atomic: x/1/0x00000002",
            "sleep in atomic context",
        ),
        (
            "[    3.0] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "BUG",
        ),
        ("[    3.0] kernel BUG at virt/kvm/ioregion.c:12!", "BUG"),
        (
            "[    3.0] Oops: Oops: 0000 [#1] PREEMPT SMP KASAN NOPTI",
            "oops",
        ),
        (
            "[    3.0] Oops: general protection fault, 0000 [#1]",
            "oops",
        ),
        (
            "[    3.0] general protection fault, probably for non-canonical address",
            "oops",
        ),
        (
            "[    3.0] WARNING: possible circular locking dependency detected",
            "lock order (lockdep)",
        ),
        (
            "[    3.0] WARNING: possible recursive locking detected",
            "lock order (lockdep)",
        ),
        (
            "[    3.0] WARNING: inconsistent lock state",
            "lock state (lockdep)",
        ),
        (
            "[    3.0] WARNING: suspicious RCU usage",
            "RCU misuse (lockdep)",
        ),
        (
            "[    3.0] WARNING: CPU: 0 PID: 1 at kernel/fork.c:1 f+0x1/0x2",
            "kernel warning",
        ),
        (
            "[    3.0] UBSAN: array-index-out-of-bounds in a.c:1:2",
            "undefined behaviour (UBSAN)",
        ),
        (
            "[    3.0] refcount_t: underflow; use-after-free.",
            "reference count misuse",
        ),
        (
            "[    3.0] INFO: lockdep is turned off.",
            "lockdep turned off",
        ),
        (
            "[    3.0] Out of memory: Killed process 12 (x) total-vm:1kB",
            "out of memory",
        ),
        ("BUG: without a time stamp", "BUG"),
    ];
    for (line, kind) in cases {
        assert_eq!(fault_in(line), Some(kind), "{line}");
        assert_eq!(fault_in(&format!("{line}\r")), Some(kind), "{line}");
    }
}

#[test]
fn what_kernels_say_in_good_health_is_no_fault() {
    for line in [
        "",
        "[    0.000000] Linux version 6.12.117 (x@y) #1 SMP",
        "[    0.1] RETBleed: WARNING: Spectre v2 mitigation leaves CPU vulnerable",
        "[    0.1] rcu: Hierarchical RCU implementation.",
        "[    0.1] rcu: INFO or so",
        "[    0.1] kvm: Nested Virtualization enabled",
        "[    0.1] x[12]: segfault at 0 ip 0 sp 0 error 4",
        "[    0.1] Lock dependency validator: Copyright (c) 2006 Red Hat",
        "[    0.1] kasan: KernelAddressSanitizer initialized (generic)",
        "[    0.1] @ioregion-vm broken: BUG: said by a program",
        "[    0.1] debug: unmapping init memory 0x0-0x1 BUG:",
    ] {
        assert_eq!(fault_in(line), None, "{line}");
    }
}

fn console(kernel: &str, reports: &str) -> Console {
    let mut console = Console::default();
    kernel.lines().for_each(|line| console.kernel_line(line));
    reports
        .lines()
        .for_each(|line| _ = console.report_line(line));
    console
}

const GOOD: &str = "@ioregion-vm kvm usable\n\
    @ioregion-vm start order\nrunning 2 tests\ntest a ... ok\n\
    test result: ok. 2 passed; 0 failed; 0 ignored\n\n\
    @ioregion-vm end order 1500 exit 0\n\
    @ioregion-vm verdict 1 of 1\n";

#[test]
fn good_run_has_no_failures() {
    let console = console("[ 0.1] hello\n", GOOD);
    assert_eq!(console.failures(1), Vec::<String>::new());
    assert_eq!(console.kvm, Some(Ok(())));
    assert_eq!((console.ran[0].tests, console.ran[0].millis), (2, 1500));
    assert!(super::Console::default().failures(0)[0].contains("without a verdict"));
    let empty = self::console("", "@ioregion-vm verdict 0 of 0\n");
    assert_eq!(empty.failures(0), Vec::<String>::new());
}

#[test]
fn kernel_fault_fails_a_run_whose_programs_passed() {
    let failures = console("fine\n[ 1.0] WARNING: CPU: 0 PID: 1 at x\n", GOOD).failures(1);
    assert_eq!(failures.len(), 1);
    assert!(
        failures[0].contains("kernel warning, line 2"),
        "{failures:?}"
    );
}

#[test]
fn verdict_that_does_not_count_every_program_fails() {
    let failures = console("", GOOD).failures(2);
    assert_eq!(failures, ["1 of 1 programs passed, not 2"]);
    let none = console("", "@ioregion-vm verdict 1 of 1\n").failures(1);
    assert_eq!(none.len(), 1);
}

#[test]
fn failed_tests_are_named() {
    let text = "@ioregion-vm start order\n\
        test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n    indented\nError: x\n\n\
        failures:\n    a\n    deep::b\n\n\
        test result: FAILED. 1 passed; 2 failed; 0 ignored\n    not_a_test\n\n\
        @ioregion-vm end order 9 exit 101\n\
        @ioregion-vm verdict 0 of 1\n";
    let console = console("", text);
    assert_eq!(console.ran[0].failed, ["a", "deep::b"]);
    assert_eq!(console.ran[0].tests, 3);
    assert_eq!(console.failures(1), ["order: exit 101: a, deep::b"]);
}

#[test]
fn vm_that_ends_in_the_middle_of_a_program_fails() {
    let panic = "[ 5.0] Kernel panic - not syncing: x\n";
    let failures = console(panic, "@ioregion-vm start order\nrunning\n").failures(1);
    assert_eq!(failures.len(), 3, "{failures:?}");
    assert!(failures[0].contains("panic"));
    assert!(failures[1].contains("order: the VM ended before it did"));
}

#[test]
fn failed_tests_of_the_kernel_are_named() {
    let text = "@ioregion-vm start kernel-selftests\nok errnos (3 ms)\n\
        FAIL many (load.c:5): x\nFAILED many (9 ms)\nVERDICT FAIL: 2 tests, 1 failed\n\
        @ioregion-vm end kernel-selftests 12 exit 1\n\
        @ioregion-vm verdict 0 of 1\n";
    let console = console("", text);
    assert_eq!(console.ran[0].tests, 2);
    assert_eq!(console.failures(1), ["kernel-selftests: exit 1: many"]);
}

#[test]
fn damaged_result_file_fails_a_run_whose_programs_passed() {
    let file = "@ioregion-vm file x.json 2 0\n@ioregion-vm data 00\n";
    let failures = console("", &format!("{file}{GOOD}")).failures(1);
    assert_eq!(failures.len(), 1, "{failures:?}");
    assert!(failures[0].contains("x.json"), "{failures:?}");
}
