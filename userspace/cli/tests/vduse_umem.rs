//! `ioregion vduse blk --umem`: the bounce buffer of the kernel's driver is the service's memory.
//!
//! Runs where VDUSE and virtio_vdpa are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_umem`.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use support::{
    LONG, MIB, Service, buffer, command, disk_named, disk_with, driver, fill, image, wait,
    write_and_compare,
};

/// Bounce buffer of a test's device, in MiB.
const SIZE: u64 = 8;
const OPTIONS: [&str; 2] = ["--umem", "8"];

/// What the kernel has pinned of the service's memory, in bytes.
fn pinned(service: &Service) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", service.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

/// The file that is the service's bounce buffer, if it has one.
fn memory(service: &Service) -> Option<PathBuf> {
    let folder = format!("/proc/{}/fd", service.child.id());
    let files = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path());
    files.into_iter().find(|file| {
        let link = fs::read_link(file).unwrap_or_default();
        link.to_string_lossy().contains("memfd:vduse-bounce")
    })
}

/// Whether a page of the service's buffer holds what a page of `bytes` holds.
fn holds(service: &Service, bytes: &[u8]) -> bool {
    let mut all = vec![0; usize::try_from(SIZE * MIB).unwrap()];
    let file = File::open(memory(service).unwrap()).unwrap();
    file.read_exact_at(&mut all, 0).unwrap();
    all.chunks(4096)
        .any(|page| bytes.chunks(4096).any(|wanted| page == wanted))
}

/// Waits until the kernel has let go of the buffer, which is then empty.
fn is_released(service: &Service) {
    let until = Instant::now() + LONG;
    while pinned(service) != 0 {
        assert!(
            Instant::now() < until,
            "{} bytes are pinned",
            pinned(service)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let memory = fs::metadata(memory(service).unwrap()).unwrap();
    assert_eq!((memory.size(), memory.blocks()), (SIZE * MIB, 0));
}

#[test]
fn data_goes_through_memory_of_the_service() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 4 * MIB);
    for (seed, name, options) in [
        (1000, "umem", &[][..]),
        (1001, "umem-direct", &["--direct", "--queues", "2"][..]),
        (1002, "umem-at-once", &["--no-io-uring", "--packed"][..]),
    ] {
        let service = Service::start(name, &image, &[&OPTIONS, options].concat());
        let size = fs::read_to_string(format!("/sys/class/vduse/{name}/bounce_size")).unwrap();
        assert_eq!(size.trim(), (SIZE * MIB).to_string());
        write_and_compare(&service, &image, 4);
        assert_eq!(pinned(&service), SIZE * MIB);
        let mut data = buffer();
        // Not what is on the disk already: whoever looks for partitions reads that.
        fill(&mut data, seed);
        assert!(!holds(&service, &data.0));
        service.direct(true).write_all_at(&data.0, 0).unwrap();
        assert!(holds(&service, &data.0));
        service.end();
    }
    // Otherwise the buffer is the kernel's.
    let service = Service::start("umem-not", &image, &[]);
    write_and_compare(&service, &image, 1);
    assert_eq!((pinned(&service), memory(&service)), (0, None));
    service.end();
}

#[test]
fn memory_is_given_back_at_every_reset_and_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 4 * MIB);
    let mut service = Service::start("umem-reset", &image, &OPTIONS);
    for _ in 0..3 {
        write_and_compare(&service, &image, 4);
        assert_eq!(pinned(&service), SIZE * MIB);
        std::thread::scope(|scope| {
            for number in 0..2u64 {
                let disk = service.direct(false);
                scope.spawn(move || {
                    let mut data = buffer();
                    // Until the driver is gone.
                    while disk.read_exact_at(&mut data.0, number * MIB).is_ok() {}
                });
            }
            std::thread::sleep(Duration::from_millis(200));
            driver("unbind", "umem-reset");
        });
        assert_eq!(disk_with("serial-umem-reset"), None);
        is_released(&service);
        driver("bind", "umem-reset");
        service.disk = disk_named("serial-umem-reset", || {});
    }
    write_and_compare(&service, &image, 4);
    service.end();
}

#[test]
fn service_that_takes_over_brings_memory_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 4 * MIB);
    let mut service = Service::start("umem-killed", &image, &OPTIONS);
    let serial = "serial-umem-killed";
    for round in 0..3u64 {
        write_and_compare(&service, &image, 4);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let done = &done;
            for number in 0..2u64 {
                let disk = service.direct(true);
                scope.spawn(move || {
                    let (mut data, mut read) = (buffer(), buffer());
                    let mut again = 0;
                    while !done.load(Ordering::SeqCst) {
                        let at = (2 * number + again % 2) * MIB;
                        fill(&mut data, 1000 * round + 100 * number + again);
                        disk.write_all_at(&data.0, at).unwrap();
                        disk.read_exact_at(&mut read.0, at).unwrap();
                        assert!(read.0 == data.0, "round {round}, byte {at}");
                        again += 1;
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(50 * (round + 1)));
            service.signal(Signal::SIGKILL);
            wait(&mut service.child);
            let mut next = command("umem-killed", &image);
            next.args(OPTIONS).args(["--serial", serial]);
            service.child = next.spawn().unwrap();
            // The requests that waited, and others.
            let until = Instant::now() + LONG;
            while pinned(&service) != SIZE * MIB && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
            std::thread::sleep(Duration::from_millis(300));
            done.store(true, Ordering::SeqCst);
        });
        assert_eq!(pinned(&service), SIZE * MIB);
    }
    write_and_compare(&service, &image, 4);
    service.end();
}

#[test]
fn memory_that_may_not_be_pinned_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, MIB);
    let mut command = command("umem-poor", &image);
    command.args(OPTIONS).stderr(Stdio::piped());
    // SAFETY: System calls only, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            setrlimit(Resource::RLIMIT_MEMLOCK, MIB, MIB)?;
            // CAP_SYS_RESOURCE, with which limits can be raised.
            match libc::prctl(libc::PR_CAPBSET_DROP, 24, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    refused(command, "RLIMIT_MEMLOCK");
    assert!(!PathBuf::from("/dev/vduse/umem-poor").exists());

    // A device that is on the bus keeps its size.
    let mut service = Service::start("umem-size", &image, &OPTIONS);
    service.signal(Signal::SIGKILL);
    wait(&mut service.child);
    let mut other = support::command("umem-size", &image);
    other.args(["--umem", "16", "--serial", "serial-umem-size"]);
    other.stderr(Stdio::piped());
    refused(other, "bounce_size");
    let mut same = support::command("umem-size", &image);
    same.args(OPTIONS).args(["--serial", "serial-umem-size"]);
    service.child = same.spawn().unwrap();
    write_and_compare(&service, &image, 1);
    service.end();
}

fn refused(mut command: Command, says: &str) {
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(says), "{text}");
}
