//! What several test files need.
#![allow(dead_code, reason = "each test file uses a part")]

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::patience;
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, has_hook, kinds, mechanism};
use ioregion_dispatch::mechanism::{Ebpf, KvmRun};
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::wire::{Message, Try, Wire};
use ioregion_dispatch::{Access, Channel, Device, Event, Exit, Kicker, RegionId, Ring, Vcpu};
use ioregion_dispatch::{
    Bus, Doorbell, Program as Bpf, Region, RegionErrorKind, Sink, Size, Transport, Via, Vm,
};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Every kind with a channel: `kvm-run` has no device task that could be slow or die.
pub fn channel_kinds() -> impl Iterator<Item = Kind> {
    kinds().filter(|kind| kind.name != KvmRun::NAME)
}

pub fn bpf() -> Result<Arc<Bpf>> {
    Ok(Bpf::load_default()?)
}

/// Ends the process if it is not dropped in time: a deadlock must not look like a slow machine.
pub struct Watchdog(#[allow(dead_code, reason = "dropping it calls the dog off")] Sender<()>);

/// `time` is for ordinary machines.
pub fn watchdog(what: impl Into<String>, time: Duration) -> Watchdog {
    let time = patience(time);
    let (alive, dead) = channel::<()>();
    let what = what.into();
    std::thread::spawn(move || {
        if dead.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{what}: not done after {time:?}");
            std::process::abort();
        }
    });
    Watchdog(alive)
}

/// Waits until `done`, for ten seconds of an ordinary machine.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + patience(Duration::from_secs(10));
    while !done() {
        assert!(Instant::now() < end, "{what} did not come in time");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A gate in front of a device: while it is closed, accesses that reach the device stay there.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    arrived: u64,
}

impl Gate {
    pub fn open(&self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).open = true;
        self.0.1.notify_all();
    }

    /// Accesses that have reached the gate so far.
    pub fn arrived(&self) -> u64 {
        self.0
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .arrived
    }

    pub fn wait_for(&self, arrived: u64) {
        wait_until("the access at the gate", || self.arrived() >= arrived);
    }

    fn pass(&self) {
        let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.arrived += 1;
        while !state.open {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A recorder behind a gate.
#[derive(Debug, Clone, Default)]
pub struct Gated {
    pub gate: Gate,
    pub recorder: Recorder,
}

impl Device for Gated {
    fn read(&mut self, access: Access) -> u64 {
        self.gate.pass();
        self.recorder.read(access)
    }

    fn write(&mut self, access: Access, data: u64) {
        self.gate.pass();
        self.recorder.write(access, data);
    }

    fn doorbell(&mut self, ring: Ring) {
        self.recorder.doorbell(ring);
    }
}

/// A region that is served over a channel.
#[derive(Debug)]
pub struct Served {
    pub channel: Arc<Channel>,
    pub id: RegionId,
    pub task: Task,
}

/// Assigns a region to a mechanism of a kind with a channel, or modifies it, and serves it.
pub fn serve(
    rig: &Rig,
    kind: Kind,
    region: &Region,
    modify: bool,
    device: impl Device + 'static,
) -> Result<Served> {
    let (channel, id, end) = place(rig, kind, region, modify)?;
    let task = Task::spawn(end, device, WaitPolicy::Sleep)?;
    Ok(Served { channel, id, task })
}

/// The same, with the device's end unserved.
pub fn place(
    rig: &Rig,
    kind: Kind,
    region: &Region,
    modify: bool,
) -> Result<(Arc<Channel>, RegionId, DeviceEnd)> {
    let (channel, wire) = ioregion_conformance::channel(rig, kind)?;
    let mechanism = mechanism(kind, &channel)?;
    let assigned = if modify {
        rig.vm.modify(region, &*mechanism)?
    } else {
        rig.vm.assign(region, &*mechanism)?
    };
    let id = assigned.id;
    Ok((
        channel,
        id,
        assigned.attach(DeviceEnd::new(wire, Layout::default())),
    ))
}

/// All events so far.
pub fn events(vm: &Vm) -> Vec<Event> {
    std::iter::from_fn(|| vm.next_event()).collect()
}

/// The regions of the `Broken` events so far, with their causes.
pub fn broken(vm: &Vm) -> Vec<(RegionId, String)> {
    let broken = |event| match event {
        Event::Broken { region, cause } => Some((region, cause)),
        Event::ProgramGone { .. } => None,
    };
    events(vm).into_iter().filter_map(broken).collect()
}

/// Gives SIGUSR1 a handler that does nothing, so that it interrupts system calls.
pub fn handle_sigusr1() -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: The handler does nothing at all.
    unsafe { sigaction(Signal::SIGUSR1, &action)? };
    Ok(())
}

/// Runs until `done` says so of an exit that is neither an interruption nor the end.
pub fn run_until_halt(
    vcpu: &mut Vcpu,
    mut unclaimed: impl FnMut(ioregion_dispatch::BusAccess),
) -> Result<()> {
    loop {
        match vcpu.run()? {
            Exit::Halt => return Ok(()),
            Exit::Interrupted => {}
            Exit::Unclaimed(access) => unclaimed(access),
            other => anyhow::bail!("the guest stopped with {other:?}"),
        }
    }
}

/// A vCPU on a thread of its own, run step by step.
pub struct Runner {
    pub kicker: Kicker,
    pub thread: libc::pthread_t,
    steps: Sender<Step>,
    exits: std::sync::mpsc::Receiver<Result<Exit>>,
    joined: std::thread::JoinHandle<Option<Vcpu>>,
}

type Step = Box<dyn FnOnce(&mut Vcpu) -> Result<Option<Exit>> + Send>;

impl Runner {
    pub fn new(mut vcpu: Vcpu) -> Self {
        let kicker = vcpu.kicker();
        let (steps, todo) = channel::<Step>();
        let (report, exits) = channel();
        let (tell, thread) = channel();
        let joined = std::thread::spawn(move || {
            // SAFETY: No memory is involved.
            let _ = tell.send(unsafe { libc::pthread_self() });
            for step in todo {
                match step(&mut vcpu) {
                    Ok(None) => {}
                    Ok(Some(exit)) => _ = report.send(Ok(exit)),
                    Err(error) => _ = report.send(Err(error)),
                }
            }
            Some(vcpu)
        });
        let thread = thread.recv().unwrap_or_default();
        Self {
            kicker,
            thread,
            steps,
            exits,
            joined,
        }
    }

    /// Has the thread do something with the vCPU.
    pub fn with(&self, step: impl FnOnce(&mut Vcpu) -> Result<()> + Send + 'static) {
        let _ = self
            .steps
            .send(Box::new(move |vcpu| step(vcpu).map(|()| None)));
    }

    /// Starts one `run`.
    pub fn start(&self) {
        let _ = self.steps.send(Box::new(|vcpu| Ok(Some(vcpu.run()?))));
    }

    /// Sends the thread a signal.
    pub fn signal(&self) {
        // SAFETY: The thread lives until it is joined, which takes `self`.
        unsafe { libc::pthread_kill(self.thread, libc::SIGUSR1) };
    }

    /// Signals until the `run` ends. One signal alone can come before the thread sleeps: only a
    /// mask would keep it until then.
    pub fn signal_out(&self) -> Result<Exit> {
        loop {
            self.signal();
            if let Some(exit) = self.exit_within(Duration::from_millis(20))? {
                return Ok(exit);
            }
        }
    }

    /// How the `run` ended; `None` if it goes on for `time`.
    pub fn exit_within(&self, time: Duration) -> Result<Option<Exit>> {
        match self.exits.recv_timeout(time) {
            Ok(exit) => exit.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the vCPU thread is gone"),
        }
    }

    /// How the `run` ended.
    pub fn exit(&self) -> Result<Exit> {
        match self.exit_within(patience(Duration::from_secs(20)))? {
            Some(exit) => Ok(exit),
            None => anyhow::bail!("the vCPU does not come back"),
        }
    }

    /// Ends the thread and takes the vCPU back.
    pub fn finish(self) -> Result<Vcpu> {
        drop(self.steps);
        let vcpu = self.joined.join().ok().flatten();
        vcpu.ok_or_else(|| anyhow::anyhow!("the vCPU thread panicked"))
    }
}

/// Where the other region stands, which must not notice anything.
pub const OTHER: u64 = MMIO_BASE + 0x1000;

/// The region that a fault hits.
pub fn region() -> Region {
    Region::mmio(MMIO_BASE, 0x1000)
        .user_data(7)
        .doorbell(Doorbell::new(0x10, Size::B4))
}

/// The region next to it.
pub fn other_region() -> Region {
    Region::mmio(OTHER, 0x1000)
        .user_data(8)
        .doorbell(Doorbell::new(0x10, Size::B4))
}

/// A region with a doorbell at 0x10.
pub fn region_with(sink: Sink) -> Region {
    Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4).sink(sink))
}

/// A program that rings it with 1, 2 and so on.
pub fn writes(count: u32) -> Program {
    let mut program = Program::new();
    program.repeat(count, |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 1, 1);
    });
    program
}

/// Number of writes that rang, and the last value.
pub fn rung<'a>(told: impl IntoIterator<Item = &'a Told>) -> (u64, Option<u64>) {
    told.into_iter()
        .fold((0, None), |(writes, last), told| match told {
            Told::Ring(ring) => (writes + ring.writes, ring.value),
            _ => (writes, last),
        })
}

/// Keeps to itself a test that looks at what this process holds, or limits it.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device whose reads can be foreseen.
pub fn plain() -> Recorder {
    Recorder::answering(|_, access| 0x5500 + access.offset)
}

/// Receives one message as a device does.
pub fn recv(wire: &mut dyn Wire) -> Message {
    loop {
        match wire.try_recv() {
            Ok(Try::Done(message)) => return message,
            Ok(Try::WouldBlock) => {}
            Err(error) => panic!("the device's end: {error}"),
        }
        if wire.prepare_sleep(false) {
            let mut fds: Vec<_> = wire
                .poll_fds(false)
                .into_iter()
                .flatten()
                .map(|(fd, flags)| PollFd::new(fd, flags))
                .collect();
            let _ = poll(&mut fds, PollTimeout::NONE);
        }
        wire.finish_sleep();
    }
}

/// The kinds to test. Where the kernel has no hook there is none, and asking for it must say so.
pub fn hooked() -> Result<Vec<Kind>> {
    if !has_hook() {
        let rig = Rig::new()?;
        let (channel, _wire) = Channel::pair(Transport::Stream)?;
        let asked = Ebpf::new(&channel).via(Via::Hook);
        let region = region();
        let error = rig.vm.assign(&region, &asked).expect_err("no such kernel");
        let RegionErrorKind::Unavailable { mechanism, reason } = &error.kind else {
            panic!("{error:?}");
        };
        assert_eq!(*mechanism, Ebpf::NAME);
        assert!(reason.contains("KVM_SET_IOREGION"), "{error}");
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        // Nothing is left of it, and the channel is as it was.
        let assigned = rig.vm.assign(&region, &Ebpf::new(&channel))?;
        assert_eq!(assigned.via, Some(Via::Tracepoints));
        assert!(
            assigned.reason.contains("KVM_SET_IOREGION"),
            "{}",
            assigned.reason
        );
    }
    let kinds: Vec<_> = kinds().filter(|kind| kind.is_hooked()).collect();
    assert_eq!(kinds.is_empty(), !has_hook());
    Ok(kinds)
}
