//! The privileged side: holds a program for one unprivileged VMM and changes it on request.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ioregion_abi::bpf::MAX_DOORBELLS;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::control::{Control, PortFds};
use super::local::Local;
use super::program::LoadError;
use super::protocol::{
    MAX_FRAME, MAX_SLOTS, Reply, Request, VERSION, unpack_entry, unpack_key, unpack_vcpu, zone,
};
use crate::frame::{self, FrameError};

/// Serves one VMM until it hangs up: loads a program for it, hands over the descriptors of its
/// maps, and registers vCPU threads and doorbells on request.
///
/// A VMM can register only threads of the process that made the connection (`SO_PEERCRED`), so
/// it can never watch another VMM's accesses. The links stay here: when this returns, or the
/// process ends in whatever way, the program is gone.
///
/// # Errors
///
/// [`LoadError`] if the program cannot be loaded; the client is told the errno. The socket's if
/// the client breaks the protocol.
pub fn serve_vmm(socket: &UnixStream, object: &[u8]) -> Result<(), LoadError> {
    let peer = getsockopt(socket, PeerCredentials).map_err(|errno| LoadError::Io(errno.into()))?;
    let program = Local::load(object, MAX_DOORBELLS).inspect_err(|error| {
        let errno = match error {
            LoadError::NotPermitted(_) => libc::EPERM,
            LoadError::NoTracepoint { .. } => libc::ENOENT,
            _ => libc::EIO,
        };
        // The client may be gone already.
        let _ = frame::send(socket, &Reply::Failed(errno), &[], MAX_FRAME);
    })?;
    let mut client = Client {
        program,
        pid: peer.pid(),
        slots: 0,
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

struct Client {
    program: Local,
    pid: i32,
    slots: u32,
    ports: Vec<(u32, u32)>,
}

impl Client {
    fn handle(&mut self, request: &Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let program = &self.program;
        let errno = |errno| Err(io::Error::from_raw_os_error(errno));
        let number = |number| Ok((Reply::Number(number), Vec::new()));
        match request {
            Request::Hello { version } if *version != VERSION => return errno(libc::EPROTO),
            Request::Hello { .. } => {
                let fds = [program.records(), program.whoami()].map(|fd| fd.try_clone_to_owned());
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
            Request::RemovePort { port } => {
                let Some(at) = self.ports.iter().position(|(other, _)| other == port) else {
                    return errno(libc::ENOENT);
                };
                program.remove_port(*port)?;
                self.slots -= self.ports.swap_remove(at).1;
            }
            Request::Insert(entries) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|(key, entry)| (unpack_key(key), unpack_entry(entry)))
                    .collect();
                program.insert(&entries)?;
            }
            Request::Remove(keys) => {
                program.remove(&keys.iter().map(unpack_key).collect::<Vec<_>>())?;
            }
            Request::SetZone {
                granule,
                vm,
                bus,
                port,
            } => program.set_zone(zone(*granule, *vm, *bus), *port)?,
            Request::Bind { thread, vcpu } => {
                let task = PathBuf::from(format!("/proc/{}/task/{thread}", self.pid));
                if vcpu.is_some() && !task.exists() {
                    return errno(libc::EPERM);
                }
                program.bind(*thread, vcpu.as_ref().map(unpack_vcpu))?;
            }
            Request::NewVm => return number(program.new_vm()?.into()),
            Request::NewRecord => return number(program.new_record()?.into()),
            Request::FreeRecord(record) => program.free_record(*record)?,
            Request::RecursionMisses => return number(program.recursion_misses()?),
        }
        Ok((Reply::Done, Vec::new()))
    }
}
