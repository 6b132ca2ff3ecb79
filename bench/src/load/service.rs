//! A service with its disk.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ioregion_vduse::vdpa;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::processes::{self, Cpu};
use super::{LoadArgs, QUEUE_SIZE, QUEUES};

/// Until a disk appears or a service ends.
const LIMIT: Duration = Duration::from_secs(120);

/// Our command line.
pub fn ours(args: &LoadArgs, image: &Path) -> Vec<OsString> {
    let mut words = vec![args.program.clone().into_os_string()];
    words.extend(
        [
            "vduse", "blk", "--name", "ours", "--serial", "ours", "--image",
        ]
        .map(Into::into),
    );
    words.push(image.into());
    words.extend(["--queues".into(), QUEUES.to_string().into()]);
    words.extend(["--queue-size".into(), QUEUE_SIZE.to_string().into()]);
    words.extend((!args.cached).then(|| "--direct".into()));
    words.extend(args.no_io_uring.then(|| "--no-io-uring".into()));
    words
}

/// The peer's.
pub fn theirs(args: &LoadArgs, image: &Path) -> Vec<OsString> {
    let aio = if args.no_io_uring {
        "threads"
    } else {
        "io_uring"
    };
    let direct = if args.cached { "off" } else { "on" };
    let file = format!(
        "driver=file,node-name=file,filename={},cache.direct={direct},aio={aio}",
        image.display()
    );
    let export = format!(
        "type=vduse-blk,id=export,node-name=raw,name=theirs,serial=theirs,writable=on,\
         num-queues={QUEUES},queue-size={QUEUE_SIZE}"
    );
    [
        "qemu-storage-daemon",
        "--blockdev",
        &file,
        "--blockdev",
        "driver=raw,node-name=raw,file=file",
        "--export",
        &export,
    ]
    .map(Into::into)
    .into()
}

/// A command line without the folders of programs and files.
pub fn line(words: &[OsString]) -> String {
    let words = words.iter().map(|word| {
        let word = word.to_string_lossy();
        match Path::new(&*word).file_name() {
            Some(name) if word.starts_with('/') => name.to_string_lossy().into_owned(),
            _ => word.into_owned(),
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A running service.
pub struct Service {
    child: Child,
    name: &'static str,
    /// Whether it does not take its device on and off the bus itself.
    attached: bool,
    /// The disk.
    pub disk: PathBuf,
}

impl Service {
    /// Starts one and waits for its disk.
    pub fn start(name: &'static str, words: Vec<OsString>, attach: bool) -> Result<Self> {
        let [program, args @ ..] = &words[..] else {
            bail!("no program");
        };
        let child = Command::new(program).args(args).spawn();
        let child = child.with_context(|| format!("starting {}", program.display()))?;
        let mut service = Self {
            child,
            name,
            attached: false,
            disk: PathBuf::new(),
        };
        if attach {
            let device = Path::new("/dev/vduse").join(name);
            service.wait("a device", || Ok(device.exists().then_some(())))?;
            vdpa::attach(name)?;
            service.attached = true;
        }
        service.disk = service.wait("a disk", || disk(name))?;
        Ok(service)
    }

    fn wait<T>(&mut self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended before it had {what}: {status}", self.name);
            }
            ensure!(Instant::now() < until, "{} has not {what}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// CPU time so far.
    pub fn cpu(&self) -> Result<Cpu> {
        processes::cpu(self.pid())
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> Result<u64> {
        processes::resident(self.pid())
    }

    /// Takes the disk away and ends the service.
    pub fn end(mut self) -> Result<()> {
        if std::mem::take(&mut self.attached) {
            vdpa::detach(self.name)?;
        }
        kill(self.pid(), Signal::SIGTERM)?;
        let until = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < until, "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "{}: {status}", self.name);
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Where something went wrong: the VM ends anyway.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The disk with a serial number.
fn disk(serial: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let says = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        let disk = Path::new("/dev").join(entry.file_name());
        if says.trim_matches(['\0', '\n', ' ']) == serial && disk.exists() {
            return Ok(Some(disk));
        }
    }
    Ok(None)
}
