//! Which thread runs which vCPU, kept true as vCPUs move and threads end.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ioregion_abi::Bus;
use ioregion_abi::bpf::Fate;
use kvm_ioctls::VcpuFd;

use super::program::Program;
use super::vm_program::{VmProgram, read_record};
use crate::sys::bpf;

/// Names vCPUs uniquely in this process, so that a stale binding is never taken for a new one.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static CURRENT: RefCell<Option<OnThread>> = const { RefCell::new(None) };
}

/// Which vCPU each registered thread runs: thread id to serial.
pub(super) type Threads = Mutex<HashMap<u32, u64>>;

/// The binding that this thread has made last. Its destructor runs when the thread ends.
struct OnThread {
    /// Not owned: a thread that lives on must not keep the program attached.
    program: Weak<Program>,
    thread: u32,
    serial: u64,
}

impl Drop for OnThread {
    fn drop(&mut self) {
        if let Some(program) = self.program.upgrade() {
            program.unbind(self.thread, self.serial);
        }
    }
}

/// A vCPU's place in the program; empty where the VM has none.
#[derive(Debug)]
pub(crate) struct Binding(Option<Bound>);

#[derive(Debug)]
struct Bound {
    vm: Arc<VmProgram>,
    record: u32,
    serial: u64,
    thread: Option<u32>,
}

impl Binding {
    pub(crate) fn new(vm: Option<&Arc<VmProgram>>, vcpu: &VcpuFd) -> io::Result<Self> {
        let Some(vm) = vm else { return Ok(Self(None)) };
        if vm.is_unsunk() {
            return Ok(Self(None));
        }
        let record = match vm.control().new_record(vm.vm()) {
            Err(error) if vm.failed_for_good(&error) => return Ok(Self(None)),
            record => record?,
        };
        vm.add_vcpu(vcpu, record)?;
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        Ok(Self(Some(Bound {
            vm: Arc::clone(vm),
            record,
            serial,
            thread: None,
        })))
    }

    /// Makes sure that the program knows the calling thread as this vCPU's, unless it is gone: then
    /// there is nothing that it would have to see.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        CURRENT.with_borrow_mut(|current| {
            let Some(bound) = &mut self.0 else {
                // Another VM's vCPU ran here before; what this one does is none of its writes.
                *current = None;
                return Ok(());
            };
            if let Some(on) = current
                && on.serial == bound.serial
                && bound.thread == Some(on.thread)
            {
                return Ok(());
            }
            if bound.vm.is_unsunk() {
                return Ok(());
            }
            let program = bound.vm.program();
            let thread = bpf::test_run(program.control().whoami())?;
            if let Some(old) = bound.thread.take_if(|old| *old != thread) {
                program.unbind(old, bound.serial);
            }
            // First, because the old binding may be one of this same vCPU, which has been elsewhere.
            *current = None;
            match program.bind(thread, bound.serial, bound.record) {
                Err(error) if bound.vm.failed_for_good(&error) => return Ok(()),
                bound => bound?,
            }
            bound.thread = Some(thread);
            let program = Arc::downgrade(program);
            *current = Some(OnThread {
                program,
                thread,
                serial: bound.serial,
            });
            Ok(())
        })
    }

    /// What the program did with the piece of a write that has just exited.
    pub(crate) fn fate(&self, bus: Bus, addr: u64, bytes: u32, element: u32) -> Fate {
        let Some(bound) = self.0.as_ref().filter(|bound| !bound.vm.is_gone()) else {
            return Fate::Unseen;
        };
        let Ok(bytes) = u8::try_from(bytes) else {
            return Fate::Unseen;
        };
        let fate = read_record(bound.vm.records(), bound.record).fate(bus, addr, bytes, element);
        if fate == Fate::Announced {
            bound.vm.account();
        }
        fate
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        let Some(bound) = &self.0 else { return };
        if let Some(thread) = bound.thread {
            bound.vm.program().unbind(thread, bound.serial);
        }
        bound.vm.remove_vcpu(bound.record);
        if bound.vm.is_unsunk() {
            return;
        }
        if let Err(error) = bound.vm.control().free_record(bound.record) {
            tracing::warn!(%error, "cannot free a vCPU record");
        }
    }
}

impl Program {
    fn bind(&self, thread: u32, serial: u64, record: u32) -> io::Result<()> {
        let mut threads = self
            .threads()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.control().bind(thread, Some(record))?;
        threads.insert(thread, serial);
        Ok(())
    }

    /// Forgets a thread, unless it runs another vCPU by now.
    fn unbind(&self, thread: u32, serial: u64) {
        let mut threads = self
            .threads()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if threads.get(&thread) != Some(&serial) {
            return;
        }
        threads.remove(&thread);
        if let Err(error) = self.control().bind(thread, None) {
            tracing::warn!(thread, %error, "cannot unbind a vCPU thread");
        }
    }
}
