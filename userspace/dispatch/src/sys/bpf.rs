//! Requests of the `bpf` system call that aya does not offer in this form.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_FREEZE: libc::c_long = 22;

/// `union bpf_attr` as `BPF_PROG_TEST_RUN` lays it out.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is laid out as the command wants it; the callers below pass no pointers in
    // it but null and that of a key that they keep alive.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// Runs a raw tracepoint program, without arguments, on the calling thread.
pub(crate) fn test_run(program: BorrowedFd<'_>) -> io::Result<u32> {
    let prog_fd = program.as_raw_fd().cast_unsigned();
    let mut attr = TestRun {
        prog_fd,
        ..Default::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Makes a map read-only for user space: no updates, no writable mappings. The program goes on
/// writing it. (A descriptor opened read-only would not do: the kernel refuses to map it.)
pub(crate) fn map_freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut map_fd = map.as_raw_fd().cast_unsigned();
    bpf(BPF_MAP_FREEZE, &mut map_fd).map(drop)
}

/// Deletes the element of an array of maps, which aya's type does not offer.
pub(crate) fn map_delete(map: BorrowedFd<'_>, key: u32) -> io::Result<()> {
    #[repr(C)]
    struct Element {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        pad: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: 0,
        flags: 0,
    };
    // `key` outlives the call, which reads four bytes of it.
    bpf(BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
}
