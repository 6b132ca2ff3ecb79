//! A signal whose only effect is that a thread's system call ends.

use std::sync::OnceLock;

use nix::libc;

/// The signal of this process; `None` where every real-time signal is in use.
///
/// It is the last real-time signal that nobody handles when it is first needed. Its handler does
/// nothing.
pub(crate) fn nudge() -> Option<libc::c_int> {
    static SIGNAL: OnceLock<Option<libc::c_int>> = OnceLock::new();
    *SIGNAL.get_or_init(|| {
        let mut signals = (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev();
        signals.find(|signal| take(*signal))
    })
}

/// Gives a signal that nobody handles the handler that does nothing.
fn take(signal: libc::c_int) -> bool {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: All-zero bytes are a valid `sigaction`: integers, a null pointer, an empty set.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: The kernel fills the struct.
    let known = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } == 0;
    if !known || action.sa_sigaction != libc::SIG_DFL {
        return false;
    }
    let handler: extern "C" fn(libc::c_int) = nothing;
    action.sa_sigaction = handler as libc::sighandler_t;
    // Without SA_RESTART: the call is to end.
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: A complete struct, and a handler that does what any thread may at any time: nothing.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) == 0 }
}

/// Interrupts the system call that a thread of this process is in.
pub(crate) fn interrupt(thread: libc::pid_t, signal: libc::c_int) {
    // SAFETY: A system call without pointers; a thread that is gone yields ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}

/// Lets a signal reach this thread; whether it could not before.
pub(crate) fn unblock(signal: libc::c_int) -> bool {
    mask(libc::SIG_UNBLOCK, signal)
}

/// Keeps a signal away from this thread.
pub(crate) fn block(signal: libc::c_int) {
    mask(libc::SIG_BLOCK, signal);
}

/// Changes this thread's mask by a signal; whether it was in the mask before.
fn mask(how: libc::c_int, signal: libc::c_int) -> bool {
    // SAFETY: All-zero bytes are a valid set, which the calls below fill in.
    let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: The sets live on this stack; the signal is one of the kernel's.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(how, &raw const set, &raw mut before);
        libc::sigismember(&raw const before, signal) == 1
    }
}
