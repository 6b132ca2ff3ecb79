//! The device in `ioregion-vduse`'s documentation, with the kernel's own drivers.
//!
//! Runs where these are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_example`.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use support::{MIB, buffer, disk_named, fill, wait};

#[test]
fn disk_in_memory_holds_what_is_written() {
    let program = Path::new(env!("CARGO_BIN_EXE_ioregion")).with_file_name("examples/ramdisk");
    let mut command = Command::new(program);
    let mut child = command
        .arg("example")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let disk = disk_named("ramdisk", || assert_eq!(child.try_wait().unwrap(), None));
    let open = || -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        options.open(&disk).unwrap()
    };
    let (mut data, mut read) = (buffer(), buffer());
    let file = open();
    for number in 0..8 {
        fill(&mut data, number);
        file.write_all_at(&data.0, number * MIB).unwrap();
    }
    drop(file);
    let file = open();
    for number in 0..8 {
        fill(&mut data, number);
        file.read_exact_at(&mut read.0, number * MIB).unwrap();
        assert!(read.0 == data.0, "mebibyte {number} differs");
    }
    // Past its end there is nothing.
    assert_eq!(file.read_at(&mut read.0, 8 * MIB).unwrap(), 0);
    drop(file);
    drop(child.stdin.take());
    let status = wait(&mut child);
    assert!(status.success(), "{status}");
    assert!(!disk.exists() && !Path::new("/dev/vduse/example").exists());
}
