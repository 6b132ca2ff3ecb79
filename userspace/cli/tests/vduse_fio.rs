//! Disks under fio, an independent witness: it verifies the checksum of every block that it wrote.
//!
//! Runs where the modules are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_fio`.

mod support;

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::load::Random;
use support::mortal::{Mortal, rounds, seed};
use support::{MIB, Service, image, run, wait};

/// fio writing all over a file or disk, and verifying; fails at the first block that is wrong.
fn fio(name: &str, file: &Path, seed: u64, options: &str) -> Command {
    let common = "--direct=1 --ioengine=libaio --rw=randwrite --verify=crc32c --verify_fatal=1 \
                  --do_verify=1 --thread --minimal --eta=never --output=/dev/null";
    let mut fio = Command::new("fio");
    fio.arg(format!("--name={name}"))
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--randseed={seed}"))
        .args(common.split_whitespace())
        .args(options.split_whitespace());
    fio
}

#[test]
fn fio_verifies_files_and_fsck_the_file_system() {
    for (name, options) in [
        ("fio-split", &["--queues", "2"][..]),
        ("fio-packed", &["--packed"]),
        ("fio-plain", &["--no-io-uring"]),
    ] {
        let seed = seed();
        println!("{name}: seed {seed}");
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, 48 * MIB);
        let service = Service::start(name, &image, options);
        run(Command::new("mkfs.ext4").arg("-q").arg(&service.disk));
        let place = dir.path().join("mnt");
        std::fs::create_dir(&place).unwrap();
        let (kind, none) = (Some("ext4"), None::<&str>);
        mount(Some(&service.disk), &place, kind, MsFlags::empty(), none).unwrap();
        let small = "--size=16m --bsrange=4k-64k --iodepth=32";
        run(&mut fio(name, &place.join("small"), seed, small));
        let large = "--size=16m --bs=128k --iodepth=4";
        run(&mut fio(name, &place.join("large"), seed, large));
        umount2(&place, MntFlags::empty()).unwrap();
        run(Command::new("e2fsck").arg("-fn").arg(&service.disk));
        service.end();
        run(Command::new("e2fsck").arg("-fn").arg(&image));
    }
}

/// Whether a child still runs.
fn runs(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_none()
}

#[test]
fn fio_finds_every_block_whole_after_services_were_killed_under_it() {
    let rounds = rounds();
    for (name, options) in [
        ("fio-kills", &["--queues", "2"][..]),
        ("fio-kills-p", &["--packed"]),
    ] {
        let seed = seed();
        println!("{name}: seed {seed}");
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, 8 * MIB);
        let mut mortal = Mortal::start(name, &image, options);
        // A pass writes and verifies everything; passes until the last kill is survived.
        let load = "--size=8m --bs=4k --iodepth=32 --verify_backlog=256";
        let disk = mortal.service.disk.clone();
        let start = || fio(name, &disk, seed, load).spawn().unwrap();
        let (mut child, mut passes) = (start(), 0);
        for round in 0..rounds {
            // Mostly while requests are carried out, now and then while the disk is taken over.
            if round > 0 && round % 4 != 3 {
                mortal.wait_until_taken_over();
            }
            std::thread::sleep(Duration::from_millis(random.below(200)));
            if !runs(&mut child) {
                let status = wait(&mut child);
                assert!(status.success(), "{name}, pass {passes}: {status}");
                (child, passes) = (start(), passes + 1);
            }
            mortal.kill();
            mortal.revive();
        }
        let status = wait(&mut child);
        assert!(status.success(), "{name}, last pass: {status}");
        let taken = mortal.taken_over();
        let lost = taken.iter().filter(|&&count| count > 0).count();
        println!(
            "{name}: {rounds} kills, {} passes, {} queues taken over, {lost} with requests in \
             flight",
            passes + 1,
            taken.len()
        );
        assert!(lost > 0, "no service was killed with requests in flight");
        mortal.service.end();
    }
}
