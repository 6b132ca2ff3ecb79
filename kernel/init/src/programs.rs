//! Running programs one after the other, as the process that inherits every orphan.

use std::fs::{self, File};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ioregion_init::{Ending, Job, RESULTS, RESULTS_VARIABLE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::os::fd::AsFd as _;

/// What programs get that the manifest does not change.
const ENV: &[(&str, &str)] = &[
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/tmp"),
    ("RUST_BACKTRACE", "1"),
    (RESULTS_VARIABLE, RESULTS),
];

/// Starts programs and reaps everything that dies.
pub struct Children<'a> {
    output: &'a File,
    env: &'a [(String, String)],
    deaths: SignalFd,
}

impl<'a> Children<'a> {
    /// Programs write to `output`.
    pub fn new(output: &'a File, env: &'a [(String, String)]) -> Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        // Blocked, the signal waits in the descriptor; children start with nothing blocked.
        mask.thread_block().context("blocking SIGCHLD")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let deaths = SignalFd::with_flags(&mask, flags).context("signalfd")?;
        Ok(Self {
            output,
            env,
            deaths,
        })
    }

    /// Runs one program to its end or to the end of its time, then kills what it left behind.
    pub fn run(&mut self, job: &Job) -> (Ending, Duration) {
        let started = Instant::now();
        let ending = match self.start(job) {
            Ok(child) => {
                let end = started + Duration::from_secs(job.limit_s.into());
                self.wait(child, end).unwrap_or_else(|| {
                    // Best effort: the verdict does not depend on it.
                    let _ = write!(&mut &*self.output, "{}", threads_of(child));
                    Ending::Timeout
                })
            }
            Err(error) => Ending::NotStarted(format!("{error:#}")),
        };
        let time = started.elapsed();
        self.kill_all();
        (ending, time)
    }

    fn start(&self, job: &Job) -> Result<Pid> {
        let [program, args @ ..] = &job.argv[..] else {
            anyhow::bail!("no program");
        };
        let child = Command::new(program)
            .args(args)
            .env_clear()
            .envs(ENV.iter().copied())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir("/tmp")
            .stdin(Stdio::null())
            .stdout(self.output.try_clone()?)
            .stderr(self.output.try_clone()?)
            .spawn()
            .with_context(|| program.clone())?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }

    /// Reaps until `child` ends; `None` where it does not in time.
    fn wait(&mut self, child: Pid, end: Instant) -> Option<Ending> {
        loop {
            // The descriptor says only that somebody died since: look after emptying it.
            while let Ok(Some(_)) = self.deaths.read_signal() {}
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                match status {
                    WaitStatus::StillAlive => break,
                    WaitStatus::Exited(pid, status) if pid == child => {
                        return Some(Ending::Exit(status));
                    }
                    WaitStatus::Signaled(pid, signal, _) if pid == child => {
                        return Some(Ending::Signal(signal as i32));
                    }
                    _ => {}
                }
            }
            let left = end.checked_duration_since(Instant::now())?;
            // At least a millisecond: rounded down to nothing the last one would be spun away.
            let left = PollTimeout::try_from(left.max(Duration::from_millis(1)))
                .unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.deaths.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, left);
        }
    }

    /// Kills and reaps every other process, so that no program disturbs the next.
    fn kill_all(&self) {
        loop {
            // -1: every process but the first.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            match waitpid(None, None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// Where each thread of a program that does not end is: its state, the CPU time that it has used
/// (in ticks), and what it waits for, a line each.
fn threads_of(program: Pid) -> String {
    let mut lines = format!("\nnot done in time; threads of {program}:\n");
    let tasks = fs::read_dir(format!("/proc/{program}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        // Behind the name, which may hold anything: state, then from the 12th field on the times.
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .split_whitespace()
            .collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or("?");
        let kernel: Vec<_> = read("stack")
            .lines()
            .map(str::trim)
            .map(str::to_owned)
            .collect();
        lines += &format!(
            "  {} {} {}: user {}, system {}, call {}; {}\n",
            task.file_name().display(),
            read("comm").trim(),
            field(0),
            field(11),
            field(12),
            read("syscall").trim(),
            kernel.join(" < "),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_program_are_listed_with_their_state() {
        let lines = threads_of(Pid::this());
        let own = nix::unistd::gettid();
        let line = lines
            .lines()
            .find(|line| line.contains(&format!("  {own} ")));
        let line = line.unwrap_or_else(|| panic!("{lines}"));
        assert!(
            line.contains(" R: user ") && line.contains("call "),
            "{line}"
        );
    }
}
