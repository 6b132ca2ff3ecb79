//! Runs a vCPU to its `HLT` and records what it did.
#![allow(dead_code, reason = "each test crate uses its part")]

use ioregion_microguest::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};

/// One exit: where, and the bytes (written, or handed back for a read).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub bus: Bus,
    pub write: bool,
    pub addr: u64,
    pub data: Vec<u8>,
}

pub fn written(bus: Bus, addr: u64, data: &[u8]) -> Exit {
    Exit {
        bus,
        write: true,
        addr,
        data: data.to_vec(),
    }
}

pub fn read(bus: Bus, addr: u64, data: &[u8]) -> Exit {
    Exit {
        bus,
        write: false,
        addr,
        data: data.to_vec(),
    }
}

/// Runs until `HLT`; the n-th byte read over all accesses is n.
pub fn run(vcpu: &mut VcpuFd) -> Vec<Exit> {
    let mut exits = Vec::new();
    let mut bytes = 1_u8;
    let mut answer = |data: &mut [u8]| {
        data.iter_mut().for_each(|b| {
            *b = bytes;
            bytes = bytes.wrapping_add(1);
        })
    };
    loop {
        exits.push(match vcpu.run().expect("KVM_RUN") {
            VcpuExit::MmioWrite(addr, data) => written(Bus::Mmio, addr, data),
            VcpuExit::IoOut(port, data) => written(Bus::Pio, port.into(), data),
            VcpuExit::MmioRead(addr, data) => {
                answer(data);
                read(Bus::Mmio, addr, data)
            }
            VcpuExit::IoIn(port, data) => {
                answer(data);
                read(Bus::Pio, port.into(), data)
            }
            VcpuExit::Hlt => return exits,
            other => panic!("unexpected exit {other:?}"),
        });
    }
}
