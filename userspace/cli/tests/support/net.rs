//! A running network service: its TAP device is here, its interface in a namespace of its own.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{LONG, pattern, run, wait};

/// A network namespace that lives as long as this.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Runs something in the namespace, on a thread of its own.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// How other programs find it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs `ip` with words.
pub fn ip(words: &str) {
    run(Command::new("ip").args(words.split_whitespace()));
}

/// A running service, ended at the latest with the test.
pub struct NetService {
    pub child: Child,
    pub name: String,
    pub tap: String,
    /// The name of the interface.
    pub interface: String,
    pub namespace: Namespace,
    number: u8,
    log: tempfile::NamedTempFile,
}

impl NetService {
    /// Starts a service whose number no other test has, and sets up both ends of the network.
    pub fn start(number: u8, options: &[&str]) -> Self {
        let name = format!("net{number}");
        let tap = format!("tap{number}");
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut child = command(&name, &tap)
            .args(options)
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let interface = interface_of(&name, || {
            let ended = child.try_wait().unwrap();
            let said = fs::read_to_string(log.path()).unwrap();
            assert!(ended.is_none(), "the service ended: {ended:?}: {said}");
        });
        let service = Self {
            child,
            name,
            tap,
            interface,
            namespace: Namespace::new(),
            number,
            log,
        };
        let (tap, [outside, _]) = (&service.tap, service.addresses());
        ip(&format!("address add {outside}/24 dev {tap}"));
        if let Some([outside, _]) = service.addresses_v6() {
            ip(&format!("address add {outside}/64 dev {tap} nodad"));
        }
        ip(&format!("link set {tap} up"));
        service.plug_in();
        service
    }

    /// Moves the interface into the namespace and brings it up.
    pub fn plug_in(&self) {
        let (interface, path) = (&self.interface, self.namespace.path());
        ip(&format!("link set {interface} netns {path}"));
        self.namespace.enter(|| {
            let [_, inside] = self.addresses();
            ip(&format!("address add {inside}/24 dev {interface}"));
            if let Some([_, inside]) = self.addresses_v6() {
                ip(&format!("address add {inside}/64 dev {interface} nodad"));
            }
            ip(&format!("link set {interface} up"));
        });
    }

    /// Addresses of TAP device and interface.
    pub fn addresses(&self) -> [Ipv4Addr; 2] {
        [1, 2].map(|host| Ipv4Addr::new(10, 0, self.number, host))
    }

    /// The same of IP version 6, where the kernel has it.
    pub fn addresses_v6(&self) -> Option<[Ipv6Addr; 2]> {
        let net = 0x100 + u16::from(self.number);
        Path::new("/proc/sys/net/ipv6")
            .exists()
            .then(|| [1, 2].map(|host| Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, 0, host)))
    }

    /// Whether the driver took a feature.
    pub fn has(&self, bit: usize) -> bool {
        let device = virtio_device(&self.name).unwrap();
        let features = fs::read_to_string(device.join("features")).unwrap();
        features.as_bytes()[bit] == b'1'
    }

    /// What the kernel says of the TAP device.
    pub fn tap_says(&self, what: &str) -> u64 {
        let path = Path::new("/sys/class/net").join(&self.tap).join(what);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    /// A connection between both ends: outside, inside.
    pub fn connect(&self, outside: IpAddr) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((outside, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&to, LONG).unwrap();
        let inside = self.namespace.enter(connect);
        let (outside, _) = listener.accept().unwrap();
        for stream in [&outside, &inside] {
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.set_write_timeout(Some(LONG)).unwrap();
        }
        (outside, inside)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Ends the service by SIGTERM: interface and device are gone, and it succeeded. What it has
    /// said.
    pub fn end(mut self) -> String {
        self.signal(Signal::SIGTERM);
        let status = wait(&mut self.child);
        let said = fs::read_to_string(self.log.path()).unwrap();
        println!("{said}");
        assert!(status.success(), "{status}");
        self.is_gone();
        said
    }

    /// Nothing is left of interface and device.
    pub fn is_gone(&self) {
        let interface = self.interface.as_str();
        assert!(self.namespace.enter(|| if_nametoindex(interface)).is_err());
        assert!(!Path::new("/dev/vduse").join(&self.name).exists());
        let bus = Path::new("/sys/bus/vdpa/devices");
        assert!(!bus.join(&self.name).exists());
    }
}

impl Drop for NetService {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal(Signal::SIGTERM);
            wait(&mut self.child);
        }
    }
}

pub fn command(name: &str, tap: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ioregion"));
    command.args(["vduse", "net", "--name", name, "--tap", tap]);
    command
}

/// The virtio device that the driver made of a device on the bus.
fn virtio_device(name: &str) -> Option<PathBuf> {
    let bus = Path::new("/sys/bus/vdpa/devices").join(name);
    let mut entries = fs::read_dir(bus).ok()?.flatten();
    entries.find_map(|entry| {
        let name = entry.file_name();
        let is_virtio = name.to_str()?.starts_with("virtio");
        is_virtio.then(|| entry.path())
    })
}

/// Waits for the interface of a device, looking at something else meanwhile.
pub fn interface_of(name: &str, mut check: impl FnMut()) -> String {
    let until = Instant::now() + LONG;
    loop {
        let found = virtio_device(name)
            .and_then(|device| fs::read_dir(device.join("net")).ok()?.flatten().next());
        if let Some(found) = found {
            return found.file_name().into_string().unwrap();
        }
        check();
        assert!(Instant::now() < until, "no interface appeared");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Sends mebibytes through a connection and compares every byte that comes out.
pub fn transfer(mut from: &TcpStream, mut to: &TcpStream, mib: u64) {
    let bytes = |number: u64| -> Vec<u8> {
        let words = pattern(number);
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..mib {
                from.write_all(&bytes(number)).unwrap();
            }
        });
        let mut got = vec![0; 1 << 20];
        for number in 0..mib {
            to.read_exact(&mut got).unwrap();
            assert!(got == bytes(number), "mebibyte {number} differs");
        }
    });
}

/// Sends an echo request with as many bytes of data from the namespace that this is called in,
/// and waits for the reply.
pub fn ping(to: Ipv4Addr, len: usize) {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
        setsockopt, socket, sockopt,
    };
    use nix::sys::time::TimeVal;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Icmp,
    )
    .unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(1, 0)).unwrap();
    // Type and code, checksum, identifier, sequence number.
    let mut request = vec![8, 0, 0, 0, 0x12, 0x34];
    request.extend(u16::try_from(len).unwrap().to_be_bytes());
    request.extend((0..len).map(|at| (at % 251) as u8));
    let sum: u32 = request
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    request[2..4].copy_from_slice(&(!folded as u16).to_be_bytes());
    let [a, b, c, d] = to.octets();
    let to = SockaddrIn::new(a, b, c, d, 0);
    let send = || sendto(socket.as_raw_fd(), &request, &to, MsgFlags::empty()).unwrap();
    send();
    let mut reply = vec![0; 1 << 16];
    let end = Instant::now() + LONG;
    loop {
        let len = match recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()) {
            Ok(len) => len,
            // Any packet may be dropped.
            Err(Errno::EAGAIN) => {
                let bytes = request.len();
                assert!(Instant::now() < end, "no reply to {bytes} bytes");
                send();
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let head = usize::from(reply[0] & 15) * 4;
        let got = &reply[head..len];
        // Replies to requests of other tests arrive here, too.
        if got[0] == 0 && got[4..8] == request[4..8] {
            assert_eq!(got[8..], request[8..]);
            return;
        }
    }
}

/// Sends datagrams in one piece, to be cut into segments, and compares what comes out.
pub fn datagrams(from: &UdpSocket, to: &UdpSocket) {
    const SEGMENT: usize = 1000;
    use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
    setsockopt(from, UdpGsoSegment, &i32::try_from(SEGMENT).unwrap()).unwrap();
    let bytes: Vec<u8> = (0..30 * SEGMENT + 1).map(|at| (at % 253) as u8).collect();
    from.send_to(&bytes, to.local_addr().unwrap()).unwrap();
    to.set_read_timeout(Some(LONG)).unwrap();
    let mut got = [0; 2 * SEGMENT];
    for segment in bytes.chunks(SEGMENT) {
        let len = to.recv(&mut got).unwrap();
        assert!(got[..len] == *segment);
    }
}
