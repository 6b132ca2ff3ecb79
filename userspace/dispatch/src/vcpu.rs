//! A vCPU whose accesses to assigned regions are carried.

use std::cell::Cell;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ioregion_abi::access::{value_from_bytes, value_to_bytes};
use ioregion_abi::bpf::Fate;
use ioregion_abi::{Bus, Size};
use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::VcpuFd;
use nix::sys::signal::SigSet;

use crate::channel::Progress;
use crate::device::BusAccess;
use crate::ebpf::Binding;
use crate::mechanism::Carried;
use crate::sys::kvm;
use crate::vm::{Vm, VmShared};
use crate::waiter::{Kicker, Waiter};

/// `KVM_EXIT_IO_OUT`
const IO_OUT: u8 = 1;

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// An access to no assigned region. A read is completed by [`Vcpu::answer`] (all-ones
    /// otherwise) before the next [`Vcpu::run`].
    Unclaimed(BusAccess),
    /// A signal, `immediate_exit` or a [`Kicker`]. If an access was under way it goes on; the
    /// next [`Vcpu::run`] finishes it before it enters the guest.
    Interrupted,
    /// The guest executed `HLT` (without an in-kernel interrupt controller).
    Halt,
    /// The guest shut down or triple-faulted.
    Shutdown,
    /// Another `KVM_EXIT_*` reason; [`Vcpu::run_page`] has the details.
    Other(u32),
}

/// What a vCPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuStats {
    /// Returns of `KVM_RUN` for an access.
    pub exits: u64,
    /// Accesses (pieces of at most eight bytes) that were carried after an exit.
    pub carried: u64,
    /// Writes that exited although their value was in a slot already, and were not repeated.
    pub already_captured: u64,
    /// Returns of `KVM_RUN` with `EINTR`, and waits that were interrupted.
    pub interruptions: u64,
}

/// A vCPU whose accesses to assigned regions are carried by their mechanisms.
#[derive(Debug)]
pub struct Vcpu {
    // Dropped before `fd`, whose mapping it points into.
    waiter: Waiter,
    binding: Binding,
    fd: VcpuFd,
    vm: Vm,
    exit: Option<InFlight>,
    answer: Option<u64>,
    stats: VcpuStats,
}

/// An exit for an access that has not been completed.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    bus: Bus,
    write: bool,
    addr: u64,
    /// Bytes of one element; an MMIO exit has one element of 1 to 8 bytes.
    bytes: u32,
    count: u32,
    /// Where the elements stand, from the start of `kvm_run`.
    data: usize,
    /// The element and the byte in it that come next.
    element: u32,
    at: u32,
    /// The record of the eBPF program has been consulted for this element.
    checked: bool,
    /// The piece was given out as unclaimed.
    offered: bool,
}

impl Vcpu {
    /// Takes over a vCPU of `vm`.
    ///
    /// # Errors
    ///
    /// The operating system's, or the loader's if it has no room for another vCPU.
    pub fn new(vm: &Vm, mut fd: VcpuFd) -> io::Result<Self> {
        let run = fd.get_kvm_run();
        let immediate_exit = NonNull::from(&mut run.immediate_exit);
        let waiter = Waiter::new(immediate_exit)?;
        let binding = Binding::new(vm.shared().program(), &fd)?;
        Ok(Self {
            waiter,
            binding,
            fd,
            vm: vm.clone(),
            exit: None,
            answer: None,
            stats: VcpuStats::default(),
        })
    }

    /// The vCPU's descriptor.
    #[must_use]
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The page that KVM shares with user space, for the details of [`Exit::Other`] and for
    /// `immediate_exit`.
    pub fn run_page(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// A handle by which other threads interrupt this vCPU.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        Kicker(Arc::clone(&self.waiter.bell))
    }

    /// What the vCPU did so far.
    #[must_use]
    pub fn stats(&self) -> VcpuStats {
        self.stats
    }

    /// Sets the signals that stay blocked in `KVM_RUN` and while waiting for a device
    /// (`KVM_SET_SIGNAL_MASK`). With the kick signal blocked in the thread and not in `mask`, a
    /// signal can never be missed.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn set_signal_mask(&mut self, mask: SigSet) -> io::Result<()> {
        kvm::set_signal_mask(&self.fd, &mask)?;
        self.waiter.set_mask(Some(mask));
        Ok(())
    }

    /// The value of the read that [`Exit::Unclaimed`] reported.
    pub fn answer(&mut self, data: u64) {
        self.answer = Some(data);
    }

    /// Runs the guest until something happens that no region takes care of.
    ///
    /// # Errors
    ///
    /// KVM's, except that `EINTR` is [`Exit::Interrupted`].
    pub fn run(&mut self) -> io::Result<Exit> {
        self.waiter.on_thread(thread_id());
        self.binding.enter()?;
        loop {
            if let Some(exit) = self.complete()? {
                return Ok(exit);
            }
            match self.fd.run().map(drop) {
                Ok(()) => {}
                Err(error) if error.errno() == libc::EINTR => return Ok(self.interrupted()),
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => return Err(error.into()),
            }
            match self.fd.get_kvm_run().exit_reason {
                KVM_EXIT_MMIO | KVM_EXIT_IO => {
                    self.stats.exits += 1;
                    self.exit = self.decode();
                    let shared = self.vm.shared();
                    if shared.program().is_some() {
                        shared.drain_ring(&shared.tables());
                    }
                }
                KVM_EXIT_INTR => return Ok(self.interrupted()),
                KVM_EXIT_HLT => return Ok(Exit::Halt),
                KVM_EXIT_SHUTDOWN => return Ok(Exit::Shutdown),
                other => return Ok(Exit::Other(other)),
            }
        }
    }

    fn interrupted(&mut self) -> Exit {
        self.stats.interruptions += 1;
        self.waiter.acknowledge();
        Exit::Interrupted
    }

    fn decode(&mut self) -> Option<InFlight> {
        let run = self.fd.get_kvm_run();
        let base = std::ptr::from_ref(run) as usize;
        let common = |bus, write, addr, bytes, count, data| InFlight {
            bus,
            write,
            addr,
            bytes,
            count,
            data,
            element: 0,
            at: 0,
            checked: false,
            offered: false,
        };
        if run.exit_reason == KVM_EXIT_MMIO {
            // SAFETY: The exit reason says which member KVM has filled in.
            let mmio = unsafe { &run.__bindgen_anon_1.mmio };
            let data = mmio.data.as_ptr() as usize - base;
            let write = mmio.is_write != 0;
            Some(common(
                Bus::Mmio,
                write,
                mmio.phys_addr,
                mmio.len.min(8),
                1,
                data,
            ))
        } else {
            // SAFETY: As above.
            let io = unsafe { &run.__bindgen_anon_1.io };
            let data = usize::try_from(io.data_offset).ok()?;
            let write = io.direction == IO_OUT;
            Some(common(
                Bus::Pio,
                write,
                io.port.into(),
                io.size.into(),
                io.count,
                data,
            ))
        }
    }

    /// Finishes the exit that is under way. `None`: the guest can go on.
    fn complete(&mut self) -> io::Result<Option<Exit>> {
        while let Some(mut exit) = self.exit {
            if exit.element == exit.count {
                self.exit = None;
                break;
            }
            if exit.write && !exit.checked {
                exit.checked = true;
                self.exit = Some(exit);
                let fate = self
                    .binding
                    .fate(exit.bus, exit.addr, exit.bytes, exit.element);
                if fate == Fate::Captured {
                    self.stats.already_captured += 1;
                    let access = self.access(&exit);
                    let tables = self.vm.shared().tables();
                    let entry =
                        VmShared::find(&tables, access.bus, access.addr, access.size).cloned();
                    drop(tables);
                    if let Some(entry) = entry {
                        entry.carrier.captured(&access);
                    }
                    self.exit = Some(exit.next_element());
                    continue;
                }
            }
            let access = self.access(&exit);
            let carried = if exit.offered {
                Carried::Done(self.answer.take().unwrap_or(u64::MAX))
            } else if let Some(pending) = self.waiter.pending.take() {
                match pending.channel.finish(pending.ticket, &mut self.waiter)? {
                    Progress::Interrupted => Carried::Interrupted,
                    Progress::Ended(outcome) => outcome.into(),
                }
            } else {
                let entry = {
                    let tables = self.vm.shared().tables();
                    VmShared::find(&tables, access.bus, access.addr, access.size).cloned()
                };
                match entry {
                    Some(entry) => entry.carrier.carry(&access, &mut self.waiter)?,
                    None => Carried::Unclaimed,
                }
            };
            match carried {
                Carried::Done(data) => {
                    if !exit.offered {
                        self.stats.carried += 1;
                    }
                    if !exit.write {
                        self.store(&exit, access.size, data);
                    }
                    self.exit = Some(exit.advance(access.size));
                }
                Carried::Retry => {}
                Carried::Unclaimed => {
                    exit.offered = true;
                    self.exit = Some(exit);
                    self.answer = None;
                    return Ok(Some(Exit::Unclaimed(access)));
                }
                Carried::Interrupted => return Ok(Some(self.interrupted())),
            }
        }
        Ok(None)
    }

    fn access(&mut self, exit: &InFlight) -> BusAccess {
        let size = exit.piece();
        let write = exit.write.then(|| {
            let at = exit.data_at();
            // SAFETY: As for `store`; KVM has written these bytes.
            let bytes = unsafe {
                let run = std::ptr::from_mut(self.fd.get_kvm_run()).cast::<u8>();
                std::slice::from_raw_parts(run.add(at), size.bytes().into())
            };
            value_from_bytes(bytes)
        });
        // A port is one address, however many elements go through it.
        let addr = exit.addr
            + if exit.bus == Bus::Mmio {
                u64::from(exit.at)
            } else {
                0
            };
        BusAccess {
            bus: exit.bus,
            addr,
            size,
            write,
        }
    }

    fn store(&mut self, exit: &InFlight, size: Size, data: u64) {
        let at = exit.data_at();
        // SAFETY: KVM says where in the mapping of `kvm_run` the data of the exit stand: in the
        // structure itself (MMIO) or in the page behind it (ports, `count * size` bytes).
        let bytes = unsafe {
            let run = std::ptr::from_mut(self.fd.get_kvm_run()).cast::<u8>();
            std::slice::from_raw_parts_mut(run.add(at), size.bytes().into())
        };
        value_to_bytes(data, bytes);
    }
}

impl InFlight {
    fn data_at(&self) -> usize {
        self.data + (self.element * self.bytes + self.at) as usize
    }

    /// The next piece: all of the element, or the largest power of two that is left of it (the
    /// parts of an access that crosses a page have odd lengths, which no bus has).
    fn piece(&self) -> Size {
        let left = self.bytes - self.at;
        let largest = 1 << left.max(1).ilog2();
        Size::from_bytes(largest).unwrap_or(Size::B8)
    }

    fn advance(mut self, size: Size) -> Self {
        self.at += u32::from(size.bytes());
        self.offered = false;
        if self.at >= self.bytes {
            self.next_element()
        } else {
            self
        }
    }

    fn next_element(mut self) -> Self {
        self.element += 1;
        self.at = 0;
        self.checked = false;
        self.offered = false;
        self
    }
}

/// The calling thread's id, as the kernel numbers it in this PID namespace.
pub(crate) fn thread_id() -> i32 {
    thread_local!(static ID: Cell<i32> = const { Cell::new(0) });
    ID.with(|id| {
        if id.get() == 0 {
            id.set(nix::unistd::gettid().as_raw());
        }
        id.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_lengths_are_cut_into_sizes_that_a_bus_has() {
        for (bytes, expected) in [
            (3, vec![2, 1]),
            (5, vec![4, 1]),
            (6, vec![4, 2]),
            (7, vec![4, 2, 1]),
            (8, vec![8]),
        ] {
            let mut exit = InFlight {
                bus: Bus::Mmio,
                write: true,
                addr: 0,
                bytes,
                count: 1,
                data: 0,
                element: 0,
                at: 0,
                checked: false,
                offered: false,
            };
            let mut sizes = Vec::new();
            while exit.element < exit.count {
                sizes.push(exit.piece().bytes());
                exit = exit.advance(exit.piece());
            }
            assert_eq!(sizes, expected);
        }
    }
}
