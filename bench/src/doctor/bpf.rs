//! Tries program types of BPF for real, with a program of two instructions.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use aya_obj::btf::{Btf, BtfKind};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_RAW_TP: u32 = 23;
const BPF_TRACE_FENTRY: u32 = 24;

/// `r0 = 0; exit`
const INSTRUCTIONS: [u64; 2] = [0xb7, 0x95];
const LICENSE: &std::ffi::CStr = c"GPL";

/// `union bpf_attr` as `BPF_PROG_LOAD` reads it (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// `union bpf_attr` as `BPF_RAW_TRACEPOINT_OPEN` reads it.
#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    reserved: u32,
}

/// A way for a program to see KVM's accesses.
#[derive(Debug, Clone, Copy)]
pub enum Attach {
    /// A raw tracepoint: what this project uses.
    RawTracepoint(&'static str),
    /// A raw tracepoint with types (`tp_btf`).
    TypedTracepoint(&'static str),
    /// The entry of a function.
    Fentry(&'static str),
    /// A kprobe; loaded, and the kernel asked whether it can attach any.
    Kprobe,
}

impl Attach {
    /// Loads and attaches, and takes it away again.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn attempt(self) -> Result<(), String> {
        let loads = |error| format!("BPF_PROG_LOAD: {error}");
        let attaches = |error| format!("BPF_RAW_TRACEPOINT_OPEN: {error}");
        match self {
            Self::RawTracepoint(name) => {
                let program = load(BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0).map_err(loads)?;
                open(Some(name), &program).map_err(attaches)
            }
            Self::TypedTracepoint(name) => {
                let id = btf_id(&format!("btf_trace_{name}"), BtfKind::Typedef)?;
                let program = load(BPF_PROG_TYPE_TRACING, BPF_TRACE_RAW_TP, id).map_err(loads)?;
                open(None, &program).map_err(attaches)
            }
            Self::Fentry(function) => {
                let id = btf_id(function, BtfKind::Func)?;
                let program = load(BPF_PROG_TYPE_TRACING, BPF_TRACE_FENTRY, id).map_err(loads)?;
                open(None, &program).map_err(attaches)
            }
            Self::Kprobe => {
                load(BPF_PROG_TYPE_KPROBE, 0, 0).map_err(loads)?;
                match Path::new("/sys/bus/event_source/devices/kprobe").exists() {
                    true => Ok(()),
                    false => Err("programs load, but the kernel has no kprobes".into()),
                }
            }
        }
    }
}

fn btf_id(name: &str, kind: BtfKind) -> Result<u32, String> {
    let btf = Btf::from_sys_fs().map_err(|error| format!("kernel types: {error}"))?;
    btf.id_by_type_name_kind(name, kind)
        .map_err(|_| format!("the kernel's types have no {name} (KVM is a module, or has none)"))
}

fn load(kind: u32, attach: u32, btf_id: u32) -> io::Result<OwnedFd> {
    let attr = ProgLoad {
        prog_type: kind,
        insn_cnt: INSTRUCTIONS.len() as u32,
        insns: INSTRUCTIONS.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        expected_attach_type: attach,
        attach_btf_id: btf_id,
        ..Default::default()
    };
    bpf(BPF_PROG_LOAD, &attr)
}

fn open(name: Option<&str>, program: &OwnedFd) -> io::Result<()> {
    let name = name.map(std::ffi::CString::new).transpose()?;
    let attr = RawTracepointOpen {
        name: name.as_ref().map_or(0, |name| name.as_ptr() as u64),
        prog_fd: program.as_raw_fd() as u32,
        reserved: 0,
    };
    bpf(BPF_RAW_TRACEPOINT_OPEN, &attr).map(drop)
}

/// A command of `bpf(2)` that returns a descriptor.
fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is what the command reads, of the size given; pointers in it outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
