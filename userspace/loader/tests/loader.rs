//! An unprivileged VMM is served by the privileged loader, with real guests.

use std::collections::HashSet;
use std::io::{BufRead as _, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_conformance::pace::patience;
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::server::{DeviceEnd, Stop, WaitPolicy, serve};
use ioregion_dispatch::{
    Access, Bus, Channel, Device, Doorbell, Event, Exit, LoadError, Program, Region, Ring, Size,
    Transport, Vcpu, Via, Vm,
};
use ioregion_microguest::{DEFAULT_RAM, MMIO_BASE, MicroVm, Program as Payload};

/// Whoever is nobody.
const NOBODY: u32 = 65534;
/// Makes this test binary play the unprivileged VMM.
const SOCKET: &str = "IOREGION_TEST_LOADER_SOCKET";

struct Loader(Child);

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn loader(socket: &Path) -> Loader {
    let child = Command::new(env!("CARGO_BIN_EXE_ioregion-loader"))
        .arg("--socket")
        .arg(socket)
        .args(["--mode", "666"])
        .stderr(Stdio::null())
        .spawn()
        .expect("the loader starts");
    let end = Instant::now() + patience(Duration::from_secs(20));
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < end, "the loader does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Loader(child)
}

#[derive(Clone, Default)]
struct Values(Arc<Mutex<Vec<u64>>>);

impl Device for Values {
    fn read(&mut self, _: Access) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn write(&mut self, _: Access, _: u64) {
        panic!("no write but to the doorbell was made");
    }

    fn doorbell(&mut self, ring: Ring) {
        self.0
            .lock()
            .unwrap()
            .push(ring.value.expect("a doorbell with its value"));
    }
}

/// What came of ringing a doorbell with 1 to 5, each followed by a read, twice.
struct Outcome {
    /// The values that the device was told.
    told: Vec<u64>,
    /// What the second round's reads returned: the number of values before.
    reads: Vec<u64>,
    /// Exits of the first and of both rounds.
    exits: (u64, u64),
}

/// Rings the doorbell, with something happening between the rounds.
fn ring(guest: &MicroVm, program: &Arc<Program>, between: impl FnOnce(&Vm)) -> Outcome {
    let vm = Vm::with_program(Arc::clone(guest.vm()), program).unwrap();
    let (channel, wire) = Channel::pair(Transport::Seqpacket).unwrap();
    let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
    let assigned = vm
        .assign(&region, &Ebpf::new(&channel).via(Via::Tracepoints))
        .unwrap();
    let end = assigned.attach(DeviceEnd::new(wire, channel.layout()));
    let values = Values::default();
    let mut device = values.clone();
    let stop = Stop::new().unwrap();
    let stopped = stop.clone();
    let task = std::thread::spawn(move || serve(end, &mut device, WaitPolicy::Sleep, &stopped));
    let mut payload = Payload::new();
    for value in 1..=5 {
        payload.write(Bus::Mmio, MMIO_BASE + 0x10, 4, value);
        payload.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    }
    let mut vcpu = Vcpu::new(&vm, guest.vcpu(0, &payload).unwrap()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    let first = vcpu.stats().exits;
    between(&vm);
    guest.reload(vcpu.fd(), 0, &payload).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    let reads = guest.log(0).unwrap();
    stop.trigger();
    task.join().unwrap().unwrap();
    let told = values.0.lock().unwrap().clone();
    Outcome {
        told,
        reads,
        exits: (first, vcpu.stats().exits),
    }
}

/// The test's child process: gives its privileges up and rings.
fn play_vmm(socket: &Path) {
    // Only root may open /dev/kvm on many machines; the VM's descriptors stay usable.
    let guest = MicroVm::new(DEFAULT_RAM).unwrap();
    // Nobody but its owner may be able to look into the checkout.
    let object = std::fs::read(Program::find().unwrap()).unwrap();
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setgid(NOBODY.into()).unwrap();
    nix::unistd::setuid(NOBODY.into()).unwrap();
    let refused = Program::load(&object).map(drop).unwrap_err();
    assert!(
        matches!(refused, LoadError::NotPermitted(_) | LoadError::Refused(_)),
        "{refused}"
    );
    let program = Program::connect(socket).unwrap();
    let outcome = ring(&guest, &program, |_| ());
    println!("told {:?} exits {:?}", outcome.told, outcome.exits);
}

#[test]
fn unprivileged_vmm_gets_values_through_the_loader() {
    if let Some(socket) = std::env::var_os(SOCKET) {
        return play_vmm(Path::new(&socket));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let socket = dir.path().join("loader.sock");
    let _loader = loader(&socket);
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([
        "--exact",
        "unprivileged_vmm_gets_values_through_the_loader",
        "--nocapture",
    ]);
    child.env(SOCKET, &socket).stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let lines: Vec<_> = std::io::BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .collect();
    assert!(child.wait().unwrap().success(), "{lines:#?}");
    assert!(
        lines
            .iter()
            .any(|line| line.contains("told [1, 2, 3, 4, 5, 1, 2, 3, 4, 5] exits (5, 10)")),
        "{lines:#?}"
    );
}

/// Ids of the BPF programs of which a process holds descriptors.
fn programs_of(pid: u32) -> HashSet<u32> {
    let info = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    info.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
        .filter_map(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
        })
        .collect()
}

/// Waits until the kernel holds none of these programs, apart from the two that are never attached
/// to a tracepoint and of which a VMM has descriptors of its own.
fn wait_until_gone(programs: &HashSet<u32>) {
    assert!(!programs.is_empty());
    let end = Instant::now() + patience(Duration::from_secs(20));
    let any = || {
        let mut loaded = aya::programs::loaded_programs().filter_map(Result::ok);
        loaded.any(|program| {
            let is_lent = matches!(program.name_as_str(), Some("whoami" | "kvm_ioregion"));
            programs.contains(&program.id()) && !is_lent
        })
    };
    while any() {
        assert!(
            Instant::now() < end,
            "the programs {programs:?} are still there"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn killed_loader_leaves_nothing_and_doorbells_go_on_over_the_channel() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("loader.sock");
    let mut loader = loader(&socket);
    let guest = MicroVm::new(DEFAULT_RAM).unwrap();
    let program = Program::connect(&socket).unwrap();
    let held = programs_of(loader.0.id());
    let outcome = ring(&guest, &program, |vm| {
        loader.0.kill().unwrap();
        loader.0.wait().unwrap();
        wait_until_gone(&held);
        let end = Instant::now() + patience(Duration::from_secs(20));
        loop {
            match vm.next_event() {
                Some(Event::ProgramGone { .. }) => break,
                Some(other) => panic!("{other:?}"),
                None => assert!(Instant::now() < end, "the VM does not notice"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    assert_eq!(outcome.told, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]);
    assert_eq!(outcome.reads, [6, 7, 8, 9, 10]);
    // Five reads, then five reads and five doorbells: no sink is left in KVM.
    assert_eq!(outcome.exits, (5, 15));
}

#[test]
fn loader_refuses_threads_of_other_processes() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("loader.sock");
    let _loader = loader(&socket);
    let mut stream = UnixStream::connect(&socket).unwrap();
    let own = nix::unistd::gettid().as_raw();
    let bind =
        |thread: i64, record| format!(r#"{{"Bind":{{"thread":{thread},"record":{record}}}}}"#);
    let mut ask = |request: String| -> Option<String> {
        let mut frame = b"iorg".to_vec();
        frame.extend((request.len() as u32).to_le_bytes());
        frame.extend(0_u32.to_le_bytes());
        frame.extend(request.as_bytes());
        stream.write_all(&frame).unwrap();
        let mut header = [0; 12];
        stream.read_exact(&mut header).ok()?;
        let mut text = vec![0; u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize];
        stream.read_exact(&mut text).unwrap();
        Some(String::from_utf8(text).unwrap())
    };
    // A record that this client does not have.
    let refused = ask(bind(own.into(), "3"));
    assert_eq!(refused.as_deref(), Some(r#"{"Failed":2}"#));
    let record = ask(r#"{"NewRecord":{"vm":1}}"#.into()).unwrap();
    let record = record.trim_start_matches(r#"{"Number":"#);
    let record = record.trim_end_matches('}');
    let refused = ask(bind(1, record));
    assert_eq!(refused.as_deref(), Some(r#"{"Failed":1}"#));
    let done = ask(bind(own.into(), record));
    assert_eq!(done.as_deref(), Some(r#""Done""#));
    // Not a thread id: no request of the protocol, so the loader hangs up.
    assert_eq!(ask(bind(-1, record)), None);
}

#[test]
fn dropped_program_is_detached_though_its_vcpu_thread_lives_on() {
    let guest = MicroVm::new(DEFAULT_RAM).unwrap();
    let program = Program::load_default().unwrap();
    let held = programs_of(std::process::id());
    assert_eq!(ring(&guest, &program, |_| ()).told.len(), 10);
    drop(program);
    wait_until_gone(&held);
}
