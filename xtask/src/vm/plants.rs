//! Faults planted on purpose: a run that passes means something only if these do not.

use clap::ValueEnum;

use super::qemu::Run;
use ioregion_init::Ending;

/// A fault and how it must be noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// A program that fails
    Failure,
    /// A program that dies of a signal
    Abort,
    /// A program that never ends
    Hang,
    /// A kernel panic
    Panic,
    /// A kernel warning (debug kernel)
    Warning,
    /// A read of freed kernel memory (debug kernel)
    UseAfterFree,
    /// A call that may sleep, from an interrupt (debug kernel)
    AtomicSleep,
    /// A CPU that spins in the kernel (debug kernel)
    SoftLockup,
}

impl Plant {
    /// Every fault, or those that every kernel can have.
    pub fn all(debug_kernel: bool) -> Vec<Self> {
        let plants = Self::value_variants().iter().copied();
        plants
            .filter(|plant| debug_kernel || !plant.needs_debug_kernel())
            .collect()
    }

    /// Whether only a kernel with the dump test module (LKDTM) and checkers can have it.
    pub fn needs_debug_kernel(self) -> bool {
        match self {
            Self::Failure | Self::Abort | Self::Hang | Self::Panic => false,
            Self::Warning | Self::UseAfterFree | Self::AtomicSleep | Self::SoftLockup => true,
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Arguments of the `plant` program.
    pub fn args(self) -> Vec<String> {
        let words: &[&str] = match self {
            Self::Failure => &["fail"],
            Self::Abort => &["abort"],
            Self::Hang => &["hang"],
            Self::Panic => &["write", "/proc/sysrq-trigger", "c"],
            Self::Warning => &["write", PROVOKE, "WARNING"],
            Self::UseAfterFree => &["write", PROVOKE, "READ_AFTER_FREE"],
            // Allocates memory as only a task may, in the handler of an interrupt.
            Self::AtomicSleep => &["write", PROVOKE_IN_INTERRUPT, "SLAB_INIT_ON_ALLOC"],
            Self::SoftLockup => &["write", PROVOKE, "SOFTLOCKUP"],
        };
        words.iter().map(ToString::to_string).collect()
    }

    /// Further kernel parameters: what would take minutes is noticed sooner.
    pub fn append(self) -> Option<&'static str> {
        (self == Self::SoftLockup).then_some("watchdog_thresh=2")
    }

    /// Seconds until the program is killed.
    pub fn limit_s(self) -> u32 {
        match self {
            Self::Hang => 3,
            _ => 120,
        }
    }

    /// Whether the run was failed for this fault, not for another reason.
    pub fn is_noticed(self, run: &Run) -> bool {
        let ended = |ending| {
            let ending = Some(ending);
            run.console.ran.iter().any(|ran| ran.ending == ending)
        };
        // ABRT is 6 on every Linux.
        match self {
            Self::Failure => ended(Ending::Exit(1)),
            Self::Abort => ended(Ending::Signal(6)),
            Self::Hang => ended(Ending::Timeout),
            Self::Panic => run.has_fault("panic"),
            Self::Warning => run.has_fault("kernel warning"),
            Self::UseAfterFree => run.has_fault("memory error (KASAN)"),
            Self::AtomicSleep => run.has_fault("sleep in atomic context"),
            Self::SoftLockup => run.has_fault("soft lockup"),
        }
    }
}

const PROVOKE: &str = "/sys/kernel/debug/provoke-crash/DIRECT";
const PROVOKE_IN_INTERRUPT: &str = "/sys/kernel/debug/provoke-crash/INT_HW_IRQ_EN";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::console::Console;
    use crate::vm::qemu::Ended;
    use std::time::Duration;

    fn run(kernel: &str, report: &str) -> Run {
        let mut console = Console::default();
        console.kernel_line(kernel);
        console.report_line("@ioregion-vm start plant");
        console.report_line(report);
        Run {
            console,
            ended: Ended::ByItself,
            time: Duration::ZERO,
            stopped: Duration::ZERO,
        }
    }

    #[test]
    fn each_fault_is_noticed_as_itself_only() {
        let runs = [
            (Plant::Failure, run("", "@ioregion-vm end plant 1 exit 1")),
            (Plant::Abort, run("", "@ioregion-vm end plant 1 signal 6")),
            (Plant::Hang, run("", "@ioregion-vm end plant 1 timeout")),
            (Plant::Panic, run("Kernel panic - not syncing: x", "")),
            (Plant::Warning, run("WARNING: CPU: 1 PID: 1 at x", "")),
            (
                Plant::UseAfterFree,
                run("BUG: KASAN: slab-use-after-free in x", ""),
            ),
            (
                Plant::AtomicSleep,
                run("BUG: sleeping function called from x", ""),
            ),
            (
                Plant::SoftLockup,
                run("watchdog: BUG: soft lockup - CPU#0", ""),
            ),
        ];
        assert_eq!(runs.len(), Plant::all(true).len());
        for (plant, _) in &runs {
            for (other, run) in &runs {
                assert_eq!(plant.is_noticed(run), plant == other, "{plant:?} {other:?}");
            }
        }
        let good = run("", "@ioregion-vm end plant 1 exit 0");
        assert!(
            Plant::all(true)
                .iter()
                .all(|plant| !plant.is_noticed(&good))
        );
    }

    #[test]
    fn ordinary_kernels_have_the_faults_that_need_no_help() {
        assert_eq!(Plant::all(false).len(), 4);
        assert!(Plant::all(false).contains(&Plant::Panic));
        assert_eq!(Plant::UseAfterFree.name(), "use-after-free");
    }
}
