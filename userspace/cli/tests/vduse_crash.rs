//! Services that are killed and started again, with the kernel's own drivers.
//!
//! Runs where the modules are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_crash`.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::load::{Load, Random};
use support::mortal::{Mortal, rounds, seed};
use support::{
    LONG, MIB, Service, buffer, command, disk_named, driver, fill, image, wait, write_and_compare,
};

#[test]
fn disk_outlives_killed_services_without_losing_or_doubling_anything() {
    for (name, options) in [
        ("killed-split", &["--queues", "2"][..]),
        ("killed-packed", &["--queues", "2", "--packed"]),
        ("killed-small", &["--queue-size", "8", "--packed"]),
    ] {
        let seed = seed();
        println!("{name}: seed {seed}");
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, 8 * MIB);
        let mut mortal = Mortal::start(name, &image, options);
        let load = Load::start(&mortal.service.disk, &image, 8, 256, seed);
        for round in 0..rounds() {
            // At any moment: often while the disk is taken over, and never for long without any
            // progress.
            if round % 4 == 3 {
                load.progress(1 + random.below(200));
            } else {
                std::thread::sleep(Duration::from_millis(random.below(400)));
            }
            mortal.kill();
            mortal.revive();
        }
        load.progress(100);
        load.finish();
        let taken = mortal.taken_over();
        let lost = taken.iter().filter(|&&count| count > 0).count();
        println!(
            "{name}: {} queues taken over, {lost} with requests in flight",
            taken.len()
        );
        assert!(lost > 0, "no service was killed with requests in flight");
        mortal.service.end();
    }
}

#[test]
fn service_that_is_killed_before_its_disk_is_there_is_followed_by_another() {
    let seed = seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for round in 0..rounds() / 2 {
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, 2 * MIB);
        let name = format!("early-{round}");
        let mut child = command(&name, &image).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.below(150)));
        child.kill().unwrap();
        wait(&mut child);
        let service = Service::start(&name, &image, &[]);
        write_and_compare(&service, &image, 2);
        service.end();
    }
}

#[test]
fn driver_that_goes_while_nobody_serves_is_answered_by_the_next_service() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 2 * MIB);
    let mut mortal = Mortal::start("gone", &image, &[]);
    for _ in 0..3 {
        write_and_compare(&mortal.service, &image, 2);
        mortal.kill();
        std::thread::scope(|scope| {
            let going = scope.spawn(|| driver("unbind", "gone"));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!going.is_finished(), "the driver waits for nobody");
            mortal.revive();
        });
        // The next one finds a device without a driver.
        mortal.kill();
        mortal.revive();
        driver("bind", "gone");
        mortal.service.disk = disk_named("serial-gone", || {});
    }
    write_and_compare(&mortal.service, &image, 2);
    assert!(!mortal.said().contains("ERROR"), "{}", mortal.said());
    mortal.service.end();
}

#[test]
fn disk_that_grew_while_nobody_served_it_has_its_new_size() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 2 * MIB);
    let mut mortal = Mortal::start("grown", &image, &[]);
    mortal.kill();
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(4 * MIB).unwrap();
    mortal.revive();
    let until = Instant::now() + LONG;
    while mortal.service.says("size") != (4 * MIB / 512).to_string() {
        assert!(Instant::now() < until, "the disk keeps its size");
        std::thread::sleep(Duration::from_millis(20));
    }
    write_and_compare(&mortal.service, &image, 4);
    mortal.service.end();
}

#[test]
fn service_that_cannot_take_over_says_why_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 2 * MIB);
    let mut mortal = Mortal::start("kept", &image, &["--queues", "2"]);
    write_and_compare(&mortal.service, &image, 2);
    let log = Path::new("/run/ioregion/vduse-kept.log");
    let fails = |options: &[&str], says: &str| {
        let mut command = command("kept", &image);
        let serial = ["--serial", "serial-kept"];
        command.args(serial).args(options).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(1), "{options:?}");
        let mut text = String::new();
        let mut stderr = child.stderr.take().unwrap();
        stderr.read_to_string(&mut text).unwrap();
        assert!(text.contains(says), "{options:?}: {text}");
    };
    mortal.kill();
    let same = ["--queues", "2"];
    fails(&[], "it has not the 1 queues");
    fails(
        &[&same[..], &["--packed"]].concat(),
        "the options of the one before",
    );
    fails(
        &[&same[..], &["--queue-size", "16"]].concat(),
        "was made with 256 as queue size",
    );
    fails(&[&same[..], &["--read-only"]].concat(), "as features");
    // Other files than the log.
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let with_log = |path: &str, says: &str| {
        fails(&[&same[..], &["--log", path]].concat(), says);
    };
    with_log(&file("empty", &[]), "does not say what it waits for");
    with_log(&file("text", b"something else"), "is no log of a device");
    assert!(fs::read(dir.path().join("text")).unwrap() == b"something else");
    let whole = fs::read(log).unwrap();
    with_log(
        &file("short", &whole[..whole.len() - 8]),
        "is no log of a device",
    );
    let mut other = whole.clone();
    other[8] = 7;
    with_log(&file("other", &other), "is of version 7");
    // Another device does not get this one's log.
    let second = dir.path().join("second");
    File::create(&second).unwrap().set_len(MIB).unwrap();
    let mut child = command("thief", &second)
        .args(["--log", log.to_str().unwrap()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(wait(&mut child).code(), Some(1));
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(text.contains("is the log of the device kept"), "{text}");
    assert!(!Path::new("/dev/vduse/thief").exists());
    // And the right one goes on.
    mortal.revive();
    write_and_compare(&mortal.service, &image, 2);
    mortal.service.end();
    assert!(!log.exists());
}

#[test]
fn disk_goes_on_without_its_log_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir, 2 * MIB);
    let path = dir.path().join("log");
    let mortal = Mortal::start("cut", &image, &["--log", path.to_str().unwrap()]);
    write_and_compare(&mortal.service, &image, 2);
    let log = OpenOptions::new().write(true).open(&path).unwrap();
    log.set_len(0).unwrap();
    write_and_compare(&mortal.service, &image, 2);
    mortal.wait_for("was cut short");
    mortal.service.end();
}

#[test]
fn file_system_without_room_reaches_the_driver_as_errors() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let none = None::<&str>;
    let flags = MsFlags::empty();
    mount(Some("none"), &small, Some("tmpfs"), flags, Some("size=2m")).unwrap();
    let path = small.join("image");
    File::create(&path).unwrap().set_len(8 * MIB).unwrap();
    let service = Service::start("full", &path, &[]);
    let disk = service.direct(true);
    let (mut data, mut read) = (buffer(), buffer());
    let mut written = 0;
    let error = loop {
        fill(&mut data, written);
        match disk.write_all_at(&data.0, written * MIB) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 8, "the file system has room for everything");
    };
    // virtio-blk has one error for everything.
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(written > 0);
    // The disk goes on, and so do writes once there is room.
    for number in 0..written {
        fill(&mut data, number);
        disk.read_exact_at(&mut read.0, number * MIB).unwrap();
        assert!(read.0 == data.0, "mebibyte {number}");
    }
    mount(
        none,
        &small,
        none,
        flags | MsFlags::MS_REMOUNT,
        Some("size=16m"),
    )
    .unwrap();
    write_and_compare(&service, &path, 8);
    service.end();
    // A ring's files are let go of a moment after its process is gone.
    umount2(&small, MntFlags::MNT_DETACH).unwrap();
}
