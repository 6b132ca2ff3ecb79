//! What a process does when it makes a system call that its rules forbid.

use std::ptr;

use syscalls::Sysno;

use crate::error::{Error, system};

/// `SYS_SECCOMP`: why SIGSYS came.
const BY_SECCOMP: libc::c_int = 1;
/// Where `siginfo_t` of SIGSYS has the number of the call: behind three words and a pointer.
const NUMBER_AT: usize = 24;

/// Has the process name the call before SIGSYS ends it.
pub(crate) fn install() -> Result<(), Error> {
    // SAFETY: All-zero bytes are a valid `sigaction`: integers, a null pointer, an empty set.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    action.sa_sigaction = handler as usize;
    // Once: another call on the way out ends the process at once.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: The struct is complete, and the handler does only what signal handlers may.
    let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    nix::errno::Errno::result(set).map_err(system("a handler for SIGSYS"))?;
    Ok(())
}

extern "C" fn handle(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: The kernel passes a valid struct to handlers with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    if code == BY_SECCOMP {
        // SAFETY: The struct has 128 bytes; where seccomp is the cause, this word is the number.
        let number = unsafe { info.byte_add(NUMBER_AT).cast::<libc::c_int>().read() };
        let name = usize::try_from(number)
            .ok()
            .and_then(Sysno::new)
            .map_or("an unknown call", |call| call.name());
        let mut digits = [0; 10];
        let number = decimal(number.unsigned_abs(), &mut digits);
        for piece in [
            b"error: the system call ".as_slice(),
            name.as_bytes(),
            b" (",
            number,
            b") is forbidden to this process: it ends\n",
        ] {
            // SAFETY: The bytes are there. Nobody is left to hear of an error.
            let _ = unsafe { libc::write(libc::STDERR_FILENO, piece.as_ptr().cast(), piece.len()) };
        }
    }
    // SAFETY: Calls without pointers. The handler is gone, so the signal ends the process.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            libc::gettid(),
            libc::SIGSYS,
        )
    };
}

/// The number's digits, without memory of the heap.
fn decimal(mut number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        // Below ten.
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 || start == 0 {
            return &digits[start..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_digits() {
        for number in [0, 7, 10, 425, u32::MAX] {
            let mut digits = [0; 10];
            let written = decimal(number, &mut digits);
            assert_eq!(written, number.to_string().as_bytes());
        }
    }
}
