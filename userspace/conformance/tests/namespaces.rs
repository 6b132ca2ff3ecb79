//! Thread ids mean something else in another PID namespace; the program must know vCPUs all the
//! same.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, ebpf_kinds};
use ioregion_dispatch::{Bus, Doorbell, Region, Size};
use ioregion_microguest::{MMIO_BASE, Program};

/// Makes this test binary play the VMM inside the namespace.
const INSIDE: &str = "IOREGION_TEST_INSIDE_NAMESPACE";

#[test]
fn doorbells_are_captured_in_another_pid_namespace() -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let output = Command::new("unshare")
        .args(["--fork", "--pid", "--"])
        .arg(std::env::current_exe()?)
        .args([
            "--exact",
            "doorbells_are_captured_in_another_pid_namespace",
            "--nocapture",
        ])
        .env(INSIDE, "1")
        .output()
        .context("unshare (util-linux)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(text.contains("thread ids differ, value captured"), "{text}");
    Ok(())
}

fn inside() -> Result<()> {
    // The test harness runs us in one of the first threads of the namespace.
    let here = nix::unistd::gettid().as_raw();
    ensure!(here < 100, "not in a namespace of its own: thread {here}");
    for kind in ebpf_kinds() {
        captured(kind)?;
    }
    println!("thread ids differ, value captured");
    Ok(())
}

fn captured(kind: Kind) -> Result<()> {
    let rig = Rig::new()?;
    let recorder = Recorder::default();
    let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
    let task = rig.serve(kind, &region, recorder.clone())?;
    let mut program = Program::new();
    program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 0x77);
    program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    let (_, vcpu) = rig.run(&program)?;
    ensure!(matches!(recorder.told()[0], Told::Ring(ring) if ring.value == Some(0x77)));
    ensure!(vcpu.stats().exits == u64::from(!kind.is_native()));
    ensure!(
        rig.vm
            .program_counters()
            .is_some_and(|counters| counters.matched == 1)
    );
    task.map(Task::finish).transpose()?;
    Ok(())
}
