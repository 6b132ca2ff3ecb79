//! System calls made by another process: what its rules say to them, it says itself.
//!
//! A thread that sleeps in a system call is stopped and made to carry out another one, and then
//! finds its own interrupted, as by a signal.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use libc::{c_long, user_regs_struct};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What became of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was carried out, perhaps with an error.
    Returned(Result<i64, Errno>),
    /// It was not, and SIGSYS would end the process.
    Forbidden,
}

/// An argument.
#[derive(Debug, Clone, Copy)]
pub enum Word<'a> {
    Number(i64),
    /// The address of these bytes, with a zero behind.
    Bytes(&'a [u8]),
}

impl From<i64> for Word<'_> {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl<'a> From<&'a str> for Word<'a> {
    fn from(text: &'a str) -> Self {
        Self::Bytes(text.as_bytes())
    }
}

/// A thread that sleeps in a system call, stopped.
pub struct Stopped {
    thread: Pid,
    memory: File,
    before: user_regs_struct,
}

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

impl Stopped {
    /// Stops a process's first thread.
    pub fn new(process: Pid) -> Self {
        ptrace::seize(process, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(process).unwrap();
        let stopped = wait(process);
        assert!(
            matches!(stopped, WaitStatus::PtraceEvent(_, Signal::SIGTRAP, _)),
            "{stopped:?}"
        );
        let memory = format!("/proc/{process}/mem");
        let memory = File::options().read(true).write(true).open(memory).unwrap();
        let before = ptrace::getregs(process).unwrap();
        let mut instruction = [0; 2];
        memory
            .read_exact_at(&mut instruction, before.rip - 2)
            .unwrap();
        assert_eq!(instruction, SYSCALL, "it is in no system call");
        Self {
            thread: process,
            memory,
            before,
        }
    }

    /// Has the thread make a system call, and nothing come of it where it is forbidden.
    pub fn call(&self, number: c_long, words: &[Word<'_>]) -> Outcome {
        self.start(number, words);
        let status = fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
        let pending = u64::from_str_radix(pending.unwrap().trim(), 16).unwrap();
        if pending & 1 << (Signal::SIGSYS as u32 - 1) == 0 {
            let result = ptrace::getregs(self.thread).unwrap().rax.cast_signed();
            return Outcome::Returned(match result {
                -4095..0 => Err(Errno::from_raw(i32::try_from(-result).unwrap())),
                result => Ok(result),
            });
        }
        ptrace::cont(self.thread, None).unwrap();
        let stopped = wait(self.thread);
        assert_eq!(stopped, WaitStatus::Stopped(self.thread, Signal::SIGSYS));
        Outcome::Forbidden
    }

    /// Has the thread make a forbidden system call, and all come of it that does.
    pub fn call_and_end(self, number: c_long, words: &[Word<'_>]) {
        self.start(number, words);
        let thread = self.thread;
        // What it does about the signal is its own business.
        std::mem::forget(self);
        ptrace::detach(thread, None).unwrap();
    }

    fn start(&self, number: c_long, words: &[Word<'_>]) {
        let mut regs = self.before;
        regs.rip -= 2;
        // The call that it was in is not begun again.
        regs.orig_rax = u64::MAX;
        regs.rax = number.cast_unsigned();
        // Far below what the thread uses of its stack.
        let mut free = (regs.rsp - (1 << 14)) & !4095;
        let mut values = [0; 6];
        for (value, word) in values.iter_mut().zip(words) {
            *value = match *word {
                Word::Number(number) => number.cast_unsigned(),
                Word::Bytes(bytes) => {
                    let bytes = [bytes, &[0]].concat();
                    free -= (bytes.len() as u64).next_multiple_of(16);
                    self.memory.write_all_at(&bytes, free).unwrap();
                    free
                }
            };
        }
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = values;
        ptrace::setregs(self.thread, regs).unwrap();
        for _ in ["on its way in", "on its way out"] {
            ptrace::syscall(self.thread, None).unwrap();
            let stopped = wait(self.thread);
            assert_eq!(stopped, WaitStatus::PtraceSyscall(self.thread));
        }
    }
}

impl Drop for Stopped {
    /// Lets the thread go on.
    fn drop(&mut self) {
        let mut regs = self.before;
        // As if by a signal; whether the kernel begins it again is not left to chance.
        regs.rax = (-i64::from(libc::EINTR)).cast_unsigned();
        regs.orig_rax = u64::MAX;
        let gone_on = ptrace::setregs(self.thread, regs);
        let gone_on = gone_on.and_then(|()| ptrace::detach(self.thread, None));
        if !std::thread::panicking() {
            gone_on.unwrap();
        }
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}
