//! Mappings whose pages can vanish.
//!
//! Pages of a shared mapping belong to somebody else: the bounce buffer of the kernel has pages
//! only where a request is, and a VMM can cut its memory short. Touching a page that is not there
//! raises SIGBUS. Here the signal's handler puts memory of zeroes in the place of the whole
//! mapping and notes it; the access goes on and whoever made it learns afterwards that it was in
//! vain. Memory of others' processes is never touched so.

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};

/// Mappings at a time. The kernel's own limit for the regions of a device is 2048.
const SLOTS: usize = 4096;

#[derive(Debug)]
struct Slot {
    /// Whether the slot belongs to a mapping.
    taken: AtomicBool,
    /// First byte; 0 while there is none.
    start: AtomicUsize,
    len: AtomicUsize,
    vanished: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        vanished: AtomicBool::new(false),
    }
}; SLOTS];

/// What the process did about SIGBUS before; nothing where the handler could not be set.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// The right to touch a mapping whose pages can vanish.
#[derive(Debug)]
pub(super) struct Guard {
    slot: &'static Slot,
}

impl Guard {
    /// Guards a mapping; nothing where there are too many or the handler cannot be set.
    ///
    /// # Safety
    ///
    /// The range is a whole mapping, nothing borrows from it, and it stays until the guard is
    /// dropped.
    pub(super) unsafe fn new(start: usize, len: usize) -> Option<Self> {
        (*BEFORE.get_or_init(install))?;
        let slot = TABLE.iter().find(|slot| {
            let free =
                slot.taken
                    .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
            free.is_ok()
        })?;
        slot.vanished.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Some(Self { slot })
    }

    /// Whether an access before this call touched a page that was not there.
    pub(super) fn vanished(&self) -> bool {
        // The handler runs on the thread that made the access.
        compiler_fence(Ordering::SeqCst);
        self.slot.vanished.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.start.store(0, Ordering::Relaxed);
        self.slot.taken.store(false, Ordering::Release);
    }
}

fn install() -> Option<libc::sigaction> {
    // SAFETY: All-zero bytes are a valid `sigaction`: integers, a null pointer, an empty set.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    new.sa_sigaction = handler as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: As above.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: Both structs are complete, and the handler does only what signal handlers may.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const new, &raw mut old) };
    (set == 0).then_some(old)
}

extern "C" fn handle(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: The kernel passes a valid struct to handlers with SA_SIGINFO.
    let addr = unsafe { (*info).si_addr() } as usize;
    // SAFETY: Reads a variable of this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: The address of this thread's errno.
    let saved = unsafe { *errno };
    let hit = TABLE.iter().find(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        start != 0 && addr.checked_sub(start).is_some_and(|offset| offset < len)
    });
    let replaced = hit.is_some_and(|slot| {
        let start = slot.start.load(Ordering::Relaxed);
        let len = slot.len.load(Ordering::Relaxed);
        slot.vanished.store(true, Ordering::Relaxed);
        // SAFETY: The range is a whole mapping that only its guard's owner touches, by copying:
        // this thread is in such a copy, so the mapping is not gone, and nothing is borrowed.
        let made = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(start),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        made != libc::MAP_FAILED
    });
    if !replaced && let Some(Some(before)) = BEFORE.get() {
        // Not ours: the access is made again, and ends as it would have without this module.
        // SAFETY: A complete struct that `sigaction` gave out.
        unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    }
    // SAFETY: The address of this thread's errno.
    unsafe { *errno = saved };
}
