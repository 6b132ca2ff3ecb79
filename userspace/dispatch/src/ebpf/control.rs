//! What has to be done with privileges: creating maps and changing the match table.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::program::LoadError;
use ioregion_abi::bpf::{MatchEntry, MatchKey, ZoneKey};

/// The descriptors of a new port.
#[derive(Debug)]
pub(crate) struct PortFds {
    pub(crate) port: u32,
    /// The slots; user space cannot write through it.
    pub(crate) slots: OwnedFd,
    pub(crate) controls: OwnedFd,
    pub(crate) ringbuf: OwnedFd,
}

/// Whoever holds the program: this process, or a privileged loader.
pub(crate) trait Control: Send + Sync + fmt::Debug {
    /// Makes the maps of a new port.
    fn create_port(&self, slots: u32) -> io::Result<PortFds>;
    /// Adds entries to the match table; all or none.
    fn insert(&self, entries: &[(MatchKey, MatchEntry)]) -> io::Result<()>;
    /// Removes entries from the match table and frees a port. Nothing is added meanwhile, and
    /// no run of the program that has seen an entry is left when this returns. The port's slots
    /// stay readable for whoever has them mapped.
    fn retire(&self, keys: &[MatchKey], port: Option<u32>) -> io::Result<()>;
    /// Announces the writes to a granule to a port, or to none.
    fn set_zone(&self, granule: ZoneKey, port: Option<u32>) -> io::Result<()>;
    /// Says that a thread runs the vCPU with this record from now on, or (`None`) no more.
    fn bind(&self, thread: u32, record: Option<u32>) -> io::Result<()>;
    /// A number for a new virtual machine.
    fn new_vm(&self) -> io::Result<u32>;
    /// The index of an unused record, for a vCPU of a virtual machine.
    fn new_record(&self, vm: u32) -> io::Result<u32>;
    /// Gives a record back.
    fn free_record(&self, record: u32) -> io::Result<()>;
    /// Makes an array map for a register file of this many registers.
    fn create_registers(&self, len: u32) -> io::Result<OwnedFd>;
    /// The map of vCPU records.
    fn records(&self) -> BorrowedFd<'_>;
    /// The program that tells a thread's id.
    fn whoami(&self) -> BorrowedFd<'_>;
    /// The program that KVM shows accesses to.
    fn hook(&self) -> BorrowedFd<'_>;
    /// How often the kernel skipped the programs because they were running already.
    fn recursion_misses(&self) -> io::Result<u64>;
    /// Becomes ready when the holder goes away, and with it the program.
    fn hangup(&self) -> Option<BorrowedFd<'_>>;
    /// After a hang-up, waits until the program is detached: a holder that is killed may lose its
    /// socket first, and what the program still captures would be carried twice.
    fn await_end(&self) {}
    /// Attaches the programs to KVM's tracepoints, or detaches them, unless that is so already.
    fn set_attached(&self, attached: bool) -> Result<(), LoadError>;
    /// Prints what the program has logged.
    #[cfg(feature = "log")]
    fn flush_log(&self) {}
}
