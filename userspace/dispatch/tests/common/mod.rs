//! What several test files need.
#![allow(dead_code, reason = "each test file uses a part")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioregion_abi::bpf::{CONTROL_ARM, CONTROL_WORDS, SlotBlock};
use ioregion_abi::wire::{Command as WireCommand, Layout, Operation, Response};
use ioregion_dispatch::wire::{Message, Try, Wire, WireError};
use ioregion_dispatch::{Access, Device, Ring, Size};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// A message that says which it is.
pub fn numbered(n: u64) -> Message {
    let mut message = [0; 32];
    for (bytes, word) in
        message
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip([n, !n, n.wrapping_mul(3), n ^ 0x5555])
    {
        *bytes = word.to_ne_bytes();
    }
    message
}

/// Sleeps until the wire has something to do, by the rules of the trait.
pub fn sleep(wire: &mut dyn Wire, to_send: bool) {
    if !wire.prepare_sleep(to_send) {
        return;
    }
    let mut fds: Vec<PollFd> = (wire.poll_fds(to_send).into_iter().flatten())
        .map(|(fd, events)| PollFd::new(fd, events))
        .collect();
    let n = poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap();
    assert!(n > 0, "nothing happened for 10 s");
    wire.finish_sleep();
}

pub fn recv(wire: &mut dyn Wire) -> Result<Message, WireError> {
    loop {
        match wire.try_recv()? {
            Try::Done(message) => return Ok(message),
            Try::WouldBlock => sleep(wire, false),
        }
    }
}

pub fn send(wire: &mut dyn Wire, message: &Message) -> Result<(), WireError> {
    while wire.try_send(message)? == Try::WouldBlock {
        sleep(wire, true);
    }
    while wire.try_flush()? == Try::WouldBlock {
        sleep(wire, true);
    }
    Ok(())
}

/// A command for region 7, 4 bytes.
pub fn command(operation: Operation, offset: u64, data: u64, response: bool) -> Message {
    let size = Size::B4;
    WireCommand {
        operation,
        size,
        response,
        user_data: 7,
        offset,
        data,
    }
    .encode(Layout::Info)
}

/// A read, as the VMM does it.
pub fn read(vmm: &mut dyn Wire, offset: u64) -> u64 {
    send(vmm, &command(Operation::Read, offset, 0, true)).unwrap();
    Response::decode(&recv(vmm).unwrap()).data
}

/// A small generator (xorshift), so that runs repeat.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What a device saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Read(Access),
    Write(Access, u64),
    Doorbell(Ring),
}

/// Records everything, and counts the writes of doorbells for who looks on. A read answers 1000
/// plus the number of accesses seen before.
#[derive(Debug, Default)]
pub struct Recorder(pub Vec<Seen>, pub Arc<AtomicU64>);

impl Device for Recorder {
    fn read(&mut self, access: Access) -> u64 {
        self.0.push(Seen::Read(access));
        999 + self.0.len() as u64
    }
    fn write(&mut self, access: Access, data: u64) {
        self.0.push(Seen::Write(access, data));
    }
    fn doorbell(&mut self, ring: Ring) {
        self.0.push(Seen::Doorbell(ring));
        self.1.fetch_add(ring.writes, Ordering::SeqCst);
    }
}

pub fn ring(index: u32, offset: u64, value: Option<u64>, writes: u64) -> Ring {
    Ring {
        user_data: 7,
        index,
        offset,
        size: Size::B4,
        value,
        writes,
    }
}

/// Sealed memory.
pub fn memory(len: usize) -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&fd, len as i64).unwrap();
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    fd
}

/// A second mapping of the memory; stays for the rest of the process.
pub fn words(fd: impl AsFd, len: usize) -> &'static [AtomicU64] {
    let (prot, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_SHARED,
    );
    // SAFETY: A fresh mapping of sealed memory that is never unmapped, seen as atomics only.
    unsafe {
        let start = mmap(None, len.try_into().unwrap(), prot, flags, fd, 0).unwrap();
        std::slice::from_raw_parts(start.as_ptr().cast(), len / 8)
    }
}

/// Memory in the place of a port's BPF maps, with the program's side of it.
pub struct FakeMaps {
    pub slots: OwnedFd,
    pub controls: OwnedFd,
    pub slot_words: &'static [AtomicU64],
    pub control_words: &'static [AtomicU64],
}

impl FakeMaps {
    pub fn new(slots: u32) -> Self {
        let slots_len = SlotBlock::count(slots) as usize * size_of::<SlotBlock>();
        let controls_len = CONTROL_WORDS as usize * 8;
        let (slots, controls) = (memory(slots_len), memory(controls_len));
        Self {
            slot_words: words(&slots, slots_len),
            control_words: words(&controls, controls_len),
            slots,
            controls,
        }
    }

    /// What the program does for a doorbell; returns whether it would wake.
    pub fn ring(&self, slot: u32, value: u64) -> bool {
        use ioregion_dispatch::arm;
        let (block, slot) = SlotBlock::place(slot);
        let words = &self.slot_words[block as usize * size_of::<SlotBlock>() / 8..];
        let at = std::mem::offset_of!(SlotBlock, slots) / 8 + 2 * slot as usize;
        arm::publish(&words[at], &words[at + 1], &words[0], value);
        arm::take(&self.control_words[CONTROL_ARM as usize], 1)
    }
}

/// Runs one ignored test of this binary in a process of its own; `socket` is its standard input.
pub fn process(test: &str, socket: UnixStream) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "--test-threads=1",
            test,
        ])
        .env("DISPATCH_TEST_PROCESS", "1")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// In such a process: the socket.
pub fn process_socket() -> Option<UnixStream> {
    std::env::var_os("DISPATCH_TEST_PROCESS")?;
    Some(UnixStream::from(
        std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
    ))
}
