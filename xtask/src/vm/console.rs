//! Reading what a VM says: the kernel's log for faults, the report line for results.

use ioregion_init::{Ending, Report};

use super::results::Results;
use crate::outcome::tests_in;

/// What kernels write at the beginning of a message about a fault of their own, and what to call
/// it. The first that fits counts.
const FAULTS: &[(&str, &str)] = &[
    ("Kernel panic", "panic"),
    ("BUG: KASAN", "memory error (KASAN)"),
    ("BUG: KFENCE", "memory error (KFENCE)"),
    ("BUG: soft lockup", "soft lockup"),
    ("BUG: workqueue lockup", "workqueue lockup"),
    ("BUG: sleeping function called", "sleep in atomic context"),
    ("BUG: scheduling while atomic", "sleep in atomic context"),
    ("BUG:", "BUG"),
    ("kernel BUG at", "BUG"),
    ("Watchdog detected hard LOCKUP", "hard lockup"),
    ("INFO: rcu", "RCU stall"),
    ("INFO: task ", "hung task"),
    ("INFO: trying to register non-static key", "lock misuse"),
    ("INFO: lockdep is turned off", "lockdep turned off"),
    ("WARNING: possible ", "lock order (lockdep)"),
    ("WARNING: inconsistent lock state", "lock state (lockdep)"),
    ("WARNING: bad unlock balance", "lock state (lockdep)"),
    ("WARNING: suspicious RCU usage", "RCU misuse (lockdep)"),
    ("WARNING: suspicious", "lock misuse (lockdep)"),
    ("WARNING: ", "kernel warning"),
    ("DEBUG_LOCKS_WARN_ON", "lock misuse"),
    ("KASAN: ", "memory error (KASAN)"),
    ("UBSAN: ", "undefined behaviour (UBSAN)"),
    ("ODEBUG: ", "object misuse"),
    ("list_add corruption", "list corruption"),
    ("list_del corruption", "list corruption"),
    ("refcount_t: ", "reference count misuse"),
    ("Oops", "oops"),
    ("general protection fault", "oops"),
    ("invalid opcode:", "oops"),
    ("divide error:", "oops"),
    ("stack segment:", "oops"),
    ("double fault:", "oops"),
    ("Unable to handle kernel", "oops"),
    ("unregister_netdevice: waiting for", "reference leak"),
    ("kmemleak: ", "memory leak"),
    ("Out of memory: Killed process", "out of memory"),
    ("Memory cgroup out of memory", "out of memory"),
];

/// Prefixes that kernels put before such a message.
const SPEAKERS: &[&str] = &[
    "watchdog: ",
    "NMI watchdog: ",
    "rcu: ",
    "------------[ cut here ]",
];

/// The kind of kernel fault that a line of the kernel's log tells of.
pub fn fault_in(line: &str) -> Option<&'static str> {
    let mut text = line.trim();
    // "[   12.345678][  T123] message", with or without the caller.
    while let Some((_, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        text = rest.trim_start();
    }
    for speaker in SPEAKERS {
        text = text.strip_prefix(speaker).unwrap_or(text);
    }
    // What our own first process notes there is not the kernel's.
    let fault = FAULTS.iter().find(|(start, _)| text.starts_with(start));
    fault.map(|&(_, kind)| kind)
}

/// A kernel fault: what kind, and where in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// In words.
    pub kind: &'static str,
    /// The line that told of it.
    pub line: String,
    /// That line's number in the log, from 1.
    pub number: usize,
}

/// What became of one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// The job's name.
    pub name: String,
    /// How it ended; `None` if the VM ended first.
    pub ending: Option<Ending>,
    /// Run time in milliseconds of the VM's clock.
    pub millis: u64,
    /// Tests that ran in it, if it is a test program.
    pub tests: u64,
    /// The tests that failed.
    pub failed: Vec<String>,
}

/// Everything that a VM said so far.
#[derive(Debug, Default)]
pub struct Console {
    /// Programs in the order of their start.
    pub ran: Vec<Ran>,
    /// Kernel faults in order.
    pub faults: Vec<Fault>,
    /// Whether VMs can be made in the VM; `None` before the first process said so.
    pub kvm: Option<Result<(), String>>,
    /// Programs that succeeded, of how many.
    pub verdict: Option<(usize, usize)>,
    /// Why the first process gave up.
    pub broken: Option<String>,
    /// Files that programs left behind.
    pub results: Results,
    kernel_lines: usize,
    /// Whether the lines are a test program's list of failures.
    in_failures: bool,
}

impl Console {
    /// Takes a line of the kernel's log.
    pub fn kernel_line(&mut self, line: &str) {
        self.kernel_lines += 1;
        if let Some(kind) = fault_in(line) {
            self.faults.push(Fault {
                kind,
                line: line.trim().into(),
                number: self.kernel_lines,
            });
        }
    }

    /// Takes a line of the report line; the report that it holds, or `None` for a program's own.
    pub fn report_line(&mut self, line: &str) -> Option<Report> {
        let report = Report::parse(line);
        match &report {
            None => self.program_line(line.trim_end()),
            Some(Report::Next) => {}
            Some(Report::Kvm(kvm)) => self.kvm = Some(kvm.clone()),
            Some(Report::Start { name }) => {
                self.in_failures = false;
                self.ran.push(Ran {
                    name: name.clone(),
                    ending: None,
                    millis: 0,
                    tests: 0,
                    failed: Vec::new(),
                });
            }
            Some(Report::End {
                name,
                millis,
                ending,
            }) => {
                if let Some(ran) = self.ran.last_mut().filter(|ran| ran.name == *name) {
                    ran.ending = Some(ending.clone());
                    ran.millis = *millis;
                }
            }
            Some(Report::File {
                name,
                size,
                checksum,
            }) => self.results.begin(name, *size, *checksum),
            Some(Report::Data(bytes)) => self.results.data(bytes),
            Some(Report::Verdict { passed, total }) => self.verdict = Some((*passed, *total)),
            Some(Report::Broken(why)) => self.broken = Some(why.clone()),
        }
        report
    }

    fn program_line(&mut self, line: &str) {
        let Some(ran) = self.ran.last_mut() else {
            return;
        };
        if let Some(tests) = tests_in(line) {
            ran.tests += tests;
            self.in_failures = false;
        } else if let Some((name, _)) = line
            .strip_prefix("FAILED ")
            .and_then(|rest| rest.split_once(" ("))
        {
            // The kernel's tests: "FAILED name (12 ms)".
            ran.failed.push(name.into());
        } else if line == "failures:" {
            // Printed twice: before the failures' output, and before their names alone.
            ran.failed.clear();
            self.in_failures = true;
        } else if self.in_failures
            && let Some(name) = line.strip_prefix("    ")
            && !name.contains(char::is_whitespace)
        {
            ran.failed.push(name.into());
        }
    }

    /// Why the run failed, one reason per item; empty where it passed.
    pub fn failures(&self, expected: usize) -> Vec<String> {
        let mut why: Vec<String> = Vec::new();
        if let Some(broken) = &self.broken {
            why.push(format!("the VM's first process gave up: {broken}"));
        }
        for Fault { kind, line, number } in self.faults.iter().take(5) {
            why.push(format!("kernel: {kind}, line {number} of its log: {line}"));
        }
        if self.faults.len() > 5 {
            why.push(format!(
                "and {} more lines like these",
                self.faults.len() - 5
            ));
        }
        for ran in &self.ran {
            let Ran { name, failed, .. } = ran;
            let tests = match failed.len() {
                0 => String::new(),
                _ => format!(": {}", failed.join(", ")),
            };
            match &ran.ending {
                Some(ending) if ending.passed() => {}
                Some(ending) => why.push(format!("{name}: {ending}{tests}")),
                None => why.push(format!("{name}: the VM ended before it did")),
            }
        }
        why.extend(self.results.failures());
        match self.verdict {
            // A program of which nothing was said did not run.
            Some((passed, total)) if total != expected || passed != self.ran.len() => {
                if why.is_empty() {
                    why.push(format!(
                        "{passed} of {total} programs passed, not {expected}"
                    ));
                }
            }
            Some(_) => {}
            None => why.push("the VM ended without a verdict".into()),
        }
        why
    }
}

#[cfg(test)]
mod tests;
