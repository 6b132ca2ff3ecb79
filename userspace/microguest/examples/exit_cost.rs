//! What one access costs the vCPU when it goes to user space, with the floors beside it.

use ioregion_microguest::{Bus, DEFAULT_RAM, Error, MMIO_BASE, MicroVm, Program, TscClock};
use kvm_ioctls::VcpuExit;

const N: u32 = 20_000;
const PORT: u64 = 0x510;

type Body = fn(&mut Program);

const ROWS: [(&str, Body); 6] = [
    ("nothing", |_| {}),
    ("store to RAM", |p| {
        p.ram_store_counter(0, 0, 1);
    }),
    ("MMIO write, 4 bytes", |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE, 4, 0, 1);
    }),
    ("MMIO write, 8 bytes", |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE, 8, 0, 1);
    }),
    ("MMIO read, 4 bytes", |p| {
        p.read(Bus::Mmio, MMIO_BASE, 4);
    }),
    ("PIO write, 4 bytes", |p| {
        p.write_counter(Bus::Pio, PORT, 4, 0, 1);
    }),
];

fn main() -> Result<(), Error> {
    let vm = MicroVm::new(DEFAULT_RAM)?;
    let mut vcpu = vm.vcpu(0, &Program::new())?;
    let clock = TscClock::of(&vcpu);
    println!("{N} accesses each, TSC {} kHz, ns per access", clock.khz);
    println!("{:<22}{:>9}{:>9}{:>9}", "", "p50", "p99", "max");
    for (name, body) in ROWS {
        let mut program = Program::new();
        program.repeat(N, |p| {
            p.timed(body);
        });
        vm.reload(&vcpu, 0, &program)?;
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(_) => {}
                Err(source) => {
                    return Err(Error::Kvm {
                        what: "run the vCPU",
                        source,
                    });
                }
            }
        }
        let mut ticks = vm.timings(0)?;
        ticks.sort_unstable();
        let at = |q: f64| clock.ns(ticks[((ticks.len() - 1) as f64 * q) as usize].into());
        println!(
            "{name:<22}{:>9.0}{:>9.0}{:>9.0}",
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
    Ok(())
}
