//! Several VMs that share the programs of one manifest: an emulated VM keeps one CPU of this
//! machine busy, however many it has itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};

use super::options::VmArgs;
use super::qemu::{Accelerator, Logs, Machine, Run};
use super::show::{Screen, Shown};

/// More VMs would wait for the longest program.
const MOST: usize = 4;
/// Programs for which another VM is worth its boot.
const EACH: usize = 4;
/// What a VM takes beyond its own memory, in MiB.
const OVERHEAD_MIB: u64 = 512;

/// Deals out the programs.
#[derive(Debug, Default)]
pub struct Dealer {
    next: AtomicUsize,
}

impl Dealer {
    /// The number of a program that no VM has got.
    pub fn deal(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// How many VMs run `jobs` programs, each of them worth its boot.
pub fn vms(accelerator: Accelerator, args: &VmArgs, jobs: usize) -> usize {
    let room = room(accelerator, args);
    match args.vms {
        Some(_) => room,
        None => room.min(jobs / EACH).max(1),
    }
}

/// How many VMs run at the same time: one for each CPU and the memory of this machine, unless the
/// arguments say. VMs whose time or whose CPUs are this machine's run alone.
pub fn room(accelerator: Accelerator, args: &VmArgs) -> usize {
    if accelerator != Accelerator::Emulation {
        return 1;
    }
    if let Some(vms) = args.vms {
        return vms.into();
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let fit = available_mib(&meminfo) / (u64::from(args.mem) + OVERHEAD_MIB);
    let fit = usize::try_from(fit).unwrap_or(MOST);
    MOST.min(cpus).min(fit).max(1)
}

/// Memory that programs can have, from `/proc/meminfo`.
fn available_mib(meminfo: &str) -> u64 {
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

/// Runs VMs at the same time, at least one, and shows what they say.
pub fn run(vms: &[(Machine, Logs)], limit: Duration) -> Result<Vec<Run>> {
    let screen = &Screen::new(vms.len());
    let several = vms.len() > 1;
    let watch = |number, (machine, logs): &(Machine, Logs)| {
        let mut shown = Shown::new(screen, several.then_some(number));
        machine.run(logs, limit, |line, report| shown.show(line, report))
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = vms
            .iter()
            .enumerate()
            .map(|(number, vm)| scope.spawn(move || watch(number, vm)))
            .collect();
        let ended = started.into_iter().map(|vm| vm.join());
        ended
            .map(|run| run.unwrap_or_else(|_| bail!("what watches a VM panicked")))
            .collect()
    })
}

/// Why the run of `jobs` programs failed, one reason per item; empty where it passed.
pub fn failures(runs: &[Run], jobs: usize, limit: Duration) -> Vec<String> {
    let [run] = runs else {
        let ran = |run: &Run| run.console.ran.len();
        let each = runs.iter().flat_map(|run| run.failures(ran(run), limit));
        let mut why: Vec<String> = each.collect();
        let all: usize = runs.iter().map(ran).sum();
        if all != jobs {
            why.push(format!("{all} of {jobs} programs were run"));
        }
        return why;
    };
    run.failures(jobs, limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::options::KernelChoice;

    #[test]
    fn each_program_is_dealt_once() {
        let dealer = Dealer::default();
        assert_eq!([dealer.deal(), dealer.deal(), dealer.deal()], [0, 1, 2]);
    }

    #[test]
    fn only_emulated_vms_with_many_programs_share_them() {
        let mut args = VmArgs::plain(KernelChoice::Stock);
        assert_eq!(vms(Accelerator::Emulation, &args, 3), 1);
        assert_eq!(vms(Accelerator::Kvm, &args, 100), 1);
        assert_eq!(vms(Accelerator::Counted { shift: 3 }, &args, 100), 1);
        args.vms = Some(3);
        assert_eq!(vms(Accelerator::Emulation, &args, 100), 3);
        assert_eq!(vms(Accelerator::Counted { shift: 3 }, &args, 100), 1);
        args.vms = None;
        args.mem = u32::MAX;
        assert_eq!(vms(Accelerator::Emulation, &args, 100), 1);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    2048000 kB\n";
        assert_eq!(available_mib(text), 2000);
        assert_eq!(available_mib(""), 0);
    }
}
