//! Which system calls a process may make, and with which arguments.

use std::collections::{BTreeMap, BTreeSet};

use libc::{
    CLONE_THREAD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL, PR_SET_NAME, PROT_EXEC,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use syscalls::Sysno;

use crate::error::Error;
use crate::user::User;

/// `PR_SET_VMA`: libraries name their memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What every process here needs: memory, threads, waiting, descriptors that are open, its end.
const BASE: &[Sysno] = &[
    Sysno::brk,
    Sysno::madvise,
    Sysno::mremap,
    Sysno::munmap,
    Sysno::exit,
    Sysno::exit_group,
    Sysno::futex,
    Sysno::get_robust_list,
    Sysno::getcpu,
    Sysno::getpid,
    Sysno::gettid,
    Sysno::membarrier,
    Sysno::restart_syscall,
    Sysno::rseq,
    Sysno::sched_getaffinity,
    Sysno::sched_yield,
    Sysno::set_robust_list,
    Sysno::rt_sigaction,
    Sysno::rt_sigprocmask,
    Sysno::rt_sigreturn,
    Sysno::sigaltstack,
    Sysno::clock_getres,
    Sysno::clock_gettime,
    Sysno::clock_nanosleep,
    Sysno::gettimeofday,
    Sysno::nanosleep,
    Sysno::getrandom,
    Sysno::epoll_create,
    Sysno::epoll_create1,
    Sysno::epoll_ctl,
    Sysno::epoll_pwait,
    Sysno::epoll_wait,
    Sysno::eventfd2,
    Sysno::poll,
    Sysno::ppoll,
    Sysno::close,
    Sysno::dup,
    Sysno::fstat,
    Sysno::lseek,
    Sysno::read,
    Sysno::readv,
    Sysno::write,
    Sysno::writev,
];

/// Work on files that are open.
const FILES: &[Sysno] = &[
    Sysno::fallocate,
    Sysno::fdatasync,
    Sysno::flock,
    Sysno::fsync,
    Sysno::pread64,
    Sysno::preadv,
    Sysno::preadv2,
    Sysno::pwrite64,
    Sysno::pwritev,
    Sysno::pwritev2,
    Sysno::sync_file_range,
];

/// Opening files and looking at them by path.
const PATHS: &[Sysno] = &[
    Sysno::access,
    Sysno::creat,
    Sysno::faccessat,
    Sysno::faccessat2,
    Sysno::getcwd,
    Sysno::lstat,
    Sysno::open,
    Sysno::openat,
    Sysno::openat2,
    Sysno::readlink,
    Sysno::readlinkat,
    Sysno::stat,
    Sysno::statfs,
];

/// A condition on an argument: its place, the bits that are looked at, and what they must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bits {
    argument: u8,
    len: Len,
    mask: u64,
    value: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Len {
    /// An `int`: what the upper half holds says nothing.
    Half,
    Whole,
}

impl Bits {
    fn int(argument: u8, value: u64) -> Self {
        Self {
            argument,
            len: Len::Half,
            mask: u32::MAX.into(),
            value,
        }
    }

    fn masked(argument: u8, mask: u64, value: u64) -> Self {
        Self {
            argument,
            len: Len::Whole,
            mask,
            value,
        }
    }

    fn condition(&self) -> Result<SeccompCondition, BackendError> {
        let len = match self.len {
            Len::Half => SeccompCmpArgLen::Dword,
            Len::Whole => SeccompCmpArgLen::Qword,
        };
        let masked = SeccompCmpOp::MaskedEq(self.mask);
        SeccompCondition::new(self.argument, len, masked, self.value)
    }
}

/// The system calls that a process may make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calls {
    /// By number; where there are groups of conditions, all of one group must hold.
    allowed: BTreeMap<Sysno, Vec<Vec<Bits>>>,
    /// Those that fail with an error.
    refused: BTreeMap<Sysno, libc::c_int>,
}

impl Calls {
    fn base() -> Self {
        let mut calls = Self {
            allowed: BASE.iter().map(|&call| (call, Vec::new())).collect(),
            refused: BTreeMap::new(),
        };
        let ints = |argument, values: &[libc::c_int]| {
            let int = |&value: &libc::c_int| Bits::int(argument, value.cast_unsigned().into());
            values.iter().map(int).collect::<Vec<_>>()
        };
        let flag = |flag: libc::c_int| u64::from(flag.cast_unsigned());
        // Threads, no processes; a library that cannot see its flags' place takes the old call.
        let threads = Bits::masked(0, flag(CLONE_THREAD), flag(CLONE_THREAD));
        calls.only(Sysno::clone, vec![threads]);
        calls.refuse(&[Sysno::clone3], libc::ENOSYS);
        // No code but the program's own.
        let data = Bits::masked(2, flag(PROT_EXEC), 0);
        calls.only(Sysno::mmap, vec![data]);
        calls.only(Sysno::mprotect, vec![data]);
        let descriptors = [F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL];
        calls.only(Sysno::fcntl, ints(1, &descriptors));
        let mut names = ints(0, &[PR_SET_NAME]);
        names.push(Bits::int(0, PR_SET_VMA));
        calls.only(Sysno::prctl, names);
        // Limits are read, not set.
        calls.only(Sysno::prlimit64, vec![Bits::masked(2, u64::MAX, 0)]);
        // Of descriptors: what such a call sees of paths it could see by its errors, too.
        let of_descriptor = flag(libc::AT_EMPTY_PATH);
        calls.only(
            Sysno::newfstatat,
            vec![Bits::masked(3, of_descriptor, of_descriptor)],
        );
        calls.only(
            Sysno::statx,
            vec![Bits::masked(2, of_descriptor, of_descriptor)],
        );
        // Whoever aborts, or breaks a rule, signals itself: see `signalling`.
        calls
    }

    /// What serves a device: memory, threads, and files that are open.
    #[must_use]
    pub fn service() -> Self {
        Self::base().and(FILES)
    }

    /// What a process needs that asks the kernel for changes by netlink, and does nothing else.
    #[must_use]
    pub fn netlink() -> Self {
        let mut calls = Self::base().and(&[
            Sysno::bind,
            Sysno::getsockname,
            Sysno::getsockopt,
            Sysno::recvfrom,
            Sysno::recvmsg,
            Sysno::sendmsg,
            Sysno::sendto,
            Sysno::setsockopt,
        ]);
        let netlink = u64::from(libc::AF_NETLINK.cast_unsigned());
        calls.only(Sysno::socket, vec![Bits::int(0, netlink)]);
        calls
    }

    /// Rings of io_uring, too. What their requests do, the rules for calls do not see.
    #[must_use]
    pub fn io_uring(self) -> Self {
        self.and(&[
            Sysno::io_uring_enter,
            Sysno::io_uring_register,
            Sysno::io_uring_setup,
        ])
    }

    /// Receiving by sockets that are open, descriptors among it, too.
    #[must_use]
    pub fn receiving(self) -> Self {
        self.and(&[Sysno::recvmsg])
    }

    /// These requests to devices (`ioctl`), too.
    #[must_use]
    pub fn requests(mut self, requests: &[u64]) -> Self {
        // A call without conditions would be allowed whatever it asks for.
        for &request in requests {
            let alternatives = self.allowed.entry(Sysno::ioctl).or_default();
            alternatives.push(vec![Bits::int(1, request)]);
        }
        self
    }

    fn and(mut self, calls: &[Sysno]) -> Self {
        self.allowed
            .extend(calls.iter().map(|&call| (call, Vec::new())));
        self
    }

    /// Allows a call where one of these conditions holds.
    fn only(&mut self, call: Sysno, conditions: Vec<Bits>) {
        let alone = conditions.into_iter().map(|condition| vec![condition]);
        self.allowed.insert(call, alone.collect());
    }

    fn refuse(&mut self, calls: &[Sysno], errno: libc::c_int) {
        self.refused.extend(calls.iter().map(|&call| (call, errno)));
    }

    /// Calls with paths: those that other rules judge are allowed, or all fail.
    pub(crate) fn paths(mut self, judged: bool) -> Self {
        match judged {
            // By path, too.
            true => self.and(PATHS).and(&[Sysno::newfstatat, Sysno::statx]),
            false => {
                self.refuse(PATHS, libc::EACCES);
                self
            }
        }
    }

    /// With the removal of files.
    pub(crate) fn removing(self) -> Self {
        self.and(&[Sysno::unlinkat])
    }

    /// With files that are open given to this user.
    pub(crate) fn giving(mut self, user: User) -> Self {
        let owner = Bits::int(1, user.uid().as_raw().into());
        let group = Bits::int(2, user.gid().as_raw().into());
        self.allowed.insert(Sysno::fchown, vec![vec![owner, group]]);
        self
    }

    /// With signals to this process, which libraries end it by.
    pub(crate) fn signalling(mut self, process: u32) -> Self {
        self.only(Sysno::tgkill, vec![Bits::int(0, process.into())]);
        self
    }

    /// Filters, all of which judge each call: the sternest one decides.
    pub(crate) fn programs(&self) -> Result<Vec<BpfProgram>, Error> {
        let failed = |error: BackendError| Error::Filter(error.to_string());
        let arch = TargetArch::x86_64;
        let number = |call: Sysno| i64::from(call.id());
        let mut programs = Vec::new();
        let errors: BTreeSet<_> = self.refused.values().copied().collect();
        for errno in errors {
            let of_this = self.refused.iter().filter(|&(_, &own)| own == errno);
            let rules = of_this.map(|(&call, _)| (number(call), Vec::new()));
            let action = SeccompAction::Errno(errno.cast_unsigned());
            let filter = SeccompFilter::new(rules.collect(), SeccompAction::Allow, action, arch);
            programs.push(filter.and_then(TryInto::try_into).map_err(failed)?);
        }
        let mut rules = BTreeMap::new();
        for (&call, conditions) in &self.allowed {
            let alternatives = conditions.iter().map(|group| {
                let group = group.iter().map(Bits::condition);
                SeccompRule::new(group.collect::<Result<_, _>>()?)
            });
            let alternatives = alternatives.collect::<Result<_, _>>().map_err(failed)?;
            rules.insert(number(call), alternatives);
        }
        // Judged by the filters above.
        rules.extend(self.refused.keys().map(|&call| (number(call), Vec::new())));
        let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, arch);
        programs.push(filter.and_then(TryInto::try_into).map_err(failed)?);
        Ok(programs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_fit_the_kernel() {
        let calls = Calls::service()
            .io_uring()
            .requests(&[1, 2, 3])
            .paths(false)
            .removing()
            .giving(User::NOBODY)
            .signalling(1);
        for program in calls.programs().unwrap() {
            // BPF_MAXINSNS.
            assert!(!program.is_empty() && program.len() <= 4096);
        }
    }

    #[test]
    fn no_call_that_gives_new_rights_is_on_any_list() {
        let lists = [BASE, FILES, PATHS].concat();
        for call in [
            Sysno::bpf,
            Sysno::connect,
            Sysno::execve,
            Sysno::execveat,
            Sysno::fork,
            Sysno::kill,
            Sysno::memfd_create,
            Sysno::mount,
            Sysno::pidfd_getfd,
            Sysno::process_vm_writev,
            Sysno::ptrace,
            Sysno::setuid,
            Sysno::unshare,
            Sysno::userfaultfd,
            Sysno::vfork,
        ] {
            assert!(!lists.contains(&call), "{call}");
        }
    }
}
