//! The privileged side: holds a program for one unprivileged VMM and changes it on request.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ioregion_abi::bpf::{CONTROL_WORDS, MAX_DOORBELLS, MAX_REGISTERS, SlotBlock};
use nix::sys::socket::{MsgFlags, getsockopt, sockopt::PeerCredentials};

use super::control::{Control, PortFds};
use super::local::Local;
use super::program::LoadError;
use super::protocol::{MAX_FRAME, Reply, Request, VERSION, unpack_entry, unpack_key, zone};
use super::quota::{self, Quota};
use crate::frame::{self, FrameError};
use crate::sys::pidfd;

/// Serves one VMM until it hangs up: loads a program for it, hands over the descriptors of its
/// maps, and registers vCPU threads and doorbells on request.
///
/// A VMM can register only threads of the process that made the connection (`SO_PEERCRED`), and
/// the program looks at a thread's process each time, so it can never watch another VMM's
/// accesses. The caller must run in the initial PID namespace, whose ids the program sees. The
/// links stay here: when this returns, or the process ends in whatever way, the program is gone.
///
/// What a VMM can have of the kernel's memory is bounded: 256 MiB for its doorbells (4096 ports), 64 MiB
/// for its register files (4096 of them), counted in whole pages as long as anybody has the map. A
/// caller without CAP_SYS_ADMIN cannot tell how long that is, and counts each until the VMM hangs
/// up.
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
        ports: HashSet::new(),
        records: HashSet::new(),
        port_maps: Quota::ports(),
        registers: Quota::registers(),
    };
    loop {
        let request = match frame::recv::<Request>(socket, MAX_FRAME, 0) {
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
    ports: HashSet<u32>,
    records: HashSet<u32>,
    port_maps: Quota,
    registers: Quota,
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
                let blocks = SlotBlock::count((*slots).max(1));
                let bytes = [
                    quota::array(size_of::<SlotBlock>(), blocks),
                    quota::array(size_of::<u64>(), CONTROL_WORDS),
                    quota::RING,
                ];
                let all = bytes.into_iter().fold(0, u64::saturating_add);
                self.port_maps.check(bytes.len(), all)?;
                let PortFds {
                    port,
                    slots: map,
                    controls,
                    ringbuf,
                } = program.create_port(*slots)?;
                let fds = vec![map, controls, ringbuf];
                for (fd, bytes) in fds.iter().zip(bytes) {
                    self.port_maps.charge(fd, bytes)?;
                }
                self.ports.insert(port);
                return Ok((Reply::Number(port.into()), fds));
            }
            Request::Retire { keys, port } => {
                if port.is_some_and(|port| !self.ports.contains(&port)) {
                    return errno(libc::ENOENT);
                }
                program.retire(&keys.iter().map(unpack_key).collect::<Vec<_>>(), *port)?;
                if let Some(port) = port {
                    self.ports.remove(port);
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
                let bytes = quota::array(size_of::<u64>(), *len);
                self.registers.check(1, bytes)?;
                let map = program.create_registers(*len)?;
                self.registers.charge(&map, bytes)?;
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
