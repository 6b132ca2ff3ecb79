//! Starting QEMU and watching it until the VM's verdict, its death or the end of its time.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ioregion_init::Report;

use super::console::Console;
use super::share::Dealer;
use crate::sh::Cmd;

/// The emulator.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How often the VM is looked after.
const TICK: Duration = Duration::from_millis(20);
/// From power on to the first report: slow hosts need seconds, debug kernels half a minute.
const BOOT: Duration = Duration::from_secs(180);
/// From the verdict to power off.
const POWER_OFF: Duration = Duration::from_secs(30);

/// What runs the VM's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's emulation, with AMD's virtualization emulated too.
    Emulation,
    /// The same with CPUs that run at the same time.
    Parallel,
    /// Emulation in which time is the count of instructions, each 2^`shift` ns.
    Counted {
        /// 0 to 10.
        shift: u8,
    },
    /// This machine's KVM.
    Kvm,
}

/// A VM to start.
#[derive(Debug, Clone)]
pub struct Machine {
    /// bzImage or PVH ELF file.
    pub image: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// What runs it.
    pub accelerator: Accelerator,
    /// Further kernel parameters.
    pub append: Vec<String>,
    /// What answers it which program is next, where it shares them with other VMs.
    pub dealer: Option<Arc<Dealer>>,
}

/// Where a VM's output goes.
#[derive(Debug)]
pub struct Logs {
    /// The kernel's.
    pub kernel: PathBuf,
    /// Reports and what programs print.
    pub programs: PathBuf,
    /// What QEMU itself says.
    pub qemu: PathBuf,
}

impl Logs {
    /// Three files in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self {
            kernel: dir.join("kernel.log"),
            programs: dir.join("programs.log"),
            qemu: dir.join("qemu.log"),
        }
    }
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// QEMU ended with status 0: power off, or a reboot after a panic.
    ByItself,
    /// QEMU failed.
    Qemu(ExitStatus),
    /// The first process did not report in time.
    NoBoot,
    /// The time limit was over.
    TimeLimit,
    /// It gave its verdict but did not power off.
    NoPowerOff,
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    /// What the VM said.
    pub console: Console,
    /// How it ended.
    pub ended: Ended,
    /// From the start of QEMU to the verdict, or else to its end.
    pub time: Duration,
    /// How long somebody had stopped QEMU meanwhile; no limit counts that time.
    pub stopped: Duration,
}

impl Machine {
    /// Kernel parameters. Faults end the VM at once; the thresholds of the watchdogs allow for
    /// hosts that stand still for a while.
    fn parameters(&self) -> String {
        let mut parameters = String::from(
            "console=ttyS0,115200 loglevel=7 panic=-1 oops=panic softlockup_panic=1 \
             hung_task_panic=1 watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=240 \
             sysctl.kernel.panic_on_rcu_stall=1 sysctl.kernel.hung_task_timeout_secs=300 \
             no_timer_check printk.devkmsg=on",
        );
        if let Accelerator::Counted { .. } = self.accelerator {
            parameters.push_str(" nokaslr norandmaps");
        }
        for parameter in &self.append {
            parameters.push(' ');
            parameters.push_str(parameter);
        }
        parameters
    }

    /// The command that starts it.
    pub fn command(&self, logs: &Logs) -> Cmd {
        let base = "-M q35 -nodefaults -no-user-config -display none -no-reboot";
        let accelerator = match self.accelerator {
            // CPUs in turn: in parallel they lose races with code that Linux rewrites, and nested
            // guests get exceptions that nothing caused.
            Accelerator::Emulation => "-accel tcg,thread=single -cpu EPYC,+svm".into(),
            Accelerator::Parallel => "-accel tcg,thread=multi -cpu EPYC,+svm".into(),
            Accelerator::Counted { shift } => format!(
                "-accel tcg,thread=single -cpu EPYC,+svm -icount shift={shift},sleep=off \
                 -rtc base=2026-01-01,clock=vm -seed 1"
            ),
            Accelerator::Kvm => "-accel kvm -cpu host".into(),
        };
        let serial = |file: &Path| format!("file:{}", file.display());
        // A file when nothing comes in: that cannot disturb counted time.
        let reports = match &self.dealer {
            Some(_) => "stdio".into(),
            None => serial(&logs.programs),
        };
        Cmd::new(PROGRAM)
            .args(base.split_whitespace())
            .args(accelerator.split_whitespace())
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-serial", &serial(&logs.kernel)])
            .args(["-serial", &reports])
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &self.parameters()])
    }

    /// Runs it for `limit` at most. `show` gets each line of the programs with the report that
    /// it is, if it is one, and nothing where there is no line, several times a second.
    pub fn run(
        &self,
        logs: &Logs,
        limit: Duration,
        mut show: impl FnMut(Option<&str>, Option<&Report>),
    ) -> Result<Run> {
        for log in [&logs.kernel, &logs.programs] {
            File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        }
        let mut kernel = Tail::new(&logs.kernel)?;
        let mut programs = Tail::new(&logs.programs)?;
        let command = self.command(logs).tied_to_us();
        let mut qemu = Killed(match &self.dealer {
            Some(_) => command.spawn_asked(&logs.programs, &logs.qemu)?,
            None => command.spawn(&logs.qemu)?,
        });
        let started = Instant::now();
        let mut console = Console::default();
        let (mut stopped, mut verdict_at) = (Duration::ZERO, None);
        let mut last = started;
        let ended = loop {
            // First look whether it is over, then read: what it said last is read in any case.
            let over = qemu.0.try_wait().context("waiting for QEMU")?;
            for line in kernel.lines(over.is_some())? {
                console.kernel_line(&line);
            }
            for line in programs.lines(over.is_some())? {
                let report = console.report_line(&line);
                if report == Some(Report::Next) {
                    self.answer(&mut qemu.0);
                }
                show(Some(&line), report.as_ref());
            }
            show(None, None);
            let now = Instant::now();
            if is_stopped(qemu.0.id()) {
                stopped += now - last;
            }
            last = now;
            let run = (now - started).saturating_sub(stopped);
            if verdict_at.is_none() && console.verdict.is_some() {
                verdict_at = Some((now - started, run));
            }
            match over {
                Some(status) if status.success() => break Ended::ByItself,
                Some(status) => break Ended::Qemu(status),
                None if verdict_at.is_some_and(|(_, at)| run > at + POWER_OFF) => {
                    break Ended::NoPowerOff;
                }
                None if console.kvm.is_none() && console.broken.is_none() && run > BOOT => {
                    break Ended::NoBoot;
                }
                None if run > limit => break Ended::TimeLimit,
                None => std::thread::sleep(TICK),
            }
        };
        let time = verdict_at.map_or(started.elapsed(), |(time, _)| time);
        Ok(Run {
            console,
            ended,
            time,
            stopped,
        })
    }

    /// Tells it which program is next. Where that fails the VM is gone, which is found out anyway.
    fn answer(&self, qemu: &mut Child) {
        if let (Some(dealer), Some(stdin)) = (&self.dealer, &mut qemu.stdin) {
            let _ = writeln!(stdin, "{}", dealer.deal());
        }
    }
}

impl Run {
    /// Whether the kernel told of a fault of this kind.
    pub fn has_fault(&self, kind: &str) -> bool {
        self.console.faults.iter().any(|fault| fault.kind == kind)
    }

    /// Why the run failed, one reason per item; empty where it passed.
    pub fn failures(&self, expected: usize, limit: Duration) -> Vec<String> {
        let mut why = Vec::new();
        match &self.ended {
            Ended::ByItself => {}
            Ended::Qemu(status) => why.push(format!("{PROGRAM} failed: {status}")),
            Ended::NoBoot => why.push(format!(
                "the VM's first process did not report within {} s",
                BOOT.as_secs()
            )),
            Ended::TimeLimit => why.push(format!(
                "not done after {} s; --timeout sets the limit",
                limit.as_secs()
            )),
            Ended::NoPowerOff => why.push("the VM did not power off after its verdict".into()),
        }
        why.extend(self.console.failures(expected));
        why
    }
}

/// Kills the process when it goes out of scope.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Whether somebody stopped a process by a signal.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| state_of(&stat) == Some('T'))
}

/// The state in a process's `stat` file: after the name, which may contain anything.
fn state_of(stat: &str) -> Option<char> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().chars().next()
}

/// Reads a growing file line by line.
struct Tail {
    file: File,
    partial: Vec<u8>,
}

impl Tail {
    /// Longer lines are cut: a program may print no line end for ever.
    const LONGEST: usize = 1 << 16;

    fn new(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self {
            file,
            partial: Vec::new(),
        })
    }

    /// The lines that are complete since; `rest`: also the one that is not.
    fn lines(&mut self, rest: bool) -> Result<Vec<String>> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).context("reading a log")?;
        let mut lines = Vec::new();
        let mut end_line = |partial: &mut Vec<u8>| {
            let line = String::from_utf8_lossy(partial);
            lines.push(line.trim_end_matches('\r').to_owned());
            partial.clear();
        };
        for byte in bytes {
            if byte == b'\n' || self.partial.len() == Self::LONGEST {
                end_line(&mut self.partial);
            }
            if byte != b'\n' {
                self.partial.push(byte);
            }
        }
        if rest && !self.partial.is_empty() {
            end_line(&mut self.partial);
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(accelerator: Accelerator) -> Machine {
        Machine {
            image: "/k/vmlinuz".into(),
            initrd: "/k/initramfs".into(),
            cpus: 2,
            memory_mib: 1024,
            accelerator,
            append: vec!["watchdog_thresh=5".into()],
            dealer: None,
        }
    }

    #[test]
    fn command_line_follows_the_accelerator() {
        let line = |accelerator| {
            let command = machine(accelerator).command(&Logs::new(Path::new("/l")));
            command.to_string()
        };
        let emulated = line(Accelerator::Emulation);
        for part in [
            "tcg,thread=single",
            "EPYC,+svm",
            "-smp 2",
            "file:/l/kernel.log",
        ] {
            assert!(emulated.contains(part), "{part}: {emulated}");
        }
        assert!(
            emulated.contains("watchdog_thresh=60 ") && emulated.ends_with("watchdog_thresh=5'")
        );
        assert!(!emulated.contains("nokaslr"));
        let counted = line(Accelerator::Counted { shift: 3 });
        for part in [
            "shift=3,sleep=off",
            "clock=vm",
            "-seed 1",
            "nokaslr norandmaps",
        ] {
            assert!(counted.contains(part), "{part}: {counted}");
        }
        assert!(line(Accelerator::Parallel).contains("tcg,thread=multi"));
        assert!(line(Accelerator::Kvm).contains("-accel kvm -cpu host"));
    }

    #[test]
    fn growing_file_is_read_by_lines() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut tail = Tail::new(file.path()).unwrap();
        file.write_all(b"one\r\ntw").unwrap();
        assert_eq!(tail.lines(false).unwrap(), ["one"]);
        assert!(tail.lines(false).unwrap().is_empty());
        file.write_all(b"o\n\nthree").unwrap();
        assert_eq!(tail.lines(false).unwrap(), ["two", ""]);
        assert_eq!(tail.lines(true).unwrap(), ["three"]);
        file.write_all(&vec![b'x'; Tail::LONGEST + 5]).unwrap();
        let lines = tail.lines(true).unwrap();
        assert_eq!(
            lines.iter().map(String::len).collect::<Vec<_>>(),
            [1 << 16, 5]
        );
    }

    #[test]
    fn state_is_read_behind_a_name_that_contains_parentheses() {
        assert_eq!(state_of("12 (a) R (b) T 1 2"), Some('T'));
        assert_eq!(state_of("12 (a) S 1"), Some('S'));
        assert_eq!(state_of("12"), None);
        assert!(!is_stopped(std::process::id()));
    }

    #[test]
    fn stopped_process_is_noticed() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = sleeper.id().to_string();
        let stop = std::process::Command::new("kill")
            .args(["-STOP", &pid])
            .status();
        assert!(stop.unwrap().success());
        let end = Instant::now() + Duration::from_secs(10);
        while !is_stopped(sleeper.id()) {
            assert!(Instant::now() < end, "never seen as stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    }
}
