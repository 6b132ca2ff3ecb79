//! How a vCPU thread sleeps: on a channel's descriptors, its own bell, and signals.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;

use crate::channel::Channel;
use crate::channel::state::Ticket;
use crate::sys::signal::interrupt;

/// Wakes one sleeping task.
#[derive(Debug)]
pub(crate) struct Bell {
    eventfd: EventFd,
    kicked: AtomicBool,
    thread: AtomicI32,
    run_page: Mutex<Option<RunPage>>,
}

/// `kvm_run.immediate_exit` of a live vCPU.
#[derive(Debug, Clone, Copy)]
struct RunPage(NonNull<u8>);

// SAFETY: The byte is only accessed by volatile loads and stores of one byte, as KVM's interface
// intends for any thread; `Bell::detach` takes the pointer away before the page is unmapped.
unsafe impl Send for RunPage {}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            eventfd: EventFd::from_value_and_flags(0, flags)?,
            kicked: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            run_page: Mutex::new(None),
        })
    }

    /// Wakes the task.
    pub(crate) fn ring(&self) {
        // The counter is far from overflowing, and an overflowing one is readable already.
        let _ = self.eventfd.write(1);
    }

    /// Consumes the wake-up.
    pub(crate) fn clear(&self) {
        let _ = self.eventfd.read();
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.eventfd.as_fd().as_raw_fd()
    }

    /// Interrupts `KVM_RUN` or a wait for a device.
    pub(crate) fn kick(&self, signal: libc::c_int) {
        self.set_kicked(true);
        self.ring();
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            interrupt(thread, signal);
        }
    }

    /// Sets both marks of a kick, or takes both back; false if there was nothing to take back.
    /// Under one lock, so that the marks of a kick and of its acknowledgement do not mix.
    fn set_kicked(&self, kicked: bool) -> bool {
        let page = self.run_page.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.kicked.swap(kicked, Ordering::SeqCst) && !kicked {
            return false;
        }
        if let Some(RunPage(byte)) = *page {
            // SAFETY: The pointer is there only while the page is mapped.
            unsafe { byte.write_volatile(kicked.into()) };
        }
        true
    }

    fn attach(&self, byte: NonNull<u8>) {
        *self.run_page.lock().unwrap_or_else(PoisonError::into_inner) = Some(RunPage(byte));
    }

    fn detach(&self) {
        *self.run_page.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A vCPU's side of waiting.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) bell: std::sync::Arc<Bell>,
    immediate_exit: RunPage,
    mask: Option<SigSet>,
    /// The access that was under way when the vCPU returned to its caller.
    pub(crate) pending: Option<Pending>,
}

/// A request of this vCPU that a channel still holds.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) channel: std::sync::Arc<Channel>,
    pub(crate) ticket: Ticket,
}

/// Why a sleep ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A descriptor is ready, or the bell rang.
    Ready,
    /// A signal or a kick.
    Interrupted,
}

impl Waiter {
    /// A waiter for the vCPU whose `kvm_run.immediate_exit` is given; the page must stay mapped
    /// until the waiter is dropped.
    pub(crate) fn new(immediate_exit: NonNull<u8>) -> io::Result<Self> {
        let bell = Bell::new()?;
        bell.attach(immediate_exit);
        Ok(Self {
            bell: bell.into(),
            immediate_exit: RunPage(immediate_exit),
            mask: None,
            pending: None,
        })
    }

    /// Remembers which thread runs the vCPU now.
    pub(crate) fn on_thread(&self, thread: i32) {
        self.bell.thread.store(thread, Ordering::SeqCst);
    }

    /// Signals that stay blocked while waiting; `None`: the thread's own mask.
    pub(crate) fn set_mask(&mut self, mask: Option<SigSet>) {
        self.mask = mask;
    }

    /// Whether the vCPU has been asked to return: `immediate_exit`, or a kick.
    pub(crate) fn is_interrupted(&self) -> bool {
        // SAFETY: The page is mapped as long as the waiter lives.
        let immediate_exit = unsafe { self.immediate_exit.0.read_volatile() } != 0;
        immediate_exit || self.bell.kicked.load(Ordering::SeqCst)
    }

    /// Takes back a kick, once the caller has been told.
    pub(crate) fn acknowledge(&self) {
        if self.bell.set_kicked(false) {
            self.bell.clear();
        }
    }

    /// Sleeps until one of `fds` is ready, the bell rings or a signal comes.
    pub(crate) fn sleep(&self, fds: &[(RawFd, PollFlags)]) -> io::Result<Woken> {
        let mut set = [libc::pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        }; 4];
        set[0] = libc::pollfd {
            fd: self.bell.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        for (entry, &(fd, flags)) in set[1..].iter_mut().zip(fds) {
            *entry = libc::pollfd {
                fd,
                events: flags.bits(),
                revents: 0,
            };
        }
        let mask = self.mask.as_ref().map_or(std::ptr::null(), |mask| {
            let mask: &libc::sigset_t = mask.as_ref();
            std::ptr::from_ref(mask)
        });
        let len = 1 + fds.len().min(3);
        // SAFETY: `set` has `len` entries, `mask` is null or a signal set that outlives the call.
        let ret = unsafe { libc::ppoll(set.as_mut_ptr(), len as u64, std::ptr::null(), mask) };
        if ret < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINTR) => Ok(Woken::Interrupted),
                _ => Err(error),
            };
        }
        if set[0].revents != 0 {
            self.bell.clear();
        }
        Ok(Woken::Ready)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.bell.detach();
        if let Some(pending) = self.pending.take() {
            pending.channel.abandon(pending.ticket);
        }
    }
}

/// Interrupts a vCPU from another thread.
#[derive(Debug, Clone)]
pub struct Kicker(pub(crate) std::sync::Arc<Bell>);

impl Kicker {
    /// Makes [`Vcpu::run`](crate::Vcpu::run) return
    /// [`Exit::Interrupted`](crate::Exit::Interrupted) soon, now or the next time it is called.
    ///
    /// `signal` is sent to the thread that runs the vCPU, so that KVM leaves the guest; the
    /// program must have a handler for it (an empty one does).
    pub fn kick(&self, signal: nix::sys::signal::Signal) {
        self.0.kick(signal as libc::c_int);
    }
}
