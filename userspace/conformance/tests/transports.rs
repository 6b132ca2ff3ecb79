//! Any two files that can be read and written will do: the device may be in another network
//! namespace, or somebody who knows no more than two names in the file system. And a channel
//! has room for more than one region.

use std::fs::OpenOptions;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use ioregion_abi::wire::Layout;
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, kinds, mechanism};
use ioregion_dispatch::mechanism::KvmRun;
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::wire::{self, Wire};
use ioregion_dispatch::{Bus, Channel, Patience, Region, Transport};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

mod support;
use support::wait_until;

/// The mechanisms that this host offers over a transport, but the one that needs none.
fn over(transport: Transport) -> impl Iterator<Item = Kind> {
    kinds().filter(move |kind| kind.transport == transport && kind.name != KvmRun::NAME)
}

/// Has a guest write and read over a channel between two ends, then hangs up on the device's
/// side, which must be noticed.
fn works_over(kind: Kind, vmm: Box<dyn Wire>, device: Box<dyn Wire>) -> Result<()> {
    let rig = Rig::new()?;
    let channel = Arc::new(Channel::new(vmm, Layout::default(), Patience::default()));
    let recorder = Recorder::answering(|told, access| told.len() as u64 + access.offset);
    let region = Region::mmio(MMIO_BASE, 0x1000).user_data(9);
    let assigned = rig.vm.assign(&region, &*mechanism(kind, &channel)?)?;
    let end = assigned.attach(DeviceEnd::new(device, Layout::default()));
    let task = Task::spawn(end, recorder.clone(), WaitPolicy::Sleep)?;

    let mut program = Program::new();
    for i in 0..20 {
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 0x1000 + i);
        program.read(Bus::Mmio, MMIO_BASE + 0x100 + 4 * i, 4);
    }
    let (log, _vcpu) = rig.run(&program)?;
    let expected: Vec<u64> = (0..20).map(|i| 2 * i + 1 + 0x100 + 4 * i).collect();
    ensure!(log == expected, "{kind:?}: read {log:?}");
    let told = recorder.told();
    ensure!(told.len() == 40, "{kind:?}: told {told:?}");
    for (i, pair) in (0..).zip(told.chunks(2)) {
        let [Told::Write(at, data), Told::Read(..)] = pair else {
            bail!("{kind:?}: told {pair:?}");
        };
        ensure!(
            at.user_data == 9 && *data == 0x1000 + i,
            "{kind:?}: {pair:?}"
        );
    }

    task.finish()?;
    let mut program = Program::new();
    program.read(Bus::Mmio, MMIO_BASE, 4);
    ioregion_conformance::run_to_halt(&mut rig.vcpu(1, &program)?)?;
    ensure!(rig.guest.log(1)? == [0xffff_ffff], "{kind:?}");
    wait_until("word of it", || !support::broken(&rig.vm).is_empty());
    Ok(())
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.context("ip (package iproute2)")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {text}");
    Ok(())
}

/// The device's side: a network namespace of its own, in which each connection is taken and
/// handed over.
fn listen(
    here: &Sender<i32>,
    go: &Receiver<()>,
    to_vmm: &Sender<(u16, TcpListener)>,
) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    here.send(nix::unistd::gettid().as_raw())?;
    go.recv()?;
    ip("addr add 192.0.2.2/24 dev device")?;
    ip("link set device up")?;
    let listener = TcpListener::bind("192.0.2.2:0")?;
    to_vmm.send((listener.local_addr()?.port(), listener))?;
    Ok(())
}

#[test]
fn tcp_reaches_a_device_in_another_network_namespace() -> Result<()> {
    // Both sides on threads of their own: neither this process nor its host sees the network.
    let vmm = thread::spawn(|| -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
        let ((here, thread_id), (go, wait), (to_vmm, listening)): (_, (Sender<()>, _), _) =
            (channel(), channel(), channel());
        let device = thread::spawn(move || listen(&here, &wait, &to_vmm));
        let joined = |device: thread::JoinHandle<Result<()>>| match device.join() {
            Ok(Ok(())) => anyhow::anyhow!("the device's thread ended"),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("the device's thread panicked"),
        };
        let Ok(thread_id) = thread_id.recv() else {
            return Err(joined(device));
        };
        ip("link add vmm type veth peer name device")?;
        ip(&format!("link set device netns {thread_id}"))?;
        ip("addr add 192.0.2.1/24 dev vmm")?;
        ip("link set vmm up")?;
        go.send(())?;
        let Ok((port, listener)) = listening.recv() else {
            return Err(joined(device));
        };
        let mut ran = 0;
        for kind in over(Transport::Stream) {
            let ends = [
                TcpStream::connect(("192.0.2.2", port))?,
                listener.accept()?.0,
            ];
            let [vmm, device] = ends.map(|end| -> Result<_> {
                end.set_nodelay(true)?;
                Ok(wire::from_fds(Transport::Stream, vec![end.into()])?)
            });
            works_over(kind, vmm?, device?)?;
            ran += 1;
        }
        ensure!(ran >= 2, "{ran} mechanisms");
        Ok(())
    });
    vmm.join().expect("the VMM's thread")
}

fn fifo(path: &Path, write: bool) -> Result<OwnedFd> {
    // Without waiting for the other end, which is this thread's, too.
    let mut options = OpenOptions::new();
    options
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK);
    Ok(options
        .open(path)
        .with_context(|| path.display().to_string())?
        .into())
}

#[test]
fn fifos_by_name_carry_accesses() -> Result<()> {
    let mut ran = 0;
    for kind in over(Transport::Pipes) {
        let folder = tempfile::tempdir()?;
        let [commands, responses] = ["commands", "responses"].map(|name| folder.path().join(name));
        nix::unistd::mkfifo(&commands, Mode::S_IRWXU)?;
        nix::unistd::mkfifo(&responses, Mode::S_IRWXU)?;
        let vmm_read = fifo(&responses, false)?;
        let device_read = fifo(&commands, false)?;
        let vmm = vec![vmm_read, fifo(&commands, true)?];
        let device = vec![device_read, fifo(&responses, true)?];
        let [vmm, device] = [vmm, device].map(|fds| wire::from_fds(Transport::Pipes, fds));
        works_over(kind, vmm?, device?)?;
        ran += 1;
    }
    ensure!(ran > 0, "no mechanism");
    Ok(())
}

#[test]
fn thousand_regions_of_one_channel_are_told_apart() -> Result<()> {
    const REGIONS: u64 = 1000;
    const STRIDE: u64 = 0x40;
    for kind in kinds().filter(|kind| kind.name != KvmRun::NAME) {
        let rig = Rig::new()?;
        let (channel, wire) = ioregion_conformance::channel(&rig, kind)?;
        let mechanism = mechanism(kind, &channel)?;
        let recorder = Recorder::answering(|_, access| access.user_data * 3 + access.offset);
        let mut end = DeviceEnd::new(wire, Layout::default());
        // Between two regions nobody answers.
        let region = |i| Region::mmio(MMIO_BASE + i * STRIDE, STRIDE / 2).user_data(i);
        for i in 0..REGIONS {
            end = rig.vm.assign(&region(i), &*mechanism)?.attach(end);
        }
        let task = Task::spawn(end, recorder.clone(), WaitPolicy::Sleep)?;
        let mut program = Program::new();
        // From both ends and the middle, in no order
        let touched: Vec<u64> = (0..200)
            .map(|n| n * 377 % REGIONS)
            .chain([0, 999])
            .collect();
        for &i in &touched {
            program.write(Bus::Mmio, MMIO_BASE + i * STRIDE + 0x10, 4, i);
            program.read(Bus::Mmio, MMIO_BASE + i * STRIDE + 0x1c, 4);
        }
        let (log, vcpu) = rig.run(&program)?;
        let expected: Vec<u64> = touched.iter().map(|i| i * 3 + 0x1c).collect();
        ensure!(log == expected, "{kind:?}");
        let ours = |told: &&Told| matches!(told, Told::Write(at, data) if at.user_data == *data);
        let told = recorder.told();
        ensure!(
            told.iter().filter(ours).count() == touched.len(),
            "{kind:?}"
        );
        drop(vcpu);
        for i in 0..REGIONS {
            rig.vm.remove(&region(i))?;
        }
        task.finish()?;
    }
    Ok(())
}
