//! The virtual machine around the programs.

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use crate::assemble::{Image, assemble};
use crate::layout::{Area, CELLS, MMIO_BASE, MMIO_END, cell_at};
use crate::{Error, Program, Result};

/// One page, and three behind it, that KVM needs on Intel hosts for guests without paging.
const IDENTITY_MAP_AT: u64 = MMIO_END;
const TSS_AT: usize = MMIO_END as usize + 0x1000;

const CR0_PE_ET: u64 = 0x11;
const CR4_OSFXSR_OSXMMEXCPT: u64 = 0x600;

/// A VM with RAM at guest physical address 0 and no devices at all: every access beyond RAM goes
/// to KVM's I/O bus and from there to user space.
///
/// There is no interrupt controller, so `HLT` ends `KVM_RUN` with `KVM_EXIT_HLT`.
#[derive(Debug)]
pub struct MicroVm {
    // Fields drop in this order; `Drop` has taken RAM away from the VM before.
    vm: Arc<VmFd>,
    kvm: Kvm,
    memory: GuestMemoryMmap,
    cpuid: CpuId,
    ram: u64,
    fence: bool,
}

impl MicroVm {
    /// Makes a VM with `ram_bytes` of RAM, a multiple of 4 KiB that ends below
    /// [`MMIO_BASE`]; one MiB plus [`AREA_BYTES`](crate::AREA_BYTES) per vCPU,
    /// [`DEFAULT_RAM`](crate::DEFAULT_RAM) for three.
    pub fn new(ram_bytes: usize) -> Result<Self> {
        static FENCE: OnceLock<bool> = OnceLock::new();
        let mut vm = Self::bare(ram_bytes)?;
        vm.fence = match FENCE.get() {
            Some(fence) => *fence,
            None => {
                let helps = fence_helps()?;
                *FENCE.get_or_init(|| helps)
            }
        };
        Ok(vm)
    }

    fn bare(ram_bytes: usize) -> Result<Self> {
        let ram_error = |reason: String| Error::Ram {
            bytes: ram_bytes,
            reason,
        };
        let ram = ram_bytes as u64;
        if ram == 0 || !ram.is_multiple_of(4096) || ram > MMIO_BASE {
            return Err(ram_error(format!(
                "need a multiple of 4096 bytes, at most {MMIO_BASE:#x}"
            )));
        }
        let kvm = Kvm::new().map_err(Error::NoKvm)?;
        let vm = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram_bytes)])
            .map_err(|e| ram_error(e.to_string()))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("list CPUID leaves"))?;
        vm.set_identity_map_address(IDENTITY_MAP_AT)
            .map_err(Error::kvm("place the identity map"))?;
        vm.set_tss_address(TSS_AT)
            .map_err(Error::kvm("place the TSS"))?;
        let this = Self {
            vm: Arc::new(vm),
            kvm,
            memory,
            cpuid,
            ram,
            fence: false,
        };
        this.map_ram(ram)?;
        Ok(this)
    }

    /// Maps `bytes` of RAM (0: takes it away) as memory slot 0.
    fn map_ram(&self, bytes: u64) -> Result<()> {
        let host = self.memory.get_host_address(GuestAddress(0))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: bytes,
            userspace_addr: host as u64,
        };
        // SAFETY: `host` starts a mapping of at least `bytes` bytes that `self.memory` owns, and
        // `Drop` removes the slot before that mapping goes; nobody borrows guest RAM as
        // ordinary Rust memory.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Error::kvm("map guest RAM"))
    }

    /// The VM's descriptor, for ioeventfds, coalesced zones and the like. Memory slot 0 is taken.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The system's descriptor.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Guest RAM, starting at guest physical address 0.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Makes vCPU `index` and loads `program` on it. Indices count from 0 and each can be made
    /// once. Until the next [`reload`](Self::reload), `KVM_RUN` runs the program to its `HLT`.
    ///
    /// Keep the `MicroVm` while the vCPU runs: dropping it takes the RAM away, and `KVM_RUN`
    /// then fails.
    pub fn vcpu(&self, index: u64, program: &Program) -> Result<VcpuFd> {
        let area = Area::new(index, self.ram)?;
        // First, so that a refused program leaves the index free.
        let image = assemble(program, area, self.ram, self.fence)?;
        let vcpu = self
            .vm
            .create_vcpu(index)
            .map_err(Error::kvm("create a vCPU"))?;
        vcpu.set_cpuid2(&self.cpuid)
            .map_err(Error::kvm("set CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read segments"))?;
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
            &mut sregs.cs,
        ] {
            segment.base = 0;
            segment.limit = u32::MAX;
            segment.selector = 0x10;
            segment.type_ = 3; // read, write, accessed
            segment.present = 1;
            segment.dpl = 0;
            segment.db = 1;
            segment.s = 1;
            segment.l = 0;
            segment.g = 1;
            segment.unusable = 0;
        }
        sregs.cs.selector = 8;
        sregs.cs.type_ = 11; // execute, read, accessed
        sregs.cr0 = CR0_PE_ET;
        sregs.cr4 = CR4_OSFXSR_OSXMMEXCPT;
        sregs.efer = 0;
        vcpu.set_sregs(&sregs).map_err(Error::kvm("set segments"))?;
        self.load(&vcpu, area, program, &image)?;
        Ok(vcpu)
    }

    /// Loads another program on vCPU `index`, which has not run yet or has halted. Its log and
    /// timings start anew; cells stay as they are.
    pub fn reload(&self, vcpu: &VcpuFd, index: u64, program: &Program) -> Result<()> {
        let area = Area::new(index, self.ram)?;
        let image = assemble(program, area, self.ram, self.fence)?;
        self.load(vcpu, area, program, &image)
    }

    fn load(&self, vcpu: &VcpuFd, area: Area, program: &Program, image: &Image) -> Result<()> {
        let put = |bytes: &[u8], at: u32| self.memory.write_slice(bytes, GuestAddress(at.into()));
        put(&image.code, area.code())?;
        put(&image.pool, area.pool())?;
        put(&vec![0; program.reads * 8], area.log())?;
        put(&vec![0; program.timings * 4], area.timings())?;
        for (i, count) in [program.reads, program.timings].into_iter().enumerate() {
            put(&(count as u64).to_le_bytes(), area.header() + 8 * i as u32)?;
        }
        let regs = kvm_regs {
            rip: area.code().into(),
            rflags: 2,
            rbp: area.log().into(),
            rdi: area.timings().into(),
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))
    }

    /// What the reads of vCPU `index`'s program returned, in the order of execution, widened with
    /// zeros. Complete once the vCPU has halted; until then, what is still to come is 0.
    pub fn log(&self, index: u64) -> Result<Vec<u64>> {
        let area = Area::new(index, self.ram)?;
        let bytes = self.results(area.header(), area.log(), 8)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u64::from_le_bytes(*b))
            .collect())
    }

    /// How long the timed sections of vCPU `index`'s program took, in TSC ticks, in the order of
    /// execution. Complete once the vCPU has halted; until then, what is still to come is 0.
    pub fn timings(&self, index: u64) -> Result<Vec<u32>> {
        let area = Area::new(index, self.ram)?;
        let bytes = self.results(area.header() + 8, area.timings(), 4)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect())
    }

    fn results(&self, count_at: u32, at: u32, entry: u64) -> Result<Vec<u8>> {
        let count: u64 = self.memory.read_obj(GuestAddress(count_at.into()))?;
        // The guest could have overwritten its header.
        let mut bytes = vec![0; (count * entry).min(Area::LOG_BYTES as u64) as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at.into()))?;
        Ok(bytes)
    }

    /// Guest physical address of a [cell](Self::cell), for devices that access guest RAM.
    pub fn cell_address(&self, cell: u32) -> Result<u64> {
        match cell < CELLS {
            true => Ok(cell_at(cell).into()),
            false => Err(Error::BadCell(cell)),
        }
    }

    /// One of [`CELLS`] words in guest RAM (a cache line each, initially 0) that all vCPUs and
    /// the host share.
    pub fn cell(&self, cell: u32) -> Result<&AtomicU32> {
        if cell >= CELLS {
            return Err(Error::BadCell(cell));
        }
        let region = self
            .memory
            .find_region(GuestAddress(0))
            .ok_or(Error::BadCell(cell))?;
        region
            .get_atomic_ref(cell_at(cell) as usize)
            .map_err(|_| Error::BadCell(cell))
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        // Somebody may still hold the VM or a vCPU; they must not reach memory that is unmapped.
        if self.map_ram(0).is_err() {
            // Then the mapping has to stay for ever.
            std::mem::forget(self.memory.clone());
        }
    }
}

/// Whether time stamps need `lfence`, and a guest here can execute it.
///
/// Where KVM emulates the guest's instructions one by one, or `rdtsc` exits, each is ordered
/// anyway and a fence would only add to what it delimits: there, two time stamps in a row are
/// thousands of ticks apart, not tens.
fn fence_helps() -> Result<bool> {
    const FAST_TICKS: u32 = 500;
    let mut vm = MicroVm::bare(crate::DEFAULT_RAM)?;
    vm.fence = true;
    let mut program = Program::new();
    program.repeat(32, |p| {
        p.timed(|_| {});
    });
    let mut vcpu = vm.vcpu(0, &program)?;
    let halted = matches!(vcpu.run(), Ok(VcpuExit::Hlt));
    Ok(halted && vm.timings(0)?.into_iter().min() < Some(FAST_TICKS))
}
