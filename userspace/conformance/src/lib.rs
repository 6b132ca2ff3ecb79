//! The rig of the conformance suite: a micro-guest, a recording device, and every mechanism.
//!
//! The suite itself is in `tests/`. A test builds a [`Rig`], assigns regions, gives each vCPU a
//! program and looks at what the device was told.

pub mod checker;
pub mod maps;
pub mod model;
pub mod pace;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, bail};
use ioregion_abi::wire::Layout;
use ioregion_dispatch::mechanism::{Auto, Ebpf, Forward, Ioeventfd, Ioregionfd, KvmRun};
use ioregion_dispatch::server::{DeviceEnd, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::wire::Wire;
use ioregion_dispatch::{
    Access, Assigned, Channel, Device, Exit, Mechanism, Program as Bpf, Region, Ring, Transport,
    Vcpu, Via, Vm, probe,
};
use ioregion_microguest::{DEFAULT_RAM, MicroVm, Program};

/// What a device was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// A read, with what was answered.
    Read(Access, u64),
    /// A write.
    Write(Access, u64),
    /// A doorbell.
    Ring(Ring),
}

/// What a read answers, by what was told before.
type Answer = dyn Fn(&[Told], Access) -> u64 + Send + Sync;

/// A device that records what it is told. Reads return what `answer` says, by default the
/// number of things told so far.
#[derive(Clone)]
pub struct Recorder {
    told: Arc<Mutex<Vec<Told>>>,
    answer: Arc<Answer>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder")
            .field("told", &self.told().len())
            .finish_non_exhaustive()
    }
}

impl Default for Recorder {
    fn default() -> Self {
        Self::answering(|told, _| told.len() as u64)
    }
}

impl Recorder {
    /// A recorder that answers reads by a function of what it was told before.
    pub fn answering(answer: impl Fn(&[Told], Access) -> u64 + Send + Sync + 'static) -> Self {
        Self {
            told: Arc::default(),
            answer: Arc::new(answer),
        }
    }

    /// All that it was told so far.
    #[must_use]
    pub fn told(&self) -> Vec<Told> {
        self.told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until `done` says that it was told enough; returns all of it.
    ///
    /// # Errors
    ///
    /// If that does not happen within ten seconds, or [as many](pace::patience) as a slow machine
    /// takes for it: how far it came.
    pub fn wait(&self, done: impl Fn(&[Told]) -> bool) -> Result<Vec<Told>> {
        let limit = pace::patience(std::time::Duration::from_secs(10));
        let end = std::time::Instant::now() + limit;
        loop {
            let told = self.told();
            if done(&told) {
                return Ok(told);
            }
            if std::time::Instant::now() > end {
                bail!(
                    "the device was told only {} things, the last of them {:?}",
                    told.len(),
                    told.last()
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn note(&self, told: Told) {
        self.told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(told);
    }
}

impl Device for Recorder {
    fn read(&mut self, access: Access) -> u64 {
        let answer = (self.answer)(
            &self.told.lock().unwrap_or_else(PoisonError::into_inner),
            access,
        );
        self.note(Told::Read(access, answer));
        answer
    }

    fn write(&mut self, access: Access, data: u64) {
        self.note(Told::Write(access, data));
    }

    fn doorbell(&mut self, ring: Ring) {
        self.note(Told::Ring(ring));
    }
}

/// A mechanism by name, and the transport under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Name of the mechanism.
    pub name: &'static str,
    /// The channel's transport; unused by `kvm-run`.
    pub transport: Transport,
}

/// Name of the mechanism `ebpf` that uses tracepoints whatever the kernel has.
pub const TRACEPOINTS: &str = "ebpf-tracepoints";

/// Every mechanism that needs nothing of the kernel but what released ones have, `forward` on each
/// of its transports. The last is `ebpf` on a channel that KVM cannot use.
pub const KINDS: [Kind; 8] = [
    Kind {
        name: KvmRun::NAME,
        transport: Transport::Stream,
    },
    Kind {
        name: Forward::NAME,
        transport: Transport::Stream,
    },
    Kind {
        name: Forward::NAME,
        transport: Transport::Seqpacket,
    },
    Kind {
        name: Forward::NAME,
        transport: Transport::Pipes,
    },
    Kind {
        name: Forward::NAME,
        transport: Transport::Mailbox,
    },
    Kind {
        name: Ioeventfd::NAME,
        transport: Transport::Stream,
    },
    Kind {
        name: TRACEPOINTS,
        transport: Transport::Stream,
    },
    Kind {
        name: Ebpf::NAME,
        transport: Transport::Mailbox,
    },
];

/// `ioregionfd`, on each transport that KVM can use.
const NATIVE: [Transport; 4] = [
    Transport::Stream,
    Transport::Seqpacket,
    Transport::Pipes,
    Transport::Ioregionfd,
];

/// `ebpf` where KVM itself shows the accesses to the program.
const HOOKED: [Kind; 2] = [
    Kind::EBPF,
    Kind {
        transport: Transport::Ioregionfd,
        ..Kind::EBPF
    },
];

/// What this host's KVM has: ioregionfd, and that with programs.
fn offers() -> (bool, bool) {
    static OFFERS: OnceLock<(bool, bool)> = OnceLock::new();
    *OFFERS.get_or_init(|| {
        let guest = MicroVm::new(DEFAULT_RAM).expect("a virtual machine");
        let answers = [probe::ioregionfd, probe::ebpf_hook].map(|probe| probe(guest.vm()));
        let [native, hook] = answers.map(|answer| answer.expect("an answer from KVM"));
        (native, hook)
    })
}

/// Whether KVM itself can show accesses to a program.
///
/// # Panics
///
/// If KVM cannot be asked: no test could run.
#[must_use]
pub fn has_hook() -> bool {
    offers().1
}

/// Every mechanism that this host offers: [`KINDS`], `ioregionfd` where KVM has it, and `ebpf`
/// over what KVM can use where it shows accesses to a program.
///
/// # Panics
///
/// If KVM cannot be asked: no test could run.
pub fn kinds() -> impl Iterator<Item = Kind> {
    let (native, hook) = offers();
    let native = NATIVE.into_iter().filter(move |_| native);
    let native = native.map(|transport| Kind {
        name: Ioregionfd::NAME,
        transport,
    });
    let hooked = HOOKED.into_iter().filter(move |_| hook);
    KINDS.into_iter().chain(native).chain(hooked)
}

/// The ways in which this host offers `ebpf`, one transport each.
///
/// # Panics
///
/// If KVM cannot be asked: no test could run.
pub fn ebpf_kinds() -> impl Iterator<Item = Kind> {
    kinds().filter(|kind| kind.is_ebpf() && kind.transport != Transport::Mailbox)
}

/// A channel of a kind's transport, and the device's end of its wire.
///
/// # Errors
///
/// The operating system's, or KVM's.
pub fn channel(rig: &Rig, kind: Kind) -> Result<(Arc<Channel>, Box<dyn Wire>)> {
    Ok(match kind.transport {
        Transport::Ioregionfd => Channel::purpose_made(rig.guest.vm())?,
        transport => Channel::pair(transport)?,
    })
}

/// The eBPF program, loaded once for all tests of one executable.
///
/// # Errors
///
/// What is missing on this host, with the remedy.
pub fn program() -> Result<Arc<Bpf>> {
    static LOADED: Mutex<Option<Arc<Bpf>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(program) = &*loaded {
        return Ok(Arc::clone(program));
    }
    let program = Bpf::load_default().context("loading the eBPF program")?;
    Ok(Arc::clone(loaded.insert(program)))
}

/// A micro-guest whose accesses are dispatched.
#[derive(Debug)]
pub struct Rig {
    /// The regions.
    pub vm: Vm,
    /// The guest.
    pub guest: MicroVm,
    /// The program, where the VM has one.
    pub bpf: Option<Arc<Bpf>>,
}

/// A device task on a thread.
#[derive(Debug)]
pub struct Task {
    stop: Stop,
    thread: JoinHandle<Result<Stats>>,
}

impl Task {
    /// Starts serving `device` on a thread.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub fn spawn(
        end: DeviceEnd,
        mut device: impl Device + 'static,
        wait: WaitPolicy,
    ) -> Result<Self> {
        let stop = Stop::new()?;
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("device".into())
            .spawn(move || Ok(serve(end, &mut device, wait, &stopped)?))?;
        Ok(Self { stop, thread })
    }

    /// Waits until the VMM's end of the channel is gone (all of it read), and returns what the
    /// task did.
    ///
    /// # Errors
    ///
    /// The server's.
    pub fn join(self) -> Result<Stats> {
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the device task panicked"),
        }
    }

    /// Ends the task and returns what it did.
    ///
    /// # Errors
    ///
    /// The server's.
    pub fn finish(self) -> Result<Stats> {
        self.stop.trigger();
        self.join()
    }
}

impl Rig {
    /// A VM with the eBPF program that all of an executable's tests share.
    ///
    /// # Errors
    ///
    /// What is missing on this host, with the remedy.
    pub fn new() -> Result<Self> {
        Self::with(Some(program()?))
    }

    /// A VM with or without a program.
    ///
    /// # Errors
    ///
    /// What is missing on this host, with the remedy.
    pub fn with(bpf: Option<Arc<Bpf>>) -> Result<Self> {
        let guest = MicroVm::new(DEFAULT_RAM)?;
        let vm = match &bpf {
            Some(bpf) => Vm::with_program(Arc::clone(guest.vm()), bpf)?,
            None => Vm::new(Arc::clone(guest.vm())),
        };
        Ok(Self { vm, guest, bpf })
    }

    /// Assigns `region` to a mechanism of `kind` and serves `device` for it.
    ///
    /// # Errors
    ///
    /// The mechanism's, or the operating system's.
    pub fn serve(
        &self,
        kind: Kind,
        region: &Region,
        device: impl Device + Clone + 'static,
    ) -> Result<Option<Task>> {
        self.serve_waiting(kind, region, device, WaitPolicy::Sleep)
    }

    /// The same with a task that waits as told.
    ///
    /// # Errors
    ///
    /// As for [`serve`](Self::serve).
    pub fn serve_waiting(
        &self,
        kind: Kind,
        region: &Region,
        device: impl Device + 'static,
        wait: WaitPolicy,
    ) -> Result<Option<Task>> {
        if kind.name == KvmRun::NAME {
            let mechanism = KvmRun::new(Arc::new(Mutex::new(device)));
            let _ = self.vm.assign(region, &mechanism)?;
            return Ok(None);
        }
        let (channel, wire) = channel(self, kind)?;
        let assigned = self.vm.assign(region, &*mechanism(kind, &channel)?)?;
        let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
        Ok(Some(Task::spawn(end, device, wait)?))
    }

    /// A vCPU that runs `program`.
    ///
    /// # Errors
    ///
    /// KVM's, or the loader's.
    pub fn vcpu(&self, index: u64, program: &Program) -> Result<Vcpu> {
        Ok(Vcpu::new(&self.vm, self.guest.vcpu(index, program)?)?)
    }

    /// Runs a program on vCPU 0 to its end and returns what its reads saw.
    ///
    /// # Errors
    ///
    /// Whatever ends the run before the program's end, unclaimed accesses included.
    pub fn run(&self, program: &Program) -> Result<(Vec<u64>, Vcpu)> {
        let mut vcpu = self.vcpu(0, program)?;
        run_to_halt(&mut vcpu)?;
        Ok((self.guest.log(0)?, vcpu))
    }
}

impl Kind {
    /// The mechanism `ebpf` over a stream, in the best form that this host offers.
    pub const EBPF: Self = Self {
        name: Ebpf::NAME,
        transport: Transport::Stream,
    };

    /// The mechanism `ebpf` over a stream, with tracepoints and sinks.
    pub const TRACEPOINTS: Self = Self {
        name: TRACEPOINTS,
        transport: Transport::Stream,
    };

    /// Whether it is `ebpf` in one of its forms.
    #[must_use]
    pub fn is_ebpf(self) -> bool {
        self.name == Ebpf::NAME || self.name == TRACEPOINTS
    }

    /// Whether its doorbells need not exit to user space.
    #[must_use]
    pub fn has_sinks(self) -> bool {
        self.name == Ioeventfd::NAME || self.is_ebpf()
    }

    /// Whether KVM itself shows its accesses to the eBPF program.
    #[must_use]
    pub fn is_hooked(self) -> bool {
        self.name == Ebpf::NAME && self.transport != Transport::Mailbox && has_hook()
    }

    /// Whether KVM carries its accesses, so that none exits.
    #[must_use]
    pub fn is_native(self) -> bool {
        self.name == Ioregionfd::NAME || self.is_hooked()
    }

    /// Whether its doorbells arrive with their values.
    #[must_use]
    pub fn carries_values(self) -> bool {
        self.name != Ioeventfd::NAME
    }
}

/// A mechanism of `kind` over `channel`.
///
/// # Errors
///
/// If there is none of that name (or it takes no channel).
pub fn mechanism(kind: Kind, channel: &Arc<Channel>) -> Result<Box<dyn Mechanism>> {
    Ok(match kind.name {
        Forward::NAME => Box::new(Forward::new(channel)),
        Ioeventfd::NAME => Box::new(Ioeventfd::new(channel)),
        Ebpf::NAME => Box::new(Ebpf::new(channel)),
        TRACEPOINTS => Box::new(Ebpf::new(channel).via(Via::Tracepoints)),
        Ioregionfd::NAME => Box::new(Ioregionfd::new(channel)),
        Auto::NAME => Box::new(Auto::new(channel)),
        other => bail!("no mechanism {other} over a channel"),
    })
}

/// Runs a vCPU until its guest halts.
///
/// # Errors
///
/// KVM's, and any exit but [`Exit::Halt`] and [`Exit::Interrupted`].
pub fn run_to_halt(vcpu: &mut Vcpu) -> Result<()> {
    loop {
        match vcpu.run()? {
            Exit::Halt => return Ok(()),
            Exit::Interrupted => {}
            other => bail!("the guest stopped with {other:?}"),
        }
    }
}

/// Takes the device's side of an assignment.
#[must_use]
pub fn attach(assigned: Assigned, end: DeviceEnd) -> DeviceEnd {
    assigned.attach(end)
}
