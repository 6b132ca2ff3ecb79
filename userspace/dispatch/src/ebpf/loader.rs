//! The privileged side: holds a program for one unprivileged VMM and changes it on request.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ioregion_abi::bpf::{MAX_DOORBELLS, MAX_REGISTERS};
use nix::sys::socket::{MsgFlags, getsockopt, sockopt::PeerCredentials};

use super::control::{Control, PortFds};
use super::local::Local;
use super::program::LoadError;
use super::protocol::{
    MAX_ALL_REGISTERS, MAX_FRAME, MAX_SLOTS, Reply, Request, VERSION, unpack_entry, unpack_key,
    zone,
};
use crate::frame::{self, FrameError};
use crate::sys::pidfd;

/// Serves one VMM until it hangs up: loads a program for it, hands over the descriptors of its
/// maps, and registers vCPU threads and doorbells on request.
///
/// A VMM can register only threads of the process that made the connection (`SO_PEERCRED`), and
/// the program looks at a thread's process each time, so it can never watch another VMM's
/// accesses. The caller must run in the initial PID namespace, whose ids the program sees. The links stay here: when this returns, or the
/// process ends in whatever way, the program is gone.
///
/// # Errors
///
/// [`LoadError`] if the program cannot be loaded; the client is told the errno. The socket's if
/// the client breaks the protocol.
pub fn serve_vmm(socket: &UnixStream, object: &[u8]) -> Result<(), LoadError> {
    let peer = getsockopt(socket, PeerCredentials).map_err(|errno| LoadError::Io(errno.into()))?;
    let process = Some(peer.pid().cast_unsigned());
    let program = Local::load(object, MAX_DOORBELLS, process).inspect_err(|error| {
        // The client may be gone already.
        let refusal = Reply::Failed(error.errno() as i32);
        let _ = frame::send(socket, &refusal, &[], MAX_FRAME);
    })?;
    // Before the client, so that it comes after the program's end.
    let _farewell = Farewell(socket);
    let mut client = Client {
        program,
        pid: peer.pid(),
        process: pidfd::open(peer.pid()).map_err(LoadError::Io)?,
        slots: 0,
        registers: 0,
        records: HashSet::new(),
        ports: Vec::new(),
    };
    loop {
        let request = match frame::recv::<Request>(socket, MAX_FRAME) {
            Ok((request, _)) => request,
            Err(FrameError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(());
            }
            Err(error) => return Err(LoadError::Io(error.into())),
        };
        let (reply, fds) = match client.handle(&request) {
            Ok(answer) => answer,
            Err(error) => (
                Reply::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
                Vec::new(),
            ),
        };
        frame::send(socket, &reply, &fds, MAX_FRAME)
            .map_err(|error| LoadError::Io(error.into()))?;
    }
}

/// Tells a VMM that looks for it that the program is detached, though this process lives on.
struct Farewell<'a>(&'a UnixStream);

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        // A VMM that is gone needs no farewell.
        let _ = nix::sys::socket::send(self.0.as_raw_fd(), &[0], MsgFlags::MSG_NOSIGNAL);
    }
}

struct Client {
    program: Local,
    pid: i32,
    process: OwnedFd,
    slots: u32,
    registers: u32,
    ports: Vec<(u32, u32)>,
    records: HashSet<u32>,
}

impl Client {
    fn handle(&mut self, request: &Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let program = &self.program;
        let errno = |errno| Err(io::Error::from_raw_os_error(errno));
        let number = |number| Ok((Reply::Number(number), Vec::new()));
        match request {
            Request::Hello { version } if *version != VERSION => return errno(libc::EPROTO),
            Request::Hello { .. } => {
                let fds = [program.records(), program.whoami(), program.hook()];
                let fds = fds.map(|fd| fd.try_clone_to_owned());
                return Ok((Reply::Done, fds.into_iter().collect::<io::Result<_>>()?));
            }
            Request::CreatePort { slots } => {
                let total = self
                    .slots
                    .checked_add(*slots)
                    .filter(|total| *total <= MAX_SLOTS);
                let Some(total) = total else {
                    return errno(libc::ENOSPC);
                };
                let PortFds {
                    port,
                    slots: map,
                    controls,
                    ringbuf,
                } = program.create_port(*slots)?;
                self.slots = total;
                self.ports.push((port, *slots));
                return Ok((Reply::Number(port.into()), vec![map, controls, ringbuf]));
            }
            Request::Retire { keys, port } => {
                let held = |port| self.ports.iter().position(|(other, _)| *other == port);
                let at = port.map(held);
                if at == Some(None) {
                    return errno(libc::ENOENT);
                }
                program.retire(&keys.iter().map(unpack_key).collect::<Vec<_>>(), *port)?;
                if let Some(at) = at.flatten() {
                    self.slots -= self.ports.swap_remove(at).1;
                }
            }
            Request::Insert(entries) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|(key, entry)| (unpack_key(key), unpack_entry(entry)))
                    .collect();
                program.insert(&entries)?;
            }
            Request::SetZone {
                granule,
                vm,
                bus,
                port,
            } => program.set_zone(zone(*granule, *vm, *bus), *port)?,
            Request::Bind { thread, record } => {
                if record.is_some_and(|record| !self.records.contains(&record)) {
                    return errno(libc::ENOENT);
                }
                let task = PathBuf::from(format!("/proc/{}/task/{thread}", self.pid));
                // The process that connected must be alive: its id could be another's by now.
                if record.is_some() && (!task.exists() || pidfd::has_ended(&self.process)?) {
                    return errno(libc::EPERM);
                }
                program.bind(*thread, *record)?;
            }
            Request::NewVm => return number(program.new_vm()?.into()),
            Request::NewRecord { vm } => {
                let record = program.new_record(*vm)?;
                self.records.insert(record);
                return number(record.into());
            }
            Request::FreeRecord(record) => {
                if !self.records.remove(record) {
                    return errno(libc::ENOENT);
                }
                program.free_record(*record)?;
            }
            Request::CreateRegisters { len } => {
                if !(1..=MAX_REGISTERS).contains(len) {
                    return errno(libc::EINVAL);
                }
                let total = self.registers.saturating_add(*len);
                if total > MAX_ALL_REGISTERS {
                    return errno(libc::ENOSPC);
                }
                let map = program.create_registers(*len)?;
                self.registers = total;
                return Ok((Reply::Done, vec![map]));
            }
            Request::Attach => {
                let attached = program.set_attached(true);
                attached.map_err(|error| io::Error::from_raw_os_error(error.errno() as i32))?;
            }
            Request::RecursionMisses => return number(program.recursion_misses()?),
        }
        Ok((Reply::Done, Vec::new()))
    }
}
