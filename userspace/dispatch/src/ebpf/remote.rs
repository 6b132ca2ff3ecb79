//! The program held by a privileged loader: the client's side.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ioregion_abi::bpf::{MatchEntry, MatchKey, ZoneKey};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials};
use nix::unistd::getpid;

use super::control::{Control, PortFds};
use super::program::LoadError;
use super::protocol::{MAX_FRAME, MAX_REPLY_FDS, Reply, Request, VERSION, pack_entry, pack_key};
use crate::frame;
use crate::sys::pidfd;

/// A program in another process.
#[derive(Debug)]
pub(crate) struct Remote {
    /// Locked for one request and its reply.
    socket: Mutex<UnixStream>,
    watched: UnixStream,
    records: OwnedFd,
    whoami: OwnedFd,
    hook: OwnedFd,
    /// The loader's process; none where it cannot be seen from here.
    loader: Option<OwnedFd>,
}

/// How long a process may take to end after it has closed its socket.
const DEATH: Duration = Duration::from_secs(1);

impl Remote {
    pub(crate) fn connect(path: &Path) -> Result<Self, LoadError> {
        let error = |error| LoadError::Loader {
            path: path.to_owned(),
            error,
        };
        let socket = UnixStream::connect(path).map_err(error)?;
        let (reply, fds) = ask(&socket, &Request::Hello { version: VERSION }).map_err(error)?;
        let ([records, whoami, hook], Reply::Done) = (take(fds).map_err(error)?, reply) else {
            return Err(error(unexpected()));
        };
        let watched = socket.try_clone().map_err(error)?;
        let loader = getsockopt(&socket, PeerCredentials).map(|peer| peer.pid());
        let loader = loader.ok().filter(|pid| *pid != getpid().as_raw());
        Ok(Self {
            loader: loader.and_then(|pid| pidfd::open(pid).ok()),
            socket: Mutex::new(socket),
            watched,
            records,
            whoami,
            hook,
        })
    }

    fn ask(&self, request: &Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&socket, request)
    }

    fn done(&self, request: &Request) -> io::Result<()> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(unexpected()),
        }
    }

    fn number(&self, request: &Request) -> io::Result<(u64, Vec<OwnedFd>)> {
        match self.ask(request)? {
            (Reply::Number(number), fds) => Ok((number, fds)),
            _ => Err(unexpected()),
        }
    }

    fn small(&self, request: &Request) -> io::Result<u32> {
        self.number(request)?.0.try_into().map_err(|_| unexpected())
    }
}

fn ask(socket: &UnixStream, request: &Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
    frame::send(socket, request, &[], MAX_FRAME)?;
    match frame::recv(socket, MAX_FRAME, MAX_REPLY_FDS)? {
        (Reply::Failed(errno), _) => Err(io::Error::from_raw_os_error(errno)),
        answered => Ok(answered),
    }
}

fn take<const N: usize>(fds: Vec<OwnedFd>) -> io::Result<[OwnedFd; N]> {
    fds.try_into().map_err(|_| unexpected())
}

fn unexpected() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the loader answers something else than was asked",
    )
}

impl Control for Remote {
    fn create_port(&self, slots: u32) -> io::Result<PortFds> {
        let (port, fds) = self.number(&Request::CreatePort { slots })?;
        let [slots, controls, ringbuf] = take(fds)?;
        let port = port.try_into().map_err(|_| unexpected())?;
        Ok(PortFds {
            port,
            slots,
            controls,
            ringbuf,
        })
    }

    fn insert(&self, entries: &[(MatchKey, MatchEntry)]) -> io::Result<()> {
        let entries = entries
            .iter()
            .map(|(key, entry)| (pack_key(key), pack_entry(entry)));
        self.done(&Request::Insert(entries.collect()))
    }

    fn retire(&self, keys: &[MatchKey], port: Option<u32>) -> io::Result<()> {
        let keys = keys.iter().map(pack_key).collect();
        self.done(&Request::Retire { keys, port })
    }

    fn set_zone(&self, granule: ZoneKey, port: Option<u32>) -> io::Result<()> {
        self.done(&Request::SetZone {
            granule: granule.granule,
            vm: granule.vm,
            bus: granule.bus,
            port,
        })
    }

    fn bind(&self, thread: u32, record: Option<u32>) -> io::Result<()> {
        self.done(&Request::Bind { thread, record })
    }

    fn new_vm(&self) -> io::Result<u32> {
        self.small(&Request::NewVm)
    }

    fn new_record(&self, vm: u32) -> io::Result<u32> {
        self.small(&Request::NewRecord { vm })
    }

    fn free_record(&self, record: u32) -> io::Result<()> {
        self.done(&Request::FreeRecord(record))
    }

    fn create_registers(&self, len: u32) -> io::Result<OwnedFd> {
        match self.ask(&Request::CreateRegisters { len })? {
            (Reply::Done, fds) => take(fds).map(|[map]| map),
            _ => Err(unexpected()),
        }
    }

    fn records(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }

    fn whoami(&self) -> BorrowedFd<'_> {
        self.whoami.as_fd()
    }

    fn hook(&self) -> BorrowedFd<'_> {
        self.hook.as_fd()
    }

    fn recursion_misses(&self) -> io::Result<u64> {
        Ok(self.number(&Request::RecursionMisses)?.0)
    }

    fn hangup(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watched.as_fd())
    }

    fn set_attached(&self, attached: bool) -> Result<(), LoadError> {
        if !attached {
            return Err(LoadError::Io(io::ErrorKind::Unsupported.into()));
        }
        self.done(&Request::Attach).map_err(LoadError::attached)
    }

    fn await_end(&self) {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        if matches!(recv(self.watched.as_raw_fd(), &mut [0], peek), Ok(1)) {
            // A farewell: the loader lives on, and has detached the program before it hung up.
            return;
        }
        if let Some(loader) = &self.loader
            && let Err(error) = pidfd::await_end(loader, DEATH)
        {
            tracing::warn!(%error, "cannot wait for the end of the eBPF loader");
        }
    }
}
