//! `ioregion vduse blk` with the kernel's own drivers: VDUSE, virtio_vdpa and virtio_blk.
//!
//! Runs where these are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_blk`.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use ioregion_vduse::{Control, DeviceConfig};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use support::{
    MIB, Service, buffer, command, disk_named, disk_with, driver, fill, image, pattern, run, wait,
    write_and_compare,
};

nix::ioctl_write_ptr_bad!(
    /// `BLKDISCARD`: first byte and bytes.
    discard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);
nix::ioctl_write_ptr_bad!(
    /// `BLKZEROOUT`: first byte and bytes.
    zero_out,
    nix::request_code_none!(0x12, 127),
    [u64; 2]
);

#[test]
fn disk_holds_what_is_written() {
    for (name, options, queues) in [
        ("one", &[][..], 1),
        ("two", &["--queues", "2", "--queue-size", "16"][..], 2),
        ("packed", &["--packed"][..], 1),
        ("direct", &["--direct", "--queues", "2"][..], 2),
        ("at-once", &["--no-io-uring"][..], 1),
        ("once-direct", &["--no-io-uring", "--direct"][..], 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, 8 * MIB);
        let service = Service::start(name, &image, options);
        assert_eq!(service.says("size"), (8 * MIB / 512).to_string());
        assert_eq!(service.says("queue/write_cache"), "write back");
        assert_eq!(service.says("queue/logical_block_size"), "512");
        assert_eq!(service.says("queue/physical_block_size"), "4096");
        let hardware = fs::read_dir(format!(
            "/sys/block/{}/mq",
            service.disk.file_name().unwrap().to_str().unwrap()
        ));
        assert_eq!(hardware.unwrap().count(), queues, "{name}");
        // Bit 34 of those that the driver took, as text from bit 0 on.
        let features = service.says("device/features");
        assert_eq!(features.as_bytes()[34] == b'1', name == "packed");
        write_and_compare(&service, &image, 8);
        service.end();
    }
}

#[test]
fn image_without_room_fails_writes_and_nothing_else() {
    for (name, options) in [("full", &[][..]), ("full-at-once", &["--no-io-uring"][..])] {
        let dir = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        let size = Some("size=2m");
        mount(none, dir.path(), Some("tmpfs"), MsFlags::empty(), size).unwrap();
        let image = image(&dir, 8 * MIB);
        let service = Service::start(name, &image, options);
        let disk = service.direct(true);
        let mut data = buffer();
        fill(&mut data, 1);
        disk.write_all_at(&data.0, 0).unwrap();
        let failures: Vec<_> = (1..8)
            .filter_map(|at| disk.write_all_at(&data.0, at * MIB).err())
            .collect();
        // The file system is full after one more, whose room it takes for itself.
        assert!(failures.len() >= 6, "{failures:?}");
        for error in failures {
            assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
        }
        let mut read = buffer();
        disk.read_exact_at(&mut read.0, 0).unwrap();
        assert!(read.0 == data.0);
        drop(disk);
        service.end();
        // A ring's files are let go of a moment after its process is gone.
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn parallel_writers_get_what_each_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 16 * MIB);
    let service = Service::start("parallel", &image, &["--queues", "2", "--packed"]);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = service.direct(true);
            scope.spawn(move || {
                let (mut data, mut read) = (buffer(), buffer());
                for round in 0..4 {
                    let at = (4 * thread + round) * MIB;
                    fill(&mut data, at + round);
                    disk.write_all_at(&data.0, at).unwrap();
                    disk.read_exact_at(&mut read.0, at).unwrap();
                    assert!(read.0 == data.0, "thread {thread}, round {round}");
                }
            });
        }
    });
    service.end();
}

fn mount_ext4(service: &Service, place: &Path) {
    let (kind, options) = (Some("ext4"), None::<&str>);
    mount(Some(&service.disk), place, kind, MsFlags::empty(), options).unwrap();
}

#[test]
fn file_system_lives_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 64 * MIB);
    let service = Service::start("ext4", &image, &["--queues", "2"]);
    run(Command::new("mkfs.ext4").arg("-q").arg(&service.disk));
    let place = dir.path().join("mnt");
    fs::create_dir(&place).unwrap();
    let file = |number: u64| place.join(format!("file-{number}"));
    let content = |number: u64| {
        let words = pattern(number);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes[..(number as usize + 1) * 50_000].to_vec()
    };
    mount_ext4(&service, &place);
    for number in 0..20 {
        fs::write(file(number), content(number)).unwrap();
    }
    for number in (0..20).step_by(3) {
        fs::remove_file(file(number)).unwrap();
    }
    umount2(&place, MntFlags::empty()).unwrap();
    run(Command::new("e2fsck").arg("-fn").arg(&service.disk));
    service.end();

    // The same file system with another service, of another kind.
    let service = Service::start("ext4-again", &image, &["--packed"]);
    mount_ext4(&service, &place);
    for number in 0..20 {
        match fs::read(file(number)) {
            Ok(bytes) => assert!(number % 3 != 0 && bytes == content(number), "file {number}"),
            Err(_) => assert_eq!(number % 3, 0, "file {number}"),
        }
    }
    umount2(&place, MntFlags::empty()).unwrap();
    service.end();
    run(Command::new("e2fsck").arg("-fn").arg(&image));
}

#[test]
fn disk_is_resized_while_it_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 16 * MIB);
    let service = Service::start("resized", &image, &[]);
    run(Command::new("mkfs.ext4").arg("-q").arg(&service.disk));
    let place = dir.path().join("mnt");
    fs::create_dir(&place).unwrap();
    mount_ext4(&service, &place);
    let free = || {
        let stat = nix::sys::statvfs::statvfs(&place).unwrap();
        stat.blocks_available() * stat.fragment_size()
    };
    let before = free();
    let resize = |bytes| {
        OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(bytes)
    };
    resize(48 * MIB).unwrap();
    service.resized(48 * MIB);
    run(Command::new("resize2fs").arg(&service.disk));
    assert!(
        free() > before + 24 * MIB,
        "{before} bytes were free, {} are",
        free()
    );
    let content = vec![7; 24 << 20];
    fs::write(place.join("large"), &content).unwrap();
    umount2(&place, MntFlags::empty()).unwrap();
    run(Command::new("e2fsck").arg("-fn").arg(&service.disk));
    mount_ext4(&service, &place);
    assert!(fs::read(place.join("large")).unwrap() == content);
    umount2(&place, MntFlags::empty()).unwrap();
    // A size that no disk can have is refused, and the disk goes on.
    resize(48 * MIB + 1).unwrap();
    service.signal(Signal::SIGHUP);
    resize(64 * MIB).unwrap();
    service.resized(64 * MIB);
    service.end();
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 4 * MIB);
    let service = Service::start("ranges", &image, &[]);
    write_and_compare(&service, &image, 4);
    let disk = service.direct(true);
    let zeroed = [MIB / 2, MIB];
    let discarded = [3 * MIB, MIB / 2];
    // SAFETY: The request reads two integers, first byte and bytes.
    unsafe { zero_out(disk.as_raw_fd(), &raw const zeroed) }.unwrap();
    // SAFETY: As above.
    unsafe { discard(disk.as_raw_fd(), &raw const discarded) }.unwrap();
    let (mut data, mut read) = (buffer(), buffer());
    for number in 0..4 {
        fill(&mut data, number);
        match number {
            0 => data.0[1 << 19..].fill(0),
            1 => data.0[..1 << 19].fill(0),
            // Of a file, discarded ranges read as zeroes.
            3 => data.0[..1 << 19].fill(0),
            _ => {}
        }
        disk.read_exact_at(&mut read.0, number * MIB).unwrap();
        assert!(read.0 == data.0, "mebibyte {number}");
    }
    service.end();
}

#[test]
fn read_only_disk_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, MIB);
    let mut data = buffer();
    fill(&mut data, 5);
    fs::write(&image, data.0).unwrap();
    let service = Service::start("ro", &image, &["--read-only"]);
    assert_eq!(service.says("ro"), "1");
    let written = OpenOptions::new()
        .write(true)
        .open(&service.disk)
        .and_then(|disk| {
            disk.write_all_at(&[1; 512], 0)?;
            disk.sync_all()
        });
    assert!(written.is_err());
    let mut read = buffer();
    service.direct(false).read_exact_at(&mut read.0, 0).unwrap();
    assert!(read.0 == data.0);
    service.end();
    assert!(fs::read(&image).unwrap() == data.0);
}

#[test]
fn driver_may_let_go_under_load_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 4 * MIB);
    let mut service = Service::start("rebound", &image, &["--queues", "2"]);
    for _ in 0..5 {
        write_and_compare(&service, &image, 4);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4u64)
                .map(|number| {
                    let disk = service.direct(false);
                    scope.spawn(move || {
                        let mut data = buffer();
                        let mut reads = 0;
                        while disk.read_exact_at(&mut data.0, number * MIB).is_ok() {
                            reads += 1;
                        }
                        reads
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(300));
            driver("unbind", "rebound");
            // Each ended with an error: nobody hangs.
            let reads: u32 = readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .sum();
            assert!(reads > 0);
        });
        assert_eq!(disk_with("serial-rebound"), None);
        driver("bind", "rebound");
        service.disk = disk_named("serial-rebound", || {});
    }
    write_and_compare(&service, &image, 4);
    service.end();
}

#[test]
fn service_that_answers_too_late_says_so_and_makes_its_device_anew() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, MIB);
    let said = dir.path().join("said");
    let mut command = command("late", &image);
    let mut service = Service::start_as("late", command.stderr(File::create(&said).unwrap()));
    for times in 1..3 {
        write_and_compare(&service, &image, 1);
        fs::write("/sys/class/vduse/late/msg_timeout", "1").unwrap();
        service.signal(Signal::SIGSTOP);
        // The driver resets the device, in vain, and goes.
        driver("unbind", "late");
        assert_eq!(disk_with("serial-late"), None);
        service.signal(Signal::SIGCONT);
        // Nobody binds the driver: it finds a new device.
        service.disk = disk_named("serial-late", || {});
        let text = fs::read_to_string(&said).unwrap();
        let says = "device late: the kernel has marked it broken";
        assert_eq!(text.matches(says).count(), times, "{text}");
        let timeout = fs::read_to_string("/sys/class/vduse/late/msg_timeout").unwrap();
        assert_eq!(timeout.trim(), "30");
    }
    write_and_compare(&service, &image, 1);
    service.end();
}

#[test]
fn errors_of_the_image_reach_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 2 * MIB);
    let service = Service::start("errors", &image, &[]);
    OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    let disk = service.direct(false);
    let mut data = buffer();
    disk.read_exact_at(&mut data.0, 0).unwrap();
    let error = disk.read_exact_at(&mut data.0, MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    // The device goes on.
    disk.read_exact_at(&mut data.0, 0).unwrap();
    service.end();
}

#[test]
fn service_that_cannot_start_says_why_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, MIB);
    let service = Service::start("first", &image, &[]);
    let other = dir.path().join("other");
    File::create(&other).unwrap().set_len(MIB).unwrap();
    let fails = |name: &str, image: &Path, says: &str| {
        let mut child = command(name, image).stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(1));
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(text.contains(says), "{text}");
    };
    fails("second", &image, "in use by another process");
    fails("first", &other, "another process serves the device");
    fails("a/b", &other, "cannot be a device's name");
    fails("third", Path::new("/nonexistent"), "/nonexistent");
    assert!(!Path::new("/dev/vduse/second").exists());
    write_and_compare(&service, &image, 1);
    service.end();
}

#[test]
fn kernel_refuses_what_vduse_devices_cannot_have() {
    let control = Control::open().unwrap();
    assert_eq!((control.version(), control.features()), (0, 0));
    let needed = 1 << 32 | 1 << 33;
    let (net, blk) = (1, 2);
    for (device_id, features) in [
        // The net device's control queue; a disk's cache that the driver can switch.
        (net, needed | 1 << 17),
        (blk, needed | 1 << 11),
        (blk, 1 << 32),
        (3, needed),
    ] {
        let error = control.create(&DeviceConfig {
            name: "refused".into(),
            device_id,
            vendor_id: 0,
            features,
            queues: 1,
            config: vec![0; 8],
        });
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("refused") && error.contains("Invalid argument"),
            "{error}"
        );
    }
    let error = control.destroy("nobody").unwrap_err().to_string();
    assert!(error.contains("nobody"), "{error}");
    // Whatever the kernel has is agreed upon, and nothing else.
    let newest = Control::negotiate(1, !0).unwrap();
    assert!(newest.version() <= 1 && newest.features() <= 3);
}
