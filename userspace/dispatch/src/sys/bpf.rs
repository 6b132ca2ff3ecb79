//! Requests of the `bpf` system call that aya does not offer in this form.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ioregion_abi::bpf::{BPF_PROG_TEST_RUN, TestRun};

const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_FREEZE: libc::c_long = 22;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is laid out as the command wants it; the callers below pass no pointers in
    // it but null and those of things that they keep alive.
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

/// What a map is: the start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct MapInfo {
    /// `BPF_MAP_TYPE_*`
    pub(crate) kind: u32,
    /// Names the map as long as anybody has it: a descriptor, a mapping, another map or a program.
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
    name: [u8; 16],
    rest: [u64; 6],
}

/// What map a descriptor leads to.
///
/// # Errors
///
/// `InvalidInput` if it leads to no map; the system's.
pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        info: u64,
    }
    // Programs and links answer as well, in other structures.
    let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if what.as_os_str() != "anon_inode:bpf-map" {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no BPF map, but {}", what.display()),
        ));
    }
    let mut info = MapInfo::default();
    let mut attr = Info {
        fd: fd.as_raw_fd().cast_unsigned(),
        len: size_of::<MapInfo>() as u32,
        info: &raw mut info as u64,
    };
    // `info` outlives the call, which writes at most as many bytes as it has.
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Whether anybody has the map with this id. Where that cannot be found out (it takes
/// CAP_SYS_ADMIN), yes.
pub(crate) fn map_exists(id: u32) -> bool {
    #[repr(C)]
    struct ById {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    let mut attr = ById {
        id,
        next_id: 0,
        open_flags: 0,
    };
    match bpf(BPF_MAP_GET_FD_BY_ID, &mut attr) {
        Ok(fd) => {
            // SAFETY: The kernel has just made this descriptor, and nobody else knows it.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            true
        }
        Err(error) => error.raw_os_error() != Some(libc::ENOENT),
    }
}
