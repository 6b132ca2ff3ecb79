//! Requests over io_uring, which the filter of system calls does not see.

mod support;

use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;

use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::sys::wait::WaitStatus;
use support::{alone, attempt, hold, is_root, service};

/// One request to a ring, made after the process was confined.
fn over_ring(entry: &io_uring::squeue::Entry) -> Result<i32, Errno> {
    let raw = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let mut ring = IoUring::new(4).map_err(raw)?;
    // SAFETY: What the request points to lives in the caller.
    unsafe { ring.submission().push(entry) }.map_err(|_| Errno::ENOSPC)?;
    ring.submit_and_wait(1).map_err(raw)?;
    let done = ring.completion().next().ok_or(Errno::ENOMSG)?;
    match done.result() {
        ..0 => Err(Errno::from_raw(-done.result())),
        result => Ok(result),
    }
}

#[test]
fn rings_work_on_open_files_and_reach_nothing_else() {
    let _alone = alone();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    let confined = || service().locked_memory(1 << 26);
    let read = || {
        let mut bytes = [0; 7];
        let fd = types::Fd(file.as_raw_fd());
        let entry = opcode::Read::new(fd, bytes.as_mut_ptr(), 7).build();
        match over_ring(&entry)? {
            7 if bytes == *b"content" => Ok(()),
            _ => Err(Errno::EIO),
        }
    };
    attempt(confined(), read).succeeded();

    // Paths: the filter does not see them, Landlock and the empty root do.
    let cwd = types::Fd(libc::AT_FDCWD);
    let open = || over_ring(&opcode::OpenAt::new(cwd, c"/etc/passwd".as_ptr()).build()).map(drop);
    let ended = attempt(confined(), open);
    assert!(
        matches!(
            ended.status,
            WaitStatus::Exited(_, libc::EACCES | libc::ENOENT)
        ),
        "{ended:?}"
    );

    // Sockets: Landlock (TCP) and the empty network.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let connect = || {
        let socket = over_ring(&opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build())?;
        let address = libc::sockaddr_in {
            sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap(),
            sin_port: port.to_be(),
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
            },
            sin_zero: [0; 8],
        };
        let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        let entry = opcode::Connect::new(types::Fd(socket), (&raw const address).cast(), len);
        over_ring(&entry.build()).map(drop)
    };
    // The way there is: without rules it arrives.
    hold(|| Ok(()), connect).end().succeeded();
    let ended = attempt(confined(), connect);
    let refused = [libc::EACCES, libc::ENETUNREACH];
    assert!(
        matches!(ended.status, WaitStatus::Exited(_, code) if refused.contains(&code)),
        "{ended:?}"
    );
}

#[test]
fn sockets_of_other_processes_are_out_of_reach_by_path() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("socket");
    let _listener = UnixListener::bind(&place).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&place, 0o777)] {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let connect = || {
        let socket = over_ring(&opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build())?;
        // SAFETY: All-zero bytes are an address without a path.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap();
        let bytes = place.as_os_str().as_encoded_bytes();
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = from.cast_signed();
        }
        let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        let entry = opcode::Connect::new(types::Fd(socket), (&raw const address).cast(), len);
        over_ring(&entry.build()).map(drop)
    };
    hold(|| Ok(()), connect).end().succeeded();
    if is_root() {
        let ended = attempt(service(), connect);
        let refused = [libc::EACCES, libc::ENOENT];
        assert!(
            matches!(ended.status, WaitStatus::Exited(_, code) if refused.contains(&code)),
            "{ended:?}"
        );
    }
}
