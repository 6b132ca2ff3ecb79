//! What a running service and its keeper may do, and what happens to the device when either is
//! killed.
//!
//! Runs where VDUSE and its drivers are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_confined`.

mod support;

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::{VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV};
use ioregion_vduse::{Control, vdpa};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::inject::{Outcome, Stopped, Word};
use support::net::{NetService, ping};
use support::{LONG, MIB, Service, command, disk_named, driver, image, wait, write_and_compare};

/// A line of what the kernel says of a process or thread.
fn says(process: &Path, name: &str) -> String {
    let text = fs::read_to_string(process.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim_start_matches(':').trim().into()
}

fn folder(process: Pid) -> std::path::PathBuf {
    Path::new("/proc").join(process.to_string())
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// The keeper: the service's only child.
fn keeper(service: &Child) -> Pid {
    let parent = service.id().to_string();
    let mut children = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.unwrap();
        let number = entry.file_name().to_str()?.parse().ok()?;
        let text = fs::read_to_string(entry.path().join("status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        (line.trim() == parent).then(|| Pid::from_raw(number))
    });
    let keeper = children.next().unwrap();
    assert_eq!(children.next(), None);
    keeper
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn waits_for_a_successor(name: &str) {
    assert!(Path::new("/dev/vduse").join(name).exists());
    assert!(vdpa::is_attached(name));
}

#[test]
fn service_and_keeper_keep_what_they_need_and_no_more() {
    for (options, ids) in [
        (&["--user", "1234:1235", "--queues", "2"][..], (1234, 1235)),
        (&["--no-io-uring"], (65534, 65534)),
        (&[][..], (65534, 65534)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 4 * MIB);
        // The service's user may not open it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let mut service = Service::start("confined", &path, options);
        write_and_compare(&service, &path, 4);

        let process = folder(pid(&service.child));
        let (uid, gid) = (ids.0.to_string(), ids.1.to_string());
        let mut threads = 0;
        for thread in fs::read_dir(process.join("task")).unwrap() {
            let thread = thread.unwrap().path();
            assert_eq!(says(&thread, "Uid"), [&*uid; 4].join("\t"));
            assert_eq!(says(&thread, "Gid"), [&*gid; 4].join("\t"));
            assert_eq!(says(&thread, "Groups"), "");
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(says(&thread, set), "0000000000000000", "{set}");
            }
            assert_eq!(says(&thread, "NoNewPrivs"), "1");
            assert_eq!(says(&thread, "Seccomp"), "2");
            threads += 1;
        }
        assert!(threads > 2, "{threads}");
        let network = |of: &Path| fs::read_link(of.join("ns/net")).unwrap();
        assert_ne!(network(&process), network(Path::new("/proc/self")));
        let device = fs::metadata("/dev/vduse/confined").unwrap();
        assert_eq!((device.uid(), device.gid()), ids);
        assert_eq!(device.mode() & 0o777, 0o600);

        let keeper = folder(keeper(&service.child));
        // CAP_CHOWN and CAP_NET_ADMIN.
        let kept = format!("{:016x}", 1 << 12 | 1);
        for (set, expected) in [
            ("CapPrm", kept.as_str()),
            ("CapEff", &kept),
            ("CapInh", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
        ] {
            assert_eq!(says(&keeper, set), expected, "{set}");
        }
        assert_eq!(says(&keeper, "NoNewPrivs"), "1");
        assert_eq!(says(&keeper, "Seccomp"), "2");
        assert_eq!(says(&keeper, "Threads"), "1");
        // At rest the keeper has neither the image nor the device open.
        let open: Vec<_> = fs::read_dir(keeper.join("fd"))
            .unwrap()
            .map(|entry| fs::read_link(entry.unwrap().path()).unwrap())
            .collect();
        let device = Path::new("/dev/vduse/confined");
        assert!(!open.contains(&path) && !open.iter().any(|of| of == device));

        let rss = |of: &Path| -> u64 {
            let kib = says(of, "VmRSS");
            kib.trim_end_matches(" kB").parse().unwrap()
        };
        let (own, its) = (rss(&process), rss(&keeper));
        println!("{options:?}: resident {own} KiB, keeper {its} KiB");
        assert!(own + its <= 16 * 1024, "{own} and {its} KiB");

        // All that a service has to do later works in there, too.
        for round in 0..3 {
            driver("unbind", "confined");
            driver("bind", "confined");
            service.disk = disk_named("serial-confined", || {});
            write_and_compare(&service, &path, 1 + round);
        }
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(8 * MIB).unwrap();
        service.resized(8 * MIB);
        write_and_compare(&service, &path, 8);
        service.end();
    }
}

#[track_caller]
fn is_forbidden(process: &Stopped, name: &str, number: libc::c_long, words: &[Word<'_>]) {
    let outcome = process.call(number, words);
    assert_eq!(outcome, Outcome::Forbidden, "{name}");
}

#[track_caller]
fn is_refused(process: &Stopped, path: &str, number: libc::c_long, words: &[Word<'_>]) {
    let refused = Outcome::Returned(Err(Errno::EACCES));
    assert_eq!(process.call(number, words), refused, "{path}");
}

/// Calls that neither process may make, tried by it.
fn nobody_may(process: &Stopped, own: Pid) {
    let own = i64::from(own.as_raw());
    // The rules, not the way of trying.
    let outcome = process.call(libc::SYS_getpid, &[]);
    assert_eq!(outcome, Outcome::Returned(Ok(own)));
    let number = |number: i32| Word::from(i64::from(number));
    let forbidden: &[(&str, libc::c_long, &[Word<'_>])] = &[
        (
            "socket",
            libc::SYS_socket,
            &[number(libc::AF_INET), 1.into(), 0.into()],
        ),
        (
            "socket",
            libc::SYS_socket,
            &[number(libc::AF_UNIX), 1.into(), 0.into()],
        ),
        (
            "connect",
            libc::SYS_connect,
            &[0.into(), "1234567812345678".into(), 16.into()],
        ),
        (
            "execve",
            libc::SYS_execve,
            &["/proc/self/exe".into(), 0.into(), 0.into()],
        ),
        ("fork", libc::SYS_fork, &[]),
        ("clone", libc::SYS_clone, &[number(libc::SIGCHLD), 0.into()]),
        (
            "ptrace",
            libc::SYS_ptrace,
            &[number(16), 1.into(), 0.into(), 0.into()],
        ),
        ("kill", libc::SYS_kill, &[1.into(), 0.into()]),
        ("pidfd_open", libc::SYS_pidfd_open, &[1.into(), 0.into()]),
        ("process_vm_readv", libc::SYS_process_vm_readv, &[1.into()]),
        (
            "mount",
            libc::SYS_mount,
            &["x".into(), "/".into(), "tmpfs".into()],
        ),
        ("chroot", libc::SYS_chroot, &["/".into()]),
        ("unshare", libc::SYS_unshare, &[number(libc::CLONE_NEWUSER)]),
        ("setns", libc::SYS_setns, &[0.into(), 0.into()]),
        ("setuid", libc::SYS_setuid, &[0.into()]),
        ("capset", libc::SYS_capset, &["12345678".into(), 0.into()]),
        ("bpf", libc::SYS_bpf, &[0.into()]),
        (
            "init_module",
            libc::SYS_init_module,
            &["x".into(), 1.into(), "".into()],
        ),
        (
            "memfd_create",
            libc::SYS_memfd_create,
            &["x".into(), 0.into()],
        ),
        ("unlink", libc::SYS_unlink, &["/x".into()]),
        ("rename", libc::SYS_rename, &["/x".into(), "/y".into()]),
        ("mkdir", libc::SYS_mkdir, &["/x".into(), 0o700.into()]),
        ("chmod", libc::SYS_chmod, &["/x".into(), 0o777.into()]),
        (
            "chown",
            libc::SYS_chown,
            &["/x".into(), 1234.into(), 1234.into()],
        ),
        ("fchown", libc::SYS_fchown, &[0.into(), 0.into(), 0.into()]),
        (
            "ioctl",
            libc::SYS_ioctl,
            &[0.into(), libc::TIOCSTI.cast_signed().into(), "x".into()],
        ),
        (
            "mmap",
            libc::SYS_mmap,
            &[0.into(), 4096.into(), 7.into(), 0x22.into(), (-1).into()],
        ),
        (
            "prctl",
            libc::SYS_prctl,
            &[number(libc::PR_SET_DUMPABLE), 1.into()],
        ),
        (
            "prlimit64",
            libc::SYS_prlimit64,
            &[0.into(), 7.into(), "0123456789abcdef".into()],
        ),
    ];
    for (name, number, words) in forbidden {
        is_forbidden(process, name, *number, words);
    }
}

#[test]
fn service_is_refused_what_its_rules_forbid_and_goes_on() {
    for (name, options) in [("tried", &[][..]), ("tried-at-once", &["--no-io-uring"])] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, 2 * MIB);
        let service = Service::start(name, &path, options);
        write_and_compare(&service, &path, 2);
        let own = pid(&service.child);
        let process = Stopped::new(own);
        nobody_may(&process, own);
        // Nor devices, sockets to the kernel, rings that it does not use.
        for request in [VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV] {
            let words = [3.into(), request.cast_signed().into(), "".into()];
            is_forbidden(&process, "ioctl", libc::SYS_ioctl, &words);
        }
        let netlink = i64::from(libc::AF_NETLINK);
        let words = [netlink.into(), 3.into(), 16.into()];
        is_forbidden(&process, "socket", libc::SYS_socket, &words);
        let words = [3.into(), 65534.into(), 65534.into()];
        is_forbidden(&process, "fchown", libc::SYS_fchown, &words);
        let ring = process.call(libc::SYS_io_uring_setup, &[0.into(), 0.into()]);
        match options.is_empty() {
            true => assert_eq!(ring, Outcome::Returned(Err(Errno::EFAULT))),
            false => assert_eq!(ring, Outcome::Forbidden),
        }
        // No path leads anywhere.
        let image = path.to_str().unwrap();
        let device = format!("/dev/vduse/{name}");
        let at = i64::from(libc::AT_FDCWD);
        for path in [
            image,
            &device,
            "/dev/vduse/control",
            "/proc/self/mem",
            "/",
            ".",
        ] {
            let words = [at.into(), path.into(), 0.into()];
            is_refused(&process, path, libc::SYS_openat, &words);
            is_refused(&process, path, libc::SYS_readlink, &[path.into(), 0.into()]);
        }
        drop(process);
        write_and_compare(&service, &path, 2);
        service.end();
    }
}

#[test]
fn keeper_is_refused_what_its_rules_forbid_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 2 * MIB);
    let log = dir.path().join("logs/log");
    let options = ["--log", log.to_str().unwrap()];
    let service = Service::start("tried-keeper", &path, &options);
    let own = keeper(&service.child);
    let process = Stopped::new(own);
    nobody_may(&process, own);
    is_forbidden(&process, "fsync", libc::SYS_fsync, &[0.into()]);
    is_forbidden(
        &process,
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        &[0.into()],
    );
    // Files are given to the service's user alone.
    let words = [0.into(), 65534.into(), 0.into()];
    is_forbidden(&process, "fchown", libc::SYS_fchown, &words);
    let image = path.to_str().unwrap();
    let at = i64::from(libc::AT_FDCWD);
    let open = |path: &str, flags: i32| {
        process.call(
            libc::SYS_openat,
            &[
                at.into(),
                path.into(),
                i64::from(flags).into(),
                0o600.into(),
            ],
        )
    };
    let refused = Outcome::Returned(Err(Errno::EACCES));
    let (log, beside) = (log.to_str().unwrap(), dir.path().join("logs/other"));
    for path in [
        image,
        log,
        "/proc/self/mem",
        "/dev",
        "/dev/net/tun",
        "/proc/version",
    ] {
        assert_eq!(open(path, libc::O_RDONLY), refused, "{path}");
    }
    for path in [beside.to_str().unwrap(), "/dev/vduse/other", "/tmp/other"] {
        assert_eq!(open(path, libc::O_CREAT | libc::O_RDWR), refused, "{path}");
    }
    is_refused(
        &process,
        image,
        libc::SYS_unlinkat,
        &[at.into(), image.into(), 0.into()],
    );
    // But for what it is there for.
    let opened = open("/dev/vduse/control", libc::O_RDWR);
    assert!(matches!(opened, Outcome::Returned(Ok(_))), "{opened:?}");
    drop(process);
    write_and_compare(&service, &path, 2);
    service.end();
    assert!(path.exists() && !Path::new(log).exists());
}

#[test]
fn service_that_breaks_a_rule_ends_and_the_next_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 2 * MIB);
    let mut command = command("broke", &path);
    let mut service = Service::start_as("broke", command.stderr(Stdio::piped()));
    write_and_compare(&service, &path, 2);
    let inet = i64::from(libc::AF_INET);
    Stopped::new(pid(&service.child)).call_and_end(libc::SYS_socket, &[inet.into(), 1.into()]);
    let status = wait(&mut service.child);
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
    let mut text = String::new();
    let mut errors = service.child.stderr.take().unwrap();
    errors.read_to_string(&mut text).unwrap();
    assert!(
        text.contains("the system call socket (41) is forbidden"),
        "{text}"
    );
    waits_for_a_successor("broke");
    let next = Service::start("broke", &path, &[]);
    write_and_compare(&next, &path, 2);
    next.end();
}

#[test]
fn device_that_is_made_anew_is_the_users_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let user = ["--user", "1234:1235"];
    let mut service = Service::start("anew", &path, &user);
    let number = || fs::metadata("/sys/class/vduse/anew").unwrap().ino();
    for _ in 0..2 {
        let before = number();
        fs::write("/sys/class/vduse/anew/msg_timeout", "1").unwrap();
        service.signal(Signal::SIGSTOP);
        driver("unbind", "anew");
        service.signal(Signal::SIGCONT);
        service.disk = disk_named("serial-anew", || {});
        assert_ne!(number(), before);
        let device = fs::metadata("/dev/vduse/anew").unwrap();
        assert_eq!((device.uid(), device.gid()), (1234, 1235));
        write_and_compare(&service, &path, 1);
        // The log is of the new device: the next service goes on by it.
        service.signal(Signal::SIGKILL);
        wait(&mut service.child);
        service = Service::start("anew", &path, &user);
        write_and_compare(&service, &path, 1);
    }
    service.end();
    assert!(!Path::new("/run/ioregion/vduse-anew.log").exists());
}

#[test]
fn keeper_ends_with_its_service_and_the_disk_waits_for_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let mut service = Service::start("orphan", &path, &[]);
    for _ in 0..3 {
        write_and_compare(&service, &path, 1);
        let keeper = folder(keeper(&service.child));
        service.signal(Signal::SIGKILL);
        assert_eq!(wait(&mut service.child).code(), None);
        until("the keeper stays", || !keeper.exists());
        waits_for_a_successor("orphan");
        service = Service::start("orphan", &path, &[]);
    }
    service.end();
}

#[test]
fn service_goes_on_without_its_keeper_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let said = dir.path().join("said");
    let mut command = command("unkept", &path);
    let mut service = Service::start_as("unkept", command.stderr(File::create(&said).unwrap()));
    kill(keeper(&service.child), Signal::SIGKILL).unwrap();
    let says = || fs::read_to_string(&said).unwrap();
    let gone = "the process that has the rights to the device is gone";
    until("it says nothing", || says().contains(gone));
    driver("unbind", "unkept");
    driver("bind", "unkept");
    service.disk = disk_named("serial-unkept", || {});
    write_and_compare(&service, &path, 1);
    service.signal(Signal::SIGTERM);
    assert_eq!(wait(&mut service.child).code(), Some(1));
    assert!(says().contains(&format!("error: {gone}")), "{}", says());
    waits_for_a_successor("unkept");
    let next = Service::start("unkept", &path, &[]);
    write_and_compare(&next, &path, 1);
    next.end();
}

#[test]
fn interface_of_a_killed_service_is_removed_by_its_keeper() {
    let mut service = NetService::start(21, &[]);
    let process = folder(pid(&service.child));
    assert_eq!(says(&process, "Uid"), ["65534"; 4].join("\t"));
    assert_eq!(says(&process, "CapEff"), "0000000000000000");
    let own = Stopped::new(pid(&service.child));
    nobody_may(&own, pid(&service.child));
    let words = [3.into(), libc::TUNSETIFF.cast_signed().into(), "".into()];
    is_forbidden(&own, "ioctl", libc::SYS_ioctl, &words);
    is_forbidden(
        &own,
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        &[8.into()],
    );
    drop(own);
    ping(service.addresses()[1], 1000);
    fs::write("/sys/class/vduse/net21/msg_timeout", "1").unwrap();
    let keeper = folder(keeper(&service.child));
    service.signal(Signal::SIGKILL);
    wait(&mut service.child);
    until("the keeper stays", || !keeper.exists());
    service.is_gone();
    drop(service);
    let service = NetService::start(21, &[]);
    ping(service.addresses()[1], 1000);
    service.end();
}

#[test]
fn interface_goes_on_without_a_keeper() {
    let mut service = NetService::start(22, &["--mac", "52:54:00:ab:cd:22"]);
    kill(keeper(&service.child), Signal::SIGKILL).unwrap();
    ping(service.addresses()[1], 1000);
    service.signal(Signal::SIGTERM);
    assert_eq!(wait(&mut service.child).code(), Some(1));
    // Nobody takes it over, or off the bus.
    waits_for_a_successor("net22");
    fs::write("/sys/class/vduse/net22/msg_timeout", "1").unwrap();
    vdpa::detach("net22").unwrap();
    let control = Control::open().unwrap();
    until("it stays", || control.destroy("net22").is_ok());
    service.is_gone();
}

#[test]
fn users_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    for (user, why) in [
        ("root", "is root"),
        ("0:0", "is root"),
        ("1234:0", "is root"),
        ("no-such-user", "there is no user \"no-such-user\""),
        ("1234:no-such-group", "there is no group \"no-such-group\""),
    ] {
        let mut command = command("nobodys", &path);
        command.args(["--user", user]).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(1));
        let mut text = String::new();
        let mut errors = child.stderr.take().unwrap();
        errors.read_to_string(&mut text).unwrap();
        // Without a list of users any name of it is unknown.
        let is_unknown = user == "root" && text.contains("there is no user \"root\"");
        assert!(text.contains(why) || is_unknown, "{user}: {text}");
        assert!(!Path::new("/dev/vduse/nobodys").exists());
    }
}
