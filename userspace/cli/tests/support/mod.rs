//! A running service, and its disk.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod inject;
pub mod load;
pub mod mortal;
pub mod net;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Emulated machines are slow, and others may hold them up.
pub const LONG: Duration = Duration::from_secs(300);
pub const MIB: u64 = 1 << 20;

/// A running service, ended at the latest with the test.
pub struct Service {
    pub child: Child,
    pub name: String,
    pub disk: PathBuf,
}

impl Service {
    /// Starts a service with a disk of its own and waits for the disk.
    pub fn start(name: &str, image: &Path, options: &[&str]) -> Self {
        Self::start_as(name, command(name, image).args(options))
    }

    pub fn start_as(name: &str, command: &mut Command) -> Self {
        let serial = format!("serial-{name}");
        let mut child = command.args(["--serial", &serial]).spawn().unwrap();
        let disk = disk_named(&serial, || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "the service ended: {ended:?}");
        });
        Self {
            child,
            name: name.into(),
            disk,
        }
    }

    /// What the kernel says of the disk.
    pub fn says(&self, what: &str) -> String {
        let name = self.disk.file_name().unwrap();
        let path = Path::new("/sys/block").join(name).join(what);
        fs::read_to_string(path).unwrap().trim().into()
    }

    /// The disk past all caches: every access reaches the service.
    pub fn direct(&self, write: bool) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(write).custom_flags(libc::O_DIRECT);
        options.open(&self.disk).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Has the service take over the image's size, and waits until the kernel knows it.
    pub fn resized(&self, bytes: u64) {
        self.signal(Signal::SIGHUP);
        let until = Instant::now() + LONG;
        while self.says("size") != (bytes / 512).to_string() {
            assert!(Instant::now() < until, "the disk keeps its size");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the service by SIGTERM: disk and device are gone, and it succeeded.
    pub fn end(mut self) {
        self.signal(Signal::SIGTERM);
        let status = wait(&mut self.child);
        assert!(status.success(), "{status}");
        self.is_gone();
    }

    /// Nothing is left of disk and device.
    pub fn is_gone(&self) {
        assert!(!self.disk.exists());
        assert!(!Path::new("/dev/vduse").join(&self.name).exists());
        let bus = Path::new("/sys/bus/vdpa/devices");
        assert!(!bus.join(&self.name).exists());
    }
}

/// Has the driver let go of a device, or take it (`unbind`, `bind`).
pub fn driver(what: &str, name: &str) {
    let file = Path::new("/sys/bus/vdpa/drivers/virtio_vdpa").join(what);
    fs::write(&file, name).unwrap_or_else(|error| panic!("{what}: {error}"));
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            // It may have been stopped.
            self.signal(Signal::SIGCONT);
            self.signal(Signal::SIGTERM);
            wait(&mut self.child);
        }
    }
}

pub fn command(name: &str, image: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ioregion"));
    command
        .args(["vduse", "blk", "--name", name, "--image"])
        .arg(image);
    command
}

pub fn wait(child: &mut Child) -> ExitStatus {
    let until = Instant::now() + LONG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("the service does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the disk with a serial number, looking at something else meanwhile.
pub fn disk_named(serial: &str, mut check: impl FnMut()) -> PathBuf {
    let until = Instant::now() + LONG;
    loop {
        if let Some(disk) = disk_with(serial) {
            return disk;
        }
        check();
        assert!(Instant::now() < until, "no disk appeared");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The disk with a serial number, once it can be opened.
pub fn disk_with(serial: &str) -> Option<PathBuf> {
    let name = fs::read_dir("/sys/block").unwrap().find_map(|entry| {
        let entry = entry.unwrap();
        let says = fs::read_to_string(entry.path().join("serial")).ok()?;
        (says.trim() == serial).then(|| entry.file_name())
    })?;
    let disk = Path::new("/dev").join(name);
    // The file is there before the disk is.
    File::open(&disk).is_ok().then_some(disk)
}

pub fn image(dir: &tempfile::TempDir, bytes: u64) -> PathBuf {
    let path = dir.path().join("image");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// The bytes of a mebibyte of a disk, different for each and each time.
pub fn pattern(seed: u64) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).take(1 << 17).collect()
}

/// A mebibyte at an address that O_DIRECT can use.
#[repr(C, align(4096))]
pub struct Buffer(pub [u8; 1 << 20]);

pub fn buffer() -> Box<Buffer> {
    Box::new(Buffer([0; 1 << 20]))
}

pub fn fill(buffer: &mut Buffer, seed: u64) {
    for (to, word) in buffer.0.chunks_mut(8).zip(pattern(seed)) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// Writes all of a disk, in requests of mixed sizes, and reads it back, from the disk and from
/// the image.
pub fn write_and_compare(service: &Service, image: &Path, mib: u64) {
    let disk = service.direct(true);
    let mut data = buffer();
    for number in 0..mib {
        fill(&mut data, number);
        let mut at = 0;
        // 512 bytes to 256 KiB, in turn; what is left at the end is one more size.
        for exponent in (9..19).cycle() {
            let end = (at + (1usize << exponent)).min(data.0.len());
            disk.write_all_at(&data.0[at..end], number * MIB + at as u64)
                .unwrap();
            at = end;
            if at == data.0.len() {
                break;
            }
        }
    }
    disk.sync_all().unwrap();
    let image = File::open(image).unwrap();
    let mut read = buffer();
    for number in 0..mib {
        fill(&mut data, number);
        for file in [&disk, &image] {
            file.read_exact_at(&mut read.0, number * MIB).unwrap();
            assert!(read.0 == data.0, "mebibyte {number} differs");
        }
    }
}

pub fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
