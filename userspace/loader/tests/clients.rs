//! Clients that want more than their share, or that break the protocol: the loader serves the others.

use std::io::{IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ioregion_conformance::pace::patience;
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::server::{DeviceEnd, Stop, WaitPolicy, serve};
use ioregion_dispatch::{
    Access, Bus, Channel, Device, Doorbell, Exit, Program, Region, Ring, Size, Transport, Vcpu,
    Via, Vm,
};
use ioregion_microguest::{DEFAULT_RAM, MMIO_BASE, MicroVm, Program as Payload};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

const LONG: Duration = Duration::from_secs(60);

struct Loader {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A loader that may have so many open files.
fn loader(files: u64) -> Loader {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("loader.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ioregion-loader"));
    command.arg("--socket").arg(&socket).stderr(Stdio::null());
    // SAFETY: One system call.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, files, files)?));
    }
    let mut loader = Loader {
        child: command.spawn().expect("the loader starts"),
        socket,
        _dir: dir,
    };
    within("the loader listens", || {
        assert_eq!(loader.child.try_wait().unwrap(), None);
        UnixStream::connect(&loader.socket).is_ok()
    });
    loader
}

fn within(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + patience(LONG);
    while !done() {
        assert!(Instant::now() < end, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn frame(request: &str, descriptors: u32) -> Vec<u8> {
    let mut frame = b"iorg".to_vec();
    frame.extend((request.len() as u32).to_le_bytes());
    frame.extend(descriptors.to_le_bytes());
    frame.extend(request.as_bytes());
    frame
}

/// Asks, and returns the reply with the descriptors that came.
fn ask(mut stream: &UnixStream, request: &str) -> (String, Vec<OwnedFd>) {
    stream.write_all(&frame(request, 0)).unwrap();
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut text = vec![0; word(4) as usize];
    stream.read_exact(&mut text).unwrap();
    let mut fds = Vec::new();
    while fds.len() < word(8) as usize {
        let mut byte = [0];
        let mut io = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let raw = stream.as_raw_fd();
        let message = recvmsg::<()>(raw, &mut io, Some(&mut space), flags).unwrap();
        for part in message.cmsgs().unwrap() {
            let ControlMessageOwned::ScmRights(received) = part else {
                panic!("{part:?}");
            };
            // SAFETY: The kernel has just made them, and nobody else knows them.
            fds.extend(
                received
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    (String::from_utf8(text).unwrap(), fds)
}

/// The values that a device was told of a doorbell that rings in two rounds, with something between
/// them. Each round has a thread of its own.
fn ring(program: &std::sync::Arc<Program>, between: impl FnOnce()) -> Vec<u64> {
    struct Told(std::sync::mpsc::Sender<u64>);
    impl Device for Told {
        fn read(&mut self, _: Access) -> u64 {
            0
        }
        fn write(&mut self, _: Access, _: u64) {
            panic!("no write but to the doorbell was made");
        }
        fn doorbell(&mut self, ring: Ring) {
            self.0.send(ring.value.expect("a value")).unwrap();
        }
    }
    let guest = MicroVm::new(DEFAULT_RAM).unwrap();
    let vm = Vm::with_program(std::sync::Arc::clone(guest.vm()), program).unwrap();
    let (channel, wire) = Channel::pair(Transport::Seqpacket).unwrap();
    let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
    let ebpf = Ebpf::new(&channel).via(Via::Tracepoints);
    let end = vm.assign(&region, &ebpf).unwrap();
    let end = end.attach(DeviceEnd::new(wire, channel.layout()));
    let (sender, told) = std::sync::mpsc::channel();
    let stop = Stop::new().unwrap();
    let stopped = stop.clone();
    let task =
        std::thread::spawn(move || serve(end, &mut Told(sender), WaitPolicy::Sleep, &stopped));
    let mut payload = Payload::new();
    for value in 1..=3 {
        payload.write(Bus::Mmio, MMIO_BASE + 0x10, 4, value);
        payload.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    }
    let mut vcpu = Vcpu::new(&vm, guest.vcpu(0, &payload).unwrap()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    between();
    guest.reload(vcpu.fd(), 0, &payload).unwrap();
    std::thread::scope(|scope| {
        let moved = scope.spawn(|| vcpu.run());
        assert_eq!(moved.join().unwrap().unwrap(), Exit::Halt);
    });
    // And a vCPU that is made only now.
    let late = Vcpu::new(&vm, guest.vcpu(1, &payload).unwrap());
    assert_eq!(late.unwrap().run().unwrap(), Exit::Halt);
    stop.trigger();
    task.join().unwrap().unwrap();
    told.try_iter().collect()
}

/// Whether the loader does what it is there for.
fn serves(socket: &Path) {
    let mut program = None;
    within("a place for another client", || {
        program = Program::connect(socket).ok();
        program.is_some()
    });
    assert_eq!(ring(&program.unwrap(), || ()), [1, 2, 3].repeat(3));
}

#[test]
fn descriptors_in_a_request_are_not_taken() {
    let loader = loader(1024);
    let (mut reader, writer) = std::io::pipe().unwrap();
    for (announced, sent) in [(1, true), (100_000, true), (0, true), (1, false)] {
        let mut stream = UnixStream::connect(&loader.socket).unwrap();
        let hello = frame(r#"{"Hello":{"version":3}}"#, announced);
        stream.write_all(&hello).unwrap();
        if sent {
            let _ = sendmsg::<()>(
                stream.as_raw_fd(),
                &[std::io::IoSlice::new(&[0])],
                &[ControlMessage::ScmRights(&[writer.as_raw_fd()])],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(patience(LONG))).unwrap();
        let mut reply = Vec::new();
        // Data that nobody has read make the end a reset.
        if let Err(error) = stream.read_to_end(&mut reply) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let answered = String::from_utf8_lossy(&reply).contains("Done");
        assert_eq!(answered, announced == 0, "{announced} announced");
    }
    // Nobody has the pipe's end any more.
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    serves(&loader.socket);
}

#[test]
fn a_client_that_takes_all_descriptors_takes_them_from_nobody_later() {
    let mut loader = loader(128);
    let connect = || UnixStream::connect(&loader.socket).unwrap();
    let greedy: Vec<_> = (0..120).map(|_| connect()).collect();
    // Those that had a place answer, the others are refused or wait.
    let served = |mut stream: &UnixStream| {
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let _ = stream.write_all(&frame(r#"{"Hello":{"version":3}}"#, 0));
        let mut header = [0; 12];
        stream.read_exact(&mut header).is_ok() && header[8] == 3
    };
    let served = greedy.iter().filter(|stream| served(stream)).count();
    assert!(served < greedy.len(), "the limit was not reached");
    assert_eq!(loader.child.try_wait().unwrap(), None, "the loader ended");
    drop(greedy);
    serves(&loader.socket);
    assert_eq!(loader.child.try_wait().unwrap(), None, "the loader ended");
}

#[test]
fn maps_count_as_long_as_somebody_has_them() {
    let loader = loader(1024);
    let stream = UnixStream::connect(&loader.socket).unwrap();
    let slots = 1_u32 << 19;
    let bytes = u64::from(slots) * 16;
    let mut kept = Vec::new();
    let full = loop {
        let (reply, fds) = ask(&stream, &format!(r#"{{"CreatePort":{{"slots":{slots}}}}}"#));
        let Some(port) = reply.strip_prefix(r#"{"Number":"#) else {
            break reply;
        };
        let port = port.trim_end_matches('}');
        let retire = format!(r#"{{"Retire":{{"keys":[],"port":{port}}}}}"#);
        assert_eq!(ask(&stream, &retire).0, r#""Done""#);
        kept.push(fds);
        assert!(kept.len() as u64 * bytes <= 256 << 20, "there is no bound");
    };
    assert_eq!(full, format!(r#"{{"Failed":{}}}"#, 28));
    assert!(kept.len() > 5);
    // What nobody has does not count: a VMM can go on for ever.
    for _ in 0..2 * kept.len() {
        kept.pop();
        let (reply, fds) = ask(&stream, &format!(r#"{{"CreatePort":{{"slots":{slots}}}}}"#));
        let port = reply
            .trim_start_matches(r#"{"Number":"#)
            .trim_end_matches('}');
        let retire = format!(r#"{{"Retire":{{"keys":[],"port":{port}}}}}"#);
        assert_eq!(ask(&stream, &retire).0, r#""Done""#, "{reply}");
        kept.push(fds);
    }
    let registers = |len: u32| {
        ask(
            &stream,
            &format!(r#"{{"CreateRegisters":{{"len":{len}}}}}"#),
        )
    };
    let one = registers(1);
    assert_eq!((one.0.as_str(), one.1.len()), (r#""Done""#, 1));
}

#[test]
fn vcpus_change_threads_and_come_after_the_loader_s_end() {
    let mut loader = loader(1024);
    let program = Program::connect(&loader.socket).unwrap();
    let told = ring(&program, || {
        loader.child.kill().unwrap();
        loader.child.wait().unwrap();
    });
    assert_eq!(told, [1, 2, 3].repeat(3));
}
