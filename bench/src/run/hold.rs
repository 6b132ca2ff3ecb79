//! Holds a polling thread for a while, so that a CPU that shares a core with it runs at its own
//! speed.
//!
//! A signal whose handler waits: nothing that the thread executes otherwise changes.

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, getpid};

/// Makes a thread wait.
const SIGNAL: Signal = Signal::SIGUSR2;

const GO: u32 = 0;
const HOLD: u32 = 1;
const HELD: u32 = 2;

/// The one thread that may be held.
static STATE: AtomicU32 = AtomicU32::new(GO);

/// A held thread; it goes on when this is dropped.
#[derive(Debug)]
pub struct Held(());

/// Holds a thread of this process; returns when it stands still. One at a time.
///
/// # Errors
///
/// If another one is held, or there is no such thread.
pub fn hold(thread: Pid) -> Result<Held> {
    let action = SigAction::new(
        SigHandler::Handler(wait),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: The handler only uses an atomic and a system call, and keeps errno.
    unsafe { sigaction(SIGNAL, &action) }?;
    let held = STATE.compare_exchange(GO, HOLD, Ordering::SeqCst, Ordering::SeqCst);
    if held.is_err() {
        bail!("two threads are to be held at once");
    }
    let held = Held(());
    send(thread, SIGNAL as i32)?;
    while STATE.load(Ordering::SeqCst) != HELD {
        // A thread that has ended meanwhile never stands still.
        send(thread, 0)?;
        std::thread::yield_now();
    }
    Ok(held)
}

/// Sends a signal to a thread of this process; 0 only asks whether there is such a thread.
fn send(thread: Pid, signal: libc::c_int) -> nix::Result<()> {
    let (process, thread) = (getpid().as_raw(), thread.as_raw());
    // SAFETY: It takes no pointers.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    Errno::result(sent).map(drop)
}

impl Drop for Held {
    fn drop(&mut self) {
        STATE.store(GO, Ordering::SeqCst);
        futex(libc::FUTEX_WAKE, 1);
    }
}

extern "C" fn wait(_: i32) {
    let errno = Errno::last_raw();
    let held = STATE.compare_exchange(HOLD, HELD, Ordering::SeqCst, Ordering::SeqCst);
    while held.is_ok() && STATE.load(Ordering::SeqCst) == HELD {
        futex(libc::FUTEX_WAIT, HELD);
    }
    Errno::set_raw(errno);
}

fn futex(operation: i32, value: u32) {
    // SAFETY: The word lives as long as the process; there is no timeout.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            STATE.as_ptr(),
            operation | libc::FUTEX_PRIVATE_FLAG,
            value,
            ptr::null::<libc::timespec>(),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn held_thread_stands_still_and_goes_on() {
        let (count, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (tell, id) = mpsc::channel();
        let thread = {
            let (count, stop) = (Arc::clone(&count), Arc::clone(&stop));
            std::thread::spawn(move || {
                tell.send(nix::unistd::gettid()).unwrap();
                while !stop.load(Ordering::SeqCst) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        let id = id.recv().unwrap();
        for _ in 0..100 {
            let held = hold(id).unwrap();
            assert!(hold(id).is_err());
            let before = count.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(count.load(Ordering::SeqCst), before);
            drop(held);
            while count.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::SeqCst);
        thread.join().unwrap();
    }
}
