//! A device task in a process of its own: takes a device's end from the Unix socket that is its
//! standard input and serves a file of registers until the VMM is gone.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result};
use ioregion_dispatch::server::{Stop, WaitPolicy, serve};
use ioregion_dispatch::{Access, Device, handoff};

/// Reads return what was written there last.
#[derive(Debug, Default)]
struct Registers(HashMap<u64, u64>);

impl Device for Registers {
    fn read(&mut self, access: Access) -> u64 {
        self.0.get(&access.offset).copied().unwrap_or(0)
    }

    fn write(&mut self, access: Access, data: u64) {
        self.0.insert(access.offset, data);
    }
}

fn main() -> Result<()> {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let end = handoff::recv(&socket).context("receiving the device's end")?;
    let stop = Stop::new()?;
    let stats = serve(end, &mut Registers::default(), WaitPolicy::Sleep, &stop)?;
    println!("{stats:?}");
    Ok(())
}
