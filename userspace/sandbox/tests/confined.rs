//! What confined processes can do, and what they cannot.

mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use ioregion_sandbox::{Calls, Confinement, Error, FileAccess, User, fork};
use libc::c_long;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use support::{FIONREAD, alone, attempt, call, hold, is_root, path, service};

#[test]
fn forbidden_system_calls_end_the_process_and_are_named() {
    let _alone = alone();
    let words = [0u64; 16];
    let memory = words.as_ptr() as c_long;
    let stack = (words.as_ptr() as c_long) + 64;
    let arguments = [path(c"/bin/true"), 0];
    let own = c_long::from(std::process::id().cast_signed());
    let rwx = c_long::from(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let private = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let listed: &[(&str, c_long, [c_long; 6])] = &[
        ("socket", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        ("socket", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
        ("socket", libc::SYS_socket, [16, 3, 0, 0, 0, 0]),
        ("connect", libc::SYS_connect, [0, memory, 16, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0; 6]),
        (
            "execve",
            libc::SYS_execve,
            [arguments[0], arguments.as_ptr() as c_long, 0, 0, 0, 0],
        ),
        (
            "execveat",
            libc::SYS_execveat,
            [-100, arguments[0], 0, 0, 0, 0],
        ),
        (
            "mount",
            libc::SYS_mount,
            [path(c"x"), path(c"/"), path(c"tmpfs"), 0, 0, 0],
        ),
        ("bpf", libc::SYS_bpf, [0, memory, 72, 0, 0, 0]),
        (
            "unshare",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0, 0],
        ),
        ("setns", libc::SYS_setns, [0; 6]),
        ("chroot", libc::SYS_chroot, [path(c"/"), 0, 0, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, [0; 6]),
        ("capset", libc::SYS_capset, [memory, memory, 0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [own, 0, 0, 0, 0, 0]),
        // The test's process: of threads, only the own may be signalled.
        ("tgkill", libc::SYS_tgkill, [own, own, 0, 0, 0, 0]),
        ("pidfd_open", libc::SYS_pidfd_open, [own, 0, 0, 0, 0, 0]),
        (
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [own, 0, 0, 0, 0, 0],
        ),
        (
            "memfd_create",
            libc::SYS_memfd_create,
            [path(c"x"), 0, 0, 0, 0, 0],
        ),
        (
            "perf_event_open",
            libc::SYS_perf_event_open,
            [memory, 0, -1, -1, 0, 0],
        ),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0; 6]),
        (
            "init_module",
            libc::SYS_init_module,
            [memory, 8, memory, 0, 0, 0],
        ),
        ("unlink", libc::SYS_unlink, [path(c"/x"), 0, 0, 0, 0, 0]),
        ("fork", libc::SYS_fork, [0; 6]),
        ("vfork", libc::SYS_vfork, [0; 6]),
        (
            "clone",
            libc::SYS_clone,
            [libc::SIGCHLD.into(), stack, 0, 0, 0, 0],
        ),
        ("mmap", libc::SYS_mmap, [0, 4096, rwx, private, -1, 0]),
        (
            "mprotect",
            libc::SYS_mprotect,
            [memory & !4095, 4096, rwx, 0, 0, 0],
        ),
        (
            "ioctl",
            libc::SYS_ioctl,
            [0, libc::TIOCSTI.cast_signed(), memory, 0, 0, 0],
        ),
        (
            "fcntl",
            libc::SYS_fcntl,
            [0, libc::F_SETOWN.into(), own, 0, 0, 0],
        ),
        (
            "prctl",
            libc::SYS_prctl,
            [libc::PR_SET_DUMPABLE.into(), 1, 0, 0, 0, 0],
        ),
        (
            "prlimit64",
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NOFILE.into(), memory, 0, 0, 0],
        ),
        ("seccomp", libc::SYS_seccomp, [0; 6]),
    ];
    for &(name, number, arguments) in listed {
        attempt(service(), || call(number, arguments).map(drop)).was_ended_by(name);
    }
    // One that has no name yet.
    attempt(service(), || call(2000, [0; 6]).map(drop)).was_ended_by("an unknown call");
    assert_eq!(words, [0; 16]);
}

#[test]
fn files_cannot_be_opened() {
    let _alone = alone();
    for name in [
        c"/etc/passwd",
        c"/proc/self/mem",
        c"/dev/null",
        c"/",
        c".",
        c"../x",
    ] {
        let open = || call(libc::SYS_openat, [-100, path(name), 0, 0, 0, 0]).map(drop);
        attempt(service(), open).failed(Errno::EACCES);
    }
}

#[test]
fn one_file_can_be_opened_where_that_is_allowed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    for path in [&one, &other] {
        File::create(path).unwrap().write_all(b"content").unwrap();
    }
    let mode = |path: &std::path::Path, write: bool| {
        let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        let flags = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let open = [-100, path.as_ptr() as c_long, flags.into(), 0, 0, 0];
        let result = call(libc::SYS_openat, open);
        result.map(drop)
    };
    // As the user that the files belong to: Landlock alone decides.
    let confined = |access| Confinement::new(Calls::service()).file(&one, access);
    let read = || confined(FileAccess::Read);
    attempt(read(), || mode(&one, false)).succeeded();
    attempt(read(), || mode(&one, true)).failed(Errno::EACCES);
    attempt(read(), || mode(&other, false)).failed(Errno::EACCES);
    attempt(read(), || mode(dir.path(), false)).failed(Errno::EACCES);
    let write = || confined(FileAccess::ReadWrite);
    attempt(write(), || mode(&one, true)).succeeded();
    attempt(write(), || mode(&other, true)).failed(Errno::EACCES);

    let nowhere = Confinement::new(Calls::service()).file(&dir.path().join("x"), FileAccess::Read);
    attempt(nowhere, || Ok(())).was_not_confined("/x, which is to be allowed");
}

#[test]
fn what_a_service_does_goes_on() {
    let _alone = alone();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before").unwrap();
    let work = || {
        let raw =
            |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let mut bytes = [0; 6];
        file.read_exact_at(&mut bytes, 0).map_err(raw)?;
        file.write_all_at(b"after", 1 << 20).map_err(raw)?;
        file.sync_data().map_err(raw)?;
        nix::fcntl::fallocate(
            &file,
            nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
            4096,
            4096,
        )?;
        file.metadata().map_err(raw)?;
        let mut waiting = 0;
        // SAFETY: The request writes one `int`. Of a file that is none it may not know.
        unsafe { libc::ioctl(file.as_raw_fd(), FIONREAD, &raw mut waiting) };
        // Threads with names, heaps and stacks of their own; one panics, with a backtrace.
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let name = format!("thread-{number}");
                let work = move || {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    vec![number; 1 << 20].iter().sum::<usize>()
                };
                std::thread::Builder::new()
                    .name(name)
                    .spawn(work)
                    .map_err(raw)
            })
            .collect::<Result<_, _>>()?;
        for (number, thread) in threads.into_iter().enumerate() {
            if thread.join().ok() != Some(number << 20) {
                return Err(Errno::ECHILD);
            }
        }
        let panics = std::thread::spawn(|| {
            let _ = std::backtrace::Backtrace::force_capture();
            panic!("of the test");
        });
        match panics.join() {
            Err(_) => Ok(()),
            Ok(()) => Err(Errno::ECHILD),
        }
    };
    attempt(service(), work).succeeded();
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 1 << 20).unwrap();
    assert_eq!(bytes, *b"after");
}

#[test]
fn kernel_says_that_the_process_has_no_rights() {
    let _alone = alone();
    let mut held = hold(|| service().apply(), || Ok(()));
    // Waits until it is confined.
    assert_eq!(held.says("NoNewPrivs"), "1");
    assert_eq!(held.says("Seccomp"), "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(held.says(set), "0000000000000000", "{set}");
    }
    if is_root() {
        let nobody = ["65534"; 4].join("\t");
        assert_eq!(
            (held.says("Uid"), held.says("Gid")),
            (nobody.clone(), nobody)
        );
        assert_eq!(held.says("Groups"), "");
        assert_eq!(held.says("CapBnd"), "0000000000000000");
        let spaces = |of: &str| {
            ["net", "ipc"].map(|name| std::fs::read_link(format!("/proc/{of}/ns/{name}")).unwrap())
        };
        let (own, its) = (spaces("self"), spaces(&held.pid().to_string()));
        assert!(own.iter().zip(&its).all(|(own, its)| own != its), "{its:?}");
        let root = std::fs::read_link(format!("/proc/{}/root", held.pid())).unwrap();
        assert!(root.to_str().unwrap().ends_with(" (deleted)"), "{root:?}");
    }
    held.end().succeeded();
}

#[test]
fn users_are_for_root_to_choose() {
    let _alone = alone();
    let leave = || {
        if is_root() {
            nix::unistd::setuid(User::NOBODY.uid()).unwrap();
        }
    };
    let other = || {
        leave();
        let confinement = Confinement::new(Calls::service()).user(User::NOBODY);
        assert!(matches!(
            confinement.clone().apply(),
            Err(Error::NotRoot(_))
        ));
        confinement.apply()
    };
    hold(other, || Ok(()))
        .end()
        .was_not_confined("only root can");
    // Without one the rest is taken away all the same.
    let own = || {
        leave();
        Confinement::new(Calls::service()).isolated().apply()
    };
    hold(own, || call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]).map(drop))
        .end()
        .was_ended_by("socket");
}

#[test]
fn threads_come_after_the_rules() {
    let _alone = alone();
    let confine = || {
        let (tell, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        let refused = Confinement::new(Calls::service()).apply();
        assert!(matches!(refused, Err(Error::Threads(2))), "{refused:?}");
        assert!(matches!(fork(|_| 0), Err(Error::Threads(2))));
        drop(tell);
        thread.join().unwrap().unwrap_err();
        // The kernel may count it a little longer.
        while matches!(fork(|_| 0), Err(Error::Threads(_))) {}
        Confinement::new(Calls::service()).apply()
    };
    hold(confine, || Ok(())).end().succeeded();
}

#[test]
fn aborts_are_still_aborts() {
    let _alone = alone();
    // SAFETY: Ends the process.
    let ended = attempt(service(), || unsafe { libc::abort() });
    assert!(
        matches!(ended.status, WaitStatus::Signaled(_, Signal::SIGABRT, _)),
        "{ended:?}"
    );
}

#[test]
fn process_for_netlink_has_netlink_and_nothing_else() {
    let _alone = alone();
    let keeper = || Confinement::new(Calls::netlink()).net_admin().isolated();
    let socket = |family: libc::c_int| {
        move || call(libc::SYS_socket, [family.into(), 3, 0, 0, 0, 0]).map(drop)
    };
    attempt(keeper(), socket(libc::AF_NETLINK)).succeeded();
    attempt(keeper(), socket(libc::AF_INET)).was_ended_by("socket");
    attempt(keeper(), || call(libc::SYS_fsync, [0; 6]).map(drop)).was_ended_by("fsync");
    let mut held = hold(|| keeper().apply(), || Ok(()));
    let net_admin = if is_root() { 1u64 << 12 } else { 0 };
    assert_eq!(held.says("CapEff"), format!("{net_admin:016x}"));
    assert_eq!(held.says("CapPrm"), format!("{net_admin:016x}"));
    held.end().succeeded();
}

#[test]
fn second_process_hears_of_the_first_ones_end_and_the_first_of_its() {
    let _alone = alone();
    let first = || {
        let child = fork(|socket| {
            let mut bytes = [0; 8];
            loop {
                match nix::unistd::read(&socket, &mut bytes) {
                    Ok(0) | Err(_) => return 0,
                    Ok(read) if bytes[..read] == *b"end" => return 3,
                    Ok(read) => {
                        bytes[..read].reverse();
                        nix::unistd::write(&socket, &bytes[..read]).unwrap();
                    }
                }
            }
        });
        let child = child?;
        let mut bytes = [0; 8];
        for word in [&b"abc"[..], b"x"] {
            nix::unistd::write(&child, word).unwrap();
            let read = nix::unistd::read(&child, &mut bytes).unwrap();
            assert!(bytes[..read].iter().eq(word.iter().rev()));
        }
        nix::unistd::write(&child, b"end").unwrap();
        assert_eq!(nix::unistd::read(&child, &mut bytes), Ok(0));
        let status = waitpid(child.pid(), None).unwrap();
        assert!(matches!(status, WaitStatus::Exited(_, 3)), "{status:?}");
        // One that ends because this process lets go of it.
        let child = fork(|socket| {
            let _ = nix::unistd::read(&socket, &mut [0; 8]);
            4
        })?;
        let pid = child.pid();
        drop(child);
        let status = waitpid(pid, None).unwrap();
        assert!(matches!(status, WaitStatus::Exited(_, 4)), "{status:?}");
        // A panic ends it and nothing else.
        let child = fork(|_| panic!("of the test"))?;
        let status = waitpid(child.pid(), None).unwrap();
        assert!(matches!(status, WaitStatus::Exited(_, 101)), "{status:?}");
        Ok(())
    };
    hold(first, || Ok(())).end().succeeded();
}
