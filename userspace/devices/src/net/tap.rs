//! A TAP device: the end of a network interface of this machine that a process holds.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::{Link, header, sys};

const PATH: &str = "/dev/net/tun";

/// The requests (`ioctl`) that a [`Tap`] makes once it is open: what a filter of system calls has
/// to let through.
pub const TAP_REQUESTS: [u64; 1] = [libc::TUNSETOFFLOAD];

/// Which of the TAP's offloads a feature of the driver's allows.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// UDP segmentation, which TAP devices know for both versions of IP together, or (before Linux
/// 6.2) not at all.
const USO: (u64, u32) = (
    1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6,
    libc::TUN_F_USO4 | libc::TUN_F_USO6,
);

/// A TAP device that this process has attached itself to.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: File,
    mtu: u16,
    uso: bool,
}

/// Why a TAP device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// A name that no interface can have.
    #[error(
        "{0:?} cannot be a network interface's name: 1 to 15 bytes, no white space, and none of \
         `/`, `:` and `%`"
    )]
    Name(String),
    /// The kernel's TAP driver cannot be reached.
    #[error("{PATH}: {0}{remedy}", remedy = open_remedy(.0))]
    Open(io::Error),
    /// The device cannot be attached to, or made.
    #[error("the TAP device {name}: {error}{remedy}", remedy = attach_remedy(.error))]
    Attach {
        /// Its name.
        name: String,
        /// Why not.
        error: io::Error,
    },
    /// The device lacks something.
    #[error("the TAP device {name}: {what}: {error}")]
    SetUp {
        /// Its name.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
}

fn open_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV) => "; is the module tun loaded (`modprobe tun`)?",
        Some(libc::EACCES | libc::EPERM) => "; run as root, or give this user the file",
        _ => "",
    }
}

fn attach_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EPERM) => {
            "; run as root, or have it made for this user (`ip tuntap add dev NAME mode tap user \
             USER`)"
        }
        Some(libc::EINVAL) => {
            "; there is an interface of this name that is no TAP device with a single queue"
        }
        _ => "",
    }
}

impl Tap {
    /// Attaches to a TAP device, which is made, and ends with the process, where there is none.
    ///
    /// # Errors
    ///
    /// Names the device, what is wrong with it, and the remedy.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let bad = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, 0 | b'/' | b':' | b'%');
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) {
            return Err(TapError::Name(name.into()));
        }
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let file = options.open(PATH).map_err(TapError::Open)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        sys::set_device(&file, name, flags).map_err(|error| TapError::Attach {
            name: name.into(),
            error,
        })?;
        let failed = |what| {
            move |error| TapError::SetUp {
                name: name.into(),
                what,
                error,
            }
        };
        let bytes = const { header::BYTES as libc::c_int };
        sys::set_header(&file, bytes)
            .and_then(|()| sys::set_little_endian(&file))
            .map_err(failed("headers of virtio 1"))?;
        let tap = Self {
            name: name.into(),
            mtu: mtu(name).map_err(failed("its MTU"))?,
            uso: sys::set_offloads(&file, libc::TUN_F_CSUM | USO.1).is_ok(),
            file,
        };
        // Another process may have left some, too.
        tap.set_offloads(0).map_err(failed("no offloads"))?;
        Ok(tap)
    }

    /// What an error of reading or writing means.
    fn gone(&self, error: io::Error) -> io::Error {
        match error.raw_os_error() {
            Some(libc::EBADFD) => io::Error::new(
                io::ErrorKind::NotConnected,
                format!("the TAP device {} was removed", self.name),
            ),
            _ => error,
        }
    }
}

/// The MTU of an interface. Larger ones than a packet can have do not exist.
fn mtu(name: &str) -> io::Result<u16> {
    // Any socket will do.
    let mtu = sys::mtu(UnixDatagram::unbound()?, name)?;
    u16::try_from(mtu).map_err(|_| io::Error::other(format!("{mtu} bytes")))
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Link for Tap {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(into).map_err(|error| self.gone(error))
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        // A packet goes whole or not at all.
        let sent = (&self.file).write(packet);
        sent.map(drop).map_err(|error| self.gone(error))
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        let taken = OFFLOADS
            .iter()
            .filter(|(feature, _)| features & 1 << feature != 0);
        let mut offloads = taken.fold(0, |all, (_, offload)| all | offload);
        if features & USO.0 == USO.0 {
            offloads |= USO.1;
        }
        sys::set_offloads(&self.file, offloads)
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn has_uso(&self) -> bool {
        self.uso
    }
}
