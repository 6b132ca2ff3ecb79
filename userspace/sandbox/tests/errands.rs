//! What a process keeps that does something for another one.

mod support;

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use ioregion_sandbox::{Calls, Confinement, FileAccess, User, fork, receive, send};
use libc::c_long;
use nix::errno::Errno;
use support::{alone, attempt, call, hold, is_root};

fn remove(path: &Path) -> Result<(), Errno> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let words = [libc::AT_FDCWD.into(), path.as_ptr() as c_long, 0, 0, 0, 0];
    call(libc::SYS_unlinkat, words).map(drop)
}

#[test]
fn files_of_one_folder_can_be_removed_where_that_is_allowed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    std::fs::create_dir(&own).unwrap();
    let (one, other) = (own.join("one"), dir.path().join("other"));
    for path in [&one, &other] {
        File::create(path).unwrap();
    }
    let confined = |access| Confinement::new(Calls::service()).file(&own, access);
    attempt(confined(FileAccess::Remove), || remove(&other)).failed(Errno::EACCES);
    let open = || {
        let opened = nix::fcntl::open(
            &one,
            nix::fcntl::OFlag::O_RDONLY,
            nix::sys::stat::Mode::empty(),
        );
        opened.map(drop)
    };
    attempt(confined(FileAccess::Remove), open).failed(Errno::EACCES);
    attempt(confined(FileAccess::Device), || remove(&one)).was_ended_by("unlinkat");
    assert!(one.exists() && other.exists());
    attempt(confined(FileAccess::Remove), || remove(&one)).succeeded();
    assert!(!one.exists());
}

#[test]
fn devices_of_one_folder_get_the_requests_that_are_allowed() {
    let _alone = alone();
    // The number of a pseudo-terminal.
    let request = libc::TIOCGPTN;
    let ask = || {
        let flags = nix::fcntl::OFlag::O_RDWR;
        let opened = nix::fcntl::open("/dev/ptmx", flags, nix::sys::stat::Mode::empty())?;
        let mut number = 0;
        // SAFETY: The request writes one integer.
        Errno::result(unsafe { libc::ioctl(opened.as_raw_fd(), request, &raw mut number) })?;
        Ok(())
    };
    // Without rules it is answered.
    hold(|| Ok(()), ask).end().succeeded();
    let confined = |access, requests: &[u64]| {
        let calls = Calls::service().requests(requests);
        Confinement::new(calls).file(Path::new("/dev"), access)
    };
    attempt(confined(FileAccess::Device, &[request]), ask).succeeded();
    attempt(confined(FileAccess::Device, &[]), ask).was_ended_by("ioctl");
    attempt(confined(FileAccess::Read, &[request]), ask).failed(Errno::EACCES);
}

#[test]
fn files_are_given_to_one_user_and_to_nobody_else() {
    let _alone = alone();
    let file = tempfile::tempfile().unwrap();
    let user = User::find("1234:1235").unwrap();
    let confined = || Confinement::new(Calls::service()).isolated().gives_to(user);
    let give = |uid: c_long, gid: c_long| {
        let fd = file.as_raw_fd().into();
        move || call(libc::SYS_fchown, [fd, uid, gid, 0, 0, 0]).map(drop)
    };
    for (uid, gid) in [(1234, 0), (0, 1235), (0, 0), (1234, -1)] {
        attempt(confined(), give(uid, gid)).was_ended_by("fchown");
    }
    let given = attempt(confined(), give(1234, 1235));
    match is_root() {
        true => given.succeeded(),
        false => given.failed(Errno::EPERM),
    }
    let mut held = hold(|| confined().apply(), || Ok(()));
    let chown = if is_root() { 1u64 } else { 0 };
    assert_eq!(held.says("CapEff"), format!("{chown:016x}"));
    assert_eq!(held.says("CapPrm"), format!("{chown:016x}"));
    held.end().succeeded();
}

#[test]
fn descriptors_come_with_messages() {
    let _alone = alone();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    file.rewind().unwrap();
    let first = || {
        let child = fork(|socket| {
            let mut bytes = [0; 8];
            while let Ok((1.., none)) = receive(&socket, &mut bytes) {
                assert!(none.is_none());
                send(&socket, &bytes[..3], Some(file.as_fd())).unwrap();
            }
            0
        })?;
        Confinement::new(Calls::service().receiving()).apply()?;
        let mut bytes = [0; 8];
        nix::unistd::write(&child, b"abc").unwrap();
        let (len, received) = receive(&child, &mut bytes).unwrap();
        assert_eq!(bytes[..len], *b"abc");
        let mut text = String::new();
        let mut received = File::from(received.unwrap());
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        Ok(())
    };
    hold(first, || Ok(())).end().succeeded();
}
